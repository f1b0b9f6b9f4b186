"""The heads of other methods, as csalign's adapters; used by ``peers.py``.

Sizes come from the settings: ``hidden``, ``layers`` and ``dropout``. Every head sees unit rows
times the square root of their width, since what its own paper feeds it is not of unit norm either.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu6

from csalign.adapters.side import SideAdapter, SideShape


class ShareLock(SideAdapter):
    """`layers` times linear, batch norm, ReLU and dropout; then linear to the shared width."""

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        blocks: list[nn.Module] = []
        width = shape.input_width
        for _ in range(shape.layers):
            blocks += [nn.Linear(width, shape.hidden), nn.BatchNorm1d(shape.hidden)]
            blocks += [nn.ReLU(), nn.Dropout(shape.dropout)]
            width = shape.hidden
        self.head = nn.Sequential(*blocks, nn.Linear(width, shape.width))

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        z: Tensor = self.head(self.shape.input_width**0.5 * self.inputs(x, noise))
        return z


class Sail(SideAdapter):
    """W3 (ReLU6(W1 h) * W2 h) with h the layer norm of the input."""

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        self.norm = nn.LayerNorm(shape.input_width)
        self.gate = nn.Linear(shape.input_width, shape.hidden)
        self.value = nn.Linear(shape.input_width, shape.hidden)
        self.dropout = nn.Dropout(shape.dropout)
        self.out = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        h = self.norm(self.shape.input_width**0.5 * self.inputs(x, noise))
        z: Tensor = self.out(self.dropout(relu6(self.gate(h)) * self.value(h)))
        return z


class FuseMix(SideAdapter):
    """`layers` residual blocks of the input's width, then layer norm and linear."""

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        width = shape.input_width
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, shape.hidden),
                nn.GELU(),
                nn.Dropout(shape.dropout),
                nn.Linear(shape.hidden, width),
            )
            for _ in range(shape.layers)
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, shape.width))

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        v = self.shape.input_width**0.5 * self.inputs(x, noise)
        for block in self.blocks:
            v = v + block(v)
        z: Tensor = self.out(v)
        return z
