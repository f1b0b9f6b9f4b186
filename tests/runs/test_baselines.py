import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csalign.adapters.checkpoint import read_info
from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError
from csalign.features.join import ALL, Pairs, load_rows
from csalign.features.reader import FeatureSet
from csalign.indexing.build import index
from csalign.indexing.config import IndexConfig, SearchConfig
from csalign.indexing.search import find
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.runs.apply import apply
from csalign.runs.baselines import choose_split, fit_baseline
from csalign.runs.config import ApplyConfig, ExportConfig, LoadOptions
from csalign.runs.export import export
from csalign.runs.load import load_adapter_for
from csalign.training.config import TrainConfig
from csalign.training.train import train

RNG = np.random.default_rng(0)
SETS = Callable[..., Path]


def unit(rows: Any) -> Any:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def shifted(n: int = 200, width: int = 12) -> tuple[Any, Any]:
    """Unit rows of both sides that differ by one offset alone."""
    own = 0.6 * unit(RNG.normal(size=(n, width)))
    ends = np.full((n, 1), 0.8, np.float32)
    return np.hstack([own, ends]), np.hstack([own, -ends])


def scaled(n: int = 200, width: int = 12) -> tuple[Any, Any]:
    """Unit rows of both sides that differ by a scale per dimension and an offset."""
    signs = RNG.choice([-1.0, 1.0], size=(n, width))
    sides = []
    for end in (0.5, -0.7):
        sizes = RNG.uniform(0.2, 1, size=width)
        sizes *= (1 - end**2) ** 0.5 / np.linalg.norm(sizes)
        sides.append(np.hstack([signs * sizes, np.full((n, 1), end)]).astype(np.float32))
    return sides[0], sides[1]


def paired(images: Any, texts: Any) -> Pairs:
    return Pairs(name="rows", images=images, texts=texts, text_image=np.arange(len(texts)))


def outputs(name: str, rows: Pairs) -> tuple[Any, Any]:
    adapter, _ = fit_baseline(name, rows)
    return adapter.embed_images(rows.images), adapter.embed_texts(rows.texts)


def recall(x: Any, y: Any) -> float:
    return float(((x @ y.T).argmax(1) == np.arange(len(x))).mean())


@pytest.fixture
def make_set(tmp_path: Path) -> SETS:
    """A function that stores two arrays of pairs, in splits by their names if given."""

    def make(images: Any, texts: Any, splits: list[str] | None = None) -> Path:
        np.save(tmp_path / "x.npy", images)
        np.save(tmp_path / "y.npy", texts)
        lines = ["image_id,caption,split"] if splits else ["image_id,caption"]
        for row in range(len(images)):
            lines.append(f"{row},caption {row}" + (f",{splits[row]}" if splits else ""))
        (tmp_path / "pairs.csv").write_text("\n".join(lines))
        out = tmp_path / "set"
        files = {"images": tmp_path / "x.npy", "texts": tmp_path / "y.npy"}
        import_arrays(ImportConfig(**files, pairs=tmp_path / "pairs.csv", out=out, dtype="float32"))
        return out

    return make


def test_mean_shift_removes_an_offset_exactly() -> None:
    images, texts = shifted()
    x, y = outputs("mean-shift", paired(images, texts))
    own = images - images.mean(0)

    assert np.allclose(x, y, atol=1e-5)
    assert np.allclose(x, unit(own), atol=1e-5)
    assert recall(x, y) == 1


def test_standardising_removes_a_scale_of_each_dimension_and_an_offset() -> None:
    rows = paired(*scaled())
    x, y = outputs("standardised", rows)
    u, v = outputs("mean-shift", rows)

    assert np.allclose(x, y, atol=1e-5)
    assert np.abs(u - v).max() > 0.1
    assert np.abs(x[:, -1]).max() < 1e-5  # does not vary


def test_the_closed_form_undoes_a_rotation() -> None:
    images = unit(RNG.normal(size=(400, 16)))
    turned = images @ np.linalg.qr(RNG.normal(size=(16, 16)))[0].astype(np.float32)
    rows = paired(images, turned)

    assert recall(*outputs("closed-form", rows)) == 1
    assert recall(*outputs("mean-shift", rows)) < 0.1


def test_the_closed_form_learns_between_different_widths() -> None:
    latent = RNG.normal(size=(500, 6))
    sides = [latent @ RNG.normal(size=(6, w)) + RNG.normal(size=(500, w)) for w in (20, 30)]
    x, y = outputs("closed-form", paired(*map(unit, sides)))

    assert x.shape == y.shape == (500, 20)
    assert recall(x, y) > 0.1  # 0.002 is chance


def test_features_without_negative_values_are_taken_by_their_square_roots() -> None:
    images = np.abs(RNG.normal(size=(100, 6))).astype(np.float32)
    rows = paired(images, unit(RNG.normal(size=(100, 6))))
    closed, shift = (fit_baseline(n, rows)[0].shapes for n in ("closed-form", "mean-shift"))

    assert [closed[side].signed_sqrt for side in Modality] == [True, False]
    assert not shift[Modality.IMAGE].signed_sqrt


def test_few_pairs_choose_nothing() -> None:
    rows = paired(*shifted(n=49))

    assert fit_baseline("closed-form", rows)[1] == "CCA (ridge 1, power 1)"


def test_what_cannot_be_fitted_names_the_remedy() -> None:
    images, texts = shifted()
    with pytest.raises(ShapeError, match=r"13 wide and texts 5, but mean-shift .* closed-form"):
        fit_baseline("mean-shift", paired(images, texts[:, :5]))
    unpaired = Pairs(name="rows", images=images, texts=texts, text_image=np.full(200, -1))
    with pytest.raises(DataError, match="rows: has no pairs"):
        fit_baseline("closed-form", unpaired)

    assert fit_baseline("mean-shift", unpaired)[1] == "mean-shift"


def test_a_baseline_is_fitted_on_rows_that_are_not_measured(make_set: SETS) -> None:
    splits = ["a"] * 100 + ["b"] * 50 + ["test"] * 50
    features = FeatureSet.open(make_set(*shifted(), splits))

    assert choose_split("closed-form", features, "test") == "a,b"
    assert choose_split("closed-form", features, "test", trained="b") == "b"
    assert choose_split("mean-shift", features, None) == ALL
    assert choose_split("mean-shift", features, ALL) == ALL
    with pytest.raises(DataError, match=r"no pairs but those that are measured .* csalign split"):
        choose_split("closed-form", features, ALL)


def test_its_name_is_an_adapter_of_apply_and_index(
    make_set: SETS, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    features = make_set(*shifted(), ["train"] * 150 + ["test"] * 50)
    out = tmp_path / "aligned"
    apply(ApplyConfig(features=features, adapter="mean-shift", out=out, dtype="float32"))
    rows = load_rows(FeatureSet.open(out), ALL)
    train_rows = load_rows(FeatureSet.open(features), "train").images

    assert np.allclose(rows.images, rows.texts, atol=1e-5)
    assert np.allclose(rows.images[:150], unit(train_rows - train_rows.mean(0)), atol=1e-5)
    assert f"mean-shift: fitted on {features} (split train)" in caplog.text
    assert FeatureSet.open(out).images.encoder.spec.endswith(" | mean-shift")

    index(IndexConfig(features=features, adapter="mean-shift", out=tmp_path / "index"))
    queries = tmp_path / "y.npy"
    found = find(SearchConfig(index=tmp_path / "index", embedding=queries, top=1))

    assert read_info(tmp_path / "index" / "adapter").start == "mean-shift"
    assert [query["hits"][0]["id"] for query in found.queries] == [str(n) for n in range(200)]


def test_a_folder_of_that_name_comes_first(
    make_set: SETS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    features = make_set(*shifted())
    config = TrainConfig(features=features, out=Path("mean-shift"), steps=0, adapter="linear")
    train(config)
    _, info = load_adapter_for(FeatureSet.open(features), Path("mean-shift"), LoadOptions())

    assert info == read_info(tmp_path / "mean-shift")


def test_commands_that_need_a_run_name_the_remedy(tmp_path: Path) -> None:
    config = ExportConfig(run="mean-shift", to="safetensors", out=tmp_path / "out")
    with pytest.raises(DataError, match="csalign train FEATURES --adapter mean-shift --out RUN"):
        export(config)
