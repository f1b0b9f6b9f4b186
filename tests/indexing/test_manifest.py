from pathlib import Path

import pyarrow as pa
import pytest

from csalign.core.errors import SchemaError
from csalign.indexing.manifest import ITEMS, items_table, read_items, take_item, write_items


def columns(count: int) -> dict[str, pa.Array]:
    names = [str(row) for row in range(count)]
    kind = pa.large_string()
    return {
        "id": pa.array(names, kind),
        "image_id": pa.nulls(count, kind),
        "caption": pa.array([f"caption é {name}" for name in names], kind),
        "source": pa.nulls(count, kind),
    }


def test_items_are_found_by_row_in_any_order(tmp_path: Path) -> None:
    write_items(tmp_path, items_table(columns(70_000)))
    items = read_items(tmp_path, 70_000)
    found = [take_item(items, row) for row in (69_999, 0, 2, 1)]

    assert [item["id"] for item in found] == ["69999", "0", "2", "1"]
    assert found[1] == {"id": "0", "image_id": None, "caption": "caption é 0", "source": None}


def test_a_file_that_is_truncated_or_of_another_length_is_refused(tmp_path: Path) -> None:
    write_items(tmp_path, items_table(columns(5)))
    with pytest.raises(SchemaError, match=r"has 5 items, index\.json says 6"):
        read_items(tmp_path, 6)
    path = tmp_path / ITEMS
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SchemaError, match=r"items\.arrow: is damaged"):
        read_items(tmp_path, 5)
