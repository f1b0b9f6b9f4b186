"""The command that runs: how it was called, its warnings and its progress."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from csalign.core import __version__
from csalign.core.errors import CsalignError

T = TypeVar("T")

CALL_KEYS = ("csalign_version", "date", "command", "warnings")
"""Keys of `Call.to_json`, the last ones of every JSON document."""


@dataclass
class Call:
    """One call of a command, from the shell or from Python.

    Attributes:
        command: the command line, or the call in Python.
        names: what messages and results show in place of paths, such as those of temporary files.
        date: when it began.
        began: likewise, by `time.monotonic`.
        warnings: messages logged as warnings so far, each once.
    """

    command: str
    names: dict[str, str] = field(default_factory=dict)
    date: datetime = field(default_factory=lambda: datetime.now(UTC))
    began: float = field(default_factory=time.monotonic)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the keys that every JSON document has, plain values."""
        return {
            "csalign_version": __version__,
            "date": self.date.isoformat(timespec="seconds"),
            "command": self.command,
            "warnings": list(self.warnings),
        }

    def complete(self, result: T) -> T:
        """Add these keys at the end of a result that is a document, and replace paths in it."""
        if isinstance(result, dict):
            result.update(self.renamed(dict(result)))
            result.update({key: result.pop(key, None) for key in CALL_KEYS} | self.to_json())
        return result

    def renamed(self, value: Any) -> Any:
        """Return a text or a document with `names` in place of paths."""
        if isinstance(value, str):
            for path, name in self.names.items():
                value = value.replace(path, name)
            return value
        if not self.names or not isinstance(value, dict | list):
            return value
        if isinstance(value, list):
            return [self.renamed(own) for own in value]
        return {key: self.renamed(own) for key, own in value.items()}


_CALL: ContextVar[Call | None] = ContextVar("call", default=None)


def current_call() -> Call:
    """Return the call that is running; an empty one outside of any."""
    return _CALL.get() or Call("")


@contextmanager
def recorded_call(command: str) -> Iterator[Call]:
    """Record a call, and the warnings of csalign's loggers while it runs.

    Its `names` apply to those warnings and to expected errors. Where no logging is set up warnings
    are printed to stderr, as Python does.
    """
    call = Call(command)
    logger = logging.getLogger("csalign")
    handlers: list[logging.Handler] = [_Collector(call)]
    if not logger.hasHandlers() and logging.lastResort is not None:
        handlers.append(logging.lastResort)  # Python uses it only without any other handler
    for handler in handlers:
        logger.addHandler(handler)
    token = _CALL.set(call)
    try:
        yield call
    except CsalignError as error:
        error.args = tuple(map(call.renamed, error.args))
        raise
    finally:
        _CALL.reset(token)
        for handler in handlers:
            logger.removeHandler(handler)


class _Collector(logging.Handler):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    def emit(self, record: logging.LogRecord) -> None:
        message = self._call.renamed(record.getMessage())
        record.msg, record.args = message, ()  # for the handlers after this one
        if record.levelno >= logging.WARNING and message not in self._call.warnings:
            self._call.warnings.append(message)


Progress = Callable[[str, int, int | None], None]
"""``progress(what, done, total)``: `what` is the phase and, after a colon, the unit of its work,
as in "matching" or "training: step"; `done` counts from 0, `total` is None while unknown. Called
often; must return quickly."""


def silent(what: str, done: int, total: int | None) -> None:
    """Ignore progress."""


_PROGRESS: ContextVar[Progress] = ContextVar("progress", default=silent)


def current_progress() -> Progress:
    """Return the callback of the command that runs; `silent` outside of any."""
    return _PROGRESS.get()


@contextmanager
def reported_to(progress: Progress) -> Iterator[None]:
    """Report the progress of all that runs in this block to a callback."""
    token = _PROGRESS.set(progress)
    try:
        yield
    finally:
        _PROGRESS.reset(token)


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

    That is, if it has a method ``figures(figures, notable)``. A value without a name is shown
    alone; those that are `notable` are worth a line of their own in a log.
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
