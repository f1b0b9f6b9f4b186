import base64
import json
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from threading import Event, Timer
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import safetensors.torch
import torch
from PIL import Image

from csalign import extract
from csalign.core import outputs
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, EncoderError, OutputError, Stopped
from csalign.core.results import FeaturesResult
from csalign.encoders.running import TowerImages
from csalign.features.reader import FeatureSet, batch_tokens
from csalign.ingest.config import ExtractConfig, SplitConfig
from csalign.ingest.partial_set import PartWriter
from csalign.ingest.split import split

MakeImages = Callable[..., Path]
NAMES = [f"{letter}.png" for letter in "abcdefgh"]

PAGE = "is a web page, which a server sent instead of the file; download it again"


@pytest.fixture
def photos(make_images: MakeImages) -> Path:
    """Eight images; a has two captions, h none; one caption has no image."""
    folder = make_images(*NAMES)
    rows = [f"{name},a picture of {name[0] * (1 + k)}" for k, name in enumerate(NAMES[:-1])]
    rows += ["a.png,another", ",on its own"]
    (folder / "captions.csv").write_text("image,caption\n" + "\n".join(rows))
    return folder


RECORDS = "encoding images: records"


@pytest.fixture
def run(tiny_clip: tuple[Path, Path], photos: Path) -> Callable[..., FeaturesResult]:
    """Extract the photos with the tiny model; options and the name of the output can be given."""

    def run(out: str = "features", progress: Any = None, **options: Any) -> FeaturesResult:
        values: dict[str, Any] = {
            "source": photos,
            "out": out if "://" in out else photos.parent / out,
            "encoder": f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}",
            "batch_size": 3,
            "workers": 2,
            "dtype": "float32",
        }
        config = ExtractConfig(**values | options)
        return extract(config) if progress is None else extract(config, progress)

    return run


def column(result: FeaturesResult, side: Modality, name: str) -> list[str | None]:
    table = FeatureSet.open(result.features).table(side)
    values: list[str | None] = table.column(name).to_pylist()
    return values


def failures(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "failures.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def shards(result: FeaturesResult) -> dict[str, bytes]:
    found = result.features.glob("*/*.parquet")
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in found}


def test_what_is_written_is_what_open_clip_gives(
    run: Callable[..., FeaturesResult], photos: Path, tiny_clip: tuple[Path, Path]
) -> None:
    result = run()
    features = FeatureSet.open(result.features)
    features.verify()
    network = open_clip.CLIP(**json.loads(tiny_clip[0].read_text())).eval()
    network.load_state_dict(safetensors.torch.load_file(tiny_clip[1]))
    transform = open_clip.image_transform(
        32, False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )
    captions = column(result, Modality.TEXT, "caption")
    with torch.inference_mode():
        pixels = torch.stack([transform(Image.open(photos / name)) for name in NAMES])
        images = network.encode_image(pixels)
        texts = network.encode_text(open_clip.tokenize(captions, context_length=20))

    assert result == FeaturesResult(photos.parent / "features", 8, 9, 8, 0)
    assert column(result, Modality.IMAGE, "id") == NAMES
    np.testing.assert_allclose(features.images.embeddings(), images, rtol=0, atol=1e-6)
    np.testing.assert_allclose(features.texts.embeddings(), texts, rtol=0, atol=2e-6)


def test_pairs_unpaired_captions_and_unpaired_images_keep_their_order(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    result = run()

    ids = ["a.png#0", "a.png#1", *(f"{name}#0" for name in NAMES[1:-1]), "caption:10"]
    assert column(result, Modality.TEXT, "id") == ids
    assert column(result, Modality.TEXT, "image_id") == ["a.png", *NAMES[:-1], None]
    captions = column(result, Modality.TEXT, "caption")
    assert (captions[1], captions[-1]) == ("another", "on its own")
    assert column(result, Modality.IMAGE, "source") == [f"{photos}/{name}" for name in NAMES]
    assert column(result, Modality.IMAGE, "split") == [None] * 8


def test_splits_reach_images_and_texts(run: Callable[..., FeaturesResult], photos: Path) -> None:
    table = photos / "captions.csv"
    table.write_text("image,caption,split\na.png,x,train\nb.png,y,test\nb.png,z,test\n,w,val\n")
    result = run(source=table)

    assert column(result, Modality.IMAGE, "split") == ["train", "test"]
    assert column(result, Modality.TEXT, "split") == ["train", "test", "test", "val"]


def test_images_alone_make_a_set(run: Callable[..., FeaturesResult], photos: Path) -> None:
    (photos / "captions.csv").write_text("image,caption\na.png,\n")
    result = run(tokens="image")

    assert result == FeaturesResult(photos.parent / "features", 8, 0, 0, 0)
    features = FeatureSet.open(result.features)
    assert features.images.has_tokens
    with pytest.raises(DataError, match="has no texts; both sides are needed"):
        features.texts.embeddings()


def test_tokens_are_stored_row_by_row(run: Callable[..., FeaturesResult]) -> None:
    plain, result = run("plain"), run(tokens="both", token_space="hidden")
    features = FeatureSet.open(result.features)

    patches = [batch_tokens(batch) for _, batch in features.images.read("tokens")]
    words = [batch_tokens(batch) for _, batch in features.texts.read("tokens")]

    assert [own.shape for own in patches[0]] == [(16, 24)] * 8
    # "another" and "on its own" are one and three words to the tokenizer.
    assert [len(words[0][row]) for row in (1, -1)] == [1, 3]
    assert {own.shape[1] for own in words[0]} == {16}
    assert features.table(Modality.TEXT).encoder.token_space == "hidden"
    np.testing.assert_allclose(
        features.texts.embeddings(),
        FeatureSet.open(plain.features).texts.embeddings(),
        rtol=0,
        atol=2e-6,
    )


def test_two_runs_give_the_same_bytes(run: Callable[..., FeaturesResult]) -> None:
    first, second = run("one", tokens="both"), run("two", tokens="both", workers=1)

    assert shards(first) == shards(second)
    manifests = [(result.features / "manifest.json").read_text() for result in (first, second)]
    assert manifests[0] == manifests[1]


def test_the_batch_size_changes_no_more_than_rounding(
    run: Callable[..., FeaturesResult],
) -> None:
    sets = [FeatureSet.open(run(f"b{size}", batch_size=size).features) for size in (1, 5, 64)]
    for side in Modality:
        first, *others = (features.table(side).embeddings() for features in sets)
        for other in others:
            np.testing.assert_allclose(other, first, rtol=0, atol=1e-5)


def test_the_written_config_repeats_the_run(run: Callable[..., FeaturesResult]) -> None:
    first = run(dtype="float16")

    config = ExtractConfig.resolve(
        first.features / "config.toml", {"out": first.features.with_name("again")}
    )

    assert shards(extract(config)) == shards(first)


def damage(photos: Path) -> None:
    """Spoil b (truncated), d (a web page) and e (empty)."""
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:200])
    (photos / "d.png").write_text("<html>not found</html>")
    (photos / "e.png").write_bytes(b"")


def test_unreadable_images_are_skipped_with_their_captions_and_listed(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    damage(photos)
    result = run(max_failures=0.5)

    table = f"{photos}/captions.csv"
    assert result == FeaturesResult(photos.parent / "features", 5, 6, 5, 6)
    assert column(result, Modality.IMAGE, "id") == [f"{x}.png" for x in "acfgh"]
    assert column(result, Modality.TEXT, "image_id") == [
        *(f"{x}.png" for x in "aacfg"),
        None,
    ]
    listed = failures(result.features)
    reason = listed[0].pop("reason")
    assert reason.startswith("cannot be read (")
    assert listed == [
        {"source": f"{photos}/b.png", "row": None},
        {"source": f"{photos}/d.png", "row": None, "reason": PAGE},
        {"source": f"{photos}/e.png", "row": None, "reason": "is empty"},
        {"source": table, "row": 3, "reason": f"its image b.png {reason}"},
        {"source": table, "row": 5, "reason": f"its image d.png {PAGE}"},
        {"source": table, "row": 6, "reason": "its image e.png is empty"},
    ]


def test_skipped_images_do_not_change_the_others(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    whole = FeatureSet.open(run("whole").features).images.embeddings()
    damage(photos)
    part = FeatureSet.open(run("part", max_failures=0.5).features).images.embeddings()

    np.testing.assert_allclose(part, whole[[0, 2, 5, 6, 7]], rtol=0, atol=1e-6)


def test_too_many_failures_end_the_run_and_a_rerun_resumes(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    damage(photos)
    partial = photos.parent / "features.partial"
    with pytest.raises(DataError) as caught:
        run(max_failures=0.2, part_rows=4)

    message = str(caught.value)
    assert message.startswith(
        f"2 of 4 records are unusable (limit: 20 %): {photos}/b.png cannot be read ("
    )
    assert f"; {photos}/d.png {PAGE}; " in message
    assert f" Repair what {partial}/failures.jsonl lists, then resume with --retry" in message
    assert len(failures(partial)) == 4
    assert not (photos.parent / "features").exists()
    began = (partial / "images" / "part-00000.parquet").stat().st_mtime_ns
    result = run(max_failures=0.5, part_rows=4)
    first = result.features / "images" / "part-00000.parquet"
    assert (result.images, first.stat().st_mtime_ns) == (5, began)


def test_repaired_images_are_reprocessed_on_request(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    whole = run("whole", part_rows=3)
    pixels = (photos / "b.png").read_bytes()
    (photos / "b.png").write_bytes(pixels[:200])
    with pytest.raises(DataError, match="resume with --retry-failures"):
        run(part_rows=3)
    (photos / "b.png").write_bytes(pixels)

    assert shards(run(part_rows=3, retry_failures=True)) == shards(whole)


def test_a_repaired_table_resumes_after_the_unchanged_parts(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    table = photos / "captions.csv"
    whole = run("whole", part_rows=3)
    repaired = table.read_text()
    table.write_text(repaired.replace("e.png,", 'e.png,"x",'))
    with pytest.raises(DataError, match=r"row 6 has 3 cells, .* resume with --retry-failures"):
        run(part_rows=3)
    partial = photos.parent / "features.partial"
    began = (partial / "images" / "part-00000.parquet").stat().st_mtime_ns
    table.write_text(repaired)
    with pytest.raises(OutputError, match="the source has changed since this"):
        run(part_rows=3)
    result = run(part_rows=3, retry_failures=True)

    assert shards(result) == shards(whole)
    assert (result.features / "images" / "part-00000.parquet").stat().st_mtime_ns == began
    assert failures(result.features) == []


def test_a_row_removed_from_a_table_moves_the_rows_after_it(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    table = photos / "captions.csv"
    (photos / "h.png").write_bytes(b"")
    with pytest.raises(DataError):
        run(part_rows=3)
    (photos / "h.png").unlink()
    table.write_text(table.read_text().replace("d.png,a picture of dd\n", ""))
    changed = run(part_rows=3, retry_failures=True, max_failures=0.5)

    assert shards(changed) == shards(run("again", part_rows=3, max_failures=0.5))


@pytest.mark.parametrize("content", [b"a cat \xff", b""])
def test_a_repaired_caption_beside_an_image_resumes(
    run: Callable[..., FeaturesResult], make_images: MakeImages, content: bytes
) -> None:
    folder = make_images(*NAMES, folder="others")
    for name in NAMES:
        (folder / name).with_suffix(".txt").write_text(f"of {name}")
    whole = run("whole", source=folder, part_rows=3)
    (folder / "b.txt").write_bytes(content or b"\xff")
    with pytest.raises(DataError, match=r"its captions b\.txt: is not UTF-8"):
        run(source=folder, part_rows=3)
    (folder / "b.txt").write_text("of b.png")

    assert shards(run(source=folder, part_rows=3, retry_failures=True)) == shards(whole)


def test_a_repaired_tar_is_read_again_and_the_others_are_not(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    tars = photos.parent / "tars"
    tars.mkdir()

    def write(number: int, names: list[str], cut: int | None = None) -> None:
        with tarfile.open(tars / f"{number}.tar", "w") as tar:
            for name in names:
                tar.add(photos / name, name)
        content = (tars / f"{number}.tar").read_bytes()
        (tars / f"{number}.tar").write_bytes(content[:cut])

    write(0, NAMES[:4])
    write(1, NAMES[4:])
    whole = run("whole", source=tars, part_rows=2)
    write(1, NAMES[4:], cut=8000)
    with pytest.raises(DataError, match="is cut short"):
        run(source=tars, part_rows=2)
    partial = photos.parent / "features.partial"
    began = (partial / "images" / "part-00000-00000.parquet").stat().st_mtime_ns
    write(1, NAMES[4:])
    result = run(source=tars, part_rows=2, retry_failures=True)

    assert shards(result) == shards(whole)
    first = result.features / "images" / "part-00000-00000.parquet"
    assert first.stat().st_mtime_ns == began


def test_unreadable_files_count_among_files(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    tars = photos.parent / "tars"
    tars.mkdir()
    for number in range(3):
        with tarfile.open(tars / f"{number}.tar", "w") as tar:
            tar.add(photos / "a.png", "a.png")
    whole = (tars / "1.tar").read_bytes()
    (tars / "1.tar").write_text("<html>")
    with pytest.raises(DataError, match=r"^1 of 3 files are unreadable \(limit: 1 %\): "):
        run(source=tars)
    lossy = run("lossy", source=tars, max_failures=0.4)
    (tars / "1.tar").write_bytes(whole)
    mended = run(source=tars, retry_failures=True)

    assert (lossy.images, mended.images) == (2, 3)
    assert failures(lossy.features) == [
        {
            "source": f"{tars}/1.tar",
            "row": None,
            "reason": PAGE,
        }
    ]
    assert shards(mended) == shards(run("whole", source=tars))


def test_a_shard_without_a_part_says_so(
    run: Callable[..., FeaturesResult], caplog: pytest.LogCaptureFixture
) -> None:
    run(shard="1/2")

    assert "shard 1/2 has nothing to do: there are fewer parts than shards" in caplog.text


def test_a_token_limit_without_tokens_is_refused(
    run: Callable[..., FeaturesResult],
) -> None:
    with pytest.raises(ConfigError, match=r"^--max-tokens: no tokens are stored; add --tokens"):
        run(max_tokens=4)


def test_a_slurm_array_of_one_does_not_take_over_the_work_of_many(
    run: Callable[..., FeaturesResult], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(shard="3/4", part_rows=2)
    for name, value in (("ID", 0), ("MIN", 0), ("MAX", 0), ("COUNT", 1)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    with pytest.raises(ConfigError, match="began with 4 shards"):
        run(shard="auto", part_rows=2)

    assert run(shard="0/1", part_rows=2).complete


def test_strict_refuses_any_failure_at_the_end(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    damage(photos)
    with pytest.raises(DataError, match=r"^6 inputs were skipped \(--strict\): "):
        run(max_failures=0.5, strict=True)

    assert len(failures(photos.parent / "features.partial")) == 6


def test_a_set_without_images_is_refused(run: Callable[..., FeaturesResult], photos: Path) -> None:
    (photos / "captions.csv").write_text("image,caption\na.png,x\n")
    for path in photos.glob("*.png"):
        path.write_bytes(b"")

    with pytest.raises(DataError, match=r"^none of the records is usable: .*a\.png is empty; "):
        run(max_failures=1)


def test_a_decompression_bomb_is_a_failure(
    run: Callable[..., FeaturesResult], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (60, 60)).save(photos / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # warns above this, raises above twice

    listed = failures(run(max_failures=0.5).features)

    assert listed[0]["source"] == f"{photos}/b.png"
    assert "3000" in listed[0]["reason"]


def test_values_that_overflow_the_number_format_are_failures(
    run: Callable[..., FeaturesResult], tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    state = safetensors.torch.load_file(tiny_clip[1])
    state["text_projection"] = state["text_projection"] * 1e7
    safetensors.torch.save_file(state, tmp_path / "loud.safetensors")
    options = {"encoder": f"open_clip:{tiny_clip[0]}+{tmp_path / 'loud.safetensors'}"}

    assert run(**options).texts == 9
    with pytest.raises(DataError) as caught:
        run("half", dtype="float16", **options)

    assert str(caught.value).startswith("9 of 9 texts are unusable (limit: 1 %): ")
    assert "captions.csv, row 2 has an embedding that" in str(caught.value)


def test_an_output_that_must_not_be_written_is_refused_first(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    first = shards(run())
    with pytest.raises(OutputError, match="--overwrite"):
        run(dtype="float16")
    with pytest.raises(OutputError, match="is read from"):
        run(out=photos.name, overwrite=True)

    (photos / "h.png").unlink()
    assert shards(run(overwrite=True)) != first


def test_a_failed_run_leaves_nothing(
    run: Callable[..., FeaturesResult], photos: Path, tiny_clip: tuple[Path, Path]
) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        run(source=photos / "gone")
    with pytest.raises(EncoderError, match="no architecture"):
        run(encoder="open_clip:ViT-B-3/openai")

    assert [path.name for path in photos.parent.iterdir()] == [photos.name]


def test_a_stopped_run_ends_at_once_and_leaves_nothing(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    def stop(what: str, done: int, total: int | None) -> None:
        if what == RECORDS and done >= 3:
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        run(progress=stop)

    assert [path.name for path in photos.parent.iterdir()] == [photos.name]


def test_progress_counts_records_then_texts(run: Callable[..., FeaturesResult]) -> None:
    seen: list[tuple[str, int, int | None]] = []

    run(progress=lambda *call: seen.append(call))

    records = [call for call in seen if call[0] == RECORDS]
    assert records[0] == (RECORDS, 0, 9)
    assert records[-1] == (RECORDS, 9, 9)  # the caption without an image is one too
    texts = "encoding texts: texts"
    assert [call for call in seen if call[0] == texts] == [(texts, done, None) for done in (0, 9)]
    others = [what for what, _, _ in seen if what not in (RECORDS, texts)]
    assert [what.split(":")[0] for what in others] == [
        *("scanning the source", "loading open_clip", "completing the feature set"),
    ]


def test_parts_of_several_processes_make_the_same_set(
    run: Callable[..., FeaturesResult],
) -> None:
    whole = run("whole", part_rows=2)
    shares = [run(shard=f"{index}/3", part_rows=2) for index in (2, 0, 1)]

    assert [share.complete for share in shares] == [False, False, True]
    assert shares[0].features.name == "features.partial"
    assert sum(share.images for share in shares[:2]) < 8
    assert shards(shares[2]) == shards(whole)
    assert (shares[2].features / "config.toml").read_text().count("shard") == 1


def test_a_stopped_run_resumes(run: Callable[..., FeaturesResult]) -> None:
    whole = run("whole", part_rows=2)
    counts: list[int] = []

    def stop(what: str, done: int, total: int | None) -> None:
        if (what, done) == (RECORDS, 5):
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        run(progress=stop, part_rows=2, batch_size=1)
    parts = {path.name for path in (whole.features.parent / "features.partial").glob("*/*.parquet")}
    assert parts == {"part-00000.parquet", "part-00001.parquet"}
    rest = run(
        progress=lambda what, done, total: counts.append(done) if what == RECORDS else None,
        part_rows=2,
        batch_size=1,
    )

    assert counts == [0, 2, 4, 5, 6, 7, 8, 9]
    for side in Modality:
        np.testing.assert_allclose(
            FeatureSet.open(rest.features).table(side).embeddings(),
            FeatureSet.open(whole.features).table(side).embeddings(),
            rtol=0,
            atol=1e-5,
        )


def test_a_rerun_with_other_options_is_refused_without_overwrite(
    run: Callable[..., FeaturesResult],
) -> None:
    run(shard="0/2", part_rows=2)
    with pytest.raises(OutputError, match="began with dtype float32, not float16"):
        run(part_rows=2, dtype="float16")

    assert run(part_rows=2, dtype="float16", overwrite=True).images == 8


def test_one_side_can_be_skipped(run: Callable[..., FeaturesResult], photos: Path) -> None:
    images = run("images", text_encoder="none")
    texts = run("texts", image_encoder="none")

    assert (images.images, images.texts, images.pairs) == (8, 0, 0)
    assert (texts.images, texts.texts, texts.pairs) == (0, 9, 0)
    assert FeatureSet.open(texts.features).manifest.encoders.image is None
    assert column(texts, Modality.TEXT, "image_id") == [None] * 9
    with pytest.raises(ConfigError, match="text-encoder is required, since the source"):
        run("x", encoder=None, image_encoder="open_clip:RN50/none")


def test_a_source_and_a_set_in_an_object_store(
    run: Callable[..., FeaturesResult], photos: Path, bucket: Path
) -> None:
    for path in photos.iterdir():
        (bucket / "photos" / path.name).write_bytes(path.read_bytes())
    here = run()
    there = run(source=str(bucket / "photos"), out=f"{bucket / 'features'}/")

    assert isinstance(there.features, type(bucket))
    assert not outputs.partial_path(there.features).exists()
    features = FeatureSet.open(there.features)
    features.verify()
    for side in Modality:
        np.testing.assert_array_equal(
            features.table(side).embeddings(),
            FeatureSet.open(here.features).table(side).embeddings(),
        )


def test_batches_too_large_for_the_device_are_halved(
    run: Callable[..., FeaturesResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("whole")
    embed = TowerImages.embed

    def greedy(self: Any, pixels: torch.Tensor) -> Any:
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return embed(self, pixels)

    monkeypatch.setattr(TowerImages, "embed", greedy)
    halved = run(batch_size=8)

    np.testing.assert_allclose(
        FeatureSet.open(halved.features).images.embeddings(),
        FeatureSet.open(whole.features).images.embeddings(),
        rtol=0,
        atol=1e-5,
    )


def test_a_disk_too_small_is_refused_before_the_work(
    run: Callable[..., FeaturesResult], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3000))
    with pytest.raises(OutputError, match=r"8 images need 8.7 kB, 3.0 kB are free"):
        run(tokens="image")

    assert run(tokens="image", max_tokens=4).images == 8


def test_another_folder_with_the_same_names_does_not_resume(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    run(shard="0/2", part_rows=2)
    shutil.copytree(photos, photos.with_name("others"))
    with pytest.raises(OutputError, match=f"began with location {photos}, not {photos.parent}/"):
        run(source=photos.with_name("others"), shard="1/2", part_rows=2)


def test_the_share_of_failures_is_that_of_the_whole_source_for_any_shards(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    (photos / "a.png").write_bytes(b"")
    first = run(shard="0/4", part_rows=2, max_failures=0.2)
    assert not first.complete
    for index in (1, 2):
        run(shard=f"{index}/4", part_rows=2, max_failures=0.1)
    with pytest.raises(DataError, match="1 of 9 records are unusable"):
        run(shard="3/4", part_rows=2, max_failures=0.1)

    assert run(shard="1/4", part_rows=2, max_failures=0.2).images == 7


def test_a_source_of_nothing_is_refused(run: Callable[..., FeaturesResult], tmp_path: Path) -> None:
    pd.DataFrame({"image": [], "caption": []}).astype(str).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"empty\.parquet: "):
        run(source=tmp_path / "empty.parquet")


def test_an_error_waits_for_unfinished_writes(
    run: Callable[..., FeaturesResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, stopped = Event(), Event()
    write = PartWriter.write

    def slow(self: Any, modality: Modality, rows: Any) -> None:
        begun.set()
        stopped.wait(300)
        write(self, modality, rows)

    def stop(what: str, done: int, total: int | None) -> None:
        if what == RECORDS and begun.wait(300):
            Timer(0.2, stopped.set).start()
            raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(PartWriter, "write", slow)
    with pytest.raises(Stopped):
        run(progress=lambda *call: stop(*call) if call[1] > 3 else None)


def test_an_output_that_the_next_run_would_read_is_refused(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    with pytest.raises(OutputError, match="where the next run would read it"):
        run(f"{photos.name}/features")

    assert not list(photos.glob("features*"))


def test_skipping_both_sides_is_refused_at_once(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    with pytest.raises(ConfigError, match="at least one must be an encoder"):
        run(image_encoder="none", text_encoder="none")

    assert [path.name for path in photos.parent.iterdir()] == [photos.name]


def test_rows_that_share_an_id_but_not_the_image_are_skipped(
    run: Callable[..., FeaturesResult], photos: Path, tmp_path: Path
) -> None:
    images = [(photos / name).read_bytes() for name in ("a.png", "b.png", "c.png", "c.png")]
    ids, captions = ["10", "10", "11", "11"], ["of a", "of b", "of c", "c too"]
    source = tmp_path / "x.jsonl"
    names = ("id", "image_base64", "caption")
    rows = zip(ids, [base64.b64encode(image).decode() for image in images], captions, strict=True)
    source.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    result = run(source=source, id_column="id", max_failures=0.9)

    found = dict(
        zip(
            column(result, Modality.TEXT, "caption"),
            column(result, Modality.TEXT, "image_id"),
            strict=False,
        )
    )
    assert "of b" not in found
    assert {caption for caption, owner in found.items() if str(owner).endswith("11")} == {
        "of c",
        "c too",
    }
    assert any("10" in failure["reason"] for failure in failures(result.features))


def split_of(result: FeaturesResult) -> dict[str | None, str | None]:
    ids, names = (column(result, Modality.IMAGE, name) for name in ("id", "split"))
    return dict(zip(ids, names, strict=True))


def test_splits_are_made_of_the_finished_set_whoever_completes_it(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    whole = run("whole", val=1, test=2)
    for index in (2, 0):
        share = run(shard=f"{index}/3", part_rows=2, val=1, test=2)
        assert not share.complete
    with pytest.raises(OutputError, match=r"began with splits.test 2.0, not 3.0"):
        run(shard="1/3", part_rows=2, val=1, test=3)
    last = run(shard="1/3", part_rows=2, val=1, test=2)
    later = split(SplitConfig(features=run("later").features, val=1, test=2))

    assert sorted(map(str, split_of(whole).values())) == ["test"] * 2 + ["train"] * 5 + ["val"]
    assert split_of(last) == split_of(whole)
    assert split_of(run("later", overwrite=True, val=1, test=2)) == split_of(whole)
    assert later.splits["val"]["images"] == 1


def test_a_set_that_cannot_be_divided_is_not_lost(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    out = photos.parent / "features"
    with pytest.raises(DataError, match=f"{out}: the feature set is complete, but has no splits: "):
        run(val=1, test=100)

    assert len(FeatureSet.open(out).images) == 8
    assert split(SplitConfig(features=out, val=1)).splits["val"]["images"] == 1
