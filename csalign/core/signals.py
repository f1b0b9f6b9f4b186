"""SIGINT and SIGTERM, made sure not to be lost."""

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
_PATIENCE_S = 10.0  # batch systems kill half a minute after they asked

_arrived: list[int] = []
_waiting: list[threading.Timer] = []
_may_wait = False
_are_noted = False


def catch_signals() -> None:
    """Let SIGINT and SIGTERM raise `Stopped` in the main thread.

    Python drops an exception that is raised while a ``__del__`` runs, as libraries for object
    stores have. Then the signal is sent again, and `check` raises wherever work is counted.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.unraisablehook = _dropped


def check() -> None:
    """Raise if a signal arrived, whatever became of what it raised.

    Raises:
        Stopped: one did.
    """
    if _arrived and not _are_noted:
        raise Stopped(_arrived[0])


def pending() -> int | None:
    """The first signal that arrived, None where none did."""
    return _arrived[0] if _arrived else None


@contextmanager
def polling() -> Iterator[None]:
    """Let signals only be noted, for `pending`, by whoever sees to it that the block ends soon.

    As where several processes have to stop after the same step: one that stopped at once would
    leave the others waiting. Nor does a second signal raise, since torchrun and a batch system
    may each send one.

    Raises:
        Stopped: after a block that did not raise, if a signal arrived.
    """
    global _are_noted
    _are_noted = True
    try:
        yield
    finally:
        _are_noted = False
    check()


@contextmanager
def delayed() -> Iterator[None]:
    """Let a signal wait for the end of what must not be left half done.

    It waits for ten seconds at most, and for no second signal.

    Raises:
        Stopped: after the block, if a signal arrived in it.
    """
    global _may_wait
    if _are_noted:
        yield
        return
    before = len(_arrived)
    _may_wait = True
    try:
        yield
    finally:
        _may_wait = False
        while _waiting:
            _waiting.pop().cancel()
    if len(_arrived) > before:
        raise Stopped(_arrived[-1])


def _stop(signum: int, frame: FrameType | None) -> None:
    global _may_wait
    _arrived.append(signum)
    if _are_noted:
        return
    if _may_wait:
        _may_wait = False
        _waiting.append(_send_again(signum, _PATIENCE_S))
        return
    raise Stopped(signum)


def _dropped(unraisable: Any) -> None:
    if not isinstance(unraisable.exc_value, Stopped):
        sys.__unraisablehook__(unraisable)
        return
    _send_again(_arrived[0], _AGAIN_S)


def _send_again(signum: int, seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signum))
    timer.daemon = True
    timer.start()
    return timer
