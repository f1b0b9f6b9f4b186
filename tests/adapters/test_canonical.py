import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA

from csalign.adapters.canonical import PairMoments, is_non_negative
from csalign.adapters.model import Adapter, SideShape, unit_inputs
from csalign.enums import Modality

RNG = np.random.default_rng(0)
LATENT = RNG.normal(size=(400, 4))
IMAGES = (LATENT @ RNG.normal(size=(4, 10)) + 0.3 * RNG.normal(size=(400, 10))).astype(np.float32)
TEXTS = (LATENT @ RNG.normal(size=(4, 7)) + 0.3 * RNG.normal(size=(400, 7))).astype(np.float32)
ROWS = np.arange(400)
PLAIN = (False, False)


def moments(weights: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None) -> PairMoments:
    given = np.ones(400) if weights is None else weights
    return PairMoments.of(IMAGES, TEXTS, (ROWS, ROWS), given, PLAIN)


def unit(values: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> torch.Tensor:
    return unit_inputs(torch.from_numpy(values), signed_sqrt=False)


def test_moments_equal_numpys_weighted_covariances() -> None:
    weights = RNG.random(400)
    found = moments(weights)
    joint = np.cov(unit(IMAGES).T, unit(TEXTS).T, aweights=weights, bias=True)

    np.testing.assert_allclose(found.cov_xx, joint[:10, :10], atol=1e-7)
    np.testing.assert_allclose(found.cov_xy, joint[:10, 10:], atol=1e-7)
    np.testing.assert_allclose(found.cov_yy, joint[10:, 10:], atol=1e-7)


def test_without_ridge_the_directions_have_sklearns_canonical_correlations() -> None:
    (form,) = moments().cca(ridge=1e-9, powers=(0.0,), width=4)
    x = (unit(IMAGES) - form.image_mean) @ form.image_weight.T
    y = (unit(TEXTS) - form.text_mean) @ form.text_weight.T
    found = [np.corrcoef(x[:, k], y[:, k])[0, 1] for k in range(4)]
    reference = CCA(n_components=4, tol=1e-9, max_iter=10_000)
    a, b = reference.fit_transform(unit(IMAGES).numpy(), unit(TEXTS).numpy())
    expected = [np.corrcoef(a[:, k], b[:, k])[0, 1] for k in range(4)]

    assert found == pytest.approx(expected, abs=1e-3)


def test_a_caption_that_counts_twice_is_the_same_as_its_row_twice() -> None:
    twice = np.ones(400)
    twice[:50] = 2
    rows = np.concatenate([ROWS, ROWS[:50]])
    (weighted,) = moments(twice).cca(ridge=1.0, powers=(1.0,), width=3)
    repeated = PairMoments.of(IMAGES, TEXTS, (rows, rows), np.ones(450), PLAIN)
    (expected,) = repeated.cca(ridge=1.0, powers=(1.0,), width=3)

    # A direction's sign is free, so compare the similarity that the maps give.
    np.testing.assert_allclose(
        weighted.image_weight.T @ weighted.text_weight,
        expected.image_weight.T @ expected.text_weight,
        atol=1e-5,
    )


def test_the_power_scales_directions_by_their_correlation() -> None:
    plain, emphasised = moments().cca(ridge=1.0, powers=(0.0, 1.0), width=4)
    ratio = (emphasised.image_weight / plain.image_weight).mean(1)

    assert (ratio[:-1] > ratio[1:]).all()


def test_constant_features_give_finite_maps() -> None:
    flat = np.ones((50, 6), np.float32)
    found = PairMoments.of(flat, flat, (ROWS[:50], ROWS[:50]), np.ones(50), PLAIN)
    (form,) = found.cca(ridge=1.0, powers=(1.0,), width=3)

    assert torch.isfinite(form.image_weight).all()
    assert torch.isfinite(form.text_weight).all()


def test_centred_features_keep_their_geometry_and_lose_the_centroid_gap() -> None:
    shifted = (IMAGES[:, :7] + 5).astype(np.float32)
    form = PairMoments.of(shifted, TEXTS, (ROWS, ROWS), np.ones(400), PLAIN).centred()
    moved = (unit(shifted) - form.image_mean) @ form.image_weight.T

    np.testing.assert_allclose(moved.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(moved, unit(shifted) - unit(shifted).mean(0), atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_adapters_start_exactly_at_the_closed_form(kind: str) -> None:
    (form,) = moments().cca(ridge=1.0, powers=(1.0,), width=4)
    shapes = {
        Modality.IMAGE: SideShape(kind, 10, 4),  # type: ignore[arg-type]
        Modality.TEXT: SideShape(kind, 7, 4),  # type: ignore[arg-type]
    }
    adapter = Adapter(shapes)
    adapter.image.start_from(form.image_mean, form.image_weight)
    expected = (unit(IMAGES) - form.image_mean) @ form.image_weight.T

    torch.testing.assert_close(adapter.eval().image(torch.from_numpy(IMAGES)), expected)


def test_the_square_root_is_for_features_without_negative_values() -> None:
    assert is_non_negative(np.abs(IMAGES))
    assert not is_non_negative(IMAGES)
    roots = unit_inputs(torch.tensor([[4.0, -9.0, 0.0]]), signed_sqrt=True)

    torch.testing.assert_close(roots, torch.tensor([[2.0, -3.0, 0.0]]) / 13**0.5)
