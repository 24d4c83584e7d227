"""From a folder of photos to a server: pretrain, probe, export, serve, ask.

    python examples/pretrain_to_serve.py                                     # the twelve photos here, about a minute
    python examples/pretrain_to_serve.py --photos ~/Pictures --labelled ~/labelled --epochs 25 --image-size 128

Needs `pip install '.[cpu,train,export]'`. The defaults show that every step works. They train a model of no use: for a
useful one take thousands of photos and the defaults of `mixmim pretrain` (docs/training.md).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mixmim_serve.client import Client

HERE = Path(__file__).parent
SECONDS_TO_START = 60.0
CLASSES = {
    "accessory": ("hat", "shoes", "hat-2", "shoes-2"),
    "bottom": ("pants", "shorts", "skirt"),
    "top": ("dress", "longsleeve", "outwear", "shirt", "t-shirt"),
}


def main() -> None:
    """The five steps, each as a command that you could type."""
    options = parse()
    out: Path = options.out
    labelled = options.labelled or label(HERE, out / "labelled")
    pretrained, with_head, bundle = out / "run" / "final.safetensors", out / "head.safetensors", out / "bundle"

    step(1, "pretrain without labels")
    size = ["--image-size", options.image_size, "--epochs", options.epochs, "--batch-size", options.batch_size]
    quick = ["--workers", 0, "--set", "compile=false", "--set", "bf16=false"]  # few steps: compiling takes longer
    mixmim("pretrain", options.photos, "--out", out / "run", *size, *quick, "--overwrite")

    step(2, "probe the frozen features with labels, and keep the linear probe as a head")
    report = json.loads(mixmim("probe", labelled, "--from", pretrained, "--save", with_head, "--json", capture=True))
    for name, result in {**report["knn"], "linear probe": report["linear"]}.items():
        print(f"  {name}: {result['top1']:.0f} % of {result['images']} photos right")

    step(3, "export to a bundle, checked against torch on real photos")
    mixmim("export", with_head, bundle, "--overwrite")

    step(4, "serve the bundle")
    with served(bundle, out / "server.log") as url, Client(url) as client:
        step(5, "ask the server")
        photo = HERE / "hat.jpg"
        embedding, classes = client.embed(photo), client.classify(photo, top=3)
        print(f"{photo.name}: {len(embedding.vector)} numbers from model {embedding.model}")
        for guess in classes.classes:
            print(f"  {guess.probability:.2f}  {guess.label}")
        print(f"  score {client.score(photo).score:.2f} (how badly it is reconstructed)")
    print(f"\ndone: the bundle is in {bundle}; serve it with: mixmim serve {bundle}")


def step(number: int, what: str) -> None:
    """Say what comes next."""
    print(f"\n[{number}/5] {what}", flush=True)


def mixmim(*arguments: object, capture: bool = False) -> str:
    """Show and run a command of mixmim; return its standard output if it is captured, else let it through.

    Raises:
        SystemExit: the command failed; its own message has said why.
    """
    words = [str(argument) for argument in arguments]
    print("$ mixmim", *words, flush=True)
    output = subprocess.PIPE if capture else None
    result = subprocess.run([program(), *words], stdout=output, text=True, check=False)
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout or ""


def program() -> str:
    """The `mixmim` of this Python's environment.

    Raises:
        SystemExit: mixmim-serve is not installed here.
    """
    found = shutil.which("mixmim", path=str(Path(sys.executable).parent)) or shutil.which("mixmim")
    if found is None:
        sys.exit("mixmim is not installed: run pip install '.[cpu,train,export]' in the repository")
    return found


@contextlib.contextmanager
def served(bundle: Path, log: Path) -> Iterator[str]:
    """The URL of a server of this bundle, ready; it is stopped at the end.

    Raises:
        SystemExit: the server does not get ready.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = ["serve", str(bundle), "--port", str(port)]
    print("$ mixmim", *words, flush=True)
    with log.open("wb") as file:
        process = subprocess.Popen([program(), *words], stdout=file, stderr=file)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, log)
        print(f"ready at {url}")
        yield url
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Ask /readyz until it answers.

    Raises:
        SystemExit: the process ended, or takes too long.
    """
    deadline = time.monotonic() + SECONDS_TO_START
    with Client(url) as client:
        while not client.ready():
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.2)


def label(photos: Path, folder: Path) -> Path:
    """A labelled copy of the photos here: a folder per class, the last photo of each class for validation."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, stems in CLASSES.items():
        for stem in stems:
            target = folder / ("val" if stem == stems[-1] else "train") / name / f"{stem}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(photos / target.name, target)
    return folder


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", default=str(HERE), help="unlabelled: a folder, tar shards, Parquet or a list")
    parser.add_argument("--labelled", default="", help="a folder with train and val, one folder per class in each")
    parser.add_argument("--out", type=Path, default=Path("runs/example"), help="where everything is written")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=64, help="pixels, a multiple of 32")
    parser.add_argument("--batch-size", type=int, default=6)
    return parser.parse_args()


if __name__ == "__main__":
    main()
