"""Locations: a local path or an object-store URL, and which artifact is there."""

import asyncio
import os
import re
import tomllib
import unicodedata
from contextlib import suppress
from enum import StrEnum
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

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
    if value.startswith("file://"):
        value = unquote(value.removeprefix("file://"))
    if "://" not in value:
        return Path(value).expanduser()
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


def respelled(name: str, root: Path | None = None) -> list[str]:
    """Find the files that a missing name may mean, which differ from it in spelling alone.

    Case, Unicode form, ``%20``, backslashes, quotes around it and spaces at its ends are spelling.
    Their paths are relative to `root`; of an absolute path absolute ones.
    """
    parts = name.replace("\\", "/").split("/")
    if root is not None and ".." in parts:
        return []
    found = ["/"] if root is None and not parts[0] else [""]
    for part in parts:
        found = [
            os.path.join(above, other)  # noqa: PTH118 - Path takes ten times as long
            for above in found
            for other in _spelled_alike(Path(root or "", above), part)
        ]
    return found


def _spelled_alike(folder: Path, part: str) -> list[str]:
    if part in ("", ".", ".."):
        return [part]
    try:
        if "\0" not in part and (folder / part).exists():
            return [part]
        return _spellings(folder, folder.stat().st_mtime_ns).get(_spelling(part), [])
    except OSError:
        return []


@lru_cache(maxsize=256)
def _spellings(folder: Path, _: int) -> dict[str, list[str]]:
    """List a folder's names by their spelling, again once it has changed."""
    found: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):  # noqa: PTH208 - names are all that is wanted
        found.setdefault(_spelling(name), []).append(name)
    return found


def _spelling(name: str) -> str:
    return unicodedata.normalize("NFC", unquote(name)).casefold().strip(" \t\r\n'\"")


def likely_meant(path: Path, root: Path | None = None) -> str:
    """Say which files a missing path may mean, to append to a message; "" if that is unknown."""
    if is_remote(path) or is_remote(root or path):
        return ""
    if os.path.exists(Path(root or "", path)):  # noqa: PTH110 - of any length
        return ""
    if os.path.islink(path):  # noqa: PTH114
        return f"; it is a link to {path.readlink()}, which is missing (try git annex get)"
    parts = str(path).replace("\\", "/").split("/")
    is_windows = re.match(r"[A-Za-z]:[\\/]|\\\\", str(path))
    ends = ("/".join(parts[start:]) for start in range(1, len(parts)) if parts[start])
    tried = [*ends] if is_windows else [str(path), *(ends if root and not parts[0] else ())]
    found = next(filter(None, (_files(respelled(own, root), root) for own in tried)), [])
    meant = f"; did you mean {' or '.join(map(repr, found[:3]))}?" if found else ""
    return "; it is a path of Windows, write where the file is here" * bool(is_windows) + meant


def _files(found: list[str], root: Path | None) -> list[str]:
    return [own for own in found if root is None or (root / own).is_file()]


_COMPRESSED = "is compressed, so parts of it cannot be read; unpack it with {} first"
_STAND_INS = {
    rb"version https://git-lfs": "is a Git LFS pointer, not the file itself; run git lfs pull",
    rb"\S*/annex/objects/": "is a git-annex pointer, not the file itself; run git annex get",
    rb"\s*<(!doctype html|html)": "is a web page, which a server sent instead of the file; "
    "download it again",
    rb"\s*<(\?xml[^>]*>\s*<)?Error>": "is the error message of a server, not the file itself; "
    "download it again",
    rb"\x1f\x8b": _COMPRESSED.format("gunzip"),
    rb"BZh\d1AY": _COMPRESSED.format("bunzip2"),
    rb"\xfd7zXZ": _COMPRESSED.format("unxz"),
    rb"\x28\xb5\x2f\xfd": _COMPRESSED.format("unzstd"),
    rb"\0{512}": "begins with zeros alone, as an unfinished download does; download it again",
    rb"\Z": "is empty; write or download it again",
}
_UNFINISHED = (".part", ".partial", ".crdownload", ".incomplete", ".download", ".aria2")


def stand_in(content: Path | bytes) -> str | None:
    """Recognise what often stands where a file should be, with the remedy; None if unknown.

    Args:
        content: the file, local or a URL, or its first bytes (512 or more). An empty file is known
            by its bytes alone, since the remedy for one of csalign's own is another.
    """
    if not isinstance(content, bytes):
        if content.suffix.lower() in _UNFINISHED:
            return "is an unfinished download, by its name; download it again"
        try:
            with content.open("rb") as file:
                content = file.read(1024)
        except Exception:  # also errors of object stores
            return None
        if not content:
            return None
    found = (said for start, said in _STAND_INS.items() if re.match(start, content, re.I))
    return next(found, None)


class Kind(StrEnum):
    """A kind of artifact; its value names it in messages."""

    FEATURES = "a feature set"
    RUN = "a run"
    INDEX = "an index"


DOCUMENTS = {Kind.FEATURES: "manifest.json", Kind.RUN: "adapter.json", Kind.INDEX: "index.json"}
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
    """Raise DataError, with what is there and the remedy, unless an artifact of a kind is there."""
    usual, remedy = wanted[0], _MAKERS[wanted[0]]
    if any((path / DOCUMENTS[kind]).is_file() for kind in wanted):
        return
    if not path.exists():
        problem = f"no such {usual.value.split(' ', 1)[1]}"
        unfinished = path.with_name(f"{path.name}.partial")
        if path.name and unfinished.exists():
            remedy = f"{unfinished} is unfinished work; rerun its command to resume"
        remedy = likely_meant(path).removeprefix("; ") or remedy
    elif found := kind_of(path):
        problem = f"is {found.value}, not {usual.value}"
        remedy = _instead(path, found, usual) or remedy
    elif usual is Kind.FEATURES and path.suffix.lower() in _ARRAYS:
        problem = "is an array, not a feature set"
        remedy = "import it first: csalign import image.npy text.npy --out features"
    elif path.is_file():
        problem = f"is a file, not {usual.value}, which is a folder"
    else:
        problem = f"is not {usual.value} (no {DOCUMENTS[usual]} in it)"
    raise DataError(f"{path}: {problem}; {remedy}")


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
