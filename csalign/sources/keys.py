"""Keys that name the same item in two tables, and the columns that may contain them."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import cast
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csalign.core.enums import Modality
from csalign.sources.arrays.naming import (
    ITEM_IDS,
    PATHS,
    REFERENCES,
    is_id,
    is_key,
    label_side,
    plain_name,
)
from csalign.sources.image_rows import ImageRows, keys_of_images
from csalign.sources.labels import Ints, Labels
from csalign.sources.records.tables import CAPTION_NAMES, SPLIT_NAME

REFERENCE, OWN, VALUES, CAPTION, SKIPPED = 3, 6, 7, 9, 10  # ranks of `KeyPair`
ROW = "image_row"  # always a row number from 0, as text_row
_EXAMPLES = 3
_SAMPLE = 256
_NUMBER = r"^(-?)0*(\d+)(\.0*)?$"
_LAST_NUMBER = r"^.*?0*(\d+)$"
_SUFFIX = (
    r"(?i)(.)\.(jpe?g|jfif|png|gif|bmp|webp|tiff?|avif|hei[cf]|jxl|jp2|tga|ppm|txt|caption|json"
    r"|npy|npz|pt)$"
)
_UUID = r"^\{?(\w{8})-(\w{4})-(\w{4})-(\w{4})-(\w{12})\}?$"
_QUOTED = r"^(?:b|tensor|np\.str_)?(?:'([^']*)'|\"([^\"]*)\"|\((-?\d+)\))$"  # b'7', tensor(7)
_NULLS = pa.array(["nan", "NaN", "None", "none", "null", "NULL", "<NA>", "NaT"], pa.large_string())
_SPLITS = re.compile(r"train|val|dev|test", re.IGNORECASE)
_LAST = "by the last number of their names"
_MAX_FOLDERS = 3  # that are compared along with a file's name


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


class Keys:
    """A column of keys, large_string, with its normal forms, each of which is computed once."""

    def __init__(self, values: pa.Array) -> None:
        self.values = values
        self._forms: dict[str, pa.Array | None] = {"": values}

    @cached_property
    def distinct(self) -> int:
        """Number of different keys, without spaces around them."""
        return cast(int, pc.count_distinct(self.form("without spaces")).as_py())

    @property
    def are_few(self) -> bool:
        """Whether most keys repeat, such as classes or users."""
        return self.distinct * 2 <= len(self.values)

    @cached_property
    def are_counted(self) -> bool:
        """Whether they are integers from 0 or 1 on, most of which are there, as any counter's."""
        numbers = self.form("as numbers")
        if numbers is None or not self.distinct:
            return False
        if pc.max(pc.utf8_length(numbers)).as_py() > 18:  # more than an int64
            return False
        low, high = pc.min_max(numbers.cast(pa.int64())).as_py().values()
        return low in (0, 1) and high < 2 * self.distinct

    def form(self, name: str) -> pa.Array | None:
        """Return the keys in a form, None if they do not have it."""
        if name not in self._forms:
            base, change = _FORMS[name]
            values = self.form(base)
            self._forms[name] = None if values is None else change(values)
        return self._forms[name]

    def keep_apart(self, name: str, of: str = "without spaces") -> bool:
        """Return whether keys that differ in one form differ in another one too."""
        one, two = (pc.count_distinct(self.form(form)).as_py() for form in (name, of))
        return cast(bool, one == two)

    def may_be_among(self, known: "Keys") -> bool:
        """Return whether any of a sample of the keys is among known ones in the loosest forms."""
        some = self.values.drop_null()
        some = Keys(some[:: max(1, len(some) // _SAMPLE)].unique())
        return any(
            (own := some.form(form)) is not None
            and (other := known.form(form)) is not None
            and pc.any(pc.is_in(other, value_set=own, skip_nulls=True)).as_py()
            for form in _LOOSEST
        )


def match(wanted: Keys, known: Keys) -> Match:
    """Find keys (m,) among known ones (n,).

    Where they are not all found as they are, both are compared in the forms of `_FORMS`, in that
    order. A form of the names of files counts only if it keeps different keys of one side
    different, and if folders differ in one root at most. The form that finds most is used, the
    first if several do.

    Returns:
        Positions of the first equal key.
    """
    found = _find(wanted, known, "")
    if not found.is_complete and not wanted.may_be_among(known):
        return found
    for form in _FORMS:
        if found.is_complete:
            break
        if wanted.form(form) is None or known.form(form) is None or not known.keep_apart(form):
            continue
        is_loose = form not in _EXACT
        if is_loose and not wanted.keep_apart(form, "as clean paths"):
            continue
        if form == _LAST and all(side.form("as numbers") is None for side in (wanted, known)):
            continue
        further = _find(wanted, known, form)
        if len(further.missing) < len(found.missing) and (
            not is_loose or _folders_agree(wanted, known, further.rows)
        ):
            found = further
    return found


def examples(keys: pa.Array) -> str:
    """Quote the first three different keys, for messages."""
    some = keys[:1000].drop_null().unique()[:_EXAMPLES].to_pylist()
    return ", ".join(f"{key!r:.80}" for key in some) or "none"


def _find(wanted: Keys, known: Keys, form: str) -> Match:
    own = wanted.form(form)
    found = pc.index_in(own, value_set=known.form(form), skip_nulls=True)
    missing = pc.and_(found.is_null(), wanted.values.is_valid())
    rows = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    unknown = np.flatnonzero(missing.to_numpy(zero_copy_only=False))
    if len(unknown):
        is_null = pc.is_in(wanted.values.take(pa.array(unknown)), value_set=_NULLS)
        unknown = unknown[~is_null.to_numpy(zero_copy_only=False)]
    return Match(rows, unknown, form)


def _numbers(keys: pa.Array) -> pa.Array | None:
    for some in (keys[:16], keys):
        if not pc.all(pc.match_substring_regex(some, _NUMBER)).as_py():
            return None
    return pc.replace_substring_regex(keys, _NUMBER, r"\1\2")


def _trimmed(keys: pa.Array) -> pa.Array:
    plain = pc.replace_substring_regex(pc.utf8_trim_whitespace(keys), _QUOTED, r"\1\2\3")
    return pc.if_else(pc.is_in(plain, value_set=_NULLS), pa.scalar(None, plain.type), plain)


def _composed(keys: pa.Array) -> pa.Array:
    return pc.utf8_normalize(keys.cast(pa.string()), "NFC").cast(pa.large_string())


def _paths(keys: pa.Array) -> pa.Array:
    clean = pc.replace_substring(keys, "\\", "/")
    if pc.any(pc.match_substring(clean, "://")).as_py():
        clean = pc.replace_substring_regex(clean, r"^\w+://([^?#]*).*$", r"\1")
    if pc.any(pc.match_substring(clean, "%")).as_py():
        values = [None if key is None else unquote(key) for key in clean.to_pylist()]
        clean = _composed(pa.array(values, pa.large_string()))
    for pattern, new in (("/+", "/"), (r"^(\./)+", ""), (r"(.)#(?:enc:)?\d+$", r"\1")):
        clean = pc.replace_substring_regex(clean, pattern, new)  # 1.jpg#0 is a caption of 1.jpg
    return clean


def _tails(folders: int) -> Callable[[pa.Array], pa.Array]:
    """Return what keeps the names of files and so many folders above them."""
    pattern = rf"^.*?((?:[^/]+/){{0,{folders}}}[^/]+/?)$"
    return lambda paths: pc.replace_substring_regex(paths, pattern, r"\1")


def _last_numbers(stems: pa.Array) -> pa.Array | None:
    if not pc.all(pc.match_substring_regex(stems, _LAST_NUMBER)).as_py():
        return None
    return pc.replace_substring_regex(stems, _LAST_NUMBER, r"\1")


def _folders_agree(wanted: Keys, known: Keys, rows: Ints) -> bool:
    """Return whether the folders of found files end alike, below one root of each side.

    Roots must not name different splits.
    """
    found = pa.array(np.flatnonzero(rows >= 0))
    own, other = (
        pc.replace_substring_regex(pc.take(keys.form("as clean paths"), places), "[^/]*$", "")
        for keys, places in ((wanted, found), (known, pa.array(rows[rows >= 0])))
    )
    pairs = pa.table({"own": own, "other": other}).group_by(["own", "other"]).aggregate([])
    roots = set()
    for pair in pairs.to_pylist():
        parts = [[part for part in pair[side].split("/") if part] for side in ("own", "other")]
        while all(parts) and parts[0][-1] == parts[1][-1]:
            parts = [part[:-1] for part in parts]
        if all(parts):
            roots.add(tuple(map(tuple, parts)))
    splits = [{*map(str.lower, _SPLITS.findall("/".join(root)))} for pair in roots for root in pair]
    return not roots or (len(roots) == 1 and (not all(splits) or splits[0] == splits[1]))


_EXACT = {
    "without spaces": ("", _trimmed),
    "as numbers": ("without spaces", _numbers),
    "in Unicode form NFC": ("without spaces", _composed),
    "as clean paths": ("in Unicode form NFC", _paths),
    "ignoring case": ("as clean paths", pc.utf8_lower),
    "as UUIDs": (
        "ignoring case",
        lambda keys: pc.replace_substring_regex(keys, _UUID, r"\1\2\3\4\5"),
    ),
}
_FORMS: dict[str, tuple[str, Callable[[pa.Array], pa.Array | None]]] = {
    **_EXACT,
    "by file name": (
        "as clean paths",
        lambda paths: pc.replace_substring_regex(paths, "^.*/(.)", r"\1"),
    ),
    **{
        f"by file name and {count} folder{'s' * (count > 1)}": ("as clean paths", _tails(count))
        for count in range(1, _MAX_FOLDERS + 1)
    },
    "without extensions": (
        "by file name",
        lambda names: pc.replace_substring_regex(names, _SUFFIX, r"\1"),
    ),
    "without extensions, as numbers": ("without extensions", _numbers),
    "without extensions, ignoring case": ("without extensions", pc.utf8_lower),
    _LAST: ("without extensions", _last_numbers),
}
_LOOSEST = (
    *("without extensions, ignoring case", "without extensions, as numbers"),
    *(_LAST, "as UUIDs"),
)


@dataclass(frozen=True)
class KeyPair:
    """A column of the texts and one of the images, None for row numbers, and where they match."""

    rank: int  # how likely their names make them one key, the likeliest first
    name: str
    other: str | None
    wanted: Keys
    known: Keys
    owners: Ints | None  # (n,) image of each known key
    is_key: bool  # whether the images' column is one key per image
    found: Match

    @property
    def images(self) -> Ints:
        """Image of each text, -1 for none, (m,)."""
        return self.found.among(self.owners)

    @property
    def is_same(self) -> bool:
        """Whether the columns have one name."""
        return plain_name(self.name) == plain_name(self.other or "")

    @property
    def is_strong(self) -> bool:
        """Whether the names say that each text's key is that of an image."""
        is_named = (self.is_same and is_id(self.name)) or plain_name(self.name) in PATHS
        return self.rank <= REFERENCE or (self.rank <= OWN and is_named)

    @property
    def is_most(self) -> bool:
        """Whether most keys of the texts are known."""
        return bool(self.found.found * 2 > len(self.wanted.values) - self.wanted.values.null_count)

    @cached_property
    def is_chance(self) -> bool:
        """Whether the images' keys are numbers that count, as those of any table may do."""
        return self.known.are_counted

    def is_fit(self, images: int) -> bool:
        """Return whether a complete match pairs texts with rows of images, and not by chance."""
        wanted = self.wanted.values
        if not (self.is_strong or wanted.null_count * 2 < len(wanted)):
            return False
        if self.rank <= REFERENCE or not self.is_chance:
            return True
        is_counter = len(wanted) != images and np.array_equal(self.images, np.arange(len(wanted)))
        return self.is_same and self.rank <= OWN and not bool(is_counter)

    @property
    def is_reordered(self) -> bool:
        """Whether both columns have the same values, in another order."""
        rows = self.images
        is_one_to_one = len({len(np.unique(rows)), len(rows), self.known.distinct}) == 1
        return is_one_to_one and not np.array_equal(rows, np.arange(len(rows)))

    def unknown(self, where: str) -> str:
        """Name the first text whose key is unknown."""
        named = f"by {self.other or 'row number'}, or else by row number from 0"
        where = f"{where}: {self.name}"
        return unknown_key(self.found, self.wanted.values, self.known.values, where, named)


def key_pairs(images: ImageRows, labels: Labels, only: str | None = None) -> Iterator[KeyPair]:
    """Compare the columns of texts and images, the likeliest pairs first.

    Ranks are at most `REFERENCE` for columns that refer to images by name, `OWN` for ids that may
    be the texts' own, and more where only values can decide; captions come last. Columns of images
    most of whose values repeat, such as classes, are left out; so are all without the name `only`,
    if given.
    """
    own = images.labels
    is_shared = own is not None and own.name == labels.name  # lists of both sides in one file
    ranked: list[tuple[int, int, str, str | None]] = []
    for name in labels.names:
        plain = plain_name(name)
        order = REFERENCES.index(plain) if plain in REFERENCES else len(REFERENCES)
        if plain == ROW or (plain in REFERENCES and images.key is None):
            ranked.append((0 if plain == ROW else REFERENCE, order, name, None))
        for key in own.names if own and plain != ROW else ():
            rank = _rank(name, key, images.key)
            if is_shared and own and name in own.names and only is None:
                rank = SKIPPED if key in labels.names else max(rank, VALUES)
            ranked.append((rank, order, name, key))
    texts: dict[str, Keys] = {}
    known: dict[str | None, tuple[Keys, Ints | None, bool]] = {}
    for rank, _, name, other in sorted(ranked, key=lambda entry: entry[:2]):
        if only not in (None, name, other) or (rank == SKIPPED and only is None):
            continue
        wanted = texts.setdefault(name, Keys(labels.column(name)))
        if other not in known:
            values, owners = keys_of_images(images, other)
            is_key = values is not None
            raw = values if is_key or own is None else own.column(str(other))
            known[other] = Keys(raw), owners, is_key
        keys, owners, is_key = known[other]
        if keys.are_few and not is_key and only is None:
            continue
        if rank < VALUES or wanted.may_be_among(keys):
            yield KeyPair(rank, name, other, wanted, keys, owners, is_key, match(wanted, keys))


def _rank(name: str, other: str, key: str | None) -> int:
    plain, is_same = plain_name(name), plain_name(name) == plain_name(other)
    if not {plain, plain_name(other)}.isdisjoint((*CAPTION_NAMES, SPLIT_NAME)):
        return CAPTION if is_same and plain != SPLIT_NAME else SKIPPED
    side = label_side(name)
    if plain in REFERENCES or (is_id(name) and side is Modality.IMAGE):
        return (1 if is_same else 2) if is_key(other) else VALUES
    if plain in ITEM_IDS or (is_key(name) and side is Modality.TEXT):
        is_likely = is_key(other) if key is None else other == key
        return OWN if is_same or is_likely else VALUES
    if is_key(name) and is_key(other):
        return 4 if is_same else 5
    return VALUES if is_same else VALUES + 1


def unknown_key(found: Match, wanted: pa.Array, known: pa.Array, where: str, named: str) -> str:
    """Name the first text whose key is unknown."""
    row = int(found.missing[0])
    shown = (
        f"{examples(wanted)} of the texts, {examples(known)} of the images"
        if not found.found
        else f"images are named {named}"
    )
    return (
        f"{where}: image {wanted[row].as_py()!r:.200} of text row {row} is unknown "
        f"({len(found.missing)} texts name unknown images); {shown}; correct the keys, pass "
        "--pairs TABLE, or ignore them with --pair-by order"
    )
