import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csalign.adapters.checkpoint import load_adapter, read_info
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, CsalignError, DataError, ShapeError
from csalign.core.results import TrainResult
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.evaluate import evaluate
from csalign.evaluation.measure import measure
from csalign.features import writer
from csalign.features.join import PairedRows, load_rows
from csalign.features.reader import FeatureSet, batch_tokens
from csalign.features.tokens import PaddedTokens, TokenCache, TokenRows, Wanted, take_together
from csalign.objective.divergences import token_divergence, unit_tokens
from csalign.runs.apply import apply
from csalign.runs.config import ApplyConfig
from csalign.training.config import TrainConfig
from csalign.training.data import StoredTokens
from csalign.training.network import sampler
from csalign.training.network.sampler import Order, PairSampler, order_for, uniform
from csalign.training.train import train
from csalign.training.work import find_tokens

Write = Callable[..., Path]
QUICK = {"steps": 12, "batch_size": 24, "hidden": 16, "layers": 1, "validations": 4, "patience": 99}


def run(features: Path, out: Path, **values: Any) -> TrainResult:
    return train(TrainConfig(features=features, out=out, **{**QUICK, **values}))


def weights(folder: Path) -> bytes:
    return (folder / "adapter.safetensors").read_bytes()


def lines(folder: Path, key: str) -> list[dict[str, Any]]:
    logged = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in logged if key in line]


def divergence_of_tokens(features: Path, run_folder: Path) -> float:
    """Of the test rows, at bandwidth 0.5."""
    adapter, rows = load_adapter(run_folder), load_rows(FeatureSet.open(features), "test")
    parts = []
    for side in Modality:
        source = TokenRows(FeatureSet.open(features).table(side), TokenCache(1 << 20))
        tokens, mask = source.take(rows.table_rows(side))
        own = adapter.embed_tokens(side, rows.embeddings(side), tokens, mask)[1]
        there = torch.from_numpy(mask)
        parts.append((unit_tokens(torch.from_numpy(own), there), there))
    (x, x_mask), (y, y_mask) = parts
    return float(token_divergence(x, y, x_mask, y_mask, sigma=0.5))


def test_the_token_term_brings_the_tokens_of_a_pair_together(
    write_tokens: Write, tmp_path: Path
) -> None:
    features = write_tokens()
    learning = {"steps": 80, "learning_rate": 0.01, "init": "random", "adapter": "linear"}
    found = {}
    for weight in (1e-9, 3.0):
        out = tmp_path / str(weight)
        run(features, out, token_weight=weight, cs_weight=0, bandwidth=0.5, **learning)
        found[weight] = divergence_of_tokens(features, out / "checkpoints" / "step-000080")

    assert found[3.0] < 0.7 * found[1e-9]


def test_weight_zero_gives_the_bytes_that_no_tokens_give(
    write_tokens: Write, tmp_path: Path
) -> None:
    for adapter in ("mlp", "transformer"):
        for name, sides in (("with", tuple(Modality)), ("without", ())):
            features = write_tokens(f"{adapter}-{name}", sides=sides)
            run(features, tmp_path / f"{adapter}-{name}-run", adapter=adapter, token_weight=0)
        one, two = (tmp_path / f"{adapter}-{name}-run" for name in ("with", "without"))
        assert weights(one) == weights(two)
        assert lines(one, "loss") == lines(two, "loss")
        assert all(line["token"] is None for line in lines(one, "loss"))


@pytest.mark.parametrize("adapter", ["mlp", "transformer"])
def test_the_token_term_is_recorded_and_part_of_the_loss(
    write_tokens: Write, tmp_path: Path, adapter: str
) -> None:
    run(write_tokens(), tmp_path / "run", adapter=adapter, token_weight=2.0, cs_weight=0.5)

    for line in lines(tmp_path / "run", "loss"):
        expected = line["pairwise"] + 0.5 * line["divergence"] + 2 * line["token"]
        assert line["loss"] == pytest.approx(expected, rel=1e-4)
        assert line["token"] > 0


def test_pairs_are_drawn_alike_with_and_without_a_token_term(
    write_tokens: Write, tmp_path: Path
) -> None:
    features = write_tokens()
    plain = {"noise": 0.0, "dropout": 0.0}
    run(features, tmp_path / "with", token_weight=1.0, **plain)
    run(features, tmp_path / "without", **plain)

    first = [lines(tmp_path / name, "loss")[0]["pairwise"] for name in ("with", "without")]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"token_pairs": 5, "token_samples": 2}])
@pytest.mark.parametrize("adapter", ["linear", "glu", "transformer"])
def test_what_padding_holds_never_matters(
    write_tokens: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapter: str,
    options: dict[str, int],
) -> None:
    features = write_tokens(dtype="float16")
    run(features, tmp_path / "plain", adapter=adapter, token_weight=1.0, **options)

    def poisoned(wanted: list[Wanted]) -> list[PaddedTokens]:
        found = take_together(wanted)
        for values, mask in found:
            values[~mask] = np.nan
        return found

    monkeypatch.setattr(sampler, "take_together", poisoned)
    run(features, tmp_path / "poisoned", adapter=adapter, token_weight=1.0, **options)

    assert weights(tmp_path / "plain") == weights(tmp_path / "poisoned")


# Sets that need more memory than there is


class _Watched(TokenCache):
    most = 0

    def block(self, source: TokenRows, group: int) -> Any:
        found = super().block(source, group)
        assert self.bytes <= self.budget
        self.most = max(self.most, self.bytes)
        return found


@pytest.fixture
def large(write_tokens: Write, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, TrainConfig]:
    """Some 3.5 MB of tokens in small row groups, and a configuration with 1 MiB for them."""
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", 64 << 10)
    monkeypatch.setattr("csalign.training.data.TokenCache", _Watched)
    features = write_tokens(rows=800, widths=(64, 48), most=30)
    return features, TrainConfig(features=features, out="x", token_weight=1.0, token_memory=1)


def opened(config: TrainConfig) -> tuple[StoredTokens, PairedRows]:
    tokens = find_tokens(config)
    assert tokens is not None
    return tokens, load_rows(tokens.features, "train")


def epoch(tokens: StoredTokens, rows: PairedRows, order: Order, seed: int = 0) -> list[int]:
    """The images of an epoch, whose tokens are taken batch by batch, as training does."""
    pairs = PairSampler(rows, "first", other_weight=0, once=False, order=order)
    shown = []
    for batch in pairs.epoch(32, np.random.default_rng(seed)):
        shown += batch.images.tolist()
        wanted = {Modality.IMAGE: batch.images, Modality.TEXT: batch.texts}
        take_together(
            [
                Wanted(tokens.sources[side], rows.table_rows(side)[own])
                for side, own in wanted.items()
            ]
        )
    return shown


def test_tokens_beyond_the_memory_are_shown_in_windows_that_rarely_decode_twice(
    large: tuple[Path, TrainConfig],
) -> None:
    tokens, rows = opened(large[1])
    cache: Any = tokens.cache
    order = order_for(rows, tokens)
    shown = [epoch(tokens, rows, order, seed) for seed in range(4)]
    reads, groups = cache.reads / 4, sum(len(own.groups) for own in tokens.sources.values())

    assert all(sorted(images) == list(range(480)) for images in shown)
    assert len({tuple(images) for images in shown}) == 4
    assert groups > 30
    assert reads < 1.7 * groups
    assert cache.most <= cache.budget
    spread = [np.ptp(shown[0][start : start + 32]) for start in range(0, 448, 32)]
    assert np.mean(spread) > 100
    before = cache.reads
    epoch(tokens, rows, uniform)
    assert cache.reads - before > 2 * reads


def test_tokens_that_fit_are_shown_in_any_order(large: tuple[Path, TrainConfig]) -> None:
    tokens, rows = opened(large[1].model_copy(update={"token_memory": 64}))

    assert order_for(rows, tokens) is uniform


def test_a_set_larger_than_the_memory_trains(
    large: tuple[Path, TrainConfig], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        run(large[0], tmp_path / name, token_weight=1.0, token_memory=1)

    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_memory_that_holds_no_row_group_is_refused(write_tokens: Write, tmp_path: Path) -> None:
    features = write_tokens(rows=800, widths=(64, 48), most=30)

    with pytest.raises(ConfigError, match=r"takes 6 MiB, more than 1; raise --token-memory"):
        run(features, tmp_path / "run", token_weight=1.0, token_memory=1)


# Kinds that embed with tokens


def test_a_kind_that_mixes_tokens_in_is_measured_with_them(
    write_tokens: Write, tmp_path: Path
) -> None:
    features = write_tokens()
    out = tmp_path / "run"
    values = {"adapter": "transformer", "tokens": True, "init": "random", "refit": False}
    result = run(features, out, **values)
    assert result.best_step > 0
    adapter, rows = load_adapter(out), load_rows(FeatureSet.open(features), "val")
    measured = measure(EvalConfig(features=features, adapter=out, split="val")).aligned
    aligned = apply(ApplyConfig(features=features, adapter=out, out=tmp_path / "aligned"))
    stored = load_rows(FeatureSet.open(aligned.features), "val")

    for side, found in ((Modality.IMAGE, measured.images), (Modality.TEXT, measured.texts)):
        source = TokenRows(FeatureSet.open(features).table(side), TokenCache(1 << 20))
        padded = source.take(rows.table_rows(side))
        expected = adapter.embed_tokens(side, rows.embeddings(side), *padded)[0]
        without = adapter.embed(side, rows.embeddings(side))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_allclose(stored.embeddings(side), expected, atol=1e-3)
        assert np.abs(expected - without).max() > 0.01
    document = evaluate(EvalConfig(features=features, adapter=out, split="val"))
    kept = next(
        line["validation"] for line in lines(out, "validation") if line["step"] == result.best_step
    )
    assert document["retrieval"]["mean_recall"] == pytest.approx(kept["mean_recall"], abs=1e-6)


def test_one_side_alone_may_embed_with_tokens(write_tokens: Write, tmp_path: Path) -> None:
    features = write_tokens(sides=[Modality.IMAGE], token_widths=(7, 1))
    run(features, tmp_path / "run", image_adapter="transformer", tokens=True)
    shapes = read_info(tmp_path / "run").adapters

    assert (shapes[Modality.IMAGE].token_width, shapes[Modality.TEXT].token_width) == (7, None)
    assert (
        evaluate(EvalConfig(features=features, adapter=tmp_path / "run"))["counts"]["texts"] == 24
    )


def test_a_run_that_embeds_with_tokens_refuses_features_without(
    write_tokens: Write, tmp_path: Path
) -> None:
    run(write_tokens(), tmp_path / "run", adapter="transformer", tokens=True)
    without = write_tokens("without", sides=[Modality.IMAGE])
    other = write_tokens("other", token_widths=(12, 5))

    with pytest.raises(DataError, match=r"stores no text tokens, but .* extract --tokens both"):
        evaluate(EvalConfig(features=without, adapter=tmp_path / "run"))
    with pytest.raises(DataError, match="stores no text tokens"):
        apply(ApplyConfig(features=without, adapter=tmp_path / "run", out=tmp_path / "out"))
    with pytest.raises(ShapeError, match=r"text tokens are 5 wide, the adapter .* takes 10"):
        evaluate(EvalConfig(features=other, adapter=tmp_path / "run"))


# Aligned tokens


@pytest.mark.parametrize("adapter", ["mlp", "transformer"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_reloaded_adapter_aligns_tokens_to_the_same_bytes(
    write_tokens: Write, tmp_path: Path, adapter: str, dtype: Any
) -> None:
    features = write_tokens(dtype=dtype)
    run(features, tmp_path / "run", adapter=adapter, token_weight=1.0)
    for name in ("one", "two"):
        out = tmp_path / name
        config = {"adapter": tmp_path / "run", "out": out, "tokens": True, "dtype": dtype}
        apply(ApplyConfig(features=features, **config))
    one, two = (FeatureSet.open(tmp_path / name) for name in ("one", "two"))

    assert one.manifest.fingerprint() == two.manifest.fingerprint()
    for side in Modality:
        ((_, before),) = FeatureSet.open(features).table(side).read("tokens")
        ((_, after),) = one.table(side).read("tokens")
        rows = list(zip(batch_tokens(before), batch_tokens(after), strict=True))
        assert all(len(old) == len(new) for old, new in rows)
        assert any(len(old) == 0 for old, _ in rows)
        norms = np.linalg.norm(np.concatenate([new for _, new in rows]).astype(float), axis=1)
        np.testing.assert_allclose(norms, 1, atol=2e-3)


def test_tokens_are_aligned_only_where_that_makes_sense(
    write_tokens: Write, tmp_path: Path
) -> None:
    features, without = write_tokens(), write_tokens("without", sides=[])
    run(features, tmp_path / "plain")
    run(features, tmp_path / "run", token_weight=1.0)

    def aligned(source: Path, adapter: str, **values: Any) -> None:
        apply(
            ApplyConfig(
                features=source,
                adapter=tmp_path / adapter,
                out=tmp_path / "out",
                tokens=True,
                **values,
            )
        )

    with pytest.raises(ConfigError, match=r"was trained without tokens; .* --token-weight"):
        aligned(features, "plain")
    with pytest.raises(ConfigError, match="npy stores no tokens"):
        aligned(features, "run", format="npy")
    with pytest.raises(DataError, match="stores no image tokens"):
        aligned(without, "run")
    assert not (tmp_path / "out").exists()


# Wrong combinations


@pytest.mark.parametrize(
    ("stored", "options", "kind", "message"),
    [
        (
            {"sides": []},
            {"token_weight": 1.0},
            DataError,
            "stores no image tokens; extract it again",
        ),
        (
            {"sides": [Modality.IMAGE]},
            {"token_weight": 1.0},
            DataError,
            "stores no text tokens; extract it again with csalign extract --tokens both",
        ),
        (
            {"sides": [Modality.IMAGE]},
            {"adapter": "transformer", "tokens": True},
            DataError,
            "stores no text tokens",
        ),
        (
            {"token_widths": (12, 5)},
            {"token_weight": 1.0},
            ShapeError,
            "glu: takes tokens as wide as the embeddings, but tokens are 5 wide",
        ),
        ({}, {"tokens": True}, ConfigError, "neither side embeds with them \\(glu\\); use"),
        (
            {},
            {"adapter": "transformer", "tokens": True, "mixing": 1.0},
            ConfigError,
            "mixing: such rows have no tokens",
        ),
        (
            {},
            {"text_adapter": "transformer", "token_weight": 1.0, "unpaired": "some"},
            ConfigError,
            "unpaired: such rows have no tokens",
        ),
        (
            {},
            {"token_weight": 1.0, "sub_batch": 8},
            ConfigError,
            "sub-batch: cannot be combined with tokens",
        ),
    ],
)
def test_wrong_combinations_are_refused_before_anything_is_computed(
    write_tokens: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: dict[str, Any],
    options: dict[str, Any],
    kind: type[CsalignError],
    message: str,
) -> None:
    features = write_tokens(**stored)
    monkeypatch.setattr("csalign.training.data.load_training", pytest.fail)

    with pytest.raises(kind, match=message):
        run(features, tmp_path / "run", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"mixing": 1.0},
        {"captions": "sample"},
        {"captions": "all"},
        {"captions": "all", "adapter": "transformer"},
        {"average": 0.9},
        {"adapter": "low-rank"},
    ],
)
def test_the_token_term_goes_with_other_options(
    write_tokens: Write, tmp_path: Path, options: dict[str, Any]
) -> None:
    run(write_tokens(widths=(10, 10)), tmp_path / "run", token_weight=1.0, **options)

    assert all(line["token"] > 0 for line in lines(tmp_path / "run", "loss"))
