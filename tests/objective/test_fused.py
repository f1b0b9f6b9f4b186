import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.enums import Precision
from csalign.core.errors import ShapeError
from csalign.objective.fused import fused_terms
from csalign.objective.kernels import Sigma, log_mean_kernels
from csalign.objective.pairwise import infonce
from csalign.objective.tiles import supports_bfloat16

Terms = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def rows(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def plain(
    pairs: int, sigma: Sigma | None, smoothing: float = 0.0, negatives: tuple[int, int] = (0, 0)
) -> Terms:
    def terms(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        value = x.new_zeros(())
        if pairs:
            value = infonce(
                x[:pairs],
                y[:pairs],
                logit_scale=scale,
                label_smoothing=smoothing,
                negatives=(x[pairs:][: negatives[0]], y[pairs:][: negatives[1]]),
            )
        if sigma is None:
            return value, x.new_zeros(1, 0)
        sets = ((x, x), (y, y), (x, y))
        return value, torch.stack([log_mean_kernels(a, b, sigma=sigma) for a, b in sets])

    return terms


def tiled(
    pairs: int,
    sigma: Sigma | None,
    smoothing: float = 0.0,
    tile: int = 16,
    negatives: tuple[int, int] = (0, 0),
    is_bounded: bool = True,
) -> Terms:
    def terms(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        found = fused_terms(
            x,
            y,
            pairs=pairs,
            logit_scale=scale,
            max_scale=float(scale.detach()) if is_bounded else None,
            sigma=sigma,
            label_smoothing=smoothing,
            tile=tile,
            negatives=negatives,
        )
        return found.infonce, found.log_means

    return terms


def values_and_gradients(terms: Terms, x: Tensor, y: Tensor, scale: float) -> list[Tensor]:
    """Of the terms, of InfoNCE alone and of all terms with weights of either sign."""
    inputs = x.clone().requires_grad_(), y.clone().requires_grad_(), x.new_tensor(scale)
    inputs[2].requires_grad_()
    value, means = terms(normalize(inputs[0], dim=1), normalize(inputs[1], dim=1), inputs[2])
    weights = torch.linspace(-0.7, 1.3, means.numel(), dtype=x.dtype).reshape(means.shape)
    total = 0.8 * value + (weights * means).sum()
    gradients = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    return [value.detach(), means.detach(), *gradients]


SIGMAS = [None, 0.5, (0.2, 0.6, 1.5)]


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize(
    ("n", "m", "pairs"), [(40, 40, 40), (45, 33, 33), (37, 50, 20), (16, 16, 16)]
)
@pytest.mark.parametrize("tile", [7, 16, 512])
def test_equals_the_plain_formulas_in_value_and_gradient(
    sigma: Sigma | None, n: int, m: int, pairs: int, tile: int
) -> None:
    x, y = rows(n, 5, 0), rows(m, 5, 1, 0.3)
    found = values_and_gradients(tiled(pairs, sigma, tile=tile), x, y, 7.0)
    expected = values_and_gradients(plain(pairs, sigma), x, y, 7.0)

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("negatives", [(9, 0), (0, 14), (11, 6), (25, 30)])
@pytest.mark.parametrize("scale", [7.0, 90.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_negatives_equal_the_plain_formula(
    sigma: Sigma | None, negatives: tuple[int, int], scale: float, smoothing: float
) -> None:
    x, y = rows(45, 5, 0), rows(50, 5, 1, 0.3)
    found = values_and_gradients(tiled(20, sigma, smoothing, 8, negatives), x, y, scale)
    expected = values_and_gradients(plain(20, sigma, smoothing, negatives), x, y, scale)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sigma", SIGMAS[1:])
def test_without_pairs_there_are_kernels_alone(sigma: Sigma) -> None:
    x, y = rows(21, 5, 0), rows(34, 5, 1, 0.3)
    found = values_and_gradients(tiled(0, sigma), x, y, 7.0)
    expected = values_and_gradients(plain(0, sigma), x, y, 7.0)

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [0.5, 30.0, 100.0, 400.0])
@pytest.mark.parametrize("sigma", [0.05, 0.15, 3.0, (0.02, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("is_bounded", [True, False])
def test_no_scale_and_no_bandwidth_overflows_or_vanishes(
    scale: float, sigma: Sigma, dtype: torch.dtype, is_bounded: bool
) -> None:
    # Of opposite sides: every cross kernel underflows, and so would every exponential of a logit.
    x, y = rows(40, 6, 0, 2.0).to(dtype), rows(40, 6, 1, -2.0).to(dtype)
    found = values_and_gradients(tiled(40, sigma, is_bounded=is_bounded), x, y, scale)
    expected = values_and_gradients(plain(40, sigma), x.double(), y.double(), scale)

    accurate = dtype == torch.float64
    for one, other in zip(found, expected, strict=True):
        assert torch.isfinite(one).all()
        atol = float(other.abs().max()) * (1e-9 if accurate else 5e-4)
        torch.testing.assert_close(one.double(), other, rtol=1e-9 if accurate else 1e-3, atol=atol)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_float32_is_close_at_training_size(sigma: Sigma | None) -> None:
    x, y = rows(700, 64, 0), rows(700, 64, 1, 0.3)
    found = values_and_gradients(tiled(700, sigma, tile=512), x.float(), y.float(), 14.0)
    expected = values_and_gradients(plain(700, sigma), x, y, 14.0)

    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        error = (one - other).abs().max() if other.numel() else torch.zeros(())
        assert error <= 1e-5 * max(1e-3, float(other.abs().amax() if other.numel() else 0))


def test_label_smoothing_is_that_of_the_plain_formula() -> None:
    x, y = rows(40, 5, 0), rows(40, 5, 1)
    found = values_and_gradients(tiled(40, 0.5, smoothing=0.2), x, y, 7.0)
    expected = values_and_gradients(plain(40, 0.5, smoothing=0.2), x, y, 7.0)

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [1, 24])
def test_rows_that_are_all_alike_are_no_exception(n: int) -> None:
    x = rows(1, 5, 0).expand(n, -1)
    found = values_and_gradients(tiled(n, 0.3), x, x, 7.0)

    assert float(found[0]) == pytest.approx(math.log(n), abs=1e-12)
    assert found[1].flatten().tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    for gradient in found[2:]:
        assert float(gradient.abs().max()) < 1e-12


@pytest.mark.parametrize("sigma", SIGMAS)
def test_one_side_may_be_frozen(sigma: Sigma | None) -> None:
    x, y = normalize(rows(40, 5, 0), dim=1), rows(40, 5, 1)
    gradients: list[Tensor] = []
    for terms in (tiled(40, sigma), plain(40, sigma)):
        trained = y.clone().requires_grad_()
        value, means = terms(x, normalize(trained, dim=1), torch.tensor(7.0))
        gradients += torch.autograd.grad(value + means.sum(), trained)

    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.5, (0.3, 0.5)])
def test_a_graph_that_is_kept_gives_the_same_gradient_again(sigma: Sigma) -> None:
    x, y = (normalize(rows(40, 5, k), dim=1).requires_grad_() for k in (0, 1))
    value, means = tiled(40, sigma)(x, y, torch.tensor(7.0))
    total = value + means.sum()
    first = torch.autograd.grad(total, (x, y), retain_graph=True)
    second = torch.autograd.grad(total, (x, y))

    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)


def test_kernels_do_not_change_a_bit_of_infonce() -> None:
    x, y = (normalize(rows(70, 8, k), dim=1).float() for k in (0, 1))
    extra = normalize(rows(30, 8, 2), dim=1).float()
    alone, _ = tiled(70, None)(x, y, torch.tensor(7.0))
    beside, _ = tiled(70, 0.5)(x, torch.cat([y, extra]), torch.tensor(7.0))

    assert torch.equal(alone, beside)


def test_half_precision_rows_are_computed_in_float32() -> None:
    x, y = (normalize(rows(40, 8, k), dim=1).bfloat16().requires_grad_() for k in (0, 1))
    value, means = tiled(40, 0.5)(x, y, torch.tensor(7.0))
    (value + means.sum()).backward()  # type: ignore[no-untyped-call]
    expected, _ = tiled(40, 0.5)(x.float(), y.float(), torch.tensor(7.0))

    assert torch.equal(value, expected)
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_rounded_products_are_near_and_leave_the_setting_alone() -> None:
    x, y = (normalize(rows(300, 64, k), dim=1).float() for k in (0, 1))
    settings: Any = torch.backends.mkldnn
    before = settings.matmul.fp32_precision
    found, exact = (
        fused_terms(x, y, pairs=300, logit_scale=7.0, sigma=0.5, precision=precision)
        for precision in (Precision.BFLOAT16, Precision.FLOAT32)
    )

    torch.testing.assert_close(found.infonce, exact.infonce, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.log_means, exact.log_means, rtol=1e-2, atol=1e-2)
    assert settings.matmul.fp32_precision == before


def test_bfloat16_where_it_is_not_supported_warns_and_computes_in_float32(
    caplog: pytest.LogCaptureFixture,
) -> None:
    supports_bfloat16.cache_clear()

    assert not supports_bfloat16("mps")
    assert "computes in float32; bfloat16 needs" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", Precision)
def test_a_cuda_device_gives_the_numbers_of_the_cpu(precision: Precision) -> None:
    found = []
    for device in ("cpu", "cuda"):
        x, y = (rows(300, 64, k).float().to(device) for k in (0, 1))
        half = precision if device == "cuda" else Precision.FLOAT32

        def terms(x: Tensor, y: Tensor, scale: Tensor, half: Precision = half) -> Any:
            return fused_terms(
                x, y, pairs=280, logit_scale=scale, sigma=(0.5, 1.0), precision=half, tile=128
            )

        found.append([value.cpu() for value in values_and_gradients(terms, x, y, 7.0)])
    for one, other in zip(*found, strict=True):
        tolerance = 1e-4 if precision is Precision.FLOAT32 else 2e-2
        assert (one - other).abs().max() <= tolerance * max(1e-3, float(one.abs().max()))


def test_what_does_not_fit_is_refused() -> None:
    x = rows(4, 5, 0)
    with pytest.raises(ShapeError):
        fused_terms(x, rows(4, 6, 1), pairs=4, logit_scale=1.0, sigma=0.5)
    with pytest.raises(ValueError, match="5 pairs"):
        fused_terms(x, x, pairs=5, logit_scale=1.0, sigma=0.5)
    with pytest.raises(ValueError, match="sigma"):
        fused_terms(x, x, pairs=4, logit_scale=1.0, sigma=-1.0)
    with pytest.raises(ValueError, match="label_smoothing"):
        fused_terms(x, x, pairs=4, logit_scale=1.0, sigma=0.5, label_smoothing=2.0)


@pytest.mark.parametrize("scale", [7.0, 60.0])
def test_compiled_tiles_compute_the_same(scale: float) -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        x, y = (normalize(torch.randn(n, 16), dim=1).requires_grad_() for n in (280, 300))
        terms = fused_terms(
            x, y, pairs=280, logit_scale=scale, sigma=(0.5, 1.0), tile=150, compiled=compiled
        )
        torch.autograd.backward(terms.infonce + terms.log_means.sum())
        found.append([terms.infonce.detach(), terms.log_means.detach(), x.grad, y.grad])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6)
