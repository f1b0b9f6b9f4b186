import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image

from csalign import files
from csalign.config import ExtractConfig
from csalign.enums import Modality
from csalign.errors import DataError, EncoderError, OutputError, Stopped
from csalign.results import FeaturesResult
from csalign.steps.extract import extract
from csalign.store.reader import FeatureSet, batch_tokens

MakeImages = Callable[..., Path]
NAMES = [f"{letter}.png" for letter in "abcdefgh"]


@pytest.fixture
def photos(make_images: MakeImages) -> Path:
    """Eight images; a has two captions, h none; one caption has no image."""
    folder = make_images(*NAMES)
    rows = [f"{name},a picture of {name[0] * (1 + k)}" for k, name in enumerate(NAMES[:-1])]
    rows += ["a.png,another", ",on its own"]
    (folder / "captions.csv").write_text("image,caption\n" + "\n".join(rows))
    return folder


@pytest.fixture
def run(tiny_clip: tuple[Path, Path], photos: Path) -> Callable[..., FeaturesResult]:
    """Extract the photos with the tiny model; options and the name of the output can be given."""

    def run(out: str = "features", progress: Any = None, **options: Any) -> FeaturesResult:
        values: dict[str, Any] = {
            "source": photos,
            "out": photos.parent / out,
            "model": str(tiny_clip[0]),
            "pretrained": str(tiny_clip[1]),
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
    return {path.parent.name: path.read_bytes() for path in result.features.glob("*/*.parquet")}


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


def test_pairs_loose_captions_and_lone_images_have_their_place(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    result = run()

    ids = [*(f"{name}#0" for name in NAMES[:-1]), "a.png#1", "caption:10"]
    assert column(result, Modality.TEXT, "id") == ids
    assert column(result, Modality.TEXT, "image_id") == [*NAMES[:-1], "a.png", None]
    assert column(result, Modality.TEXT, "caption")[-2:] == ["another", "on its own"]
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
    result = run(tokens="both")

    assert result == FeaturesResult(photos.parent / "features", 8, 0, 0, 0)
    features = FeatureSet.open(result.features)
    assert features.texts.embeddings().shape == (0, 16)
    assert features.texts.has_tokens


def test_tokens_are_stored_row_by_row(run: Callable[..., FeaturesResult]) -> None:
    plain, result = run("plain"), run(tokens="both", token_space="hidden")
    features = FeatureSet.open(result.features)

    patches = [batch_tokens(batch) for batch in features.images.batches(["tokens"])]
    words = [batch_tokens(batch) for batch in features.texts.batches(["tokens"])]

    assert [own.shape for own in patches[0]] == [(16, 24)] * 8
    # "another" and "on its own" are one and three words to the tokenizer.
    assert [len(own) for own in words[0]][-2:] == [1, 3]
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


def test_unreadable_images_are_left_out_with_their_captions_and_listed(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    damage(photos)
    result = run(max_failures=0.5)

    table = f"{photos}/captions.csv"
    assert result == FeaturesResult(photos.parent / "features", 5, 6, 5, 6)
    assert column(result, Modality.IMAGE, "id") == [f"{x}.png" for x in "acfgh"]
    assert column(result, Modality.TEXT, "image_id") == [
        *(f"{x}.png" for x in "acfga"),
        None,
    ]
    listed = failures(result.features)
    reason = listed[0].pop("reason")
    assert reason.startswith("cannot be read (")
    assert listed == [
        {"source": f"{photos}/b.png", "row": None},
        {"source": f"{photos}/d.png", "row": None, "reason": "is no image of a known format"},
        {"source": f"{photos}/e.png", "row": None, "reason": "is empty"},
        {"source": table, "row": 3, "reason": f"its image b.png {reason}"},
        {"source": table, "row": 5, "reason": "its image d.png is no image of a known format"},
        {"source": table, "row": 6, "reason": "its image e.png is empty"},
    ]


def test_left_out_images_do_not_change_the_others(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    whole = FeatureSet.open(run("whole").features).images.embeddings()
    damage(photos)
    part = FeatureSet.open(run("part", max_failures=0.5).features).images.embeddings()

    np.testing.assert_allclose(part, whole[[0, 2, 5, 6, 7]], rtol=0, atol=1e-6)


def test_too_many_failures_end_the_run_and_keep_the_list(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    damage(photos)
    partial = photos.parent / "features.partial"
    with pytest.raises(DataError) as caught:
        run(max_failures=0.2)

    message = str(caught.value)
    assert message.startswith(
        "2 of 8 images could not be used so far, the share allowed is 0.2 (--max-failures): "
        f"{photos}/b.png cannot be read ("
    )
    assert f"; {photos}/d.png is no image of a known format; repair or remove " in message
    assert message.endswith(f"what {partial}/failures.jsonl lists")
    assert {path.name for path in partial.iterdir()} == {"failures.jsonl", files.LOCK}
    assert len(failures(partial)) == 2
    assert not (photos.parent / "features").exists()


def test_strict_refuses_any_failure_at_the_end(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    damage(photos)
    with pytest.raises(DataError, match=r"^6 inputs were left out, which --strict forbids: "):
        run(max_failures=0.5, strict=True)

    assert len(failures(photos.parent / "features.partial")) == 6
    shutil.rmtree(photos.parent / "features.partial")


def test_a_set_without_images_is_refused(run: Callable[..., FeaturesResult], photos: Path) -> None:
    for path in photos.glob("*.png"):
        path.write_bytes(b"")

    with pytest.raises(DataError, match=r"^0 of 8 images could be used: .*a\.png is empty; "):
        run(max_failures=1)


def test_a_decompression_bomb_is_a_failure(
    run: Callable[..., FeaturesResult], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (60, 60)).save(photos / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # warns above this, raises above twice

    listed = failures(run(max_failures=0.5).features)

    assert listed[0]["source"] == f"{photos}/b.png"
    assert "(3600 pixels) exceeds limit of 3000 pixels" in listed[0]["reason"]


def test_what_the_number_format_cannot_hold_is_a_failure(
    run: Callable[..., FeaturesResult], tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    state = safetensors.torch.load_file(tiny_clip[1])
    state["text_projection"] = state["text_projection"] * 1e7
    safetensors.torch.save_file(state, tmp_path / "loud.safetensors")
    options = {"pretrained": str(tmp_path / "loud.safetensors")}

    assert run(**options).texts == 9
    with pytest.raises(DataError) as caught:
        run("half", dtype="float16", **options)

    assert str(caught.value).startswith("9 of 9 texts could not be used so far, the share")
    assert "captions.csv, row 2 has an embedding that is not finite in float16" in str(caught.value)


def test_nothing_is_done_where_the_output_must_not_be_written(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    first = shards(run())
    with pytest.raises(OutputError, match="--overwrite"):
        run()
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
        run(model="ViT-B-3")

    assert [path.name for path in photos.parent.iterdir()] == [photos.name]


def test_a_stopped_run_ends_at_once_and_leaves_nothing(
    run: Callable[..., FeaturesResult], photos: Path
) -> None:
    def stop(what: str, done: int, total: int | None) -> None:
        if (what, done) == ("images", 3):
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        run(progress=stop)

    assert [path.name for path in photos.parent.iterdir()] == [photos.name]


def test_progress_counts_images_then_texts(run: Callable[..., FeaturesResult]) -> None:
    seen: list[tuple[str, int, int | None]] = []

    run(progress=lambda *told: seen.append(told))

    assert [told for told in seen if told[0] == "images"] == [
        ("images", done, 8) for done in (0, 3, 6, 8)
    ]
    assert [told for told in seen if told[0] == "texts"] == [("texts", done, 9) for done in (0, 9)]
