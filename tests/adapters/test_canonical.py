import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import Ridge

from csalign.adapters.canonical import PairMoments, is_non_negative
from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape, unit_inputs
from csalign.core.enums import Modality

RNG = np.random.default_rng(0)
LATENT = RNG.normal(size=(400, 4))
IMAGES = (LATENT @ RNG.normal(size=(4, 10)) + 0.3 * RNG.normal(size=(400, 10))).astype(np.float32)
TEXTS = (LATENT @ RNG.normal(size=(4, 7)) + 0.3 * RNG.normal(size=(400, 7))).astype(np.float32)
ROWS = np.arange(400)


def moments(weights: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None) -> PairMoments:
    given = np.ones(400) if weights is None else weights
    return PairMoments.of(IMAGES, TEXTS, (ROWS, ROWS), given)


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
    repeated = PairMoments.of(IMAGES, TEXTS, (rows, rows), np.ones(450))
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
    found = PairMoments.of(flat, flat, (ROWS[:50], ROWS[:50]), np.ones(50))
    (form,) = found.cca(ridge=1.0, powers=(1.0,), width=3)

    assert torch.isfinite(form.image_weight).all()
    assert torch.isfinite(form.text_weight).all()


def test_centred_features_keep_their_geometry_and_lose_the_centroid_gap() -> None:
    shifted = (IMAGES[:, :7] + 5).astype(np.float32)
    form = PairMoments.of(shifted, TEXTS, (ROWS, ROWS), np.ones(400)).centred()
    moved = (unit(shifted) - form.image_mean) @ form.image_weight.T

    np.testing.assert_allclose(moved.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(moved, unit(shifted) - unit(shifted).mean(0), atol=1e-6)


@pytest.mark.parametrize("to", Modality)
@pytest.mark.parametrize("ridge", [0.01, 3.0])
def test_ridge_regression_predicts_the_frozen_rows_as_sklearns_does(
    to: Modality, ridge: float
) -> None:
    weights = RNG.random(400)
    form = moments(weights).ridge(to, ridge)
    x, y = unit(IMAGES).numpy(), unit(TEXTS).numpy()
    mean, weight, bias = form.image_mean, form.image_weight, form.image_bias
    frozen = form.text_mean, form.text_weight, form.text_bias
    if to is Modality.IMAGE:
        x, y = y, x
        mean, weight, bias, frozen = (
            form.text_mean,
            form.text_weight,
            form.text_bias,
            (form.image_mean, form.image_weight, form.image_bias),
        )
    share = weights / weights.sum()
    alpha = ridge * np.trace(np.cov(x.T, aweights=weights, bias=True)) / x.shape[1]
    reference = Ridge(alpha=alpha, solver="cholesky").fit(x, y, sample_weight=share)
    assert bias is not None

    np.testing.assert_allclose(
        (x - mean.numpy()) @ weight.T.numpy() + bias.numpy(), reference.predict(x), atol=1e-5
    )
    assert not frozen[0].any()
    assert torch.equal(frozen[1], torch.eye(y.shape[1]))
    assert frozen[2] is None


def test_ridge_regression_to_a_centred_side_predicts_its_centred_rows() -> None:
    found = moments()
    plain, centred = found.ridge(Modality.TEXT, 1.0), found.ridge(Modality.TEXT, 1.0, centre=True)

    assert torch.equal(centred.image_weight, plain.image_weight)
    assert torch.equal(centred.text_mean, found.mean_y.float())
    assert torch.equal(centred.image_mean, plain.image_mean)
    assert centred.image_bias is None


@pytest.mark.parametrize("to", Modality)
def test_features_can_be_moved_onto_the_mean_of_a_frozen_side(to: Modality) -> None:
    images = unit_inputs(torch.from_numpy(IMAGES[:, :7] + 5), signed_sqrt=False)
    texts = unit(TEXTS)
    form = PairMoments.of(images.numpy(), TEXTS, (ROWS, ROWS), np.ones(400)).centred(to)
    adapter = Adapter(
        {
            side: SideShape("identity" if side is to else "low-rank", 7, 7, rank=2)
            for side in Modality
        }
    ).eval()
    adapter.start_from(form)
    aligned = {Modality.IMAGE: adapter.image(images), Modality.TEXT: adapter.text(texts)}
    own = unit_inputs(texts if to is Modality.TEXT else images, signed_sqrt=False)

    means = [rows.mean(0) for rows in aligned.values()]
    torch.testing.assert_close(*means, atol=1e-5, rtol=0)
    assert torch.equal(aligned[to], own)


def test_the_square_root_is_for_features_without_negative_values() -> None:
    assert is_non_negative(np.abs(IMAGES))
    assert not is_non_negative(IMAGES)
    roots = unit_inputs(torch.tensor([[4.0, -9.0, 0.0]]), signed_sqrt=True)

    torch.testing.assert_close(roots, torch.tensor([[2.0, -3.0, 0.0]]) / 13**0.5)
