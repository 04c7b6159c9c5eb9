"""Executed notebooks become pages to read: complete, linked with each other, and asking the network for nothing."""

import json
import re
from pathlib import Path

import nbformat
import pytest
import warm
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from deftlib import store
from deftlib.profile import Profile
from deftlib.reporting import site

ROOT = Path(__file__).resolve().parents[2]
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
MINI = Profile.load("mini")
MADE = {
    "created": "2026-11-21T10:00:00+00:00",
    "git": {"commit": "0123456789abcdef", "dirty": True},
    "device": "CPU x86_64",
    "cores": 2,
    "python": "3.11.7",
}
ENTRY = {"command": "deft run notebooks/01_count.ipynb", "stages": ["policies/sft-1"], "drawn": MADE}


def shown(data):
    return new_output("display_data", data)


def notebook(*cells):
    """As papermill leaves it: with the cell of parameters it puts in."""
    injected = new_code_cell('profile = "mini"', metadata={"tags": ["injected-parameters"]}, execution_count=2)
    return new_notebook(cells=[cells[0], new_code_cell('profile = "mini"', execution_count=1), injected, *cells[1:]])


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of two executed notebooks, one figure, one table and one claim."""
    monkeypatch.setattr(store, "ROOT", tmp_path)
    folder, figures = tmp_path / "build/mini/notebooks", tmp_path / "figures/mini"
    folder.mkdir(parents=True)
    figures.mkdir(parents=True)
    first = notebook(
        new_markdown_cell(
            "# Counting\n\nInline $q_{v}$ and\n\n$$\\frac{1}{T} \\sum_t z_t$$\n\nsee [02](02_more.ipynb)"
        ),
        new_code_cell(
            'x < 1\nreport.save_figure(profile, "fig9", f)',
            outputs=[
                new_output("stream", text="\x1b[31mred\x1b[0m a < b\n"),
                new_output("stream", text="step 2\n"),
                shown({"image/png": DOT}),
            ],
        ),
        new_code_cell('save_table(profile, "table9", t)', outputs=[shown({"text/html": "<table><td>7</td></table>"})]),
    )
    second = notebook(new_markdown_cell("# More\n\nof it"), new_code_cell("1 + 1"))
    nbformat.write(first, folder / "01_count.ipynb")
    nbformat.write(second, folder / "02_more.ipynb")
    (folder / "mini,grading.top=1.0,12345678").mkdir()
    nbformat.write(second, folder / "mini,grading.top=1.0,12345678" / "04_other_setting.ipynb")
    nbformat.write(second, folder / "03_broken.failed.ipynb")
    for name in ("fig9.png", "fig9.pdf", "fig9.csv", "table9.csv", "table9.tex"):
        (figures / name).write_bytes(b"x")
    (figures / "table9.md").write_text("**A title**\n\n| a | b |\n|---|---|\n| **1.5** | <u>0.5</u> |\n")
    claim = "[01_count, cell 3](../../notebooks/01_count.ipynb)"
    (figures / "claims.md").write_text(
        f"# Claims\n\nSee [differences.md](differences.md).\n\n| at |\n|---|\n| {claim} |\n"
    )
    (figures / "differences.md").write_text("# Differences\n\n1. [test_x](../../tests/test_x.py)\n")
    links = "[02](02_more.ipynb), [07](07_never_run.ipynb), [losses](../deftlib/method/losses.py), [2405.1] and $m$"
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/related_methods.md").write_text(
        f"# Related\n\n{links}\n\n$$-\\log \\sigma(\\beta m)$$\n\n[2405.1]: https://arxiv.org/abs/2405.1\n"
    )
    titles = {"fig9": "It rises < 1", "table9": "A title"}
    made = {name: {"title": title, "notebook": "01_count", **ENTRY} for name, title in titles.items()}
    stages = {"policies/sft-1": {**MADE, "seconds": 41.6}}
    (figures / "provenance.json").write_text(json.dumps({"artefacts": made, "stages": stages}))
    return tmp_path


@pytest.fixture
def pages(project):
    folder = site.build(MINI).parent
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.html")}


def test_there_is_a_page_for_each_finished_notebook_and_one_over_all(pages):
    assert pages.keys() == {"index", "differences", "related_methods", "01_count", "02_more"}
    for name in ("differences", "related_methods", "01_count", "02_more"):
        assert f'<a href="{name}.html">{name.replace("_", " ")}</a>' in pages["index"]
    assert "<title>Counting</title>" in pages["01_count"]


def test_nothing_is_run_or_fetched_from_elsewhere(pages, project):
    for page in pages.values():
        assert "<script" not in page
        assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//", page)
    assert not re.search(r"@import|url\(", (project / "build/mini/site/style.css").read_text())


def test_every_link_leads_somewhere(pages, project):
    folder = project / "build/mini/site"
    for path in ("tests/test_x.py", "deftlib/method/losses.py", "notebooks/07_never_run.ipynb"):
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).touch()
    for name, page in pages.items():
        for url in re.findall(r"(?:href|src)=\"([^\"]+)\"", page):
            path, _, anchor = url.partition("#")
            if url.startswith(("data:", "https://arxiv.org/")):
                continue
            target = folder / path if path else folder / f"{name}.html"
            assert target.exists(), url
            assert not anchor or f'id="{anchor}"' in target.read_text(), url


def test_the_page_of_related_methods_is_like_the_others(pages, project):
    page = pages["related_methods"]
    assert "<title>Related methods</title>" in page
    assert re.search(r'<math[^>]* display="block"[^>]*>', page) and "$" not in page
    assert re.findall('href="([^"]+)">(?:02|07|losses|2405.1)<', page) == [
        "02_more.html",
        "../../../notebooks/07_never_run.ipynb",
        "../../../deftlib/method/losses.py",
        "https://arxiv.org/abs/2405.1",
    ]
    assert 'href="related_methods.html"' in site.to_html("[more](related_methods.md)", {})
    (project / "notebooks/related_methods.md").unlink()
    assert not (site.build(MINI).parent / "related_methods.html").exists()


def test_formulas_are_mathml(pages):
    page = pages["01_count"]
    assert "<msub><mi>q</mi><mrow><mi>v</mi></mrow></msub>" in page
    assert re.search(r'<math[^>]* display="block"[^>]*>.*<mfrac>', page)
    assert "$" not in page


def test_code_text_tables_and_pictures_are_there(pages):
    page = pages["01_count"]
    assert '<span class="o">&lt;</span>' in page  # highlighted and escaped
    assert "ansi-red-fg" in page and "\x1b" not in page
    assert "a &lt; b\nstep 2\n" in page  # as it was printed, without gaps
    assert "<td>7</td>" in page
    (picture,) = re.findall(r"<img[^>]*>", page)
    assert 'alt="It rises &lt; 1"' in picture and f"base64,{DOT}" in picture  # described by the figure's title


def test_cells_have_the_numbers_of_the_committed_notebook(pages):
    numbers = re.findall(r"In\s\[(.*?)\]", pages["02_more"])
    assert [number.strip() for number in numbers] == ["1", "", "2"]  # papermill's own has none


def test_the_overview_shows_claims_figures_and_tables_with_links_to_their_cells(pages):
    page = pages["index"]
    assert '<a href="01_count.html#cell-id=in-3">01_count, cell 3</a>' in page
    assert '<img src="figures/fig9.png" alt="It rises &lt; 1">' in page
    assert '<a href="01_count.html#cell-id=in-2">cell 2</a>' in page
    assert "<strong>1.5</strong>" in page and "<u>0.5</u>" in page and 'href="figures/table9.tex"' in page
    assert page.index('id="fig9"') < page.index('id="table9"')  # in the order of their cells
    assert "commit 0123456789 with changes, CPU x86_64, 2 cores" in page


def test_a_widget_is_named_in_place_of_being_shown(project):
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "VBox()"}
    path = project / "build/mini/notebooks/02_more.ipynb"
    nbformat.write(notebook(new_markdown_cell("# Rate"), new_code_cell("page", outputs=[shown(widget)])), path)
    page = (site.build(MINI).parent / "02_more.html").read_text()
    assert "open this notebook in JupyterLab" in page and "VBox" not in page


@pytest.mark.parametrize(
    ("html", "fetched"),
    [
        ('<script>alert("x")</script>', "a script"),
        ('<img src="https://example.org/x.png">', "https://example.org/x.png"),
        ('<link href="//example.org/x.css">', "//example.org/x.css"),
        ("<style>@import 'http://example.org/a.css';</style>", "http://example.org/a.css"),
        ('<p style="background: url(https://example.org/b)">', "https://example.org/b"),
    ],
)
def test_a_page_that_would_fetch_something_is_refused_and_the_site_before_stays(project, html, fetched):
    assert site.foreign(html) == [fetched]
    before = site.build(MINI).read_text()
    path = project / "build/mini/notebooks/02_more.ipynb"
    nbformat.write(notebook(new_markdown_cell("# Bad"), new_code_cell("x", outputs=[shown({"text/html": html})])), path)
    with pytest.raises(site.SiteError, match=re.escape(f"02_more would fetch {fetched}")):
        site.build(MINI)
    assert (project / "build/mini/site/index.html").read_text() == before


def test_links_to_click_on_and_addresses_in_code_are_no_fetching():
    assert site.foreign('<a href="https://example.org">x</a><code>url("https://example.org")</code>') == []


def test_before_anything_was_executed_it_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    with pytest.raises(site.SiteError, match="run `make paper PROFILE=mini` first"):
        site.build(MINI)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_formula_of_our_notebooks_is_set(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            html = site.to_html(cell.source, {})
            assert "$" not in re.sub(r"(?s)<(code|pre)\b.*?</\1>", "", html)
            assert not any("\\" in formula for formula in re.findall(r"(?s)<math.*?</math>", html)), cell.source


def test_the_command_explains_itself_and_names_a_wrong_profile():
    run = lambda *options: warm.deft("site", *options, cwd=ROOT)
    assert "usage:" in run("--help").stdout
    wrong = run("--profile", "minni")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: no profile 'minni'")
