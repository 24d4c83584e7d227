"""How an extraction job over HTTP slows down concurrent requests.

    python -m benchmarks.jobs DATA tiny --output benchmarks/results/jobs_epyc_202611.md

wrk (apt-get install wrk) sends JPEGs of one size, made from photos in DATA, to one server. In turns nothing else runs,
a job on such JPEGs, or the same work as an ordinary process (`mixmim extract` next to the server). A cell is the
median of the rounds; the job's own images/s are counted over the same seconds.
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

COPIES = 40_000  # hard links to the pictures: more than a job reads while it is measured
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
    parser.add_argument("--output", type=Path, help="a Markdown file; the numbers go into a .json next to it")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server is left behind
    report = about("jobs", arguments, ("uvicorn", "onnxruntime", "openvino", "pillow"))
    report |= {"size": options.size, "rounds": options.rounds, "rows": []}
    for model, bundle in map(named_bundle, options.models):
        with tempfile.TemporaryDirectory() as folder:
            report["rows"] += [{"model": model} | row for row in measure(bundle, options, Path(folder))]
    text = markdown(report)
    print(text)
    if options.output:
        options.output.write_text(text)
        options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


def measure(bundle: Path, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row per number of clients and kind of concurrent work."""
    files = make_pictures(options.data, folder, options.size)
    (folder / "many").mkdir()
    for number in range(COPIES):
        os.link(files[number % len(files)], folder / "many" / f"{number:06d}.jpg")
    flags = ["--jobs-root", str(folder), "--set", f"jobs_dir={folder / 'jobs'}"]
    results: dict[tuple[int, str], list[dict[str, float]]] = {}
    with started("ours", bundle, "auto", str(folder), *flags) as server:
        beside: dict[str, Callable[[], contextlib.AbstractContextManager[Callable[[], int]]]] = {
            "nothing": lambda: contextlib.nullcontext(lambda: 0),
            "job": lambda: job(server),
            "process": lambda: process(bundle, folder),
        }
        load(server, options.size, "multipart", 8, 2, files)  # warms up
        for number in range(options.rounds):
            for name in list(beside)[:: -1 if number % 2 else 1]:
                with beside[name]() as done:
                    for clients in (0, *options.clients):
                        turn = watched(server, options, clients, files, done)
                        results.setdefault((clients, name), []).append(turn)
                        print(clients, name, turn, file=sys.stderr, flush=True)
    return [
        {"clients": clients, "beside": name}
        | {key: statistics.median(turn[key] for turn in turns) for key in ("rate", "p50", "p99", "beside_rate")}
        | {"errors": sum(turn["bad"] + turn["broken"] for turn in turns)}
        for (clients, name), turns in results.items()
        if (clients, name) != (0, "nothing")
    ]


def watched(
    server: Running, options: argparse.Namespace, clients: int, files: Sequence[Path], done: Callable[[], int]
) -> dict[str, float]:
    """One turn of wrk, and images/s of the concurrent work; without clients, of that work alone."""
    first, began = done(), time.perf_counter()
    if clients:
        turn = load(server, options.size, "multipart", clients, options.seconds, files, settle=False)
    else:
        time.sleep(options.seconds)
        turn = {"rate": 0.0, "p50": 0.0, "p99": 0.0, "bad": 0, "broken": 0}
    return turn | {"beside_rate": (done() - first) / (time.perf_counter() - began)}


@contextlib.contextmanager
def job(server: Running) -> Iterator[Callable[[], int]]:
    """A running job, as a function that returns its finished images; cancelled and deleted at the end."""
    url = f"http://127.0.0.1:{server.port}"
    id_ = ask("POST", f"{url}/jobs", {"source": "many"})["id"]

    def done() -> int:
        status = ask("GET", f"{url}/jobs?id={id_}")
        if status["state"] not in ("queued", "running"):
            raise SystemExit(f"the job ended too early: {status['state']} {status['error'] or ''}")
        return int((status["progress"] or {"done": 0})["done"])

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
    """`mixmim extract` on the same images as an ordinary process; returns its finished images as `job` does."""
    code = (
        "import sys; from pathlib import Path; "
        "from mixmim_serve.extract.job import ExtractJob; from mixmim_serve.extract.lead import run; "
        "run(ExtractJob(Path(sys.argv[1]), *sys.argv[2:]), progress=lambda now: print(now.done, flush=True))"
    )
    out = folder / "out"
    with (folder / "progress").open("w+") as progress:
        running = subprocess.Popen([sys.executable, "-c", code, bundle, folder / "many", out], stdout=progress)

        def done() -> int:
            if running.poll() is not None:
                raise SystemExit("the extraction ended too early")
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
    """Wait until the first images are done; before that the process is still loading."""
    deadline = time.monotonic() + 60
    while not done():
        if time.monotonic() > deadline:
            raise SystemExit("the concurrent work does not start")
        time.sleep(0.1)


def ask(method: str, url: str, body: object = None) -> dict[str, Any]:
    """The server's JSON response."""
    response = httpx.request(method, url, json=body, timeout=60).raise_for_status()
    return response.json() if response.content else {}  # type: ignore[no-any-return]


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: hardware, command, a table."""
    lines = [
        *heading("Requests next to a job", report),
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
