"""What would make a step on a GPU fail or wait is found: each fault is planted in the real path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from csalign.adapters.builtin import Glu
from csalign.adapters.side import SideShape
from tests.cuda.pretend import HostReads, pretended

WIDTH = 12
TABLE = np.ones((30, WIDTH), np.float32)


def constant(z: Tensor) -> Tensor:
    return z + torch.ones(WIDTH)


def item(z: Tensor) -> Tensor:
    return z / float(z.norm().item())


def numpy(z: Tensor) -> Tensor:
    return z + torch.from_numpy(z.detach().cpu().numpy()).to(z.device)


def gather(z: Tensor) -> Tensor:
    return z + torch.from_numpy(TABLE[np.arange(len(z))]).to(z.device)


def rows_by_numbers(z: Tensor) -> Tensor:
    return z[np.arange(len(z))[::-1].copy()]


def branch(z: Tensor) -> Tensor:
    return z if (z > 0).any() else -z


def mask(z: Tensor) -> Tensor:
    return z[z.norm(dim=1) > 0]


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return 2 * z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float(gradients[0].norm())


class _OnTheHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return 2 * z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * torch.ones(gradients[0].shape)


def backward(z: Tensor) -> Tensor:
    found: Tensor = _Backward.apply(z)
    return found


def gradient_on_the_host(z: Tensor) -> Tensor:
    found: Tensor = _OnTheHost.apply(z)
    return found


FAULTS = (
    *(constant, item, numpy, gather, rows_by_numbers, branch, mask),
    *(backward, gradient_on_the_host),
)


class Planted(Glu):
    """The default adapter with a fault in its outputs."""

    fault: Callable[[Tensor], Tensor] = staticmethod(lambda z: z)

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        return self.fault(super().forward(x, noise))


def check(fault: Callable[[Tensor], Tensor]) -> None:
    """Fail as the tests of the real path do."""
    with pretended() as reads:
        side = Planted(SideShape("glu", WIDTH, WIDTH, hidden=8)).to("cuda")
        side.fault = fault
        reads.clear()
        side(torch.randn(30, WIDTH, device="cuda"), 0.1).square().sum().backward()
    assert not reads.lines
    assert not reads.uploads


def test_without_a_fault_it_passes() -> None:
    check(lambda z: z)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails(fault: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check(fault)


def test_reads_are_named_by_their_line_on_any_device() -> None:
    z = torch.ones(3, requires_grad=True)
    with HostReads() as reads:
        backward(item(z)).sum().backward()
        torch.ones(2).sum()
    lines = {int(line.rpartition(":")[2]): count for line, count in reads.lines.items()}
    source = Path(__file__).read_text().splitlines()

    assert [source[line - 1].strip() for line in lines] == [
        "return z / float(z.norm().item())",
        "return gradients[0] * float(gradients[0].norm())",
    ]
    assert reads.total == 2


def test_the_walk_of_the_graph_gives_the_gradients_of_torch() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2))
    rows, found = torch.randn(7, 5), []
    for walks in (False, True):
        net.zero_grad()
        if walks:
            with pretended():
                net(rows).square().logsumexp(0).sum().backward()
        else:
            net(rows).square().logsumexp(0).sum().backward()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])

    torch.testing.assert_close(*found)
