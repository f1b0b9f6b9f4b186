"""What every adapter of one side is, whoever wrote it."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from csalign.adapters.inputs import unit_inputs
from csalign.core.errors import ShapeError

MAX_SIZE = 2**20  # nobody's width; keeps a damaged description from asking for all memory
MAX_LAYERS = 64


@dataclass(frozen=True)
class SideShape:
    """Everything that a side's adapter is built from, beside its weights.

    Attributes:
        kind: a name in `csalign.adapters.kinds.KINDS`, of an entry point of the group
            ``csalign.adapters``, or ``package.module:Class``.
        input_width: of the frozen encoder's embeddings.
        width: of the shared space.
        hidden: hidden width of "mlp", "glu" and of the blocks of "transformer".
        dropout: in those and in "low-rank", while training.
        signed_sqrt: whether sign(x) sqrt(|x|) is taken first, which evens out the few large
            activations of non-negative (ReLU-pooled) features.
        token_width: of the tokens that will come with the embeddings; None for none.
        rank: of the change that "low-rank" makes.
        layers: blocks of "transformer".
    """

    kind: str
    input_width: int
    width: int
    hidden: int = 1024
    dropout: float = 0.3
    signed_sqrt: bool = False
    token_width: int | None = None
    rank: int = 8
    layers: int = 2

    def __post_init__(self) -> None:
        """Refuse what no adapter can be built from, such as a damaged description."""
        sizes = [self.input_width, self.width, self.hidden, self.rank]
        if self.token_width is not None:
            sizes.append(self.token_width)
        sizes_fit = min(sizes) >= 1 and max(sizes) <= MAX_SIZE
        if not (sizes_fit and 1 <= self.layers <= MAX_LAYERS and 0 <= self.dropout < 1):
            raise ValueError(f"no adapter has this shape: {self}")


class Aligned(NamedTuple):
    """Embeddings and their tokens in the shared space.

    Attributes:
        embeddings: (n, width) float32, not normalised.
        tokens: (n, t, width) float32, not normalised; 0 where there is no token.
    """

    embeddings: Tensor
    tokens: Tensor


class SideAdapter(nn.Module):
    """The adapter of one side. A kind of your own is a subclass with a `forward`.

    It is built from a `SideShape` alone, keeps everything it learns in its state dict, treats rows
    independently of each other, and its output does not depend on a row's norm::

        class Bottleneck(SideAdapter):
            def __init__(self, shape: SideShape) -> None:
                super().__init__(shape)
                self.down = nn.Linear(shape.input_width, 32)
                self.up = nn.Linear(32, shape.width)

            def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
                return self.up(self.down(self.inputs(x, noise)).relu())

    Name it in an entry point of the group ``csalign.adapters``, or by ``package.module:Class``.

    Args:
        shape: what to build.

    Attributes:
        accepts_closed_form: whether `start_from` takes any linear map.
        accepts_output_map: whether there is a `then`.
        keeps_width: whether the shared space has to be as wide as this side's embeddings.
        projects_tokens: whether tokens may have another width than the embeddings.
        mean: (input_width,) float32 that `inputs` subtracts; 0 unless `start_from` sets it.

    Raises:
        ShapeError: the kind cannot be of that shape.
    """

    accepts_closed_form: ClassVar[bool] = False
    accepts_output_map: ClassVar[bool] = False
    keeps_width: ClassVar[bool] = False
    projects_tokens: ClassVar[bool] = False
    mean: Tensor

    def __init__(self, shape: SideShape) -> None:
        super().__init__()
        self.check(shape)
        self.shape = shape
        self.register_buffer("mean", torch.zeros(shape.input_width))

    @classmethod
    def check(cls, shape: SideShape) -> None:
        """Raise ShapeError if this kind cannot be of that shape; builds nothing."""
        if shape.token_width not in (None, shape.input_width) and not cls.projects_tokens:
            raise ShapeError(
                f"{shape.kind}: takes tokens as wide as the embeddings, but tokens are "
                f"{shape.token_width} wide and embeddings {shape.input_width}; store projected "
                "tokens, or use the kind transformer, which projects tokens itself"
            )
        if cls.keeps_width and shape.input_width != shape.width:
            raise ShapeError(
                f"{shape.kind}: keeps the embeddings' width of {shape.input_width}, but the shared "
                f"space is {shape.width} wide; make them equal, or use another kind"
            )

    @classmethod
    def mixes_tokens(cls) -> bool:
        """Whether an embedding may depend on its tokens: the kind has its own `forward_tokens`."""
        return cls.forward_tokens is not SideAdapter.forward_tokens

    @property
    def embeds_with_tokens(self) -> bool:
        """Whether an embedding needs its tokens: the kind mixes them in and was built for some."""
        return self.shape.token_width is not None and self.mixes_tokens()

    def inputs(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """Unit rows minus the mean, with Gaussian noise of that norm; (n, input_width) float32."""
        u = unit_inputs(x, signed_sqrt=self.shape.signed_sqrt) - self.mean
        if noise:
            u = u + torch.randn_like(u) * (noise / self.shape.input_width**0.5)
        return u

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """Map raw embeddings into the shared space.

        Args:
            x: (n, input_width), any float dtype, any norm but 0.
            noise: norm of the Gaussian noise added to the unit rows, for training.

        Returns:
            (n, width) float32, not normalised.
        """
        raise NotImplementedError

    def forward_tokens(
        self, x: Tensor, tokens: Tensor, mask: Tensor, noise: float = 0.0
    ) -> Aligned:
        """Map embeddings and their tokens; by default each token as if it were an embedding.

        A kind that has its own is taken to mix tokens into the embedding: where it was trained
        with tokens, it is only ever called with them.

        Args:
            x: (n, input_width), as in `forward`.
            tokens: (n, t, token_width), any float dtype; anything, even NaN, where there is none.
            mask: (n, t) bool, true where there is a token.
            noise: as in `forward`, on tokens too.
        """
        return Aligned(self(x, noise), spread(self(tokens[mask], noise), mask))

    def start_from(self, mean: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """Make the adapter compute z = weight (u - mean) + bias of the unit rows u.

        Args:
            mean: (input_width,) of the unit rows.
            weight: (width, input_width).
            bias: (width,); 0 by default.

        Raises:
            ValueError: the kind cannot be that map; see `accepts_closed_form`.
        """
        raise ValueError(f"{self.shape.kind}: starts from no closed form")

    def then(self, weight: Tensor, bias: Tensor) -> None:
        """Make the adapter compute weight z + bias of what are its outputs z now.

        Args:
            weight: (width, width).
            bias: (width,).

        Raises:
            ValueError: the kind cannot; see `accepts_output_map`.
        """
        raise ValueError(f"{self.shape.kind}: takes no map of its outputs")


def spread(rows: Tensor, mask: Tensor) -> Tensor:
    """The rows (k, w) where the mask (n, t) is true, in order; 0 elsewhere. (n, t, w)."""
    padded = rows.new_zeros(*mask.shape, rows.shape[-1])
    padded[mask] = rows
    return padded
