import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from csalign import generate
from csalign.adapters.checkpoint import load_adapter, read_info
from csalign.core import outputs
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, OutputError, ShapeError, Stopped
from csalign.core.results import GenerateResult
from csalign.features.join import load_side
from csalign.features.reader import FeatureSet
from csalign.generation.config import DecoderOptions, GenerateConfig
from csalign.generation.unclip import Decoder, find_decoder
from csalign.ingest.config import ExtractConfig, ImportConfig
from csalign.ingest.extract import extract
from csalign.ingest.import_arrays import import_arrays
from csalign.training.config import TrainConfig
from csalign.training.train import train

FROZEN: dict[str, Any] = {"image_adapter": "identity", "text_adapter": "linear", "steps": 0}


@pytest.fixture
def few(features: Path, tmp_path: Path) -> Path:
    """The first pairs of the features, as a set of its own."""
    for name in ("images", "texts"):
        np.save(tmp_path / f"few-{name}.npy", np.load(tmp_path / f"{name}.npy")[:6])
    table = tmp_path / "few.csv"
    table.write_text("\n".join((tmp_path / "texts.csv").read_text().splitlines()[:7]))
    images, texts = (tmp_path / f"few-{name}.npy" for name in ("images", "texts"))
    out = tmp_path / "few"
    import_arrays(ImportConfig(images=images, texts=texts, pairs=table, out=out))
    return out


@pytest.fixture
def run(features: Path, tmp_path: Path) -> Path:
    train(TrainConfig(features=features, out=tmp_path / "run", **FROZEN))
    return tmp_path / "run"


@pytest.fixture
def clip_run(
    tiny_clip: tuple[Path, Path], make_images: Callable[..., Path], tmp_path: Path
) -> Path:
    """A run whose texts are of an encoder that can be loaded, and whose images are 24 wide."""
    names = [f"{number}.png" for number in range(12)]
    folder = make_images(*names)
    for number, name in enumerate(names):
        (folder / name).with_suffix(".txt").write_text("a " + "very " * number + "red car")
    spec = f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"
    extract(ExtractConfig(source=str(folder), encoder=spec, out=tmp_path / "clip", workers=1))
    texts = FeatureSet.open(tmp_path / "clip").texts.embeddings()
    for name, array in (("a", np.random.default_rng(0).normal(size=(12, 24))), ("b", texts)):
        np.save(tmp_path / f"{name}.npy", array.astype(np.float32))
    import_arrays(
        ImportConfig(
            images=tmp_path / "a.npy",
            texts=tmp_path / "b.npy",
            text_encoder=spec,
            out=tmp_path / "joined",
        )
    )
    train(TrainConfig(features=tmp_path / "joined", out=tmp_path / "clip-run", **FROZEN))
    return tmp_path / "clip-run"


def made(
    decoders: Path, run: Path, out: Path, decoder: str = "stable", **values: Any
) -> GenerateResult:
    given: dict[str, Any] = {"steps": 2, "adapter": run, "decoder": str(decoders / decoder)}
    if decoder == "kandinsky":
        given["prior"] = str(decoders / "prior")
    return generate(GenerateConfig(out=out, **(given | values)))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "generated.jsonl").read_text().splitlines()]


def images(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "images").iterdir())}


@pytest.mark.parametrize("decoder", ["stable", "karlo", "kandinsky"])
def test_what_a_decoder_is_given_is_what_the_adapter_gives_at_the_decoders_own_norm(
    few: Path,
    run: Path,
    decoders: Path,
    tmp_path: Path,
    decoder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[torch.Tensor] = []
    draw = Decoder.draw

    def spy(self: Any, rows: torch.Tensor, *rest: Any) -> Any:
        given.append(rows)
        return draw(self, rows, *rest)

    monkeypatch.setattr(Decoder, "draw", spy)
    done = made(decoders, run, tmp_path / "out", decoder, features=few)
    texts = load_side(FeatureSet.open(few), "all", Modality.TEXT)
    prior = str(decoders / "prior") if decoder == "kandinsky" else None
    options = DecoderOptions(decoder=str(decoders / decoder), prior=prior, device="cpu")
    folder, family = find_decoder(options.decoder)
    statistics = family(folder, options).statistics
    assert statistics is not None
    expected = statistics.norm * load_adapter(run).embed(Modality.TEXT, texts.texts)

    np.testing.assert_allclose(torch.cat(given), expected, rtol=1e-5)
    assert done.images == len(texts.texts) == 6
    assert done.scale == pytest.approx(statistics.norm)
    records = lines(tmp_path / "out")
    assert [record["prompt"] for record in records] == texts.captions.to_pylist()
    assert [record["seed"] for record in records] == list(range(6))
    for record in records:
        with Image.open(tmp_path / "out" / record["file"]) as image:
            assert image.size == (16, 16)


def test_prompts_are_embedded_by_the_encoder_that_the_run_names(
    clip_run: Path, decoders: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red car\n\na very red car\n")
    page = tmp_path / "made.html"
    given = {"prompts": prompts, "seed": 5, "scale": 3, "sheet": True, "report": page}
    done = made(decoders, clip_run, tmp_path / "out", "stable", **given)
    stored = made(
        decoders, clip_run, tmp_path / "stored", features=tmp_path / "joined", seed=4, scale=3
    )

    assert (done.images, done.scale, done.scale_from) == (2, 3, "--scale")
    assert [(line["prompt"], line["seed"]) for line in lines(tmp_path / "out")] == [
        ("a red car", 5),
        ("a very red car", 6),
    ]
    # The feature set has the same texts, but begins a seed earlier and knows no captions.
    assert stored.images == 12
    for written in (page, tmp_path / "out/sheet.html"):
        text = written.read_text(encoding="utf-8")
        assert text.count("data:image/jpeg") == 2
        assert "a very red car" in text


def test_images_do_not_depend_on_the_batch_and_a_stopped_call_goes_on(
    few: Path, run: Path, decoders: Path, tmp_path: Path
) -> None:
    def stop(what: str, done: int, total: int | None) -> None:
        if what == "generating: images" and done >= 4:
            raise Stopped(15)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    made(decoders, run, whole, features=few, batch_size=6)
    config = GenerateConfig(
        out=stopped,
        features=few,
        adapter=run,
        decoder=str(decoders / "stable"),
        steps=2,
        batch_size=2,
    )
    with pytest.raises(Stopped):
        generate(config, stop)
    partial = tmp_path / "stopped.partial/images"
    kept = {path.name: path.stat().st_mtime_ns for path in partial.iterdir()}
    (partial / "000003.png").write_bytes((partial / "000003.png").read_bytes()[:50])
    (partial / "000005.png.abc.tmp").write_bytes(b"half")
    assert not stopped.exists()
    with pytest.raises(OutputError, match=r"generated with seed 0, not 1: rerun with the same"):
        generate(config.model_copy(update={"seed": 1}))
    done = generate(config.model_copy(update={"batch_size": 3, "sheet": True}))

    assert len(kept) == 4
    assert (done.images, done.reused) == (6, 3)
    again = {path.name: path.stat().st_mtime_ns for path in (stopped / "images").iterdir()}
    assert {name for name in kept if again[name] == kept[name]} == set(kept) - {"000003.png"}
    assert {path.name for path in stopped.iterdir()} == {
        *("config.toml", "generated.jsonl", "generation.json", "images", "sheet.html")
    }
    for name in images(whole):
        one, two = (
            np.asarray(Image.open(out / "images" / name), np.int64) for out in (whole, stopped)
        )
        assert abs(one - two).max() <= 1
    with pytest.raises(OutputError, match="exists; choose another --out"):
        generate(config)


def test_the_lock_is_held_until_the_folder_has_its_name(
    few: Path, run: Path, decoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []
    commit = outputs.commit

    def spy(folder: Path, out: Path) -> None:
        with pytest.raises(OutputError, match="another process is writing there") as caught:
            made(decoders, run, tmp_path / "out", features=few)
        refused.append(str(caught.value))
        commit(folder, out)

    monkeypatch.setattr(outputs, "commit", spy)
    made(decoders, run, tmp_path / "out", features=few)

    assert len(refused) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("config.toml", "generated.jsonl", "generation.json", "images")
    ]


def test_prompts_of_another_encoder_do_not_continue_a_stopped_call(
    clip_run: Path, decoders: Path, tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    def stop(what: str, done: int, total: int | None) -> None:
        if what == "generating: images" and done:
            raise Stopped(15)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red car\na dog\n")
    config = GenerateConfig(
        out=tmp_path / "out",
        prompts=prompts,
        adapter=clip_run,
        decoder=str(decoders / "stable"),
        steps=2,
        batch_size=1,
        scale=3,
    )
    with pytest.raises(Stopped):
        generate(config, stop)
    weights = safetensors.torch.load_file(tiny_clip[1])
    changed = tmp_path / "changed.safetensors"
    safetensors.torch.save_file({name: 1.1 * own for name, own in weights.items()}, changed)
    other = f"open_clip:{tiny_clip[0]}+{changed}"
    with pytest.raises(
        OutputError, match=r"generated with prompts [0-9a-f]{12}, not [0-9a-f]{12}:"
    ):
        generate(config.model_copy(update={"text_encoder": other, "any_encoder": True}))
    assert generate(config).reused == 1


def test_the_scale_is_the_decoders_then_the_runs_then_asked_for(
    few: Path, run: Path, decoders: Path, arrays: tuple[Path, Path], tmp_path: Path
) -> None:
    raw = np.load(arrays[0])[:240]  # the held-out ones too, after the refit
    norm = float(np.sqrt((raw**2).sum(1).mean()))
    info = read_info(run)
    assert info.image_norm == pytest.approx(norm, rel=1e-5)
    unguided: dict[str, Any] = {"prior": None, "guidance": 1, "size": 4, "features": few}
    done = made(decoders, run, tmp_path / "a", "kandinsky", **unguided)
    assert (done.scale, done.scale_from) == (info.image_norm, "the run's training images")

    np.save(arrays[0], np.load(arrays[0]) / np.linalg.norm(np.load(arrays[0]), axis=1)[:, None])
    import_arrays(ImportConfig(images=arrays[0], texts=arrays[1], out=tmp_path / "unit"))
    train(TrainConfig(features=tmp_path / "unit", out=tmp_path / "unit-run", **FROZEN))
    with pytest.raises(ConfigError, match="neither the decoder nor the run has the norm"):
        made(decoders, tmp_path / "unit-run", tmp_path / "b", "kandinsky", **unguided)


def test_a_run_of_another_space_is_told(
    few: Path, run: Path, decoders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(decoders, run, tmp_path / "far", features=few, scale=100)
    assert "standard deviations from those that the decoder" in caplog.text


def test_what_does_not_go_together_is_refused(
    features: Path, run: Path, clip_run: Path, decoders: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red car\n")
    out = tmp_path / "out"
    free = tmp_path / "free"
    train(TrainConfig(features=features, out=free, steps=0))
    narrow = tmp_path / "narrow"
    other = {"text_adapter": "identity", "image_adapter": "linear"}
    train(TrainConfig(features=features, out=narrow, **(FROZEN | other)))
    with pytest.raises(ConfigError, match="--prompts and --features are both texts to draw"):
        made(decoders, run, out)
    with pytest.raises(ConfigError, match=r"maps images too \(with glu\), into a space that no"):
        made(decoders, free, out, features=features)
    with pytest.raises(ConfigError, match="maps images too"):
        made(decoders, narrow, out, prompts=prompts)
    with pytest.raises(ConfigError, match="texts of unknown, which is unknown or runs"):
        made(decoders, run, out, prompts=prompts)
    with pytest.raises(ShapeError, match="features of the encoders it was trained on"):
        made(decoders, run, out, features=tmp_path / "clip")
    prompts.write_text("\n")
    with pytest.raises(DataError):
        made(decoders, clip_run, out, prompts=prompts)
    for spec in ("os:system+true", "hf:x?trust_remote_code=true", "hf:x?trust%5Fremote_code=1"):
        info = json.loads((run / "adapter.json").read_text())
        info["encoders"]["text"] = spec
        (run / "adapter.json").write_text(json.dumps(info))
        with pytest.raises(ConfigError, match="runs code from outside csalign; allow it"):
            made(decoders, run, out, prompts=prompts)
    assert not out.exists()


def test_a_decoder_of_another_width_is_refused(
    features: Path, tmp_path: Path, decoders: Path, arrays: tuple[Path, Path]
) -> None:
    np.save(arrays[0], np.load(arrays[0])[:, :20])
    import_arrays(ImportConfig(images=arrays[0], texts=arrays[1], out=tmp_path / "narrow"))
    train(TrainConfig(features=tmp_path / "narrow", out=tmp_path / "narrow-run", **FROZEN))
    with pytest.raises(ShapeError, match=r"takes embeddings of width 24, the run .* gives 20"):
        made(decoders, tmp_path / "narrow-run", tmp_path / "out", features=tmp_path / "narrow")


def test_a_frozen_image_side_stays_where_it_is_and_texts_come_to_it(
    features: Path, tmp_path: Path
) -> None:
    """Images are 24 wide and far from their origin, texts 16 wide."""
    moved = tmp_path / "moved.npy"
    np.save(moved, np.load(tmp_path / "images.npy") + 4)
    import_arrays(
        ImportConfig(
            images=moved,
            texts=tmp_path / "texts.npy",
            pairs=tmp_path / "texts.csv",
            out=tmp_path / "far",
        )
    )
    for text_adapter in ("glu", "linear", "mlp"):
        out = tmp_path / text_adapter
        train(
            TrainConfig(
                features=tmp_path / "far",
                out=out,
                image_adapter="identity",
                text_adapter=text_adapter,
                steps=10,
                hidden=16,
                batch_size=64,
            )
        )
        adapter, far = load_adapter(out), FeatureSet.open(tmp_path / "far")
        images, texts = far.images.embeddings(), far.texts.embeddings()
        aligned = adapter.embed(Modality.TEXT, texts)
        units = images.astype(np.float32) / np.linalg.norm(
            images.astype(np.float32), axis=1, keepdims=True
        )

        np.testing.assert_allclose(adapter.embed(Modality.IMAGE, images), units, atol=1e-6)
        assert aligned.shape == (300, 24)
        centre = units.mean(0)
        assert np.linalg.norm(centre) > 0.8
        assert np.linalg.norm(aligned.mean(0) - centre) < 0.1
        own = (aligned * units).sum(1)
        other = (aligned * np.roll(units, 1, axis=0)).sum(1)
        assert own.mean() > other.mean() + 0.5 * other.std()
