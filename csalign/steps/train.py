"""``csalign train``: adapters on cached features, with the CS-Aligner objective."""

import logging
import platform
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from csalign import __version__, files
from csalign.adapters.checkpoint import AdapterInfo, save_adapter
from csalign.config import TrainConfig
from csalign.devices import pick_device
from csalign.enums import Modality
from csalign.errors import DataError, TrainingError
from csalign.progress import Progress, silent
from csalign.results import TrainResult
from csalign.steps.batches import PairSampler
from csalign.steps.start import closed_form_start, random_start
from csalign.steps.trainer import Trainer
from csalign.steps.validation import carve
from csalign.store.join import ALL, PairedRows, check_directions, load_rows
from csalign.store.reader import FeatureSet

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
CHECKPOINTS_KEPT = 3


def train(config: TrainConfig, progress: Progress = silent) -> TrainResult:
    """Train adapters on a feature set and write a run folder.

    Args:
        config: what to do.
        progress: told how far it is.

    Raises:
        DataError: the features cannot be trained on: no pairs in the split, damaged files, rows
            without a direction.
        OutputError: ``config.out`` exists and is not to be replaced.
        TrainingError: the loss stopped being finite; names the last good checkpoint.
    """
    began = time.monotonic()
    files.check_output(config.out, overwrite=config.overwrite, inputs=(config.features,))
    device = pick_device(config.device)
    features = FeatureSet.open(config.features)
    rows, val = _load(features, config)
    sampler = PairSampler(rows, other_weight=config.other_captions, once=config.caption_weights)
    if config.init == "canonical":
        adapter, start = closed_form_start(rows, sampler, val, config)
    else:
        adapter, start = random_start(rows, config)
    log.info("start: %s", start)
    with files.staged_folder(config.out, keep_on_failure=True) as folder:
        files.write_text(folder / "config.toml", config.to_toml())
        files.write_json(folder / "environment.json", _environment(device, config))
        trainer = Trainer(adapter, rows, sampler, val, config, folder, device)
        _run(trainer, folder, features, start, progress)
        save_adapter(folder, adapter, _info(trainer, features, start))
    scores = {"start": trainer.start_score, "kept": trainer.best_score}
    return TrainResult(
        run=config.out,
        steps=trainer.step,
        best_step=trainer.best_step,
        start=start,
        parameters=adapter.parameter_counts(),
        validation={name: score.to_json() for name, score in scores.items() if score},
        seconds=round(time.monotonic() - began, 3),
    )


def _load(features: FeatureSet, config: TrainConfig) -> tuple[PairedRows, PairedRows | None]:
    """Training rows, and held-out rows: a split of the set, or carved out of the training rows."""
    val_split = config.val_split
    if val_split is None and config.train_split != ALL and "val" in features.splits():
        val_split = "val"
    train_split = config.train_split
    if train_split == "train" and "train" not in features.splits():
        if set(features.splits()) != {None}:
            raise DataError(
                f"{config.features}: has no split 'train'; name the split(s) to train on with "
                "--train-split, or 'all'"
            )
        train_split = ALL  # a set that was never split: all of it is there to learn from
    rows = load_rows(features, train_split)
    if val_split is not None:
        if val_split in train_split.split(","):
            raise DataError(f"split {val_split!r} is both trained and validated on; choose another")
        val: PairedRows | None = load_rows(features, val_split)
    else:
        rows, val = carve(rows, config.seed)
        if val is None:
            log.warning(
                "%s: too few pairs to hold some out, so nothing is chosen by validation",
                config.features,
            )
    for part in (rows, val):
        if part is not None:
            check_directions(part.images, part.image_ids, f"{part.name}: images")
            check_directions(part.texts, part.text_ids, f"{part.name}: texts")
    return rows, val


def _run(
    trainer: Trainer, folder: Path, features: FeatureSet, start: str, progress: Progress
) -> None:
    """Train to the end, saving a checkpoint after each validation."""
    saved: list[Path] = []
    try:
        for step in trainer.fit(progress):
            path = folder / CHECKPOINTS / f"step-{step:06d}"
            path.mkdir(parents=True)
            save_adapter(path, trainer.adapter, _info(trainer, features, start))
            saved.append(path)
            if len(saved) > CHECKPOINTS_KEPT:
                shutil.rmtree(saved.pop(0))
    except TrainingError as error:
        last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        raise TrainingError(f"{error}; {last}") from None


def _info(trainer: Trainer, features: FeatureSet, start: str) -> AdapterInfo:
    return AdapterInfo(
        adapters={side: trainer.adapter.side(side).shape for side in Modality},
        encoders={side: features.table(side).encoder.spec for side in Modality},
        start=start,
        step=trainer.step,
        logit_scale=trainer.logit_scale,
        bandwidth=trainer.sigma,
        data_fingerprint=features.manifest.fingerprint(),
    )


def _environment(device: torch.device, config: TrainConfig) -> dict[str, object]:
    return {
        "csalign": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {
            name: version(name)
            for name in ("torch", "numpy", "pyarrow", "faiss-cpu", "safetensors")
        },
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "command_line": sys.argv,
    }
