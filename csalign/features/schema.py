"""Every column and dtype of a feature set: the only place that spells them."""

from typing import Any

import numpy as np
import pyarrow as pa

from csalign.core.enums import Modality

ID = "id"
IMAGE_ID = "image_id"
CAPTION = "caption"
SOURCE = "source"
SPLIT = "split"
EMBEDDING = "embedding"
TOKENS = "tokens"

STRING_COLUMNS = {
    Modality.IMAGE: (ID, SOURCE, SPLIT),
    Modality.TEXT: (ID, IMAGE_ID, CAPTION, SPLIT),
}
DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}

# In float32 the square of what is outside of these is lost, and with it a row's direction.
LEAST_NORM, MOST_NORM = 1e-10, 1e18
MOST_VALUE = 1e15
RESCALE = "scale the embeddings to norms about 1, which changes no result"


def table_schema(
    modality: Modality, dtype: str, width: int, token_width: int | None = None
) -> pa.Schema:
    """Arrow schema of one side's Parquet files.

    Args:
        modality: whose columns.
        dtype: "float16" or "float32", of embeddings and tokens.
        width: of an embedding.
        token_width: of a token, or None where no tokens are stored.
    """
    number = pa.from_numpy_dtype(DTYPES[dtype])
    fields = [pa.field(ID, pa.string(), nullable=False)]
    fields += [pa.field(name, pa.string()) for name in STRING_COLUMNS[modality] if name != ID]
    fields.append(pa.field(EMBEDDING, _vector(number, width), nullable=False))
    if token_width is not None:
        fields.append(pa.field(TOKENS, pa.list_(_vector(number, token_width)), nullable=False))
    return pa.schema(fields)


def _vector(number: pa.DataType, width: int) -> pa.DataType:
    # Elements that cannot be null let a reader take the values as one plain array.
    return pa.list_(pa.field("element", number, nullable=False), width)
