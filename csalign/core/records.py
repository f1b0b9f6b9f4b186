"""JSON documents on disk: written atomically, validated when read."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from csalign.core import atomic
from csalign.core.errors import SchemaError
from csalign.core.paths import is_remote, stand_in

_CHECKSUM = "checksum"  # csalign 0.1.0 wrote one of the document into the document itself


class Record(BaseModel):
    """Base of the documents that csalign writes: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


R = TypeVar("R", bound=Record)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object from a file; `remedy` ends the message if it is damaged.

    Raises:
        SchemaError: it is not UTF-8, not JSON, or not an object.
    """
    try:
        document = parse_json(path.read_bytes())
    except ValueError as error:
        problem = stand_in(path) or f"is damaged ({error}); {remedy}"
        raise SchemaError(f"{path}: {problem}") from None
    if not isinstance(document, dict):
        raise SchemaError(f"{path}: is damaged (not a JSON object); {remedy}")
    document.pop(_CHECKSUM, None)
    return document


def read_record(path: Path, kind: type[R], remedy: str) -> R:
    """Read and validate a document; `remedy` ends the message if it is damaged.

    Raises:
        SchemaError: it is damaged, or a later version of csalign wrote it.
    """
    document = read_object(path, remedy)
    version = document.get("format_version")
    if (known := kind.model_fields.get("format_version")) is not None:
        newest = known.default
        if isinstance(version, int) and version > newest:
            raise SchemaError(
                f"{path}: format version {version}, this csalign reads up to {newest}; "
                "upgrade csalign"
            )
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise SchemaError(f"{path}: {where}: {first['msg']}; {remedy}") from None


def read_job(path: Path, kind: type[R], *, restart: bool = False) -> R | None:
    """Read the document of unfinished work; None if there is none, or with `restart` a damaged one.

    Raises:
        SchemaError: it is damaged.
    """
    try:
        remedy = "start again with --overwrite"
        return read_record(path, kind, remedy) if path.is_file() else None
    except SchemaError:
        if restart:
            return None
        raise


def write_record(path: Path, record: Record) -> None:
    """Write a document atomically, as JSON, creating its folder; see `atomic.write_json`."""
    if not is_remote(path):
        path.parent.mkdir(exist_ok=True)
    atomic.write_json(path, record.model_dump(mode="json"))
