"""Options of ``csalign index`` and ``csalign search``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from csalign.core.config import (
    Config,
    Count,
    Location,
    Named,
    OutputConfig,
    RunFolder,
    RunSource,
    Share,
)
from csalign.core.enums import side_of
from csalign.core.errors import ConfigError
from csalign.runs.config import LoadOptions


def _spell(value: str) -> str:
    """Spell the names of sides as they are stored; raises ValueError for what cannot be one."""
    try:
        return ",".join(dict.fromkeys(side_of(name.strip()) for name in value.split(",")))
    except ConfigError as error:
        raise ValueError(str(error)) from None


Sides = Annotated[str, AfterValidator(_spell)]


class ItemOptions(LoadOptions):
    """Rows of a feature set that can be found, and the adapter that maps them."""

    panel: ClassVar[str] = "Items"

    adapter: RunSource | None = Field(
        None,
        description="Run that maps the features, or mean-shift, standardised or closed-form, "
        "fitted here; without it they are used as stored.",
    )
    side: Sides = Field("image", description="Side to find, or several, comma-separated.")
    split: str = Field("all", description="Split(s), comma-separated; 'all' selects every row.")


class VectorOptions(Config):
    """Index of the vectors."""

    panel: ClassVar[str] = "Index"

    factory: str = Field(
        "auto",
        description="FAISS factory string, as IVF4096,Flat; auto: Flat to 50,000 rows, then IVF.",
    )
    recall: Share = Field(0.95, description="Target recall@10 versus exact search.")
    effort: Count | None = Field(
        None, description="nprobe or efSearch (default: doubled until --recall is reached)."
    )
    correct: Literal["csls", "inverted-softmax", "centre"] | None = Field(
        None, description="Hubness correction, estimated from the rows of the other side."
    )
    memory: int | None = Field(
        None, ge=0, description="MiB that the build may use (default: half of what is free)."
    )


class IndexConfig(ItemOptions, OutputConfig, VectorOptions):
    """``csalign index``: build a search index on disk.

    >>> IndexConfig(features="features", out="index").side
    'image'
    """

    panel: ClassVar[str] = "Index"

    example: ClassVar[str] = "csalign index features --adapter run --out index"

    features: Location = Field(description="Feature set to index.")
    out: RunFolder = Field(description="Output folder.")
    batch_size: Count = Field(8192, description="Rows per batch.")


class QueryOptions(Config):
    """Index and queries."""

    panel: ClassVar[str] = "Query"

    index: Location = Field(
        description="Index, or a feature set, which is indexed in memory (exact search)."
    )
    query: str | None = Field(None, description="Text query, like --text.")
    text: str | None = Field(None, description="Text query; - reads one per line from stdin.")
    image: str | None = Field(
        None, description="Image file as query; - reads one path per line from stdin."
    )
    embedding: Location | None = Field(
        None, description="Encoder output as query: .npy of shape (d,) or (n, d)."
    )
    query_side: Sides | None = Field(
        None,
        description="Side of --embedding (default: the side that is not indexed, if there is one).",
    )
    queries: Annotated[dict[str, str], Named] = Field(
        {},
        description="A side's query: rows of a .npy file (FILE.npy:ROW is one of them), an image "
        "file, or words; once per side, for queries of several sides.",
        json_schema_extra={"flag": "query"},
    )
    encoder: str | None = Field(
        None, description="Query encoder, as for extract (default: the one that the set records)."
    )


_QUERIES = ("query", "text", "image", "embedding", "queries")


class SearchConfig(QueryOptions, ItemOptions):
    """``csalign search``: find the nearest items of an index or a feature set.

    >>> SearchConfig(index="index", query="a red flower").top
    10
    """

    panel: ClassVar[str] = "Results"
    positional: ClassVar[tuple[str, ...]] = ("index", "query")
    example: ClassVar[str] = 'csalign search index "a red bicycle" --top 5'
    common: ClassVar[tuple[str, ...]] = (
        *("text", "image", "embedding", "queries", "top", "adapter", "side", "report"),
        *("pictures", "device", "jsonl"),
    )

    top: Count = Field(10, description="Items per query.")
    jsonl: bool = Field(False, description="Print one JSON document per query, as it is answered.")
    report: Path | None = Field(
        None, description="Also write a page with thumbnails, as found.html."
    )
    pictures: Path | None = Field(
        None, description="Folder that image sources are relative to, for the page."
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_queries(cls, values: Any) -> Any:
        """Take queries by side as `query` too, which in Python is shorter."""
        if isinstance(values, Mapping) and isinstance(values.get("query"), Mapping):
            queries = {name: str(own) for name, own in values["query"].items()}
            return {**values, "query": None, "queries": queries}
        return values

    def check(self) -> None:
        """Raise ConfigError unless there is exactly one kind of query."""
        given = [name for name in _QUERIES if getattr(self, name)]
        if not given:
            raise ConfigError(
                f'missing a query; for instance: csalign search {self.index} "a red bicycle", or '
                "--image photo.jpg, or --embedding x.npy"
            )
        if len(given) > 1:
            names = " and ".join(self.shown(name) for name in given)
            raise ConfigError(f"{names} are {len(given)} queries; pass one of them")
        if self.query_side is not None and self.embedding is None:
            raise ConfigError("--query-side is the side of --embedding; omit it")
