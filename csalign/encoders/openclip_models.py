"""Find, build and load open_clip models by name, tag, config file or checkpoint."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import (
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
)
from open_clip.pretrained import download_pretrained_from_hf

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, EncoderError
from csalign.core.paths import likely_meant
from csalign.core.records import parse_json
from csalign.encoders.checkpoints import find_state, load_state, read_tensors
from csalign.encoders.running import first_line, quiet, suggest

logger = logging.getLogger(__name__)

RANDOM = "none"  # in place of a tag: random weights, the same each time

_CONFIG = "open_clip_config.json"
_FOLDER_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
)
_IMAGE = "visual."  # before the names of the image tower
_SCALES = ("logit_scale", "logit_bias")  # of the loss, which embeddings do not need
_POSITION_IDS = "text.transformer.embeddings.position_ids"  # of old versions of transformers
_OPENAI = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's own state dicts


@dataclass(frozen=True)
class Architecture:
    """An architecture in open_clip's registry."""

    spec: str  # as the user named it
    name: str  # in the registry
    preprocessing: dict[str, Any]  # of its config file, which the registry does not keep
    tokenizer: str  # by which open_clip finds its tokenizer

    @property
    def quick_gelu(self) -> bool:
        """True if it uses the QuickGELU activation."""
        return bool(open_clip.get_model_config(self.name).get("quick_gelu", False))


@dataclass(frozen=True)
class Weights:
    """A checkpoint on disk and, for a tag, open_clip's config of it."""

    path: Path
    tag: dict[str, Any]


def find_model(name: str) -> tuple[Architecture, Weights | None]:
    """Find the architecture and the weights of a name; None for random weights.

    Args:
        name: ARCHITECTURE/TAG, ARCHITECTURE+FILE, local-dir:FOLDER or hf-hub:NAME. The
            architecture may be the path of a JSON file of its config, the tag may be "none".

    Raises:
        ConfigError: the name has none of these forms.
        EncoderError: no such architecture, tag or file; or the hub cannot be reached.
    """
    scheme, _, place = name.partition(":")
    if scheme == "local-dir":
        return _find_in_folder(name, Path(place))
    if scheme == "hf-hub":
        return _find_on_hub(name, place)
    if (
        Path(name).is_dir()
        and name.rpartition("/")[0].replace("/", "-") not in open_clip.list_models()
    ):
        has_config = (Path(name) / _CONFIG).is_file()
        form = f"local-dir:{name}" if has_config else f"{name}/CONFIG.json+{name}/WEIGHTS"
        raise ConfigError(f"open_clip:{name}: is a folder; write open_clip:{form}")
    model, pretrained = _split(name)
    architecture = find_architecture(model)
    return architecture, None if pretrained == RANDOM else find_weights(architecture, pretrained)


def _split(name: str) -> tuple[str, str]:
    """Split ARCHITECTURE/TAG or ARCHITECTURE+FILE; either part may contain a slash."""
    config, mark, weights = name.partition(".json+")
    if mark:
        model = f"{config}.json"
    elif "+" in name:
        model, _, weights = name.partition("+")
    elif name.lower().endswith(".json") or name.replace("/", "-") in open_clip.list_models():
        model, weights = name, ""
    else:
        model, _, weights = name.rpartition("/")
    if model and weights:
        return model, weights
    bare = model or name
    tags = open_clip.list_pretrained_tags_by_model(bare.replace("/", "-"))
    raise ConfigError(
        f"open_clip:{name} names no weights; use open_clip:{bare}/TAG"
        f"{f' ({suggest(bare, tags)})' if tags else ''}, open_clip:{bare}+FILE or, for random "
        f"ones, open_clip:{bare}/{RANDOM}"
    )


def _find_in_folder(name: str, folder: Path) -> tuple[Architecture, Weights]:
    if folder.is_dir() and not (folder / _CONFIG).is_file():
        raise EncoderError(
            f"{folder}: has no {_CONFIG}, so open_clip did not save it; name the model in "
            "open_clip, or with hf:FOLDER if transformers saved a text encoder there"
        )
    architecture = _register(folder / _CONFIG, tokenizer=name)
    for file in _FOLDER_WEIGHTS:
        if (folder / file).is_file():
            return architecture, Weights(folder / file, {})
    raise EncoderError(f"{folder}: contains no weights, looked for {', '.join(_FOLDER_WEIGHTS)}")


def _find_on_hub(name: str, repository: str) -> tuple[Architecture, Weights]:
    try:
        with quiet():
            config = download_pretrained_from_hf(repository, filename=_CONFIG)
            weights = download_pretrained_from_hf(repository)
    except (OSError, RuntimeError, ValueError) as error:
        raise EncoderError(
            f"open_clip:{name} could not be downloaded ({first_line(error)}); use "
            "open_clip:local-dir:FOLDER instead"
        ) from error
    return _register(Path(config), tokenizer=name), Weights(Path(weights), {})


def find_architecture(model: str) -> Architecture:
    """Find an architecture by name or JSON config file.

    Raises:
        EncoderError: there is none; similar names are suggested.
    """
    path = Path(model)
    if path.suffix.lower() == ".json":
        return _register(path)
    name = model.replace("/", "-")
    known = open_clip.list_models()
    if name in known:
        return Architecture(model, name, {}, tokenizer=name)
    raise EncoderError(
        f"open_clip has no architecture {model!r}; {suggest(name, known)}, "
        "or pass a JSON file of its config"
    )


def _register(path: Path, tokenizer: str | None = None) -> Architecture:
    """Register a config file with open_clip, under a name derived from its content."""
    try:
        content = path.read_bytes()
        document = parse_json(content)
        config = document.get("model_cfg", document)
        preprocessing = document.get("preprocess_cfg", {})
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    except OSError as error:
        raise EncoderError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise EncoderError(f"{path}: is not an open_clip model config ({error})") from None
    if missing:
        raise EncoderError(f"{path}: is not an open_clip model config, lacks {missing[0]!r}")
    name = f"{path.stem}-{hashlib.sha256(content).hexdigest()[:16]}"
    if name not in open_clip.list_models():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, f"{name}.json")
            copy.write_text(json.dumps(config), encoding="utf-8")
            open_clip.add_model_config(copy)
    return Architecture(str(path), name, preprocessing, tokenizer or name)


def find_weights(architecture: Architecture, pretrained: str) -> Weights:
    """Find the weights of a tag, downloading them if needed, or of a local checkpoint.

    Raises:
        EncoderError: no such tag or file, or the hub cannot be reached.
    """
    tag = open_clip.get_pretrained_cfg(architecture.name, pretrained)
    path = Path(pretrained).expanduser()
    if not tag and path.exists():
        return Weights(path, {})
    if not tag and (len(path.parts) > 1 or path.suffix):
        raise EncoderError(f"{pretrained}: no such checkpoint{likely_meant(path)}")
    if not tag:
        known = open_clip.list_pretrained_tags_by_model(architecture.name)
        hint = suggest(pretrained, known) if known else "none is known for it"
        raise EncoderError(
            f"{architecture.spec} has no tag {pretrained!r}; {hint}, or pass the path of a local "
            "checkpoint"
        )
    try:
        with quiet():
            return Weights(Path(open_clip.download_pretrained(tag)), tag)
    except (OSError, RuntimeError) as error:
        raise EncoderError(
            f"{pretrained!r} of {architecture.spec} could not be downloaded "
            f"({first_line(error)}); pass the path of a local checkpoint instead"
        ) from error


def build_network(architecture: Architecture, weights: Weights | None) -> Any:
    """Build the network with random weights, the same each time."""
    preprocessing = {**architecture.preprocessing, **(weights.tag if weights else {})}
    preprocessing.pop("size", None)  # the network's own size decides
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return open_clip.create_model(
                architecture.name, pretrained_text=False, force_preprocess_cfg=preprocessing
            )
        except OSError as error:
            raise EncoderError(_unreachable(architecture, "text tower", error)) from error
        except Exception as error:  # a config with wrong values can fail anywhere in open_clip
            raise EncoderError(
                f"{architecture.spec} cannot be built ({first_line(error)})"
            ) from error


def build_tokenizer(architecture: Architecture) -> Any:
    """Build the tokenizer of an architecture."""
    try:
        with quiet():
            return open_clip.get_tokenizer(architecture.tokenizer)
    except (OSError, ImportError, ValueError) as error:
        raise EncoderError(_unreachable(architecture, "tokenizer", error)) from error


def _unreachable(architecture: Architecture, part: str, error: Exception) -> str:
    return (
        f"the {part} of {architecture.spec} comes from the Hugging Face hub and could not be "
        f"loaded ({first_line(error)}); connect once, or fill the hub's cache"
    )


def load_weights(
    network: Any,
    weights: Weights,
    architecture: Architecture,
    sides: Collection[Modality] = tuple(Modality),
) -> None:
    """Load weights into a network, tensors only: pickled code is refused.

    The towers of `sides` must be there; what is missing of the other stays random.

    Raises:
        EncoderError: the checkpoint cannot be read, or is not of this architecture.
    """
    path, own = weights.path, network.state_dict()
    towers = {
        side: {k for k in own if k.startswith(_IMAGE) == (side == "image") and k not in _SCALES}
        for side in Modality
    }
    bare = {name.removeprefix(_IMAGE) for name in towers[Modality.IMAGE]}
    state = find_state(read_tensors(path), own.keys() | bare, path)
    if not towers[Modality.IMAGE] & state.keys():  # maybe the image tower itself
        named = {f"{_IMAGE}{name}": tensor for name, tensor in state.items()}
        state = max(named, state, key=lambda names: len(names.keys() & own.keys()))
    is_openai = any(state.pop(name, None) is not None for name in _OPENAI)
    try:
        with quiet():
            state = _converted(network, state)
    except Exception as error:  # weights of another network fail in many ways
        reason = first_line(error)
        if "not implemented for" in reason:  # open_clip resizes positions, but not in float16
            reason = "its position embeddings have another size"
        raise EncoderError(
            f"{path} does not fit {architecture.spec} ({reason}); choose the architecture that it "
            "was trained with"
        ) from error
    found = [side for side, names in towers.items() if names & state.keys()]
    if len(found) == 1 and found != list(sides):
        raise EncoderError(
            f"{path}: contains the {found[0]} tower alone; pass it as --{found[0]}-encoder, and "
            "another encoder, or none, for the other side"
        )
    required = set().union(*(towers[side] for side in sides))
    load_state(network, state, required, path, architecture.spec)
    is_quick = weights.tag.get("quick_gelu", is_openai or "openai" in str(path).lower())
    if is_quick and not architecture.quick_gelu:
        logger.warning(
            "%s: these weights look trained with QuickGELU, %s has GELU; use its -quickgelu "
            "variant, or the embeddings lose accuracy",
            *(path, architecture.spec),
        )


def _converted(network: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert other layouts that open_clip knows, and resize position embeddings, as it does."""
    state = convert_state_dict(network, state)
    if "positional_embedding" in state and not hasattr(network, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in _SCALES:
        if name in state and (scale := getattr(network, name, None)) is not None:
            state[name] = state[name].reshape(scale.shape)
    if not hasattr(network, _POSITION_IDS):
        state.pop(_POSITION_IDS, None)
    resize_pos_embed(state, network)
    resize_text_pos_embed(state, network)
    return state
