"""What surrounds every command: logging, and errors that become exit codes."""

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from csalign.cli.render import STDOUT
from csalign.cli.text import spelled
from csalign.core import atomic
from csalign.core.errors import CsalignError, DataError, ElsewhereError, Stopped
from csalign.core.paths import is_store_error

LOGGER = "csalign"


@contextmanager
def command(*, quiet: bool, verbose: int) -> Iterator[Console]:
    """Run a command's body; yields the console on stderr.

    An expected error becomes one or two lines on stderr and its exit code; anything else is a bug
    and keeps its traceback.

    Raises:
        typer.Exit: with the exit code of an expected error or of a signal.
    """
    console = Console(stderr=True, soft_wrap=True, emoji=False)
    _set_up_logging(console, quiet=quiet, verbose=verbose)
    try:
        yield console
    except ElsewhereError as error:
        raise typer.Exit(error.exit_code) from None
    except CsalignError as error:
        _explain(console, str(error), verbose)
        raise typer.Exit(error.exit_code) from None
    except Stopped as stopped:
        _explain(console, str(stopped), verbose)
        raise typer.Exit(stopped.exit_code) from None
    except BrokenPipeError:
        # The reader of our stdout went away, as in `| head`; end as SIGPIPE would have it.
        _drop_stdout()
        raise typer.Exit(128 + signal.SIGPIPE) from None
    except OSError as error:
        if error.filename == STDOUT:
            _drop_stdout()
        _explain(console, atomic.os_error(error), verbose)
        raise typer.Exit(1) from None
    except Exception as error:
        if not is_store_error(error):
            raise
        _explain(console, f"the object store failed: {error}; check its address and keys", verbose)
        raise typer.Exit(1) from None


def _drop_stdout() -> None:
    """Forget what was not yet written, which Python would try once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def naming(places: Iterable[Any]) -> Iterator[None]:
    """Let an error of an object store, which does not say of which, name those that were given.

    Args:
        places: what the command was given, of which URLs are meant.

    Raises:
        DataError: in place of such an error.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        is_nameless = isinstance(error, OSError) and error.filename is None
        urls = [str(place) for place in places if "://" in str(place)]
        if not urls or not (is_nameless or is_store_error(error)):
            raise
        raise DataError(atomic.os_error(error, " or ".join(urls))) from error


def _explain(console: Console, message: str, verbose: int) -> None:
    if verbose >= 2:
        console.print(traceback.format_exc(), markup=False, highlight=False)
    console.print(f"csalign: {spelled(message)}", markup=False, highlight=False, style="red")


class _StderrHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        label = "warning: " if record.levelno >= logging.WARNING else ""
        self._console.print(
            f"csalign: {label}{spelled(record.getMessage())}",
            style=style,
            markup=False,
            highlight=False,
        )


def _set_up_logging(console: Console, *, quiet: bool, verbose: int) -> None:
    level = logging.ERROR if quiet else (logging.INFO, logging.DEBUG)[min(verbose, 1)]
    logger = logging.getLogger(LOGGER)
    logger.handlers = [_StderrHandler(console)]
    logger.setLevel(level)
    logger.propagate = False
    if not verbose:
        warnings.simplefilter("ignore")  # of libraries; ours go through the logger
