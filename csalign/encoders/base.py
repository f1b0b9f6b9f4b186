"""The interface of encoders, and their loading by name.

====================================  ===============================================
open_clip:ARCHITECTURE/TAG, +FILE     both sides; see `openclip_models.find_model`
timm:MODEL, timm:MODEL+FILE           images; see `timm_images.load_timm`
hf:NAME-or-FOLDER?OPTION=VALUE        texts; see `hf_texts.load_hf`
MODULE:CALLABLE, or an entry point    either side; see `third_party.find_factory`
====================================  ===============================================
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError
from csalign.core.progress import tick
from csalign.features.schema import EncoderInfo

_OWN = ("open_clip", "timm", "hf")
_FORMS = (
    "open_clip:ARCH/TAG, open_clip:ARCH+FILE, timm:MODEL (images), hf:NAME-or-FOLDER (texts) or "
    "MODULE:CALLABLE"
)

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


class Encoder(Protocol):
    """A frozen encoder of either side."""

    @property
    def batch_size(self) -> int:
        """Batch size of a forward pass."""

    @property
    def info(self) -> EncoderInfo:
        """Record of the encoder for the manifest."""


class ImageEncoder(Encoder, Protocol):
    """A frozen image encoder."""

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Convert an RGB image to (3, h, w) float32; thread-safe."""

    def embed(self, pixels: torch.Tensor) -> Embedded:
        """Embed one batch of preprocessed images, (n, 3, h, w) float32 on the CPU."""


class TextEncoder(Encoder, Protocol):
    """A frozen text encoder."""

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Embed one or more texts in batches, in their order."""


@dataclass(frozen=True)
class EncoderOptions:
    """Options for running encoders.

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
        return self.image if Modality.of(modality) is Modality.IMAGE else self.text


def is_trusted(spec: str) -> bool:
    """Return whether an encoder may be loaded because an artifact names it.

    That must not run code other than csalign's and its libraries'.
    """
    family, _, name = spec.partition(":")
    options = dict(parse_qsl(name.partition("?")[2], keep_blank_values=True))
    return family in _OWN and "trust_remote_code" not in options


def load_encoders(image: str | None, text: str | None, options: EncoderOptions) -> Encoders:
    """Load the encoders of one or both sides; a model that serves both is loaded once.

    Args:
        image: encoder of the images, in one of the forms of this module; None skips the side.
        text: encoder of the texts.
        options: how to run them.

    Raises:
        ConfigError: a spec has no known form, or its family does not encode that side.
        EncoderError: the encoder cannot be downloaded, built or run, or has no such tokens.
    """
    if image is not None and image == text:
        return _load(image, tuple(Modality), options)
    return Encoders(
        None if image is None else _load(image, (Modality.IMAGE,), options).image,
        None if text is None else _load(text, (Modality.TEXT,), options).text,
    )


def _load(spec: str, sides: Collection[Modality], options: EncoderOptions) -> Encoders:
    tick(f"loading {spec}")
    # Imported when named, since each family brings a large library.
    family, _, name = spec.partition(":")
    if not name:
        raise ConfigError(f"{spec!r} is not an encoder; use {_FORMS}")
    if family == "open_clip":
        from csalign.encoders.openclip import load_open_clip

        return load_open_clip(name, sides, options)
    if family == "timm":
        from csalign.encoders.timm_images import load_timm

        _check_side(spec, sides, Modality.IMAGE)
        return Encoders(load_timm(name, options), None)
    if family == "hf":
        from csalign.encoders.hf_texts import load_hf

        _check_side(spec, sides, Modality.TEXT)
        return Encoders(None, load_hf(name, options))
    return _load_third_party(spec, sides, options)


def _check_side(spec: str, sides: Collection[Modality], only: Modality) -> None:
    if any(side is not only for side in sides):
        raise ConfigError(
            f"{spec}: encodes {only.plural} only; name another encoder for the other side"
        )


def _load_third_party(spec: str, sides: Collection[Modality], options: EncoderOptions) -> Encoders:
    from csalign.encoders.third_party import find_factory, load_third_party

    found = find_factory(spec)
    if found is None:
        raise ConfigError(f"{spec}: no encoder, entry point or module has this name; use {_FORMS}")
    loaded = [load_third_party(spec, *found, side, options) for side in sides]
    return Encoders(
        next((own.image for own in loaded if own.image is not None), None),
        next((own.text for own in loaded if own.text is not None), None),
    )
