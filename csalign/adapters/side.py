"""The base class of every adapter, which maps the embeddings of one side, and its inputs."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from csalign.core.arrays import Array
from csalign.core.errors import ShapeError

MAX_SIZE = 2**20  # beyond any real width; a damaged description cannot ask for all memory
MAX_LAYERS = 64
CHUNK_ROWS = 8_192
LOUD = 10.0  # encoders' own embeddings reach 3
MOST = 0.9
LOUD_ROWS = 20_000
LOUD_ROUNDS = 5


class Rows(Protocol):
    """Embeddings (n, d) in memory or on disk; indexing gives an array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, d)."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> Any: ...


def unit_inputs(x: Tensor, *, signed_sqrt: bool, scale: Tensor | None = None) -> Tensor:
    """Normalise raw rows (..., d), after sign(x) sqrt(|x|) if asked, times a scale (d,) if given.

    The result is float32, before centring.
    """
    x = x.float()
    if signed_sqrt:
        # MKL takes ten times as long for the root of 0, which half the values after a ReLU are.
        x = x.sign() * x.abs().clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    return normalize(x if scale is None else x * scale, dim=-1)


@dataclass(frozen=True, eq=False)
class UnitRows:
    """Function of the raw rows of a side: `unit_inputs` on the CPU, with these options."""

    signed_sqrt: bool = False
    scale: Tensor | None = None

    def __call__(self, rows: Array) -> Tensor:
        """Return unit rows (n, d) float32, of an array of any float dtype."""
        x = to_tensor(rows, torch.device("cpu"))
        return unit_inputs(x, signed_sqrt=self.signed_sqrt, scale=self.scale)


def loud_scale(rows: Rows, *, signed_sqrt: bool) -> Tensor | None:
    """Find factors that scale loud dimensions down, so that unit rows show the others too.

    A dimension is loud if its standard deviation over the unit rows is more than `LOUD` times that
    of most others (their 90th percentile, so that the decaying spectrum of principal components
    is none); it is scaled down to theirs. Constant dimensions do not count.

    Args:
        rows: (n, d), of which at most `LOUD_ROWS` are read.
        signed_sqrt: as in `unit_inputs`, before the scale.

    Returns:
        (d,) float32, 1 where a dimension is not loud; None if none is.
    """
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), LOUD_ROWS)).astype(np.int64)
    x = to_tensor(rows[chosen], torch.device("cpu"))
    scale, is_loud = torch.ones(x.shape[1]), torch.zeros(x.shape[1], dtype=torch.bool)
    for _ in range(LOUD_ROUNDS):  # a loud dimension makes the others' deviations uncertain
        deviations = unit_inputs(x, signed_sqrt=signed_sqrt, scale=scale).std(0, correction=0)
        varying = deviations[deviations > 0]
        most = varying.quantile(MOST) if len(varying) else torch.tensor(torch.inf)
        is_loud |= deviations > LOUD * most
        if not is_loud.any():
            break
        scale[is_loud] *= (most / deviations[is_loud]).clamp(max=1)  # never up again
    return scale if is_loud.any() else None


def to_tensor(values: Array, device: torch.device) -> Tensor:
    """Copy an array into a float32 tensor on a device; the cast from float16 happens there."""
    # A read-only array (Arrow's memory) must be copied before torch may share it.
    own = torch.from_numpy(np.array(values))
    if device.type == "cuda":
        return own.pin_memory().to(device, non_blocking=True).float()
    return own.to(device).float()


def mean_square(rows: Rows) -> float:
    """Compute the mean squared norm of rows (n, d), n >= 1, read in chunks."""
    starts = range(0, len(rows), CHUNK_ROWS)
    chunks = (np.asarray(rows[start : start + CHUNK_ROWS], np.float64) for start in starts)
    return sum(float(np.square(chunk).sum()) for chunk in chunks) / len(rows)


@dataclass(frozen=True)
class SideShape:
    """Everything that the adapter of one side is built from, apart from its weights.

    Attributes:
        kind: a name in `csalign.adapters.model.KINDS`, the name of an entry point in the group
            ``csalign.adapters``, or ``package.module:Class``.
        input_width: of the frozen encoder's embeddings.
        width: of the shared space.
        hidden: hidden width of "mlp", "glu" and the blocks of "transformer".
        dropout: in those and in "low-rank", during training.
        signed_sqrt: take sign(x) sqrt(|x|) first, which evens out the few large activations of
            non-negative (ReLU-pooled) features.
        scaled: whether the dimensions have a scale; see `loud_scale`.
        token_width: of the tokens that come with the embeddings; None if there are none.
        rank: of the update of "low-rank".
        layers: blocks of "transformer".
        landmarks: of "kernel".
        parts: of "parts", in order; their widths sum to `width`. Of "mapped" the one that is.

    Raises:
        ValueError: a size is out of range.
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
    landmarks: int = 1
    parts: tuple["SideShape", ...] = ()
    scaled: bool = False

    @property
    def title(self) -> str:
        """The kind for people; of "parts", that of each."""
        if self.kind == "mapped":
            return f"{self.parts[0].title}, mapped"
        if self.parts:
            return " + ".join(part.title for part in self.parts)
        return f"kernel ({self.landmarks:,} landmarks)" if self.kind == "kernel" else self.kind

    def __post_init__(self) -> None:
        """Check the sizes."""
        sizes = [self.input_width, self.width, self.hidden, self.rank, self.landmarks]
        sizes += [] if self.token_width is None else [self.token_width]
        sizes_fit = min(sizes) >= 1 and max(sizes) <= MAX_SIZE
        if not (sizes_fit and 1 <= self.layers <= MAX_LAYERS and 0 <= self.dropout < 1):
            raise ValueError(f"no adapter has this shape: {self}")
        if self.kind in ("parts", "mapped"):
            widths = [part.width for part in self.parts]
            fits = len(widths) == 1 if self.kind == "mapped" else sum(widths) == self.width
            if not fits or any(part.input_width != self.input_width for part in self.parts):
                raise ValueError(f"no parts have this shape together: {self}")


class Aligned(NamedTuple):
    """Embeddings and their tokens in the shared space, float32, not normalised."""

    embeddings: Tensor  # (n, width)
    tokens: Tensor  # (n, t, width), 0 at padded positions


class SideAdapter(nn.Module):
    """The adapter of one side; a custom kind is a subclass with a `forward`.

    It is built from a `SideShape` alone, keeps everything it learns in its state dict, treats rows
    independently of each other, and its output does not depend on the norm of a row. The README of
    this package has an example.

    Attributes:
        accepts_closed_form: whether `start_from` accepts any linear map.
        accepts_output_map: whether `then` is implemented.
        keeps_width: whether the shared space must be as wide as the embeddings of this side.
        projects_tokens: whether tokens may have another width than the embeddings.
        mean: (input_width,) float32 that `inputs` subtracts; 0 unless `start_from` sets it.
        scale: (input_width,) float32 that `inputs` multiplies raw rows by; None unless scaled.

    Raises:
        ShapeError: the kind does not support that shape.
    """

    accepts_closed_form: ClassVar[bool] = False
    accepts_output_map: ClassVar[bool] = False
    keeps_width: ClassVar[bool] = False
    projects_tokens: ClassVar[bool] = False
    mean: Tensor
    scale: Tensor | None

    def __init__(self, shape: SideShape) -> None:
        super().__init__()
        self.check(shape)
        self.shape = shape
        self.register_buffer("mean", torch.zeros(shape.input_width))
        self.register_buffer("scale", torch.ones(shape.input_width) if shape.scaled else None)

    @classmethod
    def check(cls, shape: SideShape) -> None:
        """Raise ShapeError if this kind does not support a shape; builds nothing."""
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
        """Return whether embeddings may depend on tokens: the kind defines `forward_tokens`."""
        return cls.forward_tokens is not SideAdapter.forward_tokens

    @property
    def embeds_with_tokens(self) -> bool:
        """True if an embedding needs its tokens: the kind mixes them in and was built for some."""
        return self.shape.token_width is not None and self.mixes_tokens()

    def unit(self, x: Tensor) -> Tensor:
        """Return the unit rows, (n, input_width) float32, that `inputs` centres."""
        return unit_inputs(x, signed_sqrt=self.shape.signed_sqrt, scale=self.scale)

    def inputs(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """Return unit rows minus the mean, plus noise of that norm, (n, input_width) float32."""
        u = self.unit(x) - self.mean
        if noise:
            u = u + torch.randn_like(u) * (noise / self.shape.input_width**0.5)
        return u

    def set_scale(self, scale: Tensor) -> None:
        """Set the scale (input_width,) of a side that was built as scaled, and of its parts."""
        for part in self.modules():
            if isinstance(part, SideAdapter) and part.scale is not None:
                part.scale.copy_(scale)

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """Map raw embeddings into the shared space.

        Args:
            x: (n, input_width), any float dtype, any norm but 0.
            noise: expected norm of the Gaussian noise added to the unit rows, for training.

        Returns:
            (n, width) float32, not normalised.
        """
        raise NotImplementedError

    def forward_tokens(
        self, x: Tensor, tokens: Tensor, mask: Tensor, noise: float = 0.0
    ) -> Aligned:
        """Map embeddings and their tokens; by default each token like an embedding.

        A kind that overrides this mixes tokens into the embedding; trained with tokens, it is
        always called with them.

        Args:
            x: (n, input_width), as in `forward`.
            tokens: (n, t, token_width), any float dtype; padding may hold anything, even NaN.
            mask: (n, t) bool, true where there is a token.
            noise: as in `forward`, on tokens too.
        """
        return Aligned(self(x, noise), map_tokens(self, tokens, mask, noise))

    def start_from(self, mean: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """Make the adapter compute z = weight (u - mean) + bias of the unit rows u.

        Args:
            mean: (input_width,) of the unit rows.
            weight: (width, input_width).
            bias: (width,); 0 by default.

        Raises:
            ValueError: the kind cannot compute that map; see `accepts_closed_form`.
        """
        raise ValueError(f"{self.shape.kind}: starts from no closed form")

    def then(self, weight: Tensor, bias: Tensor) -> None:
        """Append an affine map: replace the outputs z by weight z + bias.

        Args:
            weight: (width, width).
            bias: (width,).

        Raises:
            ValueError: the kind does not support it; see `accepts_output_map`.
        """
        raise ValueError(f"{self.shape.kind}: takes no map of its outputs")


def map_tokens(side: SideAdapter, tokens: Tensor, mask: Tensor, noise: float) -> Tensor:
    """Map tokens (n, t, d) where the mask (n, t) is true; 0 elsewhere. (n, t, w)."""
    if mask.device.type == "cpu":
        rows = side(tokens[mask], noise)
        padded: Tensor = rows.new_zeros(*mask.shape, rows.shape[-1])
        padded[mask] = rows
        return padded
    # To count the tokens the host would wait for the device, so padding is mapped too.
    filled = tokens.masked_fill(~mask[..., None], 1.0).flatten(0, 1)
    found: Tensor = side(filled, noise).unflatten(0, mask.shape)
    return found.masked_fill(~mask[..., None], 0.0)
