"""SIGINT and SIGTERM, made sure not to be lost."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from csalign.errors import Stopped

_AGAIN_S = 0.1

_arrived: list[int] = []


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
    if _arrived:
        raise Stopped(_arrived[0])


def _stop(signum: int, frame: FrameType | None) -> None:
    _arrived.append(signum)
    raise Stopped(signum)


def _dropped(unraisable: Any) -> None:
    if not isinstance(unraisable.exc_value, Stopped):
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), _arrived[0]))
    again.daemon = True
    again.start()
