from pathlib import Path

import plotly.graph_objects as go

from csalign.report.page import Section, write_page

HOSTILE = "</script><script>alert(1)</script>"


def test_a_hostile_caption_stays_text_wherever_it_stands(tmp_path: Path) -> None:
    figure = go.Figure()
    figure.add_scatter(x=[1], y=[2], text=[HOSTILE], name=HOSTILE)
    write_page(
        tmp_path / "page.html",
        HOSTILE,
        [Section(HOSTILE, HOSTILE, figure, rows=[[HOSTILE], [HOSTILE]])],
    )
    text = (tmp_path / "page.html").read_text(encoding="utf-8")

    assert "alert(1)" in text
    assert "<script>alert" not in text


def test_a_page_stands_whole_where_an_older_one_stood(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for title in ("first", "second"):
        write_page(page, title, [Section("nothing")])

    assert "<h1>second</h1>" in page.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
