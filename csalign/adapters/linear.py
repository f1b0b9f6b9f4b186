"""Kinds with a linear path, alone or with a residual beside it that starts at zero."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from csalign.adapters.side import SideAdapter, SideShape


class Linear(SideAdapter):
    """z = W u + b with u = normalise(sqrt?(x)) - mean: any closed form, exactly."""

    accepts_closed_form = True
    accepts_output_map = True

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        self.projection = nn.Linear(shape.input_width, shape.width)

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        z: Tensor = self.projection(self.inputs(x, noise))
        return z

    def start_from(self, mean: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """See `SideAdapter.start_from`; takes any map."""
        with torch.no_grad():
            self.mean.copy_(mean)
            self.projection.weight.copy_(weight)
            self.projection.bias.copy_(torch.zeros(self.shape.width) if bias is None else bias)

    def then(self, weight: Tensor, bias: Tensor) -> None:
        """See `SideAdapter.then`."""
        follow(self.projection, weight)
        with torch.no_grad():
            self.projection.bias.add_(bias)


class Mlp(Linear):
    """The linear path plus MLP(sqrt(d) u), which a closed form silences."""

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        self.residual = nn.Sequential(
            nn.Linear(shape.input_width, shape.hidden),
            nn.GELU(),
            nn.Dropout(shape.dropout),
            nn.Linear(shape.hidden, shape.width),
        )

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        u = self.inputs(x, noise)
        z: Tensor = self.projection(u) + self.residual(self.shape.input_width**0.5 * u)
        return z

    def start_from(self, mean: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """See `SideAdapter.start_from`; takes any map."""
        super().start_from(mean, weight, bias)
        silence(self.residual[-1])

    def then(self, weight: Tensor, bias: Tensor) -> None:
        """See `SideAdapter.then`."""
        super().then(weight, bias)
        follow(self.residual[-1], weight)


class Glu(Linear):
    """The linear path plus W3 (silu(W1 v) * W2 v) with v = sqrt(d) u and W3 = 0 at the start."""

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        self.gate = nn.Linear(shape.input_width, shape.hidden)
        self.value = nn.Linear(shape.input_width, shape.hidden)
        self.dropout = nn.Dropout(shape.dropout)
        self.out = nn.Linear(shape.hidden, shape.width)
        silence(self.out)

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        u = self.inputs(x, noise)
        v = self.shape.input_width**0.5 * u
        z: Tensor = self.projection(u) + self.out(self.dropout(silu(self.gate(v)) * self.value(v)))
        return z

    def start_from(self, mean: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """See `SideAdapter.start_from`; takes any map."""
        super().start_from(mean, weight, bias)
        silence(self.out)

    def then(self, weight: Tensor, bias: Tensor) -> None:
        """See `SideAdapter.then`."""
        super().then(weight, bias)
        follow(self.out, weight)


def silence(layer: nn.Module) -> None:
    """Set a layer's weight and bias to 0, so that it gives 0 until it is trained."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def follow(layer: nn.Module, weight: Tensor) -> None:
    """Make a linear layer compute weight z of what are its outputs z now."""
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(weight @ layer.weight)
        layer.bias.copy_(weight @ layer.bias)
