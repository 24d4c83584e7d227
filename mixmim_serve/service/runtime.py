"""The engine room: one engine, its queues, the pool that decodes, and the canary that says whether it is well."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from starlette.datastructures import State

from mixmim_serve.bundle import GOLDEN, Bundle
from mixmim_serve.config import size_name
from mixmim_serve.engines import Engine, engine_fingerprint, open_engine
from mixmim_serve.engines.base import Arrays
from mixmim_serve.engines.buckets import buckets_between
from mixmim_serve.engines.certificate import TOLERANCES, agreement, certify
from mixmim_serve.preprocess import Pixels, decode, resize_and_crop
from mixmim_serve.service.admission import Admission
from mixmim_serve.service.batcher import Batcher, Coming
from mixmim_serve.service.metrics import Metrics
from mixmim_serve.service.problems import RequestError
from mixmim_serve.service.settings import Settings
from mixmim_serve.service.visit import Visit
from mixmim_serve.tasks import RECONSTRUCT_OUTPUTS, random_mask, reconstruct_inputs

PATIENCE = 0.02, 0.08  # seconds, the least and the most, that a batch waits for images that are being decoded
CANARY_SECONDS = 10.0  # for an answer, behind at most one batch
CANARY_AGE = 1.0  # seconds for which one canary speaks; probes of a crowd share it


class Runtime:
    """One engine with its batchers and the pool that decodes.

    Raises:
        EngineError: when the engine's numbers are wrong.
    """

    def __init__(self, engine: Engine, settings: Settings | None = None, metrics: Metrics | None = None) -> None:
        self.engine = engine
        self.settings = settings or Settings()
        self.metrics = metrics or Metrics()
        self.certificate = certify(engine)
        self.certificate.require()
        self.fingerprint = engine_fingerprint(engine)
        self.model_name = size_name(engine.bundle.arch)
        self.admission = Admission(self.settings.max_waiting, self.settings.max_held_bytes)
        self.decoders = ThreadPoolExecutor(self.settings.decoders, thread_name_prefix="decode")
        self.engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.coming = Coming(*PATIENCE) if engine.name.endswith("-cpu") else Coming()
        self.batchers = {graph: self._batcher(graph) for graph in engine.bundle.graphs}
        self.golden = load_file(engine.bundle.path / GOLDEN)
        self._canary: tuple[float, bool] = (-np.inf, False)
        self._checking = asyncio.Lock()
        self._publish()

    @property
    def about(self) -> dict[str, str]:
        """What every answer says of itself."""
        return {"model": self.model_name, "fingerprint": self.fingerprint}

    @property
    def bundle(self) -> Bundle:
        """What is served."""
        return self.engine.bundle

    def _batcher(self, graph: str) -> Batcher:
        size, seconds = self.metrics.batch_size.labels(graph), self.metrics.batch_seconds.labels(graph)

        def observe(images: int, spent: float) -> None:
            size.observe(images)
            seconds.observe(spent)

        return Batcher(self.engine, graph, self.engine_thread, self.settings.max_batch, observe, self.coming)

    def _publish(self) -> None:
        self.metrics.waiting.set_function(lambda: self.admission.images)
        self.metrics.held.set_function(lambda: self.admission.bytes)
        for graph, batcher in self.batchers.items():
            self.metrics.queue.labels(graph).set_function(partial(getattr, batcher, "queued"))
        self.metrics.ready.set_function(lambda: float(self._canary[1]))
        name, precision = self.engine.name, self.engine.precision
        self.metrics.engine.labels(self.model_name, name, precision, self.fingerprint).set(1)

    def warm_up(self) -> None:
        """Run each graph once, so that the first request waits for nothing.

        An engine with a largest batch prepares each bucket when it first meets it: it meets them now.

        Raises:
            EngineError: when the engine cannot answer.
        """
        size, units = self.bundle.arch.image_size, self.bundle.arch.units
        blank = np.zeros((1, size, size, 3), np.uint8)
        largest = self.batchers["encoder"].max_batch
        for batch in buckets_between(1, largest) if self.engine.max_batch else (1,):
            self.engine.run("encoder", {"pixels": blank.repeat(batch, axis=0)}, ["embedding"])
        if "reconstruct" in self.bundle.graphs:
            inputs = reconstruct_inputs(blank, blank, random_mask(units)[None])
            self.engine.run("reconstruct", inputs, RECONSTRUCT_OUTPUTS)

    async def decode(self, image: bytes, visit: Visit) -> Pixels:
        """One image through the pool.

        Raises:
            ImageError: when it is refused.
        """
        began = time.perf_counter()
        try:
            with self.coming:
                return await asyncio.get_running_loop().run_in_executor(self.decoders, self._preprocess, image)
        finally:
            visit.note("decode", time.perf_counter() - began)

    async def encode(self, image: bytes, outputs: Sequence[str], visit: Visit) -> Arrays:
        """Encoder outputs of one image.

        Raises:
            ImageError: when it is refused.
            EngineError: when the engine fails on it.
        """
        return await self.run("encoder", {"pixels": await self.decode(image, visit)}, outputs, visit)

    async def run(self, graph: str, inputs: Arrays, outputs: Sequence[str], visit: Visit) -> Arrays:
        """One item through a graph, in whatever batch comes.

        Raises:
            EngineError: when the engine fails on it.
        """
        ran = await self.batchers[graph].run(inputs, outputs)
        visit.note("queue", ran.queue)
        visit.note("infer", ran.infer)
        return ran.outputs

    async def is_well(self) -> bool:
        """Whether a golden photo, sent through the queue and the engine now, still gives torch's embedding."""
        async with self._checking:
            if time.monotonic() - self._canary[0] > CANARY_AGE:
                self._canary = (time.monotonic(), await self._sing())
        return self._canary[1]

    async def _sing(self) -> bool:
        inputs = {"pixels": self.golden["encoder.pixels"][0]}
        try:
            async with asyncio.timeout(CANARY_SECONDS):
                ran = await self.batchers["encoder"].run(inputs, ["embedding"], urgent=True)
        except Exception:  # whatever keeps the engine from answering
            return False
        found = agreement(ran.outputs["embedding"][None], self.golden["encoder.embedding"][:1])
        return found.within(TOLERANCES[self.engine.precision])

    def _preprocess(self, image: bytes) -> Pixels:
        preprocessing = self.bundle.description.preprocessing
        limits = self.settings
        decoded = decode(image, max_bytes=limits.max_image_bytes, max_pixels=limits.max_pixels)
        return resize_and_crop(decoded, preprocessing)

    def close(self) -> None:
        """End the threads; what runs is finished."""
        self.decoders.shutdown(cancel_futures=True)
        self.engine_thread.shutdown()


def open_runtime(bundle: Bundle | Path, engine: str, settings: Settings, metrics: Metrics) -> Runtime:
    """An engine room that is warm.

    Raises:
        BundleError, EngineError: when the bundle cannot be served.
    """
    runtime = Runtime(open_engine(bundle, engine), settings, metrics)
    runtime.warm_up()
    return runtime


def require_runtime(state: State) -> Runtime:
    """The engine room of an app.

    Raises:
        RequestError: 503, before there is one and when it is about to close.
    """
    runtime: Runtime | None = state.runtime
    if runtime is None or state.draining:
        what = "shutting down" if runtime else "still loading the model"
        raise RequestError(
            503, "not_ready", f"the server is {what}: try again in a second.", headers={"Retry-After": "1"}
        )
    return runtime
