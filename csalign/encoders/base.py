"""The interface of encoders, csalign's own and third-party."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from csalign.core.enums import Modality
from csalign.features.manifest import EncoderInfo

Floats = npt.NDArray[np.floating[Any]]


class Embedded(NamedTuple):
    """Embeddings of n images or texts.

    Attributes:
        embeddings: (n, d) float32, not normalised.
        tokens: n arrays (t_i, d_t) float32 of the last layer, without class token, special tokens
            and padding; None where none were requested.
    """

    embeddings: Floats
    tokens: list[Floats] | None


class ImageEncoder(Protocol):
    """A frozen image encoder."""

    @property
    def batch_size(self) -> int:
        """Batch size of a forward pass."""

    @property
    def info(self) -> EncoderInfo:
        """Record of the encoder for the manifest."""

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Turn an RGB image into (3, h, w) float32; may be called from several threads."""

    def embed(self, pixels: torch.Tensor) -> Embedded:
        """Embed one batch of preprocessed images, (n, 3, h, w) float32 on the CPU."""


class TextEncoder(Protocol):
    """A frozen text encoder."""

    @property
    def batch_size(self) -> int:
        """Batch size of a forward pass."""

    @property
    def info(self) -> EncoderInfo:
        """Record of the encoder for the manifest."""

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Embed one or more texts in batches, in their order."""


@dataclass(frozen=True)
class EncoderOptions:
    """How to run encoders.

    Attributes:
        device: to run on.
        precision: of the forward pass: "float32", "float16", "bfloat16"; "auto" is float32 on the
            CPU and float16 elsewhere.
        batch_size: items per forward pass (None: 32 on the CPU, 256 elsewhere).
        tokens: sides whose last-layer tokens are returned beside the embeddings.
        token_space: "hidden" after the last norm, "projected" times the encoder's projection too.
        max_tokens: most tokens per item; None keeps all. Grids of image tokens are pooled to
            k x k, texts are truncated.
        compile: whether to run the networks through torch.compile.
    """

    device: torch.device
    precision: str = "auto"
    batch_size: int | None = None
    tokens: Collection[Modality] = ()
    token_space: Literal["hidden", "projected"] = "projected"
    max_tokens: int | None = None
    compile: bool = False


class Encoders(NamedTuple):
    """The encoders of both sides, None for a side that is skipped."""

    image: ImageEncoder | None
    text: TextEncoder | None

    def side(self, modality: Modality) -> ImageEncoder | TextEncoder | None:
        """Return the encoder of one side."""
        return self.image if modality is Modality.IMAGE else self.text
