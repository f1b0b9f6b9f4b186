"""JSON documents that carry a checksum of themselves, so that no flipped digit passes for one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csalign.core import atomic
from csalign.core.errors import SchemaError

CHECKSUM = "checksum"
"""The key of it: hex SHA-256 of the rest, as JSON with sorted keys and no spaces."""


def write_sealed(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document and its checksum, whole or not at all; see `atomic.write_json`."""
    atomic.write_json(path, {**document, CHECKSUM: _checksum(document)})


def unsealed(document: Any) -> Any:
    """A document, as it was parsed, without its checksum, if it has one."""
    if not isinstance(document, dict):
        return document
    return {key: value for key, value in document.items() if key != CHECKSUM}


def check_seal(path: Path, document: Any, remedy: str) -> None:
    """Compare a document with its checksum; those of other hands may have none.

    Args:
        path: where the document is from.
        document: as it was parsed.
        remedy: what to do if it does not agree.

    Raises:
        SchemaError: it does not agree.
    """
    if not isinstance(document, dict) or CHECKSUM not in document:
        return
    if document[CHECKSUM] != _checksum(unsealed(document)):
        raise SchemaError(
            f"{path}: does not agree with the checksum in it: it was changed or is damaged; "
            f"{remedy}"
        )


def _checksum(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
