"""The logs of a run: ``metrics.jsonl`` always, CSV, TensorBoard and Weights & Biases on request."""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csalign.adapters.model import Adapter
from csalign.core import atomic
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError
from csalign.core.progress import tick
from csalign.evaluation.baselines import measure_baselines
from csalign.evaluation.config import MeasureOptions, PageOptions
from csalign.evaluation.measure import describe, measure_rows
from csalign.evaluation.page import check_report, write_report
from csalign.evaluation.protocols import AlignedRows
from csalign.features.checks import warn_of_queries
from csalign.runs.baselines import some_of
from csalign.runs.load import embed_rows
from csalign.runs.metadata import LINES
from csalign.training.data import TrainingData

METRICS = "metrics.csv"
EVENTS = "tensorboard"
PROJECT = "csalign"
COLUMNS = (
    *("step", "loss", "pairwise", "pairwise_others", "divergence", "token", "cs_weight"),
    *("logit_scale", "bandwidth", "gradient_norm", "learning_rate"),
    *("validation/mean_recall", "validation/mrr", "validation/centroid_distance"),
)

TERMS = ("pairwise", "pairwise_others", "divergence", "token")

Line = Mapping[str, Any]
Figures = Sequence[tuple[int, Mapping[str, float]]]
LogFigures = Callable[[Figures], None]


class StepFigures:
    """Figures of several steps that stay on the device until they are read together."""

    def __init__(self) -> None:
        self._steps: list[tuple[Line, list[str], Tensor]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, line: Line) -> None:
        """Add the figures of a step; those that are () tensors are copied where they are."""
        read = {name: value for name, value in line.items() if isinstance(value, Tensor)}
        values = torch.stack([value.detach().float() for value in read.values()])
        self._steps.append(({**line, **dict.fromkeys(read)}, [*read], values))

    def read(self, last: Line) -> tuple[list[dict[str, Any]], str]:
        """Read and remove the figures of all steps; check those of `last` too.

        Returns:
            The lines of the steps with numbers for tensors, up to the first figure that is not
            finite; and which that is, "" for none.
        """
        self.add(last)
        steps, self._steps = self._steps, []
        numbers = iter(torch.cat([values for *_, values in steps]).tolist())
        lines: list[dict[str, Any]] = []
        for line, names, _ in steps:
            read = {name: next(numbers) for name in names}
            bad = [name for name, value in read.items() if not math.isfinite(value)]
            if bad:
                # A term explains the loss, and the loss all else.
                name = next((name for name in bad if name in TERMS), bad[0])
                return lines, f"step {line['step']}: {name.replace('_', ' ')} is {read[name]}"
            lines.append({**line, **read})
        return lines[:-1], ""


def check_logs(names: Sequence[str], page: PageOptions) -> None:
    """Check that the logs and the page of a run can be written, before training.

    Raises:
        ConfigError: a library that a log or UMAP needs is not installed.
        OutputError: the page cannot be written where it is wanted.
    """
    check_report(page)
    for name in {"tensorboard", "wandb"} & set(names):
        _library(name)


@contextmanager
def open_logs(
    names: Sequence[str], folder: Path, run: str, config: Line, step: int = 0
) -> Iterator[Callable[[Sequence[Line]], None]]:
    """Open the logs of a run, and close them after the block.

    The logs of a resumed run are continued: figures of steps that are repeated replace the old.
    Yields a function that logs the figures of some steps or validations everywhere.

    Raises:
        ConfigError: a library is not installed, or wandb refuses the login.
    """
    with ExitStack() as stack:
        logs: list[LogFigures] = []
        path = folder / LINES
        for name in dict.fromkeys(names):
            if name == "csv":
                logs.append(_csv_log(stack, folder / METRICS, path))
            elif name == "tensorboard":
                logs.append(_tensorboard_log(stack, folder / EVENTS, step))
            else:
                logs.append(_wandb_log(stack, folder, run, config))

        def log(lines: Sequence[Line]) -> None:
            with atomic.translate_os_errors(path), path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{json.dumps(line)}\n" for line in lines))
            figures = [(line["step"], figures_of(line)) for line in lines]
            for log_figures in logs:
                log_figures(figures)

        yield log


def write_page(
    page: PageOptions, run: Path, adapter: Adapter, data: TrainingData, seed: int
) -> None:
    """Write a page of the run's curves, and of its adapter measured on the held-out rows."""
    tick("writing the page")
    measured = document = None
    if data.val is not None:
        warn_of_queries(data.val, f"{data.features.path} (validation)")
        images, texts = (embed_rows(adapter, side, data.val, data.features) for side in Modality)
        rows = AlignedRows(data.features, "validation", data.val, images, texts, run)
        measured = measure_rows(rows, MeasureOptions(seed=seed))
        learned = np.ones(len(data.rows.images), bool) if data.held_out is None else ~data.held_out
        document = describe(measured, with_before=True)
        document["baselines"] = measure_baselines(measured, data.rows.take(some_of(learned)))
    title = f"Training of {run.name} on {data.features.path.name}"
    title += ", measured on its validation rows" if measured else ""
    write_report(page, title, measured, document, run, is_training=True)


def figures_of(line: Line) -> dict[str, float]:
    """Return the numbers of a line of ``metrics.jsonl`` by name, without the step."""
    figures: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            figures |= {f"{name}/{part}": number for part, number in value.items()}
        elif isinstance(value, int | float) and name not in ("step", "matched"):
            figures[name] = value
    return figures


def _csv_log(stack: ExitStack, path: Path, lines: Path) -> LogFigures:
    """Open a table that begins with what `lines` contains already."""
    file = stack.enter_context(path.open("w", encoding="utf-8", newline=""))
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()

    def log(steps: Figures) -> None:
        for step, figures in steps:
            if not figures.keys().isdisjoint(COLUMNS):  # as those of a refit are
                writer.writerow({"step": step, **figures})
        file.flush()

    if lines.is_file():
        with lines.open(encoding="utf-8") as recorded:
            log([(line["step"], figures_of(line)) for line in map(json.loads, recorded)])
    return log


def _tensorboard_log(stack: ExitStack, folder: Path, step: int) -> LogFigures:
    # Readers drop the later steps of a process that was killed.
    purged = step + 1 if step else None
    writer = stack.enter_context(_library("tensorboard").SummaryWriter(folder, purge_step=purged))

    def log(steps: Figures) -> None:
        for step, figures in steps:
            for name, value in figures.items():
                writer.add_scalar(name, value, step)

    return log


def _wandb_log(stack: ExitStack, folder: Path, run: str, config: Line) -> LogFigures:
    wandb = _library("wandb")
    try:
        opened = wandb.init(
            project=PROJECT, name=run, dir=folder, config=dict(config), resume="auto"
        )
    except wandb.Error as error:
        raise ConfigError(
            f"--log-to: wandb: {error}; run `wandb login`, or set WANDB_MODE=offline"
        ) from None
    stack.enter_context(opened)

    def log(steps: Figures) -> None:
        for step, figures in steps:
            opened.log(dict(figures), step=step)

    return log


def _library(log: str) -> Any:
    """Import the library of a log."""
    try:
        return import_module({"tensorboard": "torch.utils.tensorboard"}.get(log, log))
    except ImportError:
        message = f"log-to: {log} is not installed; pip install 'csalign[{log}]'"
        raise ConfigError(message) from None
