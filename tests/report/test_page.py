import logging
from pathlib import Path

import plotly.graph_objects as go

from csalign.core.progress import recorded_call
from csalign.report.page import Entry, Section, write_page

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


def test_the_sides_have_their_own_names_but_in_what_users_wrote(tmp_path: Path) -> None:
    figure = go.Figure()
    figure.add_scatter(x=[1], y=[2], name="images", text=["an image"])
    figure.update_xaxes(title="cosine of an image and a text")
    names = {"image": "audio", "text": "description"}
    sections = [
        Section(
            "From text to image", "images lie here", figure, rows=[["", "texts"], ["image", "1"]]
        ),
        Section("Worst images", rows=[["query"], ["an image of a text"]], prose=True),
    ]
    write_page(tmp_path / "page.html", "an image set", sections, names)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    body, data = text.split("<body>")[1], text.split("Plotly.newPlot(")[-1]

    for shown in (
        "<h1>an image set</h1>",
        "<h2>From description to audio</h2>",
        "<p>audio lie here</p>",
        "<th>description</th>",
        "<td>audio</td>",
        "<td>an image of a text</td>",
    ):
        assert shown in body
    assert '"name":"audio"' in data
    assert "cosine of an audio and a description" in data
    assert "an image" in data
    assert go.Figure(figure).data[0].name == "images"


def test_every_page_shows_the_warnings_of_its_call(tmp_path: Path) -> None:
    with recorded_call("csalign eval features"):
        logging.getLogger("csalign.report").warning("few <b>rows</b>")
        logging.getLogger("csalign.report").warning("leaks")
        write_page(tmp_path / "page.html", "title", [Section("title")], summary="All is well.")
    head, _ = (tmp_path / "page.html").read_text(encoding="utf-8").split("</header>")

    assert "<p>All is well.</p>" in head
    assert "<strong>Warnings</strong>" in head
    assert "<li>few &lt;b&gt;rows&lt;/b&gt;</li><li>leaks</li>" in head
    write_page(tmp_path / "page.html", "title", [Section("title")])
    assert 'class="warnings"' not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_pictures_stand_side_by_side_without_any_script(tmp_path: Path) -> None:
    pictures = [Entry(HOSTILE, "1. <i>", b"jpeg"), Entry("no picture")]
    write_page(tmp_path / "page.html", "found", [Section("found", pictures=pictures)])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")

    assert text.count("<li>") == 2
    assert text.count("data:image/jpeg;base64,") == 1
    assert "<script" not in text
    assert "<h2>" not in text
    assert text.count("no picture</div>") == 1
    assert len(text) < 10_000
