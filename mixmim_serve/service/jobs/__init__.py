"""Extraction that a server does on demand: a durable list, one process at a time that steps back for requests.

roots       what may be read
store       the list, in SQLite: it survives whatever ends the server
runner      takes the next job, and watches the process that does it
worker      that process: `mixmim extract` with the least priority
"""
