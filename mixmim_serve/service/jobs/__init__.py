"""Extraction on demand: a durable list of jobs, and one idle-priority process at a time that runs them.

roots       what jobs may read
options     what a request may ask for
pool        threads for what requests do with them
store       the list, in SQLite: it survives however the server ends
runner      takes the next job and watches its process
worker      that process: `mixmim extract` at idle priority
"""
