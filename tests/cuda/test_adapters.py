"""Adapters run on a GPU without making the host wait, but for the arrays that they return."""

import numpy as np
import pytest
import torch

from csalign.adapters.model import KINDS, Adapter, build_side
from csalign.adapters.side import SideShape
from csalign.core.enums import Modality
from tests.cuda.pretend import pretended

WIDTH = 12
PARTS = tuple(SideShape(kind, WIDTH, 6, hidden=8, landmarks=20) for kind in ("glu", "kernel"))
SHAPES = {
    **{kind: SideShape(kind, WIDTH, WIDTH, hidden=8, rank=2) for kind in KINDS},
    "kernel": SideShape("kernel", WIDTH, WIDTH, landmarks=20),
    "parts": SideShape("parts", WIDTH, WIDTH, parts=PARTS),
    "rooted": SideShape("glu", WIDTH, WIDTH, hidden=8, signed_sqrt=True, scaled=True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward_read_nothing(name: str) -> None:
    with pretended() as reads:
        side = build_side(SHAPES[name]).to("cuda")
        rows = torch.randn(30, WIDTH, device="cuda")
        reads.clear()
        found = side(rows, 0.1)
        if found.requires_grad:
            found.square().sum().backward()

    assert (found.device.type, found.shape) == ("cuda", (30, WIDTH))
    assert all(p.grad is None or p.grad.device.type == "cuda" for p in side.parameters())
    assert any(p.grad is not None for p in side.parameters()) == (
        name not in ("identity", "kernel")
    )
    assert not reads.lines
    assert not reads.uploads


@pytest.mark.parametrize("kind", ["glu", "identity", "transformer"])
def test_tokens_read_nothing(kind: str) -> None:
    shape = SideShape(kind, WIDTH, WIDTH, hidden=8, token_width=WIDTH)
    with pretended() as reads:
        side = build_side(shape).to("cuda")
        reads.clear()
        tokens, mask = (
            torch.randn(9, 5, WIDTH, device="cuda"),
            torch.rand(9, 5, device="cuda") > 0.5,
        )
        found = side.forward_tokens(torch.randn(9, WIDTH, device="cuda"), tokens, mask, 0.1)
        if kind != "identity":
            (found.embeddings.sum() + found.tokens.sum()).backward()

    assert (found.embeddings.shape, found.tokens.shape) == ((9, WIDTH), (9, 5, WIDTH))
    assert not reads.lines
    assert not reads.uploads


@pytest.mark.parametrize("name", SHAPES)
def test_embed_reads_its_result_alone(name: str) -> None:
    adapter = Adapter.of_sides({side: build_side(SHAPES[name]) for side in Modality})
    rows = np.ones((30, WIDTH), np.float16)
    with pretended() as reads:
        found = adapter.to("cuda").embed("image", rows, batch_size=16)

    assert found.shape == (30, WIDTH)
    assert not reads.lines


def test_embed_tokens_reads_its_result_alone() -> None:
    shape = SideShape("transformer", WIDTH, WIDTH, hidden=8, token_width=WIDTH)
    adapter = Adapter.of_sides({side: build_side(shape) for side in Modality})
    rows, tokens = np.ones((9, WIDTH), np.float32), np.ones((9, 5, WIDTH), np.float32)
    with pretended() as reads:
        own, found = adapter.to("cuda").embed_tokens(
            "image", rows, tokens, np.ones((9, 5), np.bool_)
        )

    assert (own.shape, found.shape) == ((9, WIDTH), (9, 5, WIDTH))
    assert not reads.lines
