import numpy as np
import pytest
import scipy.linalg
import torch

from csalign.metrics.gap import cmmd, image_distances


def sets(n: int = 60, m: int = 45, d: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(d, d))
    x, y = rng.normal(size=(n, d)) @ mix + 1, rng.normal(size=(m, d)) * 2 - 0.3
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y.astype(np.float32))


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root))


def direct_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Row by row, as the formula says."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[np.exp(-((p - q) ** 2).sum() / 200) for q in b] for p in a]))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_figures_are_those_of_independent_code() -> None:
    x, y = sets()
    found = image_distances(x, y)
    plain = [rows.double().numpy() for rows in (x, y)]
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in plain]

    assert found["frechet"] == pytest.approx(frechet(*plain), rel=1e-6)
    assert found["frechet_unit"] == pytest.approx(frechet(*units), rel=1e-6)
    assert found["cmmd"] == pytest.approx(direct_mmd(*units), rel=1e-8)
    assert found["frechet"] > 2 * found["frechet_unit"]


def test_equal_sets_are_at_no_distance() -> None:
    x, _ = sets()
    for value in image_distances(x, x.flip(0)).values():
        assert value == pytest.approx(0, abs=1e-5)


def test_cmmd_of_two_points_is_the_formulas() -> None:
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])

    assert cmmd(one, other) == pytest.approx(2000 * (1 - np.exp(-2 / 200)), rel=1e-10)
