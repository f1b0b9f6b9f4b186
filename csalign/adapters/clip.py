"""An open_clip model whose embeddings are aligned."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from csalign.adapters.checkpoint import load_adapter
from csalign.adapters.model import Adapter
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, ShapeError


class AlignedClip(nn.Module):
    """An encoder of images and texts with an adapter behind it; see `wrap`.

    Attributes:
        encoder: the model that was given.
        adapter: of both sides.
    """

    def __init__(self, encoder: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        for side in Modality:
            if adapter.side(side).embeds_with_tokens:
                raise ConfigError(
                    f"the adapter embeds {side.plural} with their tokens, which encode_{side} does "
                    "not give; train one without --tokens and --token-weight"
                )
        self.encoder = encoder
        self.adapter = adapter
        self.eval()

    def encode_image(self, image: Tensor, normalize: bool = True) -> Tensor:
        """Preprocessed images (n, 3, h, w) -> aligned unit rows (n, width) float32.

        Args:
            image: as the model takes them.
            normalize: there for those who call open_clip so; the rows are of norm 1 in any case.
        """
        return self._aligned(Modality.IMAGE, self.encoder.encode_image(image))  # type: ignore[operator]

    def encode_text(self, text: Any, normalize: bool = True) -> Tensor:
        """Tokenized texts -> aligned unit rows (n, width) float32; see `encode_image`."""
        return self._aligned(Modality.TEXT, self.encoder.encode_text(text))  # type: ignore[operator]

    def forward(self, image: Tensor, text: Any) -> tuple[Tensor, Tensor]:
        """Both."""
        return self.encode_image(image), self.encode_text(text)

    def _aligned(self, side: Modality, embeddings: Tensor) -> Tensor:
        own = self.adapter.side(side)
        if embeddings.shape[-1] != own.shape.input_width:
            raise ShapeError(
                f"the model's {side} embeddings are {embeddings.shape[-1]} wide, the adapter takes "
                f"{own.shape.input_width}; use the model that it was trained on"
            )
        return normalize(own(embeddings), dim=-1)


def wrap(
    model: nn.Module, run: Adapter | Path | str, *, allow: Collection[str] = ()
) -> AlignedClip:
    """Put an adapter behind an open_clip model, whose tools then see the aligned space.

    Args:
        model: what ``open_clip.create_model`` gave, or any other with ``encode_image`` and
            ``encode_text``.
        run: a run folder, or what `load_adapter` gave.
        allow: as for `load_adapter`.

    Raises:
        ConfigError: the adapter embeds with tokens.
        DataError: there is no adapter at `run`.
        SchemaError: its files are damaged.
    """
    adapter = run if isinstance(run, Adapter) else load_adapter(run, allow=allow)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return AlignedClip(model, adapter.to(device))
