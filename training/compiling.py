"""torch.compile when it pays, in a run that resumes exactly.

Compiled kernels round differently, so a resumed run must change over at the step at which the run did before. With
`compile=auto` a run begins without it, times a few steps, decides once, and records the decision (RUN/config.json).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixmim_serve.signals import Stop
from training.compile_cache import remove_unfinished
from training.config import AUTO
from training.distributed import World
from training.meter import Meter, can_compile

TIMED = 3  # eager steps that are timed, after a first one, which is slower
# docs/training.md says where both come from.
SAVED = 0.1  # share of an eager step's time that a compiled step saves
EXPECTED = 120.0  # seconds that compiling takes
BEAT = 10.0  # seconds between two signs of life
SETTLED = 0.3  # seconds without a new process of the compiler, after which it counts as ended
NO_COMPILER = "no C++ compiler found, so torch.compile is off, which is slower"


@dataclass(frozen=True)
class Decision:
    """Which steps are compiled, and why."""

    from_step: int | None  # the first compiled one, counted from 0; None: none is
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def of_run(cls, saved: Mapping[str, Any]) -> Decision | None:
        """What the run with this config.json does; None when it has not decided."""
        wanted = saved.get("config", {}).get("compile")
        if isinstance(wanted, bool):
            return cls(0 if wanted else None)
        return cls(**saved["compilation"]) if "compilation" in saved else None


class CompilationStoppedError(Exception):
    """A signal came while the network was compiled; nothing was saved."""


class Compiler:
    """Calls a module, from some step on compiled.

    `forward` is what to call; enter `step` around each step.
    """

    def __init__(self, module: nn.Module, wanted: bool | str, world: World) -> None:
        self.module, self.world = module, world
        self.forward: Any = module
        self.compiled = False
        self.possible = can_compile(world.device)
        self.decision = None if wanted == AUTO else Decision(0 if wanted else None)
        self.recorded = wanted == AUTO  # whether the decision belongs into config.json
        self.seconds: list[float] = []  # of eager steps, without waiting for data
        self.stop = Stop()
        self.say: Callable[[str, bool], None] = lambda text, lasting: None  # a line; whether it is worth keeping

    def about(self) -> dict[str, Any]:
        """The decision for config.json and provenance, once there is one."""
        return {"compilation": self.decision.to_dict()} if self.recorded and self.decision else {}

    def decide(self, step: int, steps: int) -> Decision | None:
        """Decide, as soon as enough steps are timed, about the steps from `step` on; every process must call this.

        Returns the decision when it is made, None before and after.
        """
        if self.decision or len(self.seconds) <= TIMED:
            return None
        each = statistics.median(self.seconds[1:])
        saved = (steps - step) * each * SAVED
        figures = f"{steps - step} steps of {each:.2f} s would take {saved:.0f} s less, compiling {EXPECTED:.0f} s more"
        worth = self.world.any(saved > EXPECTED)
        if not self.world.any(not self.possible):
            self.decision = Decision(step if worth else None, figures)
        else:
            self.decision = Decision(None, NO_COMPILER if worth else figures)
        return self.decision

    def due(self, number: int) -> bool:
        """Whether to compile in this step."""
        first = self.decision.from_step if self.decision else None
        return self.possible and not self.compiled and first is not None and number >= first

    @contextlib.contextmanager
    def step(self, number: int, meter: Meter) -> Iterator[None]:
        """Around step `number`: compile in it if that is due, outside of the meter's time; else time it if needed.

        Raises:
            CompilationStoppedError: when a signal came while compiling.
        """
        if self.due(number):
            self.compiled, self.forward = True, torch.compile(self.module)
            with meter.uncounted(), self.compiling():
                yield
            return
        waited, began = meter.waited, time.perf_counter()
        yield
        if self.decision is None:
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)
            self.seconds.append(time.perf_counter() - began - (meter.waited - waited))

    def still_compiling(self, began: float) -> Callable[[], None]:
        """What says how long it has taken since `began`."""
        usual = "a minute or two is usual, more on busy cores"
        return lambda: self.say(f"compiling, {time.monotonic() - began:.0f} s so far; {usual}", False)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Give signs of life, and end at once on a signal, without leaving a process of the compiler behind."""
        before, began = descendants(), time.monotonic()
        remove_unfinished()
        self.say("compiling: a minute or two is usual, more on busy cores", True)
        try:
            with beating(self.still_compiling(began)), self.stop.at_once():
                if self.world.size == 1 and self.stop.is_set():  # of several processes each may have heard or not
                    raise KeyboardInterrupt
                yield
            self.say(f"compiled in {time.monotonic() - began:.0f} s, which no rate counts", True)
        except BaseException:  # the signal, or what it did to a compiler that Ctrl-C reached as well
            if not self.stop.is_set():
                raise
            end_compilers(before)
            remove_unfinished(0)
            raise CompilationStoppedError from None


@contextlib.contextmanager
def beating(say: Callable[[], None]) -> Iterator[None]:
    """Call `say` every `BEAT` seconds, from a thread."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            say()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def end_compilers(before: set[int]) -> None:
    """Kill every process that this one has started since `before` was taken, until no new one appears.

    torch compiles C++ in threads, which the interpreter would wait for, with all that is queued, before it ends.
    """
    with contextlib.suppress(Exception):  # internals of torch; without them the end only takes longer
        from torch._inductor.async_compile import AsyncCompile

        if AsyncCompile.pool.cache_info().currsize:
            AsyncCompile.pool().shutdown(wait=False, cancel_futures=True)
            AsyncCompile.pool.cache_clear()
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < SETTLED:
        for pid in descendants() - before:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                quiet_since = time.monotonic()
        time.sleep(0.02)


def descendants() -> set[int]:
    """All living processes below this one; empty where there is no /proc: torch's workers watch their parent too."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found: set[int] = set()
    front = [os.getpid()]
    while front:
        below = children.get(front.pop(), [])
        found |= set(below)
        front += below
    return found
