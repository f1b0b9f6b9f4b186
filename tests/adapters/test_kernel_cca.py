"""Kernel CCA against independent code and against what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from sklearn.kernel_ridge import KernelRidge
from torch.nn.functional import normalize

from csalign.adapters.canonical import PairMoments
from csalign.adapters.kernel_cca import (
    BLOCK_ROWS,
    MAX_COMPONENTS,
    KernelCca,
    KernelPairs,
    KernelSetting,
)
from csalign.adapters.model import build_side
from csalign.adapters.side import SideAdapter, SideShape
from csalign.core.enums import Modality

TEXT, IMAGE = Modality.TEXT, Modality.IMAGE
PLAIN = {IMAGE: build_side(SideShape("linear", 6, 6)), TEXT: build_side(SideShape("linear", 8, 6))}


def curved(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw unit rows of images, linear in a latent, and of texts, a curved function of it."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n, 4))
    images = latent @ np.random.default_rng(1).normal(size=(4, 6))
    texts = np.concatenate([np.abs(latent), np.cos(2 * latent)], 1)
    noise = [0.05 * rng.normal(size=side.shape) for side in (images, texts)]
    first, second = (
        normalize(torch.from_numpy(side + own).float(), dim=1)
        for side, own in zip((np.abs(images), texts), noise, strict=True)
    )
    return first, second


def pairs(linear: torch.Tensor, kernel: torch.Tensor, weights: object = None) -> KernelPairs:
    n = len(linear)
    return KernelPairs(
        linear, kernel, np.arange(n), np.ones(n) if weights is None else np.asarray(weights)
    )


def outputs(
    sides: dict[Modality, SideAdapter], images: torch.Tensor, texts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return sides[IMAGE](images), sides[TEXT](texts)


def recall(images: torch.Tensor, texts: torch.Tensor) -> float:
    scores = normalize(images, dim=1) @ normalize(texts, dim=1).T
    return float((scores.argmax(1) == torch.arange(len(scores))).float().mean())


def test_correlations_are_those_of_the_generalised_eigenproblem() -> None:
    images, texts = curved(80)
    gamma, ridge, other = 0.7, 0.5, 0.2
    fit = KernelCca(pairs(images, texts), gamma, TEXT, 0, PLAIN)
    (_, sides), *_ = fit.candidates((ridge,), (other,), (1.0,))
    x = (images - images.mean(0)).double().numpy()
    rows = normalize(texts - texts.mean(0), dim=1).double().numpy()
    centre = np.eye(80) - 1 / 80
    kernel = centre @ np.exp(-gamma * np.square(rows[:, None] - rows).sum(-1)) @ centre / 80
    covariance = x.T @ x / 80
    level = ridge * np.trace(kernel) / 80
    hat = kernel @ np.linalg.inv(kernel + level * np.eye(80))
    whole = covariance + other * np.trace(covariance) / 6 * np.eye(6)
    values = eigh(x.T @ hat @ x / 80, whole, eigvals_only=True)[::-1][:3]
    # The covariance of both sides in a direction: its correlation cubed at power 1.
    found = outputs(sides, images, texts)
    inner = (found[0] * found[1]).mean(0)[:3].double().numpy()
    spread = inner / np.linalg.norm(inner)
    expected = values**1.5
    assert spread == pytest.approx(expected / np.linalg.norm(expected), abs=1e-4)


def test_blocks_average_the_predictions_of_separate_regressions() -> None:
    n = BLOCK_ROWS + 600
    images, texts = curved(n)
    fit = KernelCca(pairs(images, texts), 1.0, TEXT, 0, PLAIN)
    (_, sides), *_ = fit.candidates((1.0,), (1e-6,), (0.0,))
    order = np.random.default_rng(0).permutation(n)
    rows = normalize(texts - texts.mean(0), dim=1).double().numpy()
    x = (images - images.mean(0)).double().numpy()
    expected = np.zeros((50, 6))
    for block in np.array_split(order, 2):
        kernel = np.exp(-np.square(rows[block][:, None] - rows[block][None]).sum(-1))
        size = len(block)
        means = kernel.mean(0)
        centred = kernel - means - means[:, None] + kernel.mean()
        own = KernelRidge(alpha=np.trace(centred) / size, kernel="precomputed")
        own.fit(centred, x[block] - x[block].mean(0))
        new = np.exp(-np.square(rows[:50, None] - rows[block][None]).sum(-1))
        new = new - new.mean(1, keepdims=True) - means + kernel.mean()
        expected += (own.predict(new) + x[block].mean(0)) / 2
    # Both are the same up to the invertible map to the shared space.
    found = outputs(sides, images[:50], texts[:50])[1].double().numpy()
    solved = np.linalg.lstsq(found, expected, rcond=None)[0]
    assert found @ solved == pytest.approx(expected, abs=1e-4)


def test_left_out_outputs_have_the_moments_of_new_rows() -> None:
    images, texts = curved(400)
    new = curved(2_000, seed=5)
    setting = KernelSetting(side=TEXT, gamma=1.5, ridge=0.03, other_ridge=0.1, power=1.0)
    fit = KernelCca(pairs(images, texts), setting.gamma, TEXT, 0, PLAIN)
    (_, plain), *_ = fit.candidates((setting.ridge,), (setting.other_ridge,), (1.0,))
    matched = fit.fit(setting)

    def distance(sides: dict[Modality, SideAdapter]) -> float:
        x, y = (torch.cov(normalize(own, dim=1).T) for own in outputs(sides, *new))
        return float((x - y).norm())

    assert distance(matched) < 0.85 * distance(plain)


@pytest.mark.parametrize("side", Modality)
def test_a_kernel_finds_what_a_linear_map_does_not(side: Modality) -> None:
    images, texts = curved(1_000)
    held_out = curved(300, seed=7)
    if side is IMAGE:
        (images, texts), held_out = (texts, images), held_out[::-1]
    rows = (texts, images) if side is IMAGE else (images, texts)
    sides = KernelCca(
        pairs(*rows), 1.0, side, 0, {side.other: PLAIN[IMAGE], side: PLAIN[TEXT]}
    ).fit(KernelSetting(side=side, gamma=1.0, ridge=0.03, other_ridge=0.1, power=1.0))
    ones = np.arange(1_000)
    moments = PairMoments.of(images.numpy(), texts.numpy(), (ones, ones), np.ones(1_000))
    (linear,) = moments.cca(ridge=0.1, powers=(1.0,), width=6)
    flat = [
        (held_out[0] - linear.image_mean) @ linear.image_weight.T,
        (held_out[1] - linear.text_mean) @ linear.text_weight.T,
    ]
    assert recall(*outputs(sides, *held_out)) > 1.3 * recall(*flat)


def test_a_weight_of_two_is_a_repeated_pair() -> None:
    images, texts = curved(60)
    twice = torch.cat([torch.arange(60), torch.arange(20)])
    weights = np.where(np.arange(60) < 20, 2.0, 1.0)
    setting = KernelSetting(side=TEXT, gamma=1.0, ridge=0.5, other_ridge=0.5, power=1.0)
    once = KernelCca(pairs(images, texts, weights), 1.0, TEXT, 0, PLAIN)
    repeated = KernelPairs(images[twice], texts[twice], twice.numpy(), np.ones(80))
    again = KernelCca(repeated, 1.0, TEXT, 0, PLAIN)
    found = []
    for fit in (once, again):
        (_, sides), *_ = fit.candidates((setting.ridge,), (setting.other_ridge,), (1.0,))
        x, y = outputs(sides, images, texts)
        found.append(x @ y.T)
    assert found[0] == pytest.approx(found[1].numpy(), abs=1e-4)


def test_rows_are_mapped_alike_in_batches_of_any_size() -> None:
    images, texts = curved(500)
    sides = KernelCca(pairs(images, texts), 1.0, TEXT, 0, PLAIN).fit(
        KernelSetting(side=TEXT, gamma=1.0, ridge=0.01, other_ridge=0.1, power=1.0)
    )
    with torch.no_grad():
        together = normalize(sides[TEXT](texts), dim=1)
        apart = torch.cat([normalize(sides[TEXT](part), dim=1) for part in torch.split(texts, 7)])
    assert together == pytest.approx(apart.numpy(), abs=1e-6)


def test_both_sides_are_as_wide_as_their_network_beyond_the_usual_components() -> None:
    rng, width = np.random.default_rng(0), MAX_COMPONENTS + 8
    images, texts = (
        normalize(torch.from_numpy(rng.normal(size=(600, width))).float(), dim=1) for _ in range(2)
    )
    inputs = {side: build_side(SideShape("linear", width, width)) for side in Modality}
    fit = KernelCca(pairs(images, texts), 1.0, TEXT, 0, inputs)
    (_, sides), *_ = fit.candidates((1.0,), (1.0,), (1.0,))
    found = outputs(sides, images, texts)
    assert {own.shape for own in found} == {(600, width)}
    assert {side.shape.width for side in sides.values()} == {width}
