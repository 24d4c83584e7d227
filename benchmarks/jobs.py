"""What a job over HTTP costs the requests beside it.

    python -m benchmarks.jobs DATA tiny --output benchmarks/results/jobs_epyc_202611.md

One server; wrk (apt-get install wrk) sends it JPEGs of one size, made of photos of the folder DATA, while in turns
there is nothing else, a job of such JPEGs, and the same work as an ordinary process (`mixmim extract` beside the
server). A cell is the median of the rounds; the job's own images/s are counted over the same seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.provenance import about, heading
from benchmarks.serve import SIZES, Running, load, make_pictures, named_bundle, started

COPIES = 40_000  # hard links to the pictures: more than a job reads while it is watched
BESIDE = {"nothing": "nothing", "job": "a job", "process": "an ordinary process"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder of photos")
    parser.add_argument("models", nargs="+", help="tiny, or NAME=BUNDLE")
    parser.add_argument("--size", default="16 kB", choices=SIZES)
    parser.add_argument("--clients", nargs="+", type=int, default=(1, 8, 32))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a Markdown file; a .json comes beside it")
    asked = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server is left behind
    report = about("jobs", arguments, ("uvicorn", "onnxruntime", "openvino", "pillow"))
    report |= {"size": asked.size, "rounds": asked.rounds, "rows": []}
    for model, bundle in map(named_bundle, asked.models):
        with tempfile.TemporaryDirectory() as folder:
            report["rows"] += [{"model": model} | row for row in measure(bundle, asked, Path(folder))]
    text = markdown(report)
    print(text)
    if asked.output:
        asked.output.write_text(text)
        asked.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


def measure(bundle: Path, asked: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each number of clients and what goes on beside them."""
    files = make_pictures(asked.data, folder, asked.size)
    (folder / "many").mkdir()
    for number in range(COPIES):
        os.link(files[number % len(files)], folder / "many" / f"{number:06d}.jpg")
    options = ["--jobs-root", str(folder), "--set", f"jobs_dir={folder / 'jobs'}"]
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    with started("ours", bundle, "auto", str(folder), *options) as server:
        beside: dict[str, Callable[[], contextlib.AbstractContextManager[Callable[[], int]]]] = {
            "nothing": lambda: contextlib.nullcontext(lambda: 0),
            "job": lambda: job(server),
            "process": lambda: process(bundle, folder),
        }
        load(server, asked.size, "multipart", 8, 2, files)  # warms up
        for number in range(asked.rounds):
            for name in list(beside)[:: -1 if number % 2 else 1]:
                with beside[name]() as done:
                    for clients in (0, *asked.clients):
                        turn = watched(server, asked, clients, files, done)
                        found.setdefault((clients, name), []).append(turn)
                        print(clients, name, turn, file=sys.stderr, flush=True)
    return [
        {"clients": clients, "beside": name}
        | {key: statistics.median(turn[key] for turn in turns) for key in ("rate", "p50", "p99", "beside_rate")}
        | {"errors": sum(turn["bad"] + turn["broken"] for turn in turns)}
        for (clients, name), turns in found.items()
        if (clients, name) != (0, "nothing")
    ]


def watched(
    server: Running, asked: argparse.Namespace, clients: int, files: Sequence[Path], done: Callable[[], int]
) -> dict[str, float]:
    """One turn of wrk, and images/s of what goes on beside it; without clients that alone."""
    first, began = done(), time.perf_counter()
    if clients:
        turn = load(server, asked.size, "multipart", clients, asked.seconds, files, settle=False)
    else:
        time.sleep(asked.seconds)
        turn = {"rate": 0.0, "p50": 0.0, "p99": 0.0, "bad": 0, "broken": 0}
    return turn | {"beside_rate": (done() - first) / (time.perf_counter() - began)}


@contextlib.contextmanager
def job(server: Running) -> Iterator[Callable[[], int]]:
    """A job that runs, and how many images it has done; cancelled and deleted at the end."""
    url = f"http://127.0.0.1:{server.port}"
    id_ = ask("POST", f"{url}/jobs", {"source": "many"})["id"]

    def done() -> int:
        found = ask("GET", f"{url}/jobs?id={id_}")
        if found["state"] not in ("queued", "running"):
            raise SystemExit(f"the job has ended too early: {found['state']} {found['error'] or ''}")
        return int((found["progress"] or {"done": 0})["done"])

    try:
        wait_for(done)
        yield done
    finally:
        ask("POST", f"{url}/jobs/cancel?id={id_}")
        while ask("GET", f"{url}/jobs?id={id_}")["state"] == "cancelling":
            time.sleep(0.1)
        ask("DELETE", f"{url}/jobs?id={id_}")


@contextlib.contextmanager
def process(bundle: Path, folder: Path) -> Iterator[Callable[[], int]]:
    """`mixmim extract` of the same images, as anybody would start it; it has done what its output says."""
    code = (
        "import sys; from pathlib import Path; "
        "from mixmim_serve.extract.job import Job; from mixmim_serve.extract.lead import run; "
        "run(Job(Path(sys.argv[1]), *sys.argv[2:]), progress=lambda now: print(now.done, flush=True))"
    )
    out = folder / "out"
    with (folder / "progress").open("w+") as progress:
        running = subprocess.Popen([sys.executable, "-c", code, bundle, folder / "many", out], stdout=progress)

        def done() -> int:
            if running.poll() is not None:
                raise SystemExit("the extraction has ended too early")
            progress.seek(0)
            return int((progress.read().splitlines() or ["0"])[-1])

        try:
            wait_for(done)
            yield done
        finally:
            running.kill()
            running.wait()
    shutil.rmtree(out)


def wait_for(done: Callable[[], int]) -> None:
    """Until the first images are done: what comes before is loading."""
    deadline = time.monotonic() + 60
    while not done():
        if time.monotonic() > deadline:
            raise SystemExit("nothing happens beside the server")
        time.sleep(0.1)


def ask(method: str, url: str, body: object = None) -> dict[str, Any]:
    """What the server answers."""
    response = httpx.request(method, url, json=body, timeout=60).raise_for_status()
    return response.json() if response.content else {}  # type: ignore[no-any-return]


def markdown(report: dict[str, Any]) -> str:
    """Hardware, command, a table."""
    lines = [
        *heading("Requests beside a job", report),
        f"JPEGs of {report['size']}, forms of one image; p50 and p99 in ms; medians of {report['rounds']} rounds.",
        "",
        "| model | clients | beside them | images/s | p50 | p99 | errors | images/s beside |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = list(itertools.product(dict.fromkeys(row["model"] for row in report["rows"]), BESIDE))
    for row in sorted(report["rows"], key=lambda row: (row["clients"], order.index((row["model"], row["beside"])))):
        served = [f"{row[key]:.1f}" if row["clients"] else "" for key in ("rate", "p50", "p99")]
        aside = f"{row['beside_rate']:.1f}" if row["beside"] != "nothing" else ""
        cells = [row["model"], str(row["clients"]), BESIDE[row["beside"]], *served, f"{row['errors']:.0f}", aside]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
