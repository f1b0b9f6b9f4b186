import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from csalign.core.errors import ConfigError, DataError, EncoderError, OutputError
from csalign.core.progress import Progress, silent
from csalign.core.results import FeaturesResult
from csalign.features.reader import FeatureSet
from csalign.features.sides import load_sides
from csalign.ingest.config import ExtractConfig
from csalign.ingest.extract import extract

VIT = "timm:test_vit+none"


@pytest.fixture
def items(tmp_path: Path) -> Path:
    """A table of five items, one of which has no photo and one no title, another a bad photo."""
    (tmp_path / "photos").mkdir()
    for row in range(5):
        Image.new("RGB", (16, 16), (50 * row, 80, 250 - 50 * row)).save(
            tmp_path / "photos" / f"{row}.png"
        )
    lines = [
        ("item", "photo", "title", "note", "split"),
        ("a", "photos/0.png", "a cat", "one, two", "train"),
        ("b", "photos/1.png", "", "line\nbreak", "train"),
        ("c", " ", "a dog", "a dog", "test"),
        ("d", "photos/missing.png", "a dog", "x", ""),
        ("a", "photos/4.png", "a second cat", "y", ""),
    ]
    with (tmp_path / "items.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return tmp_path / "items.csv"


def run(
    items: Path, clip: tuple[Path, Path], progress: Progress = silent, **options: Any
) -> FeaturesResult:
    spec = f"open_clip:{clip[0]}+{clip[1]}"
    sides = {"photo": VIT, "title": spec, "text": f"{spec}@note"}
    given = {"side": sides, "out": items.parent / "set", "max_failures": 0.5, "device": "cpu"}
    return extract(ExtractConfig(**{"source": str(items), **given, **options}), progress)


@pytest.mark.filterwarnings("ignore")
def test_columns_become_sides_of_one_item_per_row(
    items: Path, tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    result = run(items, tiny_clip)
    features = FeatureSet.open(tmp_path / "set")
    failure = json.loads((tmp_path / "set" / "failures.jsonl").read_text())

    assert features.sides == ("text", "photo", "title")
    assert features.table("photo").strings("item").to_pylist() == ["a", "b", "a"]
    assert features.table("photo").strings("split").to_pylist() == ["train"] * 3
    assert features.table("title").strings("item").to_pylist() == ["a", "c", "d", "a"]
    assert features.table("title").strings("caption").to_pylist()[3] == "a second cat"
    assert features.table("text").strings("split").to_pylist() == [
        *["train", "train", "test"],
        *[None, "train"],
    ]
    assert load_sides(features).count == 4
    assert (result.failures, features.manifest.counts.failures) == (1, 1)
    assert (failure["source"], failure["row"]) == (str(items), 6)
    assert "missing.png" in failure["reason"]
    assert result.pairing == f"rows of {items}"
    assert ExtractConfig.resolve(tmp_path / "set" / "config.toml", {}).side is not None
    assert not (tmp_path / "set.sides").exists()
    with pytest.raises(OutputError, match="exists"):
        run(items, tiny_clip)


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_extraction_resumes(
    items: Path, tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    items.write_text(items.read_text().replace("note,split", "note,part"))
    weights = tiny_clip[1].rename(tiny_clip[1].with_name("elsewhere.safetensors"))
    try:
        with pytest.raises(EncoderError):
            run(items, tiny_clip, split_column="part")
    finally:
        weights.rename(tiny_clip[1])
    messages: list[str] = []
    assert (tmp_path / "set.sides" / "photo" / "manifest.json").is_file()
    run(items, tiny_clip, lambda what, *_: messages.append(what), split_column="part")

    assert not any("images" in message for message in messages)
    features = FeatureSet.open(tmp_path / "set")
    assert features.sides == ("text", "photo", "title")
    assert features.table("photo").strings("split").to_pylist() == ["train"] * 3


def test_options_are_checked(items: Path, tiny_clip: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match=r"no column 'phto' .*did you mean photo"):
        run(items, tiny_clip, side={"phto": VIT, "title": VIT})
    with pytest.raises(ConfigError, match="photo alone"):
        run(items, tiny_clip, side={"photo": VIT})
    with pytest.raises(ConfigError, match="--tokens: cannot be used with --side"):
        run(items, tiny_clip, tokens="image")
