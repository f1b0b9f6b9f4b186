"""Third-party encoders: found by name, checked once, and held to the interface."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import torch
from PIL import Image

from csalign.core.enums import Modality
from csalign.core.errors import CsalignError, EncoderError
from csalign.encoders import base
from csalign.encoders.running import first_line, limit_tokens
from csalign.features.schema import EncoderInfo

GROUP = "csalign.encoders"  # of entry points, whose names are prefixes of encoders

_TEXTS = ("a", "two people on bicycles wait at a crossing in the rain")

Factory = Callable[[str, Modality, base.EncoderOptions], Any]


def find_factory(spec: str) -> tuple[Factory, str] | None:
    """Find the factory of a spec's encoder and its argument; None if the spec has no such form.

    Args:
        spec: NAME:ARGUMENT for an installed entry point, or MODULE:CALLABLE[+ARGUMENT]. The
            module is imported, which runs its code.

    Raises:
        EncoderError: the module cannot be imported, or lacks the callable.
    """
    name, _, rest = spec.partition(":")
    for entry in entry_points(group=GROUP, name=name):
        with _one_line_errors(spec, "import"):
            return entry.load(), rest
    callable_name, _, argument = rest.partition("+")
    if not all(part.isidentifier() for part in (callable_name, *name.split("."))):
        return None
    try:
        with _one_line_errors(spec, "import"):
            module = importlib.import_module(name)
    except EncoderError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{name}.".startswith(f"{missing.name}."):
            return None
        raise
    factory = getattr(module, callable_name, None)
    if not callable(factory):
        raise EncoderError(f"{spec}: {name} has no callable {callable_name!r}")
    return factory, argument


def load_third_party(
    spec: str, factory: Factory, argument: str, side: Modality, options: base.EncoderOptions
) -> base.Encoders:
    """Call the factory of an encoder and check its output on a probe.

    Raises:
        EncoderError: it failed, or its result is not an encoder of that side.
    """
    with _one_line_errors(spec, "load"):
        inner = factory(argument, side, options)
    if Modality.of(side) is Modality.IMAGE:
        return base.Encoders(_Images(inner, spec, options), None)
    return base.Encoders(None, _Texts(inner, spec, options))


class _Checked:
    """Checks of an encoder's record and output, shared by both sides."""

    side: Modality

    def __init__(self, inner: Any, spec: str, options: base.EncoderOptions) -> None:
        self._inner = inner
        self._spec = spec
        self._options = options
        self._with_tokens = self.side in options.tokens
        self._width: int | None = None
        with _one_line_errors(spec, "describe"):
            batch_size, info = inner.batch_size, inner.info
        if not isinstance(batch_size, int) or batch_size < 1:
            raise self._wrong(f"its batch_size is {batch_size!r}, not a positive int")
        if not isinstance(info, EncoderInfo):
            raise self._wrong(f"its info is {_kind(info)}, not an EncoderInfo")
        self.batch_size = batch_size
        self.info = info
        embedded = self._probe()
        self._width = embedded.embeddings.shape[1]
        if not np.isfinite(embedded.embeddings).all():
            raise self._wrong("its embeddings are not finite")
        if info.width != self._width:
            raise self._wrong(
                f"its info says width {info.width}, its embeddings have {self._width}"
            )
        self.info = self._complete(embedded)

    def _probe(self) -> base.Embedded:
        raise NotImplementedError

    def _checked(self, embedded: Any, count: int) -> base.Embedded:
        """Check the output for `count` items and convert it to the types of `Embedded`."""
        try:
            embeddings, tokens = embedded
        except (TypeError, ValueError):
            raise self._wrong(f"it returns {_kind(embedded)}, not an Embedded") from None
        if not _is_floats(embeddings) or embeddings.ndim != 2 or len(embeddings) != count:
            raise self._wrong(f"its embeddings are {_kind(embeddings)}, not ({count}, d) floats")
        if self._width not in (None, embeddings.shape[1]):
            raise self._wrong(f"its embeddings changed width: {self._width}, {embeddings.shape[1]}")
        limited = None
        if self._with_tokens:
            limited = limit_tokens(
                self._checked_tokens(tokens, count), self.side, self._options.max_tokens
            )
        return base.Embedded(embeddings.astype(np.float32, copy=False), limited)

    def _checked_tokens(self, tokens: Any, count: int) -> list[base.Floats]:
        if tokens is None:
            raise self._wrong("it returns no tokens; omit this side from --tokens")
        if len(tokens) != count:
            raise self._wrong(f"it returns tokens of {len(tokens)} items for {count}")
        for own in tokens:
            if not _is_floats(own) or own.ndim != 2 or own.shape[1] != tokens[0].shape[1]:
                raise self._wrong(f"its tokens are {_kind(own)}, not (t, d_t) floats of one width")
        return [own.astype(np.float32, copy=False) for own in tokens]

    def _complete(self, embedded: base.Embedded) -> EncoderInfo:
        """Complete the encoder's own record."""
        changes: dict[str, Any] = {"spec": self._spec, "token_width": None, "token_space": None}
        if embedded.tokens is not None:
            changes["token_width"] = embedded.tokens[0].shape[1]
            changes["token_space"] = self.info.token_space or self._options.token_space
            if self._options.max_tokens is not None:
                limit = {"max_tokens": self._options.max_tokens}
                changes["preprocessing"] = self.info.preprocessing | limit
        return self.info.model_copy(update=changes)

    def _wrong(self, problem: str) -> EncoderError:
        return EncoderError(f"{self._spec}: {problem}")


class _Images(_Checked):
    """A checked image encoder."""

    side = Modality.IMAGE
    _inner: base.ImageEncoder

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Convert an RGB image to (3, h, w) float32; thread-safe."""
        with _one_line_errors(self._spec, "preprocess an image"):
            return self._inner.preprocess(image)

    def embed(self, pixels: torch.Tensor) -> base.Embedded:
        """Embed one batch of preprocessed images, (n, 3, h, w) float32 on the CPU."""
        with _one_line_errors(self._spec, "embed images"):
            embedded = self._inner.embed(pixels)
        return self._checked(embedded, len(pixels))

    def _probe(self) -> base.Embedded:
        noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
        pixels = self.preprocess(Image.fromarray(noise))
        if not isinstance(pixels, torch.Tensor) or not pixels.is_floating_point():
            raise self._wrong(f"its preprocess returns {_kind(pixels)}, not a float tensor")
        return self.embed(torch.stack([pixels, pixels.flip(-1)]))


class _Texts(_Checked):
    """A checked text encoder."""

    side = Modality.TEXT
    _inner: base.TextEncoder

    def embed(self, texts: Sequence[str]) -> base.Embedded:
        """Embed one or more texts in batches, in their order."""
        with _one_line_errors(self._spec, "embed texts"):
            embedded = self._inner.embed(texts)
        return self._checked(embedded, len(texts))

    def _probe(self) -> base.Embedded:
        return self.embed(_TEXTS)


@contextmanager
def _one_line_errors(spec: str, what: str) -> Iterator[None]:
    """Shorten any error of third-party code to one line."""
    try:
        yield
    except CsalignError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise EncoderError(f"{spec}: failed to {what} ({reason})") from error


def _is_floats(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.dtype.kind == "f"


def _kind(values: Any) -> str:
    shape = getattr(values, "shape", None)
    if shape is None:
        return type(values).__name__
    return f"{type(values).__name__} {tuple(shape)} of {getattr(values, 'dtype', 'unknown')}"
