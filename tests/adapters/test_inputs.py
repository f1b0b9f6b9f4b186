import numpy as np
import pytest
import torch

from csalign.adapters.canonical import PairMoments
from csalign.adapters.model import build_side
from csalign.adapters.side import SideShape, UnitRows, loud_scale, unit_inputs

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(400, 40)).astype(np.float32)
LOUD = np.where(np.isin(np.arange(40), (3, 17)), 300, 1).astype(np.float32)


def test_no_dimension_of_even_rows_is_loud() -> None:
    spectrum = (np.arange(1, 41) ** -1.0).astype(np.float32)  # of principal components

    assert loud_scale(ROWS, signed_sqrt=False) is None
    assert loud_scale(ROWS * spectrum, signed_sqrt=False) is None
    assert loud_scale(ROWS + 50 * (LOUD > 1), signed_sqrt=False) is None  # an offset is not noise
    assert loud_scale(ROWS[:1], signed_sqrt=False) is None
    assert loud_scale(ROWS * 0 + 1, signed_sqrt=False) is None


@pytest.mark.parametrize("signed_sqrt", [False, True])
def test_loud_dimensions_are_scaled_to_the_others(signed_sqrt: bool) -> None:
    loud = LOUD**2 if signed_sqrt else LOUD
    scale = loud_scale(ROWS * loud, signed_sqrt=signed_sqrt)

    assert scale is not None
    assert (scale < 1).nonzero()[:, 0].tolist() == [3, 17]
    assert (scale[scale == 1]).numel() == 38
    unit = unit_inputs(torch.from_numpy(ROWS * loud), signed_sqrt=signed_sqrt, scale=scale)
    deviations = unit.std(0)
    assert float(deviations.max() / deviations.median()) < 2
    even = unit_inputs(torch.from_numpy(ROWS), signed_sqrt=signed_sqrt)
    assert float((unit * even).sum(1).mean()) > 0.97


def test_constant_dimensions_do_not_count() -> None:
    padded = np.concatenate([ROWS * LOUD, np.zeros((400, 500), np.float32)], axis=1)
    scale = loud_scale(padded, signed_sqrt=False)

    assert scale is not None
    assert (scale < 1).nonzero()[:, 0].tolist() == [3, 17]


@pytest.mark.parametrize("token_width", [40, 24])
def test_every_part_of_a_side_sees_scaled_rows(token_width: int) -> None:
    scale = torch.from_numpy(1 / LOUD)
    shape = SideShape("transformer", 40, 8, token_width=token_width, layers=1, hidden=8)
    plain, scaled = build_side(shape), build_side(SideShape(**{**vars(shape), "scaled": True}))
    scaled.load_state_dict(plain.state_dict(), strict=False)
    scaled.set_scale(scale)
    mask = torch.ones(400, 2, dtype=torch.bool)
    tokens = torch.from_numpy(RNG.normal(size=(400, 2, token_width)).astype(np.float32))
    loud = tokens * torch.from_numpy(LOUD) if token_width == 40 else tokens
    plain.eval(), scaled.eval()
    expected = plain.forward_tokens(torch.from_numpy(ROWS), tokens, mask)
    found = scaled.forward_tokens(torch.from_numpy(ROWS * LOUD), loud, mask)

    torch.testing.assert_close(found.embeddings, expected.embeddings)
    torch.testing.assert_close(found.tokens, expected.tokens)


def test_moments_are_those_of_the_scaled_rows() -> None:
    pairs = np.arange(400), np.arange(400)
    units = UnitRows(scale=torch.from_numpy(1 / LOUD)), UnitRows()
    plain = PairMoments.of(ROWS, ROWS, pairs, np.ones(400))
    found = PairMoments.of(ROWS * LOUD, ROWS, pairs, np.ones(400), units)

    torch.testing.assert_close(found.cov_xx, plain.cov_xx, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.cov_xy, plain.cov_xy, rtol=1e-4, atol=1e-7)


def test_loud_dimensions_with_an_offset_keep_a_finite_scale() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 32)).astype(np.float32)
    rows[:, [3, 9, 20]] *= 300
    rows[:, 3] += 5000
    scale = loud_scale(rows, signed_sqrt=False)
    assert scale is not None
    assert scale.max() <= 1
    assert (scale[[3, 9, 20]] < 0.1).all()
