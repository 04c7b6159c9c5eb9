"""What others wrote, opened in a real browser: none of it runs. Skipped where there is no Chromium.

One page holds it in every field that the site, the notebooks and the rating page show; another, where nothing was
escaped, shows that the browser would have obeyed.
"""

import re
import shutil
import subprocess

import nbformat
import pandas as pd
import pytest

from deftlib.evaluation import rating_page
from deftlib.profile import Profile
from deftlib.reporting import claims, claims_page, records, report, settings, site

BROWSERS = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
pytestmark = pytest.mark.skipif(not BROWSERS, reason="no Chromium here")

RUN = "document.documentElement.dataset.ran=1"
HOSTILE = {
    "picture": f"<img src=x onerror={RUN}>",
    "quoted": f'"><img src=x onerror="{RUN}">',
    "script": f"<script>{RUN}</script>",
    "after text": f"</pre></code></td></textarea></title><script>{RUN}</script>",
    "vector": f"<svg/onload={RUN}>",
    "frame": f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    "details": f"<details open ontoggle={RUN}>x</details>",
    "link": f'<a href="javascript:{RUN}">x</a>',
    "Markdown link": f"[x](javascript:{RUN})",
    "Markdown autolink": f"<javascript:{RUN}>",
    "Markdown picture": f'![x](x "y" onerror={RUN})',
    "formula": rf"$\text{{<img src=x onerror={RUN}>}}$",
}
BY_MARKDOWN = {name for name in HOSTILE if name.startswith("Markdown")} | {"formula"}  # no HTML before it is rendered
CLICK = "<script>for (const a of document.links) if (!/^(https?|file):/.test(a.protocol)) a.click()</script>"


def ran(tmp_path, body):
    """Whether a browser that opens the page, and clicks what is no address, runs what is in it."""
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><html><head><meta charset='utf-8'></head><body>{body}{CLICK}</body></html>")
    command = [BROWSERS[0], "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'browser'}", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "</body>" in shown
    return "data-ran" in re.search(r"<html[^>]*>", shown)[0]


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in BY_MARKDOWN])
def test_what_is_not_escaped_runs(tmp_path, name):
    assert ran(tmp_path, HOSTILE[name])


@pytest.mark.parametrize("name", ["all", *HOSTILE])
def test_nothing_that_others_wrote_runs(tmp_path, name):
    said = " ".join(HOSTILE.values()) if name == "all" else HOSTILE[name]
    body = "".join(fields(said))
    assert not ran(tmp_path, body) and site.foreign(body) == []


def fields(said):
    """HTML of everything that shows a text of data, models, servers, raters or overrides."""
    frame = pd.DataFrame({said: [said]}, index=pd.Index([said], name=f"of {said}"))
    yield site.to_html(report.as_markdown(frame), {})
    record = {"ours": [1.0, 0.5, 1.5, 9], "p": 0.01, "p_matters": None, "seeds": 3, "visible": [1.0] * 9}
    record |= {"judge": {"name": said, "accuracy": {}}, "note": said, "notebook": "04_evaluation"}
    record |= {"command": "deft run", "seconds": 1.0, "created": "2026-11-28T00:00:00"}
    profile = Profile.load("mini", {"mt_bench.judge.model": said, "evaluation.bart": said})
    yield site.to_html(claims_page.page(profile, claims.parts(records.published()), {"data-volume": record}), {})
    yield site.to_html(claims_page.differences(profile), {})
    outputs = [
        nbformat.v4.new_output("display_data", {"text/markdown": report.as_markdown(frame)}),
        nbformat.v4.new_output("display_data", {"text/html": frame._repr_html_(), "text/plain": said}),
        nbformat.v4.new_output("display_data", {"text/html": settings.shown(profile, "mt_bench")._repr_html_()}),
        nbformat.v4.new_output("stream", name="stdout", text=said),
        nbformat.v4.new_output("error", ename="Error", evalue=said, traceback=[said]),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"said = {said!r}", outputs=outputs)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    yield site._cells(notebook, {}, {})
    yield rating_page._pair_html({"prompt": said, "reply_1": said, "reply_2": said})
