from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import wasserstein_distance

from csalign.core.enums import Modality
from csalign.evaluation.agreement import (
    Agreement,
    Sample,
    linear_cka,
    measure_agreement,
    one_per_image,
    random_axes,
    sliced_wasserstein,
)

Array = npt.NDArray[Any]

RNG = np.random.default_rng(0)
LATENT = RNG.normal(size=(600, 12))
IMAGES = (LATENT @ RNG.normal(size=(12, 64)) + 0.5 * RNG.normal(size=(600, 64))).astype(np.float32)
TEXTS = (LATENT @ RNG.normal(size=(12, 48)) + 0.5 * RNG.normal(size=(600, 48))).astype(np.float32)


def agreement(
    images: Array, texts: Array, unpaired: Mapping[Modality, Array] | None = None
) -> Agreement:
    found = measure_agreement(Sample(images, texts, unpaired or {}))
    assert found is not None
    return found


def test_cka_equals_the_kernel_form_and_is_1_for_a_rotation() -> None:
    x, y = (torch.from_numpy(rows[:50] - rows[:50].mean(0)) for rows in (IMAGES, TEXTS))
    centre = torch.eye(50) - 1 / 50
    k, other = (centre @ (rows @ rows.T) @ centre for rows in (x, y))
    expected = float((k * other).sum() / (k.norm() * other.norm()))
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.manual_seed(0)))[0]

    assert linear_cka(x, y) == pytest.approx(expected, abs=1e-5)
    assert linear_cka(x, 3 * x @ rotation) == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, x * 0) == 0


def test_mutual_neighbours_are_those_of_a_loop() -> None:
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (IMAGES, TEXTS)]
    centred = [rows - rows.mean(0) for rows in unit]
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in centred]
    near = []
    for rows in unit:
        scores = rows @ rows.T
        np.fill_diagonal(scores, -2)
        near.append([set(row[:10]) for row in np.argsort(-scores, axis=1)])
    expected = np.mean([len(a & b) / 10 for a, b in zip(*near, strict=True)])

    assert agreement(IMAGES, TEXTS).mutual_knn == pytest.approx(expected, abs=1e-3)


def test_sliced_wasserstein_is_the_mean_of_scipys_distances() -> None:
    x, y = torch.from_numpy(IMAGES[:300]), torch.from_numpy(IMAGES[300:] + 0.3)
    axes = random_axes(64, seed=3)
    projected = zip((x @ axes).T, (y @ axes).T, strict=True)
    expected = np.mean([wasserstein_distance(a.numpy(), b.numpy()) for a, b in projected])

    assert sliced_wasserstein(x, y, axes) == pytest.approx(expected, rel=1e-5)
    assert sliced_wasserstein(x, x.flip(0), axes) == 0


def test_shuffled_pairs_are_called_random() -> None:
    found = agreement(IMAGES, TEXTS[::-1])

    assert found.is_random
    assert found.mutual_knn == pytest.approx(found.mutual_knn_chance, abs=4 / 600)
    assert next(found.findings()).startswith("the pairs look random")
    assert not [*agreement(IMAGES, TEXTS).findings()]
    assert agreement(IMAGES, IMAGES).mutual_knn == 1


def test_a_direction_that_hides_the_agreement_is_named() -> None:
    axis = np.eye(64, dtype=np.float32)[0] + 0.5
    loud = IMAGES + 40 * RNG.normal(size=(600, 1)).astype(np.float32) * axis / 8
    plain, found = agreement(IMAGES, TEXTS), agreement(loud, TEXTS)
    [line] = found.findings()

    assert found.top_energy[Modality.IMAGE] > 0.25 > plain.top_energy[Modality.IMAGE]
    assert found.removal[Modality.IMAGE] > found.mutual_knn
    assert "of the variance of images" in line
    assert "without it" in line


@pytest.mark.parametrize("side", Modality)
def test_unpaired_rows_from_elsewhere_are_named_and_like_ones_are_not(side: Modality) -> None:
    paired = {Modality.IMAGE: IMAGES, Modality.TEXT: TEXTS}[side]
    like, far = paired[400:], paired[400:] + 4.0
    images, texts = IMAGES[:400], TEXTS[:400]
    near, shifted = (agreement(images, texts, {side: own}) for own in (like, far))

    assert not [*near.findings()]
    assert near.sliced_wasserstein[side].value < 2 * near.sliced_wasserstein[side].noise
    [line] = shifted.findings()
    assert line.startswith(f"the unpaired {side.plural} lie far from the paired ones")


def test_figures_of_a_known_spectrum() -> None:
    signs = np.array([[(n >> bit) & 1 for bit in range(9)] for n in range(512)]) * 2.0 - 1
    rows = signs.astype(np.float32)  # nine directions of equal variance
    found = agreement(rows, rows)

    assert found.effective_rank[Modality.IMAGE] == pytest.approx(9, abs=1e-3)
    assert found.top_energy[Modality.TEXT] == pytest.approx(1 / 9, abs=1e-3)
    assert found.mean_energy[Modality.IMAGE] == pytest.approx(0, abs=1e-6)
    assert agreement(rows + 3, rows).mean_energy[Modality.IMAGE] == pytest.approx(0.9, abs=0.02)
    assert found.cka == pytest.approx(1)


def test_one_text_of_each_image_is_chosen_and_one_of_each_caption() -> None:
    text_image = np.array([0, 0, 1, -1, 2, 2, 2, 3])
    keys = np.array([0, 1, 0, 3, 4, 4, 4, 7])
    rng = np.random.default_rng(0)

    chosen = one_per_image(text_image, None, 10, rng)
    assert sorted(text_image[chosen]) == [0, 1, 2, 3]
    chosen = one_per_image(text_image, keys, 10, rng)
    assert len(np.unique(keys[chosen])) == len(chosen)
    assert len(one_per_image(text_image, None, 2, rng)) == 2
