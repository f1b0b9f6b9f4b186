"""Kinds that stay in the encoder's own space."""

import torch
from torch import Tensor, nn

from csalign.adapters.linear import silence
from csalign.adapters.side import SideAdapter, SideShape
from csalign.core.errors import ShapeError


class _Square(SideAdapter):
    keeps_width = True

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        if shape.signed_sqrt:
            raise ShapeError(
                f"{shape.kind}: starts at the encoder's own embeddings, so it cannot take their "
                "square roots; use another kind"
            )

    def _require_identity(self, weight: Tensor) -> None:
        if not torch.equal(weight.cpu(), torch.eye(self.shape.width)):
            raise ValueError(f"{self.shape.kind}: starts from the identity alone")


class LowRank(_Square):
    """z = u + B A u + b with u = normalise(x) - mean, B = 0 and b = 0 at the start."""

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        self.down = nn.Linear(shape.input_width, shape.rank, bias=False)
        # Of a unit row this makes components around 1, at which the usual rates learn.
        nn.init.normal_(self.down.weight)
        self.dropout = nn.Dropout(shape.dropout)
        self.up = nn.Linear(shape.rank, shape.width)
        silence(self.up)

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        u = self.inputs(x, noise)
        z: Tensor = u + self.up(self.dropout(self.down(u)))
        return z

    def start_from(self, mean: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """See `SideAdapter.start_from`; takes the identity with any mean and bias."""
        self._require_identity(weight)
        silence(self.up)
        with torch.no_grad():
            self.mean.copy_(mean)
            if bias is not None:
                self.up.bias.copy_(bias)


class Identity(_Square):
    """z = normalise(x): the side stays frozen, for what was built on its embeddings.

    It is not centred, since a decoder of these embeddings wants them where they are, and takes no
    noise, since it learns nothing.
    """

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`; the noise is not used."""
        return self.inputs(x)

    def start_from(self, mean: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """See `SideAdapter.start_from`; takes the identity without mean and bias."""
        self._require_identity(weight)
        if mean.any() or (bias is not None and bias.any()):
            raise ValueError(f"{self.shape.kind}: cannot be moved")
