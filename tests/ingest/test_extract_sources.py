"""Every form of source, written by the tool that it comes from, gives the same feature set."""

import base64
import io
import json
import shutil
import signal
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import webdataset
from typer.testing import CliRunner

from csalign.cli.app import app
from csalign.core.errors import DataError, Stopped
from csalign.core.progress import Progress, silent
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ExtractConfig
from csalign.ingest.extract import extract

NAMES = [f"{letter}.png" for letter in "abcdef"]
CAPTIONS = {name: [f"picture {name[0]}", f"the {name[0]}"] for name in NAMES[:5]} | {"f.png": []}
Write = Callable[[Path, Path], str]


def in_txt(photos: Path, out: Path) -> str:
    for name, captions in CAPTIONS.items():
        (photos / name).with_suffix(".txt").write_text("\n".join(captions))
    return str(photos)


def in_csv(photos: Path, out: Path) -> str:
    rows = [(name, text) for name, texts in CAPTIONS.items() for text in texts or [""]]
    pd.DataFrame(rows, columns=["filepath", "title"]).to_csv(photos / "x.tsv", sep="\t")
    return str(photos / "x.tsv")


def in_parquet_paths(photos: Path, out: Path) -> str:
    table = pd.DataFrame({"image_path": list(CAPTIONS), "captions": list(CAPTIONS.values())})
    table.to_parquet(photos / "x.parquet")
    return str(photos / "x.parquet")


def in_base64(photos: Path, out: Path) -> str:
    with (out / "x.jsonl").open("w") as file:
        for name, captions in CAPTIONS.items():
            data = base64.b64encode((photos / name).read_bytes()).decode()
            file.write(json.dumps({"image_base64": data, "caption": captions}) + "\n")
    return str(out / "x.jsonl")


def in_coco(photos: Path, out: Path) -> str:
    images = [{"id": k, "file_name": name} for k, name in enumerate(NAMES)]
    texts = [(k, text) for k, name in enumerate(NAMES) for text in CAPTIONS[name]]
    annotations = [
        {"id": 100 + row, "image_id": k, "caption": text} for row, (k, text) in enumerate(texts)
    ]
    document = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (photos / "captions_val2017.json").write_text(json.dumps(document))
    return str(photos / "captions_val2017.json")


def in_karpathy(photos: Path, out: Path) -> str:
    images = [
        {
            "filename": name,
            "imgid": k,
            "split": "restval",
            "sentids": [],
            "sentences": [
                {"raw": text, "tokens": text.split(), "imgid": k} for text in CAPTIONS[name]
            ],
        }
        for k, name in enumerate(NAMES)
    ]
    (photos / "dataset_flickr8k.json").write_text(
        json.dumps({"images": images, "dataset": "flickr8k"})
    )
    return str(photos / "dataset_flickr8k.json")


def in_webdataset(photos: Path, out: Path) -> str:
    for shard in range(2):
        with webdataset.TarWriter(str(out / f"{shard:05d}.tar")) as tar:
            for name in NAMES[3 * shard : 3 * shard + 3]:
                sample: dict[str, Any] = {"__key__": name[0], "png": (photos / name).read_bytes()}
                if CAPTIONS[name]:
                    sample["json"] = {"caption": CAPTIONS[name]}
                tar.write(sample)
    return f"{out}/{{00000..00001}}.tar"


def in_hugging_face(photos: Path, out: Path) -> str:
    table = datasets.Dataset.from_dict(
        {
            "image": [{"path": name, "bytes": (photos / name).read_bytes()} for name in NAMES],
            "caption": list(CAPTIONS.values()),
        }
    ).cast_column("image", datasets.Image())
    table.to_parquet(str(out / "train-00000-of-00001.parquet"))
    return str(out)


FORMS: list[Write] = [
    *(in_txt, in_csv, in_parquet_paths, in_base64, in_coco, in_karpathy, in_webdataset),
    in_hugging_face,
]


@pytest.mark.parametrize("write", FORMS, ids=lambda write: write.__name__)
def test_each_form_gives_the_same_images_captions_and_pairs(
    write: Write, make_images: Callable[..., Path], tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    photos = make_images(*NAMES)
    (tmp_path / "source").mkdir()
    encoder = f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"
    common: dict[str, Any] = {"encoder": encoder, "dtype": "float32"}
    alone = ExtractConfig(source=str(photos), out=tmp_path / "alone", **common)
    expected = FeatureSet.open(extract(alone).features).images.embeddings()

    source = write(photos, tmp_path / "source")
    result = extract(ExtractConfig(source=source, out=tmp_path / "features", **common))

    features = FeatureSet.open(result.features)
    ids = features.images.column("id").to_pylist()
    owners = features.texts.column("image_id").to_pylist()
    captions = features.texts.column("caption").to_pylist()
    assert (result.images, result.texts, result.pairs, result.failures) == (6, 10, 10, 0)
    np.testing.assert_allclose(features.images.embeddings(), expected, rtol=0, atol=1e-6)
    pairs = [(ids.index(owner), text) for owner, text in zip(owners, captions, strict=True)]
    assert pairs == [(k, text) for k, name in enumerate(NAMES) for text in CAPTIONS[name]]


def test_a_list_on_stdin_is_a_source(
    make_images: Callable[..., Path], tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    photos = make_images(*NAMES)
    lines = "\n".join(str(photos / name) for name in NAMES)
    arguments = ["extract", "-", "--out", str(tmp_path / "features")]
    arguments += ["--encoder", f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"]
    done = CliRunner().invoke(app, arguments, input=lines)

    assert done.exit_code == 0, done.output
    assert "6 images, 0 texts" in done.stdout


def test_hostile_members_of_a_tar_are_skipped_by_name(
    make_images: Callable[..., Path], tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    photos = make_images(*NAMES)
    header = bytearray((photos / NAMES[0]).read_bytes())
    header[16:24] = struct.pack(">II", 50_000, 50_000)
    header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
    members = [(f"{k}.png", (photos / name).read_bytes()) for k, name in enumerate(NAMES)]
    members += [("../../out.png", members[0][1]), ("bomb.png", bytes(header))]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    options: dict[str, Any] = {"encoder": f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"}
    config = ExtractConfig(
        source=str(tmp_path / "x.tar"), out=tmp_path / "features", max_failures=0.5, **options
    )
    result = extract(config)

    lines = (result.features / "failures.jsonl").read_text().splitlines()
    reasons = {json.loads(line)["source"]: json.loads(line)["reason"] for line in lines}
    assert (result.images, result.failures) == (6, 2)
    assert "is outside of the tar" in reasons[f"{tmp_path}/x.tar"]
    assert "pixels" in reasons[f"{tmp_path}/x.tar/bomb.png"]


def test_four_shards_one_of_them_killed_and_rerun_give_what_one_process_gives(
    make_images: Callable[..., Path], tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    names = [f"{k:03d}.png" for k in range(24)]
    photos = make_images(*names)
    (photos / "captions.csv").write_text(
        "\n".join(["image,caption", *(f"{name},number {name}" for name in names)])
    )
    partial, at_death = tmp_path / "four.partial", tmp_path / "at_death"

    def run(out: str, shard: str, progress: Progress = silent) -> FeatureSet:
        options: dict[str, Any] = {"encoder": f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"}
        options |= {"part_rows": 2, "workers": 2, "shard": shard}
        extract(ExtractConfig(source=str(photos), out=tmp_path / out, **options), progress)
        return FeatureSet.open(tmp_path / out)

    def die(what: str, done: int, total: int | None) -> None:
        """Keep the files as a kill in the middle of the second part leaves them."""
        if (what, done) == ("encoding images: records", 4):
            shutil.copytree(partial, at_death)
            raise Stopped(signal.SIGTERM)

    whole = run("whole", "0/1")
    with pytest.raises(Stopped):
        run("four", "2/4", lambda *call: die(*call))
    shutil.rmtree(partial)
    at_death.rename(partial)
    assert len(list((partial / "parts").iterdir())) == 1
    for index in (0, 1, 3):
        with pytest.raises(DataError, match="no such feature set"):
            run("four", f"{index}/4")
    four = run("four", "2/4")

    # The same process embeds the same batches, so not even rounding differs.
    assert four.manifest == whole.manifest
    four.verify()
