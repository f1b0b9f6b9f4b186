from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from csalign.core.errors import ConfigError, DataError, SchemaError
from csalign.indexing.vectors import VectorIndex, choose_factory, exact_neighbours

Floats = npt.NDArray[np.float32]
ROWS, WIDTH = 1_300, 18
FACTORIES = ("Flat", "IVF16,Flat", "HNSW32", "IVF16,SQ8", "PCA12,IVF4,PQ6x4,RFlat")


def cloud(rows: int, seed: int = 0) -> Floats:
    """Unit rows around 20 centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(20, WIDTH))
    found = centres[rng.integers(0, 20, rows)] + 0.6 * rng.normal(size=(rows, WIDTH))
    unit: Floats = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
    return unit


def built(factory: str, rows: Floats) -> VectorIndex:
    index = VectorIndex.create(factory, WIDTH)
    if sampled := index.training_rows(len(rows)):
        index.train(rows[:sampled])
    for part in np.array_split(rows, 3):
        index.add(part)
    return index


def nearest_of(queries: Floats, rows: Floats, parts: int = 4) -> Any:
    return exact_neighbours(queries, iter(np.array_split(rows, parts)), 10)


def test_auto_is_flat_for_few_rows_and_ivf_for_many() -> None:
    assert choose_factory(50_000) == "Flat"
    assert choose_factory(50_001) == "IVF894,Flat"
    assert choose_factory(1_000_000) == "IVF4000,Flat"


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_mapped_index_answers_as_the_one_in_memory(factory: str, tmp_path: Path) -> None:
    rows, queries = cloud(ROWS), cloud(30, seed=2)
    index = built(factory, rows)
    index.save(tmp_path / "vectors")
    mapped = VectorIndex.open(tmp_path / "vectors", factory)
    for each in (index, mapped):
        each.set_effort(4)

    assert (len(mapped), mapped.width) == (ROWS, WIDTH)
    for found, expected in zip(mapped.search(queries, 7), index.search(queries, 7), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_effort_rises_until_the_recall_is_reached(factory: str) -> None:
    rows, queries = cloud(ROWS), cloud(50, seed=2)
    index = built(factory, rows)
    nearest = nearest_of(queries, rows)
    scores, found = nearest

    np.testing.assert_array_equal(found, np.argsort(-(queries @ rows.T), axis=1)[:, :10])
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ rows.T, found, 1), atol=1e-6)
    index.set_effort(1)
    least = index.recall(queries, *nearest)
    most = index.tune(queries, *nearest, target=1.0)
    assert index.is_exact == (factory == "Flat")
    assert least <= most
    assert most >= {"Flat": 1.0, "IVF16,Flat": 1.0, "HNSW32": 0.97, "IVF16,SQ8": 0.95}.get(
        factory, 0.3
    )
    assert index.effort == ({} if index.is_exact else index.effort)
    assert max(index.effort.values(), default=0) <= index.max_effort


def test_more_than_there_are_is_all_there_are() -> None:
    scores, found = built("Flat", cloud(5)).search(cloud(2), 50)

    assert scores.shape == found.shape == (2, 5)


def test_equal_rows_do_not_count_against_an_index() -> None:
    rows, queries = np.repeat(cloud(10), 30, axis=0), cloud(8, seed=2)
    scores, found = nearest_of(queries, rows, 7)
    shifted = found // 30 * 30 + (found + 15) % 30  # of equals any may be the nearest

    assert built("IVF1,Flat", rows).recall(queries, scores, shifted) == 1.0


def test_an_index_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="factory: FAISS cannot build 'LSH' for width 18"):
        VectorIndex.create("LSH", WIDTH)
    with pytest.raises(DataError, match="9 rows are too few to train IVF64,Flat"):
        built("IVF64,Flat", cloud(9))


def test_codes_need_less_memory_than_vectors() -> None:
    needed = {
        name: VectorIndex.create(name, 256).build_bytes(1_000_000)
        for name in ("Flat", "IVF4000,SQ8", "HNSW32")
    }

    assert 1.0e9 < needed["Flat"] < needed["HNSW32"] < 3e9
    assert needed["IVF4000,SQ8"] < 1.0e9


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_file_is_one_line(damage: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "vectors.faiss"
    built("IVF16,Flat", cloud(ROWS)).save(path)
    path.write_bytes(path.read_bytes()[:-500] if damage is None else damage)

    with pytest.raises(SchemaError, match=r"vectors\.faiss: cannot be read"):
        VectorIndex.open(path, "IVF16,Flat")
