"""A client of the server: typed, sync and async, with a time limit on everything.

    with Client("http://127.0.0.1:3000") as client:
        client.embed("photo.jpg").vector                # (D,) float32
        for found in client.embed_many(paths): ...      # thousands, in order, in bounded memory

Calls change nothing on the server (a job that is asked for twice is begun once), so each is tried again when the
connection breaks or the server is busy, starting or on its way out. The two clients share all but the I/O: a call is a
generator (`retry.py`) that says what to send and how long to wait, and `sync.py` and `aio.py` do it.
"""

from mixmim_serve.client.aio import AsyncClient
from mixmim_serve.client.images import Image
from mixmim_serve.client.jobs import Job, JobFile
from mixmim_serve.client.results import Classes, Embedding, Features, ModelInfo, Reconstruction, Score
from mixmim_serve.client.retry import Policy
from mixmim_serve.client.sync import Client

__all__ = [
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
