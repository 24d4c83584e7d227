"""What Prometheus sees. Labels are routes, statuses and reasons of ours, never what a client sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from mixmim_serve.service.visit import STAGES

NAMESPACE = "mixmim"
OTHER = "other"  # the route of every unknown path
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """A registry of its own for each app, so that two apps in one process do not share counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = self._counter("requests", "Requests by route and status.", "route", "status")
        self.request_seconds = self._histogram("request_seconds", "From the first byte to the last.", SECONDS, "route")
        self.failures = self._counter("failures", "Requests and images that failed, by reason.", "reason")
        self.images = self._counter("images", "Images answered.", "route")
        self.stage_seconds = self._histogram("stage_seconds", "Of each request, by stage.", SECONDS, "stage")
        self.batch_size = self._histogram("batch_size", "Images in one call of the engine.", SIZES, "graph")
        self.batch_seconds = self._histogram("batch_seconds", "One call of the engine.", SECONDS, "graph")
        self.waiting = self._gauge("images_inside", "Images between admission and answer.")
        self.held = self._gauge("held_bytes", "Request bodies and large answers in memory.")
        self.queue = self._gauge("queue_images", "Decoded images that wait for the engine.", "graph")
        self.ready = self._gauge("ready", "1 when the last canary through the engine was right.")
        self.engine = self._gauge("engine_info", "What answers.", "model", "engine", "precision", "fingerprint")
        self.jobs = self._gauge("jobs", "Jobs by state.", "state")
        self._stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(name, about, labels, namespace=NAMESPACE, registry=self.registry)

    def _gauge(self, name: str, about: str, *labels: str) -> Gauge:
        return Gauge(name, about, labels, namespace=NAMESPACE, registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, about, labels, namespace=NAMESPACE, buckets=buckets, registry=self.registry)

    def observe_stages(self, seconds: dict[str, float]) -> None:
        """Of one request."""
        for stage, spent in seconds.items():
            self._stages[stage].observe(spent)

    def watch_jobs(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Ask for the number of jobs in each state whenever somebody looks."""
        for state in counts():
            self.jobs.labels(state).set_function(lambda state=state: counts()[state])  # type: ignore[misc]

    def fail(self, code: str) -> None:
        """Count one request or image that failed, by its reason."""
        self.failures.labels(code).inc()

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
