from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from csalign.core.errors import SchemaError
from csalign.search.plan import KINDS, IndexKind, plan_index
from csalign.search.vectors import VECTORS, Nearest, VectorIndex, recall

Floats = npt.NDArray[np.float32]
ROWS, WIDTH = 1_300, 18  # a width that no code divides


def cloud(rows: int, seed: int = 0) -> Floats:
    """Unit rows around 20 centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(20, WIDTH))
    found = centres[rng.integers(0, 20, rows)] + 0.6 * rng.normal(size=(rows, WIDTH))
    unit: Floats = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
    return unit


def built(kind: IndexKind, folder: Path, rows: Floats) -> VectorIndex:
    plan = plan_index(kind, len(rows), WIDTH, 1 << 40)
    index = VectorIndex.empty(plan, folder)
    if plan.training_rows:
        index.train(rows[: plan.training_rows])
    for part in np.array_split(rows, 3):
        index.add(part)
    return index


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapped_index_answers_as_the_one_in_memory(kind: IndexKind, tmp_path: Path) -> None:
    rows, queries = cloud(ROWS), cloud(30, seed=2)
    index = built(kind, tmp_path, rows)
    index.save(tmp_path)
    mapped = VectorIndex.open(tmp_path, kind, index.effort)

    assert (len(mapped), mapped.width) == (ROWS, WIDTH)
    for found, expected in zip(mapped.search(queries, 7), index.search(queries, 7), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_most_effort_finds_nearly_all_and_scores_are_cosines(
    kind: IndexKind, tmp_path: Path
) -> None:
    rows, queries = cloud(ROWS), cloud(50, seed=2)
    index = built(kind, tmp_path, rows)
    nearest = Nearest(queries, 10)
    for part in np.array_split(rows, 4):
        nearest.see(part)
    truth = np.argsort(-(queries @ rows.T), axis=1)[:, :10]
    index.effort = index.ladder()[-1]
    scores, found = index.search(queries, 10)

    np.testing.assert_array_equal(nearest.rows, truth)
    assert recall(index, nearest, slice(None)) >= (1.0 if kind in ("exact", "ivf") else 0.97)
    cosines = np.take_along_axis(queries @ rows.T, found, axis=1)
    np.testing.assert_allclose(scores, cosines, atol=1e-3 if kind == "pq" else 1e-6)
    assert (np.diff(scores, axis=1) <= 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_back_in_order_and_more_can_be_added(kind: IndexKind, tmp_path: Path) -> None:
    rows, more = cloud(ROWS), cloud(40, seed=3)
    index = built(kind, tmp_path, rows)
    index.save(tmp_path)
    opened = VectorIndex.open(tmp_path, kind, index.effort, mapped=False)
    again = tmp_path / "again"
    again.mkdir()
    opened.make_room(again, len(more))
    opened.add(more)
    opened.effort = opened.ladder()[-1]

    stored = np.concatenate(list(opened.rows()))
    np.testing.assert_allclose(stored, np.concatenate([rows, more]), atol=5e-4)
    _, found = opened.search(more, 1)
    assert (found[:, 0] == np.arange(ROWS, ROWS + 40)).mean() >= 0.95


def test_more_than_there_are_is_all_there_are(tmp_path: Path) -> None:
    scores, found = built("exact", tmp_path, cloud(5)).search(cloud(2), 50)

    assert scores.shape == found.shape == (2, 5)


def test_equal_rows_do_not_count_against_an_index(tmp_path: Path) -> None:
    rows = np.repeat(cloud(10), 30, axis=0)
    index = built("exact", tmp_path, rows)
    nearest = Nearest(cloud(8, seed=2), 10)
    for part in np.array_split(rows, 7):
        nearest.see(part)
    nearest.rows = nearest.rows[:, ::-1] + 0  # of equals any may be the nearest
    assert recall(index, nearest, slice(None)) == 1.0


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_file_is_one_line(damage: bytes | None, tmp_path: Path) -> None:
    index = built("ivf", tmp_path, cloud(ROWS))
    index.save(tmp_path)
    path = tmp_path / VECTORS
    path.write_bytes(path.read_bytes()[:-500] if damage is None else damage)

    with pytest.raises(SchemaError, match=r"vectors\.faiss: cannot be read"):
        VectorIndex.open(tmp_path, "ivf", index.effort)
