"""Progress on stderr: a bar on a terminal, a plain line now and then in a log."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich.box import SIMPLE
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from csalign.core import signals
from csalign.core.results import Progress as Report

LINE_EVERY_S = 30.0
SHOWN = (
    *("loss", "pairwise", "pairwise_others", "divergence", "token"),
    *("validation/mean_recall", "validation/centroid_distance"),
)


@contextmanager
def shown_progress(console: Console, *, quiet: bool) -> Iterator[Report]:
    """Yield a progress callback that writes to the console on stderr, or nothing if `quiet`.

    Every call also raises a signal whose first exception was dropped.
    """
    if quiet:
        yield lambda what, done, total: signals.check()
    elif console.is_terminal:
        with _bars(console) as bars:
            yield _BarReporter(bars)
    else:
        yield _LineReporter(console)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.4g}/s", style="progress.data.speed")


class _Bars(Progress):
    """Progress bars with the latest metrics below them."""

    shown: dict[str, float] = {}  # noqa: RUF012 - replaced, never changed

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.shown:
            table = Table(box=SIMPLE)
            for name in self.shown:
                table.add_column(name.split("/")[-1].replace("_", " "), justify="right")
            table.add_row(*(f"{value:.4g}" for value in self.shown.values()))
            yield table


def _bars(console: Console) -> _Bars:
    return _Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        console=console,
    )


class _BarReporter:
    def __init__(self, bars: _Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        signals.check()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)

    def figures(self, figures: Mapping[str, float]) -> None:
        """Show the latest value of each metric."""
        latest = self._bars.shown | {name: figures[name] for name in SHOWN if name in figures}
        self._bars.shown = {name: latest[name] for name in SHOWN if name in latest}


class _LineReporter:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._began: dict[str, tuple[float, int]] = {}
        self._last = time.monotonic()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        signals.check()
        now = time.monotonic()
        began, first = self._began.setdefault(what, (now, done))  # a rerun begins further on
        if now - self._last < LINE_EVERY_S:
            return
        self._last = now
        rate = (done - first) / (now - began) if now > began else 0.0
        line = f"{what}: {done}" + (f" of {total}" if total else "") + f", {rate:,.4g}/s"
        if total and rate:
            line += f", {(total - done) / rate:,.0f} s left"
        self._console.print(line, highlight=False)
