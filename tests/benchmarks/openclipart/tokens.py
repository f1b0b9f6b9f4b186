"""Build the Open Clip Art feature set again, with tokens beside the embeddings.

Usage::

    python tests/benchmarks/openclipart/tokens.py --work DIR

DIR is the folder of ``prepare.py``, whose rows, ids and splits stay what they are. An image's
tokens are the cells of EfficientNet's last feature map, averaged from 7 x 7 to 4 x 4; a caption's
are MiniLM's last layer, the first 16 without [CLS] and [SEP]. About 370 MB, some 10 minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import picture_path
from features import MAX_TOKENS, image_batch, image_model, text_model
from numpy.typing import NDArray
from torch.nn.functional import adaptive_avg_pool2d

from csalign.core import outputs
from csalign.core.enums import Modality
from csalign.features.reader import FeatureSet
from csalign.features.schema import EncoderInfo
from csalign.features.writer import FeatureWriter, Rows

GRID, WORDS, BATCH = 4, 16, 32
Tokens = list[NDArray[np.float16]]
Columns = dict[str, list[Any]]


def main() -> None:
    """Read the feature set, compute the tokens of its rows, write both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    work: Path = parser.parse_args().work
    features = FeatureSet.open(work / "features")
    with outputs.atomic_folder(work / "features-tokens") as folder:
        infos = {side: with_tokens(features, side) for side in Modality}
        with FeatureWriter(folder, infos, "float16") as writer:
            pictures = work / "pictures"
            write(features, Modality.IMAGE, image_tokens(pictures), writer)
            write(features, Modality.TEXT, text_tokens(), writer)


def with_tokens(features: FeatureSet, side: Modality) -> EncoderInfo:
    """What made a side; both encoders' tokens are as wide as their embeddings."""
    info = features.table(side).encoder
    return info.model_copy(update={"token_width": info.width, "token_space": "hidden"})


def write(
    features: FeatureSet, side: Modality, tokens_of: Callable[[Columns], Tokens], writer: Any
) -> None:
    """Write one side, batch by batch."""
    names = ("id", "split", "source") if side is Modality.IMAGE else TEXT_COLUMNS
    table = features.table(side)
    columns = {name: table.column(name).to_pylist() for name in names}
    embeddings = table.embeddings()
    for part in batches(len(embeddings)):
        rows = {name: values[part] for name, values in columns.items()}
        writer.write(side, Rows(rows, embeddings[part], tokens_of(rows)))
        print(f"{side} tokens: {part.stop} of {len(embeddings)}", flush=True)


TEXT_COLUMNS = ("id", "split", "image_id", "caption")


def batches(rows: int) -> Iterator[slice]:
    """Consecutive slices of `BATCH` rows."""
    for start in range(0, rows, BATCH):
        yield slice(start, min(start + BATCH, rows))


def image_tokens(pictures: Path) -> Callable[[Columns], Tokens]:
    """Gives the feature maps of images by id, each (16, 1280)."""
    model = image_model()

    @torch.inference_mode()
    def tokens(rows: Columns) -> Tokens:
        maps = model.extract_features(image_batch([picture_path(pictures, i) for i in rows["id"]]))
        cells = adaptive_avg_pool2d(maps, GRID).flatten(2).mT
        return list(cells.half().numpy())

    return tokens


def text_tokens() -> Callable[[Columns], Tokens]:
    """Gives the last layer of captions, each (at most 16, 384)."""
    tokenizer, model = text_model()

    @torch.inference_mode()
    def tokens(rows: Columns) -> Tokens:
        captions: Sequence[str] = rows["caption"]
        inputs = tokenizer(
            captions,
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
            return_special_tokens_mask=True,
        )
        special = inputs.pop("special_tokens_mask").bool()
        hidden = model(**inputs).last_hidden_state.half().numpy()
        words = inputs["attention_mask"].bool() & ~special
        return [own[there][:WORDS] for own, there in zip(hidden, words.numpy(), strict=True)]

    return tokens


if __name__ == "__main__":
    main()
