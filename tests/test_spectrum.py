"""Measures of embeddings that need no labels, on embeddings whose measures are known."""

from __future__ import annotations

import math

import pytest
import torch

from mixmim_serve.errors import DataError
from training.evaluation.spectrum import spectrum, uniformity


def orthogonal(rank: int, count: int = 600, channels: int = 64, seed: int = 0) -> torch.Tensor:
    """Embeddings with exactly `rank` equal singular values."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(count, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(channels, rank, generator=generator)).Q
    return left @ right.T


@pytest.mark.parametrize("rank", [1, 5, 64])
def test_the_effective_rank_of_equal_singular_values_is_their_number(rank: int) -> None:
    assert spectrum(orthogonal(rank)).effective_rank == pytest.approx(rank, rel=1e-3)


def test_a_power_law_has_its_exponent() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2000, 128, generator=generator)).Q
    basis = torch.linalg.qr(basis - basis.mean(dim=0)).Q
    embeddings = basis * torch.arange(1, 129).pow(-0.75)  # eigenvalues are squares: exponent 1.5
    assert spectrum(embeddings).decay == pytest.approx(1.5, abs=0.05)


def test_collapse_shows_in_every_measure() -> None:
    good = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    collapsed = torch.ones(600, 64) + 1e-3 * good
    healthy, broken = spectrum(good), spectrum(collapsed)
    assert healthy.effective_rank > 55
    assert broken.effective_rank < 3
    assert healthy.uniformity == pytest.approx(-4, abs=0.2)
    assert broken.uniformity == pytest.approx(0, abs=0.01)
    assert healthy.dead_dimensions == 0
    assert broken.dead_dimensions == 1  # also where all of them died at once


def test_what_does_not_depend_on_the_scale() -> None:
    values = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    one, other = spectrum(values), spectrum(1000 * values)
    assert one.metrics() == other.metrics()


def test_dimensions_that_do_not_vary_are_dead() -> None:
    values = torch.randn(100, 40, generator=torch.Generator().manual_seed(0))
    values[:, :10] = 7.0
    assert spectrum(values).dead_dimensions == pytest.approx(0.25)
    assert spectrum(values).metrics()["dead_dimensions"] == 0.25


def test_equal_embeddings_have_measures_too() -> None:
    same = spectrum(torch.ones(4, 8))
    assert same.effective_rank == pytest.approx(1)
    assert same.uniformity == pytest.approx(0)
    assert math.isinf(same.decay)
    assert "spectrum_decay" not in same.metrics()  # JSON has no infinity
    assert spectrum(torch.zeros(4, 8)).effective_rank == 1


def test_one_image_has_no_spectrum() -> None:
    with pytest.raises(DataError, match="at least two images, got 1"):
        spectrum(torch.ones(1, 8))


def test_embeddings_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        spectrum(torch.tensor([[1.0, 2.0], [math.inf, 0.0]]))


def test_many_images_are_thinned_for_their_pairs() -> None:
    values = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    assert uniformity(values.double()) == pytest.approx(uniformity(values[::2].double()))
