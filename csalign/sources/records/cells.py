"""Read one cell of a table: text, captions, or an image in base64; and the names of columns."""

import ast
import base64
import binascii
import re
from typing import Any

from csalign.core.errors import DataError
from csalign.core.records import parse_json
from csalign.sources.records import files

# What pandas, numpy, databases and spreadsheets write for a missing value, and people do not:
# drawings are called "null", "none" and "undefined".
MISSING = frozenset(
    ("nan", "NaN", "-nan", "None", "NULL", "<NA>", "NA", "N/A", "n/a", "#N/A", "\\N")
)
BASE64_NAMES = ("image_base64", "img_base64", "image_b64", "base64")
# How JPEG, PNG, GIF and WebP begin in base64. "/9j/" alone may be a path, but not of this length.
_BASE64 = re.compile(r"data:image/[\w.+-]+;base64,|(?=.{100})(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)")
_URL_SAFE = str.maketrans("-_", "+/", " \n\r")
_SENTENCES = ("raw", "caption", "text", "sentence")  # keys of a caption that is an object
_LITERAL = r"""[bu]?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|None|null|nan|NaN"""
_LITERALS = re.compile(rf"(?:{_LITERAL})(?:[\s,]+(?:{_LITERAL}))*[\s,]*", re.DOTALL)
_LIST = re.compile(
    r"\[\s*\]$|(?:array\(|list\()?\[\s*(?:[bu]?['\"{\[]|None|null|nan).*\]|\{\s*['\"].*\}$",
    re.DOTALL,
)
_TUPLE = re.compile(rf"\(\s*(?:{_LITERAL})\s*,.*\)", re.DOTALL)


def captions_of(value: Any, name: str) -> tuple[str, ...]:
    """Return the captions in a value of a table or of JSON, stripped and not missing.

    Args:
        value: text, a list of texts or of objects with raw text or tokens, or a text that is such
            a list as JSON, Python or numpy write it.
        name: of the column, for messages.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, str):
        text = text_of(value, name)
        if text[-1:] not in ("]", ")", "}") or not (_LIST.match(text) or _TUPLE.match(text)):
            return () if not text or text in MISSING else (text,)
        value = _parse_list(text, name)
    items = value if isinstance(value, list) else [value]
    texts = (text_of(_sentence(item), name) for item in items if not is_missing(item))
    return tuple(text for text in texts if text and text not in MISSING)


def captions_in_text(content: str, *, lines: bool) -> list[str]:
    """Split a text into the captions of its lines, or of the text itself; each once.

    Raises:
        DataError: it looks like a list and cannot be read as one.
    """
    parts = re.split(r"[\r\n]", content) if lines else [content]
    try:
        return list(dict.fromkeys(own for part in parts for own in captions_of(part, "text")))
    except ValueError as error:
        raise DataError(str(error)) from None


def _sentence(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    for key in _SENTENCES:
        if key in item:
            return item[key]
    tokens = item.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("has a sentence without raw text")
    return " ".join(tokens)


def _parse_list(text: str, name: str) -> list[Any]:
    try:
        value = parse_json(text)
    except ValueError:
        opening, closing = {"(": ("(", ")"), "{": ("{", "}")}.get(text[0], ("[", "]"))
        body = text[text.index(opening) + 1 : text.rindex(closing)].strip()
        value = None
        try:
            if _LITERALS.fullmatch(body):
                return [_literal(token) for token in re.findall(_LITERAL, body, re.DOTALL)]
            if "{" in body:
                value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise ValueError(
            f"{name} looks like a list and cannot be read as one ({text:.40}); write a JSON list"
        )
    return value


def _literal(token: str) -> Any:
    if token[-1] not in "'\"":
        return None
    if "\\" not in token and token[0] in "'\"":
        return token[1:-1]
    value = ast.literal_eval(token)
    return value.decode() if isinstance(value, bytes) else value


def is_missing(value: Any) -> bool:
    """Check for null, NaN, or a word that stands for them."""
    return value is None or value != value or (isinstance(value, str) and value in MISSING)


def id_of(value: Any) -> str | None:
    """Return the same text for 7, 7.0 and "7"; None if it is neither a number nor a text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else None


def text_of(value: object, name: str) -> str:
    """Strip a text; raises `ValueError` if it is not text or not valid Unicode."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name} contains half of a surrogate pair; write the whole character"
        ) from None
    return value.strip()


def plain_name(name: str) -> str:
    """Spell a name in lower case with underscores: ``imageId`` and ``Image-ID`` as image_id."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^a-z0-9]+", "_", spaced.lower()).strip("_")


def is_base64_name(name: str | None) -> bool:
    """Check whether all cells of a column by that name are base64."""
    return name is not None and name.lower() in BASE64_NAMES


def is_base64(cell: str) -> bool:
    """Recognise an image in base64, rather than a path, by its first characters."""
    return len(cell) > 20 and _BASE64.match(cell) is not None


def decode_base64(text: str) -> bytes:
    """Decode base64, plain or URL-safe, perhaps with a ``data:`` header, or raise `DataError`."""
    body = text.partition(",")[2] if text.startswith("data:") else text
    files.check_size(len(body) * 3 // 4)
    try:
        return base64.b64decode(body.translate(_URL_SAFE), validate=True)
    except (binascii.Error, ValueError):
        raise DataError("is not valid base64") from None
