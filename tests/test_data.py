"""The data path of training: crops, order, batches, unreadable images."""

from __future__ import annotations

import dataclasses
import io
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import photo
from PIL import ExifTags, Image
from training_data import SMALL, STEPS_PER_EPOCH

from mixmim_serve.config import Preprocessing
from mixmim_serve.errors import ConfigError, DataError, ResourceError
from mixmim_serve.preprocess import decode, normalize
from mixmim_serve.sources import open_source
from training.augment import ASPECT_RATIOS, RandomCrop, flip, random_crop_box, step_seed
from training.config import AugmentConfig, FinetuneConfig, PretrainConfig
from training.data import Batch, StepSampler, TrainingImage, TrainingImages, build_loader, collate, mirrored, shuffled
from training.device_augment import DeviceAugment
from training.pretraining import Pretraining


def images_of(folder: Path, config: PretrainConfig = SMALL, size: int = 32) -> TrainingImages:
    return TrainingImages(open_source(folder), size, config)


def batches(folder: Path, config: PretrainConfig, epoch: int = 0, rank: int = 0, processes: int = 1) -> list[Batch]:
    loader, sampler = build_loader(images_of(folder, config), config, rank, processes)
    sampler.epoch = epoch
    return list(loader)


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - augmentation, not secrets


def test_too_little_shared_memory_is_refused_at_the_start(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch itself waits forever for the batch that does not fit."""
    config = dataclasses.replace(SMALL, batch_size=4, workers=2)
    needed = (2 * 2 + 1) * 4 * 3 * 32**2  # two batches per worker, and one in use
    monkeypatch.setattr("training.resources.SHARED", photos)
    free = [needed]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free[0]))
    build_loader(images_of(photos, config), config)
    free[0] -= 1
    with pytest.raises(ResourceError, match=r"^the 2 decoding processes .* 0 MB free: give the .*--workers"):
        build_loader(images_of(photos, config), config)
    build_loader(images_of(photos, config), dataclasses.replace(config, workers=0))
    free[0] = 2 * needed
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ResourceError, match=r"^the 6 decoding processes"):
        build_loader(images_of(photos, config), config)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (600, 600)])
@pytest.mark.parametrize("min_crop", [0.2, 0.6])
def test_crops_stay_inside_and_within_their_bounds(width: int, height: int, min_crop: float) -> None:
    rng = seeded(0)
    boxes = np.array([random_crop_box(width, height, min_crop, rng) for _ in range(2000)])
    left, upper, right, lower = boxes.T
    shares = (right - left) * (lower - upper) / (width * height)
    ratios = (right - left) / (lower - upper)
    assert shares.min() > min_crop * 0.99  # sides are whole pixels
    assert ratios.min() > ASPECT_RATIOS[0] * 0.99
    assert ratios.max() < ASPECT_RATIOS[1] * 1.01
    assert left.min() == upper.min() == 0  # inside, and up to the border
    assert (right.max(), lower.max()) == (width, height)
    # The whole allowed range occurs; large crops of an oblong photo cannot be oblong the other way.
    assert shares.min() < min_crop + 0.02
    assert shares.max() > 0.95
    if min_crop < 0.5:
        assert ratios.max() > 1.31
        assert ratios.min() < 0.765


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (2000, 60, (960, 0, 1040, 60)),  # 80 x 60, in the middle
        (60, 2000, (0, 960, 60, 1040)),
        (1, 1, (0, 0, 1, 1)),
        (5000, 1, (2499, 0, 2500, 1)),
        (1, 5000, (0, 2499, 1, 2500)),
    ],
)
def test_shapes_without_a_crop_fall_back_to_the_centre(width: int, height: int, box: tuple[int, int, int, int]) -> None:
    for seed in range(20):
        assert random_crop_box(width, height, 0.2, seeded(seed)) == box
    assert RandomCrop(32, 0.2, seeded(0))(photo(0, width, height)).shape == (32, 32, 3)


def test_a_crop_is_decided_by_its_seed() -> None:
    image = photo(1, 200, 150)
    views = [RandomCrop(32, 0.2, seeded(seed))(image) for seed in range(10)]
    assert {(view.shape, view.dtype) for view in views} == {((32, 32, 3), np.dtype(np.uint8))}
    for seed, view in enumerate(views):
        np.testing.assert_array_equal(RandomCrop(32, 0.2, seeded(seed))(image), view)
    assert len({view.tobytes() for view in views}) == 10


def test_a_crop_is_cut_and_then_resized() -> None:
    """Resizing with a box would read pixels outside it."""
    image = photo(2, 200, 150)
    for seed in range(20):
        box = random_crop_box(image.width, image.height, 0.2, seeded(seed))
        plain = np.asarray(image.crop(box).resize((16, 16), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(RandomCrop(16, 0.2, seeded(seed))(image), plain)


def jpeg(image: Image.Image, orientation: int = 1) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_large_jpeg_is_decoded_small_and_shows_the_same(orientation: int) -> None:
    data = jpeg(photo(3, 1203, 907), orientation)
    factors = set()
    for seed in range(40):
        small, full = (RandomCrop(64, 0.05, seeded(seed)) for _ in range(2))
        image = decode(data, reduction=small.reduction)
        whole = decode(data)
        assert whole.size == ((907, 1203) if orientation == 6 else (1203, 907))
        factor = round(whole.width / image.width)
        factors.add(factor)
        pixels, expected = small(image).astype(int), full(whole).astype(int)
        assert small.drawn == full.drawn
        _, (left, upper, right, lower) = small.drawn
        assert min(right - left, lower - upper) >= factor * 64
        assert np.abs(pixels - expected).mean() < 2
        assert small.rng.random() == full.rng.random()
    assert factors == {2, 4, 8}


def test_other_formats_and_small_crops_are_decoded_whole() -> None:
    crop = RandomCrop(64, 1.0, seeded(0))
    assert decode(jpeg(photo(3, 100, 80)), reduction=crop.reduction).size == (100, 80)
    buffer = io.BytesIO()
    photo(3, 1200, 900).save(buffer, "PNG")
    assert decode(buffer.getvalue(), reduction=RandomCrop(64, 1.0, seeded(0)).reduction).size == (1200, 900)


def test_flip_mirrors_the_chosen_images() -> None:
    pixels = torch.arange(2 * 2 * 3 * 3, dtype=torch.uint8).view(2, 2, 3, 3)
    flipped = flip(pixels, torch.tensor([True, False]))
    assert torch.equal(flipped[0, :, 0], pixels[0, :, 2])
    assert torch.equal(flipped[0, :, 1], pixels[0, :, 1])
    assert torch.equal(flipped[1], pixels[1])


def test_half_of_the_images_are_flipped(photos: Path) -> None:
    dataset = images_of(photos)
    flipped = sum(dataset[epoch, index].flipped for epoch in range(20) for index in range(24))
    assert 180 < flipped < 300  # of 480; five standard deviations


def test_near_numbers_give_unrelated_seeds() -> None:
    seeds = [step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert 250 < sum(seed & 1 for seed in seeds) < 350
    assert step_seed(1, 23) != step_seed(12, 3)


def test_the_order_is_another_one_in_each_epoch(photos: Path) -> None:
    source = open_source(photos)
    samplers = [StepSampler(source, dataclasses.replace(SMALL, seed=seed)) for seed in (3, 3, 4)]
    orders = []
    for epoch in range(4):
        for sampler in samplers:
            sampler.epoch = epoch
        one, twin, other = (list(sampler) for sampler in samplers)
        assert one == twin == list(samplers[0]) != other
        pairs = [pair for batch in one for pair in batch]
        assert {pair[0] for pair in pairs} == {epoch}
        orders.append([index for _, index in pairs])
        assert sorted(orders[-1]) == list(range(24)) != orders[-1]
    assert len({tuple(order) for order in orders}) == 4
    assert len(samplers[0]) == samplers[0].steps == STEPS_PER_EPOCH


def test_runs_of_a_source_are_opened_a_few_at_a_time() -> None:
    runs = [range(start, start + 10) for start in range(0, 1000, 10)]
    order = shuffled(runs, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(1000))
    window = [{index // 10 for index in order[start : start + 160]} for start in range(0, 1000, 160)]
    assert [len(opened) for opened in window] == [16, 16, 16, 16, 16, 16, 4]
    assert order[:160] != sorted(order[:160])
    assert window[0] != set(range(16))


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_parts_of_a_batch_keep_the_pairs_together(photos: Path, processes: int, accumulate: int) -> None:
    source = open_source(photos)
    whole = [[index for _, index in batch] for batch in StepSampler(source, SMALL)]
    config = dataclasses.replace(SMALL, accumulate=accumulate)
    ranks = [list(StepSampler(source, config, rank, processes)) for rank in range(processes)]
    for step, batch in enumerate(whole):
        partner = dict(zip(batch, reversed(batch), strict=True))
        parts = [part for rank in ranks for part in rank[step * accumulate : (step + 1) * accumulate]]
        assert sorted(index for part in parts for _, index in part) == sorted(batch)
        for part in parts:
            indices = [index for _, index in part]
            assert [partner[index] for index in indices] == indices[::-1]


def test_odd_parts_hold_every_image_once() -> None:
    batch = list(range(9))
    assert sorted(index for part in range(3) for index in mirrored(batch, part, 3)) == batch


def test_a_batch_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="a batch of 8 cannot be split over 3 processes times 1"):
        SMALL.part_size(3)
    with pytest.raises(ConfigError, match="a part of 1 images cannot be mixed in pairs"):
        SMALL.part_size(8)
    assert FinetuneConfig(batch_size=8).part_size(8) == 1


def test_an_item_depends_on_seed_epoch_and_index_alone(photos: Path) -> None:
    images, twin = images_of(photos), images_of(photos)
    item = images[0, 5]
    for key in ((1, 5), (0, 4), (3, 0)):  # loading other images first changes nothing
        assert not np.array_equal(twin[key].pixels, item.pixels)
    np.testing.assert_array_equal(twin[0, 5].pixels, item.pixels)
    assert not np.array_equal(images_of(photos, dataclasses.replace(SMALL, seed=1))[0, 5].pixels, item.pixels)
    assert len(images) == 24


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # from Python 3.12 on
def test_batches_do_not_depend_on_the_number_of_workers(spoilt: Path) -> None:
    for epoch in (0, 1):
        here, there = (batches(spoilt, dataclasses.replace(SMALL, workers=workers), epoch) for workers in (0, 1))
        assert len(here) == len(there) == STEPS_PER_EPOCH
        for one, other in zip(here, there, strict=True):
            assert torch.equal(one.pixels_BHWC, other.pixels_BHWC)
            assert torch.equal(one.flipped_B, other.flipped_B)
            assert one.unreadable == other.unreadable
    assert len({reason for batch in here for reason in batch.unreadable}) == 2


def test_another_image_takes_the_place_of_an_unreadable_one(spoilt: Path) -> None:
    for batch in batches(spoilt, SMALL):
        assert batch.pixels_BHWC.shape == (8, 32, 32, 3)
    dataset = images_of(spoilt)
    place = dataset.source.keys.index("letter.jpg")
    substitutes = Counter()
    for epoch in range(30):
        item = dataset[epoch, place]
        assert item.pixels is not None
        assert item.unreadable[0].startswith("letter.jpg: the data is not an image")
        substitutes[item.pixels.tobytes()] += 1
    assert len(substitutes) > 10  # not always the same image


def test_collate_gives_no_batch_where_an_image_is_missing() -> None:
    good = TrainingImage(np.full((4, 4, 3), 7, np.uint8), 2, True, ())
    batch = collate([good, good])
    assert batch.pixels_BHWC.shape == (2, 4, 4, 3)
    assert batch.pixels_BHWC.dtype == torch.uint8
    assert batch.labels_B.tolist() == [2, 2]
    assert batch.flipped_B.tolist() == [True, True]
    batch = collate([good, TrainingImage(None, 0, False, ("a.jpg: damaged",))])
    assert len(batch.pixels_BHWC) == 0
    assert batch.unreadable == ("a.jpg: damaged",)


def test_labels_are_numbered_as_the_classes_are_given(tmp_path: Path) -> None:
    for name in ("owl", "cat"):
        (tmp_path / name).mkdir()
        photo(1).save(tmp_path / name / "1.jpg")
    source = open_source(tmp_path)
    dataset = TrainingImages(source, 32, FinetuneConfig(batch_size=2), ("cat", "owl"))
    assert [(source.keys[index], dataset[0, index].label) for index in (0, 1)] == [("cat/1.jpg", 0), ("owl/1.jpg", 1)]


def test_pixels_are_normalised_as_for_evaluation(photos: Path) -> None:
    batch = batches(photos, SMALL)[0]
    expected = [normalize(p.numpy(), Preprocessing.evaluation(64)) for p in batch.pixels_on(torch.device("cpu"))]
    pixels_BCHW, _ = Pretraining(SMALL, None).inputs(batch, mask_seed=0, seed=0)
    np.testing.assert_array_equal(pixels_BCHW.numpy(), np.stack(expected))
    off = AugmentConfig(rand_augment_ops=0, erase=0, mixup=0, cutmix=0)
    augment = DeviceAugment(off, Preprocessing.evaluation(64), 2, torch.device("cpu"))
    pixels_BCHW, _ = augment(batch.pixels_on(torch.device("cpu")), batch.labels_B, seed=0)
    np.testing.assert_array_equal(pixels_BCHW.numpy(), np.stack(expected))


def test_too_few_images_are_refused(photos: Path) -> None:
    with pytest.raises(DataError, match=r"holds 24 images, fewer than a batch of 32: add images, or lower batch_size"):
        batches(photos, dataclasses.replace(SMALL, batch_size=32))
