"""Throughput and latency under load: our server, the bare engine, and three other servers with the same engine.

    python -m benchmarks.serve DATA tiny base=BUNDLE --output benchmarks/results/serve_epyc_202611.md

DATA is a folder of photos; JPEGs of 16 kB, 75 kB and 2 MB are made from eight of them. wrk generates the load (Debian
and Ubuntu: apt-get install wrk): each client sends one image per request, and the next after the response. All servers
run side by side and take turns, so a busy machine affects all alike; a cell is the median of the rounds. Efficiency is
images/s over those of the bare engine, a process that only decodes, in as many threads, and computes. CPU is the CPU
time of a server and its children per image; bare/CPU is the bare engine's share of it, which other programs on the
machine affect least. A turn starts once the previous server is idle.
The peers need pip install 'mixmim-serve[bench]'. `--soak 120` adds two minutes of 128 clients and the memory curve.
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
PICTURES = 8  # per size, sent in turn
SERVERS = ("ours", "litserve", "bentoml", "fastapi")
ROUTES = {("fastapi", "raw"): "/raw"}  # its /embed takes forms
RAW = ("ours", "fastapi")  # the others' batching does not take an image as the body
LUA = Path(__file__).with_suffix(".lua")
PACKAGES = ("uvicorn", "starlette", "onnxruntime", "openvino", "pillow", "bentoml", "litserve", "fastapi")
START = 90  # seconds
IDLE = 120  # seconds that a server may work on abandoned requests


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
        """Bytes of all of them, shared pages counted once."""
        total = sum(process.memory_full_info().pss for process in self.family())
        self.peak = max(self.peak, total)
        return total

    def cpu(self) -> float:
        """CPU seconds of all of them."""
        return sum(sum(process.cpu_times()[:2]) for process in self.family())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server survives
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk (Debian, Ubuntu), or see github.com/wg/wrk.")
    report = about("serve", arguments, PACKAGES)
    report |= {"rounds": options.rounds, "cells": [], "memory": {}, "soak": {}}
    with tempfile.TemporaryDirectory() as folder:
        pictures = {size: make_pictures(options.data, Path(folder), size) for size in options.sizes}
        for model, bundle in map(named_bundle, options.models):
            with everything(bundle, options) as running:
                report["cells"] += [cell | {"model": model} for cell in measure(running, pictures, options)]
                report["memory"] |= {f"{model} {server.name}": server.peak for server in running.values()}
                if options.soak:
                    report["soak"][model] = soak(running["ours"], next(iter(pictures.values())), options.soak)
    text = markdown(report)
    print(text)
    if options.output:
        options.output.write_text(text)
        options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        picture(report, options.output.with_suffix(".png"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder of photos")
    parser.add_argument("models", nargs="+", help="tiny, or NAME=BUNDLE")
    parser.add_argument("--servers", nargs="+", default=SERVERS, choices=SERVERS)
    parser.add_argument("--sizes", nargs="+", default=tuple(SIZES), choices=SIZES)
    parser.add_argument("--bodies", nargs="+", default=("multipart", "raw"), choices=("multipart", "raw"))
    parser.add_argument("--clients", nargs="+", type=int, default=(1, 8, 32, 128))
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--seconds", type=float, default=3.0, help="minimum duration of a cell")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--soak", type=int, default=0, help="seconds of 128 clients at the end")
    parser.add_argument("--output", type=Path, help="a Markdown file; .json and .png are written next to it")
    return parser.parse_args(arguments)


def named_bundle(text: str) -> tuple[str, Path]:
    """The name in the table, and the bundle's path."""
    name, _, path = text.partition("=")
    return name, Path(path) if path else DEFAULT_BUNDLE


def make_pictures(data: Path, folder: Path, size: str) -> list[Path]:
    """Photos scaled to this size, with enough noise to make each file about as large as the size's name says."""
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
def everything(bundle: Path, options: argparse.Namespace) -> Iterator[dict[str, Running]]:
    """The bare engine and all servers, ready and idle."""
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        running = {name: stack.enter_context(started(name, bundle, options.engine, home)) for name in options.servers}
        bare = stack.enter_context(started("bare", bundle, options.engine, home))
        assert bare.process.stdout
        bare.process.stdout.readline()  # ready
        yield running | {"bare": bare}


@contextlib.contextmanager
def started(name: str, bundle: Path, engine: str, home: str, *options: str) -> Iterator[Running]:
    """One process; it and its children are killed afterwards."""
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
        for member in family:
            with contextlib.suppress(psutil.Error, OSError):
                member.kill()
        process.wait()


def wait_until_ready(name: str, process: subprocess.Popen[str], port: int) -> None:
    """Wait for the first response below 500."""
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
    raise SystemExit(f"{name} does not start: run pip install 'mixmim-serve[bench]'.")


def measure(
    running: dict[str, Running], pictures: dict[str, list[Path]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Every cell, as medians over the rounds."""
    results: dict[tuple[str, ...], list[dict[str, float]]] = {}
    servers = [server for name, server in running.items() if name != "bare"]
    for number, (size, files) in itertools.product(range(options.rounds), pictures.items()):
        bare, bare_cpu = bare_rate(running["bare"], files, options.seconds)
        cells = list(itertools.product(options.bodies, options.clients))
        for body, clients in cells[:: -1 if number % 2 else 1]:
            seconds = max(options.seconds, 2 * clients / bare)  # some turns of each client
            for server in servers[:: -1 if number % 2 else 1]:
                if body == "multipart" or server.name in RAW:
                    turn = load(server, size, body, clients, seconds, files)
                    results.setdefault((server.name, size, body, str(clients)), []).append(turn)
                    print(server.name, size, body, clients, turn, f"bare {bare:.0f}", file=sys.stderr, flush=True)
        again, again_cpu = bare_rate(running["bare"], files, options.seconds)
        for key, turns in results.items():
            if key[1] == size:
                turns[-1] |= {"bare": (bare + again) / 2, "bare_cpu": (bare_cpu + again_cpu) / 2}
    return [
        {"server": key[0], "size": key[1], "body": key[2], "clients": int(key[3])} | summary(turns)
        for key, turns in results.items()
    ]


def bare_rate(bare: Running, files: Sequence[Path], seconds: float) -> tuple[float, float]:
    """Images/s of the bare engine with as many threads, and its CPU seconds per image."""
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
    """One turn of wrk, recording peak memory; `settle` then waits until the server is idle."""
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
    """Wait for requests of disconnected clients, which some servers finish at the cost of the next turn."""
    deadline = time.monotonic() + IDLE
    before = server.cpu()
    while time.monotonic() < deadline:
        time.sleep(0.3)
        before, worked = server.cpu(), server.cpu() - before
        if worked < 0.05:
            return


def summary(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians over the turns; errors are summed."""
    names = ("rate", "p50", "p99", "bare", "cpu", "bare_cpu")
    middle = {name: statistics.median(turn[name] for turn in turns) for name in names}
    middle["efficiency"] = statistics.median(turn["rate"] / turn["bare"] for turn in turns)
    middle["cpu_share"] = statistics.median(turn["bare_cpu"] / turn["cpu"] for turn in turns)
    errors = sum(turn["bad"] + turn["broken"] for turn in turns)
    spread = [min(turn["rate"] for turn in turns), max(turn["rate"] for turn in turns)]
    return middle | {"errors": errors, "spread": spread}  # type: ignore[dict-item]


def soak(server: Running, files: Sequence[Path], seconds: int) -> dict[str, Any]:
    """128 clients for this many seconds: memory every second, and its slope over the second half."""
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
