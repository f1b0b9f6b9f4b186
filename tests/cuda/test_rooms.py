"""Evaluation and encoders run on a GPU, and read their results alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from csalign.core.enums import Modality
from csalign.encoders.base import EncoderOptions, load_encoders
from csalign.metrics.retrieval import rank_both_ways
from tests.cuda.pretend import pretended


@pytest.mark.parametrize("tile", [None, 32])
def test_ranks_read_nothing_between_tiles(tile: int | None) -> None:
    rng = np.random.default_rng(0)
    images, texts = (rng.normal(size=(n, 8)).astype(np.float32) for n in (70, 150))
    owners = rng.integers(-1, 70, 150)
    with pretended() as reads:
        found = rank_both_ways(images, texts, owners, torch.device("cuda"), tile=tile)

    assert len(found[1].first) == (owners >= 0).sum()
    assert not reads.lines
    assert reads.uploads.total() == 6  # both sides, two orders, and where matches are


@pytest.mark.parametrize("precision", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [(), tuple(Modality)])
def test_a_clip_reads_its_embeddings_alone(
    tiny_clip: tuple[Path, Path], precision: str, tokens: tuple[Modality, ...]
) -> None:
    model, weights = tiny_clip
    with pretended() as reads:
        options = EncoderOptions(
            device=torch.device("cuda"), precision=precision, tokens=frozenset(tokens)
        )
        spec = f"open_clip:{model}+{weights}"
        encoders = load_encoders(spec, spec, options)
        assert encoders.image is not None
        assert encoders.text is not None
        reads.clear()
        images = encoders.image.embed(torch.zeros(3, 3, 32, 32))
        texts = encoders.text.embed(["a dog", "a photo of a dog"])

    assert (images.embeddings.shape, texts.embeddings.shape) == ((3, 16), (2, 16))
    assert not reads.lines
    assert not reads.uploads


def test_a_timm_model_reads_its_embeddings_alone() -> None:
    with pretended() as reads:
        options = EncoderOptions(device=torch.device("cuda"))
        encoder = load_encoders("timm:test_vit+none", None, options).image
        assert encoder is not None
        reads.clear()
        found = encoder.embed(torch.zeros(3, 3, 160, 160))

    assert len(found.embeddings) == 3
    assert not reads.lines
    assert not reads.uploads
