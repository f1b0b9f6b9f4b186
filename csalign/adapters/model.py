"""The adapters of both sides: small maps that take each modality into one shared space."""

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import normalize

from csalign.adapters.canonical import ClosedForm
from csalign.adapters.kinds import build_side
from csalign.adapters.side import Array, SideAdapter, SideShape, to_tensor
from csalign.core.enums import Modality
from csalign.core.errors import ShapeError

__all__ = ["Adapter", "SideShape"]


class Adapter(nn.Module):
    """The adapters of both sides.

    Args:
        shapes: of each side, with one shared width.
        allow: kinds ``package.module:Class`` that may be imported; see `kinds.find_kind`.

    Raises:
        ConfigError: there is no such kind, or it may not be imported.
        ShapeError: a kind does not support its shape, or the widths of the sides differ.
    """

    def __init__(
        self, shapes: Mapping[Modality, SideShape], *, allow: Collection[str] = ()
    ) -> None:
        super().__init__()
        image, text = shapes[Modality.IMAGE], shapes[Modality.TEXT]
        if image.width != text.width:
            raise ShapeError(
                f"the image side maps to width {image.width}, the text side to {text.width}; "
                "give both one width"
            )
        self.image = build_side(image, allow=allow)
        self.text = build_side(text, allow=allow)

    def side(self, modality: Modality) -> SideAdapter:
        """Return the adapter of one side."""
        return self.image if modality is Modality.IMAGE else self.text

    def start_from(self, form: ClosedForm) -> None:
        """Make both sides compute a closed form.

        Raises:
            ValueError: the kind of a side cannot compute that map.
        """
        self.image.start_from(form.image_mean, form.image_weight, form.image_bias)
        self.text.start_from(form.text_mean, form.text_weight, form.text_bias)

    def parameter_counts(self) -> dict[str, int]:
        """Count the trainable parameters of each side."""
        return {
            side.value: sum(p.numel() for p in self.side(side).parameters() if p.requires_grad)
            for side in Modality
        }

    @torch.inference_mode()
    def embed(self, modality: Modality, embeddings: Array, *, batch_size: int = 8_192) -> Array:
        """Align the embeddings of one side.

        Args:
            modality: which side they come from.
            embeddings: (n, input_width), any float dtype, finite, no row of norm 0.
            batch_size: rows per forward pass.

        Returns:
            (n, width) float32, unit rows.

        Raises:
            ShapeError: the width is not the one that the adapter was trained on.
        """
        side = self._side_for(modality, embeddings)
        self.eval()
        out = np.empty((len(embeddings), side.shape.width), np.float32)
        for start in range(0, len(embeddings), batch_size):
            rows = to_tensor(embeddings[start : start + batch_size], side.mean.device)
            out[start : start + batch_size] = normalize(side(rows), dim=1).cpu().numpy()
        return out

    @torch.inference_mode()
    def embed_tokens(
        self, modality: Modality, embeddings: Array, tokens: Array, mask: npt.NDArray[np.bool_]
    ) -> tuple[Array, Array]:
        """Align the embeddings and tokens of one batch of a side.

        Args:
            modality: which side they come from.
            embeddings: (n, input_width), any float dtype, finite, no row of norm 0.
            tokens: (n, t, token_width), likewise where `mask` is true; anything elsewhere.
            mask: (n, t), true where there is a token.

        Returns:
            (n, width) and (n, t, width) float32: unit rows, 0 where there is no token.

        Raises:
            ShapeError: a width differs from training, or the shapes do not fit together.
        """
        side = self._side_for(modality, embeddings)
        takes = side.shape.token_width
        if tokens.shape != (len(embeddings), *tokens.shape[1:2], takes) or (
            mask.shape != tokens.shape[:2]
        ):
            raise ShapeError(
                f"{modality}: {len(embeddings)} embeddings, tokens of shape {tokens.shape} and a "
                f"mask of shape {mask.shape} do not fit together; the adapter takes tokens of "
                f"width {takes}"
            )
        self.eval()
        device = side.mean.device
        aligned = side.forward_tokens(
            to_tensor(embeddings, device),
            to_tensor(tokens, device),
            torch.from_numpy(np.array(mask)).to(device),
        )
        rows, own = (normalize(part, dim=-1).cpu().numpy() for part in aligned)
        return rows, own

    def _side_for(self, modality: Modality, embeddings: Array) -> SideAdapter:
        side = self.side(modality)
        if embeddings.ndim != 2 or embeddings.shape[1] != side.shape.input_width:
            raise ShapeError(
                f"{modality} embeddings have shape {embeddings.shape}, the adapter takes width "
                f"{side.shape.input_width}; use the encoder that it was trained on"
            )
        return side
