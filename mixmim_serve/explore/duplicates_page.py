"""The HTML page of near-duplicates: the threshold, the distribution it was chosen from, and the largest groups."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence

from mixmim_serve.explore.duplicates import Group
from mixmim_serve.explore.histogram import histogram
from mixmim_serve.explore.pages import gallery, pictures
from mixmim_serve.explore.threshold import Choice, suspicion
from mixmim_serve.extract.features import FeatureFolder

GROUPS_SHOWN, IMAGES_SHOWN = 100, 24  # on a page: groups, and images of each


def duplicates_page(title: str, features: FeatureFolder, groups: Sequence[Group], choice: Choice) -> str:
    """A page of groups, the largest first; without any it shows how far from copies the images are.

    Raises:
        DataError: the source of the features is gone.
    """
    shown = [list(zip(group.keys, group.cosines, strict=True))[:IMAGES_SHOWN] for group in groups[:GROUPS_SHOWN]]
    made = iter(pictures(features, list(itertools.chain(*shown))) if shown else [])
    sections = [
        (_heading(group), list(itertools.islice(made, len(matches))))
        for group, matches in zip(groups, shown, strict=False)
    ]
    return gallery(title, sections, _introduction(groups, choice))


def _introduction(groups: Sequence[Group], choice: Choice) -> str:
    copies = sum(len(group.keys) - 1 for group in groups)
    parts = [
        f"<p>{len(groups):,} groups; {copies:,} of {choice.images:,} images duplicate an earlier one. "
        f"Threshold: a cosine of {choice.threshold:.6g} ({html.escape(choice.reason)}).</p>"
    ]
    if warning := suspicion(groups, choice):
        parts.append(f'<p class="warning" role="note">{html.escape(warning)}</p>')
    sampled = "" if len(choice.nearest) == choice.images else f" ({len(choice.nearest):,} of them, evenly spaced)"
    parts.append(
        f"<p>How near is the nearest other image of each{sampled}? Copies stand at the right, apart from the rest. "
        "Heights are square roots, so that few images are seen beside many.</p>"
    )
    parts.append(histogram(choice.nearest, choice.threshold))
    if len(groups) > GROUPS_SHOWN:
        parts.append(f"<p>The {GROUPS_SHOWN} largest groups are shown; the command lists all.</p>")
    return "\n".join(parts)


def _heading(group: Group) -> str:
    number = len(group.keys)
    return f"{number:,} images" + (f", the first {IMAGES_SHOWN} shown" if number > IMAGES_SHOWN else "")
