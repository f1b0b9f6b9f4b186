"""Where things lie: a local path or an object-store URL, behind the methods of `pathlib.Path`."""

import asyncio
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any, cast

from csalign.core.errors import ConfigError

_PATIENCE_S = 60.0  # without a byte
_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers of a server that may soon give another
_STORES = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "huggingface_hub"}


def parse_location(value: Any) -> Path:
    """A `Path`, or for a URL (``s3://bucket/key``) a `upath.UPath`, which has the same methods.

    Whoever takes one sticks to its methods (``open``, ``iterdir``, ``/``), since a URL is not for
    ``os`` or ``str`` joins. It is typed as a Path for that reason.

    Raises:
        ConfigError: no installed library knows that kind of URL.
        ValueError: it is no text and no path.
    """
    if not isinstance(value, str):
        if isinstance(value, Path) or hasattr(value, "fs"):
            return cast(Path, value)
        raise ValueError("Input should be a path or a URL")
    if "://" not in value:
        return Path(value)
    from upath import UPath

    try:
        location = UPath(
            value.rstrip("/"), **_options(value)
        )  # a slash at the end would be an empty name
        _ = location.fs  # the import of what speaks the protocol waits until here
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{value}: {error}") from None
    return cast(Path, location)


def _options(url: str) -> dict[str, Any]:
    """What makes a file system patient: object stores' libraries are, that of HTTP is not."""
    if url.partition("://")[0] not in ("http", "https"):
        return {}
    try:
        from aiohttp import ClientSession, ClientTimeout
    except ImportError:
        return {}  # fsspec tells what is missing
    limits = ClientTimeout(total=None, sock_connect=_PATIENCE_S, sock_read=_PATIENCE_S)
    options: dict[str, Any] = {"timeout": limits}
    if "middlewares" in signature(ClientSession).parameters:  # since 3.12
        options["middlewares"] = (_try_again,)
    return {"client_kwargs": options}


async def _try_again(request: Any, handler: Any) -> Any:
    """Send a request again, ever later, while the server is busy, broken or out of reach."""
    from aiohttp import ClientConnectionError

    for seconds in _WAITS_S:
        with suppress(ClientConnectionError, TimeoutError):
            response = await handler(request)
            if response.status not in _PASSING:
                return response
            response.close()
        await asyncio.sleep(seconds)
    return await handler(request)


def is_store_error(error: Exception) -> bool:
    """Whether a library behind an object store raised it; what they raise is no OSError."""
    return type(error).__module__.partition(".")[0] in _STORES


def is_remote(location: Path) -> bool:
    """Whether it lies in an object store rather than in a mounted file system."""
    return not isinstance(location, Path)
