"""How a step of the objective grows with the batch and with the width.

    python tests/benchmarks/objective/growth.py --plot growth.html [--rounds 3]
        [--batches 1024,2048,4096,8192] [--widths 128,256,512,1024]

Each case of `step.py` that is named below runs in a process of its own, rounds by turns, on one
thread: CPU seconds, and the peak of memory beyond the embeddings. Batches are 512 wide, widths have
batches of 4,096 pairs. The growth is the slope of a line through the logarithms of the medians: 2
where twice as much takes four times as long. Training as the set grows is `train/streaming.py`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from step import WIDTH, measure_peak

CASES = ("clip", "dense", "csalign", "infonce")
BATCH = 4_096
DENSE_MOST = 8_192  # the plain formulas take 3 GB there
Curve = dict[int, tuple[float, float]]


def curves(sizes: Sequence[tuple[int, int]], rounds: int) -> dict[str, Curve]:
    """Seconds and MB of each case by size; sizes are (rows, width)."""
    found: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for rows, width in sizes:
            for case in CASES:
                if case != "dense" or rows <= DENSE_MOST:
                    megabytes, seconds = measure_peak(case, rows, width)
                    found.setdefault((case, rows, width), []).append((seconds, megabytes))
    by_rows = len({rows for rows, _ in sizes}) > 1
    lines: dict[str, Curve] = {case: {} for case in CASES}
    for (case, rows, width), runs in found.items():
        seconds, megabytes = (statistics.median(values) for values in zip(*runs, strict=True))
        lines[case][rows if by_rows else width] = seconds, megabytes
    return lines


def growth(curve: Curve, which: int) -> float:
    """Slope of the logarithm by the logarithm of the size."""
    sizes = np.log(list(curve))
    return float(np.polyfit(sizes, np.log([values[which] for values in curve.values()]), 1)[0])


def show(title: str, lines: dict[str, Curve]) -> None:
    """Print a table: seconds, MB and growth of both."""
    sizes = sorted({size for curve in lines.values() for size in curve})
    print(f"\n| {title} | " + " | ".join(f"{size:,}" for size in sizes) + " | growth: s, MB |")
    print("| --- |" + " --- |" * (len(sizes) + 1))
    for case, curve in lines.items():
        cells = [
            f"{curve[size][0]:.3g} s, {curve[size][1]:.0f} MB" if size in curve else ""
            for size in sizes
        ]
        fitted = f"{growth(curve, 0):.2f}, {growth(curve, 1):.2f}"
        print(f"| {case} | " + " | ".join(cells) + f" | {fitted} |", flush=True)


def plot(tables: dict[str, dict[str, Curve]], page: Path) -> None:
    """Draw all of it, both axes logarithmic."""
    figure = make_subplots(2, len(tables), column_titles=list(tables), row_titles=["CPU s", "MB"])
    for column, lines in enumerate(tables.values(), 1):
        for colour, (case, curve) in enumerate(lines.items()):
            for which in range(2):
                figure.add_scatter(
                    x=list(curve),
                    y=[values[which] for values in curve.values()],
                    name=case,
                    legendgroup=case,
                    showlegend=column == 1 and which == 0,
                    line_color=f"hsl({90 * colour}, 60%, 45%)",
                    row=which + 1,
                    col=column,
                )
    figure.update_xaxes(type="log").update_yaxes(type="log")
    go.Figure(figure).write_html(page)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1024,2048,4096,8192")
    parser.add_argument("--widths", default="128,256,512,1024")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, required=True)
    arguments = parser.parse_args()
    batches, widths = (
        [int(size) for size in sizes.split(",")] for sizes in (arguments.batches, arguments.widths)
    )
    tables = {}
    for title, sizes in (
        ("pairs", [(rows, WIDTH) for rows in batches]),
        ("width", [(BATCH, width) for width in widths]),
    ):
        tables[title] = curves(sizes, arguments.rounds)
        show(title, tables[title])
    plot(tables, arguments.plot)


if __name__ == "__main__":
    main()
