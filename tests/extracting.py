"""What the tests of extraction share: jobs with an engine that is open already."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from mixmim_serve.engines import Engine
from mixmim_serve.extract.job import ExtractJob, Summary
from mixmim_serve.extract.lead import run
from mixmim_serve.extract.local import LocalExecutor
from mixmim_serve.extract.options import ExtractOptions, Resources


def small(
    engine: Engine,
    source: str | Path,
    out: str | Path,
    *,
    options: ExtractOptions | None = None,
    images: int = 0,
    threads: int = 2,
    **effort: Any,
) -> ExtractJob:
    """A job in batches of 4."""
    options = options or ExtractOptions(batch=4)
    options = dataclasses.replace(options, images=images, batch=min(options.batch, 4))
    return ExtractJob(
        engine.bundle.path, str(source), str(out), options=options, effort=Resources(threads=threads, **effort)
    )


def features(job: ExtractJob, engine: Engine, **options: Any) -> Summary:
    """Run the job with this engine."""
    return run(job, executor=partial(LocalExecutor, engine=engine), **options)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
