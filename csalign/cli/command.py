"""Commands from functions: options, checks, progress and results.

Wrong paths and options are refused before the libraries of a command take seconds to import.
"""

import gc
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from csalign.adapters.hub import RUNS, is_on_hub, with_local_runs
from csalign.adapters.kinds import is_baseline
from csalign.cli import render
from csalign.cli.errors import error_exits
from csalign.cli.help import Help, HelpAll
from csalign.cli.options import ConfigFile, Json, Quiet, Verbose, given_values, parameters_of
from csalign.cli.progress import shown_progress
from csalign.core import atomic, distributed, outputs
from csalign.core.config import Config, OutputConfig
from csalign.core.errors import ConfigError, DataError, OutputError
from csalign.core.paths import Kind, is_store_error, likely_meant, require_kind
from csalign.core.progress import recorded_call
from csalign.ingest.config import ExtractConfig
from csalign.training.config import TuneConfig

_KINDS = {
    "features": (Kind.FEATURES,),
    "unpaired": (Kind.FEATURES,),
    "zero_shot": (Kind.FEATURES,),
    "adapter": (Kind.RUN,),
    "run": (Kind.RUN,),
    "first": (Kind.RUN,),
    "second": (Kind.RUN,),
    "index": (Kind.INDEX, Kind.FEATURES),
}
"""Fields with paths of artifacts, and the kinds that they accept."""

_FILES = ("captions", "embedding", "evaluation", "groups", "pictures", "prompts", "systems")
"""Fields with paths of other files and folders that are read."""

_PATTERN = re.compile(r"::|://|[{}*?[\0]")  # in a source that is not one local path


def command_of(
    config: type[Config],
    function: str,
    show: Callable[[Any, Any], None],
    *,
    distributable: bool = False,
) -> Callable[..., None]:
    """Return the command that calls a function of a config and a progress callback.

    Args:
        config: its fields become options, beside ``--config``, ``--json``, ``-q`` and ``-v``.
        function: ``MODULE:NAME`` within csalign, imported when the command runs.
        show: prints a result, got with some settings, for people.
        distributable: whether processes that torchrun starts run the command together; the main
            one alone prints.
    """

    def run(
        config_file: ConfigFile = None,
        json: Json = False,
        quiet: Quiet = False,
        verbose: Verbose = 0,
        help_: Help = False,
        help_all: HelpAll = False,
        **options: Any,
    ) -> None:
        with error_exits(quiet=quiet, verbose=verbose):
            is_follower = distributable and distributed.world_from_environment().rank > 0
        quiet = quiet or is_follower
        with (
            error_exits(quiet=quiet, verbose=verbose) as console,
            recorded_call(shlex.join(["csalign", *sys.argv[1:]])) as call,
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
                module, _, name = function.partition(":")
                work = getattr(import_module(f"csalign.{module}"), name)
                gc.freeze()
                gc.enable()
                local = with_local_runs(settings, call.names)
                failed = None
                try:
                    result = call.complete(work(local, progress))
                except OutputError as error:
                    if error.result is None:
                        raise
                    failed, result = error, call.complete(error.result)
                    settings = settings.model_copy(update={"report": None})
            if not is_follower:
                render.show(result, show, settings, as_json=json, quiet=quiet)
            if failed is not None:
                raise failed

    common = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(run).parameters.items()
        if name != "options"
    ]
    parameters = [*parameters_of(config), *common]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


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


def check_settings(settings: Config) -> None:
    """Check options against each other, and that each path is what a command needs.

    The command checks all of it again, and more; this imports neither torch nor pyarrow.

    Raises:
        ConfigError: options do not go together.
        DataError: an input does not exist or is of another kind.
        OutputError: an output cannot be written.
    """
    settings.check()
    inputs: list[Path] = []
    for name, value in settings:
        for path in value if isinstance(value, tuple) else (value,):
            # Of a name such as "adapter" or "index" some commands have words, not paths.
            if isinstance(path, Path):
                _check_path(settings, name, path)
                inputs += [path] if name not in ("out", "report") else []
    searched = None
    if isinstance(settings, ExtractConfig) and not _PATTERN.search(settings.source):
        searched = Path(settings.source)
        if settings.source != "-" and not searched.exists():
            raise DataError(f"{searched}: no such file or folder{likely_meant(searched)}")
        inputs.append(searched)
    # An existing study of tune is continued.
    if isinstance(settings, OutputConfig) and not isinstance(settings, TuneConfig):
        may_exist = settings.overwrite or getattr(settings, "add", False)
        if isinstance(settings, ExtractConfig):  # the same one changes nothing
            may_exist = settings.may_replace()
        outputs.check_output(
            settings.out, None, overwrite=may_exist, inputs=tuple(inputs), searched=searched
        )


def _check_path(settings: Config, name: str, path: Path) -> None:
    if name in RUNS and (is_on_hub(path) or is_baseline(path)):
        return
    if name in _KINDS:
        title = type(settings).model_fields[name].title or ""
        require_kind(path, *_KINDS[name], *([Kind.RUN] if "RUN" in title else []))
    elif name in _FILES and not (path.exists() or (name == "systems" and is_baseline(path))):
        raise DataError(f"{path}: no such file or folder{likely_meant(path)}")
    elif name == "report":
        outputs.check_page(path)
