"""How fast the server is under load, beside the bare engine and three other servers with the same engine and pictures.

    python -m benchmarks.serve DATA tiny base=BUNDLE --output benchmarks/results/serve_epyc_202611.md

DATA is a folder of photos; JPEGs of 16 kB, 75 kB and 2 MB are made of eight of them. wrk makes the load (on Debian and
Ubuntu: apt-get install wrk): so many clients, each with one image in a request, the next when the answer is there.
All servers run side by side and take turns, so that a busy machine is the same for all; a cell is the median of the
rounds. Efficiency is images/s over what a process does that only decodes, in as many threads, ahead of the engine; CPU
is the CPU time of a server and its children for each image, and bare/CPU the share that the bare engine needs for it,
which other programs on the machine change least. A turn begins when the server before it is idle.
The peers need pip install 'mixmim-serve[bench]'. `--soak 120` adds two minutes of 128 clients and how memory went.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.provenance import about
from benchmarks.serving_peers.common import BUNDLE, ENGINE, PORT
from benchmarks.serving_report import markdown, picture
from mixmim_serve.bundle import DEFAULT_BUNDLE
from mixmim_serve.sources.names import list_images

SIZES = {"16 kB": (256, 192), "75 kB": (640, 480), "2 MB": (3000, 2250)}
PICTURES = 8  # of each size, in turn
SERVERS = ("ours", "litserve", "bentoml", "fastapi")
ROUTES = {("fastapi", "raw"): "/raw"}  # /embed takes forms
RAW = ("ours", "fastapi")  # the others' batching takes no image as a body
LUA = Path(__file__).with_suffix(".lua")
PACKAGES = ("uvicorn", "starlette", "onnxruntime", "openvino", "pillow", "bentoml", "litserve", "fastapi")
START = 90  # seconds
IDLE = 120  # seconds that a server may work on what nobody waits for


@dataclass
class Running:
    """One server, or the bare engine."""

    name: str
    process: subprocess.Popen[str]
    port: int
    peak: int = field(default=0)  # bytes

    def family(self) -> list[psutil.Process]:
        """The process and its children."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def memory(self) -> int:
        """Bytes of them all, shared ones counted once."""
        total = sum(each.memory_full_info().pss for each in self.family())
        self.peak = max(self.peak, total)
        return total

    def cpu(self) -> float:
        """Seconds that they worked."""
        return sum(sum(each.cpu_times()[:2]) for each in self.family())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    asked = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server is left behind
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk (Debian, Ubuntu), or see github.com/wg/wrk.")
    report = about("serve", arguments, PACKAGES)
    report |= {"rounds": asked.rounds, "cells": [], "memory": {}, "soak": {}}
    with tempfile.TemporaryDirectory() as folder:
        pictures = {size: make_pictures(asked.data, Path(folder), size) for size in asked.sizes}
        for model, bundle in map(named_bundle, asked.models):
            with everything(bundle, asked) as running:
                report["cells"] += [cell | {"model": model} for cell in measure(running, pictures, asked)]
                report["memory"] |= {f"{model} {each.name}": each.peak for each in running.values()}
                if asked.soak:
                    report["soak"][model] = soak(running["ours"], next(iter(pictures.values())), asked.soak)
    text = markdown(report)
    print(text)
    if asked.output:
        asked.output.write_text(text)
        asked.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        picture(report, asked.output.with_suffix(".png"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder of photos")
    parser.add_argument("models", nargs="+", help="tiny, or NAME=BUNDLE")
    parser.add_argument("--servers", nargs="+", default=SERVERS, choices=SERVERS)
    parser.add_argument("--sizes", nargs="+", default=tuple(SIZES), choices=SIZES)
    parser.add_argument("--bodies", nargs="+", default=("multipart", "raw"), choices=("multipart", "raw"))
    parser.add_argument("--clients", nargs="+", type=int, default=(1, 8, 32, 128))
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each cell, at least")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--soak", type=int, default=0, help="seconds of 128 clients at the end")
    parser.add_argument("--output", type=Path, help="a Markdown file; .json and .png come beside it")
    return parser.parse_args(arguments)


def named_bundle(text: str) -> tuple[str, Path]:
    """A name for the table, and where the bundle is."""
    name, _, path = text.partition("=")
    return name, Path(path) if path else DEFAULT_BUNDLE


def make_pictures(data: Path, folder: Path, size: str) -> list[Path]:
    """Photos scaled to this many pixels, with as much noise as makes the file about as large as its name says."""
    number, unit = size.split()
    wanted = int(number) * (1000 if unit == "kB" else 1_000_000)
    photos = list_images(data)
    chosen = photos[:: max(1, len(photos) // PICTURES)][:PICTURES]
    paths = []
    for index, photo in enumerate(chosen):
        paths.append(folder / f"{wanted}-{index}.jpg")
        paths[-1].write_bytes(_of_size(photo, SIZES[size], wanted))
    return paths


def _of_size(photo: Path, shape: tuple[int, int], wanted: int) -> bytes:
    pixels = np.asarray(Image.open(photo).convert("RGB").resize(shape, Image.Resampling.BICUBIC), np.float32)
    noise = np.random.default_rng(0).standard_normal(pixels.shape, np.float32)
    low, high, data = 0.0, 60.0, b""
    for _ in range(8):
        strength, buffer = (low + high) / 2, io.BytesIO()
        Image.fromarray((pixels + strength * noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
        data = buffer.getvalue()
        low, high = (strength, high) if len(data) < wanted else (low, strength)
    return data


@contextlib.contextmanager
def everything(bundle: Path, asked: argparse.Namespace) -> Iterator[dict[str, Running]]:
    """The bare engine and all servers, ready and idle."""
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        running = {name: stack.enter_context(started(name, bundle, asked.engine, home)) for name in asked.servers}
        bare = stack.enter_context(started("bare", bundle, asked.engine, home))
        assert bare.process.stdout
        bare.process.stdout.readline()  # ready
        yield running | {"bare": bare}


@contextlib.contextmanager
def started(name: str, bundle: Path, engine: str, home: str, *options: str) -> Iterator[Running]:
    """One process; whatever happens, it and its children are gone afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    module = f"benchmarks.serving_peers.{'batched' if name in ('litserve', 'bentoml') else 'plain'}_{name}"
    serve = "from mixmim_serve.cli import main; main()"
    command = {
        "ours": ["-c", serve, "serve", str(bundle), "--port", str(port), "--engine", engine, *options],
        "bentoml": ["-m", "bentoml", "serve", f"{module}:Embed", "--port", str(port)],
        "bare": ["-m", "benchmarks.serving_peers.bare"],
    }.get(name, ["-m", module])
    variables = {BUNDLE: str(bundle), ENGINE: engine, PORT: str(port)}
    bento = {"BENTOML_HOME": home, "BENTOML_DO_NOT_TRACK": "true"}
    process = subprocess.Popen(
        [sys.executable, *command], env={**os.environ, **variables, **bento}, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE if name == "bare" else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        if name != "bare":
            wait_until_ready(name, process, port)
        yield Running(name, process, port)
    finally:
        family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        for each in family:
            with contextlib.suppress(psutil.Error, OSError):
                each.kill()
        process.wait()


def wait_until_ready(name: str, process: subprocess.Popen[str], port: int) -> None:
    """Until it answers anything at all."""
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            except urllib.error.HTTPError as error:
                if error.code >= 500:
                    continue
            return
        time.sleep(0.2)
    raise SystemExit(f"{name} does not start: is pip install 'mixmim-serve[bench]' done?")


def measure(
    running: dict[str, Running], pictures: dict[str, list[Path]], asked: argparse.Namespace
) -> list[dict[str, Any]]:
    """Every cell, the median of the rounds."""
    found: dict[tuple[str, ...], list[dict[str, float]]] = {}
    servers = [each for name, each in running.items() if name != "bare"]
    for number, (size, files) in itertools.product(range(asked.rounds), pictures.items()):
        bare, bare_cpu = bare_rate(running["bare"], files, asked.seconds)
        cells = list(itertools.product(asked.bodies, asked.clients))
        for body, clients in cells[:: -1 if number % 2 else 1]:
            seconds = max(asked.seconds, 2 * clients / bare)  # some turns of each client
            for server in servers[:: -1 if number % 2 else 1]:
                if body == "multipart" or server.name in RAW:
                    turn = load(server, size, body, clients, seconds, files)
                    found.setdefault((server.name, size, body, str(clients)), []).append(turn)
                    print(server.name, size, body, clients, turn, f"bare {bare:.0f}", file=sys.stderr, flush=True)
        again, again_cpu = bare_rate(running["bare"], files, asked.seconds)
        for key, turns in found.items():
            if key[1] == size:
                turns[-1] |= {"bare": (bare + again) / 2, "bare_cpu": (bare_cpu + again_cpu) / 2}
    return [
        {"server": key[0], "size": key[1], "body": key[2], "clients": int(key[3])} | summary(turns)
        for key, turns in found.items()
    ]


def bare_rate(bare: Running, files: Sequence[Path], seconds: float) -> tuple[float, float]:
    """Images a second of the engine and as many threads, alone; and CPU seconds an image."""
    assert bare.process.stdin
    assert bare.process.stdout
    bare.process.stdin.write(f"{seconds} {' '.join(map(str, files))}\n")
    bare.process.stdin.flush()
    rate, cpu = map(float, bare.process.stdout.readline().split())
    bare.memory()
    return rate, cpu


def load(
    server: Running, size: str, body: str, clients: int, seconds: float, files: Sequence[Path], *, settle: bool = True
) -> dict[str, float]:
    """One turn of wrk, with the server's memory at its peak; and until the server is idle again, unless told not to."""
    route = ROUTES.get((server.name, body), "/embed")
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds:.0f}s", "--timeout", "60s", "-s", str(LUA)]
    address = f"http://127.0.0.1:{server.port}{route}"
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1):
            server.memory()

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = server.cpu()
    try:
        done = subprocess.run(
            [*command, address, "--", body, *map(str, files)], capture_output=True, text=True, check=True
        )
    finally:
        ended.set()
        watcher.join()
    turn: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    good = max(turn["requests"] - turn["bad"], 0)
    turn["rate"], turn["cpu"] = good / turn["seconds"], (server.cpu() - began) / max(good, 1)
    if settle:
        wait_until_idle(server)
    return turn


def wait_until_idle(server: Running) -> None:
    """Servers that do not notice that a client left go on with its requests, at the cost of whose turn is next."""
    deadline = time.monotonic() + IDLE
    before = server.cpu()
    while time.monotonic() < deadline:
        time.sleep(0.3)
        before, worked = server.cpu(), server.cpu() - before
        if worked < 0.05:
            return


def summary(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians; errors in all."""
    names = ("rate", "p50", "p99", "bare", "cpu", "bare_cpu")
    middle = {name: statistics.median(turn[name] for turn in turns) for name in names}
    middle["efficiency"] = statistics.median(turn["rate"] / turn["bare"] for turn in turns)
    middle["cpu_share"] = statistics.median(turn["bare_cpu"] / turn["cpu"] for turn in turns)
    errors = sum(turn["bad"] + turn["broken"] for turn in turns)
    spread = [min(turn["rate"] for turn in turns), max(turn["rate"] for turn in turns)]
    return middle | {"errors": errors, "spread": spread}  # type: ignore[dict-item]


def soak(server: Running, files: Sequence[Path], seconds: int) -> dict[str, Any]:
    """128 clients for so long: memory by the second, and its slope in the second half."""
    memory: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1):
            memory.append(server.memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    turn = load(server, "", "multipart", 128, seconds, files)
    ended.set()
    watcher.join()
    half = np.array(memory[len(memory) // 2 :]) / 2**20
    slope = float(np.polyfit(np.arange(len(half)), half, 1)[0]) * 60
    return {"seconds": seconds, "turn": turn, "slope_mb_per_minute": slope, "memory": memory}


if __name__ == "__main__":
    main()
