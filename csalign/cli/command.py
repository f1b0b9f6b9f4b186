"""Commands from functions: options, checks, progress and results."""

import inspect
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from csalign.cli import render
from csalign.cli.errors import error_exits
from csalign.cli.help import Help, HelpAll
from csalign.cli.options import ConfigFile, Json, Quiet, Verbose, given_values, parameters_of
from csalign.cli.preflight import check_settings
from csalign.cli.progress import shown_progress
from csalign.core import atomic, distributed
from csalign.core.calls import recorded_call
from csalign.core.config import Config
from csalign.core.errors import ConfigError, DataError
from csalign.core.paths import is_store_error
from csalign.core.results import Progress

C = TypeVar("C", bound=Config)
R = TypeVar("R")


def command_of(
    config: type[C], show: Callable[[R, C], None], *, distributable: bool = False
) -> Callable[[Callable[[C, Progress], R]], Callable[..., None]]:
    """Decorate a function of a config and a progress callback, making it a command.

    Args:
        config: its fields become options, beside ``--config``, ``--json``, ``-q`` and ``-v``.
        show: prints a result, got with some settings, for people.
        distributable: whether processes that torchrun starts run the command together; the main
            one alone prints.
    """

    def decorate(function: Callable[[C, Progress], R]) -> Callable[..., None]:
        def run(
            config_file: ConfigFile = None,
            json: Json = False,
            quiet: Quiet = False,
            verbose: Verbose = 0,
            help_: Help = False,
            help_all: HelpAll = False,
            **options: Any,
        ) -> None:
            is_follower = distributable and distributed.world_from_environment().rank > 0
            quiet = quiet or is_follower
            with (
                error_exits(quiet=quiet, verbose=verbose) as console,
                recorded_call(shlex.join(["csalign", *sys.argv[1:]])),
                distributed.process_group() if distributable else nullcontext(),
            ):
                file = None if config_file is None else Path(config_file)
                settings = config.resolve(file, given_values(options))
                if json and getattr(settings, "jsonl", False):
                    raise ConfigError("--json and --jsonl: are two formats; pass one of them")
                with (
                    _naming_urls(value for _, value in settings),
                    shown_progress(console, quiet=quiet) as progress,
                ):
                    if not is_follower:
                        check_settings(settings)
                    result = function(settings, progress)
                if not is_follower:
                    render.show(result, show, settings, as_json=json, quiet=quiet)

        common = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(run).parameters.items()
            if name != "options"
        ]
        parameters = [*parameters_of(config), *common]
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


@contextmanager
def _naming_urls(places: Iterable[Any]) -> Iterator[None]:
    """Raise an object store's error as a DataError with the URLs among `places`."""
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
