"""Wherever a side is named, its word does as well as the enum's member, and no other word does."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import csalign
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError
from csalign.encoders.base import Encoders
from csalign.features.join import join_ids, load_rows, load_side
from csalign.features.reader import FeatureSet
from csalign.features.schema import EncoderInfo
from csalign.features.writer import FeatureWriter, Rows
from csalign.runs.load import embed_rows, stream_aligned

Take = Callable[[str], Any]


@pytest.fixture(scope="module")
def takes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Take]:
    """Functions of a side by name; what they return differs by side."""
    folder = tmp_path_factory.mktemp("sides")
    images, texts = np.random.default_rng(0).normal(size=(2, 40, 6)).astype(np.float32)
    csalign.import_arrays(images, texts, out=folder / "set")
    adapter = csalign.fit(images, texts, steps=0, out=folder / "run")
    features = FeatureSet.open(folder / "set")
    rows, joined = load_rows(features, "all"), join_ids(features, "all")
    manifest = features.manifest

    def write(side: str) -> Any:
        info = {own: EncoderInfo(spec="x", width=6) for own in Modality}
        path = folder / f"written-{side}-{np.random.default_rng().integers(2**62)}"
        path.mkdir()
        with FeatureWriter(path, info, "float32") as writer:
            writer.write(side, Rows({"id": ["a"]}, images[:1]))
        return FeatureSet.open(path).manifest.counts

    found: dict[str, Take] = {
        "Adapter.side": adapter.side,
        "Adapter.embed": lambda side: adapter.embed(side, images).tolist(),
        "SentenceAdapter": lambda side: csalign.SentenceAdapter(folder / "run", side)._modality,
        "FeatureSet.table": features.table,
        "Manifest.encoders": manifest.encoders.side,  # type: ignore[dict-item]
        "Manifest.shards": lambda side: manifest.shards.side(side)[0].path,  # type: ignore[arg-type]
        "Encoders.side": Encoders("x", "y").side,  # type: ignore[arg-type,dict-item]
        "PairedRows.embeddings": lambda side: rows.embeddings(side).tolist(),  # type: ignore[arg-type]
        "PairedRows.table_rows": lambda side: rows.table_rows(side).tolist(),  # type: ignore[arg-type]
        "Joined.side": joined.side,  # type: ignore[dict-item]
        "load_side": lambda side: len(load_side(features, "all", side).images),  # type: ignore[arg-type]
        "FeatureWriter.write": write,
        "embed_rows": lambda side: embed_rows(adapter, side, rows, None).tolist(),  # type: ignore[arg-type]
        "stream_aligned": lambda side: [
            part.embeddings.tolist()
            for part in stream_aligned(features, side, adapter, None, 16)  # type: ignore[arg-type]
        ],
        "index": lambda side: csalign.index(
            folder / "set", folder / "index", side=side, overwrite=True
        )["side"],
        "search": lambda side: csalign.search(
            folder / "set", side=side, embedding=images[:1], query_side="image", top=1
        )["queries"],
        "search, query_side": lambda side: csalign.search(
            folder / "set", adapter=adapter, query_side=side, embedding=images[:1], top=1
        )["queries"],
    }
    return found


NAMES = (
    *("Adapter.side", "Adapter.embed", "SentenceAdapter", "FeatureSet.table"),
    *("Manifest.encoders", "Manifest.shards", "Encoders.side", "PairedRows.embeddings"),
    *("PairedRows.table_rows", "Joined.side", "load_side", "FeatureWriter.write", "embed_rows"),
    *("stream_aligned", "index", "search", "search, query_side"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_side_may_be_named_by_its_word(name: str, takes: dict[str, Take]) -> None:
    take = takes[name]
    for side in Modality:
        assert take(side.value) == take(side.plural) == take(side)
    with pytest.raises(ConfigError, match=r"'?image'? or '?text'?"):
        take("img")


def test_plain_words_are_modalities() -> None:
    assert [Modality.of(name) for name in ("image", "texts")] == [*Modality]
    for name in ("img", "", "Image", "imagess"):
        with pytest.raises(ConfigError, match="is not a side; use 'image' or 'text'"):
            Modality.of(name)


def test_the_two_sides_differ(takes: dict[str, Take]) -> None:
    for name in ("Adapter.embed", "PairedRows.embeddings", "FeatureSet.table", "stream_aligned"):
        assert takes[name]("image") != takes[name]("text")
