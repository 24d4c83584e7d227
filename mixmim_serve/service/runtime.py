"""The engine at work: its queues, the decoder in front of them, and the canary that proves its answers right."""

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

from mixmim_serve.anomaly.detector import Detector, open_detector
from mixmim_serve.bundle import GOLDEN, Bundle
from mixmim_serve.config import Preprocessing
from mixmim_serve.engines import Engine, engine_fingerprint, open_engine
from mixmim_serve.engines.base import Arrays
from mixmim_serve.engines.buckets import buckets_between
from mixmim_serve.engines.certificate import TOLERANCES, agreement, certify
from mixmim_serve.errors import BundleError, NotFiniteError
from mixmim_serve.heads import Head, read_heads
from mixmim_serve.preprocess import Pixels
from mixmim_serve.service.batcher import Batcher, PendingDecodes, RecentClients
from mixmim_serve.service.decoding import Decoder
from mixmim_serve.service.errors import RequestError
from mixmim_serve.service.metrics import Metrics
from mixmim_serve.service.request import RequestContext
from mixmim_serve.service.settings import Settings
from mixmim_serve.tasks import RECONSTRUCT_OUTPUTS, Floats, random_mask, reconstruct_inputs

DECODE_WAIT = 0.02, 0.08  # seconds, least and most, that a batch on a CPU waits for images being decoded
CANARY_SECONDS = 10.0  # for an answer, behind at most one batch
CANARY_AGE = 1.0  # seconds for which one canary counts; probes within them share it
CANARY_EVERY = 10.0  # seconds between canaries while requests come


class Runtime:
    """One engine with its batchers and its decoder.

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
        self.model_name = engine.bundle.name
        self.heads = read_heads(engine.bundle)
        # No two of these share threads, so that none of them waits for another kind of work.
        self.engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.stack_thread = ThreadPoolExecutor(1, thread_name_prefix="stack")
        # One: what writes JSON holds the interpreter, so two would only take it from the event loop.
        self.encode_thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self.pending_decodes = PendingDecodes(*DECODE_WAIT) if engine.name.endswith("-cpu") else PendingDecodes()
        self.decoder = Decoder(self.settings, engine.bundle.description.preprocessing, self.pending_decodes)
        self.recent_clients = RecentClients()
        self.batchers = {graph: self._batcher(graph) for graph in engine.bundle.graphs}
        self.golden = load_file(engine.bundle.path / GOLDEN)
        self._detector, self._no_detector = _open_detector(engine, self.settings.false_alarm_rate)
        self._canary: tuple[float, bool] = (-np.inf, False)  # when, and whether its answer was right
        self._canary_lock = asyncio.Lock()
        self._canaries: set[asyncio.Task[bool]] = set()  # in the background
        self._canary_due = time.monotonic() + CANARY_EVERY
        self.is_wrong = False  # whether the last canary that was answered was wrong; then nothing else is answered
        self._publish_metrics()

    @property
    def identity(self) -> dict[str, str]:
        """Name, engine fingerprint and model fingerprint, which every answer carries."""
        fingerprints = {"fingerprint": self.fingerprint, "model_fingerprint": self.bundle.fingerprint}
        return {"model": self.model_name, **fingerprints}

    @property
    def bundle(self) -> Bundle:
        """The bundle that is served."""
        return self.engine.bundle

    @property
    def detector(self) -> Detector | None:
        """The detector, if the bundle was calibrated for this engine."""
        return self._detector

    def require_detector(self) -> Detector:
        """The detector of a calibrated bundle.

        Raises:
            BundleError: when it is not calibrated for this engine.
        """
        if self._detector is None:
            raise BundleError(self._no_detector)
        return self._detector

    def _batcher(self, graph: str) -> Batcher:
        size, seconds = self.metrics.batch_size.labels(graph), self.metrics.batch_seconds.labels(graph)

        def observe(images: int, spent: float) -> None:
            size.observe(images)
            seconds.observe(spent)

        return Batcher(
            self.engine,
            graph,
            self.engine_thread,
            self.settings.max_batch,
            observe,
            self.pending_decodes,
            self.stack_thread,
            self.recent_clients,
        )

    def _publish_metrics(self) -> None:
        for graph, batcher in self.batchers.items():
            self.metrics.queue.labels(graph).set_function(partial(getattr, batcher, "queued"))
        self.metrics.ready.set_function(lambda: float(self._canary[1]))
        name, precision = self.engine.name, self.engine.precision
        self.metrics.engine.labels(self.model_name, name, precision, self.fingerprint, self.bundle.fingerprint).set(1)

    def warm_up(self) -> None:
        """Run each graph once, so that the first request waits for nothing.

        An engine with a largest batch prepares each bucket on first use: it meets all of them here.

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

    async def decode(self, image: bytes, context: RequestContext, preprocessing: Preprocessing | None = None) -> Pixels:
        """Decode, resize and crop one image, for the network unless told otherwise.

        Raises:
            ImageError: when the image is refused.
            RequestError: when the images of its request, or its client, cost too much to decode.
            RequestError: 503 while the canary is wrong.
        """
        self.require_right_answers()
        began = time.perf_counter()
        try:
            return await self.decoder.decode(image, context, preprocessing)
        finally:
            context.record_stage("decode", time.perf_counter() - began)

    async def encode(self, image: bytes, outputs: Sequence[str], context: RequestContext) -> Arrays:
        """The chosen encoder outputs of one image.

        Raises:
            ImageError: when the image is refused.
            EngineError: when the engine fails on it.
        """
        return await self.run("encoder", {"pixels": await self.decode(image, context)}, outputs, context)

    async def classify(self, image: bytes, head: Head, context: RequestContext) -> Floats:
        """A head's logits for one image, (classes,); images for other heads share its batch.

        Raises:
            ImageError: when the image is refused, or its logits are not finite.
            EngineError: when the engine fails on it.
        """
        logits = head.logits(await self.encode(image, head.inputs, context))
        if not np.isfinite(logits).all():
            raise NotFiniteError("the logits of this image have inf or NaN: send another image.")
        return logits

    async def run(self, graph: str, inputs: Arrays, outputs: Sequence[str], context: RequestContext) -> Arrays:
        """The chosen outputs of a graph for one item, which joins the next batch.

        Raises:
            EngineError: when the engine fails on it.
            RequestError: 503 when the canary has been wrong in the meantime.
        """
        client, request = context.reservation.client, context.id
        result = await self.batchers[graph].run(inputs, outputs, client=client, request=request)
        context.record_stage("queue", result.queue)
        context.record_stage("infer", result.infer)
        self.require_right_answers()
        return result.outputs

    async def is_healthy(self) -> bool:
        """Whether the canary's answer was right, now or within the last `CANARY_AGE` seconds."""
        async with self._canary_lock:
            if time.monotonic() - self._canary[0] > CANARY_AGE:
                answer = await self.run_canary()
                self._canary = (time.monotonic(), answer is True)
                if answer is not None:
                    self.is_wrong = not answer
        return self._canary[1]

    def require_right_answers(self) -> None:
        """Refuse while the canary is wrong; and start one in the background if the last one is too old.

        Raises:
            RequestError: 503.
        """
        self._watch()
        if self.is_wrong:
            raise unwell()

    def _watch(self) -> None:
        now = time.monotonic()
        if now < self._canary_due:
            return
        self._canary_due = now + (CANARY_AGE if self.is_wrong else CANARY_EVERY)
        task = asyncio.get_running_loop().create_task(self.is_healthy())
        self._canaries.add(task)
        task.add_done_callback(self._canaries.discard)

    async def run_canary(self) -> bool | None:
        """Whether a golden photo, sent through queue and engine, still gives torch's embedding; None without an answer.

        An engine that is only slow or fails keeps no other request from its answer.
        """
        inputs = {"pixels": self.golden["encoder.pixels"][0]}
        try:
            async with asyncio.timeout(CANARY_SECONDS):
                result = await self.batchers["encoder"].run(inputs, ["embedding"], urgent=True)
        except NotFiniteError:
            return False
        except Exception:  # whatever keeps the engine from answering
            return None
        measured = agreement(result.outputs["embedding"][None], self.golden["encoder.embedding"][:1])
        return measured.within(TOLERANCES[self.engine.precision])

    def close(self) -> None:
        """End the threads after the work in progress."""
        self.decoder.close()
        for pool in (self.encode_thread, self.stack_thread, self.engine_thread):
            pool.shutdown(cancel_futures=True)


def open_runtime(bundle: Bundle | Path, engine: str, settings: Settings, metrics: Metrics) -> Runtime:
    """A runtime that is loaded and warm.

    Raises:
        BundleError, EngineError: when the bundle cannot be served.
    """
    runtime = Runtime(open_engine(bundle, engine), settings, metrics)
    runtime.warm_up()
    return runtime


def _open_detector(engine: Engine, rate: float) -> tuple[Detector | None, str]:
    """The detector, or why there is none."""
    try:
        return open_detector(engine, rate), ""
    except BundleError as error:
        return None, str(error)


def require_runtime(state: State) -> Runtime:
    """The runtime of an app.

    Raises:
        RequestError: 503 while the model loads and while the server shuts down.
    """
    runtime: Runtime | None = state.runtime
    if runtime is None or state.draining:
        phase = "shutting down" if runtime else "still loading the model"
        message = f"the server is {phase}: try again in a second."
        raise RequestError(503, "not_ready", message, headers={"Retry-After": "1"})
    return runtime


def unwell() -> RequestError:
    """The error while the canary is wrong."""
    message = "the engine gives a wrong answer for a known photo: restart the server."
    return RequestError(503, "not_well", message, headers={"Retry-After": "5"})
