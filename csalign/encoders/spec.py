"""Load encoders by the name that a user writes.

::

    open_clip:ARCH/TAG                 open_clip:ARCH+FILE        open_clip:ARCH/none
    open_clip:CONFIG.json+FILE         open_clip:local-dir:DIR    open_clip:hf-hub:NAME
    timm:MODEL                         timm:MODEL+FILE            timm:MODEL+none
    hf:NAME-or-DIR[?pooling=mean&...]  NAME:ARGUMENT              MODULE:CALLABLE[+ARGUMENT]

open_clip encodes both sides, timm images only, hf texts only. The last two forms are third-party
encoders, whose code is imported because the user names it. `none` means random weights.
"""

from collections.abc import Collection
from urllib.parse import parse_qsl

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError
from csalign.encoders.base import EncoderOptions, Encoders

_OWN = ("open_clip", "timm", "hf")
_FORMS = (
    "open_clip:ARCH/TAG, open_clip:ARCH+FILE, timm:MODEL (images), hf:NAME-or-FOLDER (texts) or "
    "MODULE:CALLABLE"
)


def is_trusted(spec: str) -> bool:
    """Return whether an encoder may be loaded because an artifact names it.

    Only if that runs no code beside csalign's and its libraries'; others have to be named by the
    user.
    """
    family, _, name = spec.partition(":")
    options = dict(parse_qsl(name.partition("?")[2], keep_blank_values=True))
    return family in _OWN and "trust_remote_code" not in options


def load_encoders(image: str | None, text: str | None, options: EncoderOptions) -> Encoders:
    """Load the encoders of one or both sides; a model that serves both is loaded once.

    Args:
        image: encoder of the images, in one of the forms above; None skips the side.
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
