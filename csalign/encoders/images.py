"""An image encoder around any network that gives embeddings and tokens."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from PIL import Image

from csalign.core.enums import Modality
from csalign.encoders.base import Embedded, EncoderOptions
from csalign.encoders.running import batch_size_of, describe, inference, to_device, to_numpy
from csalign.encoders.tokens import limit_tokens
from csalign.features.schema import EncoderInfo


class ImageTower(Protocol):
    """A network that is `ready`."""

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the last tokens, None if they lie on none that is known."""

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pixels (n, 3, h, w) -> (n, d) and, if asked for, tokens (n, t, d_t)."""


class TowerImages:
    """An image tower; see `ImageEncoder` for its methods.

    Args:
        tower: the network.
        transform: turns an RGB image into (3, h, w).
        input_size: (3, h, w).
        options: how to run it.
        spec: the encoder as the user named it.
        fingerprint: of its weights.
        preprocessing: what else decides the numbers.
    """

    def __init__(
        self,
        tower: ImageTower,
        transform: Callable[[Image.Image], torch.Tensor],
        input_size: tuple[int, ...],
        options: EncoderOptions,
        *,
        spec: str,
        fingerprint: str,
        preprocessing: dict[str, Any],
    ) -> None:
        self._tower = tower
        self._transform = transform
        self._options = options
        # An image is embedded here, so that what does not work fails before the work.
        self._info = describe(
            self.embed(torch.zeros(1, *input_size)),
            options,
            spec=spec,
            fingerprint=fingerprint,
            preprocessing=preprocessing,
        )

    @property
    def batch_size(self) -> int:
        """How many images go through a forward pass."""
        return batch_size_of(self._options)

    @property
    def info(self) -> EncoderInfo:
        """What makes the embeddings, for the manifest."""
        return self._info

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Turn an RGB image into (3, h, w) float32; may be called from several threads."""
        return self._transform(image)

    def embed(self, pixels: torch.Tensor) -> Embedded:
        """Embed one batch of preprocessed images, (n, 3, h, w) float32 on the CPU."""
        with inference(self._options):
            pooled, hidden = self._tower(to_device(pixels, self._options))
        if hidden is None:
            return Embedded(to_numpy(pooled), None)
        tokens = limit_tokens(
            list(to_numpy(hidden)), Modality.IMAGE, self._options.max_tokens, self._tower.grid
        )
        return Embedded(to_numpy(pooled), tokens)
