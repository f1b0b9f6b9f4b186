"""Vectors written in blocks are what pyarrow writes and every reader reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csalign.core.enums import Modality
from csalign.features import schema
from csalign.features.parquet import VectorWriter

OPTIONS: dict[str, Any] = {
    "compression": {"id": "zstd"},
    "use_dictionary": ["split"],
    "write_statistics": ["id"],
    "write_page_checksum": True,
}


def table(rows: int, width: int, dtype: str) -> pa.Table:
    values = np.random.default_rng(rows + width).normal(size=(rows, width)).astype(dtype)
    form = schema.table_schema(Modality.TEXT, dtype, width)
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(values.reshape(-1)), type=form.field("embedding").type
    )
    ids = pa.array([f"é{row}" for row in range(rows)])
    none = pa.nulls(rows, pa.string())
    return pa.table([ids, ids, none, pa.array(["train"] * rows), vectors], schema=form)


def write(path: Path, rows: pa.Table, group: int) -> None:
    with VectorWriter(path, rows.schema, "embedding", OPTIONS) as file:
        for start in range(0, len(rows), group):
            file.write_group(rows[start : start + group])
        file.close()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 300),
    width=st.sampled_from([1, 2, 3, 64, 1000, 3000]),
    group=st.integers(1, 300),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_a_file_is_read_as_what_was_written(
    tmp_path: Path, rows: int, width: int, group: int, dtype: str
) -> None:
    given = table(rows, width, dtype)
    write(tmp_path / "x.parquet", given, group)
    with pq.ParquetFile(tmp_path / "x.parquet", page_checksum_verification=True) as file:
        assert file.read().equals(given)
        assert file.metadata.num_row_groups == -(-rows // group)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_schema_is_that_of_pyarrow(tmp_path: Path, dtype: str) -> None:
    given = table(1_000, 5, dtype)
    write(tmp_path / "x.parquet", given, 300)
    with pq.ParquetWriter(tmp_path / "y.parquet", given.schema, **OPTIONS) as file:
        file.write_table(given, row_group_size=300)
    own, other = (pq.ParquetFile(tmp_path / f"{name}.parquet") for name in "xy")

    assert own.schema == other.schema
    assert own.schema_arrow.equals(other.schema_arrow, check_metadata=True)
    assert own.metadata.row_group(1).column(0).statistics == (
        other.metadata.row_group(1).column(0).statistics
    )


def test_other_readers_agree(tmp_path: Path) -> None:
    given = table(700, 20, "float32")
    write(tmp_path / "x.parquet", given, 256)
    values = np.stack(given["embedding"].to_numpy())

    np.testing.assert_array_equal(
        np.array(pl.read_parquet(tmp_path / "x.parquet")["embedding"].to_list(), np.float32), values
    )
    np.testing.assert_array_equal(
        np.stack(pd.read_parquet(tmp_path / "x.parquet")["embedding"]), values
    )


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write(path, table(100, 50, "float32"), 100)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    with (
        pq.ParquetFile(path, page_checksum_verification=True) as file,
        pytest.raises(OSError, match="CRC checksum"),
    ):
        file.read(["embedding"])
