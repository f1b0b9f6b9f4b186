"""The progress of the command that runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

Progress = Callable[[str, int, int | None], None]
"""``progress(what, done, total)``: `what` is the phase and, after a colon, the unit of its work,
as in "matching" or "training: step"; `done` counts from 0, `total` is None while unknown. Called
often; must return quickly."""


def silent(what: str, done: int, total: int | None) -> None:
    """Ignore progress."""


_CURRENT: ContextVar[Progress] = ContextVar("progress", default=silent)


def current_progress() -> Progress:
    """Return the callback of the command that runs; `silent` outside of any."""
    return _CURRENT.get()


@contextmanager
def reported_to(progress: Progress) -> Iterator[None]:
    """Report the progress of all that runs in this block to a callback."""
    token = _CURRENT.set(progress)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def tick(what: str, done: int = 0, total: int | None = None) -> None:
    """Report progress to the command that runs; see `Progress`."""
    current_progress()(what, done, total)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield items, and report before the first and after each how many are done."""
    tick(what, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        tick(what, done, total)


def show_figures(figures: Mapping[str, str], *, notable: bool = False) -> None:
    """Show the latest figures of the phase that reported last, if the callback can.

    That is, if it has a method ``figures(figures, notable)``.

    Args:
        figures: formatted, by name, in order; a value without a name is shown alone.
        notable: worth a line of its own in a log.
    """
    show = getattr(current_progress(), "figures", None)
    if show is not None:
        show(figures, notable)


def duration(seconds: float) -> str:
    """Format a time for people, such as ``42 s``, ``1m52s`` or ``2h05m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def within(name: str) -> Progress:
    """Return a callback that reports phases to the current one as parts of another phase."""
    return _Part(current_progress(), name)


@dataclass(frozen=True)
class _Part:
    outer: Progress
    name: str

    def __call__(self, what: str, done: int, total: int | None) -> None:
        self.outer(f"{self.name}, {what}", done, total)

    def figures(self, figures: Mapping[str, str], notable: bool) -> None:
        with reported_to(self.outer):
            show_figures(figures)  # a log has a line per part at most
