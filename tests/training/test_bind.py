"""Runs that share a side, bound into one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import csalign
from csalign.adapters.builtin import Linear, Mapped
from csalign.adapters.checkpoint import load_adapter
from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape
from csalign.core.errors import ConfigError, DataError
from csalign.metrics.retrieval import rank_both_ways
from tests.training.sided import write_sided

Views = dict[str, NDArray[np.float32]]
WIDTHS = {"image": 12, "text": 10, "audio": 14, "touch": 9}
CLOSED: dict[str, Any] = {"adapter": "linear", "steps": 0, "ensemble": "off"}


def views(count: int, seed: int) -> Views:
    """Views of the same latents by side; row i of each is of item i."""
    of_sides, rng = np.random.default_rng(0), np.random.default_rng(seed)
    latent = rng.normal(size=(count, 6))
    return {
        side: (latent @ of_sides.normal(size=(6, width)) + 0.2 * rng.normal(size=(count, width)))
        .astype(np.float32)
        for side, width in WIDTHS.items()
    }  # fmt: skip


def trained(out: Path, rows: Views, sides: tuple[str, str], **options: Any) -> Path:
    """Train a run on two views."""
    names = None if sides == ("image", "text") else ",".join(sides)
    features = out.with_name(f"{out.name}-set")
    csalign.import_arrays(*(rows[side] for side in sides), names=names, out=features)
    return csalign.train(features, out, **{**CLOSED, **options}).run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on different items, in spaces 6 and 5 wide."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "seen": trained(folder / "seen", views(300, 1), ("image", "text"), width=6),
        "heard": trained(folder / "heard", views(300, 2), ("audio", "text"), width=5),
        "felt": trained(folder / "felt", views(300, 3), ("touch", "audio"), width=6),
    }


def recall(adapter: Adapter, one: str, other: str) -> float:
    """Share of 100 new items whose other view comes first, both ways."""
    rows = views(100, 9)
    ranks = rank_both_ways(
        adapter.embed(one, rows[one]), adapter.embed(other, rows[other]), np.arange(100)
    )
    return float(np.mean([(own.first == 1).mean() for own in ranks]))


def test_sides_that_never_met_find_each_other(runs: dict[str, Path], tmp_path: Path) -> None:
    result = csalign.bind(runs["seen"], runs["heard"], tmp_path / "bound")
    bound, first = load_adapter(tmp_path / "bound"), load_adapter(runs["seen"])

    assert (result["sides"], result["shared"]) == (["image", "text", "audio"], "text")
    assert (result["mapped"], result["widths"]) == (["audio"], {"from": 5, "to": 6})
    assert (result["rows"], result["held_out"]["rows"]) == (600, 120)
    assert result["held_out"]["mean_recall"] > 0.9
    assert recall(bound, "audio", "text") > 0.3
    assert recall(bound, "image", "audio") > 0.3
    for side in ("image", "text"):
        rows = views(20, 4)[side]
        np.testing.assert_array_equal(bound.embed(side, rows), first.embed(side, rows))


def test_a_bound_run_records_the_encoders_and_the_features_of_the_first(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    csalign.bind(runs["seen"], runs["heard"], tmp_path / "bound")
    document = json.loads((tmp_path / "bound" / "adapter.json").read_text())
    first = json.loads((runs["seen"] / "adapter.json").read_text())

    assert [*document["adapters"]] == [*document["encoders"]] == ["image", "text", "audio"]
    assert document["adapters"]["text"] == first["adapters"]["text"]
    assert document["data_fingerprint"] == first["data_fingerprint"]
    assert document["validation"] is None
    assert csalign.inspect(tmp_path / "bound")["kinds"]["audio"] == "linear, mapped"


def test_a_bound_run_is_bound_to_a_third_by_a_side_of_the_second(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    two = csalign.bind(runs["seen"], runs["heard"], tmp_path / "two")["run"]
    result = csalign.bind(two, runs["felt"], tmp_path / "three")

    assert result["sides"] == ["image", "text", "audio", "touch"]
    assert recall(load_adapter(tmp_path / "three"), "image", "touch") > 0.2


def test_a_bound_run_evaluates_the_features_of_the_first(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    csalign.bind(runs["seen"], runs["heard"], tmp_path / "bound")
    features = runs["seen"].with_name("seen-set")
    found, own = (
        csalign.evaluate(features, adapter=run)["retrieval"]
        for run in (tmp_path / "bound", runs["seen"])
    )

    assert found == own


def test_trained_parts_are_bound(runs: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"adapter": "glu", "steps": 3, "ensemble": "auto"}
    run = trained(tmp_path / "deep", views(200, 5), ("audio", "text"), **options)
    csalign.bind(runs["seen"], run, tmp_path / "bound")

    assert recall(load_adapter(tmp_path / "bound"), "image", "audio") > 0.2


def test_a_mapped_adapter_maps_unit_outputs() -> None:
    shape = SideShape("linear", 4, 3)
    weight, bias = torch.randn(2, 3), torch.randn(2)
    inner = Linear(shape)
    x = torch.randn(5, 4)
    mapped = Mapped.of(inner, weight, bias)
    expected = torch.nn.functional.normalize(inner(x), dim=1) @ weight.T + bias

    torch.testing.assert_close(mapped(x), expected)
    assert mapped.shape.width == 2
    with pytest.raises(ValueError, match="no parts"):
        SideShape("mapped", 4, 2, parts=(shape, shape))


def test_rows_of_given_features_replace_those_of_the_training(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    csalign.import_arrays(texts=views(50, 6)["text"], out=tmp_path / "texts")
    both = [runs["seen"], runs["heard"]]
    result = csalign.bind(*both, tmp_path / "bound", features=[tmp_path / "texts"])

    assert result["rows"] == 50
    assert csalign.inspect(tmp_path / "bound")["features"] == str(runs["seen"]) + "-set"


def test_rows_of_different_encoders_are_matched_by_id(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    rows = views(300, 7)
    wide = trained(tmp_path / "wide", {**rows, "text": rows["touch"]}, ("audio", "text"), width=5)
    items = views(80, 8)
    for name, side in (("narrow", "text"), ("other", "touch")):
        csalign.import_arrays(texts=items[side], out=tmp_path / name)
    sets = [tmp_path / "narrow", tmp_path / "other"]

    with pytest.raises(DataError, match=r"no common row of the side text.*9 wide.*takes 10"):
        csalign.bind(runs["seen"], wide, tmp_path / "bound")
    result = csalign.bind(runs["seen"], wide, tmp_path / "bound", features=sets)
    assert result["rows"] == 80
    assert recall(load_adapter(tmp_path / "bound"), "image", "audio") > 0.2


def test_too_few_rows_for_a_rotation_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    csalign.import_arrays(texts=views(4, 6)["text"], out=tmp_path / "texts")

    with pytest.raises(DataError, match=r"4 different rows.* 5 wide into one 6 wide; 5 are needed"):
        csalign.bind(*[runs["seen"], runs["heard"]], tmp_path / "b", features=[tmp_path / "texts"])


def test_runs_without_a_side_in_common_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    both = [runs["seen"], runs["felt"]]

    with pytest.raises(ConfigError, match=r"no side in common: .*seen has image, text; .*--rename"):
        csalign.bind(*both, tmp_path / "bound")
    with pytest.raises(ConfigError, match=r"no side touch in common"):
        csalign.bind(*both, tmp_path / "bound", share="touch")


def test_other_sides_of_one_name_are_refused_until_they_are_renamed(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    both = [runs["seen"], runs["seen"]]
    more = trained(tmp_path / "more", views(100, 6), ("image", "text"), width=6)

    with pytest.raises(
        ConfigError, match=r"a side image besides text; .*--share text.*--rename image="
    ):
        csalign.bind(runs["seen"], more, tmp_path / "bound")
    with pytest.raises(ConfigError, match=r"a side image besides text.*--rename image=other-image"):
        csalign.bind(runs["seen"], more, tmp_path / "bound", share="text")
    with pytest.raises(ConfigError, match=r"has no side audio; its sides are image, text"):
        csalign.bind(*both, tmp_path / "bound", rename="audio=sound")
    with pytest.raises(ConfigError, match="not OLD=NEW"):
        csalign.bind(*both, tmp_path / "bound", rename="audio")
    result = csalign.bind(runs["seen"], more, tmp_path / "bound", rename="image=drawing")
    assert result["sides"] == ["image", "text", "drawing"]


def test_a_side_that_embeds_with_tokens_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    side = SideShape("transformer", 4, 4, hidden=4, token_width=4)
    Adapter({"audio": side, "text": SideShape("linear", 10, 4)}).save(tmp_path / "tokens")

    with pytest.raises(ConfigError, match="audio side embeds with tokens"):
        csalign.bind(runs["seen"], tmp_path / "tokens", tmp_path / "bound")


def test_runs_on_other_rows_of_one_set_are_joined_by_the_same_rows(tmp_path: Path) -> None:
    features = write_sided(tmp_path / "set", missing=0.0)
    seen, heard = (
        csalign.train(features, tmp_path / name, sides=sides, train_split=split, **CLOSED).run
        for name, sides, split in (
            ("seen", "image,text", "train"),
            ("heard", "audio,text", "all"),
        )
    )
    for number, both in enumerate(((seen, heard), (heard, seen))):
        result = csalign.bind(*both, tmp_path / f"bound{number}")
        assert result["rows"] == 300
        assert result["held_out"]["mean_recall"] > 0.9


def test_rows_of_a_set_that_one_run_knows_by_other_splits_stay_matched(tmp_path: Path) -> None:
    rows = views(300, 4)
    known = tmp_path / "known"
    sides = {side: rows[side] for side in ("image", "text")}
    csalign.import_arrays(sides=sides, out=known, val=60)
    seen = csalign.train(known, tmp_path / "seen", sides=["image", "text"], width=6, **CLOSED).run
    heard = trained(tmp_path / "heard", views(300, 2), ("audio", "text"), width=5)

    result = csalign.bind(seen, heard, tmp_path / "bound", features=[known])
    assert result["held_out"]["cosine"] > 0.9
