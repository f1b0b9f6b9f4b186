"""Plot recall against what a closed gap serves, and name the rows that no other row beats.

Usage::

    python tests/benchmarks/gap/front.py DIR/gap.csv [--out front.html] [--corpora openclipart]

The CSV file is that of gap.py. Figures are means over seeds. A row is on a front if no other row is
at least as good in each figure and better in one.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

RECALL = "retrieval.mean_recall"
# Of each figure: its column, its name, and 1 if more is better.
AGAINST = (
    ("mixed.ndcg@10", "mixed NDCG@10, %", 1),
    ("groups.v_measure_1", "V-measure, %", 1),
    ("groups.knn.mean_1", "k-NN across sides, %", 1),
    ("gap.frechet", "Frechet distance", -1),
)


class Row(NamedTuple):
    """Means over seeds of a row's figures: recall, then those of `AGAINST`."""

    name: str
    figures: NDArray[np.float64]
    seeds: int


def read_rows(path: Path, corpus: str) -> list[Row]:
    """Read the rows of a corpus that have all figures."""
    with path.open(newline="", encoding="utf-8") as stream:
        lines = [line for line in csv.DictReader(stream) if line["corpus"] == corpus]
    keys = (RECALL, *(key for key, _, _ in AGAINST))
    rows = []
    for name in dict.fromkeys(line["row"] for line in lines):
        own = [line for line in lines if line["row"] == name and all(line[key] for key in keys)]
        if own:
            values = np.array([[float(line[key]) for key in keys] for line in own])
            rows.append(Row(name, values.mean(axis=0), len(own)))
    return rows


def front(rows: Sequence[Row], columns: Sequence[int]) -> list[Row]:
    """The rows that no other one beats in some columns of their figures; higher is better."""
    signs = np.array([1, *(sign for _, _, sign in AGAINST)])
    values = np.array([row.figures * signs for row in rows])[:, columns]
    no_worse = (values[:, None] >= values[None]).all(axis=2)  # [i, j]: i is as good as j
    better = (values[:, None] > values[None]).any(axis=2)
    beaten = (no_worse & better).any(axis=0)
    return [row for row, lost in zip(rows, beaten, strict=True) if not lost]


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: the front of recall with each figure, and of all together."""
    for number, (_, title, _) in enumerate(AGAINST, 1):
        own = sorted(front(rows, [0, number]), key=lambda row: -row.figures[0])
        names = "; ".join(
            f"{row.name} ({row.figures[0]:.1f}, {row.figures[number]:.3g})" for row in own
        )
        yield f"- recall and {title}: {names}"
    together = front(rows, range(len(AGAINST) + 1))
    yield f"- all: {'; '.join(row.name for row in together)}"


def figure(rows: Sequence[Row], corpus: str) -> go.Figure:
    """Recall against each figure; rows on the front of the two are filled."""
    chart = make_subplots(rows=2, cols=2, horizontal_spacing=0.1, vertical_spacing=0.12)
    for number, (_, title, _) in enumerate(AGAINST, 1):
        place = {"row": (number + 1) // 2, "col": 2 - number % 2}
        best = {row.name for row in front(rows, [0, number])}
        chart.add_scatter(
            x=[row.figures[0] for row in rows],
            y=[row.figures[number] for row in rows],
            text=[row.name if row.name in best else "" for row in rows],
            hovertext=[f"{row.name}, seeds: {row.seeds}" for row in rows],
            mode="markers+text",
            textposition="top left",
            marker_symbol=["circle" if row.name in best else "circle-open" for row in rows],
            showlegend=False,
            **place,
        )
        chart.update_xaxes(title="mean recall, %", **place)
        chart.update_yaxes(title=title, **place)
    return chart.update_layout(title=corpus, height=900)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("csv", type=Path, help="figures of gap.py")
    parser.add_argument("--corpora", default="openclipart,icons,clip")
    parser.add_argument("--out", type=Path, help="write a page with the plots")
    arguments = parser.parse_args()
    parts = []
    for corpus in arguments.corpora.split(","):
        if rows := read_rows(arguments.csv, corpus):
            print(
                f"\n{corpus}, {len(rows)} rows on {len(AGAINST)} fronts (recall, other figure):\n"
            )
            print("\n".join(lines(rows)))
            script = not parts
            parts.append(figure(rows, corpus).to_html(full_html=False, include_plotlyjs=script))
    if arguments.out:
        arguments.out.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
