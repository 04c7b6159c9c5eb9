"""A report to read: executed notebooks, tables, figures and claims as static pages that ask the network for nothing.

    deft site --profile mini           # build/mini/site/index.html, after `make paper`

The pages hold no script, no foreign font and no foreign picture; formulas are MathML, which browsers set themselves.
"""

import argparse
import re
import shutil
from html import escape
from html.parser import HTMLParser

import nbformat
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from deftlib import store
from deftlib.command import one_sentence
from deftlib.profile import Profile, add_options
from deftlib.reporting import claims_page
from deftlib.reporting.records import made_with, recorded_provenance

SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]  # no scripts
INJECTED = "injected-parameters"  # papermill's tag of the cell with this run's parameters
WIDGET = "*Here stands something to click on: open this notebook in JupyterLab (`make lab`).*"
TEXTS = {  # pages that no cell wrote
    "differences": "Differences from the paper",
    "related_methods": "Related methods",
    "promises": "What we promise and how it is tested",
    "what_fits_where": "What fits where",
}
FETCHING = {"script", "link", "img", "iframe", "embed", "object", "source", "audio", "video"}  # tags, unasked


_RUNS = re.compile(r"\s*(?:javascript|vbscript|data:text/html)", re.IGNORECASE)  # addresses that are programs
# Tags that our own Markdown uses, without attributes; what else stands in it as HTML is shown as text.
_OWN_TAG = re.compile(r"(?P<own></?(?:u|b|i|br|sub|sup|code|details|summary)\s*/?>)|<[^>]*>?")


class SiteError(RuntimeError):
    """There is nothing to show yet, or a page would fetch something from elsewhere."""


def build(profile):
    """Path of `build/<profile>/site/index.html`, made anew from what was executed. Raises SiteError.

    After overrides it is `site-<label>/`, from the figures and the executed notebooks of that setting.
    """
    home, figures = store.build_dir(profile.name), store.figures_dir(profile.label)
    variant = "" if profile.label == profile.name else profile.label
    notebooks, site = executed(home / "notebooks" / variant), home / f"site-{variant}".removesuffix("-")
    if not notebooks or not (figures / "provenance.json").is_file():
        raise SiteError(
            f"nothing to show: build/{profile.name}/notebooks/{variant} or figures/{profile.label}/ holds no result; "
            f"run `make paper PROFILE={profile.name}` first, or `deft run` with the same --set options"
        )
    recorded = recorded_provenance(figures / "provenance.json")
    made = recorded["artefacts"]
    titles = {"index": f"DEFT, reproduced: profile {profile.label}"}
    bodies = {"index": _overview(figures, recorded, notebooks)}
    for name in TEXTS:
        folder = figures if name == "differences" else store.ROOT / "notebooks"
        if (folder / f"{name}.md").is_file():
            titles[name] = TEXTS[name]
            bodies[name] = to_html((folder / f"{name}.md").read_text(encoding="utf-8"), notebooks)
    for name, notebook in notebooks.items():
        titles[name], bodies[name] = title_of(notebook), _cells(notebook, made, notebooks)
    work = site.with_name(site.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(figures, work / "figures")
    for name, body in bodies.items():
        page = _page(name, titles, body, made)
        if fetched := foreign(page):
            raise SiteError(f"{name} would fetch {', '.join(fetched)}: a page that works offline cannot")
        store.write_atomic(work / f"{name}.html", page)
    store.write_atomic(work / "style.css", HtmlFormatter(style="friendly").get_style_defs(".highlight") + STYLE)
    shutil.rmtree(site, ignore_errors=True)
    work.rename(site)
    return site / "index.html"


def executed(folder):
    """{name: notebook} of the finished copies in a folder; code cells are numbered as in the committed notebook."""
    paths = [path for path in sorted(folder.glob("*.ipynb")) if "." not in path.stem]  # no .failed, .running
    notebooks = {path.stem: nbformat.read(path, as_version=4) for path in paths}
    for notebook in notebooks.values():
        for cell in notebook.cells:
            if INJECTED in cell.metadata.get("tags", []):
                cell["execution_count"] = None
        for number, cell in enumerate(_code_cells(notebook), start=1):
            cell["id"], cell["execution_count"] = f"in-{number}", number
    return notebooks


def _code_cells(notebook):
    """Its code cells but the one that papermill put in, so that their numbers are those of the committed notebook."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in code if INJECTED not in cell.metadata.get("tags", [])]


def title_of(notebook):
    """The first heading of a notebook."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    found = re.search(r"^# +(.+)$", text, re.MULTILINE)
    return found[1] if found else "untitled"


def to_html(text, notebooks):
    """Markdown as HTML: formulas as MathML, links to notebooks and to files of the project as links from the site."""
    return MarkdownWithMath(renderer=_Renderer(notebooks)).render(text)


class _Renderer(IPythonRenderer):
    def __init__(self, notebooks):
        super().__init__(escape=False)
        self.notebooks = notebooks

    def inline_math(self, body):
        return convert(body)

    def block_math(self, body):
        return convert(body, display="block")

    def inline_html(self, html):
        return _OWN_TAG.sub(lambda tag: tag[0] if tag["own"] else escape(tag[0]), html)

    def block_html(self, html):
        return self.inline_html(html)

    def image(self, text, url, title=None):
        if "://" in url or url.startswith("//"):
            return escape(f"{text} ({url})")  # a picture from elsewhere is told, not fetched
        return super().image(text, url, title)

    def link(self, text, url, title=None):
        if _RUNS.match(url):
            return f"{text} ({escape(url)})"
        name, is_notebook, _ = url.rpartition("/")[2].partition(".ipynb")
        if is_notebook and name in self.notebooks:
            number = re.search(r"cell (\d+)$", text)  # as claims.md writes it
            url = _address(name, number and number[1])
        elif url == f"{name}.ipynb":
            url = f"../../../notebooks/{url}"  # not executed here: the committed one
        elif url.removesuffix(".md") in TEXTS:
            url = url.replace(".md", ".html")
        elif url.startswith("../"):
            url = "../../../" + url.replace("../", "")  # the project's folder, seen from build/<profile>/site/
        return super().link(text, url, title)


def _address(name, number):
    return f"{name}.html#cell-id=in-{number}" if number else f"{name}.html"


class _Exporter(HTMLExporter):
    """nbconvert's `basic` template: cells without the page around them that loads scripts from a CDN."""

    notebooks = ()

    @pass_context
    def markdown2html(self, context, source):
        return to_html(source, self.notebooks)


def _cells(notebook, made, notebooks):
    """The cells of one notebook as HTML."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        drawn = [name for name in made if claims_page.cell_of([cell.source], "save_figure", name)]
        cell.metadata["alt"] = made[drawn[0]]["title"] if drawn else "drawn by the cell above"
        for output in cell.get("outputs", []):
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                output["data"] = nbformat.from_dict({"text/markdown": WIDGET})
    config = {"NbConvertBase": {"display_data_priority": SHOWN}, "CoalesceStreamsPreprocessor": {"enabled": True}}
    exporter = _Exporter(template_name="basic", config=Config(config))
    exporter.notebooks = notebooks
    return exporter.from_notebook_node(notebook)[0]


def _overview(figures, recorded, notebooks):
    """The claims, then every figure and table, in the order of the cells that made them."""
    made, stages = recorded["artefacts"], recorded["stages"]
    parts = ["<h1>DEFT, reproduced</h1>"]
    if (figures / "claims.md").is_file():
        text = (figures / "claims.md").read_text(encoding="utf-8").replace("# ", "## ", 1)
        parts.append(f'<section class="claims">{to_html(text, notebooks)}</section>')
    for name in sorted({entry["notebook"] for entry in made.values()}):
        known = notebooks.get(name)
        sources = [cell.source for cell in _code_cells(known)] if known else []
        cells = {each: _saving(sources, each) for each in made if made[each]["notebook"] == name}
        command = next(entry["command"] for entry in made.values() if entry["notebook"] == name)
        heading = f'<a href="{name}.html">{escape(title_of(known))}</a>' if known else f"From {escape(command)}"
        parts.append(f"<h2>{heading}</h2>")
        for each in sorted(cells, key=lambda each: cells[each] or 0):
            cell = f"cell {cells[each]}" if cells[each] else name
            where = f'<a href="{_address(name, cells[each])}">{cell}</a>' if known else name
            rests_on = made_with([stages[stage] for stage in made[each]["stages"] if stage in stages])
            if made[each].get("settings", recorded.get("settings")) != recorded.get("settings"):
                rests_on = f"made before the profile's file was edited: run its notebook again. {rests_on}".rstrip()
            parts.append(_artefact(each, made[each]["title"], figures, where, rests_on, notebooks))
    return "\n".join(parts)


def _saving(sources, name):
    """Number of the cell that saves this table or figure, None if none does."""
    return claims_page.cell_of(sources, "save_table", name) or claims_page.cell_of(sources, "save_figure", name)


def _artefact(name, title, figures, where, rests_on, notebooks):
    """One figure or table with its title, its files, the cell that made it, and what that rests on."""
    files = [f'<a href="figures/{path.name}">{path.suffix[1:]}</a>' for path in sorted(figures.glob(f"{name}.*"))]
    caption = f"<figcaption><b>{name}</b> {escape(title)}<br>{where} · {' · '.join(files)}"
    caption += f"<br>{escape(rests_on)}</figcaption>" if rests_on else "</figcaption>"
    if (figures / f"{name}.png").is_file():
        return f'<figure id="{name}"><img src="figures/{name}.png" alt="{escape(title)}">{caption}</figure>'
    table = (figures / f"{name}.md").read_text(encoding="utf-8").partition("\n\n")[2]
    return f'<figure id="{name}" class="table">{caption}{to_html(table, notebooks)}</figure>'


def _page(name, titles, body, made):
    """A whole page: navigation, body, the pages before and after, and what it was all made with."""
    label = {"index": "overview"} | {each: each.replace("_", " ") for each in titles if each != "index"}
    links = {each: f'<a href="{each}.html">{label[each]}</a>' for each in titles}
    here = "".join(f"<b>{label[each]}</b>" if each == name else links[each] for each in titles)
    order = list(titles)
    at = order.index(name)
    before = f"← {links[order[at - 1]]}" if at else ""
    after = f"{links[order[at + 1]]} →" if at + 1 < len(order) else ""
    last = max((entry["drawn"] for entry in made.values()), key=lambda drawn: drawn["created"])
    git = last["git"] or {"commit": "unknown", "dirty": False}
    state = f"commit {git['commit'][:10]}" + " with changes" * git["dirty"]
    machine = f"{last['device']}, {last['cores']} cores, Python {last['python']}"
    about = {"title": escape(titles[name]), "made": f"{last['created'][:10]}, {state}, {machine}"}
    return PAGE.format(navigation=here, body=body, before=before, after=after, **about)


def foreign(page):
    """What an HTML page would run, or fetch from elsewhere without a click; [] for one that works offline."""
    finder = _Finder(convert_charrefs=True)
    finder.feed(page)
    return list(finder.found)


class _Finder(HTMLParser):
    found, in_style = (), False

    def handle_starttag(self, tag, attributes):
        self.in_style = tag == "style"
        if tag == "script":
            self.found += ("a script",)
        for name, value in attributes:
            if name.startswith("on") or _RUNS.match(value or ""):
                self.found += (f"{name} of <{tag}>",)
            if name == "style":
                self.handle_style(value or "")
            elif tag in FETCHING and name in ("src", "href", "data", "srcset", "poster"):
                self.found += tuple(re.findall(r"^\s*((?:https?:)?//.*)", value or ""))

    def handle_data(self, data):
        if self.in_style:
            self.handle_style(data)

    def handle_endtag(self, tag):
        self.in_style = False

    def handle_style(self, css):
        self.found += tuple(re.findall(r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')\s]+)", css))


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="style.css">
</head>
<body>
<nav>{navigation}</nav>
<main>
{body}
</main>
<footer><p class="turn"><span>{before}</span><span>{after}</span></p><p>Made {made}.</p></footer>
</body>
</html>
"""

STYLE = """\
:root { --ink: #1c1c1c; --soft: #5f6368; --line: #e3e3e3; --blue: #0072b2; --paper: #f7f7f5; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: white; font: 17px/1.6 Charter, Georgia, "Times New Roman", serif; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; padding: 0.7rem 1.5rem; border-bottom: 1px solid var(--line);
  font: 14px/1.6 system-ui, sans-serif; position: sticky; top: 0; background: white; }
main { max-width: 47rem; margin: 0 auto; padding: 1.5rem; }
footer { max-width: 47rem; margin: 2rem auto; padding: 0 1.5rem; color: var(--soft);
  font: 13px/1.6 system-ui, sans-serif; }
.turn { display: flex; justify-content: space-between; border-top: 1px solid var(--line); padding-top: 0.8rem; }
a { color: var(--blue); text-decoration: none; }
a:hover { text-decoration: underline; }
.anchor-link { visibility: hidden; padding-left: 0.3em; }
:is(h1, h2, h3):hover .anchor-link { visibility: visible; }
h1, h2, h3 { line-height: 1.25; margin: 2em 0 0.6em; scroll-margin-top: 3.5rem; }
h1 { margin-top: 0.5em; font-size: 1.9em; }
h2 { font-size: 1.35em; }
code, pre { font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
pre { margin: 0; overflow-x: auto; }
img { max-width: 100%; height: auto; }
math { font-family: "STIX Two Math", "Cambria Math", "Latin Modern Math", math; }
math[display="block"] { margin: 1em 0; font-size: 1.1em; }
blockquote { margin-left: 0; padding-left: 1em; border-left: 3px solid var(--line); }
table { display: block; overflow-x: auto; width: fit-content; max-width: 100%; margin: 1em 0;
  border: 0; border-collapse: collapse;
  font: 13.5px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
th, td { padding: 0.28em 0.7em; text-align: left; vertical-align: top; border: 0;
  border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; border: 0; }
thead tr:last-child th { border-bottom: 1.5px solid var(--ink); }
.highlight { background: none; }
.output_html td, .output_html th { text-align: right; }
.cell { scroll-margin-top: 3.5rem; }
.cell:target { outline: 2px solid var(--blue); outline-offset: 6px; }
.code_cell { margin: 1.1em 0; }
.input { position: relative; background: var(--paper); border-left: 3px solid var(--line); padding: 0.6em 0.9em; }
.prompt { color: var(--soft); font: 11px/2 ui-monospace, monospace; white-space: nowrap; }
.input .prompt { position: absolute; right: calc(100% + 0.9rem); }
.text_cell .prompt, .output_area > .prompt { display: none; }
.output_area { padding: 0.5em 0.9em; }
figure { margin: 2em 0; scroll-margin-top: 3.5rem; }
figcaption { font: 14px/1.5 system-ui, sans-serif; color: var(--soft); }
figcaption b { color: var(--ink); }
.claims > table, figure.table > table { width: max-content; max-width: min(94vw, 84rem); position: relative; left: 50%;
  transform: translateX(-50%); }
.claims > table { font-size: 12.5px; }
.claims td:is(:nth-child(2), :nth-child(5)) { min-width: 13rem; }
.claims td:is(:nth-child(1), :nth-child(4)) { min-width: 9rem; }
.claims td:nth-child(8) { min-width: 11rem; }
.claims td:nth-child(9) { min-width: 6rem; }
li > a { overflow-wrap: anywhere; }
.claims td code { font-size: 10.5px; }
@media (max-width: 62rem) { .input .prompt { display: none; } body { font-size: 16px; } }
@media print { nav, .turn { display: none; } main { max-width: none; } }
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Turn executed notebooks, tables and figures into static pages.")
    add_options(parser)
    with one_sentence():
        index = build(Profile.from_options(parser.parse_args(arguments)))
    print(index.relative_to(store.ROOT))


if __name__ == "__main__":
    main()
