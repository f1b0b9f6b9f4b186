from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from csalign.adapters.builtin import Transformer
from csalign.adapters.model import KINDS, Adapter, build_side
from csalign.adapters.side import SideAdapter, SideShape, unit_inputs
from csalign.core.enums import Modality
from csalign.core.errors import ShapeError

D, W, HIDDEN, RANK, LAYERS, TOKENS = 6, 4, 12, 2, 2, 5
MAPPING = ("linear", "mlp", "glu", "transformer")
ROW_BY_ROW = ("linear", "mlp", "glu", "low-rank", "identity")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        yield


def build(kind: str, token_width: int | None = D, *, dropout: float = 0.0) -> SideAdapter:
    width = D if KINDS[kind].keeps_width else W
    shape = SideShape(
        kind,
        D,
        width,
        hidden=HIDDEN,
        dropout=dropout,
        token_width=token_width,
        rank=RANK,
        layers=LAYERS,
    )
    return build_side(shape)


def trained(side: SideAdapter) -> SideAdapter:
    """The same with every weight random, so that no part of it is silent."""
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.normal_(std=0.3)
        if side.shape.kind != "identity":
            side.mean.normal_(std=0.1)
    return side.eval()


def batch(n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.arange(TOKENS) < torch.tensor([TOKENS, 2, 0])[:n, None]
    return torch.randn(n, D), torch.randn(n, TOKENS, D), mask


@pytest.mark.parametrize("kind", MAPPING)
@pytest.mark.parametrize("biased", [False, True])
def test_a_kind_that_maps_starts_exactly_at_a_closed_form(kind: str, biased: bool) -> None:
    x, tokens, mask = batch()
    mean, weight = torch.randn(D) / 4, torch.randn(W, D)
    bias = torch.randn(W) if biased else torch.zeros(W)
    side = trained(build(kind))
    side.start_from(mean, weight, bias if biased else None)
    found = side.forward_tokens(x, tokens, mask)

    def expected(rows: Tensor) -> Tensor:
        return (unit_inputs(rows, signed_sqrt=False) - mean) @ weight.T + bias

    torch.testing.assert_close(side(x), expected(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.embeddings, expected(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        found.tokens, expected(tokens) * mask[..., None], atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["mlp", "glu", "transformer"])
def test_a_residual_that_starts_at_zero_changes_no_bit_of_the_linear_path(kind: str) -> None:
    linear, side = build("linear").eval(), build(kind).eval()
    mean, weight = torch.randn(D) / 4, torch.randn(W, D)
    linear.start_from(mean, weight)
    side.start_from(mean, weight)
    x = torch.randn(7, D)

    assert torch.equal(side(x), linear(x))


@pytest.mark.parametrize("kind", ["low-rank", "identity"])
def test_a_kind_that_keeps_the_width_starts_as_the_unit_rows_bit_for_bit(kind: str) -> None:
    x = torch.randn(7, D)

    assert torch.equal(build(kind)(x), unit_inputs(x, signed_sqrt=False))


def test_low_rank_starts_centred_and_shifted_and_from_no_other_map() -> None:
    side, x = trained(build("low-rank")), torch.randn(7, D)
    mean, bias = torch.randn(D), torch.randn(D)
    side.start_from(mean, torch.eye(D), bias)

    torch.testing.assert_close(side(x), unit_inputs(x, signed_sqrt=False) - mean + bias)
    with pytest.raises(ValueError, match="starts from the identity alone"):
        side.start_from(mean, torch.eye(D).flip(0))


@pytest.mark.parametrize(("mean", "bias"), [(torch.ones(D), None), (torch.zeros(D), torch.ones(D))])
def test_a_frozen_side_cannot_be_moved(mean: Tensor, bias: Tensor | None) -> None:
    side = build("identity")
    side.start_from(torch.zeros(D), torch.eye(D), torch.zeros(D))

    with pytest.raises(ValueError, match="cannot be moved"):
        side.start_from(mean, torch.eye(D), bias)


def test_a_change_of_low_rank_has_that_rank() -> None:
    side = trained(build("low-rank"))
    side.mean.zero_()
    x = torch.randn(20, D)
    origin = side(torch.zeros(1, D))
    change = side(x) - unit_inputs(x, signed_sqrt=False) - origin

    assert torch.linalg.matrix_rank(change, rtol=1e-4) == RANK


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", W * (D + 1)),
        ("mlp", W * (D + 1) + HIDDEN * (D + 1) + W * (HIDDEN + 1)),
        ("glu", W * (D + 1) + 2 * HIDDEN * (D + 1) + W * (HIDDEN + 1)),
        ("low-rank", RANK * D + D * (RANK + 1)),
        ("identity", 0),
        (
            "transformer",
            W * (D + 1)
            + W * (3 + 1)
            + LAYERS * (4 * W * (W + 1) + HIDDEN * (W + 1) + W * (HIDDEN + 1) + 4 * W),
        ),
    ],
)
def test_the_parameters_are_as_many_as_the_formula_says(kind: str, expected: int) -> None:
    side = build(kind, token_width=3 if kind == "transformer" else None)
    width = side.shape.width
    adapter = Adapter({Modality.IMAGE: side.shape, Modality.TEXT: SideShape("linear", 2, width)})

    assert adapter.parameter_counts() == {"image": expected, "text": width * 3}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
def test_gradients_reach_every_parameter_after_one_step(kind: str) -> None:
    side = build(kind).train()
    x, tokens, mask = batch()
    target = torch.randn(3, side.shape.width)
    optimiser = torch.optim.SGD(side.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        found = side.forward_tokens(x, tokens, mask, noise=0.1)
        loss = (found.embeddings - target).square().sum() + found.tokens.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    for name, parameter in side.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("kind", KINDS)
@given(padding=st.sampled_from([0.0, -3.0, 1e30, float("inf"), float("nan")]), seed=st.integers(0))
def test_padded_positions_influence_nothing(kind: str, padding: float, seed: int) -> None:
    torch.manual_seed(seed % 2**32)
    side = trained(build(kind))
    x, tokens, mask = batch()
    mask = mask[:, torch.randperm(TOKENS)]
    changed = torch.where(mask[..., None], tokens, padding)

    def run(values: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        given = (x.clone().requires_grad_(), values.clone().requires_grad_())
        found = side.forward_tokens(*given, mask)
        loss = found.embeddings.square().sum() + found.tokens.sin().sum()
        gradients = torch.autograd.grad(loss, [*given, *side.parameters()])
        return found.embeddings.detach(), found.tokens.detach(), list(gradients)

    first, second = run(tokens), run(changed)

    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not first[1][~mask].any()
    assert not first[2][1][~mask].any()
    for one, other in zip(first[2], second[2], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_more_padding_changes_nothing(kind: str) -> None:
    side = trained(build(kind))
    x, tokens, mask = batch()
    plain = side.forward_tokens(x, tokens, mask)
    wider = side.forward_tokens(
        x,
        torch.cat([tokens, torch.full((3, 4, D), torch.nan)], 1),
        torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], 1),
    )

    torch.testing.assert_close(wider.embeddings, plain.embeddings, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(wider.tokens[:, :TOKENS], plain.tokens, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_in_another_order_give_the_same_in_that_order(kind: str) -> None:
    side = trained(build(kind))
    x, tokens, mask = batch()
    order = torch.randperm(TOKENS)
    plain = side.forward_tokens(x, tokens, mask)
    moved = side.forward_tokens(x, tokens[:, order], mask[:, order])

    torch.testing.assert_close(moved.embeddings, plain.embeddings, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(moved.tokens, plain.tokens[:, order], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ROW_BY_ROW)
def test_a_token_goes_through_the_same_map_as_an_embedding(kind: str) -> None:
    side = trained(build(kind))
    x, tokens, mask = batch()
    found = side.forward_tokens(x, tokens, mask)

    assert torch.equal(found.embeddings, side(x))
    torch.testing.assert_close(found.tokens[1, 1], side(tokens[1, 1:2])[0])


def test_a_transformer_lets_embedding_and_tokens_see_each_other() -> None:
    side = trained(build("transformer"))
    x, tokens, mask = batch()
    plain = side.forward_tokens(x, tokens, mask)
    other_token = tokens.clone()
    other_token[1, 0] += 1
    other_x = x.clone()
    other_x[1] += 1

    embeddings = side.forward_tokens(x, other_token, mask).embeddings
    own = side.forward_tokens(other_x, tokens, mask).tokens
    assert not torch.allclose(embeddings[1], plain.embeddings[1])
    assert torch.equal(embeddings[0], plain.embeddings[0])
    assert not torch.allclose(own[1, 0], plain.tokens[1, 0])
    torch.testing.assert_close(plain.embeddings[2], side(x)[2])  # an item without tokens


def test_a_transformer_takes_tokens_of_any_width_and_any_shared_width() -> None:
    shape = SideShape("transformer", D, 7, hidden=HIDDEN, token_width=3, layers=1)
    side = build_side(shape)
    mean, weight = torch.randn(D) / 4, torch.randn(7, D)
    side.start_from(mean, weight)
    x, _, mask = batch()
    found = side.eval().forward_tokens(x, torch.randn(3, TOKENS, 3), mask)
    expected = (unit_inputs(x, signed_sqrt=False) - mean) @ weight.T

    torch.testing.assert_close(found.embeddings, expected, atol=1e-6, rtol=1e-6)
    assert found.tokens.shape == (3, TOKENS, 7)
    assert isinstance(side, Transformer)
    assert Transformer(SideShape("transformer", D, W)).token_path is None


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_without_gradients_agrees_with_the_training_path(kind: str) -> None:
    side = trained(build(kind))
    x, tokens, mask = batch()
    with torch.inference_mode():
        quick = side.forward_tokens(x, tokens, mask)
    slow = side.train().forward_tokens(x, tokens, mask)

    torch.testing.assert_close(slow.embeddings, quick.embeddings, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(slow.tokens, quick.tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@given(scale=st.floats(0.01, 1e4))
def test_an_embeddings_norm_is_of_no_meaning(kind: str, scale: float) -> None:
    side = trained(build(kind))
    x = torch.randn(2, D)

    torch.testing.assert_close(side(scale * x), side(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_moves_what_is_trained_and_nothing_frozen(kind: str) -> None:
    side = trained(build(kind))
    x, tokens, mask = batch()
    noisy, plain = (side.forward_tokens(x, tokens, mask, noise) for noise in (0.5, 0.0))
    frozen = kind == "identity"

    assert torch.equal(noisy.embeddings, plain.embeddings) is frozen
    assert torch.equal(noisy.tokens, plain.tokens) is frozen


def test_noise_has_the_given_norm_and_follows_torchs_generator() -> None:
    side, x = build_side(SideShape("linear", 512, 4)), torch.randn(100, 512)
    torch.manual_seed(5)
    noise = side.inputs(x, 0.5) - side.inputs(x)
    torch.manual_seed(5)

    assert float(noise.square().sum(1).mean()) ** 0.5 == pytest.approx(0.5, rel=0.02)
    torch.testing.assert_close(side.inputs(x, 0.5) - side.inputs(x), noise)


@pytest.mark.parametrize("kind", ["mlp", "glu", "low-rank", "transformer"])
def test_dropout_is_for_training_alone(kind: str) -> None:
    side = trained(build(kind, dropout=0.5))
    x = torch.randn(9, D)

    assert torch.equal(side(x), side(x))
    side.train()
    assert not torch.equal(side(x), side(x))


@pytest.mark.parametrize("kind", MAPPING)
def test_square_roots_are_taken_by_kinds_that_map(kind: str) -> None:
    x = torch.rand(5, D)
    shape = SideShape(kind, D, W, hidden=HIDDEN, signed_sqrt=True)
    side = trained(build_side(shape))
    plain = build_side(SideShape(kind, D, W, hidden=HIDDEN))
    plain.load_state_dict(side.state_dict())

    torch.testing.assert_close(side(x), plain.eval()(x.sqrt()))


@pytest.mark.parametrize("kind", ["low-rank", "identity"])
@pytest.mark.parametrize(("root", "scaled"), [(True, False), (False, True)])
def test_kinds_that_keep_the_embeddings_refuse_to_change_them(
    kind: str, root: bool, scaled: bool
) -> None:
    with pytest.raises(ShapeError, match=f"{kind}: starts at the encoder's own"):
        build_side(SideShape(kind, D, D, signed_sqrt=root, scaled=scaled))


@pytest.mark.parametrize("kind", ROW_BY_ROW)
def test_tokens_of_another_width_are_refused_with_both_widths(kind: str) -> None:
    with pytest.raises(ShapeError, match=f"{kind}: .* tokens are 3 wide and embeddings 6"):
        build(kind, token_width=3)


@pytest.mark.parametrize("kind", ["low-rank", "identity"])
def test_another_shared_width_is_refused_by_kinds_that_keep_theirs(kind: str) -> None:
    with pytest.raises(ShapeError, match=f"{kind}: keeps .* width of 6, .* space is 4 wide"):
        build_side(SideShape(kind, D, W))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"layers": 0},
        {"layers": 10**6},
        {"hidden": 2**40},
        {"token_width": 0},
        {"dropout": 1.0},
    ],
)
def test_impossible_shapes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="no adapter has this shape"):
        SideShape("linear", D, W, **wrong)  # type: ignore[arg-type]


def test_sides_of_two_widths_are_refused() -> None:
    shapes = {Modality.IMAGE: SideShape("linear", D, 3), Modality.TEXT: SideShape("linear", D, 2)}

    with pytest.raises(ShapeError, match="image side maps to width 3, the text side to 2"):
        Adapter(shapes)


def test_embedded_tokens_are_unit_rows_and_zero_where_there_are_none() -> None:
    shapes = {
        Modality.IMAGE: SideShape("transformer", D, W, hidden=HIDDEN, token_width=3),
        Modality.TEXT: SideShape("linear", D, W),
    }
    adapter = Adapter(shapes)
    x, _, mask = batch()
    tokens = np.where(mask[..., None], torch.randn(3, TOKENS, 3), np.nan).astype(np.float16)
    rows, own = adapter.embed_tokens(Modality.IMAGE, x.numpy(), tokens, mask.numpy())

    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(own, axis=-1), mask, atol=1e-6)
    assert not adapter.training


@pytest.mark.parametrize(
    ("side", "tokens", "mask", "message"),
    [
        (Modality.IMAGE, (3, 2, 9), (3, 2), r"shape \(3, 2, 9\) .* tokens of width 6"),
        (Modality.IMAGE, (3, 6), (3, 2), r"shape \(3, 6\) .* tokens of width 6"),
        (Modality.TEXT, (3, 2, 6), (3, 2), "the adapter takes tokens of width None"),
        (Modality.IMAGE, (3, 2, 6), (3, 4), r"mask of shape \(3, 4\) do not fit"),
        (Modality.IMAGE, (2, 2, 6), (2, 2), "3 embeddings, tokens of shape"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    side: Modality, tokens: tuple[int, ...], mask: tuple[int, int], message: str
) -> None:
    adapter = Adapter(
        {
            Modality.IMAGE: SideShape("mlp", D, W, token_width=D),
            Modality.TEXT: SideShape("mlp", D, W),
        }
    )

    with pytest.raises(ShapeError, match=message):
        adapter.embed_tokens(side, np.ones((3, D)), np.ones(tokens), np.ones(mask, np.bool_))
