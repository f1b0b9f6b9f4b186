"""Options of ``csalign index`` and ``csalign search``."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from csalign.core.config import Config, Count, Location, RunFolder, Share


class IndexConfig(Config):
    """``csalign index``: an index on disk that ``csalign search`` asks."""

    features: Location = Field(description="Feature set whose rows are to be found.")
    out: RunFolder | None = Field(None, description="Folder to make.")
    overwrite: bool = Field(
        False, description="Replace the folder if it exists, only after success."
    )
    add_to: RunFolder | None = Field(
        None,
        description="Index that the rows are added to, in place of --out; its adapter is used.",
    )
    adapter: RunFolder | None = Field(
        None, description="Run folder; without it the features are taken as they are."
    )
    allow_adapter: str | None = Field(
        None, description="A kind PACKAGE.MODULE:CLASS that the run may import."
    )
    side: Literal["image", "text"] = Field("image", description="Which side is to be found.")
    split: str = Field("all", description="Split(s), comma-separated; 'all' takes every row.")
    kind: Literal["auto", "exact", "ivf", "hnsw", "pq"] = Field(
        "auto",
        description="exact; ivf, cells; hnsw, a graph, quick to ask and slow to build; pq, small "
        "codes, scored again from disk; auto is exact up to 50,000 rows, then ivf, or pq where "
        "memory asks for it.",
    )
    recall: Share = Field(
        0.95, description="Recall@10 against an exact search that searching is set for."
    )
    correct: Literal["csls", "inverted-softmax", "centre"] | None = Field(
        None, description="Correct for hubs, as known from the rows of the other side."
    )
    memory: int | None = Field(
        None, ge=0, description="MiB that building may take (default: half of what is free)."
    )
    threads: Count | None = Field(None, description="Threads of the index (default: the cores).")
    batch_size: Count = Field(8192, description="Rows at a time.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps; of the adapter.")


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
