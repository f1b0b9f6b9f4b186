"""Options of ``csalign index`` and ``csalign search``."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from csalign.core.config import Config, Count, Location, OutputConfig, RunFolder, RunSource, Share
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError
from csalign.runs.config import LoadOptions


def _singular(value: Any) -> Any:
    return {side.plural: side.value for side in Modality}.get(value, value)


Side = Annotated[Literal["image", "text"], BeforeValidator(_singular)]


class ItemOptions(LoadOptions):
    """Rows of a feature set that can be found, and the adapter that maps them."""

    panel: ClassVar[str] = "Items"

    adapter: RunSource | None = Field(
        None,
        description="Run that maps the features, or mean-shift, standardised or closed-form, "
        "fitted here; without it they are used as stored.",
    )
    side: Side = Field("image", description="Side to find.")
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
    query_side: Side | None = Field(
        None,
        description="Side of --embedding (default: the side that is not indexed, if there is one).",
    )
    encoder: str | None = Field(
        None, description="Query encoder, as for extract (default: the one that the set records)."
    )


_QUERIES = ("query", "text", "image", "embedding")


class SearchConfig(QueryOptions, ItemOptions):
    """``csalign search``: find the nearest items of an index or a feature set.

    >>> SearchConfig(index="index", query="a red flower").top
    10
    """

    panel: ClassVar[str] = "Results"
    positional: ClassVar[tuple[str, ...]] = ("index", "query")
    example: ClassVar[str] = 'csalign search index "a red bicycle" --top 5'
    common: ClassVar[tuple[str, ...]] = (
        *("text", "image", "embedding", "top", "adapter", "side", "report", "pictures", "device"),
        "jsonl",
    )

    top: Count = Field(10, description="Items per query.")
    jsonl: bool = Field(False, description="Print one JSON document per query, as it is answered.")
    report: Path | None = Field(
        None, description="Also write a page with thumbnails, as found.html."
    )
    pictures: Path | None = Field(
        None, description="Folder that image sources are relative to, for the page."
    )

    def check(self) -> None:
        """Raise ConfigError unless there is exactly one kind of query."""
        given = [name for name in _QUERIES if getattr(self, name) is not None]
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
