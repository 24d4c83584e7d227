"""The client: typed, sync and async, with a timeout on every call.

    with Client("http://127.0.0.1:3000") as client:
        client.embed("photo.jpg").vector                # (D,) float32
        for result in client.embed_many(paths): ...     # thousands, in order, in bounded memory

Calls are idempotent (a job that is requested twice starts once), so they are retried when the connection breaks or the
server is busy, starting or shutting down. The two clients share everything but the I/O: a call is a generator
(`retry.py`) that yields what to send and how long to wait, and `sync.py` and `aio.py` carry it out.
"""

from mixmim_serve.client.aio import AsyncClient
from mixmim_serve.client.images import Image
from mixmim_serve.client.jobs import Job, JobFile
from mixmim_serve.client.results import Anomaly, Classes, Embedding, Features, ModelInfo, Reconstruction, Score
from mixmim_serve.client.retry import Policy
from mixmim_serve.client.sync import Client

__all__ = [
    "Anomaly",
    "AsyncClient",
    "Classes",
    "Client",
    "Embedding",
    "Features",
    "Image",
    "Job",
    "JobFile",
    "ModelInfo",
    "Policy",
    "Reconstruction",
    "Score",
]
