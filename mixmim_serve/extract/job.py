"""What a run of extraction is told, what it returns, and what an executor is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mixmim_serve.extract.folder import Folder
from mixmim_serve.extract.options import ExtractOptions, Resources
from mixmim_serve.extract.plan import Shard, ShardResult
from mixmim_serve.extract.progress import ExtractProgress, Meter


@dataclass(frozen=True)
class ExtractJob:
    """What a run of extraction does; plain values, so that it can be sent and stored."""

    bundle: Path
    source: str
    out: str
    engine: str = "auto"
    precision: str = ""
    options: ExtractOptions = field(default_factory=ExtractOptions)
    effort: Resources = field(default_factory=Resources)  # its name is that of `--set effort.threads=4`
    retry_failed: bool = False  # try only the images that could not be read before


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    rows: int
    errors: int
    images: int  # of the source
    complete: bool  # False after a cancellation
    progress: ExtractProgress
    examples: tuple[tuple[str, str], ...]  # key and reason of some images that could not be read
    passed_over: Mapping[str, int] = field(default_factory=dict)  # other files of the source, by suffix


class Executor(Protocol):
    """Decides where `extract_shard` runs."""

    def engine_metadata(self) -> Mapping[str, object]:
        """The engine's `table.engine_metadata`; raises if it cannot produce what the options ask for."""

    def run(
        self, shards: Sequence[Shard], retried: Mapping[str, ShardResult], folder: Folder, meter: Meter
    ) -> Iterator[ShardResult]:
        """Do the shards, of those in `retried` only the failed images; each result is recorded, then yielded."""

    def close(self) -> None:
        """Release the engines."""
