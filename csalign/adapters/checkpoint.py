"""Adapters on disk: weights in safetensors, everything else in ``adapter.json``."""

from collections.abc import Collection
from pathlib import Path
from typing import Final, Literal, Self

import torch
from pydantic import model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from csalign.adapters.hub import fetch
from csalign.adapters.kinds import KINDS
from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape
from csalign.core import atomic
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, OutputError, SchemaError, ShapeError
from csalign.core.records import Record, read_record, write_record
from csalign.core.version import __version__

WEIGHTS = "adapter.safetensors"
DESCRIPTION = "adapter.json"
FORMAT_VERSION: Final = 1


class AdapterInfo(Record):
    """Content of ``adapter.json``.

    Attributes:
        adapters: shape of each side's adapter.
        encoders: the encoder spec of each side that it was trained on.
        start: the closed form that training started from, or "random".
        step: optimiser step of these weights.
        logit_scale: 1 / temperature of InfoNCE at that step.
        bandwidth: of the divergence at that step; None where it had no weight.
        data_fingerprint: of the feature set that it was trained on.
        train_split: the split(s) of it that it was trained on.
        image_norm: root mean square norm of the images' embeddings there, which adapters do not
            see; None in runs of older versions.
        validation: figures of these weights on the validation rows; None where not measured.
        weights_sha256: of the weights file; set when it is written.
    """

    format: Literal["csalign-adapter"] = "csalign-adapter"
    format_version: Literal[1] = FORMAT_VERSION
    csalign_version: str = __version__
    adapters: dict[Modality, SideShape]
    encoders: dict[Modality, str]
    start: str
    step: int
    logit_scale: float
    bandwidth: float | tuple[float, ...] | None
    data_fingerprint: str
    train_split: str
    image_norm: float | None = None
    validation: dict[str, float] | None = None
    weights_sha256: str = ""

    @model_validator(mode="after")
    def _has_both_sides(self) -> Self:
        for given in (self.adapters, self.encoders):
            if set(given) != set(Modality):
                raise ValueError("an image and a text side are needed")
        return self


def save_adapter(folder: Path, adapter: Adapter, info: AdapterInfo) -> None:
    """Write weights, then the description; each appears whole or not at all.

    Args:
        folder: an existing folder.
        adapter: both sides.
        info: what to say of them.
    """
    # Cloned, since safetensors refuses tensors that share memory, as tied weights do.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in _state(adapter).items()
    }
    temporary = folder / f".{WEIGHTS}.tmp"
    with atomic.translate_os_errors(folder / WEIGHTS):
        temporary.touch()
        mode = temporary.stat().st_mode  # the library would let nobody else read it
    try:
        save_file(tensors, temporary)
    except SafetensorError as error:  # also where the disk is full
        raise OutputError(atomic.os_error(error, folder / WEIGHTS)) from None
    temporary.chmod(mode)
    atomic.fsync_path(temporary)
    info = info.model_copy(update={"weights_sha256": atomic.sha256_file(temporary)})
    temporary.rename(folder / WEIGHTS)
    write_record(folder / DESCRIPTION, info)


def load_adapter(
    folder: Path | str,
    *,
    hub: bool = False,
    revision: str | None = None,
    allow: Collection[str] = (),
) -> Adapter:
    """Load a trained adapter; safetensors and JSON alone, never a pickle.

    Args:
        folder: a run folder, a checkpoint in it, or what ``csalign export`` made.
        hub: where there is no such folder, take it for the name of a repository on the Hugging
            Face hub, ``user/name``.
        revision: of that repository.
        allow: kinds ``package.module:Class`` that may be imported if the run names them, since
            that runs their code; kinds of installed entry points need not be here.

    Returns:
        The adapter in evaluation mode, on the CPU.

    Raises:
        DataError: there is no adapter at `folder`.
        SchemaError: its files are damaged, do not agree, are of another format version, or name
            a kind that is not installed or not allowed.
    """
    path = Path(folder)
    if hub and not path.exists():
        path = fetch(str(folder), revision=revision)
    return load_adapter_with_info(path, allow=allow)[0]


def load_adapter_with_info(
    folder: Path, *, allow: Collection[str] = ()
) -> tuple[Adapter, AdapterInfo]:
    """Like `load_adapter`, with the description beside it."""
    info = read_info(folder)
    path = folder / WEIGHTS
    adapter = _empty(info, folder / DESCRIPTION, allow)
    expected = _state(adapter)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SchemaError(f"{path}: cannot be read ({error}); train again") from None
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    needed = {name: tuple(value.shape) for name, value in expected.items()}
    if found != needed:
        wrong = sorted(name for name in found | needed if found.get(name) != needed.get(name))
        raise SchemaError(f"{path}: does not agree with {DESCRIPTION} in {wrong[0]}; train again")
    if atomic.sha256_file(path) != info.weights_sha256:
        raise SchemaError(
            f"{path}: the content does not agree with the checksum in {DESCRIPTION}: the weights "
            "were changed or are damaged; train again"
        )
    if adapter.image.mean.is_meta:
        adapter.to_empty(device="cpu")
    adapter.load_state_dict(tensors)
    return adapter.eval(), info


def _empty(info: AdapterInfo, path: Path, allow: Collection[str]) -> Adapter:
    """The described adapter, without memory for weights where the kinds are csalign's own.

    So what a damaged description asks for is compared with the weights file before it is taken.
    """
    own = all(shape.kind in KINDS for shape in info.adapters.values())
    try:
        with torch.device("meta" if own else "cpu"):
            return Adapter(info.adapters, allow=allow)
    except (ConfigError, ShapeError) as error:
        raise SchemaError(f"{path}: {error}") from None


def read_info(folder: Path) -> AdapterInfo:
    """Read ``adapter.json`` of a run folder or checkpoint.

    Raises:
        DataError: there is none.
        SchemaError: it is damaged or of another format version.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        kind = "holds no trained adapter" if folder.exists() else "no such run"
        raise DataError(f"{folder}: {kind} (no {DESCRIPTION}); train one with csalign train")
    return read_record(path, AdapterInfo, "train again")


def _state(adapter: Adapter) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = dict(adapter.state_dict())
    return state
