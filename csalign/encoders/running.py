"""Run the network of any encoder: device, precision, batches, tokens, record and errors."""

import difflib
import hashlib
import logging
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import isqrt
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d

from csalign.core.enums import Modality
from csalign.core.errors import EncoderError
from csalign.encoders.base import Embedded, EncoderOptions, Floats
from csalign.features.schema import EncoderInfo

logger = logging.getLogger(__name__)

# They print a warning at each retry, or a report at each load.
_VERBOSE = ("huggingface_hub", "timm", "transformers")

_CANNOT_RUN = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

Network = TypeVar("Network", bound=torch.nn.Module)


def first_line(error: BaseException) -> str:
    """Return the line of a library's error that says what is wrong."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    # torch starts a list of mismatches with a line that names none.
    text = " ".join(lines[1:2] if lines[1:] and lines[0].endswith(":") else lines[:1])
    return textwrap.shorten(text, 160, placeholder=" ...") or type(error).__name__


def suggest(name: str, known: Sequence[str]) -> str:
    """Suggest the known names closest to a misspelt one, for a message."""
    by_lower = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    if close:
        return f"the closest are {', '.join(by_lower[item] for item in close)}"
    return f"there are {', '.join(known[:8])}{' and others' if len(known) > 8 else ''}"


@contextmanager
def quiet() -> Iterator[None]:
    """Redirect root-logger messages and warnings of libraries to this module's logger.

    Without a handler on the root logger, open_clip would install one.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    levels = {name: logging.getLogger(name).level for name in _VERBOSE}

    def divert(record: logging.LogRecord) -> bool:
        # Misleading: csalign loads the weights after building the network.
        if "No pretrained weights" not in record.getMessage():
            logger.debug("%s", record.getMessage())
        return False

    root.addFilter(divert)
    root.addHandler(handler)
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        root.removeHandler(handler)
        root.removeFilter(divert)
        for warning in caught:
            logger.info("%s", warning.message)


@contextmanager
def first_run(spec: str) -> Iterator[None]:
    """Shorten the error of a network's first run to one line.

    Raises:
        EncoderError: it cannot be run.
    """
    try:
        yield
    except _CANNOT_RUN as error:
        raise EncoderError(f"{spec} cannot be run ({first_line(error)})") from error


def no_tokens(what: str) -> EncoderError:
    """Word that the tokens of a network cannot be stored beside its embedding."""
    return EncoderError(
        f"tokens: {what} has no tokens that share a space with its embedding; choose a plain ViT "
        "model, or omit this side from --tokens"
    )


def precision_of(options: EncoderOptions) -> str:
    """Return the precision of the forward pass, with "auto" resolved."""
    if options.precision != "auto":
        return options.precision
    return "float32" if options.device.type == "cpu" else "float16"


def batch_size_of(options: EncoderOptions) -> int:
    """Return the batch size of a forward pass."""
    return options.batch_size or (32 if options.device.type == "cpu" else 256)


def fingerprint(network: torch.nn.Module) -> str:
    """Return the hex SHA-256 of names, shapes and values of all weights, whatever their file.

    Compute it before `ready`, so that it does not depend on how the network is run.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def ready(network: Network, options: EncoderOptions) -> Network:
    """Prepare a network for inference in place, as the last thing done to it.

    Weights become bfloat16 if that is the precision, since autocast would convert them at each
    call. With float16 they stay as stored if they are float16, and else become float32 under
    autocast, for its range. Everything else runs in float32.
    """
    network.eval().requires_grad_(False)
    exact = [
        (module, name, values)
        for module in network.modules()
        for name, values in module.named_buffers(recurse=False)
        # Rotary frequencies must stay exact: rounded, they would shift distant positions.
        if name.endswith("inv_freq")
    ]
    stored = {values.dtype for values in network.parameters()}
    dtype = _weights_dtype(options)
    if precision_of(options) == "float16" and stored == {torch.float16}:
        dtype = torch.float16
    network.to(options.device, dtype)
    for module, name, values in exact:
        setattr(module, name, values.to(options.device))
    if options.device.type == "cuda":
        # Faster for convolutions, which alone have such weights.
        network.to(memory_format=torch.channels_last)
    if options.compile and not _compile_blocks(network):
        network.compile()
    return network


def _compile_blocks(module: torch.nn.Module) -> bool:
    """Compile each block of a stack of equal blocks; return whether there are any.

    Blocks of one kind share one compilation, while a whole network takes minutes, and again for
    each length of text.
    """
    children = list(module.children())
    if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential) and (
        len(children) > 1 and len({type(child) for child in children}) == 1
    ):
        for child in children:
            child.compile()
        return True
    found = [_compile_blocks(child) for child in children]
    return any(found)


@contextmanager
def inference(options: EncoderOptions) -> Iterator[None]:
    """Enter the modes of a forward pass."""
    autocast = torch.autocast(
        options.device.type, dtype=torch.float16, enabled=precision_of(options) == "float16"
    )
    with torch.inference_mode(), autocast:
        yield


def to_device(tensor: torch.Tensor, options: EncoderOptions) -> torch.Tensor:
    """Move an input to the network's device; pixels take the dtype of its weights."""
    dtype = _weights_dtype(options) if tensor.is_floating_point() else tensor.dtype
    if options.device.type != "cuda":
        return tensor.to(options.device, dtype)
    layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
    sent = tensor.pin_memory().to(options.device, non_blocking=True)
    return sent.to(dtype, memory_format=layout)


def to_numpy(tensor: torch.Tensor) -> Floats:
    """Convert to float32 on the CPU."""
    array: Floats = tensor.float().cpu().numpy()
    return array


def embed_by_length(
    lengths: Sequence[int], batch_size: int, embed: Callable[[list[int]], Embedded]
) -> Embedded:
    """Embed items in batches of similar length and return the results in the items' order."""
    order = np.argsort(lengths, kind="stable")
    starts = range(0, len(order), batch_size)
    batches = [embed(order[start : start + batch_size].tolist()) for start in starts]
    back = np.argsort(order)
    embeddings = np.concatenate([batch.embeddings for batch in batches])[back]
    tokens = [own for batch in batches for own in batch.tokens or ()]
    return Embedded(embeddings, [tokens[row] for row in back] if tokens else None)


def describe(
    embedded: Embedded,
    options: EncoderOptions,
    *,
    spec: str,
    fingerprint: str | None,
    preprocessing: dict[str, Any],
) -> EncoderInfo:
    """Build the record of an encoder, named `spec` by the user, from one or more embedded items."""
    tokens = embedded.tokens
    preprocessing = {**preprocessing, "precision": precision_of(options)}
    if tokens is not None and options.max_tokens is not None:
        preprocessing["max_tokens"] = options.max_tokens
    return EncoderInfo(
        spec=spec,
        fingerprint=fingerprint,
        width=embedded.embeddings.shape[1],
        token_width=None if tokens is None else tokens[0].shape[1],
        token_space=None if tokens is None else options.token_space,
        preprocessing=preprocessing,
    )


def _weights_dtype(options: EncoderOptions) -> torch.dtype:
    return torch.bfloat16 if precision_of(options) == "bfloat16" else torch.float32


def limit_tokens(
    tokens: list[Floats],
    side: Modality,
    max_tokens: int | None,
    grid: tuple[int, int] | None = None,
) -> list[Floats]:
    """Reduce each item to at most `max_tokens` tokens; shorter items stay as they are.

    Texts are truncated. Images are averaged to the largest k x k that fits, over their grid, or
    over runs of neighbouring tokens if they have none.

    Args:
        tokens: n arrays (t_i, d).
        side: what the items are.
        max_tokens: at least 1; None keeps all tokens.
        grid: (rows, columns) of the image tokens, row by row (default: a square if their number
            is a square number).
    """
    if max_tokens is None:
        return tokens
    return [
        own if len(own) <= max_tokens else _limit(own, side, max_tokens, grid) for own in tokens
    ]


def _limit(tokens: Floats, side: Modality, max_tokens: int, grid: tuple[int, int] | None) -> Floats:
    if side is Modality.TEXT:
        return tokens[:max_tokens].copy()  # a view would keep all of them in memory
    k = isqrt(max_tokens)
    values = torch.from_numpy(np.ascontiguousarray(tokens.T, np.float32))  # (d, t)
    edge = isqrt(len(tokens))
    rows, columns = grid or (edge, edge)
    if rows * columns == len(tokens):
        squares = values.reshape(-1, rows, columns)
        pooled = adaptive_avg_pool2d(squares, (min(k, rows), min(k, columns))).flatten(1)
    else:
        pooled = adaptive_avg_pool1d(values, k * k)
    array: Floats = pooled.T.contiguous().numpy()
    return array


class RunningEncoder:
    """Batch size and record of an encoder that is loaded; base of both sides' encoders."""

    _options: EncoderOptions
    _info: EncoderInfo

    @cached_property
    def cut(self) -> list[int]:
        """Lengths in tokens of the texts that exceeded the context and were cut, once embedded."""
        return []

    @property
    def batch_size(self) -> int:
        """Batch size of a forward pass."""
        return batch_size_of(self._options)

    @property
    def info(self) -> EncoderInfo:
        """Record of the encoder for the manifest."""
        return self._info


class ImageTower(Protocol):
    """An image network after `ready`."""

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the last tokens, None if they have no known grid."""

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embed pixels (n, 3, h, w): (n, d) and, if requested, tokens (n, t, d_t)."""


class TowerImages(RunningEncoder):
    """The image encoder around a tower; see `base.ImageEncoder` for its methods."""

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
        # Embed one image now, so that what cannot run fails before the work.
        self._info = describe(
            self.embed(torch.zeros(1, *input_size)),
            options,
            spec=spec,
            fingerprint=fingerprint,
            preprocessing=preprocessing,
        )

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Convert an RGB image to (3, h, w) float32; thread-safe."""
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
