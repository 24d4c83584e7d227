"""The model card: README.md of a published bundle, for readers and for the Hub's search."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

from mixmim_serve.anomaly.calibration import abouts
from mixmim_serve.bundle import Bundle
from mixmim_serve.config import size_name
from mixmim_serve.heads import Heads, accuracy_in_words, read_heads

CARD = "README.md"
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")  # in the Hub's spelling: apache-2.0, cc-by-4.0

_TEXT = """{front}

# {title}

A MixMIM backbone ([arXiv 2205.13137](https://arxiv.org/abs/2205.13137)), as a bundle of mixmim-serve: ONNX graphs
that run without torch, over one file of weights.

| | |
|---|---|
{table}

## Use

    mixmim pull {repo} {folder}
    mixmim embed {folder} photo.jpg{classify}
    mixmim serve {folder}

`mixmim pull` compares every file with the checksums in `config.json`.
{heads}
## Provenance

{provenance}
"""


def model_card(bundle: Bundle, repo: str) -> str:
    """The model card of a bundle published as `repo`."""
    size, heads = size_name(bundle.arch), read_heads(bundle)
    return _TEXT.format(
        front=_front_matter(bundle),
        title=f"MixMIM {size}",
        table="\n".join(f"| {name} | {_cell(value)} |" for name, value in _facts(bundle, heads).items()),
        repo=shlex.quote(repo),
        folder=shlex.quote(f"bundles/{repo.rstrip('/').rpartition('/')[2]}"),
        classify=_classify(heads, f"bundles/{repo.rstrip('/').rpartition('/')[2]}"),
        heads=_heads(heads),
        provenance=_indented(json.dumps(dict(bundle.description.provenance), indent=2, ensure_ascii=False)),
    )


def _front_matter(bundle: Bundle) -> str:
    """The metadata that the Hub reads; JSON strings are valid YAML."""
    lines = ["library_name: mixmim-serve", "pipeline_tag: image-feature-extraction"]
    lines += ["tags:", *(f"- {tag}" for tag in ("mixmim", "onnx", "image-feature-extraction", "masked-image-modeling"))]
    license_ = bundle.description.provenance.get("license")
    if isinstance(license_, str) and license_:
        is_id = _LICENSE_ID.fullmatch(license_) is not None
        lines += [f"license: {license_}"] if is_id else ["license: other", f"license_name: {json.dumps(license_)}"]
    return "\n".join(["---", *lines, "---"])


def _classify(heads: Heads, folder: str) -> str:
    """The line that classifies, with the name of a head where there are several."""
    if not heads.by_name:
        return ""
    named = f" --head {heads.default}" if len(heads.by_name) > 1 else ""
    return f"\n    mixmim classify {shlex.quote(folder)} photo.jpg{named}"


def _heads(heads: Heads) -> str:
    """The section on named heads: classes and measured accuracies; empty without any."""
    if all(head.is_main for head in heads.by_name.values()):
        return ""
    rows = [
        f"| {head.name}{' (default)' if head.name == heads.default else ''} | {len(head.classes)} "
        f"| {_cell(_some(head.classes))} | {_cell(accuracy_in_words(head))} |"
        for head in heads.by_name.values()
    ]
    lines = ["", "## Heads", "", "| head | classes | | measured |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    return ", ".join((*names[:20], "...") if len(names) > 20 else names)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _facts(bundle: Bundle, heads: Heads) -> dict[str, str]:
    arch, labels = bundle.arch, bundle.description.labels
    facts = {
        "network": f"{size_name(arch)}, {arch.image_size} x {arch.image_size} pixels",
        "embedding": f"{arch.embedding_size} numbers",
        "reconstructs": "yes" if "reconstruct" in bundle.graphs else "no",
        "classes": f"{len(heads.choose().classes)}" if heads.by_name else "none: no head",
        "precisions": ", ".join(bundle.precisions),
        "name": bundle.name,
        "model fingerprint": f"`{bundle.fingerprint}`",
    }
    if calibrations := abouts(bundle):
        known = (f"{about.engine} on {about.photos:,} normal photos" for about in calibrations)
        facts["calibrated for alarms"] = "; ".join(known)
    if labels:
        facts["labels"] = _some(labels)
    if bundle.built:
        engines = (f"{e.file} for {e.runtime} {e.version} on {e.hardware}" for e in bundle.built)
        facts["engines"] = "; ".join(engines)
    return facts


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
