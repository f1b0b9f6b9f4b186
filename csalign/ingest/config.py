"""Options of ``csalign extract`` and ``csalign import``."""

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainValidator

from csalign.core.config import (
    Config,
    Count,
    Location,
    Named,
    Number,
    OutputConfig,
    Share,
    Words,
    written,
)
from csalign.core.enums import side_of
from csalign.core.errors import ConfigError
from csalign.sources.records.tables import SourceOptions


class EncoderOptions(Config):
    """Encoders, and the output to store."""

    panel: ClassVar[str] = "Encoders"

    encoder: str | None = Field(None, description="Encoder of both sides: open_clip:MODEL/TAG.")
    image_encoder: str | None = Field(
        None, description="Encoder of images: also timm:MODEL, PACKAGE.MODULE:CALLABLE, or none."
    )
    text_encoder: str | None = Field(
        None, description="Encoder of texts: also hf:MODEL, PACKAGE.MODULE:CALLABLE, or none."
    )
    tokens: Literal["none", "image", "text", "both"] = Field(
        "none", description="Sides whose last-layer tokens are stored too."
    )
    token_space: Literal["hidden", "projected"] = Field(
        "projected", description="Tokens before or after the encoder's projection."
    )
    max_tokens: int | None = Field(
        None, ge=1, description="Most tokens per item: grids are pooled, texts truncated."
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="Stored number format.")


class ExecutionOptions(Config):
    """Execution of the encoders."""

    panel: ClassVar[str] = "Execution"

    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 or mps.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Forward-pass precision; auto is float32 on the CPU, else half."
    )
    batch_size: Annotated[Literal["auto"] | Count, Number] = Field(
        "auto", description="Forward-pass batch size; auto is 32 on the CPU, else 256."
    )
    workers: int | None = Field(
        None, ge=1, description="Threads that decode images (default: one per core, at most 16)."
    )
    compile: bool = Field(False, description="Run the encoders through torch.compile.")


class ShardOptions(Config):
    """Division of the work, and handling of failures."""

    panel: ClassVar[str] = "Sharding and failures"

    shard: str = Field(
        "auto", description="Process shard I/N, I from 0; auto asks SLURM, torchrun and mpirun."
    )
    part_rows: Count = Field(
        4096, description="Records per part; finished parts are skipped on a rerun."
    )
    max_failures: Share = Field(
        0.01, description="Fraction of records that may be unusable before the command fails."
    )
    retry_failures: bool = Field(
        False, description="Reprocess finished parts that had failures or whose inputs changed."
    )
    strict: bool = Field(False, description="Fail if anything is skipped.")


def _parse_part(value: Any) -> float | None:
    """Parse a fraction, or a number of images."""
    try:
        part = float(value)
    except (TypeError, ValueError):
        part = 0.0
    if value is None:
        return None
    if isinstance(value, bool) or not (0 < part < 1 or (part >= 1 and part.is_integer())):
        raise ValueError("must be a fraction below 1, such as 0.1, or a number of images")
    return part if part < 1 else int(part)


Part = Annotated[float | None, PlainValidator(_parse_part)]


class SplitOptions(Config):
    """Splits to make, by image."""

    panel: ClassVar[str] = "Splits"

    val: Part = Field(
        None, description="Validation split: a fraction of the images with texts, or a number."
    )
    test: Part = Field(None, description="Test split, likewise.")
    seed: int = Field(0, description="Random seed of the splits.")
    group: bool = Field(
        True, description="Keep near-duplicate images and shared captions in one split."
    )


class SplitConfig(SplitOptions):
    """``csalign split``: splits of a feature set that exists already.

    >>> SplitConfig(features="features", test=0.1).group
    True
    """

    panel: ClassVar[str] = "Output"
    example: ClassVar[str] = "csalign split features --val 0.1 --test 0.1"

    features: Location = Field(description="Feature set.")
    overwrite: bool = Field(False, description="Replace splits that csalign made before.")


RESERVED = ("item", "item_id", "id", "row", "side", "split", "caption")
"""Columns of tables of items, and so no names of sides."""


def _name_sides(value: Any) -> Any:
    """Spell the names of sides as they are stored; raises ValueError for what cannot be one."""
    if value is None:
        return None
    found: dict[str, Any] = {}
    for name, own in value.items():
        try:
            side = str(side_of(str(name)))
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if side in RESERVED:
            raise ValueError(f"{side} is a column of --pairs; give the side another name")
        if any(side.replace("-", "_") == other.replace("-", "_") for other in found):
            raise ValueError(f"{side} is given twice; give each side a name of its own")
        found[side] = own
    return found


Sided = BeforeValidator(_name_sides)


def _check_sides(config: Config, sides: Collection[str], kept: set[str], remedy: str) -> None:
    """Raise ConfigError if other options than `kept` are given with --side."""
    fields = type(config).model_fields.items()
    changed = sorted(
        config.shown(name)
        for name, field in fields
        if name not in kept and getattr(config, name) != field.get_default()
    )
    if changed:
        raise ConfigError(f"{', '.join(changed)}: cannot be used with --side; {remedy}")
    if len(sides) < 2 and not getattr(config, "add", False):
        add = ", or add it to a set with --add" * ("add" in type(config).model_fields)
        raise ConfigError(f"--side: {', '.join(sides)} alone; give two sides or more{add}")


class EncodedSideOptions(Config):
    """Sides to encode, where they are not images and texts alone."""

    panel: ClassVar[str] = "Any number of sides"

    side: Annotated[dict[str, str] | None, Sided, Named] = Field(
        None,
        description="A side of a table, NAME=ENCODER or NAME=ENCODER@COLUMN, once per side: "
        "timm: of images, hf: of texts, open_clip: of what the column contains. Each row is an "
        "item, or those of one item column. An interrupted extraction resumes.",
    )


class ExtractConfig(
    SourceOptions,
    EncoderOptions,
    OutputConfig,
    EncodedSideOptions,
    SplitOptions,
    ExecutionOptions,
    ShardOptions,
):
    """``csalign extract``: frozen encoders -> CLS and token embeddings in Parquet.

    >>> ExtractConfig(source="photos", out="features").dtype
    'float16'
    """

    source: Annotated[str, BeforeValidator(str)] = Field(
        description="Folder, table, COCO or Karpathy JSON, WebDataset tars, Parquet, .txt of "
        "captions, or - for image paths on stdin; local or a URL."
    )
    example: ClassVar[str] = (
        "csalign extract photos --out features --captions captions.csv "
        "--encoder open_clip:ViT-B-32/openai"
    )
    common: ClassVar[tuple[str, ...]] = (
        *("out", "encoder", "image_encoder", "text_encoder", "side", "captions", "images"),
        *("val", "test", "device", "batch_size", "overwrite"),
    )

    def check(self) -> None:
        """Raise ConfigError if options of two sides and of any number are mixed."""
        kept = {"source", "side", "images", "split_column", "dtype", "part_rows", "max_failures"}
        kept |= {"retry_failures", "strict"}.union(
            *(own.model_fields for own in (OutputConfig, SplitOptions, ExecutionOptions))
        )
        if self.side is not None:
            remedy = "name encoders and columns by --side NAME=ENCODER@COLUMN"
            _check_sides(self, self.side, kept, remedy)

    def to_toml(self) -> str:
        """Return the configuration, equal for every process of a job; see `Config.to_toml`."""
        unshared: dict[str, Any] = {"shard": "auto", "retry_failures": False}
        return super(ExtractConfig, self.model_copy(update=unshared)).to_toml()

    def may_replace(self) -> bool:
        """Return whether the output may exist: it is to be replaced, or has the same options."""
        try:
            there = (self.out / "config.toml").read_text(encoding="utf-8")
        except Exception:  # of any store; whoever writes there says what is wrong
            return self.overwrite
        return self.overwrite or there == self.to_toml()


Name = Annotated[str, Field(min_length=1, max_length=30, pattern=r"^\w[\w -]*$")]


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str | Path) else () if value is None else value


class SideOptions(Config):
    """Sides to read, where they are not images and texts alone."""

    panel: ClassVar[str] = "Any number of sides"

    side: Annotated[dict[str, Location] | None, Sided, Named] = Field(
        None,
        description="A side and its embeddings (n, d), once per side: audio=a.npy, "
        "text=t.parquet, FILE:ARRAY, or a folder of shards.",
    )
    encoder: Annotated[dict[str, str] | None, Sided, Named] = Field(
        None, description="Encoder of a side, for the manifest: audio=laion/clap."
    )
    add: bool = Field(
        False,
        description="Add the sides to the set at --out, whose files stay as they are; --overwrite "
        "replaces sides that it has.",
    )


class ArrayOptions(Config):
    """Arrays to read."""

    panel: ClassVar[str] = "Arrays"

    source: Annotated[tuple[Location, ...], BeforeValidator(_listed)] = Field(
        (),
        description="Image embeddings and text embeddings, one file or folder each; or one that "
        "contains both: a clip-retrieval folder, .npz, .safetensors, .pt, .h5, Parquet or a "
        "datasets folder.",
    )
    images: Location | None = Field(
        None,
        description="Image embeddings (n, d): .npy, .npz, .safetensors, .pt, .h5, .parquet, "
        ".arrow, FILE:NAME, or a folder of shards.",
    )
    texts: Location | None = Field(
        None, description="Text embeddings (m, e), or (n, k, e) for k texts per image."
    )
    image_column: str | None = Field(None, description="Array or column of image embeddings.")
    text_column: str | None = Field(None, description="Array or column of text embeddings.")


class PairOptions(Config):
    """Pairs and labels of the rows."""

    panel: ClassVar[str] = "Pairs and labels"

    pairs: Location | None = Field(
        None,
        description="Table of pairs: image_id, and text_id or one row per text. Of items: a column "
        "per --side, or side, id and item.",
    )
    pair_by: str | None = Field(
        None,
        description="Column of both sides that pairs them, or order: row i of one side belongs to "
        "row i of the other (default: ids that fit, else order).",
    )
    id_column: str | None = Field(
        None, description="Column of the images' table whose equal values are one image."
    )
    captions_per_image: Count | None = Field(
        None, description="Number of captions per image; requires --caption-order."
    )
    caption_order: Literal["blocks", "copies"] | None = Field(
        None,
        description="blocks: all captions of the first image, then of the second; copies: one "
        "caption of every image, then the next.",
    )
    text_counts: Location | None = Field(
        None, description="Captions per image: .npy of counts or offsets, or a table with count."
    )
    image_table: Location | None = Field(None, description="Table of images: id, source, split.")
    text_table: Location | None = Field(
        None, description="Table of the text rows: id, image_id, caption and split."
    )


class RecordOptions(Config):
    """Encoders, names and dtype to record."""

    panel: ClassVar[str] = "Recorded"

    image_encoder: str = Field("unknown", description="Encoder of the images, for the manifest.")
    text_encoder: str = Field("unknown", description="Encoder of the texts, for the manifest.")
    names: Annotated[tuple[Name, Name] | None, Words] = Field(
        None, description="Names of the sides in all output, such as audio,text."
    )
    dtype: Literal["float16", "float32"] | None = Field(
        None, description="Stored number format (default: that of the arrays)."
    )


class ImportConfig(
    ArrayOptions, OutputConfig, SideOptions, PairOptions, SplitOptions, RecordOptions
):
    """``csalign import``: embeddings computed elsewhere -> the same artifact.

    >>> ImportConfig(source=("a.npy", "b.npy"), out="features").image_encoder
    'unknown'
    """

    example: ClassVar[str] = "csalign import image.npy text.npy --out features"
    common: ClassVar[tuple[str, ...]] = (
        *("out", "images", "texts", "side", "image_column", "text_column", "id_column", "pairs"),
        *("captions_per_image", "caption_order", "val", "test", "names", "overwrite"),
    )

    def check(self) -> None:
        """Raise ConfigError if options of two sides and of any number are mixed."""
        kept = {"side", "pairs", "pair_by", *OutputConfig.model_fields, *SplitOptions.model_fields}
        kept |= {"dtype", *SideOptions.model_fields}
        if self.side is None:
            if self.add or self.encoder:
                name = "add" if self.add else "encoder"
                raise ConfigError(f"--{name}: needs --side, such as --side audio=audio.npy")
            return
        remedy = (
            "name sides by --side image=FILE --side text=FILE, their encoders by --encoder "
            "NAME=SPEC, and store ids and captions beside the embeddings or in --pairs"
        )
        _check_sides(self, self.side, kept, remedy)
        if unknown := [name for name in self.encoder or () if name not in self.side]:
            raise ConfigError(f"--encoder {unknown[0]}: is not a --side ({', '.join(self.side)})")

    def command(self, **changes: Any) -> str:
        """Return the command line of this configuration, with some values replaced.

        >>> ImportConfig(source="both.npz", out="f", group=False).command(pair_by="order")
        'csalign import both.npz --no-group --pair-by order --out f'
        """
        given = {name: getattr(self, name) for name in self.model_fields_set} | changes
        values = {name: given[name] for name in type(self).model_fields if name in given}
        words = ["csalign", "import", *map(str, values.pop("source", ()))]
        out = values.pop("out")
        for name, value in values.items():
            words += [] if value is None else written(self.shown(name), value)
        return shlex.join([*words, "--out", str(out)])
