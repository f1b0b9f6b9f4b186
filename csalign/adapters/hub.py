"""Adapters on the Hugging Face hub, downloaded once into its cache."""

import logging
import re
from pathlib import Path
from typing import TypeVar

from csalign.core.config import Config
from csalign.core.errors import DataError, reason_of

log = logging.getLogger(__name__)

C = TypeVar("C", bound=Config)

RUNS = ("adapter", "run", "first", "second")
"""Options that name a run, which may be on the hub."""

_NAME = re.compile(r"(?P<scheme>hf:/{1,2})?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@]+))?")


def local_run(run: Path | str, *, revision: str | None = None) -> Path:
    """Return the folder of a run, from the hub if its name is that of a repository there.

    Args:
        run: a folder; ``hf://USER/REPO`` or ``hf://USER/REPO@REVISION``; or ``USER/REPO`` if
            there is neither such a folder nor a folder ``USER``.
        revision: branch, tag or commit of the repository.

    Raises:
        DataError: no such repository, or the hub cannot be reached.
    """
    found = _named(run)
    if found is None:
        return Path(run)
    return fetch(found["name"], revision=revision or found["revision"])


def local_path(path: Path) -> Path:
    """Return a path, or for ``hf://USER/REPO`` the folder of that run; see `local_run`."""
    return local_run(path) if str(path).startswith("hf:") else path


def with_local_runs(settings: C, names: dict[str, str]) -> C:
    """Return a config with the folders of the runs that it names on the hub; see `local_run`."""
    named = {option: getattr(settings, option, None) for option in RUNS}
    found = {option: local_run(run) for option, run in named.items() if run and is_on_hub(run)}
    names |= {str(folder): str(named[option]) for option, folder in found.items()}
    return settings.model_copy(update=found) if found else settings


def is_on_hub(run: Path | str) -> bool:
    """Return whether `local_run` would look for a run on the hub."""
    return _named(run) is not None


def _named(run: Path | str) -> re.Match[str] | None:
    found = _NAME.fullmatch(str(run))
    if found is None or found["scheme"]:
        return found
    return None if Path(run).exists() or Path(run).parent.exists() else found


def fetch(name: str, *, subfolder: str | None = None, revision: str | None = None) -> Path:
    """Download an adapter from the Hugging Face hub, or find it in the cache; returns its folder.

    Raises:
        DataError: no such repository, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from csalign.adapters.checkpoint import DESCRIPTION, WEIGHTS

    log.info("looking for %s on the Hugging Face hub", name)
    try:
        paths = [
            Path(hf_hub_download(name, file, subfolder=subfolder, revision=revision))
            for file in (DESCRIPTION, WEIGHTS)
        ]
    except LocalEntryNotFoundError as error:
        raise DataError(
            f"{name}: no such run here, and it is not in the cache of the Hugging Face hub, which "
            f"cannot be reached ({reason_of(error):.200}); pass a folder, or connect once"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise DataError(
            f"{name}: no such run here, and the hub has no adapter of that name "
            f"({reason_of(error):.200}); check the name, or pass a folder"
        ) from error
    return paths[0].parent
