"""From what a user writes to an encoder.

::

    open_clip:ARCH/TAG                 open_clip:ARCH+FILE        open_clip:ARCH/none
    open_clip:CONFIG.json+FILE         open_clip:local-dir:DIR    open_clip:hf-hub:NAME
    timm:MODEL                         timm:MODEL+FILE            timm:MODEL+none
    hf:NAME-or-DIR[?pooling=mean&...]  NAME:ARGUMENT              MODULE:CALLABLE[+ARGUMENT]

open_clip has both sides, timm images only, hf texts only. The last two forms are encoders that
others wrote; naming one is what gets its code imported. `none` stands for random weights.
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
    """Whether an encoder may be loaded because an artifact that somebody sent names it.

    It may if that runs no code but csalign's and the libraries'; others a user has to name.
    """
    family, _, name = spec.partition(":")
    options = dict(parse_qsl(name.partition("?")[2], keep_blank_values=True))
    return family in _OWN and "trust_remote_code" not in options


def load_encoders(image: str | None, text: str | None, options: EncoderOptions) -> Encoders:
    """Load the encoders of one side or of both; where both are the same model, load it once.

    Args:
        image: the encoder of the images, in one of the forms above; None for none.
        text: that of the texts.
        options: how to run them.

    Raises:
        ConfigError: a spec has no form that is known, or its family has no such side.
        EncoderError: the encoder cannot be had, built or run, or does not give the tokens asked
            for.
    """
    if image is not None and image == text:
        return _load(image, tuple(Modality), options)
    return Encoders(
        None if image is None else _load(image, (Modality.IMAGE,), options).image,
        None if text is None else _load(text, (Modality.TEXT,), options).text,
    )


def _load(spec: str, sides: Collection[Modality], options: EncoderOptions) -> Encoders:
    # Each family is imported when it is named: it brings a large library.
    family, _, name = spec.partition(":")
    if not name:
        raise ConfigError(f"{spec}: names no encoder; write {_FORMS}")
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
        raise ConfigError(
            f"{spec}: no encoder, entry point or module has this name; write {_FORMS}"
        )
    loaded = [load_third_party(spec, *found, side, options) for side in sides]
    return Encoders(
        next((own.image for own in loaded if own.image is not None), None),
        next((own.text for own in loaded if own.text is not None), None),
    )
