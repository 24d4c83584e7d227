"""What a run of extraction is told, what it returns, and what an executor is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mixmim_serve.extract.folder import Folder
from mixmim_serve.extract.options import Options, Resources
from mixmim_serve.extract.plan import Outcome, Shard
from mixmim_serve.extract.progress import Meter, Progress


@dataclass(frozen=True)
class Job:
    """What to do; plain values, so that it can be sent and stored."""

    bundle: Path
    source: str
    out: str
    engine: str = "auto"
    precision: str = ""
    options: Options = field(default_factory=Options)
    effort: Resources = field(default_factory=Resources)
    retry_failed: bool = False  # only the images that could not be read before


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    rows: int
    errors: int
    images: int  # of the source
    complete: bool  # False when it was cancelled
    progress: Progress
    examples: tuple[tuple[str, str], ...]  # key and reason of some that could not be read


class Executor(Protocol):
    """Who calls `extract_shard`, and where."""

    def about(self) -> Mapping[str, object]:
        """What the engine says of itself, as `table.about`; and refuses options that it cannot do."""

    def run(
        self, shards: Sequence[Shard], known: Mapping[str, Outcome], folder: Folder, meter: Meter
    ) -> Iterator[Outcome]:
        """Do the shards, of those in `known` only the errors; each outcome is recorded before it is given."""

    def close(self) -> None:
        """Let go of engines."""
