import pytest

from csalign.core.errors import ConfigError, DataError
from csalign.search.plan import EXACT_ROWS, KINDS, Plan, plan_index

PLENTY = 1 << 50


def test_auto_is_exact_for_few_rows_ivf_for_many_and_pq_where_memory_is_short() -> None:
    assert plan_index("auto", EXACT_ROWS, 256, PLENTY).kind == "exact"
    assert plan_index("auto", EXACT_ROWS + 1, 256, PLENTY).kind == "ivf"
    assert plan_index("auto", 10_000_000, 256, 4 << 30).kind == "pq"


def test_codes_are_a_sixteenth_of_the_vectors() -> None:
    sizes = {kind: plan_index(kind, 1_000_000, 256, PLENTY).index_bytes for kind in KINDS}

    assert sizes["exact"] == 1_024_000_000
    assert sizes["exact"] < sizes["ivf"] < sizes["hnsw"] < 1.3 * sizes["exact"]
    assert sizes["pq"] < 0.08 * sizes["exact"]


def test_what_would_take_too_much_memory_is_refused_with_what_would_help() -> None:
    with pytest.raises(ConfigError, match=r"ivf: 1,000,000 x 256 need .* or use --kind pq"):
        plan_index("ivf", 1_000_000, 256, 1 << 30)


@pytest.mark.parametrize(("kind", "rows"), [("exact", 0), ("pq", 600)])
def test_too_few_rows_are_refused(kind: str, rows: int) -> None:
    with pytest.raises(DataError):
        plan_index(kind, rows, 16, PLENTY)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 40, 5_000, 2_000_000])
def test_cells_have_rows_to_be_trained_on(rows: int) -> None:
    plan: Plan = plan_index("ivf", rows, 16, PLENTY)

    assert 1 <= plan.cells <= max(1, rows // 39)
    assert plan.training_rows <= rows
