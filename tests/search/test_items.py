from pathlib import Path

import pytest

from csalign.core.errors import SchemaError
from csalign.search.items import ITEMS, Items, ItemWriter


def written(folder: Path, count: int, start: int = 0) -> None:
    names = [str(row) for row in range(start, start + count)]
    nothing = [None] * count
    with ItemWriter(folder) as items:
        for part in (slice(0, 2), slice(2, None)):
            items.write(
                {
                    "id": names[part],
                    "image_id": nothing[part],
                    "caption": [f"caption é {name}" for name in names[part]],
                    "source": nothing[part],
                }
            )


def test_items_are_found_by_row_in_any_order(tmp_path: Path) -> None:
    written(tmp_path, 5)
    found = Items(tmp_path, 5).take([4, 0, 2, 1])

    assert [item["id"] for item in found] == ["4", "0", "2", "1"]
    assert found[0] == {"id": "4", "image_id": None, "caption": "caption é 4", "source": None}


def test_items_of_another_file_can_go_first(tmp_path: Path) -> None:
    written(tmp_path, 3)
    more = tmp_path / "more"
    more.mkdir()
    with ItemWriter(more) as items:
        items.copy(Items(tmp_path, 3))
        items.write({"id": ["x"], "image_id": [None], "caption": [None], "source": ["x.png"]})

    assert Items(more, 4).ids() == {"0", "1", "2", "x"}
    assert Items(more, 4).take([3])[0]["source"] == "x.png"


def test_a_file_that_is_cut_short_or_of_another_length_is_refused(tmp_path: Path) -> None:
    written(tmp_path, 5)
    with pytest.raises(SchemaError, match="should hold 6 items"):
        Items(tmp_path, 6)
    path = tmp_path / ITEMS
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SchemaError, match=r"items\.arrow: is damaged"):
        Items(tmp_path, 5)
