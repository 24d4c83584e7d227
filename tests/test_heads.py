"""Named heads in a bundle: what is stored is read, damage is noticed, and nothing else of the bundle changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from heading import COLOURS, SHAPES, random_head, with_named_heads
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from serving import CLASS_NAMES, HAT, take_out

from mixmim_serve.bundle import Bundle, canonical_json, open_bundle
from mixmim_serve.engines import Engine
from mixmim_serve.engines.certificate import certify
from mixmim_serve.errors import BundleError, ConfigError
from mixmim_serve.heads import (
    METADATA_KEY,
    Head,
    accuracy_in_words,
    change_heads,
    heads_file,
    read_heads,
    write_heads,
)
from mixmim_serve.preprocess import preprocess


def test_a_head_inside_the_network_is_main(exported_bundle: Path) -> None:
    bundle = open_bundle(exported_bundle)
    heads = read_heads(bundle)
    assert (heads.names, heads.default) == (("main",), "main")
    assert heads.choose() is heads.choose("main")
    assert heads.choose().classes == tuple(CLASS_NAMES)
    assert (heads.choose().inputs, heads.choose().identity) == (("logits",), {})
    assert heads_file(bundle) == ""
    everything = hashlib.sha256(canonical_json(dict(bundle.checksums))).hexdigest()
    assert bundle.content == everything  # so that certificates of bundles without named heads stay valid


def test_classes_without_names_are_numbers(bundle_copy: Path) -> None:
    bundle = open_bundle(bundle_copy)
    unnamed = dataclasses.replace(bundle, description=dataclasses.replace(bundle.description, labels=()))
    assert read_heads(unnamed).choose().classes == ("0", "1", "2")


def test_a_probe_that_became_the_networks_head_says_how_good_it_is(bundle_copy: Path) -> None:
    bundle = open_bundle(bundle_copy)
    probe = {"made_by": "linear probe", "lr": 0.03, "top1": 47.3, "judged_on": "372 validation images"}
    description = dataclasses.replace(bundle.description, provenance={"head": probe})
    head = read_heads(dataclasses.replace(bundle, description=description)).choose()
    assert accuracy_in_words(head) == "top-1 47.3 % (372 validation images)"
    assert head.describe()["provenance"] == probe
    assert accuracy_in_words(read_heads(bundle).choose()) == "not measured"


def test_a_bundle_without_a_head_says_so(bundle_copy: Path) -> None:
    heads = read_heads(open_bundle(take_out(bundle_copy, "head")))
    assert (heads.names, heads.default) == ((), "")
    with pytest.raises(BundleError, match="no classification head: fit one to labelled images with `mixmim head`"):
        heads.choose()


def test_named_heads_are_read_as_they_were_written(bundle_copy: Path) -> None:
    before = open_bundle(bundle_copy)
    bundle = with_named_heads(bundle_copy, default="shapes")
    again = open_bundle(bundle_copy)
    again.verify()
    assert again == bundle
    heads = read_heads(again)
    assert (heads.names, heads.default) == (("main", "colours", "shapes"), "shapes")
    for name, classes, inputs in (("colours", COLOURS, ("embedding",)), ("shapes", SHAPES, ("embedding", "stage3"))):
        head, made = heads.choose(name), random_head(before, name, classes, 1 + (name == "shapes"), inputs)
        assert (head.classes, head.inputs, head.identity) == (classes, inputs, {"head": name})
        assert np.array_equal(head.weight, made.weight)
        assert np.array_equal(head.bias, made.bias)
        assert head.fingerprint == made.fingerprint
        assert accuracy_in_words(head) == "top-1 61.2 %, calibration error 2.5 % (80 validation photos)"
    with pytest.raises(
        ConfigError, match=r"unknown head 'shape': choose one of main, colours, shapes\. Did you mean shapes\?"
    ):
        heads.choose("shape")


def test_heads_change_neither_fingerprint_nor_certificate(bundle_copy: Path, engine: Engine) -> None:
    before = open_bundle(bundle_copy)
    after = with_named_heads(bundle_copy)
    assert (after.fingerprint, after.content) == (before.fingerprint, before.content)
    assert after.checksums != before.checksums
    certificate = certify(engine)
    with_heads = dataclasses.replace(after, path=engine.bundle.path)  # whose certificate is there

    class Unable:
        """The same engine, which must not be measured again."""

        bundle, name, precision = with_heads, engine.name, engine.precision
        version, hardware, max_batch = engine.version, engine.hardware, engine.max_batch

    assert certify(Unable()) == certificate


def test_one_file_holds_the_heads_whatever_was_there_before(bundle_copy: Path) -> None:
    first = with_named_heads(bundle_copy)
    heads = read_heads(first).plus(random_head(first, "colours", ("a", "b"), 9))
    second = write_heads(first, heads)
    assert [path.name for path in bundle_copy.glob("heads-*")] == [heads_file(second)] != [heads_file(first)]
    assert read_heads(second).choose("colours").classes == ("a", "b")
    same = write_heads(second, read_heads(second))
    assert heads_file(same) == heads_file(second)
    same.verify()
    none = write_heads(same, read_heads(same).minus("colours").minus("shapes"))
    none.verify()
    assert not [*bundle_copy.glob("heads-*")]
    assert none.checksums.keys() == open_bundle(bundle_copy).checksums.keys()
    assert read_heads(none).names == ("main",)


def test_a_bundle_keeps_its_old_heads_if_writing_breaks_off(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = with_named_heads(bundle_copy)
    changed = read_heads(bundle).plus(random_head(bundle, "colours", ("a", "b"), 9))

    def break_off(self: Bundle) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Bundle, "save_config", break_off)
        with pytest.raises(OSError, match="no space"):
            write_heads(bundle, changed)
    opened = open_bundle(bundle_copy)
    opened.verify()
    assert read_heads(opened).choose("colours").classes == COLOURS


def test_a_copy_takes_the_heads_along(bundle_copy: Path, tmp_path: Path) -> None:
    bundle = with_named_heads(bundle_copy, default="colours")
    (tmp_path / "copy").mkdir()
    copied = bundle.copy(tmp_path / "copy")
    assert (read_heads(copied).names, read_heads(copied).default) == (("main", "colours", "shapes"), "colours")


def test_a_change_may_go_into_a_copy(bundle_copy: Path, tmp_path: Path) -> None:
    bundle = with_named_heads(bundle_copy)
    out = tmp_path / "out"
    changed = change_heads(bundle, lambda heads: heads.minus("shapes"), out)
    assert (changed.path, read_heads(changed).names) == (out, ("main", "colours"))
    open_bundle(out).verify()
    assert read_heads(open_bundle(bundle_copy)).names == ("main", "colours", "shapes")
    with pytest.raises(BundleError, match="is already a bundle"):
        change_heads(bundle, lambda heads: heads.minus("shapes"), out)


def test_a_change_starts_from_what_the_bundle_has_now(bundle_copy: Path) -> None:
    """While one command fits a head for minutes, another may add one."""
    opened = open_bundle(bundle_copy)
    change_heads(opened, lambda heads: heads.plus(random_head(opened, "first", COLOURS)))
    change_heads(opened, lambda heads: heads.plus(random_head(opened, "second", SHAPES)))
    assert read_heads(open_bundle(bundle_copy)).names == ("main", "first", "second")


def test_the_default(bundle_copy: Path) -> None:
    bundle = open_bundle(take_out(bundle_copy, "head"))
    first = read_heads(bundle).plus(random_head(bundle, "first", COLOURS))
    assert first.default == "first"
    second = first.plus(random_head(bundle, "second", SHAPES))
    assert second.default == "first"
    assert second.plus(random_head(bundle, "third", SHAPES), default=True).default == "third"
    assert second.with_default("second").default == "second"
    assert second.with_default("second").minus("second").default == "first"
    assert second.minus("first").minus("second").default == ""
    for change in (second.with_default, second.minus):
        with pytest.raises(ConfigError, match="unknown head 'none': choose one of first, second"):
            change("none")


def test_main_stays(exported_bundle: Path) -> None:
    heads = read_heads(open_bundle(exported_bundle))
    with pytest.raises(ConfigError, match="main is part of the network and cannot be removed"):
        heads.minus("main")


def test_logits_are_a_product_of_what_the_head_reads(engine: Engine) -> None:
    pixels = preprocess(HAT, engine.bundle.description.preprocessing)[None]
    outputs = {
        name: array[0]
        for name, array in engine.run("encoder", {"pixels": pixels}, ["embedding", "stage3", "logits"]).items()
    }
    head = random_head(engine.bundle, "shapes", SHAPES, 3, ("stage3", "embedding"))
    means = [float(np.mean(plane.astype(np.float64))) for plane in outputs["stage3"]]
    read = np.array([*means, *outputs["embedding"]])
    expected = [sum(row * read) + bias for row, bias in zip(head.weight, head.bias, strict=True)]
    np.testing.assert_allclose(head.logits(outputs), expected, rtol=1e-4, atol=1e-4)
    main = read_heads(engine.bundle).choose()
    assert np.array_equal(main.logits(outputs), outputs["logits"])


@pytest.mark.parametrize("name", ["", "main", "Two Words", "ä", "-a", "a" * 41, "../a", "A"])
def test_a_name_that_a_head_cannot_have(engine: Engine, name: str) -> None:
    from mixmim_serve.heads import check_head_name

    with pytest.raises(ConfigError, match="cannot name a head"):
        check_head_name(name)
    assert check_head_name("caltech-101_b") == "caltech-101_b"


def test_the_fingerprint_of_a_head_changes_with_all_that_answers_depend_on(engine: Engine) -> None:
    head = random_head(engine.bundle, "shapes", SHAPES)
    assert head.weight is not None
    variants: list[Head] = [
        head,
        dataclasses.replace(head, classes=SHAPES[::-1]),
        dataclasses.replace(head, weight=head.weight + 1),
        dataclasses.replace(head, bias=head.weight[:, 0]),
        dataclasses.replace(head, inputs=("stage4",)),
    ]
    assert len({each.fingerprint for each in variants}) == len(variants)
    assert dataclasses.replace(head, name="other", about={}).fingerprint == head.fingerprint


Alter = Callable[[dict[str, Any], dict[str, Any]], object]
DAMAGE: dict[str, tuple[Alter, str]] = {
    "another model": (lambda about, _: about.update(model_fingerprint="0" * 32), "heads of another model: fit them"),
    "newer": (lambda about, _: about.update(format=2), "has format 2, this version reads 1: update mixmim-serve"),
    "no heads": (lambda about, _: about.update(heads=[]), "is damaged"),
    "no such default": (lambda about, _: about.update(default="none"), "is damaged .no head 'none'."),
    "a path as name": (lambda about, _: about["heads"][0].update(name="../x"), "is damaged .*cannot name a head"),
    "twice": (lambda about, _: about["heads"].append(about["heads"][0]), "is damaged .two heads of one name"),
    "numbers as classes": (lambda about, _: about["heads"][0].update(classes=[1, 2, 3, 4]), "colours are not names"),
    "too few classes": (lambda about, _: about["heads"][0].update(classes=["a"]), "the weights of colours are"),
    "unknown input": (lambda about, _: about["heads"][0].update(inputs=["stage9"]), "colours reads stage9"),
    "other input": (lambda about, _: about["heads"][0].update(inputs=["stage1"]), "the weights of colours are"),
    "no weight": (lambda _, tensors: tensors.pop("colours.weight"), "is damaged"),
    "float64": (
        lambda _, t: t.update({"colours.bias": t["colours.bias"].astype(np.float64)}),
        "the weights of colours",
    ),
    "inf": (lambda _, t: t["colours.weight"].fill(np.inf), "the weights of colours are not finite"),
    "no list": (lambda about, _: about.update(heads={"a": 1}), "is damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_file_of_heads_that_cannot_be_right_is_refused(bundle_copy: Path, case: str) -> None:
    alter, sentence = DAMAGE[case]
    path = bundle_copy / heads_file(with_named_heads(bundle_copy))
    with safe_open(path, framework="np") as file:
        about = json.loads(file.metadata()[METADATA_KEY])
    tensors = load_file(path)
    alter(about, tensors)
    save_file(tensors, path, {METADATA_KEY: json.dumps(about)})
    with pytest.raises(BundleError, match=sentence):
        read_heads(open_bundle(bundle_copy))


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\xff" * 64])
def test_what_is_no_file_of_heads_is_refused(bundle_copy: Path, content: bytes) -> None:
    bundle = with_named_heads(bundle_copy)
    (bundle_copy / heads_file(bundle)).write_bytes(content)
    with pytest.raises(BundleError, match=r"is damaged"):
        read_heads(bundle)
    with pytest.raises(BundleError, match="was altered after the export"):
        bundle.verify()
    (bundle_copy / heads_file(bundle)).unlink()
    with pytest.raises(BundleError, match=r"lacks heads-\w+\.safetensors"):
        bundle.verify()
