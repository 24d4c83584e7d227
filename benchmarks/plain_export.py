"""Our exported graphs against a plain export of the released architecture, in the same runtimes.

    python -m benchmarks.plain_export --output benchmarks/results/plain_export_epyc_202611.md

The plain encoder follows the released code: windows cut by view and permute in every block, q, k and v sliced out of
one product, attention in basic operators. It has our weights, computes our embeddings, and is exported in the usual
way: torch.onnx.export, dynamic batch, normalised float32 pixels in, the embedding out. Our graph does more: it takes
bytes and normalises them, and also outputs the four stages.

Every graph, runtime and precision runs in its own process. They take turns in rounds, ours and plain one after the
other, so that other work on the machine affects both alike; a ratio compares turns of one round, images/s are those of
the best round. CPU seconds hardly change when other processes use the cores.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray
from openvino import properties
from torch import Tensor, nn

from benchmarks.plain_encoder import PlainEncoder
from benchmarks.provenance import command, commit
from benchmarks.train_step import show, spread
from export.build import export_bundle
from export.verify import photos
from mixmim_serve.bench import encoder_flops, matrix_rate
from mixmim_serve.bundle import DEFAULT_BUNDLE, WEIGHTS, graph_file, open_bundle
from mixmim_serve.config import Preprocessing, architecture
from mixmim_serve.description import Description
from mixmim_serve.engines import open_engine
from mixmim_serve.engines.certificate import agreement
from mixmim_serve.engines.hardware import processor
from mixmim_serve.engines.openvino import TYPES, core, read_graph
from mixmim_serve.model import build_model
from mixmim_serve.model.checkpoint import load_checkpoint, save_checkpoint
from mixmim_serve.preprocess import normalize

OPSET = 18  # the default of torch.onnx.export
RUNTIMES = (("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))
GRAPHS = ("ours", "plain")
NOISE = 0.01  # added to every random parameter, so that biases and norms matter; as in tests/test_export.py

Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Export both, take turns, print and write the report."""
    options = parse(arguments)
    if options.turn:
        print(json.dumps(TASKS[options.turn[0]](*map(json.loads, options.turn[1:]))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        models = {size: prepare(size, folder / size) for size in options.sizes}
        report = environment() | {"command": command("plain_export", arguments), "rounds": options.rounds, "sizes": {}}
        rates, rows = take_turns(models, options)
        report |= {"rates": rates, "rows": rows}
        for size, about in models.items():
            facts = {name: value for name, value in about.items() if name not in GRAPHS}  # without local paths
            report["sizes"][size] = facts | {
                "nodes": {graph: ask("nodes", about, graph) for graph in GRAPHS},
                "profile": {graph: ask("profile", about, graph, "bf16", max(options.batches)) for graph in GRAPHS},
            }
    text = markdown(report)
    print(text)
    if options.output:
        options.output.write_text(text)
        options.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "base"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="duration of a turn per batch size; at least five calls"
    )
    parser.add_argument("--folder", type=Path, help="keep the graphs here, and reuse existing ones")
    parser.add_argument("--output", type=Path, help="a Markdown file; the numbers go into a .json next to it")
    parser.add_argument("--turn", nargs="+", help=argparse.SUPPRESS)  # the task of a child process
    return parser.parse_args(arguments)


def prepare(size: str, folder: Path) -> dict[str, Any]:
    """Both graphs of a size, with shipped or random weights, and how closely the plain encoder agrees with ours."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle = folder / "bundle"
    if not bundle.exists():
        checkpoint = DEFAULT_BUNDLE / WEIGHTS if size == DEFAULT_BUNDLE.name else random_weights(size, folder)
        export_bundle(checkpoint, bundle)
    model, description = load_checkpoint(bundle / WEIGHTS)
    plain = PlainEncoder(description.arch).eval()
    weights = model.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    pixels = torch.from_numpy(as_input("plain", photos(description.preprocessing), description.preprocessing))
    with torch.inference_mode():
        expected = model.eval()(pixels).embedding_BD.numpy()
        torch_agreement = agreement(plain(pixels).numpy(), expected)
    np.save(folder / "expected.npy", expected)
    if not (folder / "plain.onnx").exists():
        export_plain(plain, pixels, folder / "plain.onnx")
    return {
        "ours": str(bundle),
        "plain": str(folder / "plain.onnx"),
        "gflop_an_image": round(encoder_flops(description.arch) / 1e9, 2),
        "plain_and_ours_in_torch": {"cosine": torch_agreement.cosine, "error": torch_agreement.error},
    }


def random_weights(size: str, folder: Path) -> Path:
    """A checkpoint of an encoder with random weights."""
    torch.manual_seed(0)
    arch = architecture(size, with_decoder=False)
    model = build_model(arch)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=NOISE)
    checkpoint = folder / "random.safetensors"
    save_checkpoint(checkpoint, model.state_dict(), Description(arch, Preprocessing.evaluation(arch.image_size)))
    return checkpoint


def export_plain(plain: nn.Module, pixels: Tensor, target: Path) -> None:
    """Export a module, pixels to embedding, in the usual way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            plain, (pixels[:2],), str(target), input_names=["pixels"], output_names=["embedding"], opset_version=OPSET,
            dynamo=True, dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1, max=1024)}}, verbose=False,
        )  # fmt: skip


# Turns


def take_turns(models: dict[str, dict[str, Any]], options: argparse.Namespace) -> tuple[dict[str, float], list[Any]]:
    """The machine's rate for matrix products, TFLOP/s by precision, and one row per size, runtime and batch."""
    rates: dict[str, float] = {}
    turns: dict[tuple[str, str, str, str], list[Any]] = collections.defaultdict(list)
    for number in range(options.rounds):
        for precision in ("fp32", "bf16"):
            rates[precision] = max(ask("rate", precision), rates.get(precision, 0.0))
        for size, about in models.items():
            for kind, precision in RUNTIMES:
                for graph in GRAPHS if number % 2 else reversed(GRAPHS):
                    turn = ask("time_graph", about, graph, kind, precision, options.batches, options.seconds)
                    turns[size, kind, precision, graph].append(turn)
                    print(number + 1, size, kind, precision, graph, turn, file=sys.stderr, flush=True)
    rows = []
    for size, about in models.items():
        for kind, precision in RUNTIMES:
            ours, plain = (turns[size, kind, precision, graph] for graph in GRAPHS)
            for batch in map(str, options.batches):
                rows.append({"size": size, "runtime": kind, "precision": precision, "batch": int(batch)})
                rows[-1] |= compare(ours, plain, batch, about["gflop_an_image"] * 1e9, rates[precision])
    return rates, rows


def compare(ours: list[Any], plain: list[Any], batch: str, flops: float, rate: float) -> dict[str, Any]:
    """One row; a ratio above 1 means that ours is faster."""
    best = {
        graph: int(batch) / min(turn["seconds"][batch]["wall"] for turn in turns)
        for graph, turns in zip(GRAPHS, (ours, plain), strict=True)
    }
    pairs = list(zip(ours, plain, strict=True))
    return {
        "images_per_second": {graph: round(value, 2) for graph, value in best.items()},
        **{
            f"ratio_{name}": spread([b["seconds"][batch][name] / a["seconds"][batch][name] for a, b in pairs])
            for name in ("wall", "cpu")
        },
        "ratio_of_best": round(best["ours"] / best["plain"], 3),
        "share": {graph: round(value * flops / rate / 1e12, 3) for graph, value in best.items()},
        "cosine": {"ours": ours[0]["cosine"], "plain": plain[0]["cosine"]},
        "error": {"ours": ours[0]["error"], "plain": plain[0]["error"]},
    }


def ask(task: str, *arguments: Any) -> Any:
    """The result of a task in a child process."""
    words = [task, *(json.dumps(argument) for argument in arguments)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plain_export", "--turn", *words], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# One turn: a process with one graph


def time_graph(about: dict[str, Any], graph: str, kind: str, precision: str, batches: list[int], seconds: float) -> Any:
    """Median seconds per call for each batch, and agreement with torch on the embeddings of four photos."""
    call = open_ours(about, kind, precision) if graph == "ours" else open_plain(about, kind, precision)
    preprocessing = open_bundle(Path(about["ours"])).description.preprocessing
    images = photos(preprocessing)
    photo_agreement = agreement(
        call(as_input(graph, images, preprocessing)), np.load(Path(about["plain"]).parent / "expected.npy")
    )
    noise = np.random.default_rng(0).integers(0, 256, (max(batches), *images.shape[1:]), np.uint8)
    taken = {}
    for batch in batches:
        pixels = as_input(graph, noise[:batch], preprocessing)
        taken[str(batch)] = clock(lambda pixels=pixels: call(pixels), seconds)
    return {"seconds": taken, "cosine": photo_agreement.cosine, "error": photo_agreement.error}


def clock(call: Callable[[], object], seconds: float) -> dict[str, float]:
    """Median wall and CPU seconds (all threads) per call, over `seconds` and at least five calls."""
    call()
    taken: dict[str, list[float]] = {"wall": [], "cpu": []}
    end = time.perf_counter() + seconds
    while len(taken["wall"]) < 5 or time.perf_counter() < end:
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        taken["wall"].append(time.perf_counter() - wall)
        taken["cpu"].append(time.process_time() - cpu)
    return {name: statistics.median(values) for name, values in taken.items()}


def as_input(graph: str, images: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[Any]:
    """Bytes for ours; normalised pixels for the plain graph, which is not timed."""
    return images if graph == "ours" else np.stack([normalize(image, preprocessing) for image in images])


def open_ours(about: dict[str, Any], kind: str, precision: str) -> Embed:
    """Our graph, run as `mixmim` runs it."""
    engine = open_engine(Path(about["ours"]), kind, precision)
    return lambda pixels: engine.run("encoder", {"pixels": pixels}, ["embedding"])["embedding"]


def open_plain(about: dict[str, Any], kind: str, precision: str) -> Embed:
    """The plain graph, with the settings of our engines."""
    if kind == "onnx":
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(about["plain"], options, providers=["CPUExecutionProvider"])
        return lambda pixels: session.run(["embedding"], {"pixels": pixels})[0]
    request = compiled(about, "plain", precision).create_infer_request()
    return lambda pixels: request.infer({"pixels": pixels}, share_inputs=True)["embedding"]


def compiled(
    about: dict[str, Any], graph: str, precision: str, more: dict[Any, Any] | None = None
) -> openvino.CompiledModel:
    """A graph in OpenVINO, as our engine compiles it."""
    settings: dict[Any, Any] = {
        properties.hint.inference_precision: TYPES[precision],
        properties.hint.performance_mode: properties.hint.PerformanceMode.LATENCY,
    }
    model = read_graph(Path(graph_path(about, graph)), pooled=graph == "ours")
    return core().compile_model(model, "CPU", settings | (more or {}))


# How the runtimes execute the graphs


def nodes(about: dict[str, Any], graph: str) -> dict[str, dict[str, int]]:
    """Operators of a graph by kind: as exported, and as executed by each runtime."""
    path = graph_path(about, graph)
    exported = onnx.load(path, load_external_data=False)
    counts = {"exported": count(node.op_type for node in exported.graph.node)}
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = f"{folder}/run.onnx"
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        run = onnx.load(options.optimized_model_filepath, load_external_data=False)
        counts["onnx fp32"] = count(node.op_type for node in run.graph.node)
    for kind, precision in RUNTIMES:
        if kind == "openvino":
            run = compiled(about, graph, precision).get_runtime_model()
            kinds = (str(node.get_rt_info()["layerType"].value) for node in run.get_ops())
            counts[f"openvino {precision}"] = count(kind for kind in kinds if kind not in ("Input", "Output", "Const"))
    return counts


def profile(about: dict[str, Any], graph: str, precision: str, batch: int, calls: int = 5) -> dict[str, float]:
    """Milliseconds per call in OpenVINO by kind of operator, as medians over `calls`."""
    request = compiled(about, graph, precision, {properties.enable_profiling(): True})
    request = request.create_infer_request()
    preprocessing = open_bundle(Path(about["ours"])).description.preprocessing
    noise = np.random.default_rng(0).integers(0, 256, (batch, *2 * [preprocessing.image_size], 3), np.uint8)
    pixels = as_input(graph, noise, preprocessing)
    samples: dict[str, list[float]] = collections.defaultdict(list)
    for number in range(calls + 1):
        request.infer({"pixels": pixels}, share_inputs=True)
        milliseconds: collections.Counter[str] = collections.Counter()
        for node in request.get_profiling_info():
            milliseconds[node.node_type] += node.real_time.total_seconds() * 1e3
        for kind, value in milliseconds.items() if number else ():
            samples[kind].append(value)
    medians = {kind: round(statistics.median(values), 3) for kind, values in samples.items()}
    return dict(sorted(((kind, value) for kind, value in medians.items() if value), key=lambda item: -item[1]))


def graph_path(about: dict[str, Any], graph: str) -> str:
    """The path of an ONNX file."""
    return str(Path(about["ours"]) / graph_file("encoder", "fp32")) if graph == "ours" else str(about["plain"])


def count(names: Iterable[str]) -> dict[str, int]:
    """How often each name occurs, most frequent first."""
    return dict(collections.Counter(names).most_common())


TASKS: dict[str, Callable[..., Any]] = {
    "rate": matrix_rate,
    "time_graph": time_graph,
    "nodes": nodes,
    "profile": profile,
}


# The report


def environment() -> dict[str, Any]:
    """Date, commit, hardware and versions of the measurement."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "hardware": processor(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime", "openvino")},
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    rates = ", ".join(f"{precision} {rate:.2f}" for precision, rate in report["rates"].items())
    lines = [
        f"# Our graphs against a plain export, {report['date']}",
        "",
        f"Command: `{report['command']}`",
        f"Where: {report['hardware']}, python {report['python']}, {versions}, commit {report['commit']}.",
        f"Fastest matrix products of this machine: {rates} TFLOP/s.",
        f"Images/s of the best of {report['rounds']} rounds; the ratio compares turns of one round, median (least to",
        "most), above 1 where ours is faster. Share: of the machine's matrix rate. Cosine and error: of four photos'",
        "embeddings with torch in float32.",
        "",
        "| size, batch | runtime | ours, images/s | plain, images/s | ratio | ratio of CPU seconds "
        "| share of ours, plain | cosine | error |",
        "|---|---|---|---|---|---|---|---|---|",
        *(table_row(row) for row in report["rows"]),
    ]
    for size, about in report["sizes"].items():
        lines += ["", f"## {size}", "", *node_table(about["nodes"]), "", *profile_table(about["profile"])]
    return "\n".join(lines) + "\n"


def table_row(row: dict[str, Any]) -> str:
    """One line of the first table."""
    cells = [
        f"{row['size']}, {row['batch']}",
        f"{row['runtime']} {row['precision']}",
        *(f"{row['images_per_second'][graph]:.1f}" for graph in GRAPHS),
        show(row["ratio_wall"], 2),
        show(row["ratio_cpu"], 2),
        ", ".join(f"{row['share'][graph]:.0%}" for graph in GRAPHS),
        f"{row['cosine']['ours']:.6f}",
        f"{row['error']['ours']:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def node_table(counts: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """The most frequent operators by kind."""
    lines = ["| nodes | graph | all | by kind |", "|---|---|---|---|"]
    for where in counts["ours"]:
        for graph in GRAPHS:
            kinds = counts[graph][where]
            most = ", ".join(f"{kind} {number}" for kind, number in list(kinds.items())[:12])
            lines.append(f"| {where} | {graph} | {sum(kinds.values())} | {most} |")
    return lines


def profile_table(profiles: dict[str, dict[str, float]]) -> list[str]:
    """Time by kind of operator in OpenVINO bf16, largest batch."""
    lines = ["| OpenVINO bf16, largest batch | ms in all | by kind of operator |", "|---|---|---|"]
    for graph in GRAPHS:
        total = sum(profiles[graph].values())
        parts = ", ".join(
            f"{kind} {value / total:.1%}" for kind, value in profiles[graph].items() if value > total / 500
        )
        lines.append(f"| {graph} | {total:.1f} | {parts} |")
    return lines


if __name__ == "__main__":
    main()
