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
# What torch and safetensors say of files that end too early.
_CUT = (
    "central directory|not a ZIP archive|unexpected EOF|Ran out of input|incomplete metadata|"
    "[Ii]nvalid ?header ?length|header ?too ?small"
)
_LEAST = 0.1  # of the names, below which they are there by chance
_ALIKE = 0.9  # of the names found under the best prefix, from which another is as good
# Of weights that are not those of the network, by a name in them that it does not have.
_REMEDIES = {
    r"\.lora_[AB]\.": "it has LoRA weights; merge them into their model and save that",
    r"\.(SCB|absmax|qweight|quant_map)$": "it is quantised; save it unquantised",
    r"(vision|text)_model\.": "it has the layout of transformers; name the same model in "
    "open_clip, as open_clip:ARCHITECTURE/TAG",
    r"patch_embed\.": "it has the layout of timm; name it timm:MODEL+FILE",
    r"visual\.": "it has the layout of open_clip; name it open_clip:ARCHITECTURE+FILE",
}


def read_tensors(path: Path) -> Tensors:
    """Read all tensors of a checkpoint; names in nested dicts are joined by a slash.

    It is a safetensors file, one of `torch.save`, or the index.json of one in several files.

    Raises:
        EncoderError: no such file, or it contains anything but plain weights.
    """
    if not path.is_file():
        what = "is a folder; pass the file in it" if path.is_dir() else "no such checkpoint"
        raise EncoderError(f"{path}: {what}{likely_meant(path)}")
    try:
        if path.name.endswith(".index.json"):
            files = sorted(set(parse_json(path.read_bytes())["weight_map"].values()))
            parts = [read_tensors(path.with_name(Path(file).name)) for file in files]
            return {name: tensor for part in parts for name, tensor in part.items()}
        with path.open("rb") as file:
            is_safe = file.read(9)[8:] == b"{" or path.suffix == ".safetensors"
        content = (
            load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
        )
    except EncoderError:
        raise
    except Exception as error:  # a file that is not a checkpoint fails in many ways
        raise EncoderError(f"{path}{_problem(path, error)}") from error
    if not (tensors := _flat(content)):
        raise EncoderError(f"{path}: contains no weights; save a model's state dict")
    return tensors


def _problem(path: Path, error: Exception) -> str:
    """Word why a file cannot be read as plain weights, and what to do."""
    if found := stand_in(path if path.stat().st_size else b""):
        return f": {found}"
    if "TorchScript" in str(error):
        return (
            ": is a TorchScript archive, which may run code; if you trust it, convert it: "
            f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pt')"
        )
    reason = first_line(error)
    remedy = "convert it to .safetensors, or save its state dict alone"
    if isinstance(error, EOFError | IndexError) or re.search(_CUT, str(error)):
        reason, remedy = "it is incomplete or damaged", "download or copy it again"
    elif kind := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
        reason = f"it contains a pickled {kind[1]}, which may run code"
        remedy = (
            f"if you trust it, save its weights alone: m = torch.load({str(path)!r}, "
            "weights_only=False); torch.save(m.state_dict() if hasattr(m, 'state_dict') else "
            "m['state_dict'], 'weights.pt')"
        )
    return f" cannot be read as plain weights ({reason}); {remedy}"


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

    Raises:
        EncoderError: it contains different weights of the network behind several prefixes.
    """
    places: dict[str, set[str]] = {"": set()}
    for name in tensors:
        for start in (0, *(sign.end() for sign in re.finditer(rf"[.{_NESTED}]", name))):
            if name[start:] in names:
                places.setdefault(name[:start], set()).add(name)
    best = max(places, key=lambda prefix: len(places[prefix]))
    held = places.pop(best)
    if len(held) < _LEAST * len(names):
        return tensors
    state = _behind(best, tensors)
    found = {name.removeprefix(best) for name in held}
    for prefix, others in places.items():
        more = {name.removeprefix(prefix) for name in others}
        if len(more) >= _LEAST * len(names) and not more & found:  # a wrapper around a part
            state = {name: own for name, own in state.items() if best + name not in others}
            state |= {name: tensors[prefix + name] for name in more}
            found |= more
            continue
        if len(others) < _ALIKE * len(held) or others & held:
            continue
        same = _behind(prefix, tensors)
        if same.keys() != state.keys() or any(not same[k].equal(state[k]) for k in state):
            listed = " and ".join(repr(own.rstrip("./") or "no prefix") for own in (best, prefix))
            raise EncoderError(
                f"{path}: contains weights of this model twice, behind {listed}; save those to use "
                f"alone: torch.save(torch.load({str(path)!r})[KEY], 'weights.pt')"
            )
    if best:
        logger.info("%s: read the weights behind the prefix %s", path, best)
    return state


def _behind(prefix: str, tensors: Tensors) -> Tensors:
    found = {k.removeprefix(prefix): own for k, own in tensors.items() if k.startswith(prefix)}
    return {name: tensor for name, tensor in found.items() if _NESTED not in name}


def load_state(
    network: torch.nn.Module, state: Tensors, required: Collection[str], path: Path, model: str
) -> None:
    """Load tensors, by the network's names, into a network of which `required` must be there.

    Raises:
        EncoderError: one is missing, has another shape or is quantised, or the network lacks it.
    """
    own = network.state_dict()
    missing = [name for name in own if name in required and name not in state]
    unknown = [name for name in state if name not in own]
    problem, remedy = "", "choose the architecture that it was trained with"
    if missing:
        problem = f"it lacks {len(missing)} of {len(own)} tensors, such as {missing[0]}"
        remedy += ", or a complete checkpoint"
    elif unknown:
        problem = f"it has {len(unknown)} tensors more, such as {unknown[0]}"
    for name in filter(own.__contains__, state):
        there, here = state[name], own[name]
        if here.is_floating_point() and (there.is_quantized or there.dtype.itemsize < 2):
            problem, remedy = f"{name} is quantised as {there.dtype}", "save it unquantised"
            break
        if there.shape != here.shape:
            problem = f"{name} has shape {(*there.shape,)}, the model has {(*here.shape,)}"
            break
    if missing and (shard := re.search(r"-\d+-of-0*(\d+)\.", path.name)):
        remedy = f"it is one of {shard[1]} files, pass the .index.json beside them"
    for pattern, said in _REMEDIES.items() if missing or unknown else ():
        if any(re.search(pattern, k) for k in state) and not re.search(pattern, " ".join(own)):
            remedy = said
            break
    if problem:
        raise EncoderError(f"{path} does not fit {model} ({problem}); {remedy}")
    network.load_state_dict(state, strict=False)
