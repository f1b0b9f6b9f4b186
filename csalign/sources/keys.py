"""Keys that name the same item in two tables, compared in their normal forms."""

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csalign.sources.labels import Ints

_EXAMPLES = 3
_NUMBER = r"^(-?)0*(\d+)(\.0+)?$"
_SUFFIX = r"(?i)(.)\.(jpe?g|jfif|png|gif|bmp|webp|tiff?|avif|heic|txt|caption|json|npy|pt)$"


@dataclass(frozen=True)
class Match:
    """Where the keys of some rows are among known keys.

    Attributes:
        rows: (m,) position of each key among the known ones, -1 if it is null or missing.
        missing: rows, ascending, whose key is not null and is not known.
        form: how the keys were compared, "" if as they are; such as "without extensions".
    """

    rows: Ints
    missing: Ints
    form: str

    @property
    def is_complete(self) -> bool:
        """Whether all keys are known or null."""
        return not len(self.missing)

    @property
    def found(self) -> int:
        """Number of rows whose key is known."""
        return int((self.rows >= 0).sum())

    def among(self, owners: Ints | None) -> Ints:
        """Return the item of each row's key, -1 for none; `owners` are those of the known keys."""
        return self.rows if owners is None else np.where(self.rows >= 0, owners[self.rows], -1)

    def worded(self, name: str) -> str:
        """Name the keys and the form in which they were compared, for people."""
        return f"{name}, {self.form}" if self.form else name


def match(wanted: pa.Array, known: pa.Array) -> Match:
    """Find keys (m,) among known ones (n,), all large_string.

    Where they are not all found as they are, both are compared in Unicode's composed form, as
    clean paths, by file name, and without image extension, each of them also as numbers ("007" and
    "7.0" are "7" if all keys are numbers). A form counts only if it keeps different keys of one
    side different, and folders of both sides must end alike. The form that finds most is used,
    the first if several do.

    Returns:
        Positions of the first equal key.
    """
    found = _find(wanted, known, "")
    for form, change in _FORMS.items():
        for is_number in (False, True):
            if found.is_complete:
                return found
            own, other = (_changed(keys, change, is_number) for keys in (wanted, known))
            if own is None or other is None:
                continue
            number = "as numbers" if is_number else ""
            further = _find(own, other, ", ".join(filter(None, (form, number))))
            if len(further.missing) < len(found.missing) and (
                change not in (_file_names, _stems) or _are_nested(wanted, known, further.rows)
            ):
                found = further
    return found


def examples(keys: pa.Array) -> str:
    """Quote the first three different keys, for messages."""
    some = keys[:1000].drop_null().unique()[:_EXAMPLES].to_pylist()
    return ", ".join(f"{key!r:.80}" for key in some) or "none"


def _find(wanted: pa.Array, known: pa.Array, form: str) -> Match:
    found = pc.index_in(wanted, value_set=known, skip_nulls=True)
    missing = pc.and_(found.is_null(), wanted.is_valid())
    rows = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return Match(rows, np.flatnonzero(missing.to_numpy(zero_copy_only=False)), form)


def _changed(
    keys: pa.Array, change: Callable[[pa.Array], pa.Array], is_number: bool
) -> pa.Array | None:
    """Return the keys in another form, or None if different ones become equal."""
    changed = change(keys)
    if is_number:
        if not pc.all(pc.match_substring_regex(changed, _NUMBER)).as_py():
            return None
        changed = pc.replace_substring_regex(changed, _NUMBER, r"\1\2")
    kept = pc.count_distinct(changed).as_py() == pc.count_distinct(keys).as_py()
    return changed if kept else None


def _composed(keys: pa.Array) -> pa.Array:
    return pc.utf8_normalize(keys.cast(pa.string()), "NFC").cast(pa.large_string())


def _paths(keys: pa.Array) -> pa.Array:
    clean = pc.replace_substring(_composed(keys), "\\", "/")
    if pc.any(pc.match_substring(clean, "%")).as_py():
        values = [None if key is None else unquote(key) for key in clean.to_pylist()]
        clean = pa.array(values, pa.large_string())
    return pc.replace_substring_regex(clean, r"^(\./)+", "")


def _file_names(keys: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(_paths(keys), r"^.*/", "")


def _are_nested(wanted: pa.Array, known: pa.Array, rows: Ints) -> bool:
    """Return whether the folders of equal file names end alike, or one side has none."""
    own, other = (
        [
            "/" + path.strip("/").rpartition("/")[0]
            for path in _paths(keys).fill_null("").to_pylist()
        ]
        for keys in (wanted, known)
    )
    return all(
        row < 0
        or len(min(folder, other[row])) == 1
        or folder.endswith(other[row])
        or other[row].endswith(folder)
        for folder, row in zip(own, rows.tolist(), strict=True)
    )


def _stems(keys: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(_file_names(keys), _SUFFIX, r"\1")


_FORMS: dict[str, Callable[[pa.Array], pa.Array]] = {
    "": lambda keys: keys,
    "in Unicode form NFC": _composed,
    "as clean paths": _paths,
    "by file name": _file_names,
    "without extensions": _stems,
}
