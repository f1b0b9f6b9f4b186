"""What a step asks of a decoder, and what is known of the embeddings that it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class DrawOptions:
    """How images are to be made; None leaves it to the decoder's pipeline.

    Attributes:
        device: where to compute.
        dtype: of the networks.
        steps: of denoising.
        guidance: scale of classifier-free guidance; 1 is none.
        size: side of the square images in pixels.
        noise_level: step of the noise schedule at which Stable unCLIP noises the embeddings.
    """

    device: torch.device
    dtype: torch.dtype
    steps: int | None = None
    guidance: float | None = None
    size: int | None = None
    noise_level: int = 0


@dataclass(frozen=True)
class Statistics:
    """Mean and deviation of the embeddings that a decoder was trained on, by component.

    Attributes:
        mean: (d,) float32.
        std: (d,) float32, > 0.
    """

    mean: Tensor
    std: Tensor

    @property
    def norm(self) -> float:
        """Root mean square norm of those embeddings."""
        return float((self.mean.square().sum() + self.std.square().sum()).sqrt())

    def deviation(self, embeddings: Tensor) -> float:
        """Root mean square of the standardised components of rows (n, d).

        About 1 for what the decoder was trained on, more for what is of another space.
        """
        return float(((embeddings - self.mean) / self.std).square().mean().sqrt())


class Decoder(Protocol):
    """Makes images from embeddings of images."""

    family: str
    """Which of the families, for people."""

    @property
    def width(self) -> int:
        """Of the embeddings that it takes."""

    @property
    def statistics(self) -> Statistics | None:
        """Of the embeddings that it was trained on; None where its files do not tell."""

    def draw(
        self, embeddings: Tensor, prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        """Make an image of each embedding.

        Args:
            embeddings: (n, width) float32, as the decoder's own image encoder would give them:
                not normalised.
            prompts: n texts, for a decoder that reads them beside the embedding.
            seeds: n seeds; an image depends on its own alone.

        Raises:
            DecoderError: it fails, or the device has not the memory for so many at a time.
        """
