"""Where the figures of a training run go besides ``metrics.jsonl``."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from csalign.core.errors import ConfigError
from csalign.runs.metadata import LINES

METRICS = "metrics.csv"
EVENTS = "tensorboard"
PROJECT = "csalign"
COLUMNS = (
    *("step", "loss", "pairwise", "pairwise_others", "divergence", "cs_weight", "logit_scale"),
    *("bandwidth", "gradient_norm", "learning_rate"),
    *("validation/mean_recall", "validation/mrr", "validation/centroid_distance"),
)


class Log(Protocol):
    """Takes the figures of a step."""

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        """Write figures by name."""


def check_logs(names: Sequence[str]) -> None:
    """Raise ConfigError if a library that a log needs is not installed."""
    for name, load in (("tensorboard", _tensorboard), ("wandb", _wandb)):
        if name in names:
            load()


@contextmanager
def open_logs(
    names: Sequence[str], folder: Path, run: str, config: Mapping[str, Any], step: int = 0
) -> Iterator[list[Log]]:
    """Open logs of a run, and close them after it.

    Those of a run that goes on are continued: figures of steps that are made again replace the
    old ones.

    Args:
        names: of csv, tensorboard and wandb.
        folder: of the run; what is local is written there.
        run: its name.
        config: what it was told, for wandb.
        step: that the run goes on from.

    Raises:
        ConfigError: a library is not installed, or wandb does not let it in.
    """
    openers = {
        "csv": lambda stack: _csv_log(stack, folder / METRICS, folder / LINES),
        "tensorboard": lambda stack: _tensorboard_log(stack, folder / EVENTS, step),
        "wandb": lambda stack: _wandb_log(stack, folder, run, config),
    }
    with ExitStack() as stack:
        yield [openers[name](stack) for name in dict.fromkeys(names)]


def figures_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of ``metrics.jsonl`` by name, without the step."""
    figures: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            figures |= {f"{name}/{part}": number for part, number in value.items()}
        elif isinstance(value, int | float) and name != "step":
            figures[name] = value
    return figures


def _csv_log(stack: ExitStack, path: Path, lines: Path) -> Log:
    """A table, which begins with what `lines` holds already."""
    file = stack.enter_context(path.open("w", encoding="utf-8", newline=""))
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()

    def log(step: int, figures: Mapping[str, float]) -> None:
        writer.writerow({"step": step, **figures})
        file.flush()

    if lines.is_file():
        with lines.open(encoding="utf-8") as recorded:
            for line in map(json.loads, recorded):
                writer.writerow({"step": line["step"], **figures_of(line)})
    return log


def _tensorboard_log(stack: ExitStack, folder: Path, step: int) -> Log:
    # Readers forget the later steps of a process that was killed.
    writer = stack.enter_context(_tensorboard()(folder, purge_step=step + 1 if step else None))

    def log(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return log


def _wandb_log(stack: ExitStack, folder: Path, run: str, config: Mapping[str, Any]) -> Log:
    wandb = _wandb()
    try:
        opened = wandb.init(
            project=PROJECT, name=run, dir=folder, config=dict(config), resume="auto"
        )
    except wandb.Error as error:
        raise ConfigError(
            f"log-to: wandb: {error}; run `wandb login`, or set WANDB_MODE=offline"
        ) from None
    stack.enter_context(opened)

    def log(step: int, figures: Mapping[str, float]) -> None:
        opened.log(dict(figures), step=step)

    return log


def _tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("tensorboard") from None
    return SummaryWriter


def _wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise _missing("wandb") from None
    return wandb


def _missing(name: str) -> ConfigError:
    return ConfigError(f"log-to: {name} is not installed; pip install 'csalign[{name}]'")
