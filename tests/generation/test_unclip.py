import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from csalign.core.errors import ConfigError, CsalignError, DecoderError
from csalign.generation.config import DecoderOptions
from csalign.generation.unclip import (
    Decoder,
    Kandinsky,
    Karlo,
    StableUnclip,
    Statistics,
    find_decoder,
)

FAMILIES = ("stable", "karlo", "kandinsky")
PROMPTS = ("a red car", "a dog", "")
PRIOR = {"kandinsky": "prior"}


def load(decoders: Path, name: str, **values: Any) -> Decoder:
    prior = str(decoders / PRIOR[name]) if name in PRIOR else None
    given = {"decoder": str(decoders / name), "prior": prior, "steps": 2, "device": "cpu"}
    options = DecoderOptions(**(given | values))
    folder, family = find_decoder(options.decoder)
    return family(folder, options)


def embeddings(rows: int = 3) -> torch.Tensor:
    return 5 * torch.randn(rows, 24, generator=torch.Generator().manual_seed(1))


def pixels(images: Any) -> Any:
    return np.stack([np.asarray(image, np.int64) for image in images])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_is_its_embeddings_and_its_seeds_whatever_the_batch(
    decoders: Path, name: str
) -> None:
    decoder, given = load(decoders, name), embeddings()
    together = pixels(decoder.draw(given, PROMPTS, (7, 8, 9)))
    alone = pixels(decoder.draw(given[1:2], PROMPTS[1:2], (8,)))
    others = (
        decoder.draw(given[1:2], PROMPTS[1:2], (7,)),
        decoder.draw(given[2:3], PROMPTS[1:2], (8,)),
    )

    assert together.shape == (3, 16, 16, 3)
    assert abs(together[1] - alone[0]).max() <= 1  # rounding
    for other in others:
        assert abs(pixels(other)[0] - alone[0]).max() > 1


def test_stable_unclip_standardises_the_embedding_and_undoes_it(decoders: Path) -> None:
    decoder, given = load(decoders, "stable"), embeddings()
    assert isinstance(decoder, StableUnclip)
    seen: dict[str, Any] = {}
    normalizer, unet = decoder.pipeline.image_normalizer, decoder.pipeline.unet
    scale = normalizer.scale

    def spy(rows: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = scale(rows)
        seen["standardised"] = scaled
        return scaled

    normalizer.scale = spy
    unet.register_forward_pre_hook(
        lambda _, __, named: seen.update(labels=named["class_labels"]), with_kwargs=True
    )
    decoder.draw(given, PROMPTS, (7, 8, 9))

    raw = safetensors.torch.load_file(
        decoders / "stable/image_normalizer/diffusion_pytorch_model.safetensors"
    )
    torch.testing.assert_close(seen["standardised"], (given - raw["mean"]) / raw["std"])
    # At noise level 0 the schedule leaves a little noise; the second half is the level's code.
    empty, conditioned = seen["labels"].chunk(2)
    assert not empty.any()
    alpha = decoder.pipeline.image_noising_scheduler.alphas_cumprod[0]
    noised = conditioned[:, :24] - raw["mean"] - alpha.sqrt() * (given - raw["mean"])
    assert float((noised / raw["std"]).std()) == pytest.approx(float((1 - alpha).sqrt()), rel=0.3)


def test_karlo_is_given_the_embedding_as_it_is(decoders: Path) -> None:
    decoder, given = load(decoders, "karlo"), embeddings()
    assert isinstance(decoder, Karlo)
    seen: dict[str, Any] = {}
    decoder.pipeline.text_proj.register_forward_pre_hook(
        lambda _, __, named: seen.update(named), with_kwargs=True
    )
    decoder.draw(given, PROMPTS, (7, 8, 9))

    torch.testing.assert_close(seen["image_embeddings"], given)


def test_kandinsky_is_given_the_embedding_and_that_of_a_black_image(decoders: Path) -> None:
    from diffusers import KandinskyV22PriorPipeline

    decoder, given = load(decoders, "kandinsky"), embeddings()
    assert isinstance(decoder, Kandinsky)
    seen: dict[str, Any] = {}
    decoder.pipeline.unet.register_forward_pre_hook(
        lambda _, __, named: seen.update(named["added_cond_kwargs"]), with_kwargs=True
    )
    decoder.draw(given, PROMPTS, (7, 8, 9))
    prior = KandinskyV22PriorPipeline.from_pretrained(decoders / "prior", image_processor=None)

    negative, positive = seen["image_embeds"].chunk(2)
    torch.testing.assert_close(positive, given)
    torch.testing.assert_close(negative, prior.get_zero_embed(3).detach())


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_are_those_in_the_decoders_files(decoders: Path, name: str) -> None:
    file, mean, std = {
        "stable": ("stable/image_normalizer", "mean", "std"),
        "karlo": ("karlo/prior", "clip_mean", "clip_std"),
        "kandinsky": ("prior/prior", "clip_mean", "clip_std"),
    }[name]
    raw = safetensors.torch.load_file(decoders / file / "diffusion_pytorch_model.safetensors")
    found = load(decoders, name).statistics
    assert found is not None
    sample = raw[mean] + raw[std] * torch.randn(20_000, 24)

    torch.testing.assert_close(found.mean, raw[mean][0])
    assert found.norm == pytest.approx(float(sample.square().sum(1).mean().sqrt()), rel=0.02)
    assert found.deviation(sample) == pytest.approx(1, rel=0.02)
    assert found.deviation(sample + 3 * raw[std]) > 3


def test_statistics_that_were_never_set_are_none(decoders: Path, tmp_path: Path) -> None:
    for name, part, values in (
        ("stable", "image_normalizer", {"mean": 0.0, "std": 1.0}),
        ("karlo", "prior", {"clip_mean": 0.0, "clip_std": 0.0}),
    ):
        shutil.copytree(decoders / name, tmp_path / name)
        file = tmp_path / name / part / "diffusion_pytorch_model.safetensors"
        weights = safetensors.torch.load_file(file)
        unset = {key: torch.full_like(weights[key], value) for key, value in values.items()}
        safetensors.torch.save_file({**weights, **unset}, file)

        assert load(tmp_path, name).statistics is None


def test_the_size_is_the_decoders_or_the_one_asked_for(decoders: Path) -> None:
    for name, size in (("stable", 24), ("kandinsky", 12)):
        image = load(decoders, name, size=size).draw(embeddings(1), PROMPTS[:1], (1,))[0]
        assert image.size == (size, size)
    with pytest.raises(ConfigError, match=r"size: 20 is not a multiple of 8, as Stable unCLIP"):
        load(decoders, "stable", size=20)
    with pytest.raises(ConfigError, match="steps: Karlo needs 2 or more"):
        load(decoders, "karlo", steps=1)
    with pytest.raises(ConfigError, match="size: Karlo does not support it"):
        load(decoders, "karlo", size=64)


def test_kandinsky_needs_its_prior_unless_it_is_not_guided(decoders: Path) -> None:
    with pytest.raises(ConfigError, match="prior: Kandinsky is guided away from the embedding"):
        load(decoders, "kandinsky", prior=None)
    decoder = load(decoders, "kandinsky", prior=None, guidance=1)

    assert decoder.statistics is None
    assert decoder.draw(embeddings(1), PROMPTS[:1], (1,))[0].size == (16, 16)


def test_noise_is_stable_unclips_alone_and_within_its_schedule(decoders: Path) -> None:
    decoder = load(decoders, "stable", noise_level=500)
    plain = load(decoders, "stable").draw(embeddings(1), PROMPTS[:1], (1,))

    noised = decoder.draw(embeddings(1), PROMPTS[:1], (1,))
    assert abs(pixels(noised) - pixels(plain)).max() > 1
    with pytest.raises(ConfigError, match="noise-level: 1000 is not below 1000"):
        load(decoders, "stable", noise_level=1000)
    with pytest.raises(ConfigError, match=r"noise-level: Kandinsky 2\.2 does not support it"):
        load(decoders, "kandinsky", noise_level=5)


def damage_pickle(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(
        folder / "unet/diffusion_pytorch_model.bin"
    )


def damage_cut(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def damage_lacking(folder: Path) -> None:
    file = folder / "text_encoder/model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights.pop(next(name for name in weights if name.endswith("final_layer_norm.weight")))
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})


def damage_scheduler(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["os", "system"]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            damage_pickle,
            r"unet: cannot be loaded .*; download the whole model, with its",
        ),
        (damage_cut, "unet: "),
        (damage_lacking, r"text_encoder: lacks 1 weights \(.*final_layer_norm\.weight\)"),
        (damage_scheduler, "scheduler is not a class of diffusers or transformers"),
        (
            lambda folder: shutil.rmtree(folder / "vae"),
            r"vae: cannot be loaded .*; download",
        ),
        (lambda folder: (folder / "model_index.json").write_text("{"), "is damaged"),
        (
            lambda folder: (folder / "model_index.json").write_text("{}"),
            "is a None, not a decoder",
        ),
        (lambda folder: (folder / "model_index.json").unlink(), "not a pipeline of diffusers"),
    ],
)
def test_a_decoder_that_cannot_be_used_is_refused_in_a_line(
    decoders: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    shutil.copytree(decoders / "stable", tmp_path / "stable")
    damage(tmp_path / "stable")
    with pytest.raises(CsalignError, match=message) as caught:
        load(tmp_path, "stable")

    assert str(tmp_path) in str(caught.value)


def test_a_folder_that_is_not_there_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(DecoderError, match="no such folder"):
        load(tmp_path, "nothing")


def test_the_deviation_of_rows_is_that_of_all_components() -> None:
    statistics = Statistics(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))

    assert statistics.norm == pytest.approx(10**0.5)
    assert statistics.deviation(torch.tensor([[2.0, 6.0]])) == pytest.approx(2.5**0.5)
