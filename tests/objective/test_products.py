"""Products by oneDNN are those of torch, with their gradients."""

import pytest
import torch
from torch import nn

from csalign.objective.products import FastLinear, product


@pytest.mark.parametrize("shape", [(900, 64), (3, 300, 64), (3, 5, 64), (1, 64), (0, 64), (64,)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fast_linear_layer_is_a_linear_layer(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    fast, plain = FastLinear(64, 96, bias=bias), nn.Linear(64, 96, bias=bias)
    plain.load_state_dict(fast.state_dict())
    x, y = (torch.ones(shape).cumsum(-1).sin().requires_grad_() for _ in range(2))
    found, expected = fast(x), plain(y)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    for own, other in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_multiplies_rows_with_rows(dtype: torch.dtype) -> None:
    for rows in (30, 900):
        a, b = torch.randn(rows, 64, dtype=dtype), torch.randn(100, 64, dtype=dtype)
        torch.testing.assert_close(product(a, b), a @ b.T, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(product(a, b.T.contiguous().T), a @ b.T, rtol=1e-5, atol=1e-4)
