"""Where things lie: a local path or an object-store URL, behind the methods of `pathlib.Path`."""

from pathlib import Path
from typing import Any, cast

from csalign.errors import ConfigError

_STORES = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "huggingface_hub"}


def parse_location(value: Any) -> Path:
    """A `Path`, or for a URL (``s3://bucket/key``) a `upath.UPath`, which has the same methods.

    Whoever takes one sticks to its methods (``open``, ``iterdir``, ``/``), since a URL is not for
    ``os`` or ``str`` joins. It is typed as a Path for that reason.

    Raises:
        ConfigError: no installed library knows that kind of URL.
    """
    if isinstance(value, Path) or not isinstance(value, str):
        return cast(Path, value)
    if "://" not in value:
        return Path(value)
    from upath import UPath

    try:
        location = UPath(value.rstrip("/"))  # a slash at the end would be an empty name
        _ = location.fs  # the import of what speaks the protocol waits until here
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{value}: {error}") from None
    return cast(Path, location)


def is_store_error(error: Exception) -> bool:
    """Whether a library behind an object store raised it; what they raise is no OSError."""
    return type(error).__module__.partition(".")[0] in _STORES


def is_remote(location: Path) -> bool:
    """Whether it lies in an object store rather than in a mounted file system."""
    return not isinstance(location, Path)
