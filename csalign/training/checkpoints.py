"""The folder of an unfinished run, ``OUT.partial``, and the checkpoints that a rerun resumes from.

A checkpoint is a folder ``step-000120`` with ``adapter.json`` and ``adapter.safetensors``, the
weights after 120 steps. Those in ``checkpoints/`` stay in the run. Those in ``resume/`` also hold
``state.safetensors``, all else that training depends on, and ``SHA256SUMS`` of the three; a rerun
resumes from the newest intact one. ``.csalign-job.json`` describes the run.
"""

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from csalign.adapters.checkpoint import DESCRIPTION, WEIGHTS, AdapterInfo, save_adapter
from csalign.adapters.side import mean_square
from csalign.core import __version__, atomic, distributed, locks, outputs, signals
from csalign.core.enums import Modality
from csalign.core.errors import OutputError, SchemaError, Stopped, TrainingError
from csalign.core.paths import is_remote
from csalign.core.records import Record, parse_json, read_job, write_record
from csalign.features.reader import FeatureSet
from csalign.runs.metadata import CONFIG, ENTRIES, ENVIRONMENT, FEATURES, LINES, write_environment
from csalign.training.data import TrainingData
from csalign.training.loop import Trainer

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
CHECKPOINTS_KEPT = 3
RESUMABLE_KEPT = 2  # in case the newest is damaged
SECONDS_BETWEEN = 60.0

STATE = "state.safetensors"
SUMS = "SHA256SUMS"
_SUMMED = (DESCRIPTION, WEIGHTS, STATE)
_HEADER = "values"  # key of the JSON in the header of a state
_TENSOR = "tensor:"  # prefix of a tensor's name in the JSON

# Options that do not change the result, or are compared by the fingerprint of their content.
NOT_COMPARED = {
    *("out", "overwrite", "recipe", "features", "unpaired", "any_encoder"),
    *("report", "pictures", "umap", "device", "log_to", "save_every", "memory"),
}


class TrainingJob(Record):
    """All that determines the weights of a run, on one machine."""

    FORMAT: ClassVar[str] = "csalign-training"

    format: str = FORMAT
    version: int = 4  # of the checkpoints
    options: dict[str, Any]  # of the config, except `NOT_COMPARED`
    features: str  # fingerprint of the feature set
    unpaired: list[str]  # fingerprints of the further sets

    @classmethod
    def of(
        cls, options: Mapping[str, Any], features: FeatureSet, unpaired: Sequence[Path]
    ) -> "TrainingJob":
        """Describe a run by its options and the content of its feature sets."""
        return cls(
            options={name: v for name, v in options.items() if name not in NOT_COMPARED},
            features=features.manifest.fingerprint(),
            unpaired=[FeatureSet.open(path).manifest.fingerprint() for path in unpaired],
        )


class Checkpoint(NamedTuple):
    """Checkpoint to resume from: weights, step, seconds so far, and `Trainer.state_dict`."""

    folder: Path
    step: int
    seconds: float
    trainer: dict[str, Any]


class UnfinishedRun:
    """Folder of an unfinished run; opened by `open_run`.

    Args:
        path: of the folder.
        resumed: checkpoint to resume from, None for a new run.
        every: steps between resumable checkpoints; None for one per minute.
    """

    _trainer: Trainer
    _info: dict[str, Any]
    _environment: dict[str, Any]

    def __init__(self, path: Path, resumed: Checkpoint | None, every: int | None) -> None:
        self.path, self.resumed, self._every = path, resumed, every
        self._began = self._saved = time.monotonic()

    def begin(
        self, trainer: Trainer, data: TrainingData, start: str, *, config: str, seed: int
    ) -> None:
        """Load the checkpoint to resume from into the trainer; describe the run in its folder.

        Args:
            trainer: of the adapters of that checkpoint.
            data: rows that they are trained on.
            start: name of their initialization.
            config: content of ``config.toml``.
            seed: of the run.

        Raises:
            SchemaError: the checkpoint is not of this run.
        """
        if self.resumed is not None:
            try:
                trainer.load_state_dict(self.resumed.trainer)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise SchemaError(
                    f"{self.resumed.folder}: is not a checkpoint of this run ({error!r}); start "
                    "again with --overwrite"
                ) from error
            log.info("resuming from step %d (%s)", trainer.step, self.resumed.folder)
        features = data.features
        encoders = {side: features.table(side).encoder for side in Modality}
        self._trainer = trainer
        self._info = {
            "encoders": {side: own.spec for side, own in encoders.items()},
            "encoder_fingerprints": {side: own.weights for side, own in encoders.items()},
            "encoder_settings": {side: own.settings for side, own in encoders.items()},
            "start": start,
            "data_fingerprint": features.manifest.fingerprint(),
            "train_split": data.split,
            "image_norm": mean_square(data.rows.images) ** 0.5,
        }
        libraries = ("torch", "numpy", "pyarrow", "faiss-cpu", "safetensors")
        self._environment = {
            "csalign": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: version(name) for name in libraries},
            "device": str(trainer.device),
            "processes": distributed.world().size,
            "threads": torch.get_num_threads(),
            "seed": seed,
            "command_line": sys.argv,
            FEATURES: str(features.path if is_remote(features.path) else features.path.absolute()),
        }
        atomic.write_text(self.path / CONFIG, config)
        atomic.write_json(self.path / ENVIRONMENT, self._environment)
        (self.path / LINES).touch()

    @property
    def _seconds(self) -> float:
        """Wall time of the run so far, including that of earlier processes."""
        return time.monotonic() - self._began + (self.resumed.seconds if self.resumed else 0.0)

    def keep(self) -> None:
        """Save a checkpoint that stays in the run, of which the newest three do."""
        path = _step_folder(self.path / CHECKPOINTS, self._trainer.step)
        with signals.delayed():  # a checkpoint in the run is complete or absent
            path.mkdir(parents=True, exist_ok=True)
            self._save_weights(path)
        for old in _steps_in(self.path / CHECKPOINTS)[:-CHECKPOINTS_KEPT]:
            outputs.remove_folder(old)

    def is_due(self, step: int) -> bool:
        """Return whether to save a resumable checkpoint after this step."""
        if self._every is not None:
            return step > 0 and step % self._every == 0
        return step > 0 and time.monotonic() - self._saved > SECONDS_BETWEEN

    def save(self) -> Path:
        """Save a resumable checkpoint atomically, remove old ones, and return its folder."""
        folder = _step_folder(self.path / outputs.RESUME, self._trainer.step)
        if not folder.exists():
            lines = self.path / LINES
            atomic.fsync_path(lines)
            state = {
                "step": self._trainer.step,
                "seconds": self._seconds,
                "trainer": self._trainer.state_dict(),
                "lines_bytes": lines.stat().st_size,
                "lines_sha256": atomic.sha256_file(lines),
            }
            temporary = folder.with_name(f".{folder.name}.tmp")
            outputs.remove_folder(temporary)
            temporary.mkdir(parents=True)
            self._save_weights(temporary)
            write_state(temporary / STATE, state)
            sums = [f"{atomic.sha256_file(temporary / name)}  {name}\n" for name in _SUMMED]
            atomic.write_text(temporary / SUMS, "".join(sums))
            atomic.fsync_path(temporary)
            temporary.rename(folder)
            atomic.fsync_path(folder.parent)
            for old in _steps_in(folder.parent)[:-RESUMABLE_KEPT]:
                outputs.remove_folder(old)
        self._saved = time.monotonic()
        return folder

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Save a resumable checkpoint if the block is stopped; name the last one if it diverges."""
        with signals.polling() if distributed.world().size > 1 else nullcontext():
            try:
                yield
            except TrainingError as error:
                kept = _steps_in(self.path / CHECKPOINTS)
                last = (
                    f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint"
                )
                raise TrainingError(f"{error}; {last}") from None
            except (Stopped, KeyboardInterrupt) as stopped:
                if self._trainer.can_be_saved:
                    with signals.delayed():
                        where = self.save()
                    log.info("saved step %d in %s", self._trainer.step, where)
                if isinstance(stopped, Stopped):
                    stopped.resumes = bool(_steps_in(self.path / outputs.RESUME))
                raise

    def finish(self, validation: dict[str, float] | None) -> float:
        """Write the final weights and the environment; return the wall time in seconds."""
        self._save_weights(self.path, validation)
        seconds = round(self._seconds, 3)
        write_environment(self.path, {**self._environment, "seconds": seconds})
        return seconds

    def _save_weights(self, folder: Path, validation: dict[str, float] | None = None) -> None:
        adapter, loss = self._trainer.adapter, self._trainer.loss
        info = AdapterInfo(
            adapters={side: adapter.side(side).shape for side in Modality},
            step=self._trainer.step,
            logit_scale=loss.logit_scale,
            bandwidth=loss.sigma,
            validation=validation,
            **self._info,
        )
        save_adapter(folder, adapter, info)


def check_run_folder(out: Path, features: Path, *, overwrite: bool) -> None:
    """Raise OutputError if a run must not be written there; see `outputs.check_output`."""
    outputs.check_output(out, ENTRIES, overwrite=overwrite, inputs=(features,))


@contextmanager
def open_run(
    out: Path, job: TrainingJob, *, restart: bool, every: int | None
) -> Iterator[UnfinishedRun]:
    """Begin or resume a run; after the block, move its folder to `out`.

    If the block raises, all checkpoints stay. After a `TrainingError`, which resuming would only
    repeat, those to resume from are removed.

    Args:
        out: final folder, after `check_out`.
        job: description of the run.
        restart: discard an unfinished run with other options, or a damaged one.
        every: see `UnfinishedRun`.

    Raises:
        OutputError: another process trains there, or another run or job is unfinished there.
        SchemaError: all checkpoints there are damaged.
    """
    out = out.resolve()
    folder = outputs.partial_path(out)
    outputs.refuse_other_work(folder, TrainingJob.FORMAT)
    with atomic.translate_os_errors(out), locks.lock_folder(folder):
        run = UnfinishedRun(folder, _begin(folder, job, restart=restart), every)
        try:
            yield run
        except TrainingError:
            (folder / outputs.JOB).unlink()
            outputs.remove_folder(folder / outputs.RESUME)
            raise
        except BaseException:
            if not any(_steps_in(folder / name) for name in (CHECKPOINTS, outputs.RESUME)):
                outputs.cleanup(folder)
            raise
        outputs.commit(folder, out)
        # Only now, so that a process killed before loses nothing.
        outputs.remove_folder(out / outputs.RESUME)
        (out / outputs.JOB).unlink()


def _begin(folder: Path, job: TrainingJob, *, restart: bool) -> Checkpoint | None:
    """Prepare a folder; return the checkpoint to resume from if it has one of the same run."""
    path = folder / outputs.JOB
    found = read_job(path, TrainingJob, restart=restart)
    saved = _steps_in(folder / outputs.RESUME)
    if found is not None and found != job and saved and not restart:
        raise OutputError(_difference(folder, found, job))
    if found == job and saved:
        checkpoint = _newest(saved, restart=restart)
        if checkpoint is not None:
            for later in [*saved, *_steps_in(folder / CHECKPOINTS)]:
                if _step_of(later) > checkpoint.step:
                    outputs.remove_folder(later)
            return checkpoint
    outputs.empty_folder(folder)
    write_record(path, job)
    return None


def _difference(folder: Path, found: TrainingJob, job: TrainingJob) -> str:
    old, new = ({**own.options, "checkpoint version": own.version} for own in (found, job))
    changes = [
        f"{name.replace('_', '-')} {old.get(name, 'unset')}, not {new.get(name, 'unset')}"
        for name in {**new, **old}
        if old.get(name) != new.get(name)
    ]
    if found.features != job.features:
        changes.append("features of other content")
    if found.unpaired != job.unpaired:
        changes.append("other unpaired features")
    return (
        f"{folder}: contains a run that was started with {'; '.join(changes)}: resume with the "
        "same options, start again with --overwrite, or choose another --out"
    )


def _newest(saved: list[Path], *, restart: bool) -> Checkpoint | None:
    """Read the newest intact checkpoint; SchemaError if there is none, unless `restart`."""
    for path, before in zip(reversed(saved), [*reversed(saved[:-1]), None], strict=True):
        try:
            return _read(path)
        except SchemaError as error:
            if before is None and not restart:
                raise SchemaError(f"{error}; start again with --overwrite") from None
            action = f"going back to {before}" if before else "starting again"
            log.warning("%s; %s", error, action)
    return None


def _read(folder: Path) -> Checkpoint:
    """Verify and read a checkpoint, and truncate the run's log to it; SchemaError if damaged."""
    try:
        sums = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SchemaError(f"{folder / SUMS}: cannot be read ({error})") from None
    for name in _SUMMED:
        path = folder / name
        if not path.is_file() or f"{atomic.sha256_file(path)}  {name}" not in sums:
            raise SchemaError(f"{path}: does not match its checksum in {SUMS}")
    state = read_state(folder / STATE)
    lines, size = folder.parent.parent / LINES, state.pop("lines_bytes")
    if not lines.is_file() or lines.stat().st_size < size:
        raise SchemaError(f"{lines}: is shorter than when {folder} was saved")
    with lines.open("rb") as file:
        if state.pop("lines_sha256") != sha256(file.read(size)).hexdigest():
            raise SchemaError(f"{lines}: was changed or is damaged since {folder} was saved")
    os.truncate(lines, size)
    return Checkpoint(folder, **state)


def _step_folder(parent: Path, step: int) -> Path:
    return parent / f"step-{step:06d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _steps_in(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if path.name[len("step-") :].isdecimal()]
    return sorted(found, key=_step_of)


def write_state(path: Path, values: Mapping[str, Any]) -> None:
    """Write nested values as a safetensors file with JSON in its header, and sync it to disk.

    Args:
        path: a new file.
        values: of mappings, lists, tensors and plain values. Keys become strings, tuples lists.

    Raises:
        OutputError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = f"{_TENSOR}{len(tensors)}"
            # Cloned, since safetensors refuses tensors that share memory, as tied weights do.
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return name
        if isinstance(value, Mapping):
            return {str(key): pack(part) for key, part in value.items()}
        return [pack(part) for part in value] if isinstance(value, list | tuple) else value

    document = json.dumps(pack(values))
    try:
        save_file(tensors, path, {_HEADER: document})
    except SafetensorError as error:  # also if the disk is full
        raise OutputError(atomic.os_error(error, path)) from None
    atomic.fsync_path(path)


def read_state(path: Path) -> dict[str, Any]:
    """Read a file of `write_state`, tensors on the CPU; SchemaError if it is not one."""

    def unpack(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(_TENSOR):
            return tensors[value]
        if isinstance(value, dict):
            return {key: unpack(part) for key, part in value.items()}
        return [unpack(part) for part in value] if isinstance(value, list) else value

    try:
        with safe_open(path, "pt") as file:
            document = parse_json((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        state: dict[str, Any] = unpack(document)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise SchemaError(f"{path}: cannot be read ({error})") from None
    return state
