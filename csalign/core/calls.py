"""The call of a command: when it began, as what, and what it warned of."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from csalign.core import __version__


@dataclass
class Call:
    """One call of a command, from the shell or from Python.

    Attributes:
        command: the command line, or the call in Python.
        date: when it began.
        warnings: messages logged as warnings so far, each once.
    """

    command: str
    date: datetime = field(default_factory=lambda: datetime.now(UTC))
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the keys that every JSON document has, plain values."""
        return {
            "csalign_version": __version__,
            "date": self.date.isoformat(timespec="seconds"),
            "command": self.command,
            "warnings": list(self.warnings),
        }


_CURRENT: ContextVar[Call | None] = ContextVar("call", default=None)


def current_call() -> Call:
    """Return the call that is running; an empty one outside of any."""
    return _CURRENT.get() or Call("")


@contextmanager
def recorded_call(command: str) -> Iterator[Call]:
    """Record a call and the warnings of csalign's loggers while it runs.

    A call within a call keeps the command and the date of the outer one, and both have its
    warnings.
    """
    outer = _CURRENT.get()
    call = Call(command) if outer is None else Call(outer.command, outer.date)
    handler = _Collector(call)
    logger = logging.getLogger("csalign")
    logger.addHandler(handler)
    token = _CURRENT.set(call)
    try:
        yield call
    finally:
        _CURRENT.reset(token)
        logger.removeHandler(handler)


class _Collector(logging.Handler):
    def __init__(self, call: Call) -> None:
        super().__init__(logging.WARNING)
        self._call = call

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._call.warnings:
            self._call.warnings.append(message)
