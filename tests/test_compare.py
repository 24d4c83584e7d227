"""Judging several models on the same images: each score against one computed by hand."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import average_precision_score

from training.evaluation.compare import few_shot, retrieval_map


def clusters(per_class: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes around three orthogonal directions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(per_class)
    return torch.eye(3, 8)[labels] * 4 + spread * torch.randn(len(labels), 8, generator=generator), labels


def test_few_shot_is_sure_of_separate_classes_and_guesses_among_equal_ones() -> None:
    train, labels = clusters(20, 0.1, seed=0)
    val, val_labels = clusters(50, 0.1, seed=1)
    assert few_shot(train, labels, val, val_labels, 1) == (100.0, 0.0)
    noise, noise_val = torch.randn(60, 8), torch.randn(150, 8)
    mean, deviation = few_shot(noise, labels, noise_val, val_labels, 5)
    assert 20 < mean < 47
    assert deviation > 0


def test_more_shots_help() -> None:
    train, labels = clusters(40, 2.5, seed=0)
    val, val_labels = clusters(200, 2.5, seed=1)
    one, ten = (few_shot(train, labels, val, val_labels, shots)[0] for shots in (1, 10))
    assert ten > one + 5


def test_a_class_with_fewer_images_gives_what_it_has() -> None:
    train, labels = clusters(4, 0.1, seed=0)
    val, val_labels = clusters(10, 0.1, seed=1)
    assert few_shot(train, labels, val, val_labels, 10)[0] == 100


def test_retrieval_is_scikit_learns_mean_average_precision() -> None:
    train, labels = clusters(15, 3.0, seed=0)
    val, val_labels = clusters(5, 3.0, seed=1)
    cosines = torch.nn.functional.normalize(val, dim=1) @ torch.nn.functional.normalize(train, dim=1).T
    expected = [
        average_precision_score((labels == label).numpy(), row.numpy())
        for row, label in zip(cosines, val_labels, strict=True)
    ]
    assert retrieval_map(train, labels, val, val_labels) == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_images_of_a_class_without_training_images_are_left_out() -> None:
    train, labels = clusters(5, 0.1, seed=0)
    val, val_labels = clusters(5, 0.1, seed=1)
    assert retrieval_map(train[labels < 2], labels[labels < 2], val, val_labels) == pytest.approx(1)
