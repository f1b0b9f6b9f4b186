"""``csalign train``: adapters on cached features, with the CS-Aligner objective."""

import logging
import os
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from csalign.adapters.checkpoint import AdapterInfo, load_adapter_with_info, save_adapter
from csalign.adapters.model import Adapter, SideShape
from csalign.adapters.side import mean_square
from csalign.core import atomic, distributed, signals
from csalign.core.devices import pick_device
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, SchemaError, Stopped, TrainingError
from csalign.core.memory import available_bytes
from csalign.core.paths import parse_location
from csalign.core.progress import Progress, silent
from csalign.core.results import TrainResult
from csalign.core.version import __version__
from csalign.evaluation.config import MeasureOptions
from csalign.evaluation.evaluate import describe, measure_rows
from csalign.evaluation.page import EvaluationReport, write_report
from csalign.evaluation.protocols import AlignedRows
from csalign.features.checks import warn_of_training_rows
from csalign.features.join import ALL, PairedRows, Pairs, join_pairs, split_names
from csalign.features.reader import FeatureSet
from csalign.features.streaming import MIB, MappedRows, MemoryBudget, load_training
from csalign.report.page import check_page
from csalign.runs.load import embed_rows
from csalign.runs.metadata import CONFIG, ENVIRONMENT, LINES, read_environment, write_environment
from csalign.training.checkpoints import State, Training, TrainingFolder, open_training
from csalign.training.checks import check_terms
from csalign.training.config import TrainConfig
from csalign.training.initialization import closed_form_start, kinds_of, random_start
from csalign.training.loggers import check_logs, open_logs
from csalign.training.loop import Trainer
from csalign.training.moment_matching import match_outputs
from csalign.training.sampler import PairSampler, order_of, uniform
from csalign.training.token_data import (
    StoredTokens,
    open_tokens,
    token_widths,
    warn_of_rows_without_tokens,
)
from csalign.training.unpaired import Unpaired, gather_unpaired
from csalign.training.validation import carve, thin

log = logging.getLogger(__name__)

SaveWeights = Callable[[Path], None]


def train(config: TrainConfig, progress: Progress = silent) -> TrainResult:
    """Train adapters on a feature set and write a run folder.

    A run that was stopped or killed leaves ``OUT.partial``, and the same call goes on from there.
    On the CPU the result has the bytes of a run in one go.

    Under torchrun all processes train together, each on its part of every step's rows, with the
    losses of one process up to rounding. The first leads: it alone writes, and where another fails
    it raises `ElsewhereError`, as the others do where it fails.

    Args:
        config: what to do.
        progress: told how far it is.

    Raises:
        ConfigError: options that do not go together, or a log's library is not installed.
        DataError: the features cannot be trained on: no pairs in the split, damaged files, rows
            without a direction, no tokens where they are asked for.
        OutputError: ``config.out`` exists and is not to be replaced, a run with other options was
            stopped there, or the page cannot be written where it is wanted.
        TrainingError: the loss stopped being finite; names the last good checkpoint.
    """
    with distributed.process_group():
        return _lead(config, progress) if distributed.is_main_process() else _follow(config)


@dataclass(frozen=True)
class _Material:
    """What is trained on.

    Attributes:
        features: the feature set.
        split: the split(s) of it that are trained on.
        rows: theirs.
        val: held-out rows; None for none, and in processes that follow.
        tokens: of the rows, None where no side trains with any.
        unpaired: what the distribution term sees besides.
    """

    features: FeatureSet
    split: str
    rows: Pairs
    val: PairedRows | None
    tokens: StoredTokens | None
    unpaired: Unpaired


def _lead(config: TrainConfig, progress: Progress) -> TrainResult:
    """Train, in the process that writes, prints and validates."""
    if config.report is not None:
        check_page(config.report)
    check_logs(config.log_to or ())
    atomic.check_output(config.out, overwrite=config.overwrite, inputs=(config.features,))
    device = pick_device(config.device)
    material = _load(config)
    features, rows, val = material.features, material.rows, material.val
    warn_of_training_rows(rows, rows.name)
    training = Training.of(config, features, further_sets(config))
    with open_training(
        config.out, training, restart=config.overwrite, every=config.save_every
    ) as run:
        folder = run.path
        if run.state is None:
            sampler, adapter, start = start_of(rows, val, config, material.tokens)
            log.info("start: %s", start)
        else:
            sampler = sampler_of(rows, config, material.tokens)
            adapter, start = _saved_adapter(run.state, config)
        warn_of_rows_without_tokens(adapter, material.unpaired)
        environment = _environment(device, config)
        log.info("training on %s, with products in %s", device, config.precision.value)
        trainer = _trainer(material, adapter, sampler, config, folder, device)
        if run.state is not None:
            _warn_of_changes(folder, environment)
            _go_on(trainer, run.state)
        _tell_start(adapter, None if run.state is None else run.state.trainer)
        atomic.write_text(folder / CONFIG, config.to_toml())
        atomic.write_json(folder / ENVIRONMENT, environment)
        (folder / LINES).touch()

        norm = mean_square(rows.images) ** 0.5
        info = partial(_info, trainer, features, material.split, start, norm)

        def save(where: Path) -> None:
            save_adapter(where, adapter, info())

        told = config.model_dump(mode="json", exclude_none=True)
        with open_logs(
            config.log_to or (), folder, config.out.name, told, trainer.step
        ) as trainer.logs:
            _run(trainer, run, save, progress)
        scores = {"start": trainer.start_score, "kept": trainer.best_score}
        if config.match_moments and val is not None and trainer.best_score is not None:
            scores["matched"] = match_outputs(
                adapter, rows, sampler, material.unpaired, val, trainer.best_score, config
            )
        save(folder)
        seconds = round(run.seconds, 3)
        write_environment(folder, {**environment, "seconds": seconds})
    if config.report is not None:
        shown = None if val is None else _evaluated(adapter, features, val, config)
        write_report(config.report, f"{config.out}, validation", shown, config.out, config.seed)
    result = TrainResult(
        run=config.out,
        steps=trainer.steps_made,
        best_step=trainer.step,
        start=start,
        pairs={"train": rows.pairs, "validation": val.pairs if val else 0},
        parameters=adapter.parameter_counts(),
        validation={name: score.to_json() for name, score in scores.items() if score},
        seconds=seconds,
        names=features.manifest.names,
    )
    distributed.broadcast(result.to_json)
    return result


def _follow(config: TrainConfig) -> TrainResult:
    """Take part in training that another process leads; writes nothing."""
    device = pick_device(config.device)
    material = _load(config)
    told: dict[str, Any] = distributed.broadcast(dict)
    shapes = {side: SideShape(**told["shapes"][side]) for side in Modality}
    adapter = Adapter(shapes, allow=set(kinds_of(config).values()))
    adapter.load_state_dict(told["weights"])
    sampler = sampler_of(material.rows, config, material.tokens)
    trainer = _trainer(material, adapter, sampler, config, config.out, device)
    if told["trainer"] is not None:
        trainer.go_to(told["trainer"])
    try:
        with signals.polling():
            for _ in trainer.fit(silent):
                pass
    except (Stopped, TrainingError):
        distributed.wait_for_failure()  # the first one saves, and has more to tell
        raise
    result: dict[str, Any] = distributed.broadcast(dict)
    return TrainResult(**{**result, "run": config.out})


def _load(config: TrainConfig) -> _Material:
    features = FeatureSet.open(config.features)
    widths = token_widths(features, config)
    if widths and distributed.world().size > 1:
        raise ConfigError(
            "tokens: are trained with in one process alone; start it without torchrun, or leave "
            "--tokens and --token-weight out"
        )
    split = split_to_train(features, config)
    room = room_for(config)
    rows, val = load_split_rows(features, split, config, room)
    tokens = open_tokens(features, widths, rows, config)
    unpaired = gather_unpaired(rows, further_sets(config), split, room)
    return _Material(features, split, rows, val, tokens, unpaired)


def _trainer(
    material: _Material,
    adapter: Adapter,
    sampler: PairSampler,
    config: TrainConfig,
    folder: Path,
    device: torch.device,
) -> Trainer:
    return Trainer(
        adapter,
        material.rows,
        sampler,
        material.unpaired,
        material.val,
        config,
        folder,
        device,
        material.tokens,
    )


def _tell_start(adapter: Adapter, state: Mapping[str, Any] | None) -> None:
    """Tell the processes that follow where training starts, or goes on from."""
    if distributed.world().size == 1:
        return
    shapes = {side.value: asdict(adapter.side(side).shape) for side in Modality}
    told = {"shapes": shapes, "weights": adapter.state_dict(), "trainer": state}
    distributed.broadcast(lambda: told)


def _evaluated(
    adapter: Adapter, features: FeatureSet, val: PairedRows, config: TrainConfig
) -> EvaluationReport:
    """What was kept, measured on the validation rows as ``csalign eval`` measures."""
    images, texts = (embed_rows(adapter, side, val, features) for side in Modality)
    aligned = AlignedRows(features, "validation", val, images, texts, config.out)
    return describe(measure_rows(aligned, MeasureOptions(seed=config.seed)))


def start_of(
    rows: Pairs,
    val: PairedRows | None,
    config: TrainConfig,
    tokens: StoredTokens | None = None,
) -> tuple[PairSampler, Adapter, str]:
    """What draws the pairs, the adapters at their start, and that start's name."""
    sampler = sampler_of(rows, config, tokens)
    widths = tokens.widths if tokens else {}
    check_terms(config, len(sampler))
    if config.init == "canonical":
        return sampler, *closed_form_start(rows, sampler, val, config, widths)
    return sampler, *random_start(rows, config, widths)


def sampler_of(rows: Pairs, config: TrainConfig, tokens: StoredTokens | None = None) -> PairSampler:
    """What draws the pairs."""
    order = tokens.order if tokens else uniform
    return PairSampler(
        rows,
        config.captions,
        other_weight=config.other_captions,
        once=config.caption_weights,
        order=order_of(rows) if order is uniform else order,
    )


def further_sets(config: TrainConfig) -> list[Path]:
    """The feature sets that `config.unpaired` names."""
    return [parse_location(name.strip()) for name in (config.unpaired or "").split(",") if name]


def split_to_train(features: FeatureSet, config: TrainConfig) -> str:
    """The split(s) to train on; all of a set that was never split."""
    never_split = set(features.splits()) == {None}
    return ALL if config.train_split == "train" and never_split else config.train_split


def room_for(config: TrainConfig) -> MemoryBudget:
    """The memory for embeddings, and where those go that do not fit."""
    memory = available_bytes() // 2 if config.memory is None else config.memory * MIB
    beside = next(folder for folder in config.out.resolve().parents if folder.is_dir())
    return MemoryBudget(memory, Path(os.environ.get("TMPDIR") or beside))


def load_split_rows(
    features: FeatureSet, train_split: str, config: TrainConfig, room: MemoryBudget
) -> tuple[Pairs, PairedRows | None]:
    """Training rows, and held-out rows: a split of the set, or carved out of the training rows.

    Of several processes the first alone gets held-out rows.
    """
    there = features.splits()
    trained = split_names(train_split, there)
    val_split = config.val_split
    if val_split is None and "val" in there and "val" not in trained:
        val_split = "val"
    joined = join_pairs(features, train_split)
    if val_split is None:
        joined, held_out = carve(joined, config.seed)
        if held_out is None and distributed.is_main_process():
            log.warning(
                "%s: too few pairs to hold some out, so nothing is chosen by validation",
                joined.name,
            )
    else:
        both = trained & split_names(val_split, there)
        if both:
            raise DataError(
                f"{', '.join(sorted(name or '(rows without a split)' for name in both))}: would be "
                "both trained and validated on; name other splits with --train-split and "
                "--val-split"
            )
        held_out = thin(join_pairs(features, val_split), config.seed)
    if not distributed.is_main_process():
        held_out = None
    rows, val = load_training(features, joined, held_out, room, with_keys=config.caption_weights)
    if any(isinstance(side, MappedRows) for side in (rows.images, rows.texts)):
        log.info("%s: more than fits into memory, and read from %s", rows.name, room.folder)
    return rows, val


def _saved_adapter(state: State, config: TrainConfig) -> tuple[Adapter, str]:
    """The adapters with the weights of a state, and the name of the start that they had."""
    with torch.random.fork_rng(devices=[]):
        kinds = set(kinds_of(config).values())
        adapter, info = load_adapter_with_info(state.folder, allow=kinds)
    return adapter, info.start


def _go_on(trainer: Trainer, state: State) -> None:
    try:
        trainer.go_to(state.trainer)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SchemaError(
            f"{state.folder}: is no state of this run ({error!r}); start anew with --overwrite"
        ) from error
    log.info("going on after step %d, from %s", state.step, state.folder)


def _run(trainer: Trainer, run: TrainingFolder, save: SaveWeights, progress: Progress) -> None:
    """Train to the end, saving a checkpoint after each validation, and what a rerun goes on from.

    That is saved now and then, and when stopped.
    """

    def save_state() -> Path:
        return run.save(trainer.step, save, trainer.state())

    def save_if_due() -> None:
        if run.is_due(trainer.step):
            save_state()

    trainer.between_steps = save_if_due
    with signals.polling() if distributed.world().size > 1 else nullcontext():
        try:
            for step in trainer.fit(progress):
                run.checkpoint(step, save)
        except TrainingError as error:
            last = "there is no checkpoint yet"
            if run.checkpoints:
                last = f"the last good checkpoint is {run.checkpoints[-1]}"
            raise TrainingError(f"{error}; {last}") from None
        except (Stopped, KeyboardInterrupt):
            if trainer.can_be_saved:
                with signals.delayed():
                    where = save_state()
                log.warning(
                    "the weights of step %d are in %s; the same command goes on from there",
                    *(trainer.step, where),
                )
            raise


def _warn_of_changes(folder: Path, environment: dict[str, Any]) -> None:
    """Tell where a run goes on under other conditions than it was begun under."""
    try:
        before = _flat(read_environment(folder))
    except (SchemaError, TypeError):
        return  # it is only told
    now = _flat(environment)
    changes = [
        f"{name} {before.get(name)}, not {now.get(name)}"
        for name in ("csalign", "device", "processes", "threads", *environment["packages"])
        if before.get(name) != now.get(name)
    ]
    if changes:
        log.warning(
            "the run was begun with %s: the result may not be that of a run in one go, to the bit",
            ", ".join(changes),
        )


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    return {**environment, **environment.get("packages", {})}


def _info(
    trainer: Trainer, features: FeatureSet, train_split: str, start: str, image_norm: float
) -> AdapterInfo:
    return AdapterInfo(
        adapters={side: trainer.adapter.side(side).shape for side in Modality},
        encoders={side: features.table(side).encoder.spec for side in Modality},
        start=start,
        step=trainer.step,
        logit_scale=trainer.loss.logit_scale,
        bandwidth=trainer.loss.sigma,
        data_fingerprint=features.manifest.fingerprint(),
        train_split=train_split,
        image_norm=image_norm,
    )


def _environment(device: torch.device, config: TrainConfig) -> dict[str, Any]:
    return {
        "csalign": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {
            name: version(name)
            for name in ("torch", "numpy", "pyarrow", "faiss-cpu", "safetensors")
        },
        "device": str(device),
        "processes": distributed.world().size,
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "command_line": sys.argv,
    }
