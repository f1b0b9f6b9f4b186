"""Read a checkpoint as plain tensors and find a network's weights in it, whatever wraps them."""

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from csalign.core.errors import EncoderError
from csalign.core.paths import likely_meant, stand_in
from csalign.core.records import parse_json
from csalign.encoders.running import first_line

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

_NESTED = "/"  # between the key of a dict and the names in it
_LEAST = 0.1  # of the names, below which they are there by chance
_ALIKE = 0.9  # of the names found under the best prefix, from which another is as good
# What names say of a checkpoint that is not plain weights of the wanted layout.
_LAYOUTS = {
    r"\.lora_[AB]\.": "contains LoRA weights; merge them into their model and save that",
    r"\.(SCB|absmax|qweight|quant_map)$": "is quantised; save it unquantised",
    r"(vision|text)_model\.": "has the layout of transformers; name the same model in open_clip "
    "(open_clip:ARCHITECTURE/TAG), or convert it to open_clip's names",
    r"patch_embed\.": "has the layout of timm; name it timm:MODEL+FILE",
    r"visual\.": "has the layout of open_clip; name it open_clip:ARCHITECTURE+FILE",
}


def read_tensors(path: Path) -> Tensors:
    """Read all tensors of a checkpoint; names in nested dicts are joined by a slash.

    Args:
        path: a safetensors file, one of `torch.save`, or the index.json of one in several files.

    Raises:
        EncoderError: no such file, or it contains anything but plain weights.
    """
    if not path.is_file():
        what = "is a folder; pass the file in it" if path.is_dir() else "no such checkpoint"
        raise EncoderError(f"{path}: {what}{likely_meant(path)}")
    start = b"?"
    try:
        if path.name.endswith(".index.json"):
            files = sorted(set(parse_json(path.read_bytes())["weight_map"].values()))
            parts = [read_tensors(path.with_name(Path(file).name)) for file in files]
            return {name: tensor for part in parts for name, tensor in part.items()}
        with path.open("rb") as file:
            start = file.read(1024)
        is_safe = start[8:9] == b"{" or path.suffix == ".safetensors"
        content = (
            load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
        )
    except EncoderError:
        raise
    except Exception as error:  # a file that is not a checkpoint fails in many ways
        if "TorchScript" in str(error):
            raise EncoderError(
                f"{path}: is a TorchScript archive, which may run code of its own; if you trust "
                "it, save its weights alone: "
                f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pt')"
            ) from None
        if found := stand_in(start) or stand_in(path):
            raise EncoderError(f"{path}: {found}") from None
        raise EncoderError(
            f"{path} cannot be read as plain weights ({first_line(error)}); convert it to "
            ".safetensors, or save its state dict alone"
        ) from error
    tensors = _flat(content)
    if not tensors:
        raise EncoderError(f"{path}: contains no weights; save a model's state dict")
    return tensors


def _flat(content: Any) -> Tensors:
    found = {}
    for key, own in content.items() if isinstance(content, Mapping) else ():
        if isinstance(own, torch.Tensor):
            found[str(key)] = own
        found |= {f"{key}{_NESTED}{name}": tensor for name, tensor in _flat(own).items()}
    return found


def find_state(tensors: Tensors, names: Collection[str], path: Path) -> Tensors:
    """Find the tensors that have a network's names, behind the prefix that most of them share.

    The prefix is what wrappers put before them: ``module.``, ``_orig_mod.``, ``model.``, or the
    key of a dict that contains the state dict. All tensors behind it are returned.

    Args:
        tensors: content of the checkpoint.
        names: all names of the network.
        path: of the checkpoint, for messages.

    Raises:
        EncoderError: it contains different weights of the network behind several prefixes.
    """
    places: dict[str, set[str]] = {"": set()}
    for name in tensors:
        for start in (0, *(sign.end() for sign in re.finditer(rf"[.{_NESTED}]", name))):
            if name[start:] in names:
                places.setdefault(name[:start], set()).add(name)
    best, held = max(places.items(), key=lambda item: len(item[1]))
    if len(held) < _LEAST * len(names):
        return tensors
    state = _behind(best, tensors)
    for prefix, others in places.items():
        is_alike = len(others) >= _ALIKE * len(held) > 0 and not others & held
        if is_alike and not _are_equal(state, _behind(prefix, tensors)):
            listed = " and ".join(repr(own.rstrip("./") or "no prefix") for own in (best, prefix))
            raise EncoderError(
                f"{path}: contains weights of this model twice, behind {listed}; save those to use "
                f"alone: torch.save(torch.load({str(path)!r})[KEY], 'weights.pt')"
            )
    if best:
        logger.info("%s: read the weights behind the prefix %s", path, best)
    return state


def _behind(prefix: str, tensors: Tensors) -> Tensors:
    names = [name for name in tensors if name.startswith(prefix)]
    short = {name[len(prefix) :]: tensors[name] for name in names}
    return {name: tensor for name, tensor in short.items() if _NESTED not in name}


def _are_equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def load_state(
    network: torch.nn.Module, state: Tensors, required: Collection[str], path: Path, model: str
) -> None:
    """Load tensors into a network, once each is known to fit its place.

    Args:
        network: to load them into.
        state: tensors by the network's names.
        required: names that must be there, since they would be random.
        path: of the checkpoint, for messages.
        model: name of the network, for messages.

    Raises:
        EncoderError: one is missing, has another shape or is quantised, or the network lacks it.
    """
    own = network.state_dict()
    missing = [name for name in own if name in required and name not in state]
    unknown = [name for name in state if name not in own]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    problem, remedy = "", "choose the architecture that it was trained with"
    for pattern, said in _LAYOUTS.items() if missing or unknown else ():
        if any(re.search(pattern, k) for k in state) and not re.search(pattern, " ".join(own)):
            raise EncoderError(f"{path}: {said}")
    if missing and (shard := re.search(r"-\d+-of-0*(\d+)\.", path.name)):
        remedy = f"it is one of {shard[1]} files, pass the .index.json beside them"
        problem = f"it lacks {missing[0]}"
    elif wrong:
        there, here = (tuple(held[wrong[0]].shape) for held in (state, own))
        problem = f"{wrong[0]} has shape {there}, the model has {here}"
    elif missing:
        problem = f"it lacks {len(missing)} of {len(own)} tensors, such as {missing[0]}"
        remedy += ", or a complete checkpoint"
    elif unknown:
        problem = f"it has {len(unknown)} tensors more, such as {unknown[0]}"
    if problem:
        raise EncoderError(f"{path} does not fit {model} ({problem}); {remedy}")
    for name, held in state.items():
        if own[name].is_floating_point() and (held.is_quantized or held.dtype.itemsize < 2):
            raise EncoderError(f"{path}: {name} is quantised ({held.dtype}); save it unquantised")
    network.load_state_dict(state, strict=False)
