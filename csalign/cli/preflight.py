"""Refuse wrong paths and options before the libraries of a command take seconds to import."""

import re
from pathlib import Path

from csalign.adapters.hub import is_on_hub
from csalign.core import outputs
from csalign.core.config import Config, OutputConfig
from csalign.core.errors import DataError
from csalign.core.paths import Kind, require_kind
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

_PATTERN = re.compile(r"::|://|[{}*?[\0]")  # in a source that is not one local path


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
            raise DataError(f"{searched}: no such file or folder")
        inputs.append(searched)
    # An existing study of tune is continued.
    if isinstance(settings, OutputConfig) and not isinstance(settings, TuneConfig):
        outputs.check_output(
            settings.out,
            None,
            overwrite=settings.overwrite,
            inputs=tuple(inputs),
            searched=searched,
        )


def _check_path(settings: Config, name: str, path: Path) -> None:
    if name in ("adapter", "run") and is_on_hub(path):
        return
    if name in _KINDS:
        title = type(settings).model_fields[name].title or ""
        require_kind(path, *_KINDS[name], *([Kind.RUN] if "RUN" in title else []))
    elif name in _FILES and not path.exists():
        raise DataError(f"{path}: no such file or folder")
    elif name == "report":
        outputs.check_page(path)
