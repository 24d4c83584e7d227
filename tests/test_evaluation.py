"""Evaluation: k-NN, linear probe and confusion matrix against slow references, and inputs that must be rejected."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixmim_serve.errors import ConfigError, DataError, MixMIMError
from training.evaluation.confusion import (
    ClassResult,
    Confusion,
    accuracy,
    confusion_figure,
    confusion_matrix,
    confusions,
    draw_confusion,
    per_class,
    rank_of_truth,
)
from training.evaluation.knn import knn_accuracy, nearest, neighbour_counts, vote
from training.evaluation.linear import (
    DEFAULT,
    DEFAULT_LR,
    FOLDED,
    FOLDS,
    LinearProbe,
    ProbeConfig,
    choose,
    linear_probe,
    split_by_class,
    stratified_parts,
    top1_of_heads,
    train_heads,
)

QUICK = ProbeConfig(epochs=5, batch_size=64, lrs=(0.01, 0.1, 1.0), split_from=1)


def clouds(images: int, classes: int, channels: int = 12, spread: float = 1.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings around one centre per class, each channel with its own offset and scale, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    world = torch.Generator().manual_seed(99)  # centres, offsets and scales are the same for every seed
    centres, offset = torch.randn(classes, channels, generator=world), torch.randn(channels, generator=world)
    scale = torch.rand(channels, generator=world) * 3 + 0.05
    labels = torch.randint(classes, (images,), generator=generator)
    return (centres[labels] + spread * torch.randn(images, channels, generator=generator)) * scale + offset, labels


# ---- scores ----


def slow_rank(scores: np.ndarray, label: int) -> int:
    order = sorted(range(len(scores)), key=lambda c: (-scores[c], c))
    return order.index(label)


def test_top_1_and_top_5_are_those_of_a_sorted_list() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (200, 9)).astype(np.float32)  # so few values that most rows have ties
    labels = rng.integers(0, 9, 200)
    ranks = np.array([slow_rank(row, label) for row, label in zip(scores, labels, strict=True)])
    result = accuracy(torch.from_numpy(scores), torch.from_numpy(labels))
    assert result.images == 200
    assert result.top1 == pytest.approx(100 * (ranks == 0).mean())
    assert result.top1 == pytest.approx(100 * (scores.argmax(1) == labels).mean())
    assert result.top5 == pytest.approx(100 * (ranks < 5).mean())


def test_a_score_that_is_no_number_is_no_guess() -> None:
    nan, inf = math.nan, math.inf
    scores = torch.tensor([[nan] * 7, [-inf] * 7, [nan, 1.0, nan, nan, nan, nan, nan], [inf, 1, 2, 3, 4, 5, nan]])
    assert rank_of_truth(scores, torch.tensor([0, 0, 1, 0])).tolist() == [6, 6, 0, 0]
    assert accuracy(scores, torch.tensor([0, 0, 1, 0])).top1 == 50


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_top_5_of_up_to_five_classes_is_100(classes: int) -> None:
    scores = torch.randn(40, classes, generator=torch.Generator().manual_seed(0))
    assert accuracy(scores, torch.arange(40) % classes).top5 == 100


# ---- k nearest neighbours ----


def slow_knn(train: Tensor, train_labels: Tensor, query: Tensor, labels: Tensor, classes: int, k: int) -> list[float]:
    """Top-1 and top-5 in percent by loops over one image and one neighbour at a time, in float64."""
    hits = [0, 0]
    for vector, label in zip(query.double().numpy(), labels.tolist(), strict=True):
        cosine = [float(t @ vector) / math.sqrt(t @ t) / math.sqrt(vector @ vector) for t in train.double().numpy()]
        votes: dict[int, float] = {}
        for row in sorted(range(len(cosine)), key=lambda row: -cosine[row])[:k]:
            votes[int(train_labels[row])] = votes.get(int(train_labels[row]), 0) + math.exp(cosine[row] / 0.07)
        guesses = sorted(votes, key=lambda c: -votes[c])
        hits[0] += guesses[0] == label
        hits[1] += label in guesses[:5] or classes <= 5
    return [100 * count / len(query) for count in hits]


@pytest.mark.parametrize(("classes", "images"), [(3, 90), (12, 150)])
def test_knn_is_what_loops_over_images_find(classes: int, images: int) -> None:
    train, train_labels = clouds(images, classes)
    query, labels = clouds(60, classes, seed=1)
    fast = knn_accuracy(train, train_labels, query, labels, classes, ks=(1, 7, 40))
    assert list(fast) == [1, 7, 40]
    for k, result in fast.items():
        assert [result.top1, result.top5] == pytest.approx(slow_knn(train, train_labels, query, labels, classes, k))
        assert 20 < result.top1 < 95  # neither chance nor perfect, or nothing was compared


@pytest.mark.parametrize(("train_rows", "query_rows"), [(1, 1), (7, 11), (50, 3), (1000, 1000)])
def test_the_size_of_the_blocks_does_not_matter(train_rows: int, query_rows: int) -> None:
    train, query = clouds(50, 4)[0], clouds(20, 4, seed=1)[0]
    similarity, index = nearest(train, query, 9, train_rows, query_rows)
    cosine = nn.functional.cosine_similarity(query[:, None].double(), train[None].double(), dim=-1)
    expected = cosine.sort(dim=1, descending=True)
    assert torch.equal(index, expected.indices[:, :9])
    torch.testing.assert_close(similarity.double(), expected.values[:, :9], atol=1e-6, rtol=0)


def test_more_neighbours_than_train_images_means_all_of_them() -> None:
    train, train_labels = clouds(30, 4)
    query, labels = clouds(50, 4, seed=1)
    result = knn_accuracy(train, train_labels, query, labels, 4, ks=(30, 31, 200))
    assert list(result) == [30, 31, 200]
    assert result[30] == result[31] == result[200]
    assert nearest(train, query, 200)[0].shape == (50, 30)


def test_of_equal_votes_the_lower_class_wins() -> None:
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    result = knn_accuracy(train, torch.tensor([4, 2, 0]), torch.tensor([[2.0, 0.0]] * 4), torch.arange(4) + 1, 6, (2,))
    assert (result[2].top1, result[2].top5) == (25, 50)  # class 2 first, class 4 second, and no other prediction


def test_a_class_without_a_vote_is_no_guess() -> None:
    train, query = torch.ones(20, 3), torch.ones(6, 3)
    result = knn_accuracy(train, torch.full((20,), 5), query, torch.arange(6), 10, ks=(10,))[10]
    assert (result.top1, result.top5) == (pytest.approx(100 / 6), pytest.approx(100 / 6))


def test_classes_may_be_absent_from_the_queries() -> None:
    train, train_labels = clouds(200, 8, spread=0.05)
    query, labels = clouds(200, 8, spread=0.05, seed=1)
    some = labels == 3
    result = knn_accuracy(train, train_labels, query[some], labels[some], 8, ks=(5,))[5]
    assert (result.top1, result.images) == (100, int(some.sum()))


def test_embeddings_may_be_of_any_length_and_in_half_precision() -> None:
    train, train_labels = clouds(80, 4)
    query, labels = clouds(40, 4, seed=1)
    plain = knn_accuracy(train, train_labels, query, labels, 4, ks=(10,))
    lengths = torch.rand(80, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    assert knn_accuracy(train * lengths, train_labels, 7 * query, labels, 4, ks=(10,)) == plain
    similarity, index = nearest(train.half(), query.half(), 10)
    assert similarity.dtype == torch.float32
    assert torch.equal(index, nearest(train.half().float(), query.half().float(), 10)[1])


def test_votes_are_finite_at_a_low_temperature_and_weighted_at_ours() -> None:
    similarity, labels = torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[1, 0, 0]])
    assert vote(similarity, labels, 3, temperature=0.001).argmax() == 1
    scores = vote(similarity, labels, 3)[0]
    assert float(scores[0] / scores[1]) == pytest.approx(2 * math.exp(-0.1 / 0.07), rel=1e-5)
    assert scores[2] == -math.inf


GOOD = torch.eye(3)
LABELS = torch.arange(3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: knn_accuracy(GOOD, LABELS, GOOD, LABELS, 3, ks=(0,)), ConfigError, "at least 1"),
        (lambda: knn_accuracy(GOOD, LABELS, GOOD, LABELS, 3, ks=()), ConfigError, "at least 1"),
        (lambda: knn_accuracy(GOOD, LABELS, GOOD, LABELS, 3, temperature=0.0), ConfigError, "temperature"),
        (lambda: knn_accuracy(GOOD, LABELS, GOOD, LABELS, 2), DataError, "0 to 1, got 0 to 2"),
        (lambda: knn_accuracy(GOOD, LABELS, GOOD, LABELS - 1, 3), DataError, "got -1 to 1"),
        (lambda: knn_accuracy(GOOD, LABELS, GOOD, LABELS[:2], 3), DataError, "expected 3 labels, one per image"),
        (lambda: knn_accuracy(GOOD[:0], LABELS[:0], GOOD, LABELS, 3), DataError, "no images"),
        (lambda: knn_accuracy(GOOD, LABELS, GOOD[:0], LABELS[:0], 3), DataError, "no images"),
        (lambda: knn_accuracy(GOOD / 0, LABELS, GOOD, LABELS, 3), DataError, "not finite"),
        (lambda: knn_accuracy(GOOD, LABELS, GOOD.log(), LABELS, 3), DataError, "not finite"),
        (lambda: accuracy(GOOD, LABELS + 1), DataError, "got 1 to 3"),
        (lambda: confusion_matrix(LABELS, LABELS + 1, 3), DataError, "got 1 to 3"),
        (lambda: confusion_matrix(LABELS, LABELS[:2], 3), DataError, "3 labels, one per image"),
        (lambda: linear_probe(GOOD, LABELS, 3, QUICK), DataError, "no class has two"),
        (lambda: linear_probe(GOOD, LABELS, 2, QUICK), DataError, "0 to 1"),
        (lambda: linear_probe(GOOD / 0, LABELS * 0, 3, QUICK), DataError, "not finite"),
        (lambda: ProbeConfig(epochs=0), ConfigError, "epochs"),
        (lambda: ProbeConfig(batch_size=0), ConfigError, "batch_size"),
        (lambda: ProbeConfig(lrs=()), ConfigError, "lrs"),
        (lambda: ProbeConfig(lrs=(0.0, 1.0)), ConfigError, "lrs"),
        (lambda: ProbeConfig(lrs=(1.0, 0.1)), ConfigError, "ascending"),
        (lambda: ProbeConfig(heldout=1.0), ConfigError, "heldout"),
    ],
)
def test_invalid_inputs_are_rejected(call: Callable[[], object], error: type[MixMIMError], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


# ---- linear probe ----


def slow_logits(x: Tensor, labels: Tensor, classes: int, lr: float, config: ProbeConfig, query: Tensor) -> Tensor:
    """One learning rate with torch's layers, loss, optimiser and schedule, on standardised embeddings: query logits."""
    mean, std = x.double().mean(0).float(), x.double().std(0, correction=0).float()
    head = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    batches = math.ceil(len(x) / config.batch_size)
    optimizer = torch.optim.SGD(head.parameters(), lr=lr * config.batch_size / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * batches)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        for rows in torch.randperm(len(x), generator=generator).tensor_split(batches):
            loss = nn.functional.cross_entropy(head((x[rows] - mean) / std), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head((query - mean) / std).detach()


def percent_right(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(1) == labels).double().mean())


def test_the_bank_trains_every_head_as_torch_trains_one() -> None:
    train, labels = clouds(300, 5)
    query = clouds(40, 5, seed=1)[0]
    logits = train_heads(train, labels, 5, QUICK.lrs, QUICK).scores(query)
    assert logits.shape == (40, 3, 5)
    for head, lr in enumerate(QUICK.lrs):
        torch.testing.assert_close(
            logits[:, head], slow_logits(train, labels, 5, lr, QUICK, query), atol=2e-4, rtol=1e-3
        )


def test_two_gaussians_give_the_layer_that_fisher_derived() -> None:
    """For equal covariance S and means a and b: weight S^-1 (a - b), bias -(a + b) / 2 times that."""
    generator = torch.Generator().manual_seed(0)
    shape = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.4], [0.0, 0.0, 0.5]])
    means = torch.tensor([[3.0, -1.0, 5.0], [3.8, -0.5, 4.6]])
    labels = torch.arange(20_000) % 2
    x = means[labels] + torch.randn(20_000, 3, generator=generator) @ shape
    heads = train_heads(x, labels, 2, (0.1,), ProbeConfig(epochs=10, batch_size=500))
    weight = torch.linalg.solve(shape.T @ shape, means[1] - means[0])
    bias = -(means[0] + means[1]) @ weight / 2
    torch.testing.assert_close(heads.weight_HCD[0, 1] - heads.weight_HCD[0, 0], weight, atol=0.1, rtol=0.05)
    torch.testing.assert_close(heads.bias_HC[0, 1] - heads.bias_HC[0, 0], bias, atol=0.3, rtol=0.05)


def test_a_probe_separates_what_can_be_separated() -> None:
    train, labels = clouds(400, 6, spread=0.2)
    query, truth = clouds(200, 6, spread=0.2, seed=1)
    probe = linear_probe(train, labels, 6, QUICK)
    assert accuracy(probe.scores(query), truth).top1 == 100
    assert probe.weight_CD.shape == (6, 12)
    assert probe.bias_C.shape == (6,)


def test_the_rate_is_chosen_on_held_out_train_images_and_used_on_all() -> None:
    train, labels = clouds(300, 6)
    probe = linear_probe(train, labels, 6, QUICK)
    kept, heldout = split_by_class(labels, QUICK)
    measured = [
        percent_right(slow_logits(train[kept], labels[kept], 6, lr, QUICK, train[heldout]), labels[heldout])
        for lr in QUICK.lrs
    ]
    assert [top1 for _, top1 in probe.sweep] == pytest.approx(measured)
    assert [lr for lr, _ in probe.sweep] == list(QUICK.lrs)
    assert dict(probe.sweep)[probe.lr] == max(measured)
    torch.testing.assert_close(
        probe.scores(train), slow_logits(train, labels, 6, probe.lr, QUICK, train), atol=2e-4, rtol=1e-3
    )


def test_of_few_images_each_is_held_out_once_to_choose_the_rate() -> None:
    train, labels = clouds(50, 5)
    config = dataclasses.replace(QUICK, split_from=100, batch_size=32)
    probe = linear_probe(train, labels, 5, config)
    assert probe.chosen_by == FOLDED
    parts = stratified_parts(labels, FOLDS, config.seed)
    right = dict.fromkeys(config.lrs, 0.0)
    for part in range(FOLDS):
        kept, held = parts != part, parts == part
        for lr in config.lrs:
            logits = slow_logits(train[kept], labels[kept], 5, lr, config, train[held])
            right[lr] += percent_right(logits, labels[held]) * int(held.sum())
    assert [top1 for _, top1 in probe.sweep] == pytest.approx([total / 50 for total in right.values()])


def test_with_too_few_images_the_rate_stays_at_its_default() -> None:
    train, labels = clouds(FOLDS * 3 - 1, 3)  # four of one class
    probe = linear_probe(train, labels, 3)
    assert (probe.lr, probe.sweep, probe.chosen_by, probe.warning) == (DEFAULT_LR, (), DEFAULT, None)


@pytest.mark.parametrize("sizes", [[10] * 5, [7, 3, 3], [100, 31, 8, 2, 5], [2, 2]])
def test_parts_are_equal_within_each_class_and_in_all(sizes: list[int]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    parts = stratified_parts(labels, 2, seed=3)
    for each in (parts, *(parts[labels == name] for name in range(len(sizes)))):
        counts = each.bincount(minlength=2)
        assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(stratified_parts(labels, 2, seed=3), parts)
    assert sum(sizes) < 10 or not torch.equal(stratified_parts(labels, 2, seed=4), parts)


def test_no_k_is_reported_beyond_the_images() -> None:
    assert neighbour_counts(3) == (1,)
    assert neighbour_counts(40) == (1, 5, 10, 20)
    assert neighbour_counts(100) == (10, 20, 100)
    assert neighbour_counts(3068) == (10, 20, 100, 200)


def test_held_out_images_teach_nothing() -> None:
    train, labels = clouds(300, 6)
    kept, heldout = split_by_class(labels, QUICK)
    spoiled, wrong = train.clone(), labels.clone()
    spoiled[heldout], wrong[heldout] = 1e3, (labels[heldout] + 1) % 6
    assert torch.equal(wrong[kept], labels[kept])
    before = train_heads(train[kept], labels[kept], 6, QUICK.lrs, QUICK)
    after = train_heads(spoiled[kept], wrong[kept], 6, QUICK.lrs, QUICK)
    assert torch.equal(before.weight_HCD, after.weight_HCD)
    right = top1_of_heads(before, train[heldout], labels[heldout])
    assert top1_of_heads(before, spoiled[heldout], wrong[heldout]) != right


def test_of_every_class_a_tenth_is_held_out_one_at_least_and_never_all() -> None:
    sizes = [100, 31, 8, 2, 1, 0, 50]
    labels = torch.repeat_interleave(torch.arange(7), torch.tensor(sizes))
    kept, heldout = split_by_class(labels, ProbeConfig())
    assert sorted([*kept.tolist(), *heldout.tolist()]) == list(range(len(labels)))
    assert labels[heldout].bincount(minlength=7).tolist() == [10, 3, 1, 1, 0, 0, 5]
    again, other = split_by_class(labels, ProbeConfig()), split_by_class(labels, ProbeConfig(seed=1))
    assert torch.equal(again[1], heldout)
    assert not torch.equal(other[1], heldout)


def test_equal_seeds_give_equal_bits() -> None:
    train, labels = clouds(200, 4)
    one, two = (linear_probe(train, labels, 4, QUICK) for _ in range(2))
    assert torch.equal(one.weight_CD, two.weight_CD)
    assert torch.equal(one.bias_C, two.bias_C)
    assert (one.lr, one.sweep) == (two.lr, two.sweep)
    other = linear_probe(train, labels, 4, dataclasses.replace(QUICK, seed=1))
    assert not torch.equal(one.weight_CD, other.weight_CD)


@pytest.mark.parametrize("jitter", [False, True])
@pytest.mark.parametrize("value", [0.0, 3.7, -1e4])
def test_a_channel_that_varies_by_rounding_at_most_gets_no_weight(value: float, jitter: bool) -> None:
    train, labels = clouds(1000, 4)
    constant = torch.full((1000, 1), value)
    if jitter and value:
        constant[::2] = torch.nextafter(constant[::2], torch.tensor(math.inf))
    without = linear_probe(train, labels, 4, QUICK)
    probe = linear_probe(torch.cat([train, constant], dim=1), labels, 4, QUICK)
    assert (probe.weight_CD[:, -1] == 0).all()
    torch.testing.assert_close(probe.weight_CD[:, :-1], without.weight_CD, atol=1e-5, rtol=1e-4)


def test_a_batch_may_be_larger_than_the_train_set() -> None:
    train, labels = clouds(50, 2, spread=0.2)
    probe = linear_probe(train, labels, 2, ProbeConfig(epochs=30, batch_size=4096))
    assert accuracy(probe.scores(train), labels).top1 == 100
    one, other = (train_heads(train, labels, 2, (0.1,), ProbeConfig(batch_size=size)) for size in (50, 4096))
    assert torch.equal(one.weight_HCD, other.weight_HCD)


def test_units_of_the_channels_do_not_matter() -> None:
    train, labels = clouds(300, 4)
    query = clouds(50, 4, seed=1)[0]
    scale = torch.logspace(-4, 4, 12)
    plain = linear_probe(train, labels, 4, QUICK).scores(query)
    scaled = linear_probe(train * scale, labels, 4, QUICK).scores(query * scale)
    torch.testing.assert_close(scaled, plain, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("lr", "lrs", "words"),
    [
        (0.1, (0.1, 0.2, 0.3), "lowest one tried: add lower"),
        (0.3, (0.1, 0.2, 0.3), "highest one tried: add higher"),
        (0.2, (0.1, 0.2, 0.3), None),
        (0.1, (0.1,), None),
    ],
)
def test_a_rate_at_the_end_of_the_sweep_warns(lr: float, lrs: tuple[float, ...], words: str | None) -> None:
    warning = LinearProbe(torch.empty(0), torch.empty(0), lr, tuple((rate, 50.0) for rate in lrs)).warning
    assert warning is None if words is None else words in str(warning)


@pytest.mark.parametrize(
    ("top1", "position"), [((1, 2, 3), 2), ((3, 3, 1), 1), ((5, 5, 5, 5, 5), 2), ((1, 4, 1, 4), 1), ((7,), 0)]
)
def test_of_equally_good_rates_the_one_nearest_to_the_middle_is_chosen(top1: tuple[float, ...], position: int) -> None:
    assert choose(top1) == position


# ---- confusion ----

MATRIX = np.array([[8, 2, 0], [5, 5, 0], [0, 0, 0]])
NAMES = ("cat", "dog", "owl")


def test_the_matrix_counts_true_by_predicted() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 6, 300), rng.integers(0, 6, 300)
    expected = np.zeros((7, 7), np.int64)
    for true, guess in zip(labels, predicted, strict=True):
        expected[true, guess] += 1
    matrix = confusion_matrix(torch.from_numpy(labels), torch.from_numpy(predicted), 7)
    assert np.array_equal(matrix, expected)


def test_precision_and_recall_of_each_class() -> None:
    assert per_class(MATRIX, NAMES) == [
        ClassResult("cat", 10, recall=80.0, precision=pytest.approx(100 * 8 / 13)),
        ClassResult("dog", 10, recall=50.0, precision=pytest.approx(100 * 5 / 7)),
        ClassResult("owl", 0, recall=None, precision=None),
    ]


def test_the_most_frequent_confusions_come_first() -> None:
    assert confusions(MATRIX, NAMES) == [Confusion("dog", "cat", 5, 10), Confusion("cat", "dog", 2, 10)]
    tie = np.array([[90, 3, 0], [0, 1, 3], [0, 4, 2]])
    assert [confusion.true for confusion in confusions(tie, NAMES)] == ["owl", "dog", "cat"]  # 3 of 4 before 3 of 93
    assert len(confusions(tie, NAMES, limit=1)) == 1


def random_matrix(classes: int) -> np.ndarray:
    rng = np.random.default_rng(classes)
    return rng.multinomial(40, np.full(classes, 1 / classes), classes) + 60 * np.eye(classes, dtype=np.int64)


@pytest.mark.parametrize("classes", [2, 25, 26, 130])
def test_the_picture_is_drawn_without_pyplot_and_the_same_each_time(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now fails
    matrix, names = random_matrix(classes), [f"class {number}" for number in range(classes)]
    picture = draw_confusion(matrix, names, "A title")
    assert picture.mode == "RGB"
    assert 300 < min(picture.size) <= max(picture.size) < 2500
    if classes == 2:
        assert picture.tobytes() == draw_confusion(matrix, names, "A title").tobytes()
        assert picture.tobytes() != draw_confusion(matrix.T, names, "A title").tobytes()


def test_a_small_picture_writes_the_counts_and_recalls() -> None:
    cells, recall = confusion_figure(MATRIX, NAMES, "A title").axes
    written = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in cells.texts}
    assert written == {(0, 0): "8", (0, 1): "2", (1, 0): "5", (1, 1): "5"}
    assert np.allclose(cells.images[0].get_array(), [[0.8, 0.2, 0], [0.5, 0.5, 0], [0, 0, 0]])
    assert [text.get_text() for text in recall.texts] == ["80 % of 10", "50 % of 10", "no image"]
    assert [bar.get_width() for bar in recall.patches] == [80, 50, 0]
    assert [label.get_text() for label in cells.get_yticklabels()] == list(NAMES)
    assert [label.get_text() for label in cells.get_xticklabels()] == list(NAMES)
    assert cells.get_ylim() == recall.get_ylim()


def test_a_large_picture_thins_the_names_and_lists_the_confusions() -> None:
    matrix = 9 * np.eye(130, dtype=np.int64)
    matrix[4, 7] = 3
    figure = confusion_figure(matrix, [f"c{number}" for number in range(130)], "A title")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [f"c{n}" for n in range(0, 130, 2)]
    assert not figure.axes[0].texts
    assert [text.get_text() for text in figure.texts] == ["Most frequent confusions", "3 of 12 c4 predicted as c7", ""]


def test_names_are_no_formulas_and_stay_short() -> None:
    names = ("$x^$", "a_b", "a name that goes on and on and on until the end")
    draw_confusion(MATRIX, names, "$1^$")
    label = confusion_figure(MATRIX, names, "").axes[0].get_yticklabels()[2].get_text()
    assert (len(label), label) == (24, "a name that goes…the end")


def test_without_matplotlib_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MixMIMError, match="pip install matplotlib"):
        draw_confusion(MATRIX, NAMES, "")
