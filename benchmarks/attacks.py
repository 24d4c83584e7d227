"""A good client next to attacks: its latency and errors, the server's memory, and whether SIGTERM is obeyed.

    python -m benchmarks.attacks --output benchmarks/results/attacks_epyc_202611.md

Each attack gets a server of its own: `mixmim serve tiny` with --jobs-root and default limits, but for `grace_seconds`.
The good client sends JPEGs of 16 kB, one request after another on one connection, then four such clients at once; by
turns without and with the attack, so that both meet the same machine. The traffic of the attack
(`benchmarks/attack_traffic.py`) comes from another address, and in a second pass from the address of the good client,
where both are told apart by their API keys; there without the attacks that use up the connections of an address. Ten
seconds after the last turn memory is compared with that before the attack, then the attack begins again and the server
gets a SIGTERM. `--sources same` is the hard case without keys: there both are one client, which shares its limits.
`--control` also sends each attack's traffic to a process that only reads it, as often as the server has answered, next
to good clients of the server: what sender, kernel and reading take from them on a machine that all of them share.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.attack_files import write_all
from benchmarks.attack_traffic import ATTACKS, Target, large_answer
from benchmarks.attacks_report import markdown
from benchmarks.provenance import about
from benchmarks.serve import make_pictures

EXAMPLES = Path(__file__).parents[1] / "examples"
PARALLEL = (1, 4)  # good clients at once
ALL = "all at once"
GOOD_ADDRESS = "127.0.0.1"
MANY_CONNECTIONS = ("one-byte bodies", "connections")  # take all that one address may have, before any key is read
GOOD_KEY, BAD_KEY = "good-client-0123456789", "attacker-0123456789abc"
SOURCES = {"other": ("127.0.0.2", False), "keys": (GOOD_ADDRESS, True), "same": (GOOD_ADDRESS, False)}
GRACE = 10  # seconds
RECOVERY = 10  # seconds after an attack until memory must be back
START = 60  # seconds until a server must be ready, or have ended


@dataclass
class Server:
    """A running server, whose memory is sampled."""

    process: subprocess.Popen[bytes]
    port: int
    key: str  # of the good client; empty for none
    peak: int = 0  # bytes, of the process and its children
    ended: threading.Event = field(default_factory=threading.Event)

    def memory(self) -> int:
        """Resident bytes of the process and its children."""
        total = 0
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self.process.pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
        self.peak = max(self.peak, total)
        return total

    def watch(self) -> None:
        """Sample memory until the end."""
        while not self.ended.wait(0.05):
            self.memory()

    def terminate(self) -> float:
        """Seconds from SIGTERM to the end of the process; infinite if it does not end."""
        began = time.perf_counter()
        self.process.terminate()
        try:
            self.process.wait(GRACE + START)
        except subprocess.TimeoutExpired:
            return float("inf")
        return time.perf_counter() - began


@contextlib.contextmanager
def started(folder: Path, *, keyed: bool) -> Iterator[Server]:
    """A server with jobs, ready; it and its children are killed afterwards."""
    home = Path(tempfile.mkdtemp(dir=folder))
    (home / "photos").mkdir()
    (home / "keys").write_text(f"{GOOD_KEY}\n{BAD_KEY}\n")
    port = free_port()
    options = ["--jobs-root", str(home / "photos"), "--set", f"jobs_dir={home / 'jobs'}"]
    options += ["--set", f"grace_seconds={GRACE}.0", *(["--api-keys", str(home / "keys")] if keyed else [])]
    code = "from mixmim_serve.cli import main; main()"
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", "tiny", "--port", str(port), *options],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    server = Server(process, port, GOOD_KEY if keyed else "")
    watcher = threading.Thread(target=server.watch, daemon=True)
    try:
        wait_until_ready(server, home / "log")
        watcher.start()
        yield server
    finally:
        server.ended.set()
        family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        for member in family:
            with contextlib.suppress(psutil.Error, OSError):
                member.kill()
        process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until_ready(server: Server, log: Path) -> None:
    """Wait for /readyz."""
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(OSError), contextlib.closing(connection(server)) as client:
            client.request("GET", "/readyz")
            if client.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"the server does not start:\n{log.read_text()}")


def connection(server: Server) -> http.client.HTTPConnection:
    """A connection of the good client."""
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=START)


@dataclass
class Turn:
    """What good clients saw."""

    seconds: list[float] = field(default_factory=list)  # of each request
    statuses: Counter[str] = field(default_factory=Counter)

    def add(self, other: Turn) -> None:
        """Add what was seen in another turn."""
        self.seconds += other.seconds
        self.statuses += other.statuses

    def percentile(self, percent: float) -> float:
        """A percentile of the latency in ms."""
        return float(np.percentile(self.seconds, percent)) * 1e3 if self.seconds else float("inf")


def good_clients(server: Server, photos: Sequence[bytes], seconds: float, count: int) -> Turn:
    """Send photos from so many clients, each one request after another on a connection of its own."""
    turn, deadline = Turn(), time.monotonic() + seconds
    headers = {"content-type": "image/jpeg", **({"authorization": f"Bearer {server.key}"} if server.key else {})}

    def one(first: int) -> None:
        client = connection(server)
        number = first
        while time.monotonic() < deadline:
            began = time.perf_counter()
            try:
                client.request("POST", "/embed", photos[number % len(photos)], headers)
                answer = client.getresponse()
                answer.read()
                status = str(answer.status)
            except (OSError, http.client.HTTPException) as error:
                status = type(error).__name__
                client.close()  # the next request connects again
            turn.seconds.append(time.perf_counter() - began)
            turn.statuses[status] += 1
            number += 1
        client.close()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return turn


def traffic_of(name: str, source: str) -> list[str]:
    """The attacks that a name stands for."""
    names = [other for other in ATTACKS if name in (other, ALL)]
    if source == GOOD_ADDRESS and name == ALL:
        names = [other for other in names if other not in MANY_CONNECTIONS]
    return names


@contextlib.contextmanager
def attack(name: str, files: Path, port: int, source: str, seconds: float, key: str) -> Iterator[Counter[str]]:
    """An attack that goes on within the block; afterwards the statuses of its answers."""
    names = traffic_of(name, source)
    command = ["benchmarks.attack_traffic", str(files), str(port), source, key, str(seconds), *names]
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=EXAMPLES.parent, text=True
    )
    answers: Counter[str] = Counter()
    assert process.stdin
    assert process.stdout
    try:
        process.stdout.readline()  # ready
        process.stdin.write("\n")
        process.stdin.flush()
        yield answers
    finally:
        output, _ = process.communicate("\n")
        answers.update(json.loads(output or "{}"))


@contextlib.contextmanager
def sink(seconds: float) -> Iterator[int]:
    """The port of a process that reads requests, and answers each after so many seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.attack_sink", str(seconds)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=EXAMPLES.parent, text=True,
    )  # fmt: skip
    assert process.stdout
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def measure(
    name: str, source: str, files: Path, photos: Sequence[bytes], seconds: float, rounds: int, *, control: bool
) -> dict[str, Any]:
    """One attack on a server of its own."""
    address, keyed = SOURCES[source]
    alone, beside, dropped = ({count: Turn() for count in PARALLEL} for _ in range(3))
    answers: Counter[str] = Counter()
    longest = 60 + 10 * seconds  # of the attack, should this process die
    key = BAD_KEY if keyed else ""
    threads = sum(ATTACKS[other][0] for other in traffic_of(name, address))
    with tempfile.TemporaryDirectory() as home, started(Path(home), keyed=keyed) as server:
        warm_up(server, files, photos)
        before, server.peak = server.memory(), 0
        for _ in range(rounds):
            for count in PARALLEL:
                alone[count].add(good_clients(server, photos, seconds, count))
            began = time.monotonic()
            with attack(name, files, server.port, address, longest, key) as seen:
                time.sleep(1)
                for count in PARALLEL:
                    beside[count].add(good_clients(server, photos, seconds, count))
            answers += seen
            pace = threads * (time.monotonic() - began) / max(1, seen.total())
            time.sleep(2)  # what the attack has left behind belongs to no turn without it
            if control:
                with sink(pace) as port, attack(name, files, port, address, longest, key):
                    time.sleep(1)
                    for count in PARALLEL:
                        dropped[count].add(good_clients(server, photos, seconds, count))
        time.sleep(RECOVERY - 2)
        after, peak = server.memory(), server.peak
        with attack(name, files, server.port, address, longest, key):
            time.sleep(2)
            stopped = server.terminate()
    row: dict[str, Any] = {"attack": name, "source": source, "answers": answers, "stopped": stopped}
    row |= {"before": before, "peak": max(peak, server.peak), "after": after}
    clients = [compared(count, alone[count], beside[count]) for count in PARALLEL]
    if control:
        for client in clients:
            client["control_99"] = dropped[client["count"]].percentile(99)
    return row | {"clients": clients}


def warm_up(server: Server, files: Path, photos: Sequence[bytes]) -> None:
    """Start what the server starts when it is first needed: decode processes, and what the engine keeps per size."""
    target = Target(files, server.port, "127.0.0.1", server.key)
    requests = [target.form("/embed", "large.webp", 1)] * 2
    requests += [large_answer(target, count) for count in (1, 2, 3, 4, 5, 6, 7, 8, 16, 64)]

    def send(request: bytes) -> None:
        with target.connect() as connected:
            target.send(connected, request)
            target.read_answer(connected)

    threads = [threading.Thread(target=send, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    good_clients(server, photos, 1, max(PARALLEL))


def compared(count: int, alone: Turn, beside: Turn) -> dict[str, Any]:
    """What so many good clients saw without and with an attack."""
    statuses = beside.statuses
    row = {f"{name}_{percent}": turn.percentile(percent) for name, turn in (("alone", alone), ("beside", beside))
           for percent in (50, 99)}  # fmt: skip
    refused = statuses["429"]
    failed = sum(number for status, number in statuses.items() if status not in ("200", "429"))
    return {"count": count, "ratio": row["beside_99"] / row["alone_99"], "429": refused, "failed": failed,
            "statuses": statuses, "alone_requests": len(alone.seconds), **row}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="+", default=[*ATTACKS, ALL], choices=[*ATTACKS, ALL])
    parser.add_argument("--sources", nargs="+", default=["other", "keys"], choices=SOURCES)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn of the good clients")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--control", action="store_true", help="also send the traffic to a process that only reads it")
    parser.add_argument("--output", type=Path, help="a Markdown file; the numbers go into a .json next to it")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server is left behind
    report = about("attacks", arguments, ("uvicorn", "onnxruntime", "openvino", "pillow"))
    report |= {"seconds": options.seconds, "rounds": options.rounds, "grace": GRACE, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        write_all(files)
        photos = [path.read_bytes() for path in make_pictures(EXAMPLES, files, "16 kB")]
        for source in options.sources:
            for name in options.attacks:
                if SOURCES[source][0] == GOOD_ADDRESS and name in MANY_CONNECTIONS:
                    continue
                row = measure(name, source, files, photos, options.seconds, options.rounds, control=options.control)
                report["rows"].append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    text = markdown(report)
    print(text)
    if options.output:
        options.output.write_text(text)
        options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
