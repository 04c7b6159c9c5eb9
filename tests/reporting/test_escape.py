"""Text of data, models, servers and raters is shown wherever it lands, and never obeyed.

| field | example | right value |
|---|---|---|
| a cell, a label, a title of a table; notebook 04's case study | `<img src=x onerror=…>`, a link, a script | its text |
| a judge's name, a note, a setting of claims.md and differences.md | the same | its text |
| an executed notebook's Markdown on the site | the same | its text |
"""

from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest

from deftlib.profile import Profile
from deftlib.reporting import claims, claims_page, escape, records, report, site

HOSTILE = (
    '<img src=x onerror="alert(1)"> [click](javascript:alert(1)) <script>alert(1)</script> ![pixel](http://evil/x.png) '
    "<https://evil> www.evil.example <svg/onload=alert(1)> a | b `c` $d$ &lt;b&gt;"
)
OURS = {"table", "thead", "tbody", "tr", "th", "td", "p", "strong", "br", "u", "h1", "h2", "ul", "ol", "li", "a"}
OURS |= {"code", "em"}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.links, self.said = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attributes)
        self.links += [value for name, value in attributes if name in ("href", "src")]

    def handle_data(self, data):
        self.said += data


def shown(markdown):
    """What a browser would make of Markdown on the site."""
    html = site.to_html(markdown, {})
    assert site.foreign(html) == []
    page = Page(html)
    assert set(page.tags) <= OURS, set(page.tags) - OURS
    assert not any("evil" in link or "javascript" in link for link in page.links)
    return page.said


def test_a_table_shows_what_others_wrote(tmp_path, monkeypatch):
    frame = pd.DataFrame({HOSTILE: [HOSTILE, "x"]}, index=pd.Index([HOSTILE, "y"], name="method"))
    said = shown(report.as_markdown(frame))
    assert said.count("alert(1)") == 3 * HOSTILE.count("alert(1)") and "a | b `c` $d$ &lt;b&gt;" in said


def test_claims_and_differences_show_what_others_wrote():
    part = claims.parts(records.published())
    record = {"ours": [1.0, 0.5, 1.5, 9], "p": 0.01, "p_matters": None, "seeds": 3, "visible": [1.0] * 9}
    record |= {"judge": {"name": HOSTILE, "accuracy": {}}, "note": HOSTILE, "notebook": "04_evaluation"}
    record |= {"command": "deft run", "seconds": 1.0, "created": "2026-11-28T00:00:00"}
    profile = Profile.load("mini", {"mt_bench.judge.model": HOSTILE})
    said = shown(claims_page.page(profile, part, {"data-volume": record}))
    assert said.count("[click](javascript:alert(1))") == 2  # the judge's name, the note
    assert "<script>alert(1)</script>" in shown(claims_page.differences(profile))


@pytest.mark.parametrize("text", ["plain", "R_dis, D_3", "-0.3 [-0.5, 0.1]", "50 %", "(one) [two]"])
def test_ordinary_text_stays_readable(text):
    assert escape.markdown(text) == text


def test_markdown_that_a_notebook_displays_is_shown_on_the_site():
    cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("display_data", {"text/markdown": HOSTILE})])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    html = site._cells(notebook, {}, {})
    assert site.foreign(html) == [] and "&lt;script&gt;alert(1)" in html and "pixel (http://evil/x.png)" in html


def test_what_runs_by_itself_is_found():
    runs = '<img src="x" onerror="a()">', "<svg onload=a()>", "<a href=' javascript:a()'>x</a>", "<script>a()</script>"
    for html in runs:
        assert site.foreign(html), html
