"""Every input of ``csalign import``, and every way in which it can be wrong."""

import io
import json
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
from typer.testing import CliRunner

from csalign.cli.app import app
from csalign.features.join import ALL, load_rows
from csalign.features.reader import FeatureSet
from tests.bad_input.conftest import Refused

GOOD = np.random.default_rng(1).normal(size=(40, 6)).astype(np.float32)


def changed(row: int, value: float, dtype: str = "float32") -> Any:
    values = GOOD.astype(dtype)
    values[row] = value
    return values


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def damaged_npz() -> bytes:
    content = bytearray(npz(images=GOOD))
    content[len(content) // 2] ^= 1
    return bytes(content)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def hdf5(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return buffer.getvalue()


def parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


LISTS = [row.tolist() for row in GOOD]
ARRAYS = [
    ("a.npy", None, "a.npy: no such file"),
    ("a.npy", b"", "a.npy: is empty"),
    ("a.npy", npy(GOOD)[:300], "a.npy: is not a readable NumPy file (it was cut short"),
    ("a.npy", npy(GOOD)[:20], "a.npy: is not a readable NumPy file"),
    ("a.npy", b"PK\x03\x04" * 40, "a.npy: has the content of another format than its name"),
    ("a.npy", parquet(x=LISTS), "its name; rename it a.parquet"),
    ("a.bin", npy(GOOD), "its name; rename it a.npy"),
    ("a.npy", b"version https://git-lfs.github.com/spec/v1\n", "a.npy: is a Git LFS pointer"),
    ("a.npy", npy(GOOD[0]), "a.npy: has shape (6,)"),
    ("a.npy", npy(GOOD[:0]), "a.npy: has shape (0, 6)"),
    ("a.npy", npy(GOOD[:, :0]), "a.npy: has shape (40, 0)"),
    ("a.npy", npy(GOOD.astype(int)), "a.npy: has dtype int64"),
    ("a.npy", npy(GOOD.astype(complex)), "a.npy: has dtype complex128"),
    ("a.npy", npy(GOOD.astype(str)), "a.npy: has dtype str"),
    ("a.npy", npy(GOOD.astype(object)), "a.npy: contains Python objects"),
    ("a.npy", npy(changed(7, np.nan)), "a.npy, row 7: is not finite"),
    ("a.npy", npy(changed(7, np.inf)), "a.npy, row 7: is not finite"),
    ("a.npy", npy(changed(7, 0)), "a.npy, row 7: has norm 0"),
    ("a.npy", npy(changed(7, 1e300, "float64")), "once stored as float32"),
    ("a.npy", npy(changed(7, 1e-300, "float64")), "has norm 0 once stored as float32"),
    ("a.npz", npz(), "a.npz: "),
    ("a.npz", npz(images=GOOD)[:400], "a.npz: is not a readable NumPy file"),
    ("a.npz", damaged_npz(), "a.npz: is not a readable NumPy file"),
    ("a.npz", npz(a=GOOD, b=GOOD), "a.npz: "),
    ("a.npz:x", npz(a=GOOD), "a.npz: has no array 'x'"),
    ("a.pt", b"", "a.pt: is empty"),
    ("a.pt", saved(torch.from_numpy(GOOD))[:500], "a.pt: is not a readable torch file"),
    ("a.pt", saved({"x": Path("x")}), "a.pt: contains Python objects other than tensors"),
    ("a.pt", saved([1, 2]), "a.pt: contains a list"),
    ("a.pt", saved(torch.from_numpy(changed(3, np.nan))), "a.pt, row 3: is not finite"),
    ("a.pkl", b"cos\nsystem\n(S'touch owned'\ntR.", "a.pkl: is a pickle"),
    ("a.safetensors", b"", "a.safetensors: is empty"),
    ("a.safetensors", struct.pack("<Q", 1 << 60) + b"{}", "a.safetensors: is not a readable"),
    ("a.safetensors", safetensors.numpy.save({"x": GOOD})[:-9], "a.safetensors: is not a readable"),
    ("a.safetensors", safetensors.numpy.save({"x": GOOD[:0, 0]}), "a.safetensors: "),
    ("a.h5", b"", "a.h5: is empty"),
    ("a.h5", hdf5(images=GOOD)[:700], "a.h5: is not a readable HDF5 file"),
    ("a.h5", hdf5(images=changed(2, np.inf)), "a.h5:images, row 2: is not finite"),
    ("a.parquet", b"", "a.parquet: "),
    ("a.parquet", parquet(embedding=LISTS)[:-20], "a.parquet: "),
    ("a.parquet", parquet(x=["y"] * 40), "a.parquet: "),
    ("a.parquet", parquet(embedding=[*LISTS[:5], [1.0]]), "a.parquet:embedding, row 5"),
    ("a.parquet", parquet(embedding=[*LISTS[:5], None]), "a.parquet:embedding, row 5"),
    ("a.parquet", parquet(embedding=[*LISTS[:5], [None] * 6]), "a.parquet:embedding, row 5"),
    ("a.bin", b"x", "a.bin: "),
    ("a.csv", b"1,2\n", "a.csv: "),
]


@pytest.mark.parametrize("option", ["--images", "--texts"])
@pytest.mark.parametrize(("name", "content", "message"), ARRAYS)
def test_embeddings_of_no_use_are_refused(
    tmp_path: Path, refused: Refused, option: str, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name.partition(":")[0]).write_bytes(content)

    refused(f"import {option} {name} --out out", 1, message)
    assert not (tmp_path / "owned").exists()


TABLES = [
    (None, "p.csv: no such file"),
    ("", "p.csv: has no column 'image_id'"),
    ("image_id\n", "p.csv: "),
    ("image_id,caption\n0,a\n", "p.csv: "),
    ("caption\n" + "x\n" * 40, "p.csv: "),
    ("image_id\n" + "99\n" * 40, "99"),
    ("image_id\n" + "x" * 9, "p.csv: "),
    ("image_id,text_id\n" + "0,1\n" * 40, "p.csv, row 3: text '1' is also paired"),
    ("image_id,split\n" + "".join(f"0,{'ab'[row % 2]}\n" for row in range(40)), "split"),
    ("image_id,image_id\n" + "0,0\n" * 40, "p.csv: "),
    ("image_id\n\udcff\n", "p.csv, row 2: is not UTF-8"),
    ("image_id\0\n0\n", "p.csv: "),
    ('image_id\n"0\n', "p.csv, row 2: is malformed"),
]


@pytest.mark.parametrize(("content", "message"), TABLES)
def test_pairs_of_no_use_are_refused(
    pairs: Path, refused: Refused, content: str | None, message: str
) -> None:
    if content is not None:
        (pairs / "p.csv").write_bytes(content.encode(errors="surrogateescape"))

    refused("import --images i.npy --texts t.npy --pairs p.csv --out out", 1, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id\n" + "x\n" * 40, "'x'"),
        ("id\n" + "".join(f"{row}\n" for row in range(39)), "l.csv: "),
        ("id\n" + "".join(f"{row}\n" for row in range(39)) + "\n\n", "l.csv"),
        ("source\n", "l.csv: "),
    ],
)
@pytest.mark.parametrize("option", ["--image-table", "--text-table"])
def test_tables_of_labels_of_no_use_are_refused(
    pairs: Path, refused: Refused, option: str, content: str, message: str
) -> None:
    (pairs / "l.csv").write_text(content)

    refused(f"import --images i.npy --texts t.npy {option} l.csv --out out", 1, message)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--out out", 2, "pass embeddings"),
        (
            "i.npy --images i.npy --out out",
            2,
            "i.npy and --images i.npy are mixed; pass both in order",
        ),
        (
            "i.npy t.npy t.npy --out out",
            2,
            "3 arrays are given; pass the images and the texts: csalign import i.npy t.npy --out",
        ),
        ("i.npy --out out", 2, "contains one array, which has no name"),
        ("--images i.npy", 2, "missing --out"),
        ("--images i.npy --out i.npy", 1, "i.npy: "),
        ("--images i.npy --out .", 1, "this is where i.npy is read from"),
        ("--images i.npy --texts t.npy --captions-per-image 2 --out out", 2, "go together"),
        (
            "--images i.npy --texts t.npy --text-counts c.txt --pairs pairs.csv --out out",
            2,
            "twice",
        ),
        ("--images i.npy --dtype float8 --out out", 2, "--dtype must be"),
        ("--images i.npy --config none.toml --out out", 2, "none.toml: no such config file"),
        ("--images i.npy --out out --nope", 2, "--nope"),
        ("--images nope://x --out out", 2, "nope://x"),
        ("--images i.npy --out nope://x", 2, "nope://x"),
    ],
)
def test_options_that_are_wrong_are_refused(
    pairs: Path, refused: Refused, options: str, code: int, message: str
) -> None:
    refused(f"import {options}", code, message)


@pytest.mark.parametrize("content", ["", "1\n", "x\n" * 40, "-1\n" * 40, "1.5\n" * 40, "9" * 5000])
def test_counts_of_no_use_are_refused(pairs: Path, refused: Refused, content: str) -> None:
    (pairs / "c.txt").write_text(content)

    refused("import --images i.npy --texts t.npy --text-counts c.txt --out out", 1, "c.txt")


def test_texts_of_another_number_are_refused(pairs: Path, refused: Refused) -> None:
    np.save(pairs / "t.npy", GOOD[:39])

    refused("import --images i.npy --texts t.npy --out out", 1, "39")


def test_a_folder_of_other_things_is_refused(pairs: Path, refused: Refused) -> None:
    (pairs / "none").mkdir()
    shutil.copy(pairs / "i.npy", pairs / "none" / "x.txt")

    refused("import --images none --out out", 1, "none: ")


def test_captions_and_ids_are_kept_to_the_byte_in_every_normal_form(
    pairs: Path, normal_form: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pairs)
    names = [normal_form(f"é ﬁ Å ｱ {row}") for row in range(40)]
    captions = [normal_form(f"ô ² 한 {row}") + "x" * 100_000 * (row == 3) for row in range(40)]
    pd.DataFrame({"id": names}).to_csv(pairs / "l.csv", index=False)
    pd.DataFrame({"image_id": names, "caption": captions}).to_csv(pairs / "p.csv", index=False)
    done = CliRunner().invoke(
        app,
        [
            *("import", "--images", "i.npy", "--texts", "t.npy", "--image-table", "l.csv"),
            *("--pairs", "p.csv", "--out", "out"),
        ],
    )
    assert done.exit_code == 0, done.output
    rows = load_rows(FeatureSet.open(pairs / "out"), ALL)

    assert rows.image_ids.to_pylist() == names
    assert rows.captions.to_pylist() == captions
    assert (rows.text_image == np.arange(40)).all()


def test_ids_that_differ_in_their_normal_form_alone_are_two(pairs: Path, refused: Refused) -> None:
    names = ["é", "e\u0301", *map(str, range(38))]
    (pairs / "l.csv").write_text("\n".join(["id", *names]))
    (pairs / "p.csv").write_text("image_id\n" + "\n".join([*names[:39], "e\u0300"]))

    refused(
        "import --images i.npy --texts t.npy --image-table l.csv --pairs p.csv --out out",
        1,
        "is unknown (1 texts",
    )


def test_an_npz_with_a_hostile_header_is_refused(pairs: Path, refused: Refused) -> None:
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 6), }".ljust(117) + "\n"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    (pairs / "a.npy").write_bytes(start + bytes(1000))
    with zipfile.ZipFile(pairs / "a.npz", "w") as archive:
        archive.writestr("images.npy", start + bytes(1000))

    refused("import --images a.npy --out out", 1, "a.npy")
    refused("import --images a.npz --out out", 1, "a.npz")


@pytest.mark.parametrize("header", ["{'descr': " + "'" * 3, "(" * 5000, "[}", "1" * 9000])
def test_an_npy_whose_header_is_no_python_is_refused(
    pairs: Path, refused: Refused, header: str
) -> None:
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    (pairs / "a.npy").write_bytes(start + bytes(100))

    refused("import --images a.npy --out out", 1, "a.npy: is not a readable NumPy file")


def test_names_in_files_that_are_not_utf_8_are_refused(pairs: Path, refused: Refused) -> None:
    with h5py.File(pairs / "a.h5", "w") as file:
        file.create_dataset(b"i\xedages", data=np.ones((3, 4), np.float32))
    refused("import --images a.h5 --out out", 1, "a.h5: the name b'i\\xedages' is not UTF-8")
    table = pa.table({"image_embedding": [[1.0, 2.0]], "something": ["x"]})
    pq.write_table(table, pairs / "a.parquet")
    content = (pairs / "a.parquet").read_bytes()
    (pairs / "a.parquet").write_bytes(content.replace(b"something", b"somethin\xe9"))
    refused("import --images a.parquet --out out", 1, "a.parquet: cannot be read ('utf-8' codec")


def test_labels_that_are_not_utf_8_are_refused(pairs: Path, refused: Refused) -> None:
    ids = pa.array([b"\xe8"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": ids}), pairs / "ids.parquet")
    np.save(pairs / "one.npy", np.ones((1, 4), np.float32))

    refused(
        "import --images one.npy --image-table ids.parquet --out out",
        1,
        "ids.parquet, row 0: id is not UTF-8",
    )


def test_a_config_of_another_type_is_refused(pairs: Path, refused: Refused) -> None:
    deep = b"x = " + b"[" * 9000
    for content in (b"\xff", b"[[", b"images = 3", b"images = {x = 1}", b"nope = 1", deep):
        (pairs / "c.toml").write_bytes(content)
        refused("import --config c.toml --out out", 2, "")


def test_a_file_of_64_gib_is_read_no_further_than_its_first_bad_row(
    pairs: Path, refused: Refused
) -> None:
    shape = {"descr": "<f4", "fortran_order": False, "shape": (1 << 16, 1 << 18)}
    with (pairs / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, shape)
        file.truncate(file.tell() + (1 << 36))  # a hole, which takes no disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused("import --images a.npy --out out", 1, "a.npy, row 0: has norm 0")

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


def test_a_note_beside_arrays_is_no_array(pairs: Path, refused: Refused) -> None:
    (pairs / "a.json").write_text(json.dumps([1]))

    refused("import --images a.json --out out", 1, "a.json")
