"""The parts of a labelled data set: folders for training and validation beside each other."""

from __future__ import annotations

from pathlib import Path

VAL = ("val", "validation", "test")  # names of the part to judge by, best first


def train_and_val(data: str, val: str = "") -> tuple[str, str]:
    """DATA/train and DATA/val where these folders exist and `val` is not given, else both unchanged."""
    folder = Path(data)
    if val or not (folder / "train").is_dir():
        return data, val
    part = next((name for name in VAL if (folder / name).is_dir()), "")
    return str(folder / "train"), str(folder / part) if part else ""
