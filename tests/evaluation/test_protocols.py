import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from csalign.core.errors import DataError
from csalign.evaluation import protocols
from csalign.evaluation.compare import compare
from csalign.evaluation.config import CompareConfig, EvalConfig, Protocol
from csalign.evaluation.evaluate import evaluate
from csalign.evaluation.measure import describe, measure
from csalign.evaluation.protocols import retrieval_block
from csalign.features.join import PairedRows
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays

Array = npt.NDArray[Any]


def captioned_set(tmp_path: Path, images: int, counts: Array, width: int = 8) -> Path:
    """A set whose texts are shuffled; six captions here and there, as in COCO."""
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(images), counts)
    order = rng.permutation(len(owners))
    x = rng.normal(size=(images, width)).astype(np.float32)
    y = (x[owners] + rng.normal(size=(len(owners), width))).astype(np.float32)[order]
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(["image_id,caption", *(f"{owners[row]},c{row}" for row in order)]))
    out = tmp_path / "set"
    import_arrays(
        ImportConfig(images=tmp_path / "x.npy", texts=tmp_path / "y.npy", pairs=table, out=out)
    )
    return out


def karpathy_folds(x: Array, y: Array) -> dict[str, dict[str, float]]:
    """Mean figures over blocks of 20 images and their 100 texts, loop by loop."""
    folds: dict[str, dict[str, list[float]]] = {"image_to_text": {}, "text_to_image": {}}
    for start in range(0, len(x), 20):
        scores = x[start : start + 20] @ y[5 * start : 5 * start + 100].T
        descending = np.argsort(-scores, axis=1)
        place = np.empty_like(descending)
        np.put_along_axis(place, descending, np.arange(100)[None, :], axis=1)
        own = np.arange(20)[:, None] * 5 + np.arange(5)
        forth = np.take_along_axis(place, own, axis=1).min(axis=1)
        descending = np.argsort(-scores.T, axis=1)
        back = np.argmax(descending == np.repeat(np.arange(20), 5)[:, None], axis=1)
        for name, ranks in (("image_to_text", forth), ("text_to_image", back)):
            for k in (1, 5, 10):
                folds[name].setdefault(f"R@{k}", []).append(float((ranks < k).mean()))
            folds[name].setdefault("median_rank", []).append(float(np.median(ranks)) + 1)
            folds[name].setdefault("mean_rank", []).append(float(ranks.mean()) + 1)
    return {
        name: {figure: float(np.mean(values)) for figure, values in figures.items()}
        for name, figures in folds.items()
    }


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protocols on a fiftieth of their images."""
    for name, rule in protocols.RULES.items():
        monkeypatch.setitem(protocols.RULES, name, rule._replace(images=rule.images // 50))


@pytest.mark.usefixtures("small")
def test_coco_1k_is_the_mean_of_five_blocks_and_coco_5k_takes_all_captions(tmp_path: Path) -> None:
    counts = np.where(np.arange(100) % 10 == 7, 6, 5)
    folder = captioned_set(tmp_path, 100, counts)
    measured = measure(EvalConfig(features=folder, protocol="coco-1k", resamples=100))
    block = retrieval_block(measured.fold_ranks)
    document = describe(measured)
    assert measured.aligned.texts.shape == (500, 8)
    assert document["protocol"] == {
        "name": "coco-1k",
        "folds": 5,
        "images": 100,
        "texts": 500,
        "split": "all",
        "dtype": {"stored": "float32", "scores": "float32"},
        "ties": "a tied wrong item ranks ahead",
    }
    # The first five captions of each image in stored order, found again by loops.
    stored = np.load(tmp_path / "y.npy")
    owner_of = [
        int(line.split(",")[0]) for line in (tmp_path / "pairs.csv").read_text().split()[1:]
    ]
    kept: list[list[int]] = [[] for _ in range(100)]
    for row, owner in enumerate(owner_of):
        if len(kept[owner]) < 5:
            kept[owner].append(row)
    texts = stored[np.concatenate(kept)]
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    np.testing.assert_allclose(measured.aligned.texts, texts, rtol=1e-6)

    for name, figures in karpathy_folds(measured.aligned.images, texts).items():
        assert {key: block[name][key] for key in figures} == pytest.approx(figures)
    intervals = document["intervals"]
    low, high = intervals["text_to_image"]["true_recall@10"]
    assert low < block["text_to_image"]["true_recall@10"] < high
    assert "median_rank" not in intervals["text_to_image"]

    rest = measure(EvalConfig(features=folder, protocol="coco-5k"))
    assert (len(rest.aligned.texts), len(rest.folds)) == (510, 1)
    assert (np.diff(rest.aligned.rows.text_image) >= 0).all()
    everything = measure(EvalConfig(features=folder))
    ours, theirs = retrieval_block(rest.fold_ranks), retrieval_block(everything.fold_ranks)
    assert ours["mean_recall"] == pytest.approx(theirs["mean_recall"])


@pytest.mark.usefixtures("small")
def test_a_protocol_of_another_size_is_refused_and_so_is_pairing_across_protocols(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = EvalConfig(features=captioned_set(tmp_path, 20, np.full(20, 2)), protocol="flickr-1k")
    paths = tmp_path / "named.json", tmp_path / "plain.json"
    for path, protocol in zip(paths, ("flickr-1k", "all"), strict=True):
        own = config.model_copy(update={"protocol": protocol, "intervals": False})
        path.write_text(json.dumps(evaluate(own)))
    compare(CompareConfig(systems=(paths[1], *paths)))

    assert caplog.text.count("(protocol flickr-1k, the baseline all)") == 1
    message = r"contains 20 images .* protocol coco-1k needs 100 .*--split"
    with pytest.raises(DataError, match=message):
        measure(config.model_copy(update={"protocol": "coco-1k"}))


@pytest.mark.parametrize(
    ("name", "images", "captions", "taken"),
    [("coco-5k", 5_000, 6, 6), ("coco-1k", 5_000, 6, 5), ("flickr-1k", 1_000, 5, 5)],
)
def test_protocols_are_of_the_papers_sizes(
    name: Protocol, images: int, captions: int, taken: int
) -> None:
    rows = paired(images, np.tile(np.arange(images), captions))
    found = protocols.select(name, rows)

    assert found.text_image.tolist() == np.repeat(np.arange(images), taken).tolist()
    assert found.text_ids[1].as_py() == f"t{images}"
    assert found.texts[1, 0] == images
    whole = protocols.Gallery(found.images, found.texts, found.text_image)
    folds = protocols.split_folds(name, whole)
    assert [len(fold.images) for fold in folds] == ([1_000] * 5 if name == "coco-1k" else [images])
    for fold in folds:
        assert fold.text_image.tolist() == np.repeat(np.arange(len(fold.images)), taken).tolist()


@pytest.mark.parametrize("flaw", ["one caption less", "a text without an image"])
def test_captions_that_do_not_fit_a_protocol_are_refused(flaw: str) -> None:
    owners = np.repeat(np.arange(5_000), 5)
    owners = owners[1:] if flaw == "one caption less" else np.append(owners, -1)
    counted = "with at least 4 captions each|with at least 5 captions.* 1 text without"

    with pytest.raises(DataError, match=counted):
        protocols.select("coco-1k", paired(5_000, owners))


def paired(images: int, owners: Array) -> PairedRows:
    """Rows of width 1, each text being its number."""
    texts = np.arange(len(owners), dtype=np.float32)[:, None]
    names = pa.array([f"t{row}" for row in range(len(owners))])
    ids = pa.array([str(row) for row in range(images)])
    blank = np.ones((images, 1), np.float32)
    return PairedRows(
        name="set",
        images=blank,
        texts=texts,
        image_ids=ids,
        text_ids=names,
        captions=names,
        text_image=owners.astype(np.int64),
    )
