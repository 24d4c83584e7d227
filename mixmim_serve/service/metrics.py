"""Metrics for Prometheus and the access log. Labels are our routes, statuses and reasons, never what a client sent."""

from __future__ import annotations

import datetime
import json
import logging
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

from mixmim_serve.service.request import STAGES, Admission, RequestContext

NAMESPACE = "mixmim"
UNKNOWN_ROUTE = "other"  # the label of every path that is not in the route table
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

access = logging.getLogger("mixmim_serve.access")


class Metrics:
    """One registry per app, so that two apps in one process do not share counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = self._counter("requests", "Requests by route and status.", "route", "status")
        self.request_seconds = self._histogram("request_seconds", "From the first byte to the last.", SECONDS, "route")
        self.failures = self._counter("failures", "Requests and images that failed, by reason.", "reason")
        self.images = self._counter("images", "Images answered.", "route")
        self.anomalies = self._counter("anomaly_images", "Images that /anomaly judged, by verdict.", "verdict")
        self.stage_seconds = self._histogram("stage_seconds", "Of each request, by stage.", SECONDS, "stage")
        self.batch_size = self._histogram("batch_size", "Images in one call of the engine.", SIZES, "graph")
        self.batch_seconds = self._histogram("batch_seconds", "One call of the engine.", SECONDS, "graph")
        self.waiting = self._gauge("images_inside", "Images between admission and answer.")
        self.held = self._gauge("held_bytes", "Request bodies and large answers in memory.")
        self.queue = self._gauge("queue_images", "Decoded images that wait for the engine.", "graph")
        self.ready = self._gauge("ready", "1 when the last canary through the engine was right.")
        names = ("model", "engine", "precision", "fingerprint", "model_fingerprint")
        self.engine = self._gauge("engine_info", "What answers.", *names)
        self.connections = self._gauge("connections", "Open connections.")
        self.connections_refused = self._counter("connections_refused", "Connections above a limit.")
        self.jobs = self._gauge("jobs", "Jobs by state.", "state")
        self._stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(name, description, labels, namespace=NAMESPACE, registry=self.registry)

    def _gauge(self, name: str, description: str, *labels: str) -> Gauge:
        return Gauge(name, description, labels, namespace=NAMESPACE, registry=self.registry)

    def _histogram(self, name: str, description: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, description, labels, namespace=NAMESPACE, buckets=buckets, registry=self.registry)

    def observe_stages(self, seconds: Mapping[str, float]) -> None:
        """Record the seconds that one request spent in each stage."""
        for stage, spent in seconds.items():
            self._stages[stage].observe(spent)

    def watch_admission(self, admission: Admission) -> None:
        """Read the images and bytes inside whenever the metrics are scraped."""
        self.waiting.set_function(lambda: admission.images)
        self.held.set_function(lambda: admission.bytes)

    def watch_connections(self, count: Callable[[], int]) -> None:
        """Read the number of open connections whenever the metrics are scraped."""
        self.connections.set_function(count)

    def watch_jobs(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Read the number of jobs in each state whenever the metrics are scraped."""
        for state in counts():
            self.jobs.labels(state).set_function(lambda state=state: counts()[state])  # type: ignore[misc]

    def count_failure(self, code: str) -> None:
        """Count one request or image that failed, by its reason."""
        self.failures.labels(code).inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def log_access(context: RequestContext, status: int, seconds: float) -> None:
    """Log one request. The path is quoted, so that a client cannot forge a line."""
    if not access.isEnabledFor(logging.INFO):
        return
    fields = {
        "method": context.method,
        "path": context.path,
        "status": status,
        "ms": round(seconds * 1e3, 2),
        "images": context.images,
        "code": context.error_code,
        "request": context.id,
    } | {f"{stage}_ms": round(spent * 1e3, 2) for stage, spent in context.stage_seconds.items()}
    code = f", {context.error_code}" if context.error_code else ""
    access.info(
        "%s %r %d %.1f ms, %d images%s, request %s",
        context.method, context.path, status, seconds * 1e3, context.images, code, context.id,
        extra={"fields": fields},
    )  # fmt: skip


class JsonFormatter(logging.Formatter):
    """One JSON object per line: the fields of a request, the message of anything else."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line of JSON."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        fields = getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            fields = fields | {"exception": self.formatException(record.exc_info)}
        return json.dumps({"time": when, "level": record.levelname.lower(), "logger": record.name} | fields)


def log_config(style: str) -> dict[str, object]:
    """The argument of `logging.config.dictConfig`: our loggers and uvicorn's, on standard error, text or json."""
    formatter: dict[str, object] = {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}
    if style == "json":
        formatter = {"()": JsonFormatter}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"ours": formatter},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "ours"}},
        "loggers": {
            "mixmim_serve": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
            "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        },
    }
