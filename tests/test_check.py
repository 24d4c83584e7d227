"""`check` on data sets with deliberate faults: each is counted, and reported in one sentence."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from mixmim_serve.errors import DataError, ImageError
from mixmim_serve.sources import fingerprint, open_source
from training.check import AHEAD, IMAGE_SIZE, check
from training.check_report import SHOWN, Report, ShorterSide
from training.recipes import tiny_cpu

PHOTOS = {path.stem: path.read_bytes() for path in sorted((REPOSITORY / "examples").glob("*.jpg"))}
HAT, SHOES = PHOTOS["hat"], PHOTOS["shoes"]  # 144 x 144 pixels


def encoded(image: Image.Image, kind: str) -> bytes:
    target = io.BytesIO()
    image.save(target, kind)
    return target.getvalue()


GREY = Image.open(io.BytesIO(HAT)).convert("L")
GREYISH = Image.merge("RGB", (GREY, GREY, GREY.point(lambda value: value - 4)))
TRAIN = {
    "hats/1.jpg": HAT,
    "hats/cut.jpg": HAT[:2000],
    "hats/grey.png": encoded(GREY.resize((300, 400)), "PNG"),
    "hats/greyish.jpg": encoded(
        Image.merge("RGB", (GREY, GREY, GREY.point(lambda v: v - 4))).resize((500, 300)), "JPEG"
    ),
    "hats/shoes.jpg": PHOTOS["shoes-2"],
    "shoes/1.jpg": SHOES,
    "shoes/2.jpg": PHOTOS["shoes-2"],
    "shoes/3.jpg": PHOTOS["shoes-2"],
    "skirts/1.jpg": PHOTOS["skirt"],
    "skirts/2.jpg": PHOTOS["skirt"],
    "skirts/cut.jpg": HAT[:2000],
    "skirts/empty.jpg": b"",
}
VAL = {
    "coats/1.jpg": PHOTOS["outwear"],
    "hats/cut.jpg": HAT[:2000],
    "shoes/8.jpg": PHOTOS["shoes-2"],
    "shoes/9.jpg": SHOES,
}
UNREADABLE = ["hats/cut.jpg", "skirts/cut.jpg", "skirts/empty.jpg"]


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Report:
    root = tmp_path_factory.mktemp("data")
    train, val = write(root / "train", TRAIN), write(root / "val", VAL)
    return check(open_source(train), open_source(val), image_size=200)


@dataclass(frozen=True)
class Memory:
    """A source of given images or errors that records the order of reads."""

    images: Sequence[bytes | Exception]
    labels: Sequence[str] | None = None
    name: str = "memory"
    passed_over: dict[str, int] = field(default_factory=dict)
    taken: list[int] = field(default_factory=list)

    @property
    def keys(self) -> Sequence[str]:
        return tuple(f"{index:04}.jpg" for index in range(len(self.images)))

    @property
    def runs(self) -> Sequence[range]:
        return (range(len(self.images)),)

    def read(self, index: int) -> bytes:
        self.taken.append(index)
        image = self.images[index]
        if isinstance(image, Exception):
            raise image
        return image


def test_the_facts_of_each_part(faulty: Report) -> None:
    part = faulty.train
    assert part.images == 12
    assert part.classes == {"hats": 5, "shoes": 3, "skirts": 4}
    assert part.formats == {"JPEG": 8, "PNG": 1}
    assert part.shorter_side == ShorterSide(smallest=144, median=144, largest=300, below_image_size=7)
    assert part.greyscale == pytest.approx(2 / 9)
    assert part.bytes == sum(len(data) for name, data in TRAIN.items() if name not in UNREADABLE)
    assert part.fingerprint == fingerprint(open_source(part.name))
    assert faulty.val is not None
    assert (faulty.val.images, faulty.val.classes) == (4, {"coats": 1, "hats": 1, "shoes": 2})


def test_every_unreadable_image_has_its_reason(faulty: Report) -> None:
    assert list(faulty.train.unreadable) == UNREADABLE
    assert faulty.train.unreadable["hats/cut.jpg"] == "the JPEG image is truncated: send the complete file."
    assert faulty.train.unreadable["skirts/empty.jpg"].startswith("the image is empty")


def test_images_of_equal_content_are_found(faulty: Report) -> None:
    assert faulty.train.duplicates == (
        ("hats/shoes.jpg", "shoes/2.jpg", "shoes/3.jpg"),
        ("skirts/1.jpg", "skirts/2.jpg"),
    )  # but not the two equally truncated ones
    assert faulty.train.conflicts == faulty.train.duplicates[:1]
    assert faulty.val is not None
    assert faulty.val.duplicates == ()
    assert faulty.in_both == (("shoes/8.jpg", "hats/shoes.jpg"), ("shoes/9.jpg", "shoes/1.jpg"))


def test_the_warnings_are_sentences(faulty: Report) -> None:
    assert faulty.warnings == (
        "3 images of train cannot be read, such as hats/cut.jpg: the JPEG image is truncated: send the complete file.",
        "3 images of train duplicate others, such as shoes/2.jpg (same content as hats/shoes.jpg).",
        "3 images of train with equal content have different labels, such as hats/shoes.jpg and shoes/2.jpg: "
        "keep those with the right label.",
        "1 image of val cannot be read, such as hats/cut.jpg: the JPEG image is truncated: send the complete file.",
        "2 images of val also in train, such as shoes/8.jpg (in train: hats/shoes.jpg).",
        "val has no image of class skirts: add some to evaluate those too.",
        "train has no image of class coats: a class only in val cannot be learned.",
    )


def test_the_report_for_people(faulty: Report) -> None:
    lines = list(faulty.lines())
    assert lines[:9] == [
        f"train: {faulty.train.name}",
        f"  12 images, {faulty.train.bytes / 1000:.1f} kB, 3 classes of 3 (shoes) to 5 (hats) images",
        "  formats: JPEG 8, PNG 1",
        "  shorter side: 144 to 300 pixels, median 144; 7 below 200",
        "  greyscale: about 22%",
        "  unreadable: 3",
        "    hats/cut.jpg: the JPEG image is truncated: send the complete file.",
        "    skirts/cut.jpg: the JPEG image is truncated: send the complete file.",
        f"    skirts/empty.jpg: {faulty.train.unreadable['skirts/empty.jpg']}",
    ]
    assert [line for line in lines if line.startswith("warning: ")] == [f"warning: {text}" for text in faulty.warnings]


def test_the_report_for_programs(faulty: Report) -> None:
    report = json.loads(json.dumps(faulty.to_dict()))
    assert report["image_size"] == 200
    assert report["train"]["shorter_side"]["below_image_size"] == 7
    assert report["train"]["unreadable"].keys() == set(UNREADABLE)
    assert report["in_both"] == [["shoes/8.jpg", "hats/shoes.jpg"], ["shoes/9.jpg", "shoes/1.jpg"]]
    assert report["warnings"] == list(faulty.warnings)


def test_a_good_data_set_has_no_warnings(tmp_path: Path) -> None:
    report = check(open_source(write(tmp_path, {f"{name}.jpg": data for name, data in PHOTOS.items()})))
    assert report.warnings == ()
    assert report.val is None
    assert report.train.classes is None
    assert list(report.lines())[1].endswith(" kB, no labels")
    assert list(report.lines())[-1] == "no problems found"


def test_small_images_are_counted_against_the_size_of_the_default_recipe() -> None:
    assert tiny_cpu().arch.image_size == IMAGE_SIZE == 128
    small = encoded(Image.open(io.BytesIO(HAT)).resize((127, 200)), "JPEG")
    report = check(Memory([HAT, SHOES, small]))
    assert report.train.shorter_side is not None
    assert report.train.shorter_side.below_image_size == 1
    assert "  shorter side: 127 to 144 pixels, median 144; 1 below 128" in report.lines()


def test_what_the_data_is_enough_for(faulty: Report) -> None:
    """Nine readable images of twelve, three of them copies: six."""
    lines = list(faulty.lines())
    said = lines[lines.index("enough for") + 1 :][:4]
    assert said == [
        "  pretraining from scratch: no, not below 8 images, these are 6",
        "  continued pretraining: no, not below 8 images, these are 6",
        "  fine-tuning: no, from about 10 images of each class on, shoes has 3",
        "  probe and k-NN: no, from about 5 images of each class on, shoes has 3",
    ]
    judged = json.loads(json.dumps(faulty.to_dict()))["enough_for"]
    assert judged["fine-tuning"] == {"enough": False, "reason": "from about 10 images of each class on, shoes has 3"}


def test_too_few_images_are_refused_in_the_words_of_training() -> None:
    report = check(Memory([HAT, SHOES, PHOTOS["skirt"]]))
    assert report.refusal == "memory holds 3 images, too few to train on: add some, at least 8 are needed."
    assert "no problems found" not in report.lines()
    assert check(Memory([HAT + bytes([number]) for number in range(8)])).refusal is None


def test_nothing_readable_at_all() -> None:
    report = check(Memory([b"", ImageError("gone.")] * SHOWN))
    assert report.train.shorter_side is None
    assert (report.train.greyscale, report.train.bytes, report.train.formats) == (0, 0, {})
    assert len(json.loads(json.dumps(report.to_dict()))["train"]["unreadable"]) == 2 * SHOWN
    lines = list(report.lines())
    assert sum(line.startswith("    0") for line in lines) == SHOWN
    assert f"    and {SHOWN} more" in lines


@pytest.mark.parametrize(("train", "val"), [(["a", "b"], None), (None, ["a", "b"])])
def test_labels_on_one_side_only(train: list[str] | None, val: list[str] | None) -> None:
    report = check(Memory([HAT, SHOES], train), Memory([PHOTOS["skirt"], PHOTOS["pants"]], val))
    with_labels, without = ("train", "val") if train else ("val", "train")
    assert report.warnings == (f"{with_labels} has labels and {without} has none: classes cannot be compared.",)


def test_many_classes_are_not_all_named() -> None:
    images = [HAT + bytes([number]) for number in range(SHOWN + 3)]  # bytes after the end change only the hash
    report = check(Memory(images, [f"c{number:02}" for number in range(SHOWN + 3)]), Memory([SHOES], ["c00"]))
    assert report.warnings == (
        "val has no image of 12 classes (c01, c02, c03, c04, c05, c06, c07, c08, c09, c10 and 2 more): "
        "add some to evaluate those too.",
    )


def test_progress_counts_every_image_of_both() -> None:
    seen: list[tuple[int, int]] = []
    check(Memory([HAT] * 3), Memory([SHOES, b""]), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 5) for done in range(1, 6)]


def test_reading_stays_a_bounded_way_ahead() -> None:
    source = Memory([b""] * 200)
    ahead: list[int] = []
    check(source, threads=2, progress=lambda done, total: ahead.append(len(source.taken) - done))
    assert max(ahead) <= 2 * AHEAD
    assert sorted(source.taken) == list(range(200))


def test_any_number_of_threads_gives_the_same_report(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, TRAIN))
    assert check(source, threads=1) == check(source, threads=7)


def test_a_missing_package_ends_the_check() -> None:
    with pytest.raises(DataError, match="run pip install s3fs"):
        check(Memory([HAT, DataError("run pip install s3fs.")]))


def test_equal_content_is_found_among_many() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 40, 60).tolist()
    small = encoded(Image.new("RGB", (4, 4)), "BMP")
    images = [small + bytes([number]) for number in numbers]
    report = check(Memory(images[:30]), Memory(images[30:]))
    groups = [tuple(f"{i:04}.jpg" for i in range(30) if numbers[i] == n) for n in dict.fromkeys(numbers[:30])]
    assert report.train.duplicates == tuple(group for group in groups if len(group) > 1)
    assert report.in_both == tuple(
        (f"{i:04}.jpg", f"{numbers.index(n):04}.jpg") for i, n in enumerate(numbers[30:]) if n in numbers[:30]
    )
