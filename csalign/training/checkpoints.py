"""The folder of an unfinished run, ``OUT.partial``, and the checkpoints that a rerun resumes from.

A checkpoint is a folder ``step-000120`` with ``adapter.json`` and ``adapter.safetensors``, the
weights after 120 steps. Those in ``checkpoints/`` stay in the run. Those in ``resume/`` also hold
``state.safetensors``, all else that training depends on, and ``SHA256SUMS`` of the three; a rerun
resumes from the newest intact one. Once further networks are trained, ``resume/phase-01`` holds the
first one in the same files, and the checkpoints of the second. ``.csalign-job.json`` describes the
run.
"""

import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from csalign.adapters.checkpoint import DESCRIPTION, WEIGHTS, AdapterInfo, save_adapter
from csalign.adapters.model import Adapter
from csalign.core import __version__, atomic, distributed, locks, outputs, signals
from csalign.core.enums import AnySide
from csalign.core.errors import OutputError, SchemaError, Stopped, TrainingError
from csalign.core.paths import is_remote
from csalign.core.records import Record, read_job, write_record
from csalign.features.reader import FeatureSet
from csalign.runs.metadata import CONFIG, ENTRIES, ENVIRONMENT, FEATURES, LINES, write_environment
from csalign.training.network.loop import Trainer
from csalign.training.state import read_state, write_state

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
CHECKPOINTS_KEPT = 3
RESUMABLE_KEPT = 2  # in case the newest is damaged
SECONDS_BETWEEN = 60.0

STATE = "state.safetensors"
SUMS = "SHA256SUMS"
_SUMMED = (DESCRIPTION, WEIGHTS, STATE)

# Options that do not change the result, or are compared by the fingerprint of their content.
NOT_COMPARED = {
    *("out", "overwrite", "recipe", "features", "unpaired", "any_encoder"),
    *("report", "pictures", "umap", "device", "log_to", "log_every", "save_every", "memory"),
}


class TrainingJob(Record):
    """All that determines the weights of a run, on one machine."""

    FORMAT: ClassVar[str] = "csalign-training"

    format: str = FORMAT
    version: int = 6  # of the checkpoints
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
    """Checkpoint to resume from: weights, step, seconds so far, and the state.

    That is `Trainer.state_dict`, or what was decided in a phase that has ended.
    """

    folder: Path
    step: int
    seconds: float
    setting: Any  # of the start, JSON values
    state: dict[str, Any]


class UnfinishedRun:
    """Folder of an unfinished run; opened by `open_run`."""

    _trainer: Trainer
    _info: dict[str, Any]
    _complete: Callable[[Adapter], Adapter]
    _environment: dict[str, Any]

    def __init__(
        self,
        path: Path,
        ended: list[Checkpoint],
        resumed: Checkpoint | None,
        every: int | None,
        began: float,
    ) -> None:
        self.path, self.ended, self.resumed, self._every = path, ended, resumed, every
        self._began, self._saved = began, time.monotonic()
        self._before = max((own.seconds for own in (*ended, resumed) if own), default=0.0)

    def begin(
        self,
        trainer: Trainer,
        info: Mapping[str, Any],
        setting: Any,
        *,
        features: Path,
        config: str,
        seed: int,
        complete: Callable[[Adapter], Adapter] = lambda adapter: adapter,
    ) -> None:
        """Begin a phase: load the checkpoint to resume from into the trainer; describe the run.

        Args:
            trainer: of the phase.
            info: values of `AdapterInfo`; see `info_of`.
            setting: of the start, JSON values.
            features: the feature set.
            config: the options as TOML.
            seed: of the run.
            complete: makes the adapter of a checkpoint of the one that is trained.

        Raises:
            SchemaError: the checkpoint is not of this run.
        """
        if self.resumed is not None:
            try:
                trainer.load_state_dict(self.resumed.state)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise SchemaError(
                    f"{self.resumed.folder}: is not a checkpoint of this run ({error!r}); start "
                    "again with --overwrite"
                ) from error
            log.info("resuming from step %d (%s)", trainer.step, self.resumed.folder)
        self._trainer, self._setting = trainer, setting
        self._info, self._complete = dict(info), complete
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
            FEATURES: str(features if is_remote(features) else features.absolute()),
        }
        atomic.write_text(self.path / CONFIG, config)
        atomic.write_json(self.path / ENVIRONMENT, self._environment)
        (self.path / LINES).touch()

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, including that of earlier processes."""
        return time.monotonic() - self._began + self._before

    @property
    def _resume(self) -> Path:
        """Folder of the checkpoints of this phase."""
        return self.ended[-1].folder if self.ended else self.path / outputs.RESUME

    def keep(self) -> None:
        """Save a checkpoint that stays in the run, of which the newest three do."""
        path = _step_folder(self.path / CHECKPOINTS, self._trainer.step)
        with signals.delayed():  # a checkpoint in the run is complete or absent
            path.mkdir(parents=True, exist_ok=True)
            self._save_weights(path, self._complete(self._trainer.adapter))
        for old in _steps_in(self.path / CHECKPOINTS)[:-CHECKPOINTS_KEPT]:
            outputs.remove_folder(old)

    def is_due(self, step: int) -> bool:
        """Return whether to save a resumable checkpoint after this step."""
        if self._every is not None:
            return step > 0 and step % self._every == 0
        return step > 0 and time.monotonic() - self._saved > SECONDS_BETWEEN

    def save(self) -> Path:
        """Save a resumable checkpoint atomically, remove old ones, and return its folder."""
        folder = _step_folder(self._resume, self._trainer.step)
        if not folder.exists():
            self._save(folder, self._trainer.state_dict())
            for old in _steps_in(folder.parent)[:-RESUMABLE_KEPT]:
                outputs.remove_folder(old)
        self._saved = time.monotonic()
        return folder

    def end_phase(self, decided: dict[str, Any]) -> None:
        """Save the trained network, and what was decided, to resume with the next phase."""
        with signals.delayed():
            folder = self.path / outputs.RESUME / f"phase-{len(self.ended) + 1:02d}"
            ended = self._save(folder, decided)
            for old in _steps_in(self._resume):
                outputs.remove_folder(old)
            self.ended.append(ended)
            self.resumed, self._saved = None, time.monotonic()

    def _save(self, folder: Path, state: dict[str, Any]) -> Checkpoint:
        lines = self.path / LINES
        atomic.fsync_path(lines)
        own = {"step": self._trainer.step, "seconds": self.seconds, "setting": self._setting}
        saved = Checkpoint(folder, **own, state=state)
        temporary = folder.with_name(f".{folder.name}.tmp")
        outputs.remove_folder(temporary)
        temporary.mkdir(parents=True)
        self._save_weights(temporary, self._trainer.adapter)
        logged = {"bytes": lines.stat().st_size, "sha256": atomic.sha256_file(lines)}
        write_state(temporary / STATE, {**own, "state": state, "lines": logged})
        sums = [f"{atomic.sha256_file(temporary / name)}  {name}\n" for name in _SUMMED]
        atomic.write_text(temporary / SUMS, "".join(sums))
        atomic.fsync_path(temporary)
        temporary.rename(folder)
        atomic.fsync_path(folder.parent)
        return saved

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Save a resumable checkpoint if the block is stopped; name the last one if it diverges."""
        with signals.polling() if distributed.world().size > 1 else nullcontext():
            try:
                try:
                    yield
                except (Stopped, KeyboardInterrupt) as stopped:
                    # Else before a step.
                    if hasattr(self, "_trainer") and self._trainer.can_be_saved:
                        with signals.delayed():
                            where = self.save()
                        log.info("saved step %d in %s", self._trainer.step, where)
                    if isinstance(stopped, Stopped):
                        stopped.resumes = _is_resumable(self.path)
                    raise
            except TrainingError as error:  # also of a state that should have been saved
                kept = _steps_in(self.path / CHECKPOINTS)
                last = (
                    f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint"
                )
                raise TrainingError(f"{error}; {last}") from None

    def finish(self, adapter: Adapter, validation: dict[str, float] | None) -> float:
        """Write the final weights and the environment; return the wall time in seconds."""
        self._save_weights(self.path, adapter, validation)
        seconds = round(self.seconds, 3)
        write_environment(self.path, {**self._environment, "seconds": seconds})
        return seconds

    def _save_weights(
        self, folder: Path, adapter: Adapter, validation: dict[str, float] | None = None
    ) -> None:
        loss = self._trainer.loss
        info = AdapterInfo(
            adapters=adapter.shapes,
            step=self._trainer.step,
            logit_scale=loss.logit_scale,
            bandwidth=loss.bandwidth,
            validation=validation,
            **self._info,
        )
        save_adapter(folder, adapter, info)


def info_of(features: FeatureSet, sides: Iterable[AnySide]) -> dict[str, Any]:
    """Return what `AdapterInfo` records of a feature set and the encoders of some of its sides."""
    encoders = {side: features.table(side).encoder for side in sides}
    return {
        "encoders": {side: own.spec for side, own in encoders.items()},
        "encoder_fingerprints": {side: own.weights for side, own in encoders.items()},
        "encoder_settings": {side: own.settings for side, own in encoders.items()},
        "data_fingerprint": features.manifest.fingerprint(),
    }


def check_run_folder(out: Path, features: Path, *, overwrite: bool) -> None:
    """Raise OutputError if a run must not be written there; see `outputs.check_output`."""
    outputs.check_output(out, ENTRIES, overwrite=overwrite, inputs=(features,))


@contextmanager
def open_run(
    out: Path, job: TrainingJob, *, restart: bool, every: int | None, began: float
) -> Iterator[UnfinishedRun]:
    """Begin or resume a run; after the block, move its folder to `out`.

    If the block raises, all checkpoints stay. After a `TrainingError`, which resuming would only
    repeat, those to resume from are removed. `restart` discards an unfinished run with other
    options, or a damaged one.

    Raises:
        OutputError: another process trains there, or another run or job is unfinished there.
        SchemaError: all checkpoints there are damaged.
    """
    out = out.resolve()
    folder = outputs.partial_path(out)
    outputs.refuse_other_work(folder, TrainingJob.FORMAT)
    with atomic.translate_os_errors(out), locks.lock_folder(folder):
        run = UnfinishedRun(folder, *_begin(folder, job, restart=restart), every, began)
        try:
            yield run
        except TrainingError:
            (folder / outputs.JOB).unlink()
            outputs.remove_folder(folder / outputs.RESUME)
            raise
        except BaseException:
            if not (_steps_in(folder / CHECKPOINTS) or _is_resumable(folder)):
                outputs.cleanup(folder)
            raise
        outputs.commit(folder, out)
        # Only now, so that a process killed before loses nothing.
        outputs.remove_folder(out / outputs.RESUME)
        (out / outputs.JOB).unlink()


def _begin(
    folder: Path, job: TrainingJob, *, restart: bool
) -> tuple[list[Checkpoint], Checkpoint | None]:
    """Prepare a folder; return the ended phases and the checkpoint of the same run in it."""
    path = folder / outputs.JOB
    found = read_job(path, TrainingJob, restart=restart)
    phases = _numbered(folder / outputs.RESUME, "phase")
    steps = _steps_in(phases[-1] if phases else folder / outputs.RESUME)
    saved = [*phases[-1:], *steps]
    if found is not None and found != job and saved and not restart:
        raise OutputError(_difference(folder, found, job))
    if found == job and saved:
        ended = [_newest([own], folder, restart=restart) for own in phases]
        checkpoint = _newest(saved, folder, restart=restart)
        if checkpoint is not None and None not in ended:
            resumed = None if checkpoint.folder in phases else checkpoint
            for later in [*steps, *([] if phases else _steps_in(folder / CHECKPOINTS))]:
                if resumed is None or _number_of(later) > resumed.step:
                    outputs.remove_folder(later)
            return [own for own in ended if own], resumed
    outputs.empty_folder(folder)
    write_record(path, job)
    return [], None


def _is_resumable(folder: Path) -> bool:
    resume = folder / outputs.RESUME
    return bool(_steps_in(resume) or _numbered(resume, "phase"))


def _difference(folder: Path, found: TrainingJob, job: TrainingJob) -> str:
    if found.version != job.version:
        return (
            f"{folder}: contains a run of another version of csalign (checkpoints of version "
            f"{found.version}, not {job.version}): finish it with that one, start again with "
            "--overwrite, or choose another --out"
        )
    old, new = found.options, job.options
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


def _newest(saved: list[Path], run: Path, *, restart: bool) -> Checkpoint | None:
    """Read the newest intact checkpoint; SchemaError if there is none, unless `restart`."""
    for path, before in zip(reversed(saved), [*reversed(saved[:-1]), None], strict=True):
        try:
            return _read(path, run / LINES)
        except SchemaError as error:
            if before is None and not restart:
                raise SchemaError(f"{error}; start again with --overwrite") from None
            action = f"going back to {before}" if before else "starting again"
            log.warning("%s; %s", error, action)
    return None


def _read(folder: Path, lines: Path) -> Checkpoint:
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
    size, digest = state["lines"]["bytes"], state.pop("lines")["sha256"]
    if not lines.is_file() or lines.stat().st_size < size:
        raise SchemaError(f"{lines}: is shorter than when {folder} was saved")
    with lines.open("rb") as file:
        if digest != sha256(file.read(size)).hexdigest():
            raise SchemaError(f"{lines}: was changed or is damaged since {folder} was saved")
    os.truncate(lines, size)
    return Checkpoint(folder, **state)


def _step_folder(parent: Path, step: int) -> Path:
    return parent / f"step-{step:06d}"


def _number_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _numbered(folder: Path, name: str) -> list[Path]:
    found = [p for p in folder.glob(f"{name}-*") if p.name[len(name) + 1 :].isdecimal()]
    return sorted(found, key=_number_of)


def _steps_in(folder: Path) -> list[Path]:
    return _numbered(folder, "step")
