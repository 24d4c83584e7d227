"""One line a request: for people, or JSON for machines."""

from __future__ import annotations

import datetime
import json
import logging

from mixmim_serve.service.visit import Visit

access = logging.getLogger("mixmim_serve.access")


def log_access(visit: Visit, status: int, seconds: float) -> None:
    """Write down a request; paths are quoted, so that nobody can forge a line."""
    if not access.isEnabledFor(logging.INFO):
        return
    about = {
        "method": visit.method,
        "path": visit.path,
        "status": status,
        "ms": round(seconds * 1e3, 2),
        "images": visit.images,
        "code": visit.code,
        "request": visit.id,
    } | {f"{stage}_ms": round(spent * 1e3, 2) for stage, spent in visit.seconds.items()}
    code = f", {visit.code}" if visit.code else ""
    access.info(
        "%s %r %d %.1f ms, %d images%s, request %s",
        visit.method, visit.path, status, seconds * 1e3, visit.images, code, visit.id, extra={"about": about},
    )  # fmt: skip


class JsonFormatter(logging.Formatter):
    """A JSON object a line; of a request its fields, of anything else its message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        about = getattr(record, "about", None) or {"message": record.getMessage()}
        if record.exc_info:
            about = about | {"exception": self.formatException(record.exc_info)}
        return json.dumps({"time": when, "level": record.levelname.lower(), "logger": record.name} | about)


def log_config(form: str) -> dict[str, object]:
    """For `logging.config.dictConfig`: our loggers and uvicorn's, on standard error."""
    formatter: dict[str, object] = {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}
    if form == "json":
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
