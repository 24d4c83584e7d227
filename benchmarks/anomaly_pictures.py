"""Heat maps for the docs: photos like the normal ones, and the same with a piece of something else planted in them.

    python -m benchmarks.anomaly_pictures bccd/train bccd/test clothing10/test --output docs/images/anomaly.jpg

The shipped bundle is calibrated on the first folder. Of the photos of the second, each alone and with a square of a
photo of the third at a random place, it prints the AUROC; the picture shows the first of them. (bccd: blood smears,
MIT licence, Shenggan/BCCD_Dataset; clothing10: CC0.)
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from mixmim_serve.anomaly.calibrate import Options, calibrate
from mixmim_serve.anomaly.calibration import store
from mixmim_serve.anomaly.detector import open_detector
from mixmim_serve.anomaly.heatmap import overlay
from mixmim_serve.anomaly.photos import run_photos
from mixmim_serve.bundle import DEFAULT_BUNDLE, open_bundle
from mixmim_serve.engines import open_engine
from mixmim_serve.explore.pages import crop_square
from mixmim_serve.sources import open_source
from mixmim_serve.sources.names import list_images

PIECE = 0.3  # of the photo's shorter side
SHOWN, SIDE, GAP = 6, 160, 6


def main() -> None:
    """Print the AUROC, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("normal", type=Path, help="photos to calibrate on")
    parser.add_argument("test", type=Path, help="other photos like them")
    parser.add_argument("pieces", type=Path, help="photos to take pieces from")
    parser.add_argument("--output", type=Path, default=Path("anomaly.jpg"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = open_bundle(DEFAULT_BUNDLE).copy(Path(folder))
        engine = open_engine(bundle)
        calibration, _ = calibrate(engine, open_source(arguments.normal), Options())
        engine.bundle = store(bundle, calibration)
        detector = open_detector(engine)
        with tempfile.TemporaryDirectory() as planted:
            plant(arguments.test, arguments.pieces, Path(planted))
            places = (arguments.test, Path(planted))
            rows = [[(pixels, verdict) for group in run_photos(engine, open_source(place), detector.outputs)
                     for pixels, verdict in zip(group.pixels, detector.verdicts(group.outputs), strict=True)]
                    for place in places]  # fmt: skip
    scores = [[verdict.score for _, verdict in row] for row in rows]
    truth = [0] * len(scores[0]) + [1] * len(scores[1])
    beyond = [sum(not verdict.normal for _, verdict in row) for row in rows]
    auroc = roc_auc_score(truth, np.concatenate(scores))
    print(f"{calibration.about.photos} normal photos; of {len(scores[0])} others {beyond[0]} are beyond the threshold")
    print(f"with a piece planted {beyond[1]}; AUROC {auroc:.3f}")
    width, height = SHOWN * (SIDE + GAP) - GAP, 4 * (SIDE + GAP) - GAP
    sheet = Image.new("RGB", (width, height), "white")
    for kind, row in enumerate(rows):
        for column, (pixels, verdict) in enumerate(row[:SHOWN]):
            for below, image in enumerate(
                (Image.fromarray(pixels), overlay(pixels, verdict.places, calibration.places))
            ):
                place = (column * (SIDE + GAP), (2 * kind + below) * (SIDE + GAP))
                sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), place)
    sheet.save(arguments.output, quality=85)
    print(f"wrote {arguments.output}")


def plant(test: Path, pieces: Path, target: Path) -> None:
    """Each test photo with a square of another photo in it."""
    rng = np.random.default_rng(0)
    others = list_images(pieces)
    for path in list_images(test):
        with Image.open(path) as photo, Image.open(others[rng.integers(len(others))]) as other:
            planted, piece = photo.convert("RGB"), other.convert("RGB")
        side = round(PIECE * min(planted.size))
        cut = crop_square(piece, side)
        margin = [(length - min(planted.size)) // 2 for length in planted.size]  # the network sees the middle square
        place = [int(rng.integers(first, first + min(planted.size) - side)) for first in margin]
        planted.paste(cut, (place[0], place[1]))
        planted.save(target / path.name, quality=90)


if __name__ == "__main__":
    main()
