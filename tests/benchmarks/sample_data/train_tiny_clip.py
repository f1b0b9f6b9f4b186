"""Train the tiny CLIP model of ``sample_data/tiny-clip`` on the Open Clip Art corpus.

Usage::

    python tests/benchmarks/sample_data/train_tiny_clip.py --work DIR
    python tests/benchmarks/sample_data/train_tiny_clip.py --work DIR --evaluate-only

DIR is the folder of ``tests/benchmarks/openclipart/prepare.py``. Training sees the drawings of the
split "train" only; the drawings shipped as samples are held out with the other splits. The
evaluation goes through open_clip's own loading and preprocessing, as a user's would.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[3]
MODEL_NAME = "tiny-clip"
MODEL_FOLDER = ROOT / "sample_data" / MODEL_NAME
DRAWINGS_FOLDER = ROOT / "sample_data" / "drawings"
RECALLS = (1, 5, 10)

# Augmentation: side of the crop and how far its centre may lie off, in units of half a picture.
ZOOM = (0.7, 1.05)
MAX_SHIFT = 0.15

# Dropping half of the patches halves the time and keeps the small corpus from being memorised.
PATCH_DROPOUT = 0.5


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: Number of updates.
        batch_size: Pairs per update.
        learning_rate: Peak of the cosine schedule.
        weight_decay: For weight matrices and embeddings.
        warmup: Number of updates of linear warm-up.
        seed: Of all random draws.
    """

    steps: int = 1200
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.2
    warmup: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Pairs:
    """Training pairs.

    Attributes:
        images: Pictures, uint8, (n, 3, size, size).
        tokens: Tokenised captions, one row per pair.
        owners: The picture of each pair.
        weights: How often to draw each pair, relative to the others.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    owners: torch.Tensor
    weights: torch.Tensor


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a CSV file with a header."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def load_image(path: Path, size: int) -> NDArray[np.uint8]:
    """Load a square picture as channels x height x width."""
    image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def load_pairs(work: Path, tokenizer: Any, size: int) -> Pairs:
    """Load the training split of the corpus.

    Args:
        work: Folder of the corpus.
        tokenizer: Turns captions into tokens.
        size: The model's image size.

    Returns:
        The pairs. Collections put the same caption on up to 1,375 drawings, hence each pair has
        the weight 1 / (number of pairs with its caption).
    """
    names = [row["id"] for row in read_table(work / "images.csv") if row["split"] == "train"]
    position = {name: index for index, name in enumerate(names)}
    rows = [row for row in read_table(work / "texts.csv") if row["split"] == "train"]
    captions = [row["caption"] for row in rows]
    counts = Counter(caption.casefold() for caption in captions)
    pictures = [load_image(work / "pictures" / f"{name}.png", size) for name in names]
    return Pairs(
        images=torch.from_numpy(np.stack(pictures)),
        tokens=tokenizer(captions),
        owners=torch.tensor([position[row["image_id"]] for row in rows]),
        weights=torch.tensor([1.0 / counts[caption.casefold()] for caption in captions]),
    )


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Zoom, shift and flip at random, then normalise as open_clip does by default.

    Args:
        images: uint8 pictures, (n, 3, size, size).
        generator: Source of randomness.

    Returns:
        Float pictures of the same size.
    """
    n = len(images)
    zoom = torch.empty(n).uniform_(*ZOOM, generator=generator)
    shift = torch.empty(n, 2).uniform_(-MAX_SHIFT, MAX_SHIFT, generator=generator)
    flip = torch.randint(2, (n,), generator=generator) * 2.0 - 1.0
    transform = torch.zeros(n, 2, 3)
    transform[:, 0, 0] = zoom * flip
    transform[:, 1, 1] = zoom
    transform[:, :, 2] = shift
    grid = functional.affine_grid(transform, list(images.shape), align_corners=False)
    # The border is white nearly everywhere, hence a good guess for what lies beyond it.
    pixels = functional.grid_sample(
        images.float() / 255.0, grid, padding_mode="border", align_corners=False
    )
    mean = torch.tensor(OPENAI_DATASET_MEAN).view(3, 1, 1)
    deviation = torch.tensor(OPENAI_DATASET_STD).view(3, 1, 1)
    return (pixels - mean) / deviation


def make_optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Create AdamW that decays matrices but neither gains nor biases."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def schedule(step: int, settings: Settings) -> float:
    """Return the learning rate's factor: linear warm-up, then half a cosine."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def train(model: torch.nn.Module, pairs: Pairs, settings: Settings) -> None:
    """Train a model in place.

    Args:
        model: An open_clip model.
        pairs: What to train on.
        settings: How to train.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = make_optimizer(model, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, settings))
    loss_function = open_clip.ClipLoss()
    model.train()
    started = time.monotonic()
    total = 0.0
    for step in range(1, settings.steps + 1):
        picked = torch.multinomial(
            pairs.weights, settings.batch_size, replacement=False, generator=generator
        )
        images = augment(pairs.images[pairs.owners[picked]], generator)
        image_features, text_features, scale = model(images, pairs.tokens[picked])
        loss = loss_function(image_features, text_features, scale)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            model.get_parameter("logit_scale").clamp_(0.0, math.log(100.0))
        total += loss.item()
        if step % 50 == 0:
            seconds = time.monotonic() - started
            print(f"step {step}: loss {total / 50:.3f}, {seconds:.0f} s", flush=True)
            total = 0.0


def load_model() -> tuple[Any, Any, Any]:
    """Load the stored model the way a user does.

    Returns:
        The model, its inference preprocessing and its tokenizer.
    """
    open_clip.add_model_config(MODEL_FOLDER)
    model, _, preprocess = open_clip.create_model_and_transforms(
        MODEL_NAME, pretrained=str(MODEL_FOLDER / f"{MODEL_NAME}.safetensors")
    )
    model.eval()
    return model, preprocess, open_clip.get_tokenizer(MODEL_NAME)


@torch.inference_mode()
def retrieval(
    model: Any, preprocess: Any, tokenizer: Any, paths: Sequence[Path], titles: Sequence[str]
) -> dict[str, float]:
    """Measure retrieval among pictures and their titles.

    Args:
        model: The model.
        preprocess: Turns a PIL image into the model's input.
        tokenizer: Turns captions into tokens.
        paths: Pictures.
        titles: Their titles, in the same order.

    Returns:
        Recall in percent at several cut-offs, for image to text and text to image.
    """
    pixels = torch.stack([preprocess(Image.open(path)) for path in paths])
    images = functional.normalize(model.encode_image(pixels), dim=-1)
    texts = functional.normalize(model.encode_text(tokenizer(list(titles))), dim=-1)
    scores = images @ texts.T
    result: dict[str, float] = {}
    for name, matrix in (("i2t", scores), ("t2i", scores.T)):
        # Ties count as failures: a collapsed model must not look perfect.
        ranks = (matrix >= matrix.diagonal()[:, None]).sum(1)
        for k in RECALLS:
            result[f"{name} R@{k}"] = 100.0 * (ranks <= k).float().mean().item()
    return result


def evaluate(work: Path) -> dict[str, dict[str, float]]:
    """Evaluate the stored model on held-out drawings.

    Args:
        work: Folder of the corpus.

    Returns:
        Recalls on the split "val" and, if they are there, on the split "test" of the drawings
        shipped as samples.
    """
    parts = load_model()
    rows = [row for row in read_table(work / "texts.csv") if row["split"] == "val"]
    paths = [work / "pictures" / f"{row['image_id']}.png" for row in rows]
    result = {"val": retrieval(*parts, paths, [row["caption"] for row in rows])}
    table = DRAWINGS_FOLDER / "captions.csv"
    if table.exists():
        rows = [row for row in read_table(table) if row["split"] == "test"]
        paths = [DRAWINGS_FOLDER / row["image"] for row in rows]
        result["sample drawings"] = retrieval(*parts, paths, [row["caption"] for row in rows])
    return result


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--evaluate-only", action="store_true", help="use the stored weights")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--threads", type=int, default=1, help="processor threads to use")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.evaluate_only:
        settings = Settings(steps=arguments.steps)
        torch.manual_seed(settings.seed)
        open_clip.add_model_config(MODEL_FOLDER)
        model = open_clip.create_model(MODEL_NAME, force_patch_dropout=PATCH_DROPOUT)
        tokenizer = open_clip.get_tokenizer(MODEL_NAME)
        pairs = load_pairs(arguments.work, tokenizer, model.visual.image_size[0])
        print(f"{len(pairs.images)} drawings, {len(pairs.tokens)} pairs", flush=True)
        train(model, pairs, settings)
        weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
        weights_file = MODEL_FOLDER / f"{MODEL_NAME}.safetensors"
        save_file(weights, weights_file)
        weights_file.chmod(0o644)
    for name, recalls in evaluate(arguments.work).items():
        print(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in recalls.items()))


if __name__ == "__main__":
    main()
