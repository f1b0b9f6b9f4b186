import io
import json
import tarfile
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csalign.core.errors import CsalignError
from csalign.sources.records.open import open_source


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("a.jpg", b"x"), ("a.txt", b"y"), ("b.json", b'{"caption": "z"}')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def parquet_bytes() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [b"x"] * 9, "caption": ["y"] * 9}), buffer)
    return buffer.getvalue()


WHOLE = {
    "t.csv": b'image,caption,split\na.png,"x, ""y""",train\nb.png,z,\n',
    "t.tsv": b"id\tbase64\tcaption\n1\taGVsbG8=\tx\n",
    "t.jsonl": b'{"image": "a.png", "caption": ["x", "y"]}\n{"caption": "z"}\n',
    "t.json": json.dumps(
        {
            "images": [{"id": 1, "file_name": "a.png", "sentences": [{"raw": "x"}]}],
            "annotations": [{"image_id": 1, "caption": "x"}],
        }
    ).encode(),
    "t.tar": tar_bytes(),
    "t.parquet": parquet_bytes(),
    "t.txt": "caption\nnaïve\n".encode(),
}


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=60)
@given(
    start=st.integers(0, 3000),
    stop=st.integers(0, 3000),
    middle=st.binary(max_size=20) | st.sampled_from([b'"', b"\n", b"\xff", b"{", b"null"]),
)
def test_damage_is_a_flaw_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, name: str, start: int, stop: int, middle: bytes
) -> None:
    content = WHOLE[name]
    start, stop = start % len(content), stop % len(content)
    path: Path = tmp_path_factory.mktemp("x") / name
    (path.parent / "a.png").write_bytes(b"")
    path.write_bytes(content[:start] + middle + content[max(start, stop) :])

    with suppress(CsalignError):
        source = open_source(path)
        with source.open(0) as volume:
            for record in volume.records(0, len(volume)):
                assert (record.error is None) == bool(record.image or record.texts)
                if record.image:
                    with suppress(CsalignError):
                        record.image.read()
