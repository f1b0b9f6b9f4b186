"""Progress on stderr: a bar on a terminal, a plain line now and then in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
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
from rich.text import Text

from csalign import progress, stopping

LINE_EVERY_S = 30.0


@contextmanager
def shown_progress(console: Console, *, quiet: bool) -> Iterator[progress.Progress]:
    """Give a step something to report to.

    Args:
        console: on stderr.
        quiet: show nothing.
    """
    if quiet:
        yield _stoppable(progress.silent)
    elif console.is_terminal:
        with _bars(console) as bars:
            yield _stoppable(_BarReporter(bars))
    else:
        yield _stoppable(_LineReporter(console))


def _stoppable(report: progress.Progress) -> progress.Progress:
    """The same, where a signal is noticed that was lost on its way."""

    def checked(what: str, done: int, total: int | None) -> None:
        stopping.check()
        report(what, done, total)

    return checked


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.4g}/s", style="progress.data.speed")


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        console=console,
    )


class _BarReporter:
    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)


class _LineReporter:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._began: dict[str, tuple[float, int]] = {}
        self._last = time.monotonic()

    def __call__(self, what: str, done: int, total: int | None) -> None:
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
