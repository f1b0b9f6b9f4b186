"""SIGINT and SIGTERM: raised as `Stopped`, delayed or polled where work must not be cut short."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from csalign.core.errors import Stopped

_AGAIN_S = 0.1
DELAY_S = 10.0  # batch systems kill about half a minute after SIGTERM

_arrived: list[int] = []
_timers: list[threading.Timer] = []
_delays = 0  # depth of nested `delayed` blocks
_polls = 0  # of `polling` blocks
_delay_s = DELAY_S


def catch_signals(delay_s: float = DELAY_S) -> None:
    """Let SIGINT and SIGTERM raise `Stopped` in the main thread, `delay_s` late at most.

    Python drops an exception that is raised while a ``__del__`` runs, as libraries of object
    stores have. Then the signal is sent again, and `check` raises wherever work is counted.
    """
    global _delay_s
    _delay_s = delay_s
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handle)
    sys.unraisablehook = _resend_dropped


def check() -> None:
    """Raise if a signal arrived, even where its first exception was dropped.

    Raises:
        Stopped: a signal arrived, and is neither delayed nor polled.
    """
    if _arrived and not _polls and not _delays:
        raise Stopped(_arrived[0])


def pending() -> int | None:
    """Return the first signal that arrived, None if none did."""
    return _arrived[0] if _arrived else None


@contextmanager
def polling() -> Iterator[None]:
    """Only record signals in this block, whose owner polls `pending` and ends it soon.

    For several processes that have to stop after the same step: one that stopped at once would
    leave the others waiting. A second signal does not raise either, since torchrun and a batch
    system may each send one.

    Raises:
        Stopped: after a block that did not raise, if a signal arrived.
    """
    global _polls
    _polls += 1
    try:
        yield
    finally:
        _polls -= 1
    check()


@contextmanager
def delayed() -> Iterator[None]:
    """Delay a signal until the end of a block that must not be interrupted.

    For ten seconds at most, and not beyond a second signal. Blocks may be nested.

    Raises:
        Stopped: after the outermost block, if a signal arrived in it.
    """
    global _delays
    before = len(_arrived)
    _delays += 1
    try:
        yield
    finally:
        _delays -= 1
        while not _delays and _timers:
            _timers.pop().cancel()
    if len(_arrived) > before and not _delays and not _polls:
        raise Stopped(_arrived[-1])


def _handle(signum: int, frame: FrameType | None) -> None:
    _arrived.append(signum)
    if _polls:
        return
    if _delays and not _timers:
        _timers.append(_send_later(signum, _delay_s))
        return
    raise Stopped(signum)


def _resend_dropped(unraisable: Any) -> None:
    if isinstance(unraisable.exc_value, Stopped):
        _send_later(_arrived[0], _AGAIN_S)
    else:
        sys.__unraisablehook__(unraisable)


def _send_later(signum: int, seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signum))
    timer.daemon = True
    timer.start()
    return timer
