"""Tables of sets of several sides, on narrow screens."""

from itertools import combinations, permutations
from typing import Any

import pytest
from rich.cells import cell_len

from csalign.cli.diagnosis_tables import diagnosis_table
from csalign.cli.eval_tables import compare_table, eval_tables
from csalign.evaluation.config import CompareConfig, DiagnoseConfig, EvalConfig

SIDES = ("image", "text", "audio", "depth", "protein", "tactile", "thermal", "video")
FIGURES = ("R@1", "R@5", "R@10", "mrr", "mean_recall")
GAPS = ("centroid_distance", "rmg", "cs_divergence", "mmd", "frechet", "linear_separability")


def both_ways(sides: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {a: {b: value for b in sides if b != a} for a in sides}


def evaluated(sides: tuple[str, ...]) -> dict[str, Any]:
    """A document of ``csalign eval`` in which figures differ by their kind alone."""
    cell = dict.fromkeys(FIGURES, 0.123) | {"median_rank": 7.0, "queries": 900, "gallery": 1_000}
    gap = dict.fromkeys((*GAPS, "alignment"), 0.25)
    score = {"mean_recall": 0.5}
    block = {
        **dict.fromkeys(("query_weighted", "mean", "sum"), score),
        "best_single": {"mean_recall": 0.4},
        "gain": 0.1,
    }
    subsets: dict[str, Any] = {}
    for target in sides:
        others = sorted(set(sides) - {target})
        least = 2 if len(sides) <= 5 else len(others) - 1
        subsets[target] = {
            "+".join(own): {**block, "best_side": own[0]}
            for k in range(least, len(others) + 1)
            for own in combinations(others, k)
        }
    around = {name: [0.1, 0.15] for name in FIGURES}
    return {
        **{"features": "set", "adapter": "run", "split": "test", "sides": [*sides]},
        "counts": {"items": 1_234, "rows": dict.fromkeys(sides, 1_000)},
        "matrix": both_ways(sides, cell),
        "mean_recall": 0.123,
        "gap": both_ways(sides, gap),
        "subsets": subsets,
        "intervals": {
            "mean_recall": [0.1, 0.15],
            "matrix": both_ways(sides, around),
            "gap": both_ways(sides, {"centroid_distance": [0.2, 0.3]}),
            "subsets": {
                t: {key: {"gain": [0.05, 0.15]} for key in own} for t, own in subsets.items()
            },
        },
    }


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Print a table at 80 columns and return its lines."""
    monkeypatch.setenv("COLUMNS", "80")

    def show(table: Any, document: Any, settings: Any) -> list[str]:
        table(document, settings)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(cell_len, lines)) <= 80
        return lines

    return show


def test_few_sides_have_a_matrix_with_intervals(shown: Any) -> None:
    lines = shown(eval_tables, evaluated(SIDES[:3]), EvalConfig(features="set"))

    assert lines[0] == "set, adapter run, split test: 1,234 items"
    assert "mean recall % ↑ 12.30 ± 2.50; rows: from, columns: to" in lines
    assert "  image                12.3 ± 2.5   12.3 ± 2.5" in lines
    assert [line.split() for line in lines].count(["text", "0.250", "±", "0.050"]) == 1
    wanted = "text by audio+image audio 40.0 50.0 50.0 50.0 +10.0 ± 5.0"
    assert [" ".join(line.split()) for line in lines].count(wanted) == 1
    assert sum("+10.0 ± 5.0" in line for line in lines) == 3


def test_eight_sides_fit_a_narrow_screen(shown: Any) -> None:
    lines = shown(eval_tables, evaluated(SIDES), EvalConfig(features="set"))

    (heading,) = (own for own in lines if own.split() == [*SIDES])
    rows = lines[lines.index(heading) + 2 :][:8]
    assert [row.split() for row in rows] == [[side, *["12.3"] * 7] for side in SIDES]
    assert sum("by all others" in line for line in lines) == 8
    assert any("56 more subsets with --all-figures" in line for line in lines)
    every = shown(eval_tables, evaluated(SIDES), EvalConfig(features="set", all_figures=True))
    assert sum("by all but" in line for line in every) >= 56
    for title in ("median rank ↓; rows: from, columns: to", "modality gap: RMG ↓"):
        assert title in every


def test_systems_are_compared_by_direction(shown: Any) -> None:
    sides = SIDES[:3]
    ways = [f"{a}_to_{b}_mean_recall" for a, b in permutations(sides, 2)]
    gaps = [f"{a}_{b}_centroid_distance" for a, b in combinations(sides, 2)]
    row = {
        **{"name": "run-a", "verdict": "baseline", "mean_recall": 0.5, "intervals": {}},
        **{"difference": {}, "parameters": 10, "seconds": None},
        **dict.fromkeys(ways, 0.5),
        **dict.fromkeys(gaps, 0.25),
    }
    other = row | {
        **{"name": "run-b", "verdict": "better"},
        "difference": {
            name: {"value": 0.1, "interval": [0.05, 0.15]} for name in (*ways, "mean_recall")
        },
        "verdicts": dict.fromkeys(ways, "better"),
    }

    lines = shown(
        compare_table,
        {"evaluations": [row, other], "sides": [*sides]},
        CompareConfig(systems=("run-a", "run-b")),
    )

    assert "run-b: mean recall % ↑ by direction" in lines
    assert "  audio to text        50.0     50.0   +10.0 [+5.0, +15.0]   better" in lines
    assert [line.split() for line in lines if line.startswith("  text, audio")] == [
        ["text,", "audio", "0.250", "0.250"]
    ]
    assert any("bootstrap interval over items" not in line for line in lines)


def test_a_diagnosis_has_its_words_and_matrices(shown: Any) -> None:
    pair = {"items": 1_200, "mutual_knn": 0.25, "cka": None}
    document = {
        **{"features": "set", "split": "train,val", "sides": [*SIDES]},
        "counts": {"items": 5_000, "items_by_sides": {"1": 2_000, "2": 3_000}},
        "forecast": {"words": ["Words on the items."], "pairs": both_ways(SIDES, pair)},
    }

    lines = shown(diagnosis_table, document, DiagnoseConfig(features="set"))

    assert lines[:2] == ["set, train and val: 5,000 items", "Words on the items."]
    assert "  2   3,000" in lines
    assert any(line.split() == ["thermal", "1,200"] for line in lines)
    assert any(line.split() == ["thermal", "0.250"] for line in lines)
    assert any(line.split() == ["thermal", "-"] for line in lines)
