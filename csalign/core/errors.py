"""The errors that csalign expects, and the exit code of each.

::

    CsalignError              exit 1
    ├── ConfigError           exit 2  the command line or a config file is wrong
    ├── DataError             exit 1  an input cannot be used
    │   ├── SchemaError               an artifact on disk is damaged or inconsistent
    │   └── ShapeError                arrays whose shapes do not fit together
    ├── EncoderError          exit 1  an encoder cannot be built or loaded
    ├── DecoderError          exit 1  a decoder of images cannot be built, loaded or run
    ├── OutputError           exit 1  an output cannot be written to the requested place
    ├── TrainingError         exit 1  training cannot continue
    ├── ProcessesError        exit 1  the processes of a job cannot work together
    └── ElsewhereError        another process of the job failed and reports why
    Stopped                   exit 130 / 143, stopped by SIGINT / SIGTERM

A message names the file and row, what is wrong, and the remedy. Any other exception is a bug and
keeps its traceback.
"""

import signal
from typing import Any


class CsalignError(Exception):
    """Base of every expected failure."""

    exit_code = 1


class ConfigError(CsalignError):
    """The command line or a config file is wrong."""

    exit_code = 2


class DataError(CsalignError):
    """An input cannot be used."""


class SchemaError(DataError):
    """An artifact on disk does not match its manifest or the format."""


class ShapeError(DataError):
    """Arrays whose shapes do not fit together."""


class EncoderError(CsalignError):
    """An encoder cannot be built or its weights cannot be loaded."""


class DecoderError(CsalignError):
    """A decoder of images cannot be built, loaded or run."""


class OutputError(CsalignError):
    """An output cannot be written to the requested place.

    Attributes:
        result: what was computed, if only its page cannot be written.
    """

    result: Any = None


class TrainingError(CsalignError):
    """Training cannot continue."""


class ProcessesError(CsalignError):
    """The processes of a job cannot reach each other, or one of them ended."""


class ElsewhereError(CsalignError):
    """Another process of the job failed and reports why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of the job failed")
        self.exit_code = exit_code


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived.

    Not an ``Exception``, so that no ``except Exception`` on the way keeps the process alive.

    Args:
        signum: number of the signal; the exit code is 128 more, as shells count.

    Attributes:
        resumes: whether the same command would resume from what was saved.
    """

    resumes = False

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.exit_code = 128 + signum

    def __str__(self) -> str:
        is_typed = self.signum == signal.SIGINT
        what = "Interrupted" if is_typed else f"stopped by {signal.Signals(self.signum).name}"
        return what + ("; run the same command to resume" if self.resumes else "")


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
