"""The rows, batches, loss and figures of several sides."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape
from csalign.core.enums import AnySide, Modality, side_of
from csalign.features.join import hash_rows
from csalign.features.reader import FeatureSet
from csalign.features.sides import SidedRows, SideRows
from csalign.objective.divergences import cs_divergence, holder
from csalign.training.config import DataOptions, ObjectiveOptions
from csalign.training.network.batch_loss import BatchLoss
from csalign.training.network.sampler import Batch, SideBatch
from csalign.training.sides.data import Sampler, SidesData, hold_out, load_sides_data
from csalign.training.sides.loader import PairRows, SidesBatch, SidesLoader
from csalign.training.sides.loss import SidesLoss
from csalign.training.sides.validation import measure_sides
from tests.training.sided import write_sided

CPU = torch.device("cpu")
AUDIO = side_of("audio")


def rows_of(items: dict[str, list[int]], values: dict[str, Any] | None = None) -> SidedRows:
    """Make rows of sides whose rows have these items; by default all rows differ."""
    rng, sides = np.random.default_rng(0), dict[AnySide, SideRows]()
    for name, own in items.items():
        found = (values or {}).get(name)
        made = rng.normal(size=(len(own), 5)) if found is None else np.asarray(found)
        numbers = np.array(own, np.int64)
        sides[side_of(name)] = SideRows(
            side_of(name), made.astype(np.float32), numbers, np.arange(len(own))
        )
    count = 1 + max(max(own) for own in items.values())
    return SidedRows("set", sides, pa.array([f"{item:04d}" for item in range(count)]))


def data_of(rows: SidedRows) -> SidesData:
    keys = {side: hash_rows(own.embeddings) for side, own in rows.sides.items()}
    held_out, features = np.zeros(rows.count, bool), None
    together = rows.present.sum(1) >= 2
    return SidesData(features, "all", rows, together, None, held_out, None, "", keys)  # type: ignore[arg-type]


def adapter_of(*sides: str) -> Adapter:
    torch.manual_seed(0)
    return Adapter({side_of(side): SideShape("glu", 5, 4, hidden=8, dropout=0.0) for side in sides})


def batch_of(items: dict[str, list[int]], unpaired: int = 0) -> SidesBatch:
    """Load a batch of all items in their order."""
    data = data_of(rows_of(items))
    loader = SidesLoader(data, Sampler(data, None, once=True), 1_000, 0, CPU, unpaired)
    return next(loader)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"divergence": "mmd", "bandwidth": 0.5},
        {"divergence": "pairs-mse"},
        {"divergence": "holder"},
        {"divergence": "gaussian-kl", "label_smoothing": 0.1},
        {"pairwise": "sigmoid", "cs_weight": 2.0},
        {"pairwise": "align-uniform"},
        {"pairwise": "none"},
        {"learn_scale": True, "bandwidth": "tied"},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [40, 300])
def test_two_complete_sides_have_the_loss_of_images_and_texts(
    values: dict[str, Any], count: int
) -> None:
    options = ObjectiveOptions(noise=0.0, **values)
    adapter = adapter_of("image", "text")
    batch = batch_of({"image": [*range(count)], "text": [*range(count)]})
    images, texts = batch.sides[Modality.IMAGE], batch.sides[Modality.TEXT]
    wide = [SideBatch(own.rows, [count, 0, 0, 0], None) for own in (images, texts)]
    none = torch.zeros(0, dtype=torch.int64)
    figures, gradients = [], []
    for loss, own in (
        (BatchLoss(options), Batch(wide[0], wide[1], None, none, (none, none))),
        (SidesLoss(options), batch),
    ):
        parts = loss(adapter, own, 1)
        adapter.zero_grad()
        parts.total.backward()
        gradient = torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])
        figures.append([float(own.detach()) for own in parts[:3]])
        gradients.append(gradient)
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


THREE = {"image": [*range(30)], "text": [*range(10, 40)], "audio": [*range(20, 50)]}


def test_a_pair_of_sides_counts_as_much_as_it_has_pairs() -> None:
    batch = batch_of(THREE)
    adapter, options = adapter_of(*THREE), ObjectiveOptions(noise=0.0, cs_weight=0.0)
    found = SidesLoss(options)(adapter, batch, 1).pairwise.detach()

    losses, counts = [], []
    for pair, own in batch.pairs.items():
        alone = SidesBatch(batch.sides, {pair: own})
        losses.append(float(SidesLoss(options)(adapter, alone, 1).pairwise.detach()))
        counts.append(len(own.first))
    assert sorted(counts) == [10, 20, 20]
    assert float(found) == pytest.approx(np.average(losses, weights=counts))
    hub = float(SidesLoss(options, hub="image")(adapter, batch, 1).pairwise.detach())
    has = [("image" in pair) for pair in batch.pairs]
    assert hub == pytest.approx(np.average(np.array(losses)[has], weights=np.array(counts)[has]))


def test_all_rows_of_all_sides_are_compared() -> None:
    items = {**THREE, "audio": [*range(20, 50), *range(60, 80)]}
    adapter = adapter_of(*THREE)
    options = ObjectiveOptions(noise=0.0, bandwidth=0.5, pairwise="none", cs_weight=1.0)
    batch = batch_of(items, unpaired=16)

    rows = {
        side: torch.nn.functional.normalize(adapter.side(side)(own.rows), dim=1)
        for side, own in batch.sides.items()
    }
    assert {side: len(own) for side, own in rows.items()} == {"image": 30, "text": 30, "audio": 36}
    parts = SidesLoss(options)(adapter, batch, 1)
    names = [*rows]
    expected = [
        float(cs_divergence(rows[one], rows[other], sigma=0.5).detach())
        for number, one in enumerate(names)
        for other in names[number + 1 :]
    ]
    assert float(parts.divergence.detach()) == pytest.approx(np.mean(expected), rel=1e-5)
    at_once = SidesLoss(options.model_copy(update={"divergence": "holder"}))(adapter, batch, 1)
    whole = float(holder([*rows.values()], 0.5).detach())
    assert float(at_once.divergence.detach()) == pytest.approx(whole / 3, rel=1e-5)


def test_a_batch_without_pairs_of_two_sides_has_a_gradient() -> None:
    batch = batch_of({"image": [0, 1, 2], "text": [0, 1, 2], "audio": [5, 6]})
    adapter = adapter_of("image", "text", "audio")

    parts = SidesLoss(ObjectiveOptions(cs_weight=0.0))(adapter, batch, 1)
    parts.total.backward()
    assert torch.isfinite(parts.total)
    nothing = {pair: PairRows(*(own[:0] for own in pairs)) for pair, pairs in batch.pairs.items()}
    empty = SidesLoss(ObjectiveOptions(cs_weight=0.0))(adapter, batch._replace(pairs=nothing), 1)
    assert float(empty.total.detach()) == 0
    empty.total.backward()


def test_an_epoch_has_each_item_once_with_one_row_of_each_side() -> None:
    items = {"image": [0, 0, 0, 1, 2, 3], "text": [0, 1, 2, 4], "audio": [0, 1, 1, 5]}
    sampler = Sampler(data_of(rows_of(items)), None, once=True)

    assert sampler.items.tolist() == [0, 1, 2]
    assert {side: pool.tolist() for side, pool in sampler.pools.items()} == {
        "image": [5],
        "text": [3],
        "audio": [3],
    }
    drawn = set()
    for seed in range(20):
        batches = [*sampler.epoch(2, np.random.default_rng(seed))]
        places = [np.concatenate([own[1] for own in batch.values()]) for batch in batches]
        assert [own.max() for own in places] == [1, 0]
        rows = {side: np.concatenate([b[side][0] for b in batches]) for side in batches[0]}
        owners = {side: np.array(items[side])[own] for side, own in rows.items()}
        assert {side: sorted(own) for side, own in owners.items()} == {
            "image": [0, 1, 2],
            "text": [0, 1, 2],
            "audio": [0, 1],
        }
        drawn.update(rows[Modality.IMAGE].tolist())
    assert drawn == {0, 1, 2, 3, 4}


def test_equal_rows_of_a_side_are_in_one_item_of_an_epoch() -> None:
    names = [[1.0, 0, 0, 0, 0]] * 9 + [[0, 1.0, 0, 0, 0]]
    rows = rows_of({"image": [*range(10)], "text": [*range(10)]}, {"text": names})

    (batch,) = Sampler(data_of(rows), None, once=True).epoch(20, np.random.default_rng(0))
    assert {side: len(own[0]) for side, own in batch.items()} == {"image": 2, "text": 2}
    (batch,) = Sampler(data_of(rows), None, once=False).epoch(20, np.random.default_rng(0))
    assert {side: len(own[0]) for side, own in batch.items()} == {"image": 10, "text": 10}


def test_batches_resume_from_any_place() -> None:
    data = data_of(rows_of({**THREE, "audio": [*range(20, 70)]}))

    def loader() -> SidesLoader:
        return SidesLoader(data, Sampler(data, None, once=True), 8, 3, CPU, 4)

    places, expected, batches = [], [], loader()
    for _ in range(9):
        places.append(json.loads(json.dumps(batches.state_dict())))
        expected.append(next(batches).sides[AUDIO].rows)
    for number, place in enumerate(places):
        again = loader()
        again.load_state_dict(place)
        with again.reading_ahead():
            for rows in expected[number:]:
                assert torch.equal(next(again).sides[AUDIO].rows, rows)


def test_what_is_held_out_shares_no_row_with_the_rest() -> None:
    rng = np.random.default_rng(0)
    names = rng.normal(size=(300, 5))[np.arange(600) // 2]
    rows = rows_of({"image": [*range(600)], "text": [*range(600)]}, {"text": names})
    keys = data_of(rows).keys

    everything = np.ones(600, bool)

    held_out = hold_out(rows, keys, everything, 0)
    assert held_out.sum() == 100
    assert (held_out[::2] == held_out[1::2]).all()
    assert not np.array_equal(held_out, hold_out(rows, keys, everything, 1))
    few = rows_of({"image": [*range(19)], "text": [*range(19)]})
    assert not hold_out(few, data_of(few).keys, np.ones(19, bool), 0).any()


def test_what_is_held_out_does_not_depend_on_the_order(tmp_path: Path) -> None:
    found = []
    for name, order in (("one", None), ("other", np.random.default_rng(2))):
        features = FeatureSet.open(write_sided(tmp_path / name, order=order))
        options = DataOptions(features=features.path)
        data = load_sides_data(features, options, features.sides, 0)
        found.append((data.rows.keys.filter(pa.array(data.held_out)).to_pylist(), data))
    assert found[0][0] == found[1][0]
    one, other = (own[1].rows.sides[AUDIO] for own in found)
    assert np.array_equal(one.embeddings, other.embeddings)


def test_the_figures_are_means_over_pairs_of_sides() -> None:
    eye = np.eye(30, dtype=np.float32)
    outputs = {
        Modality.IMAGE: (eye, np.arange(30)),
        Modality.TEXT: (eye[::-1].copy(), np.arange(30)),
        AUDIO: (eye[:20], np.arange(20)),
    }
    measured = measure_sides(outputs)

    image, text = Modality
    named = ((image, text), (image, AUDIO), (text, AUDIO))
    pairs = [measure_sides({side: outputs[side] for side in pair}) for pair in named]
    assert pairs[1].score.mean_recall == 1
    assert pairs[0].score.mean_recall < 0.2
    assert measured.score == pytest.approx(np.mean([own.score for own in pairs], 0))
    assert measured.recalls.mean() == pytest.approx(measured.score.mean_recall)
    added = measure_sides(outputs, AUDIO).score
    assert added == pytest.approx(np.mean([own.score for own in pairs[1:]], 0))
