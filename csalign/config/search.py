"""What ``csalign search`` can be told."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from csalign.config.base import Config, Count, Location, RunFolder


class SearchConfig(Config):
    """``csalign search``: the nearest items of an index."""

    positional: ClassVar[tuple[str, ...]] = ("index",)

    index: RunFolder = Field(description="Folder that csalign index made.")
    text: str | None = Field(
        None, description="What to look for, in words; - reads one text a line from stdin."
    )
    image: str | None = Field(
        None, description="What to look for, as a picture; - reads one path a line from stdin."
    )
    embedding: Location | None = Field(
        None,
        description="What to look for, as the encoder gives it: .npy of (d,) or (n, d).",
    )
    query_side: Literal["image", "text"] | None = Field(
        None, description="Side of --embedding (default: that which is not indexed)."
    )
    encoder: str | None = Field(
        None,
        description="Encoder of the query (default: the one that the features record), as for "
        "extract.",
    )
    top: Count = Field(10, description="Items a query.")
    html: Path | None = Field(None, description="Also write a page of pictures, as found.html.")
    pictures: Path | None = Field(
        None, description="Folder that the sources of images start from, for the page."
    )
    jsonl: bool = Field(False, description="Print a JSON document a query, as soon as it is found.")
    allow_adapter: str | None = Field(
        None, description="A kind PACKAGE.MODULE:CLASS that the index may import."
    )
    threads: Count | None = Field(None, description="Threads of the index (default: the cores).")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps; of encoder and adapter.")
