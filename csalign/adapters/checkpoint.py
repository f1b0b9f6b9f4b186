"""Adapters on disk: weights in safetensors, everything else in ``adapter.json``."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from csalign.adapters.hub import local_run
from csalign.adapters.kinds import is_baseline
from csalign.adapters.model import Adapter, is_builtin
from csalign.adapters.side import SideShape
from csalign.core import __version__, atomic
from csalign.core.enums import AnySide, SideName
from csalign.core.errors import ConfigError, DataError, SchemaError, ShapeError
from csalign.core.paths import DOCUMENTS, Kind, require_kind, stand_in
from csalign.core.records import Record, read_record, write_record
from csalign.features.schema import EncoderInfo

WEIGHTS = "adapter.safetensors"
DESCRIPTION = DOCUMENTS[Kind.RUN]
TwoOrMore = Field(min_length=2)


class AdapterInfo(Record):
    """Content of ``adapter.json``."""

    format: Literal["csalign-adapter"] = "csalign-adapter"
    format_version: Literal[1] = 1
    csalign_version: str = __version__
    adapters: Annotated[dict[SideName, SideShape], TwoOrMore]
    encoders: Annotated[dict[SideName, str], TwoOrMore]  # specs of those it was trained on
    encoder_fingerprints: dict[SideName, str | None] | None = None  # None in old runs
    encoder_settings: dict[SideName, dict[str, Any]] | None = None  # of `EncoderInfo.settings`
    start: str  # the closed form that training started from, or "random"
    step: int  # optimiser step of these weights
    logit_scale: float  # 1 / temperature of InfoNCE at that step
    bandwidth: float | tuple[float, ...] | None  # of the divergence; None if it had no weight
    data_fingerprint: str  # of the feature set that it was trained on
    train_split: str  # the split(s) of it that it was trained on
    image_norm: float | None = None  # root mean square of those embeddings; None in old runs
    validation: dict[str, float] | None = None  # metrics of these weights
    weights_sha256: str = ""  # set by `save_adapter`

    def encoder(self, side: AnySide) -> EncoderInfo:
        """Return what is known of the encoder that one side was trained on."""
        return EncoderInfo(
            spec=self.encoders[side],
            fingerprint=(self.encoder_fingerprints or {}).get(side),
            width=self.adapters[side].input_width,
            preprocessing=(self.encoder_settings or {}).get(side, {}),
        )


def unknown_info(shapes: Mapping[AnySide, SideShape]) -> AdapterInfo:
    """Describe an adapter of which only the shapes are known."""
    return AdapterInfo(
        adapters=dict(shapes),
        encoders=dict.fromkeys(shapes, "unknown"),
        start="random",
        step=0,
        logit_scale=1.0,
        bandwidth=None,
        data_fingerprint="",
        train_split="",
    )


def save_adapter(folder: Path, adapter: Adapter, info: AdapterInfo) -> None:
    """Write the weights, then the description with their checksum, into an existing folder."""
    content, digest = weights_of(adapter)
    path = folder / WEIGHTS
    with atomic.translate_os_errors(path), atomic.atomic_path(path) as temporary:
        temporary.write_bytes(content)
    write_record(folder / DESCRIPTION, info.model_copy(update={"weights_sha256": digest}))


def weights_of(adapter: Adapter) -> tuple[bytes, str]:
    """Return the content of the file of weights, and its checksum."""
    # Cloned, since safetensors refuses tensors that share memory, as tied weights do.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in adapter.state_dict().items()
    }
    content = save(tensors)
    return content, hashlib.sha256(content).hexdigest()


def load_adapter(
    folder: Path | str,
    *,
    hub: bool = True,
    revision: str | None = None,
    allow: Collection[str] = (),
) -> Adapter:
    """Load a trained adapter from safetensors and JSON; never from a pickle.

    Args:
        folder: a run folder, a checkpoint in it, or an export; or a repository on the Hugging Face
            hub, ``hf://USER/REPO``, or ``USER/REPO`` if no local folder has that name.
        hub: whether it may be on the hub.
        revision: branch, tag or commit of that repository.
        allow: kinds ``package.module:Class`` that may be imported if the run names them, which
            runs their code; kinds of installed entry points need not be listed.

    Returns:
        The adapter in evaluation mode, on the CPU.

    Raises:
        DataError: no adapter at `folder`, or the hub cannot be reached.
        SchemaError: its files are damaged, contradict each other, have another format version, or
            name a kind that is not installed or not allowed.

    >>> import csalign, numpy, tempfile
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 30, 4))
    >>> run = tempfile.mkdtemp() + "/run"
    >>> adapter = csalign.fit(images, texts, out=run, steps=2)
    >>> csalign.load_adapter(run).embed_images(images).shape
    (30, 4)
    """
    path = local_run(folder, revision=revision) if hub else Path(folder)
    return load_adapter_with_info(path, allow=allow)[0]


def load_adapter_with_info(
    folder: Path, *, allow: Collection[str] = ()
) -> tuple[Adapter, AdapterInfo]:
    """Load an adapter and its description; see `load_adapter`."""
    info = read_info(folder)
    path = folder / WEIGHTS
    # Without memory, so that what a damaged description asks for is compared with the weights
    # file first. Custom kinds may not support that.
    own_code = all(map(is_builtin, info.adapters.values()))
    try:
        with torch.device("meta" if own_code else "cpu"):
            adapter = Adapter(info.adapters, allow=allow)
    except (ConfigError, ShapeError) as error:
        raise SchemaError(f"{folder / DESCRIPTION}: {error}") from None
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        problem = stand_in(path) or f"cannot be read ({error}); train again"
        raise SchemaError(f"{path}: {problem}") from None
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    needed = {name: tuple(value.shape) for name, value in adapter.state_dict().items()}
    wrong = sorted(name for name in found | needed if found.get(name) != needed.get(name))
    if wrong:
        raise SchemaError(f"{path}: does not match {DESCRIPTION} in {wrong[0]}; train again")
    if atomic.sha256_file(path) != info.weights_sha256:
        raise SchemaError(
            f"{path}: the content does not match the checksum in {DESCRIPTION}: the weights "
            "were changed or are damaged; train again"
        )
    if own_code:
        adapter.to_empty(device="cpu")
    adapter.load_state_dict(tensors)
    adapter.info = info
    return adapter.eval(), info


def read_info(folder: Path) -> AdapterInfo:
    """Read ``adapter.json``; raises DataError if there is none, SchemaError if it is damaged."""
    path = folder / DESCRIPTION
    if is_baseline(folder):
        raise DataError(
            f"{folder}: is a baseline, which is fitted on features, but a run is needed here; make "
            f"one with csalign train FEATURES --adapter {folder} --out RUN"
        )
    require_kind(folder, Kind.RUN)
    return read_record(path, AdapterInfo, "train again")
