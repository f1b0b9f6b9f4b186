"""Refuse wrong paths and options before the libraries of a command take seconds to import."""

import re
from pathlib import Path

from csalign.adapters.hub import is_on_hub
from csalign.core import outputs
from csalign.core.config import Config, OutputConfig
from csalign.core.errors import DataError
from csalign.core.paths import Kind, require_kind
from csalign.evaluation.config import EvalConfig
from csalign.ingest.config import ExtractConfig
from csalign.training.config import TuneConfig

_KINDS = {
    "features": (Kind.FEATURES,),
    "unpaired": (Kind.FEATURES,),
    "zero_shot": (Kind.FEATURES,),
    "adapter": (Kind.RUN,),
    "run": (Kind.RUN,),
    "index": (Kind.INDEX, Kind.FEATURES),
}
"""Fields with paths of artifacts, and the kinds that they accept."""

_FILES = ("captions", "embedding", "evaluation", "groups", "pictures", "prompts", "systems")
"""Fields with paths of other files and folders that are read."""

_PATTERN = re.compile(r"::|://|[{}*?[]")  # in a source that is not one local path


def check_settings(settings: Config) -> None:
    """Check options against each other, and that each path is what a command needs.

    The command checks all of it again, and more; this imports neither torch nor pyarrow.

    Raises:
        ConfigError: options do not go together.
        DataError: an input does not exist or is of another kind.
        OutputError: an output cannot be written.
    """
    settings.check()
    for name, value in settings:
        for path in value if isinstance(value, tuple) else (value,):
            # Of a name such as "adapter" or "index" some commands have words, not paths.
            if isinstance(path, Path):
                _check_path(settings, name, path)
    if isinstance(settings, OutputConfig) and not isinstance(settings, TuneConfig):
        outputs.check_output(settings.out, None, overwrite=settings.overwrite)
    if isinstance(settings, ExtractConfig):
        _check_source(settings.source)


def _check_path(settings: Config, name: str, path: Path) -> None:
    if name in ("adapter", "run") and is_on_hub(path):
        return
    if name in _KINDS:
        is_of_own = name == "features" and isinstance(settings, EvalConfig)
        require_kind(path, *_KINDS[name], *([Kind.RUN] if is_of_own else []))
    elif name in _FILES and not path.exists():
        raise DataError(f"{path}: no such file or folder")
    elif name == "report":
        outputs.check_page(path)


def _check_source(source: str) -> None:
    is_one_path = source != "-" and not _PATTERN.search(source) and "\0" not in source
    if is_one_path and not Path(source).exists():
        raise DataError(f"{source}: no such file or folder")
