"""Keys that name the same item in two tables, and the columns that may contain them."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import cache, cached_property
from typing import Literal, cast
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csalign.core.arrays import Ints
from csalign.core.enums import Modality
from csalign.sources.arrays.naming import (
    ITEM_IDS,
    PATHS,
    PLACES,
    REFERENCES,
    is_counter,
    is_figure,
    is_id,
    is_key,
    label_side,
    plain_name,
)
from csalign.sources.image_rows import ImageRows, keys_of_images
from csalign.sources.labels import Labels, first_repeated
from csalign.sources.records.cells import MISSING
from csalign.sources.records.tables import CAPTION_NAMES, SPLIT_NAME

ROW = "image_row"  # always a row number from 0, as text_row
_EXAMPLES = 3
_SAMPLE = 256
_NUMBER = r"^(-?)0*(\d+)(?:\.0*)?$"
_LAST_NUMBER = r"^.*?()0*(\d+)$"
_SUFFIX = (
    r"(?i)(.)\.(jpe?g|jfif|png|gif|bmp|webp|tiff?|avif|hei[cf]|jxl|jp2|tga|ppm|txt|caption|json"
    r"|npy|npz|pt)$"
)
_UUID = r"^\{?(\w{8})-(\w{4})-(\w{4})-(\w{4})-(\w{12})\}?$"
_QUOTED = r"^(?:b|tensor|np\.str_)?(?:'([^']*)'|\"([^\"]*)\"|\((-?\d+)\))$"  # b'7', tensor(7)
_NULLS = pa.array(["", *sorted(MISSING), "NaT"], pa.large_string())
_SPLITS = re.compile(r"train|val|dev|test", re.IGNORECASE)
_LAST = "by the last number of their names"

Change = Callable[[pa.Array], pa.Array | None]
Verdict = Literal["fits", "unpaired", "broken", "ambiguous", ""]


@dataclass(frozen=True)
class Match:
    """Where the keys of some rows are among known keys."""

    rows: Ints  # (m,) position of each key among the known ones, -1 if it is null or missing
    missing: Ints  # rows, ascending, whose key is not null and is not known
    form: str  # how the keys were compared, such as "without extensions"; "" if as they are

    @property
    def is_complete(self) -> bool:
        """Whether all keys are known or null."""
        return not len(self.missing)

    @property
    def found(self) -> int:
        """Number of rows whose key is known."""
        return int((self.rows >= 0).sum())

    def among(self, owners: Ints) -> Ints:
        """Return the item of each row's key, -1 for none; `owners` are those of the known keys."""
        return np.where(self.rows >= 0, owners[self.rows], -1)

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
    def bounds(self) -> tuple[int, int] | None:
        """The least and the greatest key if all are integers, else None."""
        numbers = self.form("as numbers")
        if numbers is None or (pc.max(pc.utf8_length(numbers)).as_py() or 99) > 18:  # of an int64
            return None
        low, high = pc.min_max(numbers.cast(pa.int64())).as_py().values()
        return low, high

    @property
    def are_counted(self) -> bool:
        """Whether they are integers from 0 or 1 on, most of which are there, as any counter's."""
        low, high = self.bounds or (-1, 0)
        return low in (0, 1) and high < 2 * self.distinct

    @property
    def are_dense(self) -> bool:
        """Whether they are integers close together, as years and lengths are."""
        return self.bounds is not None and self.bounds[1] - self.bounds[0] < 3 * self.distinct

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
        is_loose = form not in EXACT
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
    is_key = trimmed(wanted.values.take(pa.array(unknown))).is_valid()
    return Match(rows, unknown[is_key.to_numpy(zero_copy_only=False)], form)


def _replacing(pattern: str, new: str) -> Change:
    return lambda keys: pc.replace_substring_regex(keys, pattern, new)


def _as_numbers(pattern: str) -> Change:
    def change(keys: pa.Array) -> pa.Array | None:
        for some in (keys[:16], keys):
            if not pc.all(pc.match_substring_regex(some, pattern)).as_py():
                return None
        return pc.replace_substring_regex(keys, pattern, r"\1\2")

    return change


def trimmed(keys: pa.Array) -> pa.Array:
    """Remove spaces, quotes of bytes, and blank keys and words for missing values."""
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


EXACT: dict[str, tuple[str, Change]] = {
    "without spaces": ("", trimmed),
    "as numbers": ("without spaces", _as_numbers(_NUMBER)),
    "in Unicode form NFC": ("without spaces", _composed),
    "as clean paths": ("in Unicode form NFC", _paths),
    "ignoring case": ("as clean paths", pc.utf8_lower),
    "as UUIDs": ("ignoring case", _replacing(_UUID, r"\1\2\3\4\5")),
}
_TAILS: dict[str, tuple[str, Change]] = {
    f"by file name{folders}": (
        "as clean paths",
        _replacing(rf"^.*?((?:[^/]+/){{0,{count}}}[^/]+/?)$", r"\1"),
    )
    for count, folders in enumerate(("", " and 1 folder", " and 2 folders", " and 3 folders"))
}
_FORMS: dict[str, tuple[str, Change]] = {
    **EXACT,
    **_TAILS,
    "without extensions": ("by file name", _replacing(_SUFFIX, r"\1")),
    "without extensions, as numbers": ("without extensions", _as_numbers(_NUMBER)),
    "without extensions, ignoring case": ("without extensions", pc.utf8_lower),
    _LAST: ("without extensions", _as_numbers(_LAST_NUMBER)),
}
_LOOSEST = (
    *("without extensions, ignoring case", "without extensions, as numbers"),
    *(_LAST, "as UUIDs"),
)


class Rank(IntEnum):
    """What the names of a column of the texts and one of the images say, the likeliest first."""

    ROW = auto()  # a row number
    REFERENCE = auto()  # the image of each text
    KEYS = auto()  # keys of either
    OWN = auto()  # ids that may be the texts' own
    VALUES = auto()  # nothing: only values can decide
    CAPTION = auto()
    SKIPPED = auto()


@dataclass(frozen=True)
class KeyPair:
    """A column of the texts and one of the images, None for row numbers, and where they match."""

    rank: Rank
    name: str
    other: str | None
    wanted: Keys
    known: Keys
    owners: Ints | None  # (n,) image of each known key, None if it is not one key per image
    found: Match

    @cached_property
    def images(self) -> Ints | None:
        """Image of each text, -1 for none, (m,); None if the images' column is not a key."""
        return None if self.owners is None else self.found.among(self.owners)

    @property
    def is_same(self) -> bool:
        """Whether the columns have one name."""
        return plain_name(self.name) == plain_name(self.other or "")

    @property
    def must_fit(self) -> bool:
        """Whether the names say that each text's key is that of an image."""
        is_named = (self.is_same and is_id(self.name)) or plain_name(self.name) in PATHS
        return self.rank <= Rank.REFERENCE or (self.rank <= Rank.OWN and is_named)

    @property
    def is_evident(self) -> bool:
        """Whether most keys of the texts are known, and not as numbers that any table may have."""
        given = len(self.wanted.values) - self.wanted.values.null_count
        is_number = self.rank >= Rank.VALUES and self.compared.are_dense and not is_key(self.name)
        is_chance = is_number or self.compared.are_counted
        is_index = self.is_same and is_counter(self.name) and not self.found.is_complete
        if is_index and self.owners is not None and len(self.wanted.values) == len(self.owners):
            is_chance = False  # both sides are rows of one table, and others of each are missing
        return self.found.found * 2 > given and not is_chance

    @cached_property
    def compared(self) -> Keys:
        """The images' keys as they are compared, such as numbers of "1.jpg" and "2.jpg"."""
        return Keys(self.known.form(self.found.form)) if self.found.form else self.known

    @cached_property
    def verdict(self) -> Verdict:
        """What names and values say of the columns, by the first rule that applies."""
        found, wanted, images = self.found, self.wanted.values, self.images
        if images is None or not found.is_complete:
            is_likely = self.rank < Rank.CAPTION and (self.must_fit or self.is_evident)
            return "broken" if is_likely and (found.found or images is not None) else ""
        if not found.found:
            return "unpaired" if self.rank <= Rank.REFERENCE else ""
        if not self.must_fit and wanted.null_count * 2 >= len(wanted):
            return ""
        if self.rank <= Rank.REFERENCE or not self.compared.are_counted:
            return "fits"
        is_in_order = np.array_equal(images, np.arange(len(images)))
        are_paths = {plain_name(self.name), plain_name(str(self.other))} <= {*PATHS}
        if (self.is_same or are_paths) and self.rank <= Rank.OWN:
            # As many texts as there are, numbered in order, are not the first images by that alone.
            return "" if is_in_order and len(wanted) != len(self.known.values) else "fits"
        is_one_to_one = len(np.unique(images)) == len(images) == self.known.distinct
        is_likely = is_one_to_one and not is_in_order and not is_figure(self.name)
        return "ambiguous" if is_likely else ""

    def problem(self, own: Labels, texts: Labels) -> str:
        """Say why columns that are likely one key do not pair."""
        where, keys, insist = f"{texts.name}: {self.name}", self.known.values, "--pair-by order"
        if self.verdict == "ambiguous":
            return (
                f"{where} has the numbers of {self.other} of {own.name} in another order, which "
                f"may be chance; pair by it with --pair-by {self.name}, or ignore it with {insist}"
            )
        if self.owners is not None:
            named = f"by {self.other or 'row number'}, or else by row number from 0"
            return unknown_key(self.found, self.wanted.values, keys, where, named)
        if keys.null_count:
            problem = f"{own.where(keys.is_null().index(True).as_py())}: has no {self.other}"
        else:
            row, first = first_repeated(keys) or (0, 0)
            problem = (
                f"{own.where(row)}: duplicate {self.other} {keys[row].as_py()!r:.200}, also in "
                f"{own.where(first)}"
            )
        return (
            f"{problem}, and texts name their images by it; correct the keys, pass --pairs TABLE, "
            f"or ignore them with {insist}"
        )


def key_pairs(images: ImageRows, labels: Labels, only: str | None = None) -> Iterator[KeyPair]:
    """Compare the columns of texts and images, the likeliest pairs first.

    Columns of images most of whose values repeat, such as classes, are left out. With the name
    `only`, all pairs with a column of that name are compared.
    """
    texts = cache(lambda name: Keys(labels.column(name)))
    known = cache(lambda other: (Keys((own := keys_of_images(images, other))[0]), own[1]))
    for rank, *_, name, other in sorted(_ranked(images, labels), key=lambda entry: entry[:3]):
        if only not in (None, name, other) or (rank is Rank.SKIPPED and only is None):
            continue
        wanted, (keys, owners) = texts(name), known(other)
        if owners is None and keys.are_few and only is None:
            continue
        if rank < Rank.VALUES or wanted.may_be_among(keys):
            yield KeyPair(rank, name, other, wanted, keys, owners, match(wanted, keys))


def _ranked(images: ImageRows, labels: Labels) -> Iterator[tuple[Rank, int, int, str, str | None]]:
    """Yield each column of the texts with each of the images, after three numbers to sort by."""
    own = images.labels
    is_shared = own.name == labels.name  # lists of both sides in one file
    for name in labels.names:
        plain = plain_name(name)
        order = REFERENCES.index(plain) if plain in REFERENCES else len(REFERENCES)
        if plain == ROW:
            yield Rank.ROW, 0, 0, name, None
            continue
        if plain in PLACES or (plain in REFERENCES and images.key is None):
            yield Rank.REFERENCE, 2, order, name, None
        for key in own.names:
            rank = _rank(name, key, images.key)
            if is_shared and name in own.names:
                rank = Rank.SKIPPED if key in labels.names else max(rank, Rank.VALUES)
            distance = 0 if plain == plain_name(key) else 1 if is_key(name) else 2
            yield rank, distance, order, name, key


def _rank(name: str, other: str, key: str | None) -> Rank:
    plain, is_same = plain_name(name), plain_name(name) == plain_name(other)
    if not {plain, plain_name(other)}.isdisjoint((*CAPTION_NAMES, SPLIT_NAME)):
        is_listed = plain in CAPTION_NAMES and (is_same or label_side(other) is Modality.IMAGE)
        return Rank.CAPTION if is_listed else Rank.SKIPPED
    side, rank = label_side(name), Rank.VALUES
    if plain in REFERENCES or (is_id(name) and side is Modality.IMAGE):
        rank = Rank.REFERENCE if is_key(other) else rank
    elif plain in ITEM_IDS or (is_key(name) and side is Modality.TEXT):
        is_likely = is_same or (is_key(other) if key is None else other == key)
        rank = Rank.OWN if is_likely else rank
    elif is_key(name) and is_key(other):
        rank = Rank.KEYS
    return rank


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
