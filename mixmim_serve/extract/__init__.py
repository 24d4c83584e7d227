"""Many images to features on disk: in shards that are whole or not there, so that a run can be killed and goes on.

plan.py       a source -> shards, the same each time
pipeline.py   read and decode ahead of the engine, run in batches; files in order, for `mixmim embed`
shard.py      one function does one shard: read, decode, run, write
table.py      columns; sinks.py, lance.py: rows -> files
folder.py     the folder of results, local or behind a URL; lock.py: one run in it at a time
manifest.py   what is whole, and what it was made from
job.py        what a run is told; lead.py begins or resumes it and ends it
local.py, ray.py    executors: who calls `extract_shard`, and where
features.py   reads the results back, and embeds a query as they were
"""
