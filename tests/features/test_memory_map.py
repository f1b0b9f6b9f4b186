from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csalign.core.errors import OutputError
from csalign.features import memory_map
from csalign.features.memory_map import MappedRows, ReadAhead, Room

FLOAT16 = np.dtype(np.float16)


def filled(folder: Path, rows: int, width: int = 3) -> tuple[MappedRows, Any]:
    values = np.random.default_rng(rows).normal(size=(rows, width)).astype(np.float16)
    stored = MappedRows(values.shape, FLOAT16, folder)
    stored[0:rows] = values
    return stored, values


@given(st.data())
def test_rows_come_back_as_from_an_array(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 40))
    stored, values = filled(tmp_path_factory.getbasetemp(), count)
    rows = np.array(data.draw(st.lists(st.integers(-count, count - 1), max_size=50)), np.int64)
    start, stop = (data.draw(st.integers(0, count + 3)) for _ in range(2))

    np.testing.assert_array_equal(stored[rows], values[rows])
    np.testing.assert_array_equal(stored[start:stop], values[start:stop])
    order = np.array(data.draw(st.permutations(range(count))))
    stored[order] = values
    values[order] = values.copy()
    np.testing.assert_array_equal(stored[0:count], values)
    assert (stored.shape, len(stored), stored.dtype) == (values.shape, count, FLOAT16)


def test_the_file_has_no_name(tmp_path: Path) -> None:
    filled(tmp_path, 5)

    assert not list(tmp_path.iterdir())


def test_what_is_resident_is_let_go_before_it_is_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_map, "_HELD_BYTES", 10 * memory_map._FAULT_BYTES)
    stored, values = filled(tmp_path, 1_000)
    rng = np.random.default_rng(0)
    held = []
    for _ in range(50):
        rows = rng.integers(0, 1_000, 4)
        np.testing.assert_array_equal(stored[rows], values[rows])
        held.append(stored._held)

    assert 0 < max(held) <= 10 * memory_map._FAULT_BYTES
    assert 0 in held


def test_rows_that_fit_nowhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"MiB free, and embeddings .* take \d+; .* TMPDIR"):
        Room(1_000, tmp_path).rows((1 << 40, 1 << 10), FLOAT16)


def test_memory_is_given_until_it_is_used_up(tmp_path: Path) -> None:
    room = Room(1_000, tmp_path)
    kinds = [type(room.rows((rows, 4), FLOAT16)) for rows in (100, 26, 25)]

    assert kinds == [np.ndarray, MappedRows, np.ndarray]
    assert room.left == 0


class Told(MappedRows):
    touched: list[list[int]]

    def touch(self, rows: Any) -> None:
        self.touched.append(rows.tolist())
        super().touch(rows)


def test_one_window_is_read_ahead_and_each_once(tmp_path: Path) -> None:
    rows = Told((10, 3), FLOAT16, tmp_path)
    rows.touched = []
    order = np.random.default_rng(0).permutation(10)
    ahead = ReadAhead(4)
    windows = [order[:4].tolist(), order[4:8].tolist(), order[8:].tolist(), []]
    for _ in range(2):
        rows.touched.clear()
        ahead.begin([(rows, order)])
        for position, least in ((1, 1), (3, 1), (6, 2), (9, 3)):
            ahead.reach(position)
            assert least <= len(rows.touched) <= least + 1
        ahead._thread.submit(int).result()  # after what it was told before
        assert rows.touched == windows
