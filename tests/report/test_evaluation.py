import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csalign.report.evaluation import RankedQuery, RunRecord, View, write_evaluation
from csalign.report.page import Entry

HOSTILE = "<b onmouseover='x'>%{x}</b></script><script>document.title='owned'</script>"
DIRECTION = {"R@1": 0.25, "R@5": 0.5, "R@10": 1.0, "median_rank": 2.5, "mrr": 0.4, "map": 0.4}
MIXED = {"ndcg@10": 0.2, "recall@10": 0.3, "same_side@10": 0.95}
DOCUMENT: dict[str, Any] = {
    "counts": {"images": 4, "texts": 4, "pairs": 4},
    "index": {"kind": "exact"},
    "retrieval": {
        "image_to_text": DIRECTION,
        "text_to_image": DIRECTION,
        "mean_recall": 0.5833,
    },
    "gap": {"centroid_distance": 0.1, "effective_rank": {"image": 3.0, "text": 2.0}},
    "mixed": {"image": MIXED, "text": MIXED, **MIXED},
    "groups": {
        **{"column": HOSTILE, "classes": 2, "images": 4, "texts": 4},
        **{"v_measure": 0.25, "ami": 0.2, "ari": 0.1},
        "knn": {"image_to_text": 0.75, "text_to_image": 0.5, "mean": 0.625, "majority": 0.5},
    },
    "intervals": {
        "mean_recall": [0.5, 0.6],
        "image_to_text": {"R@1": [0.2, 0.3]},
        "mixed": {"image": {"ndcg@10": [0.21, 0.22]}},
        "groups": {"knn": {"mean": [0.61, 0.64]}},
    },
}


def view(name: str, *, shared: bool) -> View:
    rows = np.random.default_rng(0).normal(size=(2, 4, 2))
    cosines = (rows[0, :, 0], rows[1, :, 0]) if shared else None
    return View(name, rows[0], rows[1], (0.5, 0.4), cosines, (np.ones(3), np.ones(2)))


def write(path: Path, *views: View) -> str:
    item = Entry(HOSTILE, HOSTILE, b"\xff\xd8jpeg")
    metrics: list[dict[str, Any]] = [
        {"step": 0, "validation": {"mean_recall": 0.1, "centroid_distance": 0.2}},
        {"step": 1, "loss": 2.0, "pairwise": 2.0, "pairwise_others": None, "divergence": None},
        {"step": 2, "loss": 1.0, "pairwise": 1.0, "pairwise_others": None, "divergence": None},
    ]
    write_evaluation(
        path,
        HOSTILE,
        DOCUMENT,
        views,
        [HOSTILE] * 4,
        {"Worst": [RankedQuery(item, 3, item, item)]},
        RunRecord(metrics, {"out": HOSTILE}, {"packages": {"torch": HOSTILE}}),
    )
    return path.read_text(encoding="utf-8")


def test_captions_stay_text_in_tables_and_in_what_plotly_shows(tmp_path: Path) -> None:
    text = write(tmp_path / "page.html", view("before", shared=False), view("after", shared=True))
    figures = text.split("Plotly.newPlot(")

    assert "<script>document" not in text
    assert "&lt;b onmouseover" in figures[0]
    for figure in figures[-6:]:
        assert "\\u003cb onmouse" not in figure  # Plotly would take it for its own bold
    assert sum("&lt;b onmouse" in figure for figure in figures[-6:]) >= 2


def test_figures_carry_their_intervals(tmp_path: Path) -> None:
    text = write(tmp_path / "page.html", view("", shared=True))

    assert "<td>25.00<small>20.00 to 30.00</small></td>" in text
    assert "<td>58.33<small>50.00 to 60.00</small></td>" in text
    assert "<td>image to text R@1 % ↑</td>" in text
    assert "<td>20.00<small>21.00 to 22.00</small></td>" in text
    assert "<td>62.50<small>61.00 to 64.00</small></td>" in text
    assert "2 classes, 4 images, 4 texts" in text
    assert "the gap hides the other side in a mixed index" in text


def test_the_curves_show_every_loss_term_of_the_log(tmp_path: Path) -> None:
    line = {"step": 1, "loss": 2.0, "pairwise": 1.0, "token": 0.5, "divergence": None}
    line |= {"new_term": 0.1, "learning_rate": 0.1, "gradient_norm": 1.0}
    page = tmp_path / "page.html"
    write_evaluation(page, "run", None, [], [], {}, RunRecord([line], {}, {}))
    curves = page.read_text(encoding="utf-8").split("Plotly.newPlot(")[-1]

    for name in ("loss", "pairwise", "token", "new term"):
        assert f'"name":"{name}"' in curves
    for name in ("divergence", "learning rate", "gradient norm"):
        assert f'"name":"{name}"' not in curves


def test_what_follows_the_steps_is_said_beside_the_curves(tmp_path: Path) -> None:
    score = {"mean_recall": 0.5, "mrr": 0.4, "centroid_distance": 0.1}
    lines: list[dict[str, Any]] = [{"step": 1, "validation": score}]
    lines += [{"step": 1, "validation": {**score, "mean_recall": 0.625}, "matched": True}]
    lines += [{"step": 1, "refit": {"pairs": 1_200, "steps": 1}}]
    page = tmp_path / "page.html"
    write_evaluation(page, "run", None, [], [], {}, RunRecord(lines, {}, {}))
    text = page.read_text(encoding="utf-8")

    assert "all parts: recall 62.50 %, centroid distance 0.1000." in text
    assert "fitted again on 1,200 pairs" in text


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_draws_every_figure_and_asks_for_nothing(
    tmp_path: Path, browser: Any, dark: bool
) -> None:
    page = tmp_path / "page.html"
    text = write(page, view("before", shared=False), view("after", shared=True))
    figures = text.count('class="plotly-graph-div"')
    browser.open(page, dark=dark)
    drawn = browser.evaluate("document.querySelectorAll('.plotly-graph-div .main-svg').length")
    bars = browser.evaluate("document.querySelector('.plotly-graph-div').innerHTML")
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = browser.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill")
    title = browser.evaluate("document.title")

    assert figures == 6
    assert drawn >= figures
    assert browser.complaints() == []
    assert browser.requested() == [page.as_uri()]
    assert title == HOSTILE
    assert 'data-title="Zoom' in bars
    assert 'data-title="Share' not in bars
    assert (_brightness(ground) < 60) == dark
    assert (_brightness(ink) > 200) == dark


def test_a_phone_shows_every_number_whole_and_each_legend_below_its_plot(
    tmp_path: Path, browser: Any
) -> None:
    page = tmp_path / "page.html"
    write(page, view("before", shared=False), view("after", shared=True))
    screen = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.open(page)
    browser.call("Emulation.setDeviceMetricsOverride", **screen)
    browser.wait_for("document.querySelector('.main-svg').getBoundingClientRect().width < 390")

    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.evaluate(_BROKEN) == []
    assert browser.evaluate(_COVERING) == []


def test_the_mouse_over_a_point_shows_its_caption(tmp_path: Path, browser: Any) -> None:
    page = tmp_path / "page.html"
    write(page, view("", shared=True))
    browser.open(page)
    browser.evaluate("document.querySelector('.plotly-graph-div').scrollIntoView()")
    x, y = browser.wait_for(_PLACE)
    assert browser.evaluate("document.querySelectorAll('.hovertext').length") == 0
    browser.move(x - 1, y)
    browser.move(x, y)
    label = browser.wait_for("document.querySelector('.hovertext')?.textContent")

    assert label == f"images{HOSTILE}"
    assert browser.complaints() == []


# Cells of numbers, and words of labels, that take more than a line.
_BROKEN = """[...document.querySelectorAll("table:not(.prose) td + td")].filter(cell => {
  const range = document.createRange();
  range.selectNode(cell.firstChild);
  return range.getClientRects().length > 1;
}).map(cell => cell.textContent)"""
# Legends that reach into the axes of their plot or the titles of these.
_COVERING = """[...document.querySelectorAll(".plotly-graph-div")].filter(plot => {
  const legend = plot.querySelector(".legend")?.getBoundingClientRect();
  const axes = [...plot.querySelectorAll(".xtick text, .xtitle")];
  const lowest = Math.max(...axes.map(each => each.getBoundingClientRect().bottom));
  return legend && legend.top < lowest - 1;
}).map(plot => plot.id)"""


# Where the window has the first image of the first figure.
_PLACE = """(() => {
  const plot = document.querySelector(".plotly-graph-div"), {xaxis, yaxis} = plot._fullLayout ?? {};
  if (!xaxis?.l2p) return null;
  const {left, top} = plot.getBoundingClientRect(), {x, y} = plot.data[0];
  return [left + xaxis._offset + xaxis.l2p(x[0]), top + yaxis._offset + yaxis.l2p(y[0])];
})()"""


def _brightness(colour: str) -> float:
    return float(np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]))
