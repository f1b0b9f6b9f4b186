"""Find, build and load open_clip models by name, tag, config file or checkpoint."""

import difflib
import hashlib
import json
import logging
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch

from csalign.errors import EncoderError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Architecture:
    """An architecture that open_clip has in its registry."""

    spec: str  # as the user named it
    name: str  # in the registry
    preprocessing: dict[str, Any]  # where its config file says more than the registry keeps

    @property
    def quick_gelu(self) -> bool:
        """Whether it was made for the quick GELU activation."""
        return bool(open_clip.get_model_config(self.name).get("quick_gelu", False))


@dataclass(frozen=True)
class Weights:
    """A checkpoint on disk and, for a tag, what open_clip knows about it."""

    path: Path
    tag: dict[str, Any]


def find_architecture(model: str) -> Architecture:
    """The architecture of that name, or of that JSON config file.

    Raises:
        EncoderError: there is none; close names are suggested.
    """
    path = Path(model)
    if path.suffix.lower() == ".json":
        return _register(path)
    name = model.replace("/", "-")
    known = open_clip.list_models()
    if name in known:
        return Architecture(model, name, {})
    raise EncoderError(
        f"model: open_clip has no architecture {model!r}; {_suggest(name, known)}, "
        "or give a JSON file of its config"
    )


def _register(path: Path) -> Architecture:
    """Make a config file known to open_clip, under a name that no other config has."""
    try:
        content = path.read_bytes()
        document = json.loads(content)
        config = document.get("model_cfg", document)
        preprocessing = document.get("preprocess_cfg", {})
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    except OSError as error:
        raise EncoderError(f"model: {path}: cannot be read ({error.strerror})") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise EncoderError(f"model: {path}: is no open_clip model config ({error})") from None
    if missing:
        raise EncoderError(f"model: {path}: is no open_clip model config, lacks {missing[0]!r}")
    name = f"{path.stem}-{hashlib.sha256(content).hexdigest()[:16]}"
    if name not in open_clip.list_models():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, f"{name}.json")
            copy.write_text(json.dumps(config), encoding="utf-8")
            open_clip.add_model_config(copy)
    return Architecture(str(path), name, preprocessing)


def find_weights(architecture: Architecture, pretrained: str) -> Weights:
    """The weights of a tag, downloaded if need be, or of a local checkpoint.

    Raises:
        EncoderError: there is no such tag or file, or the hub cannot be reached.
    """
    tag = open_clip.get_pretrained_cfg(architecture.name, pretrained)
    if not tag:
        path = Path(pretrained)
        if path.is_file():
            return Weights(path, {})
        raise EncoderError(_unknown_weights(architecture, pretrained))
    try:
        with _quiet():
            return Weights(Path(open_clip.download_pretrained(tag)), tag)
    except (OSError, RuntimeError) as error:
        raise EncoderError(
            f"pretrained: {pretrained!r} of {architecture.spec} could not be downloaded "
            f"({first_line(error)}); give the path of a local checkpoint instead"
        ) from error


def _unknown_weights(architecture: Architecture, pretrained: str) -> str:
    if len(Path(pretrained).parts) > 1 or Path(pretrained).suffix:
        return f"pretrained: {pretrained}: no such checkpoint"
    known = open_clip.list_pretrained_tags_by_model(architecture.name)
    hint = _suggest(pretrained, known) if known else "none is known for it"
    return (
        f"pretrained: {architecture.spec} has no tag {pretrained!r}; {hint}, or give the path of "
        "a local checkpoint"
    )


def _suggest(name: str, known: list[str]) -> str:
    by_lower = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    if close:
        return f"its nearest are {', '.join(by_lower[item] for item in close)}"
    return f"it has {', '.join(known[:8])}{' and others' if len(known) > 8 else ''}"


def build_network(architecture: Architecture, weights: Weights | None) -> Any:
    """Build the network with random weights, the same ones each time."""
    preprocessing = {**architecture.preprocessing, **(weights.tag if weights else {})}
    preprocessing.pop("size", None)  # the network's own size decides
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return open_clip.create_model(
                architecture.name, pretrained_text=False, force_preprocess_cfg=preprocessing
            )
        except OSError as error:
            raise EncoderError(_unreachable(architecture, "text tower", error)) from error
        except Exception as error:  # a config with wrong values can fail anywhere in open_clip
            raise EncoderError(
                f"model: {architecture.spec} cannot be built ({first_line(error)})"
            ) from error


def build_tokenizer(architecture: Architecture) -> Any:
    """The tokenizer that belongs to an architecture."""
    try:
        with _quiet():
            return open_clip.get_tokenizer(architecture.name)
    except (OSError, ImportError, ValueError) as error:
        raise EncoderError(_unreachable(architecture, "tokenizer", error)) from error


def _unreachable(architecture: Architecture, part: str, error: Exception) -> str:
    return (
        f"model: the {part} of {architecture.spec} comes from the Hugging Face hub and could not "
        f"be had ({first_line(error)}); connect once, or fill the hub's cache"
    )


def load_weights(network: Any, weights: Weights, model: str) -> None:
    """Load weights into a network, tensors only: what a pickle would run is refused."""
    path = weights.path
    try:
        if path.suffix != ".safetensors":
            # open_clip falls back to full unpickling on a TypeError, which runs code out of the
            # file; what passes here does not get there.
            torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no checkpoint can fail anywhere
        raise EncoderError(
            f"pretrained: {path} cannot be read as plain weights ({first_line(error)}); convert "
            "it to .safetensors, or save its state dict alone"
        ) from error
    try:
        with _quiet():
            open_clip.load_checkpoint(network, str(path), strict=True, weights_only=True)
    except Exception as error:  # so can weights of some other network
        raise EncoderError(
            f"pretrained: {path} does not fit {model} ({first_line(error)}); choose the "
            "architecture that it was trained with"
        ) from error


def warn_of_activation(architecture: Architecture, weights: Weights) -> None:
    """Tell of weights trained with QuickGELU in a model without it, which costs accuracy."""
    quick = weights.tag.get("quick_gelu", "openai" in str(weights.path).lower())
    if quick and not architecture.quick_gelu:
        logger.warning(
            "%s: these weights look trained with QuickGELU, %s has GELU; use its -quickgelu "
            "variant, or the embeddings lose accuracy",
            weights.path,
            architecture.spec,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what open_clip says to the root logger and as warnings in this module's log.

    It would otherwise put a handler on the root logger of the process; and the hub's client would
    print a warning each time it tries again.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    hub = logging.getLogger("huggingface_hub")
    level = hub.level

    def divert(record: logging.LogRecord) -> bool:
        # Weights are loaded after the network is built, so this one would only mislead.
        if "No pretrained weights" not in record.getMessage():
            logger.debug("%s", record.getMessage())
        return False

    root.addFilter(divert)
    root.addHandler(handler)
    hub.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        hub.setLevel(level)
        root.removeHandler(handler)
        root.removeFilter(divert)
        for warning in caught:
            logger.info("%s", warning.message)


def first_line(error: Exception) -> str:
    """The line of an error of torch or a hub that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch heads a list of mismatches with a line that says nothing.
    text = " ".join(lines[1:2] if lines[1:] and lines[0].endswith(":") else lines[:1])
    return textwrap.shorten(text, 160, placeholder=" ...") or type(error).__name__
