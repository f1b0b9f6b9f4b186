"""The adapters: small maps that take each modality into one shared space."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from csalign.enums import Modality
from csalign.errors import ShapeError

Kind = Literal["linear", "mlp"]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SideShape:
    """Everything that a side's adapter is built from, beside its weights.

    Attributes:
        kind: "linear", or "mlp" for the same plus a residual MLP.
        input_width: of the frozen encoder's embeddings.
        width: of the shared space.
        hidden: hidden width of the MLP; of no meaning for "linear".
        dropout: in the MLP, while training.
        signed_sqrt: whether sign(x) sqrt(|x|) is taken first, which evens out the few large
            activations of non-negative (ReLU-pooled) features.
    """

    kind: Kind
    input_width: int
    width: int
    hidden: int = 1024
    dropout: float = 0.3
    signed_sqrt: bool = False

    def __post_init__(self) -> None:
        """Refuse what no adapter can be built from, such as a damaged description."""
        if min(self.input_width, self.width, self.hidden) < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"no adapter has this shape: {self}")


class SideAdapter(nn.Module):
    """The adapter of one side: unit rows, centred, then linear (+ residual MLP).

    z = W u + b + MLP(sqrt(d) u) with u = normalise(sqrt?(x)) - mean. The linear path can hold the
    closed form exactly; the MLP starts at zero beside it, so that training starts from there.

    Args:
        shape: what to build.
    """

    mean: Tensor

    def __init__(self, shape: SideShape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("mean", torch.zeros(shape.input_width))
        self.projection = nn.Linear(shape.input_width, shape.width)
        self.residual: nn.Sequential | None = None
        if shape.kind == "mlp":
            self.residual = nn.Sequential(
                nn.Linear(shape.input_width, shape.hidden),
                nn.GELU(),
                nn.Dropout(shape.dropout),
                nn.Linear(shape.hidden, shape.width),
            )

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """Map raw embeddings into the shared space.

        Args:
            x: (n, input_width), any float dtype, any norm but 0.
            noise: norm of the Gaussian noise added to the unit rows, for training.

        Returns:
            (n, width) float32, not normalised.
        """
        u = unit_inputs(x, signed_sqrt=self.shape.signed_sqrt) - self.mean
        root = self.shape.input_width**0.5
        if noise:
            u = u + torch.randn_like(u) * (noise / root)
        z: Tensor = self.projection(u)
        return z if self.residual is None else z + self.residual(root * u)

    def start_from(self, mean: Tensor, weight: Tensor) -> None:
        """Set the linear path to a closed form and silence the MLP.

        Args:
            mean: (input_width,) of the unit rows.
            weight: (width, input_width).
        """
        with torch.no_grad():
            self.mean.copy_(mean)
            self.projection.weight.copy_(weight)
            self.projection.bias.zero_()
            if self.residual is not None:
                last = self.residual[-1]
                assert isinstance(last, nn.Linear)
                last.weight.zero_()
                last.bias.zero_()


class Adapter(nn.Module):
    """The adapters of both sides.

    Args:
        shapes: of each side; both have one shared width.
    """

    def __init__(self, shapes: Mapping[Modality, SideShape]) -> None:
        super().__init__()
        self.image = SideAdapter(shapes[Modality.IMAGE])
        self.text = SideAdapter(shapes[Modality.TEXT])

    def side(self, modality: Modality) -> SideAdapter:
        """The adapter of one side."""
        return self.image if modality is Modality.IMAGE else self.text

    def parameter_counts(self) -> dict[str, int]:
        """Trainable parameters by side."""
        return {
            side.value: sum(p.numel() for p in self.side(side).parameters() if p.requires_grad)
            for side in Modality
        }

    @torch.inference_mode()
    def embed(self, modality: Modality, embeddings: Array, *, batch_size: int = 8_192) -> Array:
        """Aligned embeddings of one side.

        Args:
            modality: which side the embeddings come from.
            embeddings: (n, input_width), any float dtype, finite, no row of norm 0.
            batch_size: rows at a time.

        Returns:
            (n, width) float32, unit rows.

        Raises:
            ShapeError: the width is not the one that the adapter was trained on.
        """
        side = self.side(modality)
        if embeddings.ndim != 2 or embeddings.shape[1] != side.shape.input_width:
            raise ShapeError(
                f"{modality} embeddings have shape {embeddings.shape}, the adapter takes width "
                f"{side.shape.input_width}; use the encoder that it was trained on"
            )
        self.eval()
        out = np.empty((len(embeddings), side.shape.width), np.float32)
        for start in range(0, len(embeddings), batch_size):
            rows = to_tensor(embeddings[start : start + batch_size], side.mean.device)
            out[start : start + batch_size] = normalize(side(rows), dim=1).cpu().numpy()
        return out


def unit_inputs(x: Tensor, *, signed_sqrt: bool) -> Tensor:
    """Rows as the linear path sees them before centring: (n, d) float32, norm 1."""
    x = x.float()
    if signed_sqrt:
        x = x.sign() * x.abs().sqrt()
    return normalize(x, dim=1)


def to_tensor(values: Array, device: torch.device) -> Tensor:
    """A float32 tensor on a device; the cast from float16 happens there."""
    # A read-only array (Arrow's memory) must be copied before torch may share it.
    return torch.from_numpy(np.array(values)).to(device).float()
