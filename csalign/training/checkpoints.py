"""The folder of a training run until it is whole, and the states in it that a rerun goes on from.

It is ``OUT.partial``, and holds beside what a run consists of::

    .csalign-job.json      what is trained, and on what; a rerun with other options is refused
    resume/step-000120/    adapter.json and adapter.safetensors, the weights after 120 steps;
                           state.safetensors, all else; SHA256SUMS, of these
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from csalign.adapters.checkpoint import DESCRIPTION, WEIGHTS
from csalign.core import atomic, locks
from csalign.core.errors import OutputError, SchemaError, TrainingError
from csalign.core.records import Record, read_job, write_record
from csalign.features.reader import FeatureSet
from csalign.runs.metadata import LINES
from csalign.training.config import TrainConfig
from csalign.training.state import read_values, write_values

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
CHECKPOINTS_KEPT = 3
STATES_KEPT = 2  # should the newest be damaged
SECONDS_BETWEEN = 60.0
MOST_COST = 0.02  # of the time goes into saving

STATE = "state.safetensors"
SUMS = "SHA256SUMS"
_SUMMED = (DESCRIPTION, WEIGHTS, STATE)
# What does not change the result, or is told by a fingerprint of what it holds.
_LEFT_OUT = {
    *("out", "overwrite", "recipe", "features", "unpaired"),
    *("report", "device", "log_to", "save_every", "memory"),
}


class Training(Record):
    """What decides the weights that come out, on one machine.

    Attributes:
        version: of the states.
        options: of the config.
        features: fingerprint of what is trained on.
        unpaired: likewise of the further sets.
    """

    FORMAT: ClassVar[str] = "csalign-training"

    format: str = FORMAT
    version: int = 3
    options: dict[str, Any]
    features: str
    unpaired: list[str]

    @classmethod
    def of(cls, config: TrainConfig, features: FeatureSet, unpaired: list[Path]) -> "Training":
        """That of a config and what its feature sets hold."""
        return cls(
            options=config.model_dump(mode="json", exclude=_LEFT_OUT),
            features=features.manifest.fingerprint(),
            unpaired=[FeatureSet.open(path).manifest.fingerprint() for path in unpaired],
        )


@dataclass(frozen=True)
class State:
    """What to go on from.

    Attributes:
        folder: holds the adapters' weights, as a run does.
        step: optimiser steps made.
        seconds: that they took.
        trainer: see `Trainer.state`.
    """

    folder: Path
    step: int
    seconds: float
    trainer: dict[str, Any]


@dataclass
class TrainingFolder:
    """The folder of an unfinished run, as the process sees it that trains; by `open_training`.

    Attributes:
        path: of it.
        state: what to go on from, None where the run begins.
        every: steps between two states; None for once a minute, or less often where saving would
            take more than 2 % of the time.
    """

    path: Path
    state: State | None
    every: int | None
    checkpoints: list[Path] = field(init=False)
    _cost: float = 0.0

    def __post_init__(self) -> None:
        self._began = self._saved = time.monotonic()
        self.checkpoints = _steps_in(self.path / CHECKPOINTS)

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, that of earlier processes included."""
        return time.monotonic() - self._began + (self.state.seconds if self.state else 0.0)

    def checkpoint(self, step: int, save_weights: Callable[[Path], None]) -> None:
        """Keep the weights of a step, and of the two checkpoints before it."""
        path = _folder_of(self.path / CHECKPOINTS, step)
        path.mkdir(parents=True, exist_ok=True)
        save_weights(path)
        self.checkpoints.append(path)
        while len(self.checkpoints) > CHECKPOINTS_KEPT:
            atomic.remove_folder(self.checkpoints.pop(0))

    def is_due(self, step: int) -> bool:
        """Whether a state is to be saved after this step."""
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() - self._saved > max(SECONDS_BETWEEN, self._cost / MOST_COST)

    def save(
        self, step: int, save_weights: Callable[[Path], None], trainer: dict[str, Any]
    ) -> Path:
        """Save a state, whole or not at all, and remove old ones; returns its folder."""
        began = time.monotonic()
        folder = _folder_of(self.path / atomic.RESUME, step)
        if not folder.exists():
            self._write(folder, save_weights, {"step": step, "trainer": trainer})
            for old in _steps_in(folder.parent)[:-STATES_KEPT]:
                atomic.remove_folder(old)
        self._saved = time.monotonic()
        self._cost = self._saved - began
        return folder

    def _write(
        self, folder: Path, save_weights: Callable[[Path], None], values: dict[str, Any]
    ) -> None:
        lines = self.path / LINES
        atomic.fsync_path(lines)
        told = {
            "seconds": self.seconds,
            "lines_bytes": lines.stat().st_size,
            "lines_sha256": atomic.sha256_file(lines),
        }
        temporary = folder.with_name(f".{folder.name}.tmp")
        atomic.remove_folder(temporary)
        temporary.mkdir(parents=True)
        save_weights(temporary)
        write_values(temporary / STATE, {**values, **told})
        sums = [f"{atomic.sha256_file(temporary / name)}  {name}\n" for name in _SUMMED]
        atomic.write_text(temporary / SUMS, "".join(sums))
        atomic.fsync_path(temporary)
        temporary.rename(folder)
        atomic.fsync_path(folder.parent)


@contextmanager
def open_training(
    out: Path, training: Training, *, restart: bool, every: int | None
) -> Iterator[TrainingFolder]:
    """Begin a run, or go on with it; when the block succeeds, the folder is moved to `out`.

    Where the block raises, what a rerun goes on from stays, and so do checkpoints. After a
    `TrainingError` a rerun would come to the same end, so it begins anew.

    Args:
        out: final folder; `atomic.check_output` was called.
        training: what it is.
        restart: whether an unfinished run with other options, or a damaged one, may be removed.
        every: see `TrainingFolder`.

    Raises:
        OutputError: another process trains there, or something else is unfinished there.
        SchemaError: all states there are damaged.
    """
    out = out.resolve()
    folder = atomic.partial_path(out)
    atomic.refuse_other_work(folder, Training.FORMAT)
    with atomic.translate_os_errors(out), locks.lock_folder(folder):
        run = TrainingFolder(folder, _begin(folder, training, restart=restart), every)
        try:
            yield run
        except TrainingError:
            (folder / atomic.JOB).unlink()
            atomic.remove_folder(folder / atomic.RESUME)
            raise
        except BaseException:
            if not (run.checkpoints or _steps_in(folder / atomic.RESUME)):
                atomic.cleanup(folder)
            raise
        atomic.commit(folder, out)
        # Only now, lest a process that is killed here has to train again.
        atomic.remove_folder(out / atomic.RESUME)
        (out / atomic.JOB).unlink()


def _begin(folder: Path, training: Training, *, restart: bool) -> State | None:
    """Make a folder ready; the state to go on from if it holds one of the same training."""
    path = folder / atomic.JOB
    found = read_job(path, Training, restart=restart)
    states = _steps_in(folder / atomic.RESUME)
    if found is not None and found != training and states and not restart:
        raise OutputError(_difference(folder, found, training))
    if found == training and states:
        state = _newest(states, restart=restart)
        if state is not None:
            _remove_later(folder, state)
            return state
    atomic.empty_folder(folder)
    write_record(path, training)
    return None


def _difference(folder: Path, found: Training, training: Training) -> str:
    """What to say of a folder with a run that was begun otherwise."""
    old, new = found.options, training.options
    changes = [
        f"{name.replace('_', '-')} {_said(old.get(name))}, not {_said(new.get(name))}"
        for name in {**new, **old}
        if old.get(name) != new.get(name)
    ]
    if found.version != training.version:
        changes.append(f"states of version {found.version}, not {training.version}")
    if found.features != training.features:
        changes.append("features of other content")
    if found.unpaired != training.unpaired:
        changes.append("other unpaired features")
    return (
        f"{folder}: holds a run that was begun with {'; '.join(changes)}: go on with the same "
        "options, start anew with --overwrite, or choose another --out"
    )


def _said(value: Any) -> str:
    return "unset" if value is None else str(value)


def _newest(states: list[Path], *, restart: bool) -> State | None:
    """The newest state that is not damaged.

    Raises:
        SchemaError: all are damaged, and this is no reason to start anew.
    """
    for path, before in zip(reversed(states), [*reversed(states[:-1]), None], strict=True):
        try:
            return _read(path)
        except SchemaError as error:
            if before is None and not restart:
                raise SchemaError(f"{error}; start anew with --overwrite") from None
            log.warning("%s; %s", error, f"going back to {before}" if before else "starting anew")
    return None


def _read(folder: Path) -> State:
    """Read a state after checking all of it.

    Raises:
        SchemaError: it is damaged.
    """
    try:
        sums = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SchemaError(f"{folder / SUMS}: cannot be read ({error})") from None
    for name in _SUMMED:
        path = folder / name
        if not path.is_file() or f"{atomic.sha256_file(path)}  {name}" not in sums:
            raise SchemaError(f"{path}: is damaged, by its checksum in {SUMS}")
    values = read_values(folder / STATE)
    lines, size = folder.parent.parent / LINES, values.pop("lines_bytes")
    if not lines.is_file() or lines.stat().st_size < size:
        raise SchemaError(f"{lines}: is shorter than when {folder} was saved")
    os.truncate(lines, size)
    if values.pop("lines_sha256") != atomic.sha256_file(lines):
        raise SchemaError(f"{lines}: was changed or is damaged since {folder} was saved")
    return State(folder, **values)


def _remove_later(folder: Path, state: State) -> None:
    """Remove what was saved after a state, which will come again."""
    for path in [*_steps_in(folder / atomic.RESUME), *_steps_in(folder / CHECKPOINTS)]:
        if _step_of(path) > state.step:
            atomic.remove_folder(path)


def _folder_of(parent: Path, step: int) -> Path:
    return parent / f"step-{step:06d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _steps_in(folder: Path) -> list[Path]:
    """The folders of steps, in their order."""
    found = [path for path in folder.glob("step-*") if path.name[len("step-") :].isdecimal()]
    return sorted(found, key=_step_of)
