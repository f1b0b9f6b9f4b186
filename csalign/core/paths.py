"""Locations: a local path or an object-store URL, and which artifact is there."""

import asyncio
import tomllib
from contextlib import suppress
from enum import StrEnum
from inspect import signature
from pathlib import Path
from typing import Any, cast

from csalign.core.errors import ConfigError, DataError

_PATIENCE_S = 60.0  # without a byte
RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
_RETRIED = {408, 425, 429, 500, 502, 503, 504}  # HTTP status codes that may pass
# Modules whose errors are not OSErrors. What the Hugging Face hub raises is one.
_STORES = (
    "aiobotocore.",
    "aiohttp.",
    "azure.",
    "botocore.",
    "gcsfs.",
    "google.api_core.",
    "google.auth.",
)


def parse_location(value: Any) -> Path:
    """Return a `Path`, or for a URL (``s3://bucket/key``) a `upath.UPath` with the same methods.

    Typed as a Path; use its methods (``open``, ``iterdir``, ``/``) only, since ``os`` functions
    and string joins do not work on URLs.

    Raises:
        ConfigError: no installed library reads that kind of URL.
        ValueError: the value is neither a string nor a path.
    """
    if not isinstance(value, str):
        if isinstance(value, Path) or hasattr(value, "fs"):
            return cast(Path, value)
        raise ValueError("Input should be a path or a URL")
    if "://" not in value:
        return Path(value)
    from upath import UPath

    try:
        # A trailing slash would be an empty name.
        location = UPath(value.rstrip("/"), **_options(value))
        _ = location.fs  # imports the library of the protocol
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{value}: {error}") from None
    return cast(Path, location)


def _options(url: str) -> dict[str, Any]:
    """Return timeouts and retries for HTTP; the libraries of object stores have their own."""
    if url.partition("://")[0] not in ("http", "https"):
        return {}
    try:
        from aiohttp import ClientSession, ClientTimeout
    except ImportError:
        return {}  # fsspec names what is missing
    limits = ClientTimeout(total=None, sock_connect=_PATIENCE_S, sock_read=_PATIENCE_S)
    options: dict[str, Any] = {"timeout": limits}
    if "middlewares" in signature(ClientSession).parameters:  # since 3.12
        options["middlewares"] = (_retry,)
    return {"client_kwargs": options}


async def _retry(request: Any, handler: Any) -> Any:
    """Send a request again, with exponential backoff, while the server is busy or unreachable."""
    from aiohttp import ClientConnectionError

    for seconds in RETRY_WAITS_S:
        with suppress(ClientConnectionError, TimeoutError):
            response = await handler(request)
            if response.status not in _RETRIED:
                return response
            response.close()
        await asyncio.sleep(seconds)
    return await handler(request)


def is_store_error(error: Exception) -> bool:
    """Return whether the library of an object store raised an error that is not an OSError."""
    return f"{type(error).__module__}.".startswith(_STORES)


def is_remote(location: Path) -> bool:
    """Return whether a location is in an object store rather than a mounted file system."""
    return not isinstance(location, Path)


class Kind(StrEnum):
    """A kind of artifact; its value names it in messages."""

    FEATURES = "a feature set"
    RUN = "a run"
    INDEX = "an index"


DOCUMENTS = {
    Kind.FEATURES: "manifest.json",
    Kind.RUN: "adapter.json",
    Kind.INDEX: "index.json",
}
"""The file that makes a folder an artifact of a kind; written last."""

_MAKERS = {
    Kind.FEATURES: "create one with csalign extract or import",
    Kind.RUN: "train one with csalign train",
    Kind.INDEX: "build one with csalign index",
}
_ARRAYS = {".npy", ".npz", ".safetensors", ".pt", ".pth", ".h5", ".hdf5", ".parquet", ".arrow"}


def kind_of(path: Path) -> Kind | None:
    """Return the kind of artifact that a folder is; None if it is not one."""
    return next((kind for kind, name in DOCUMENTS.items() if (path / name).is_file()), None)


def require_kind(path: Path, *wanted: Kind) -> None:
    """Raise DataError, with what is there and the remedy, unless an artifact of a kind is there.

    Args:
        path: of the folder, local or a URL.
        wanted: the kinds that will do; the first is the usual one.
    """
    usual = wanted[0]
    if any((path / DOCUMENTS[kind]).is_file() for kind in wanted):
        return
    remedy = _MAKERS[usual]
    if not path.exists():
        unfinished = path.with_name(f"{path.name}.partial")
        if path.name and unfinished.exists():
            remedy = f"{unfinished} is unfinished work; rerun its command to resume"
        raise DataError(f"{path}: no such {usual.value.split(' ', 1)[1]}; {remedy}")
    found = kind_of(path)
    if found is not None:
        instead = _instead(path, found, usual)
        raise DataError(f"{path}: is {found.value}, not {usual.value}; {instead or remedy}")
    if usual is Kind.FEATURES and path.suffix.lower() in _ARRAYS:
        raise DataError(
            f"{path}: is an array, not a feature set; import it first: csalign import "
            "image.npy text.npy --out features"
        )
    if path.is_file():
        raise DataError(f"{path}: is a file, not {usual.value}, which is a folder; {remedy}")
    raise DataError(f"{path}: is not {usual.value} (no {DOCUMENTS[usual]} in it); {remedy}")


def _instead(path: Path, found: Kind, wanted: Kind) -> str:
    """Say what to pass where an artifact of another kind was wanted; "" if that is unknown."""
    if found is Kind.FEATURES:
        return f"train one with csalign train {path} --out run" if wanted is Kind.RUN else ""
    try:
        made_from = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))["features"]
    except (OSError, ValueError, KeyError):
        return ""
    if wanted is Kind.INDEX:
        return f"pass its features and the run: {made_from} --adapter {path}"
    return f"pass its features, {made_from}" if wanted is Kind.FEATURES else ""
