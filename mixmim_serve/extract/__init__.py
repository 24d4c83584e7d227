"""Extract features of millions of images into a folder, in shards written atomically, so that a killed run resumes.

plan.py         a source -> shards, the same every time
pipeline.py     decode ahead of the engine, run in batches; `run_files` for a few files, written nowhere
shard.py        do one shard: read, decode, run, write
table.py        columns; sinks.py, lance.py: rows -> files
folder.py       the output folder, local or behind a URL; lock.py: one run in it at a time
manifest.py     which shards are complete, and what they were made from
job.py          what a run is told; lead.py begins or resumes it and ends it
local.py, ray.py    executors: who calls `extract_shard`, and where
features.py     read the results back, and embed a query image the same way
"""
