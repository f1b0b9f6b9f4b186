"""Every column, dtype and manifest key of a feature set: the only place that spells them."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import pyarrow as pa
from pydantic import AfterValidator, Field

from csalign.core import atomic
from csalign.core.enums import AnySide, Modality, Side, SideName
from csalign.core.errors import CsalignError, DataError
from csalign.core.paths import DOCUMENTS, Kind, is_store_error, require_kind
from csalign.core.records import Record, read_record

MANIFEST = DOCUMENTS[Kind.FEATURES]
FAILURES = "failures.jsonl"
SPLITS = "splits"
SIDES = "sides"
ENTRIES = frozenset({MANIFEST, FAILURES, SPLITS, SIDES, "images", "texts", "config.toml"})
"""Names in the folder of a feature set."""
FORMAT_VERSION: Final = 2  # of sets with "splits", "sides" or "items"; all others are of version 1

ID = "id"
IMAGE_ID = "image_id"
ITEM = "item"
CAPTION = "caption"
SOURCE = "source"
SPLIT = "split"
EMBEDDING = "embedding"
TOKENS = "tokens"

STRING_COLUMNS = {
    Modality.IMAGE: (ID, SOURCE, SPLIT),
    Modality.TEXT: (ID, IMAGE_ID, CAPTION, SPLIT),
}
SIDE_COLUMNS = (ID, ITEM, CAPTION, SOURCE, SPLIT)  # strings of any further side
DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}

# Outside of these norms the squares overflow or vanish in float32, and with them the direction.
LEAST_NORM, MOST_NORM = 1e-10, 1e18
RESCALE = "scale the embeddings to norms about 1, which changes no result"


def string_columns(side: AnySide, *, items: bool = False) -> tuple[str, ...]:
    """Return the string columns of a side; with `items` images and texts have their item too."""
    if not isinstance(side, Modality):
        return SIDE_COLUMNS
    return (*STRING_COLUMNS[side], *((ITEM,) if items else ()))


def folder_of(side: AnySide) -> str:
    """Return the folder of a side's files within the set."""
    return side.plural if isinstance(side, Modality) else f"{SIDES}/{side}"


def table_schema(
    side: AnySide,
    dtype: str,
    width: int,
    token_width: int | None = None,
    *,
    items: bool = False,
) -> pa.Schema:
    """Build the Arrow schema of one side's Parquet files; no `token_width` means no tokens."""
    number = DTYPES[dtype]
    names = string_columns(side, items=items)
    fields = [pa.field(ID, pa.string(), nullable=False)]
    fields += [pa.field(name, pa.string()) for name in names if name != ID]
    fields.append(pa.field(EMBEDDING, vector_type(number, width), nullable=False))
    if token_width is not None:
        fields.append(pa.field(TOKENS, pa.list_(vector_type(number, token_width)), nullable=False))
    return pa.schema(fields)


def splits_schema() -> pa.Schema:
    """Build the Arrow schema of the files of `Splits`."""
    return pa.schema([pa.field(ID, pa.string(), nullable=False), pa.field(SPLIT, pa.string())])


def vector_type(number: np.dtype[Any], width: int) -> pa.DataType:
    """Return the Arrow type of vectors."""
    # Elements that cannot be null let a reader take the values as one plain array.
    element = pa.field("element", pa.from_numpy_dtype(number), nullable=False)
    return pa.list_(element, width)


ALIGNED = " | "  # in the spec of what `apply` wrote: the encoder, then the run
UNKNOWN = "unknown"  # spec of imported arrays whose encoder was not named
_MAY_DIFFER = {"tokenizer", "precision", "max_tokens"}  # a place, rounding, tokens
_MAY_DIFFER |= {"normalized", "adapter_sha256", "adapter_trained_on"}  # of `apply`


class EncoderInfo(Record):
    """The encoder of one side."""

    spec: str  # as the user named it
    fingerprint: str | None = None  # SHA-256 of its weights, if known
    width: int = Field(ge=1)
    token_width: int | None = None  # None, as the space, if no tokens are stored
    token_space: Literal["hidden", "projected"] | None = None
    # Everything else that affects the numbers: image size, tokenizer, precision.
    preprocessing: dict[str, Any] = Field(default_factory=dict)

    @property
    def weights(self) -> str | None:
        """SHA-256 of the weights that gave the rows: of an encoder, or of a run's adapter."""
        return self.fingerprint or self.preprocessing.get("adapter_sha256")

    @property
    def settings(self) -> dict[str, Any]:
        """What besides the weights must agree between rows of one encoder, as image size."""
        known = {key: own for key, own in self.preprocessing.items() if key not in _MAY_DIFFER}
        return {key: list(own) if isinstance(own, tuple) else own for key, own in known.items()}


class Shard(Record):
    """One Parquet file: its path relative to the feature set, size and SHA-256."""

    path: str
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str


class Counts(Record):
    """Rows of each side, texts that have an image, and inputs that could not be used."""

    images: int
    texts: int
    pairs: int
    failures: int


class Shards(Record):
    """The files of each side, in row order."""

    images: list[Shard]
    texts: list[Shard]

    def side(self, modality: Modality) -> list[Shard]:
        """Return the files of one side."""
        return self.images if Modality.of(modality) is Modality.IMAGE else self.texts


class Encoders(Record):
    """The encoder of each side; None for a side that is not stored."""

    image: EncoderInfo | None
    text: EncoderInfo | None

    def side(self, modality: Modality) -> EncoderInfo | None:
        """Return the encoder of one side; None if the side is not stored."""
        return self.image if Modality.of(modality) is Modality.IMAGE else self.text


class SplitSettings(Record):
    """How images are divided into splits.

    `val` and `test` are fractions of the images with texts, or numbers of images; None for no such
    split. `group` keeps near-duplicate images and those that share a caption on one side.
    """

    val: float | None = None
    test: float | None = None
    seed: int = 0
    group: bool = True

    @property
    def options(self) -> str:
        """The settings as options of ``csalign split``."""
        parts = {"val": self.val, "test": self.test}
        words = [
            f"--{name} {part if part < 1 else int(part)}" for name, part in parts.items() if part
        ]
        words += [f"--seed {self.seed}"] * bool(self.seed) + ["--no-group"] * (not self.group)
        return " ".join(words)


class Splits(Record):
    """Splits that were made after the rows were written, and stand for those stored with them.

    Each file has the columns id and split, in the row order of its side.
    """

    settings: SplitSettings
    threshold: float | None  # least cosine of near-duplicates; None if only equal ones were grouped
    groups: int  # of several images
    grouped: int  # images in them
    images: Shard | None
    texts: Shard | None
    sides: dict[SideName, Shard] = Field(default_factory=dict)  # of the further sides

    def side(self, side: AnySide) -> Shard | None:
        """Return the file of one side; None if the side is not stored."""
        if not isinstance(side, Modality):
            return self.sides.get(side)
        return self.images if side is Modality.IMAGE else self.texts


class SideEntry(Record):
    """A further side: its encoder, and its files in row order."""

    encoder: EncoderInfo
    rows: int = Field(ge=0)
    shards: list[Shard]


def _further(side: AnySide) -> Side:
    """Raise ValueError unless a side may stand beside images and texts."""
    if isinstance(side, Modality):
        raise ValueError(f"{side} has a folder of its own")
    return side


FurtherSide = Annotated[SideName, AfterValidator(_further)]


class Manifest(Record):
    """Content of ``manifest.json``; written last, so a folder without one is unfinished.

    "names" are the names of the sides if they are not images and texts; "source_root" is the folder
    that relative sources of images start from; "pairing" is what paired imported rows, such as
    "row order" or "image_id"; "job" is the SHA-256 of the extraction that wrote the set; "joined"
    counts the images that repeated an earlier one, and have no row; "sides" are those beside images
    and texts; "items" says that images and texts have the column item, by which the rows of all
    sides belong together (else an image has its id, and a text its image_id). Each is omitted if
    unknown or empty.
    """

    format: Literal["csalign-features"] = "csalign-features"
    format_version: Literal[1, 2] = FORMAT_VERSION
    csalign_version: str
    names: dict[Modality, str] | None = None
    source_root: str | None = None
    pairing: str | None = None
    job: str | None = None
    joined: int | None = None
    dtype: Literal["float16", "float32"]
    encoders: Encoders
    counts: Counts
    shards: Shards
    splits: Splits | None = None
    sides: dict[FurtherSide, SideEntry] = Field(default_factory=dict)
    items: bool = False

    @property
    def side_names(self) -> tuple[AnySide, ...]:
        """The sides that are stored: images, texts, then the others by name."""
        both = (side for side in Modality if self.encoders.side(side) is not None)
        return (*both, *sorted(self.sides))

    def fingerprint(self) -> str:
        """Return the SHA-256 of the shards' checksums, which identifies the files of this set.

        Copies of a set have the same one. Rows written again may not, as the bytes of a Parquet
        file depend on the version of pyarrow that wrote it. That of each further side follows
        after a "+", and that of the files of `splits` after a hyphen; see `same_rows`.
        """
        found = _sha256_of(*self.shards.images, *self.shards.texts)
        further = sorted(self.sides)
        found += "".join(f"+{_sha256_of(*self.sides[name].shards)}" for name in further)
        if self.splits is None:
            return found
        files = [self.splits.side(side) for side in (*Modality, *further)]
        return f"{found}-{_sha256_of(*(file for file in files if file is not None))}"

    @property
    def test_split_options(self) -> str:
        """Options of ``csalign split`` that hold out a test split, beside the splits there are."""
        if self.splits is None:
            return "--val 0.1 --test 0.1"
        settings = self.splits.settings.model_copy(update={"test": 0.1})
        return f"{settings.options} --overwrite"


def _sha256_of(*files: Shard) -> str:
    return hashlib.sha256("\n".join(file.sha256 for file in files).encode()).hexdigest()


def same_rows(one: str, other: str) -> bool:
    """Return whether two fingerprints are of the same rows, maybe divided into other splits.

    A set to which sides were added still has the rows that it had.
    """
    (first, *sides), (second, *others) = (own.partition("-")[0].split("+") for own in (one, other))
    smaller, larger = sorted(({*sides}, {*others}), key=len)
    return first == second and smaller <= larger and (bool(smaller) or first != _sha256_of())


def source_root(sources: Iterable[Any]) -> str | None:
    """Return the working directory if the first source is a path relative to it, else None.

    Sources are strings, None or Arrow's scalars of these.
    """
    values = (value.as_py() if isinstance(value, pa.Scalar) else value for value in sources)
    first = next(filter(None, values), None)
    is_relative = first is not None and "://" not in first and not Path(first).is_absolute()
    return str(Path.cwd()) if is_relative else None


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a feature set.

    Raises:
        DataError: the folder does not exist, or is not a feature set.
        SchemaError: the manifest is damaged or of a newer format version.
    """
    path = folder / MANIFEST
    try:
        require_kind(folder, Kind.FEATURES)
        return read_record(path, Manifest, "create the feature set again")
    except CsalignError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_store_error(error):
            raise
        raise DataError(atomic.os_error(error, path)) from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which completes the feature set."""
    document = manifest.model_dump(mode="json")
    for name in ("names", "source_root", "pairing", "job", "joined", "splits"):
        if document[name] is None:
            del document[name]
    # An older csalign takes an unknown key for damage.
    for part, name in ((document, "sides"), (document, "items"), (document.get("splits"), "sides")):
        if part and not part[name]:
            del part[name]
    is_new = manifest.splits or manifest.sides or manifest.items
    document["format_version"] = FORMAT_VERSION if is_new else 1
    atomic.write_json(folder / MANIFEST, document)
