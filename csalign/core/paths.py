"""Locations: a local path or an object-store URL, with the methods of `pathlib.Path`."""

import asyncio
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any, cast

from csalign.core.errors import ConfigError

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
