import numpy as np
import pytest
from rich.cells import cell_len

from csalign.cli.layout import INDENT, table_lines, term_lines

WIDTHS = (80, 100, 120)
HEADINGS = ["R@1 % ↑", "R@5 % ↑", "R@10 % ↑", "median rank ↓", "mAP % ↑"]
LABELS = {
    "short": ["image to text", "text to image"],
    "60 characters": [
        "a-very-long-name-of-a-run-that-somebody-typed-in-a-loop-" + x for x in "abcd"
    ],
    "CJK": ["一只熊在雪地里 image to text", "犬と猫"],
}


def columns_of(labels: list[str], count: int, *, around: bool) -> dict[str, list[str]]:
    """Values of all sizes, some of them negative, with or without what is around them."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(count, len(labels))) * 10.0 ** rng.integers(-3, 7, (count, 1))
    headings = [*HEADINGS, *(f"{name}, {part}" for part in "xy" for name in HEADINGS)]
    suffix = " ± 12345.67" if around else ""
    cells = [[f"{value:.2f}{suffix}" for value in column] for column in values]
    return dict(zip(headings, cells, strict=False))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("count", [1, 5, 15])
def test_every_label_and_number_is_whole_and_no_line_too_long(
    width: int, kind: str, around: bool, count: int
) -> None:
    labels, columns = LABELS[kind], columns_of(LABELS[kind], count, around=around)
    lines = table_lines(labels, columns, width)
    words = " ".join(lines).split()

    assert max(map(cell_len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)
    for label in labels:
        assert any(line.startswith(INDENT + label) for line in lines)
    for heading, cells in columns.items():
        assert any(heading in line for line in lines)
        assert {word for cell in cells for word in cell.split()} <= set(words)


def test_what_is_around_a_value_stands_beside_it_or_below() -> None:
    labels = ["run", "other"]
    columns = {"R": ["1.00 ± 0.50", "3.00"], "gap": ["22.00 ± 0.10", "-4.00 ± 10.00"]}

    assert table_lines(labels, columns, 80) == [
        "                    R             gap",
        "  ───────────────────────────────────",
        "  run     1.00 ± 0.50   22.00 ± 0.10",
        "  other   3.00          -4.00 ± 10.00",
    ]
    assert table_lines(labels, columns, 30) == [
        "               R       gap",
        "  ────────────────────────",
        "  run       1.00     22.00",
        "          ± 0.50    ± 0.10",
        "  other     3.00     -4.00",
        "                   ± 10.00",
    ]


def test_a_label_longer_than_a_line_is_folded_and_its_figures_stay() -> None:
    lines = table_lines(["x" * 200], {"R@1": ["12.34"]}, 80)

    assert "".join(lines).count("x") == 200
    assert max(map(cell_len, lines)) <= 80
    assert "12.34" in " ".join(lines).split()


def test_texts_are_wrapped_at_words_beside_their_names() -> None:
    lines = list(term_lines([("name", "one two three " * 10), ("n", "short")], 60))

    assert max(map(len, lines)) <= 60
    assert all(line.startswith(" " * 9) for line in lines[1:-1])
    assert lines[-1] == "  n      short"
    assert list(term_lines([("name", "one " * 50)], None)) == [("  name   " + "one " * 50).rstrip()]


def test_the_text_of_a_long_name_begins_on_the_next_line() -> None:
    lines = list(term_lines([("--a", "one"), ("--long-name", "two " * 20)], 40, most=6))

    assert lines[:2] == ["  --a   one", "  --long-name"]
    assert all(line.startswith(" " * 8 + "two") for line in lines[2:])
    assert max(map(len, lines)) <= 40
