"""What the toolkit asks of an encoder, whoever made it."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from csalign.enums import Modality
from csalign.store.manifest import EncoderInfo

Floats = npt.NDArray[np.floating[Any]]


class Embedded(NamedTuple):
    """What an encoder makes of n images or texts.

    Attributes:
        embeddings: (n, d) float32, not normalised.
        tokens: n arrays (t_i, d_t) float32 of the last layer, without class token, special tokens
            and padding; None where none were asked for.
    """

    embeddings: Floats
    tokens: list[Floats] | None


class Encoder(Protocol):
    """A frozen pair of an image and a text encoder."""

    @property
    def batch_size(self) -> int:
        """How many images or texts go through a forward pass."""

    def info(self, modality: Modality) -> EncoderInfo:
        """What made the embeddings of one side, for the manifest."""

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Turn an RGB image into (3, h, w) float32; may be called from several threads."""

    def embed_images(self, pixels: torch.Tensor) -> Embedded:
        """Embed one batch of preprocessed images, (n, 3, h, w) float32 on the CPU."""

    def embed_texts(self, texts: Sequence[str]) -> Embedded:
        """Embed one or more texts, in as many batches as they need, in their order."""
