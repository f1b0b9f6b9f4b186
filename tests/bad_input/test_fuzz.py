"""Parsers under fire: whatever the bytes, a result or one clear line, soon and in little memory.

CSALIGN_FUZZ=5000 makes so many examples of each, rather than a few.
"""

import io
import json
import os
import resource
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from csalign import inspect
from csalign.adapters.checkpoint import load_adapter
from csalign.core.enums import Modality
from csalign.core.errors import CsalignError
from csalign.core.records import read_job
from csalign.evaluation.compare import compare
from csalign.evaluation.config import CompareConfig, EvalConfig
from csalign.evaluation.evaluate import evaluate
from csalign.features.join import ALL, load_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ExtractConfig, ImportConfig
from csalign.ingest.job import Job, PartRecord
from csalign.runs.metadata import read_lines, read_settings
from csalign.sources.arrays.opening import read_both, read_side
from csalign.sources.arrays.tables import read_label_table
from csalign.sources.records.open import open_source
from csalign.training.config import TrainConfig

EXAMPLES = int(os.environ.get("CSALIGN_FUZZ", "25"))
SECONDS = 60  # for one example, on however loaded a machine
MEMORY_KIB = 1 << 20
FAST = settings(
    max_examples=EXAMPLES,
    deadline=None,  # which `bounded` sets
    derandomize=EXAMPLES < 1000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD: list[Any] = [
    *(None, True, -1, 0, 2**70, 1e308, float("nan"), "", "x", "../../etc/passwd", "\0", "\ud800"),
    *([], {}, [[]], {"x": 1}, "9" * 5000, [0] * 50),
]


@contextmanager
def bounded() -> Iterator[None]:
    """Expect a result or an expected error, before long and without a gibibyte more."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"took more than {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with suppress(CsalignError):
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KIB


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of each value in a JSON document."""
    found = [path] if path else []
    items: Iterable[tuple[Any, Any]] = document.items() if isinstance(document, dict) else ()
    items = enumerate(document) if isinstance(document, list) else items
    for key, value in items:
        found += places(value, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """A document with one to three values replaced, removed or added."""
    changed = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(changed) or [()]))
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        if not path:
            continue
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "remove":
            del parent[path[-1]]
        elif how == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=9))] = deepcopy(draw(st.sampled_from(ODD)))
        else:
            parent[path[-1]] = deepcopy(draw(st.sampled_from(ODD)))
    return changed


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Content with some bytes flipped, cut out, put in, or doubled."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        size = draw(st.integers(0, 64))
        how = draw(st.sampled_from(["flip", "cut", "put", "end", "double"]))
        if how == "flip" and data:
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[start : start + size]
        elif how == "put":
            data[start:start] = draw(st.binary(max_size=16)) or b"\xff" * 8
        elif how == "end":
            del data[start:]
        else:
            data[start:start] = data[start : start + size]
    return bytes(data)


def write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")


@FAST
@given(data=st.data())
def test_manifests(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "f"
    shutil.copytree(made / "f", folder, dirs_exist_ok=True)
    document = json.loads((made / "f" / "manifest.json").read_text())
    write(folder / "manifest.json", data.draw(mutated(document)))
    with bounded():
        load_rows(FeatureSet.open(folder), ALL)
    with bounded():
        inspect(folder)


@FAST
@given(data=st.data())
def test_shards(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "f"
    shutil.copytree(made / "f", folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["images", "texts"])) + "/part-00000.parquet"
    content = data.draw(damaged((made / "f" / name).read_bytes()))
    (folder / name).write_bytes(content)
    document = json.loads((made / "f" / "manifest.json").read_text())
    # As if it had been written like this, so that the reader itself meets the damage.
    document["shards"][name.partition("/")[0]][0]["bytes"] = len(content)
    write(folder / "manifest.json", document)
    with bounded():
        FeatureSet.open(folder).splits()
    with bounded():
        load_rows(FeatureSet.open(folder), ALL)


@FAST
@given(data=st.data())
def test_adapters(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "r"
    shutil.copytree(made / "r", folder, dirs_exist_ok=True)
    if data.draw(st.booleans()):
        document = json.loads((made / "r" / "adapter.json").read_text())
        write(folder / "adapter.json", data.draw(mutated(document)))
    else:
        name = data.draw(st.sampled_from(["adapter.json", "adapter.safetensors"]))
        (folder / name).write_bytes(data.draw(damaged((made / "r" / name).read_bytes())))
    with bounded():
        load_adapter(folder)


@FAST
@given(data=st.data())
def test_records_of_runs(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "r"
    shutil.copytree(made / "r", folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["metrics.jsonl", "config.toml", "environment.json"]))
    (folder / name).write_bytes(data.draw(damaged((made / "r" / name).read_bytes())))
    for read in (read_lines, read_settings, inspect):
        with bounded():
            read(folder)


@pytest.fixture(scope="session")
def evaluation(made: Path) -> Any:
    """What eval says of the run, but for where the features are, which it would read again."""
    config = EvalConfig(features=made / "f", adapter=made / "r", resamples=100)
    return evaluate(config) | {"features": "nowhere"}


@FAST
@given(data=st.data())
def test_evaluations(evaluation: Any, tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "e.json").write_text(json.dumps(data.draw(mutated(evaluation))))
    with bounded():
        compare(CompareConfig(systems=(tmp_path / "e.json",)))


@FAST
@given(data=st.data())
def test_documents_of_jobs(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.json"
    receipt = PartRecord(name="part-00000", file_records=3, records=3).model_dump(mode="json")
    path.write_text(json.dumps(data.draw(mutated(receipt))))
    for kind in (PartRecord, Job):
        with bounded():
            read_job(path, kind)


@pytest.mark.parametrize("config", [TrainConfig, EvalConfig, ExtractConfig, ImportConfig])
@FAST
@given(data=st.data())
def test_configs(tmp_path: Path, config: Any, data: st.DataObject) -> None:
    names = st.sampled_from(sorted(config.model_fields))
    odd = [value for value in ODD if value is not None and value != "\ud800" and value != 2**70]
    path = tmp_path / "c.toml"
    if data.draw(st.booleans()):
        values = data.draw(st.dictionaries(names, st.sampled_from(odd), max_size=4))
        path.write_text(tomli_w.dumps(values), encoding="utf-8")
    else:
        content = b'out = "x"\nsteps = 3\nbandwidth = [0.5, 1.0]\n[x]\ny = 1979-05-27\n'
        path.write_bytes(data.draw(damaged(content)))
    with bounded():
        config.resolve(path, {"out": "x"})


ROWS = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=ROWS, texts=np.asfortranarray(ROWS))
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, ROWS)
    return buffer.getvalue()


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"images": torch.from_numpy(ROWS), "texts": torch.from_numpy(ROWS)}, buffer)
    return buffer.getvalue()


def hdf5() -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name in ("images", "texts"):
            file.create_dataset(name, data=ROWS, chunks=(3, 4), compression="gzip")
    return buffer.getvalue()


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image_embedding": [*ROWS], "id": [*"abcdefghi"]}), buffer)
    return buffer.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "x.npy": npy,
    "x.npz": npz,
    "x.pt": torch_file,
    "x.safetensors": lambda: safetensors.numpy.save({"images": ROWS, "texts": ROWS}),
    "x.h5": hdf5,
    "x.parquet": parquet,
}


@pytest.mark.parametrize("name", FILES)
@FAST
@given(data=st.data())
def test_files_of_embeddings(tmp_path: Path, name: str, data: st.DataObject) -> None:
    path = tmp_path / name
    path.write_bytes(data.draw(damaged(FILES[name]())))
    with bounded():
        for vectors in read_both(path, dict.fromkeys(Modality)).values():
            for chunk, _ in vectors.chunks():
                assert chunk.shape[1] == vectors.width
    with bounded():
        for chunk, _ in read_side(path, Modality.IMAGE).chunks():
            assert chunk.ndim == 2


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.parquet"])
@FAST
@given(data=st.data())
def test_tables_of_labels(tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = {
        "x.csv": 'id,caption,split\n1,"a ""b""",train\n2,é,\n'.encode(),
        "x.tsv": b"image_id\tcaption\n1\tx\n2\ty\n",
        "x.jsonl": b'{"id": "1", "caption": "x"}\n{"id": 2, "split": null}\n',
        "x.parquet": parquet(),
    }[name]
    (tmp_path / name).write_bytes(data.draw(damaged(content)))
    with bounded():
        table = read_label_table(tmp_path / name)
        for column in table.names:
            table.column(column)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(mode: Literal["w", "w:gz"] = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for number in range(3):
            members = {
                "png": picture(),
                "txt": f"caption {number}".encode(),
                "json": json.dumps({"caption": "more", "key": number}).encode(),
            }
            for kind, content in members.items():
                member = tarfile.TarInfo(f"{number:03d}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def image_table() -> bytes:
    buffer = io.BytesIO()
    images = [{"bytes": picture(), "path": f"{number}.png"} for number in range(3)]
    pq.write_table(pa.table({"image": images, "caption": ["a", "b", "c"]}), buffer)
    return buffer.getvalue()


def annotations() -> bytes:
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(3)]
    captions = [{"image_id": number % 3, "caption": f"caption {number}"} for number in range(5)]
    return json.dumps({"images": images, "annotations": captions}).encode()


def karpathy() -> bytes:
    images = [
        {"filename": f"{n}.png", "split": "restval", "sentences": [{"raw": "a"}, {"raw": "b"}]}
        for n in range(3)
    ]
    return json.dumps({"images": images, "dataset": "coco"}).encode()


SOURCES: dict[str, Callable[[], bytes]] = {
    "x.tar": tar,
    "x.tar.gz": lambda: tar("w:gz"),
    "x.csv": lambda: "image,caption,split\n0.png,a,train\n1.png,é,\n2.png,,val\n".encode(),
    "x.tsv": lambda: b"image\tcaption\n0.png\ta\n1.png\tb\n",
    "x.jsonl": lambda: b'{"image": "0.png", "caption": ["a", "b"]}\n{"image": "1.png"}\n',
    "x.parquet": image_table,
    "captions_x.json": annotations,
    "dataset_x.json": karpathy,
    "x.txt": lambda: "a caption\nand one more\né\n".encode(),
}


@pytest.mark.parametrize("name", SOURCES)
@FAST
@given(data=st.data())
def test_sources(tmp_path: Path, name: str, data: st.DataObject) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture())
    content = SOURCES[name]()
    if name.endswith("json") and data.draw(st.booleans()):
        content = json.dumps(data.draw(mutated(json.loads(content)))).encode()
    else:
        content = data.draw(damaged(content))
    (tmp_path / name).write_bytes(content)
    with bounded():
        source = open_source(tmp_path / name)
        for position in range(len(source.files)):
            with source.open(position) as volume:
                for record in volume.records(0, len(volume)):
                    assert record.error or record.image or record.texts
                    if record.image is not None:
                        with suppress(CsalignError, OSError):
                            record.image.read()
