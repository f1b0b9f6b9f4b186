import numpy as np
import pytest
from rich.cells import cell_len

from csalign.cli.layout import INDENT, Row, table_lines, term_lines

WIDTHS = (80, 100, 120)
HEADINGS = ["R@1 % ↑", "R@5 % ↑", "R@10 % ↑", "median rank ↓", "mAP % ↑"]
LABELS = {
    "short": ["image to text", "text to image"],
    "60 characters": [
        "a-very-long-name-of-a-run-that-somebody-typed-in-a-loop-" + x for x in "abcd"
    ],
    "CJK": ["一只熊在雪地里 image to text", "犬と猫"],
}


def rows_of(labels: list[str], columns: int, *, around: bool) -> list[Row]:
    """Values of all sizes, some of them negative, with or without what is around them."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(len(labels), columns)) * 10.0 ** rng.integers(-3, 7, columns)
    suffix = " ± 12345.67" if around else ""
    return [
        (label, [f"{value:.2f}{suffix}" for value in row])
        for label, row in zip(labels, values, strict=True)
    ]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("columns", [1, 5, 15])
def test_every_label_and_number_is_whole_and_no_line_too_long(
    width: int, kind: str, around: bool, columns: int
) -> None:
    headings, rows = (HEADINGS * 3)[:columns], rows_of(LABELS[kind], columns, around=around)
    lines = table_lines(headings, rows, width)
    words = " ".join(lines).split()

    assert max(map(cell_len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)
    for heading in headings:
        assert any(heading in line for line in lines)
    for label, cells in rows:
        assert any(line.startswith(INDENT + label) for line in lines)
        for cell in cells:
            assert set(cell.split()) <= set(words)


def test_what_is_around_a_value_stands_beside_it_or_below() -> None:
    rows = [("run", ["1.00 ± 0.50", "22.00 ± 0.10"]), ("other", ["3.00", "-4.00 ± 10.00"])]

    assert table_lines(["R", "gap"], rows, 80) == [
        "                    R             gap",
        "  ───────────────────────────────────",
        "  run     1.00 ± 0.50   22.00 ± 0.10",
        "  other   3.00          -4.00 ± 10.00",
    ]
    assert table_lines(["R", "gap"], rows, 30) == [
        "               R       gap",
        "  ────────────────────────",
        "  run       1.00     22.00",
        "          ± 0.50    ± 0.10",
        "  other     3.00     -4.00",
        "                   ± 10.00",
    ]


def test_a_label_longer_than_a_line_is_folded_and_its_figures_stay() -> None:
    lines = table_lines(["R@1"], [("x" * 200, ["12.34"])], 80)

    assert "".join(lines).count("x") == 200
    assert max(map(cell_len, lines)) <= 80
    assert "12.34" in " ".join(lines).split()


def test_texts_are_wrapped_at_words_beside_their_names() -> None:
    lines = list(term_lines([("name", "one two three " * 10), ("n", "short")], 60))

    assert max(map(len, lines)) <= 60
    assert all(line.startswith(" " * 9) for line in lines[1:-1])
    assert lines[-1] == "  n      short"
    assert list(term_lines([("name", "one " * 50)], None)) == [("  name   " + "one " * 50).rstrip()]


def test_notes_are_wrapped_beside_the_figures() -> None:
    lines = table_lines(["R"], [("a", ["1.0"]), ("b", ["2.0"])], 44, ["first note " * 4, "second"])

    assert max(map(len, lines)) <= 44
    assert lines[2].startswith("  a   1.0   first note")
    assert lines[-1] == "  b   2.0   second"
