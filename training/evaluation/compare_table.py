"""Results of `compare` for a terminal: the protocol, one row per model, and what is to know about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE
from rich.table import Table

from training.evaluation.compare import DRAWS, HELD_OUT, NEAREST, RATE_BATCH, SHOTS, Comparison
from training.evaluation.knn import TEMPERATURE
from training.evaluation.labelled import Labelled
from training.evaluation.linear import DEFAULT
from training.evaluation.overlap import leak


def protocol_lines(train: Labelled, val: Labelled | None, results: Sequence[Comparison], device: str) -> Iterator[str]:
    """How the scores came about, a line each."""
    first = results[0]
    judged = f"{first.images:,} images of {val.source.name}" if val else f"{first.images:,} images, one in {HELD_OUT}"
    yield f"judged on {judged}, with {first.train_images:,} images of {len(train.classes)} classes to learn from"
    yield f"k-NN: k = {NEAREST}, cosine, temperature {TEMPERATURE:g}, augmentation none, each model's own preprocessing"
    yield "linear: one layer on frozen embeddings; held-out images of train choose its rate"
    yield f"1-shot: one image a class, nearest class mean; mean ± deviation of {DRAWS} draws, the same for every model"
    yield "mAP: training images ranked by cosine; rank: effective rank of the training embeddings (RankMe)"
    yield f"images/s: the network alone, torch in float32 on {device}, the fastest of many batches of {RATE_BATCH}"


def comparison_table(results: Sequence[Comparison]) -> Table:
    """One row per model, in the order given; the best of several in each column of scores is bold."""
    columns = ["k-NN", "linear", *(f"{shots}-shot" for shots in SHOTS), "mAP", "rank", "images/s"]
    rows = [[result.knn, result.linear, *(mean for mean, _ in result.few_shot.values()), result.retrieval,
             result.effective_rank, result.images_per_second] for result in results]  # fmt: skip
    best = [max(values) for values in zip(*rows, strict=True)]
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), caption="accuracies and mAP in percent", caption_justify="left")
    table.add_column("model", overflow="fold")
    for title in ("px", *columns):
        table.add_column(title, justify="right", no_wrap=True)
    for result, values in zip(results, rows, strict=True):
        cells = [f"{value:.1f}" for value in values]
        for place, shots in enumerate(SHOTS, start=2):
            cells[place] += f"±{result.few_shot[shots][1]:.1f}"
        cells[-2:] = f"{result.effective_rank:.0f}", f"{result.images_per_second:,.0f}"
        if len(results) > 1:
            cells = [f"[bold]{cell}[/]" if value == top else cell
                     for cell, value, top in zip(cells, values, best, strict=True)]  # fmt: skip
        table.add_row(result.name, str(result.image_size), *cells)
    return table


def comparison_notes(results: Sequence[Comparison]) -> Iterator[str]:
    """Warnings and notes, one sentence each; all models see the same images, so the first one's stand for all."""
    first = results[0]
    if first.in_both:
        yield f"warning: {leak(first.in_both)}"
    if first.unreadable:
        yield f"warning: {len(first.unreadable):,} unreadable, such as {first.unreadable[0]}"
    sizes = sorted({result.image_size for result in results})
    if len(sizes) > 1:
        listed = ", ".join(map(str, sizes))
        yield f"note: the input sizes differ ({listed} px): a larger input sees more and is slower."
    dimensions = sorted({result.embedding_size for result in results})
    if len(dimensions) > 1:
        listed = ", ".join(map(str, dimensions))
        yield f"note: the embeddings have {listed} dimensions, and an effective rank cannot exceed their number."
    for result in results:
        if result.head.chosen_by == DEFAULT:
            yield f"note: the learning rate of the linear probes is {result.head.lr:g}, the {DEFAULT}."
            break
        if result.head.warning:
            yield f"note: of the linear probe of {result.name}, {result.head.warning}"
