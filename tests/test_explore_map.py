"""The page of a map: its pictures, columns and colours, and in a browser what the mouse does."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extracting import features as extract
from extracting import small
from PIL import Image
from typer.testing import CliRunner

from mixmim_serve.cli import app
from mixmim_serve.engines import Engine
from mixmim_serve.errors import ConfigError, DataError
from mixmim_serve.explore.colours import STEPS
from mixmim_serve.explore.columns import Column, chosen, known_columns, read_csv, unique_names
from mixmim_serve.explore.map import layout
from mixmim_serve.explore.map_page import ON_MAP, map_page, map_pictures
from mixmim_serve.extract.features import FeatureFolder
from mixmim_serve.extract.options import ExtractOptions
from mixmim_serve.sources import open_source

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The elements of a page: name, attributes, and the text directly inside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        if self.elements:
            self.elements[-1][2].append(data)

    def one(self, name: str) -> tuple[dict[str, str], str]:
        """Attributes and text of the element with this id."""
        ((_, attributes, text),) = (each for each in self.elements if each[1].get("id") == name)
        return attributes, "".join(text)

    def json(self, name: str) -> Any:
        return json.loads(self.one(name)[1])

    def image(self, name: str) -> Image.Image:
        return from_base64(self.one(name)[0]["src"].partition("base64,")[2])

    def addresses(self) -> list[str]:
        """Everything that a browser would fetch."""
        return [
            value for _, attributes, _ in self.elements for name, value in attributes.items()
            if name in ("src", "href", "srcset", "data", "poster", "action") and not value.startswith("data:")
        ]  # fmt: skip


def from_base64(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


@pytest.fixture(scope="module")
def source(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 photos in folders of two levels, one with a name that HTML would take amiss."""
    root = tmp_path_factory.mktemp("map") / "photos"
    for number, path in enumerate(sorted(photos.iterdir())):
        name = "<b>&amp;{{data}}.jpg" if number == 3 else path.name
        target = root / ("mono" if number % 2 else "poly") / ("good" if number % 3 else "defect") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return root


@pytest.fixture(scope="module")
def features(engine: Engine, source: Path) -> FeatureFolder:
    extract(small(engine, source, source.parent / "out", images=7), engine)
    return FeatureFolder(source.parent / "out")


@pytest.fixture(scope="module")
def keys(features: FeatureFolder) -> list[str]:
    return features.keys(range(len(features)))


@pytest.fixture(scope="module")
def page(features: FeatureFolder, keys: list[str]) -> str:
    columns = [Column("kind", tuple(key.split("/")[1] for key in keys)), Column("nr", tuple(map(str, range(24))))]
    return map_page("all <of> {{photos}}", layout(features), map_pictures(features, keys), columns, "kind")


def mixmim(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_every_picture_is_there_once_small_and_large(page: str, features: FeatureFolder, keys: list[str]) -> None:
    parsed = Page(page)
    data, photos, atlas = parsed.json("data"), parsed.json("photos"), parsed.image("atlas")
    assert data["keys"] == keys
    assert len(photos) == len(data["x"]) == len(data["y"]) == len(keys)
    assert min(data["x"]) == min(data["y"]) == 0
    assert max(data["x"]) == max(data["y"]) == 1
    pictures = map_pictures(features, keys)
    for number, key in enumerate(keys):
        large = from_base64(photos[number])
        assert large.size == (96, 80)  # not enlarged beyond the file
        left, top = number % data["across"] * ON_MAP, number // data["across"] * ON_MAP
        tile = atlas.crop((left, top, left + ON_MAP, top + ON_MAP))
        assert np.abs(np.asarray(tile, int) - np.asarray(pictures[key].square)).mean() < 8
        other = from_base64(photos[number - 1])
        assert (
            np.abs(np.asarray(tile.resize((8, 8)), int) - np.asarray(large.crop((8, 0, 88, 80)).resize((8, 8)))).mean()
            < np.abs(
                np.asarray(tile.resize((8, 8)), int) - np.asarray(other.crop((8, 0, 88, 80)).resize((8, 8)))
            ).mean()
        )


def test_a_page_fetches_nothing_and_takes_no_name_for_html(page: str) -> None:
    parsed = Page(page)
    assert parsed.addresses() == []
    assert not re.search(r"\b(https?:|fetch\(|XMLHttpRequest|import\()", page)
    assert not re.search(r"url\(", page)
    assert [tag for tag, _, _ in parsed.elements].count("b") == 0
    titles = ["".join(text).strip() for tag, _, text in parsed.elements if tag in ("title", "h1")]
    assert titles == ["all <of> {{photos}}"] * 2
    assert any(key.endswith("<b>&amp;{{data}}.jpg") for key in parsed.json("data")["keys"])


def test_the_page_offers_its_columns(page: str, keys: list[str]) -> None:
    data = Page(page).json("data")
    assert data["first"] == "kind"
    kind, numbers = data["columns"]
    assert [kind["entries"][place]["label"] for place in kind["of"]] == [key.split("/")[1] for key in keys]
    assert [entry["count"] for entry in kind["entries"]] == [8, 16]
    assert len(numbers["entries"]) == len(STEPS)
    assert numbers["values"] == list(map(str, range(24)))


def test_columns_are_labels_folders_and_what_the_features_hold(
    features: FeatureFolder, source: Path, keys: list[str]
) -> None:
    found = known_columns(features, open_source(source), range(len(keys)), keys)
    values = {column.name: column.values for column in found}
    assert values["label"] == tuple(key.split("/")[0] for key in keys)  # the same as the first folder
    assert "folder" not in values
    assert values["folder 2"] == tuple(key.split("/")[1] for key in keys)
    assert values["probability"] == tuple(f"{value:.6g}" for value in features.columns(range(24))["probability"])
    assert "width" not in values  # all alike


@pytest.mark.parametrize("kind", ["npy", "lance"])
def test_every_format_holds_the_columns(engine: Engine, source: Path, features: FeatureFolder, tmp_path: Path,
                                        kind: str) -> None:  # fmt: skip
    if kind == "lance":
        pytest.importorskip("lance")
    extract(small(engine, source, tmp_path / "out", images=10, options=ExtractOptions(format=kind)), engine)
    rows = [23, 0, 12]
    found, expected = FeatureFolder(tmp_path / "out").columns(rows), features.columns(rows)
    assert found.keys() == expected.keys() == {"class", "probability", "width", "height"}
    assert found["class"] == expected["class"]
    assert found["probability"] == pytest.approx(expected["probability"], rel=1e-4)


def test_a_csv_file_gives_columns(tmp_path: Path) -> None:
    keys = ["mono/a.jpg", "mono/b.jpg", "poly/a.jpg"]
    (tmp_path / "named.csv").write_text("cell,file,score\nx,mono/a.jpg,0.5\ny,/data/elpv/poly/a.jpg,1\nz,none.jpg,2\n")
    columns, found = read_csv(tmp_path / "named.csv", keys)
    assert columns == [Column("cell", ("x", "", "y")), Column("score", ("0.5", "", "1"))]
    assert found == 2
    (tmp_path / "plain.csv").write_text('.\\mono\\a.jpg,"good, really",1\nb.jpg,bad\na.jpg,both\n\n')
    columns, found = read_csv(tmp_path / "plain.csv", keys)  # a.jpg could be two of them
    assert columns == [Column("label", ("good, really", "bad", "")), Column("label 2", ("1", "", ""))]
    assert found == 2
    (tmp_path / "tabs.tsv").write_text("path\tlabel\nmono/b.jpg\tc\n")
    assert read_csv(tmp_path / "tabs.tsv", keys) == ([Column("label", ("", "c", ""))], 1)
    both = unique_names([Column("label", ("1",)), Column("label", ("2",))])
    assert [(column.name, column.values) for column in both] == [("label", ("1",)), ("label 2", ("2",))]


@pytest.mark.parametrize("content", [b"", b"path,label\nother.jpg,x\n", b"mono/a.jpg\n", b"\xff\xfe\x00"])
def test_a_csv_file_without_labels_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"labels\.csv (has a label for none of the 1 images|is not a CSV file)"):
        read_csv(tmp_path / "labels.csv", ["mono/a.jpg"])


def test_an_unknown_column_is_refused() -> None:
    columns = [Column("cell", ("b",)), Column("label", ("a",))]
    assert chosen(columns, "") == "label"
    assert chosen(columns[:1], "") == "cell"
    assert chosen(columns, "cell") == "cell"
    assert chosen([], "") == ""
    with pytest.raises(ConfigError, match="no column 'sell' to colour by: choose one of cell, label"):
        chosen(columns, "sell")


def test_the_command(features: FeatureFolder, keys: list[str], tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("".join(f"{key},{'odd' if n % 2 else 'even'}\n" for n, key in enumerate(keys)))
    out, target = features.folder.place, tmp_path / "map.html"
    result = mixmim("map", out, "--html", target, "--images", 9, "--labels", tmp_path / "labels.csv")
    assert result.exit_code == 0, result.output
    parsed = Page(target.read_text())
    (heading,) = ("".join(text).strip() for tag, _, text in parsed.elements if tag == "h1")
    assert heading == f"9 of 24 images in {out} ({features.model})"
    data = parsed.json("data")
    assert data["keys"] == [keys[row] for row in np.linspace(0, 23, 9).round().astype(int)]
    assert data["first"] == "label"
    assert [column["name"] for column in data["columns"]][:3] == ["label", "label 2", "folder 2"]
    mixmim("map", out, "--html", target, "--colour", "folder 2")
    assert Page(target.read_text()).json("data")["first"] == "folder 2"
    (tmp_path / "few.csv").write_text(f"{keys[0]},x\n")
    result = mixmim("map", out, "--html", target, "--labels", tmp_path / "few.csv")
    assert "few.csv names 1 of the 24 images; the others have no value" in result.output
    refused = mixmim("map", out, "--html", tmp_path / "none.html", "--colour", "sell").exception
    assert isinstance(refused, ConfigError)
    assert not (tmp_path / "none.html").exists()


# In a browser

STEPS_IN_BROWSER = """<script>
const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));
const wheel = () => { const event = new WheelEvent("wheel", { deltaY: -300, clientX: width / 2,
  clientY: canvas.getBoundingClientRect().top + height / 2, bubbles: true, cancelable: true });
  canvas.dispatchEvent(event); return event.defaultPrevented; };
const press = (px, py) => { const box = canvas.getBoundingClientRect();
  for (const type of ["pointerdown", "pointerup"]) canvas.dispatchEvent(new PointerEvent(type,
    { pointerId: 1, clientX: box.left + px, clientY: box.top + py, bubbles: true })); };
const looks = () => { draw(); const bytes = pen.getImageData(0, 0, canvas.width, canvas.height).data;
  let sum = 0; for (let i = 0; i < bytes.length; i += 3) sum = (sum * 31 + bytes[i]) % 1000003; return sum; };
onload = async () => {
  const found = {}, page = document.documentElement;
  await wait(200);
  found.fits = page.scrollWidth <= innerWidth && page.scrollHeight <= innerHeight;
  found.inside = data.keys.every((_, i) => left(i) > 0 && left(i) < width && top_(i) > 0 && top_(i) < height);
  found.hint = byId("hint").textContent;
  found.captured_before = wheel(); await wait(50);
  found.zoom_before = zoom;
  press(2, height - 2);  // no picture there
  found.open_beside = dialog.open;
  found.hint_focused = byId("hint").textContent;
  found.captured_after = wheel(); await wait(50);
  found.zoom_after = zoom;
  byId("fit").click(); await wait(50);
  found.zoom_fit = zoom;
  press(left(5), top_(5));
  const key = at(left(5), top_(5));
  found.open = dialog.open;
  found.caption = byId("caption").textContent.split("\\n")[0] === data.keys[key];
  await byId("large").decode();
  found.large = [byId("large").naturalWidth, byId("large").naturalHeight];
  dialog.close(); await wait(50);
  found.focus_back = document.activeElement === canvas;
  canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
  found.captured_escaped = wheel();
  const before = looks();
  byId("column").value = "nr"; byId("column").dispatchEvent(new Event("change")); await wait(50);
  found.legend = [...document.querySelectorAll("#legend button")].length;
  found.redrawn = looks() !== before;
  const coloured = looks();
  document.querySelector("#legend button").click(); await wait(50);
  found.isolated = looks() !== coloured && [...data.keys.keys()].filter(shown).length;
  const result = document.createElement("pre");
  result.id = "result"; result.textContent = JSON.stringify(found); document.body.append(result);
};
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("window", ["600,900", "1280,900", "1600,500"])
def test_in_a_browser(page: str, tmp_path: Path, window: str) -> None:
    (tmp_path / "map.html").write_text(page.replace("</body>", STEPS_IN_BROWSER))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={window}", "--dump-dom",
        (tmp_path / "map.html").as_uri(),
    ]  # fmt: skip
    dumped = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found = Page(dumped).json("result")
    hints = found.pop("hint"), found.pop("hint_focused")
    assert "Click the map to zoom with the wheel" in hints[0]
    assert "The wheel zooms" in hints[1]
    assert found.pop("zoom_after") > 1.5
    assert found == {
        "fits": True, "inside": True, "captured_before": False, "zoom_before": 1, "open_beside": False,
        "captured_after": True, "zoom_fit": 1, "open": True, "caption": True, "large": [96, 80], "focus_back": True,
        "captured_escaped": False, "legend": len(STEPS), "redrawn": True, "isolated": 5,
    }  # fmt: skip
