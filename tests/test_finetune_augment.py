"""Fine-tuning augmentation: operations against Pillow's, draws against timm's recipe, soft targets against pixels."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from mixmim_serve.config import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from mixmim_serve.errors import ConfigError, DataError
from training.config import AugmentConfig
from training.device_augment import (
    DeviceAugment,
    draw_erased_box,
    draw_round,
    erase,
    operations,
    rand_augment,
    transform_pixels,
)
from training.mixing import Mix, draw_box, draw_mix, mix_pixels, soft_targets

CPU = torch.device("cpu")
CLASSES = 5
OFF = {"rand_augment_ops": 0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}
FILL = tuple(round(255 * value) for value in IMAGENET_MEAN)
OPERATIONS = operations(torch.tensor(IMAGENET_MEAN))


def augment(device: torch.device = CPU, **changes: float) -> DeviceAugment:
    """The official recipe with `changes`."""
    return DeviceAugment(AugmentConfig(**changes), Preprocessing.evaluation(64), CLASSES, device)


def only(**parts: float) -> DeviceAugment:
    """Only `parts`, everything else off."""
    return augment(**{**OFF, **parts})


def rng_of(seed: int) -> random.Random:
    """A random generator."""
    return random.Random(seed)  # noqa: S311 - augmentation, not secrets


def batch(size: int = 12, side: int = 48) -> tuple[Tensor, Tensor]:
    """Square crops of the example photos, and labels."""
    paths = sorted((REPOSITORY / "examples").glob("*.jpg"))
    squares = [np.asarray(square(paths[index % len(paths)].name, side)) for index in range(size)]
    return torch.from_numpy(np.stack(squares)), torch.arange(size) % CLASSES


def square(name: str, side: int = 128) -> Image.Image:
    """An example photo, resized to a square."""
    return Image.open(REPOSITORY / "examples" / name).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


# The whole


def test_batches_have_the_shapes_and_the_range_that_training_expects() -> None:
    pixels, labels = batch(64)
    before = pixels.clone()
    values, targets = augment(erase=0)(pixels, labels, seed=0)
    assert (values.shape, values.dtype) == ((64, 3, 48, 48), torch.float32)
    assert (targets.shape, targets.dtype) == ((64, CLASSES), torch.float32)
    assert values.is_contiguous()
    assert torch.equal(pixels, before)
    restored = values * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    assert restored.min() > -1e-6
    assert restored.max() < 1 + 1e-6


def test_the_seed_alone_decides_and_global_generators_stay() -> None:
    pixels, labels = batch(32)
    transform = augment()
    first = transform(pixels, labels, seed=7)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    again = transform(pixels, labels, seed=7)
    other = augment()(pixels, labels, seed=8)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, three)


def test_autocast_changes_nothing() -> None:
    pixels, labels = batch(64)
    expected, _ = augment()(pixels, labels, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = augment()(pixels, labels, seed=0)
    assert torch.equal(values, expected)


def test_everything_off_is_exact_normalisation_and_one_hot_labels() -> None:
    pixels, labels = batch()
    values, targets = only()(pixels, labels, seed=0)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    assert torch.equal(values, ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2))
    assert torch.equal(targets, torch.nn.functional.one_hot(labels, CLASSES).float())


@pytest.mark.parametrize("part", ["rand_augment_ops", "erase", "mixup", "cutmix"])
def test_each_part_changes_pixels_when_it_is_on(part: str) -> None:
    pixels, labels = batch(32)
    plain, _ = only()(pixels, labels, seed=0)
    values, _ = only(**{part: getattr(AugmentConfig(), part)})(pixels, labels, seed=0)
    assert not torch.equal(values, plain)


def test_what_does_not_fit_is_refused() -> None:
    pixels, labels = batch()
    for wrong in (pixels[:, :40], pixels.float()):
        with pytest.raises(DataError, match=r"expected square uint8 images"):
            augment()(wrong, labels, seed=0)
    with pytest.raises(ConfigError, match="num_classes"):
        DeviceAugment(AugmentConfig(), Preprocessing.evaluation(64), 0, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_never_waited_for_and_agrees_with_a_cpu() -> None:
    pixels, labels = batch(64)
    on_device = [value.cuda() for value in (pixels, labels)]
    transform = augment(torch.device("cuda"), erase=0)
    transform(*on_device, seed=0)  # the first call loads libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        values, targets = transform(*on_device, seed=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, expected_targets = augment(erase=0)(pixels, labels, seed=1)
    assert torch.allclose(targets.cpu(), expected_targets)
    # One level is 1/255 / std = 0.017; a second operation such as posterize can amplify it in a few pixels.
    assert ((values.cpu() - expected).abs() > 0.02).float().mean() < 0.01


# RandAugment


def apply(image: Image.Image, name: str, strength: float, sign: int) -> np.ndarray:
    """One of our operations, uint8 (H, W, 3)."""
    transform, parameters = OPERATIONS[name]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    changed = transform_pixels(pixels, transform, torch.tensor([parameters(strength, sign)]))
    return changed[0].permute(1, 2, 0).numpy()


def levels(function: Callable[[int], int]) -> Callable[[Image.Image], Image.Image]:
    """A lookup table, as timm does what Pillow cannot (or no longer can: posterising to 0 bits)."""
    return lambda image: image.point([function(level) for level in range(256)] * 3)


def affine(*coefficients: float) -> Callable[[Image.Image], Image.Image]:
    """Pillow's affine transform as timm calls it."""
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BICUBIC, fillcolor=FILL
    )


def pillow(name: str, strength: float, sign: int, side: int = 128) -> Callable[[Image.Image], Image.Image]:
    """The result of timm at magnitude 10 * `strength` with Pillow, by its 'increasing' level_to_arg functions."""
    level = 10 * strength
    factor = max(0.1, 1 + sign * level / 10 * 0.9)
    shear, shift = sign * level / 10 * 0.3, sign * level / 10 * 0.45 * side
    bits, threshold, added = 4 - int(level / 10 * 4), 256 - int(level / 10 * 256), int(level / 10 * 110)
    return {
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
        "invert": ImageOps.invert,
        "posterize": levels(lambda value: value & ~(2 ** (8 - bits) - 1)),
        "solarize": lambda image: ImageOps.solarize(image, threshold),
        "solarize_add": levels(lambda value: min(255, value + added) if value < 128 else value),
        "color": lambda image: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda image: ImageEnhance.Contrast(image).enhance(factor),
        "brightness": lambda image: ImageEnhance.Brightness(image).enhance(factor),
        "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(factor),
        "rotate": lambda image: image.rotate(sign * level / 10 * 30, resample=Image.Resampling.BICUBIC, fillcolor=FILL),
        "shear_x": affine(1, shear, 0, 0, 1, 0),
        "shear_y": affine(1, 0, 0, shear, 1, 0),
        "translate_x": affine(1, 0, shift, 0, 1, 0),
        "translate_y": affine(1, 0, 0, 0, 1, shift),
    }[name]


EXACT = ("equalize", "invert", "posterize", "solarize", "solarize_add")
WARPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("strength", [0.75, 0.9, 1.0])  # magnitude 9 within three deviations of 0.5, at most 10
def test_operations_do_what_pillow_does(name: str, strength: float) -> None:
    for image in (*map(square, ("skirt.jpg", "hat.jpg", "shoes.jpg")), Image.new("RGB", (128, 128), (77, 200, 0))):
        for sign in (-1, 1):
            expected = np.asarray(pillow(name, strength, sign)(image)).astype(int)
            difference = np.abs(apply(image, name, strength, sign) - expected)
            if name in WARPS:  # torch's cubic kernel has the parameter -0.75, Pillow's -1: they differ at sharp edges
                assert difference.mean() < 0.8
                assert np.quantile(difference, 0.999) <= 10
            limit = 20 if name in WARPS else 0 if name in EXACT else 1  # Pillow truncates
            assert difference.max() <= limit


def test_a_batch_gets_what_each_image_would_get_alone() -> None:
    pixels = batch(24)[0].permute(0, 3, 1, 2).contiguous()
    config = AugmentConfig(rand_augment_ops=3)
    expected = pixels.clone()
    rng = rng_of(5)
    for _ in range(3):
        for transform, rows in draw_round(24, OPERATIONS, config, rng).items():
            for image, *parameters in rows:
                expected[image] = transform_pixels(expected[image][None], transform, torch.tensor([parameters]))[0]
    rand_augment(pixels, OPERATIONS, config, rng_of(5))
    assert ((pixels.int() - expected.int()).abs() > 1).float().mean() < 1e-3
    assert (pixels != expected).float().mean() < 1e-2


def test_draws_are_those_of_the_recipe() -> None:
    """Half of 30,000 draws apply, each operation in 1/30; magnitudes are normal around 9, signs balanced."""
    named = {name: op._replace(transform=name, parameters=lambda *drawn: drawn) for name, op in OPERATIONS.items()}
    assert len(named) == 15
    rows = draw_round(30_000, named, AugmentConfig(), rng_of(0))
    assert all(900 < len(drawn) < 1100 for drawn in rows.values())  # 1000, and three deviations of 31
    images, strengths, signs, *rest = np.array([row for drawn in rows.values() for row in drawn]).T
    assert len(rows) == 15
    assert len(np.unique(images)) == len(images)
    assert abs(len(images) / 30_000 - 0.5) < 0.01
    assert strengths.max() == 1.0  # clipped
    assert abs(np.median(strengths) - 0.9) < 0.002
    assert abs(strengths[strengths < 0.9].std() - 0.05 * math.sqrt(1 - 2 / math.pi)) < 0.001  # half a normal's
    assert abs(signs.mean()) < 0.03
    assert not np.any(rest)


# Random erasing


def test_erased_boxes_are_as_large_and_long_as_the_recipe_says() -> None:
    rng = rng_of(0)
    boxes = [draw_erased_box(1000, 1000, rng) for _ in range(2000)]
    areas = np.array([box.area for box in boxes]) / 1e6
    aspects = np.array([(box.bottom - box.top) / (box.right - box.left) for box in boxes])
    assert areas.min() == pytest.approx(0.02, abs=0.002)
    assert areas.max() == pytest.approx(1 / 3, abs=0.002)
    assert aspects.min() == pytest.approx(0.3, abs=0.01)
    assert aspects.max() == pytest.approx(1 / 0.3, abs=0.1)
    assert abs(np.median(np.log(aspects))) < 0.06
    assert all(min(box) >= 0 and max(box) <= 1000 for box in boxes)


def test_a_quarter_of_the_images_get_a_rectangle_of_normal_noise() -> None:
    erased, noise = 0, []
    for seed in range(40):
        pixels = torch.zeros(64, 3, 32, 32)
        erase(pixels, 0.25, rng_of(seed), torch.Generator().manual_seed(seed))
        for image in pixels[pixels.flatten(1).any(1)]:
            rows, columns = (image[0].any(dim).nonzero().flatten() for dim in (1, 0))
            box = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box.all()
            assert not image.sum() - box.sum() > 1e-3
            erased += 1
            noise.append(box.flatten())
    assert abs(erased / (40 * 64) - 0.25) < 0.03  # three deviations
    values = torch.cat(noise)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01


def test_noise_comes_after_normalisation() -> None:
    pixels, labels = batch(32)
    plain, erased = (transform(pixels, labels, seed=0)[0] for transform in (only(), only(erase=1.0)))
    noise = erased[erased != plain]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


# Mixing


def constant_images(count: int = 8) -> tuple[Tensor, Tensor]:
    """Image i has level 10 * i everywhere, and its own class."""
    return (torch.arange(count, dtype=torch.uint8) * 10).view(-1, 1, 1, 1).expand(-1, 40, 40, 3), torch.arange(count)


@pytest.mark.parametrize("part", ["mixup", "cutmix"])
def test_targets_hold_the_share_that_pixels_truly_have(part: str) -> None:
    pixels, labels = constant_images()
    transform = DeviceAugment(AugmentConfig(**{**OFF, part: 1.0}), Preprocessing(mean=(0,) * 3, std=(1,) * 3), 8, CPU)
    shares = []
    for seed in range(50):
        values, targets = transform(pixels, labels, seed)
        own, partner = pixels[:, 0, 0, 0] / 255, pixels.flip(0)[:, 0, 0, 0] / 255
        kept = (values.mean((1, 2, 3)) - partner) / (own - partner)
        assert torch.allclose(targets.sum(1), torch.ones(8))
        assert torch.allclose(targets[labels, labels], kept, atol=1e-4)
        assert torch.allclose(targets[labels, labels.flip(0)], 1 - kept, atol=1e-4)
        if part == "cutmix":  # nothing is blended: each pixel comes from one image
            assert ((values - own.view(-1, 1, 1, 1)) * (values - partner.view(-1, 1, 1, 1))).abs().max() < 1e-6
        shares.append(float(kept[0]))
    assert min(shares) < 0.3
    assert max(shares) > 0.7


def test_mixup_and_cutmix_take_turns() -> None:
    rng = rng_of(0)
    mixes = [draw_mix(0.8, 1.0, 64, 64, rng) for _ in range(4000)]
    blended = [mix.kept for mix in mixes if mix.box is None]
    assert abs(len(blended) / 4000 - 0.5) < 0.03
    assert abs(np.mean(blended) - 0.5) < 0.03
    assert abs(np.var(blended) - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # of Beta(0.8, 0.8)
    assert all(draw_mix(0.8, 0, 64, 64, rng).box is None for _ in range(50))
    assert all(draw_mix(0, 1.0, 64, 64, rng).box is not None for _ in range(50))
    assert draw_mix(0, 0, 64, 64, rng) == Mix()


def test_cutmix_boxes_have_the_drawn_area_unless_the_border_clips_them() -> None:
    rng = rng_of(0)
    boxes = [draw_box(0.75, 64, 96, rng) for _ in range(500)]
    heights, widths = np.array([(box.bottom - box.top, box.right - box.left) for box in boxes]).T
    assert heights.max() == 32  # half the sides make a quarter of the area
    assert widths.max() == 48
    assert heights.min() < 20  # clipped
    assert all(0 <= box.top <= box.bottom <= 64 and 0 <= box.left <= box.right <= 96 for box in boxes)


def test_mixing_leaves_the_middle_of_an_odd_batch_to_itself() -> None:
    values = torch.rand(3, 3, 8, 8)
    mixed = values.clone()
    mix_pixels(mixed, Mix(0.3))
    assert torch.allclose(mixed[1], values[1])
    assert torch.allclose(mixed[0], 0.3 * values[0] + 0.7 * values[2])


def test_smoothed_targets_are_timms() -> None:
    targets = soft_targets(torch.tensor([0, 2, 1, 0]), 4, smoothing=0.1, kept=0.7)
    assert torch.allclose(targets.sum(1), torch.ones(4))
    # on = 1 - 0.1 + 0.1 / 4, off = 0.1 / 4; the partner of the first image is the last, of the same class
    assert targets[0].tolist() == pytest.approx([0.925, 0.025, 0.025, 0.025])
    assert targets[1].tolist() == pytest.approx([0.025, 0.295, 0.655, 0.025])
