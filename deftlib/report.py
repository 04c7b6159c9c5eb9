"""Tables and figures of a run, in one style, each with the data and the provenance behind it.

    style()
    save_table(profile, "table1", frame, title="…", notebook="01_grading")      # .csv .md .tex
    save_figure(profile, "fig1", figure, frame, title="…", notebook="02_…")      # .png .pdf .csv

Everything lands in `figures/<profile>/`; `provenance.json` there names notebook, command, seeds and versions of each.
"""

import functools
import json
import os
import re

import matplotlib.pyplot as plt

from deftlib import store
from deftlib.profile import Profile

# Okabe and Ito's colours, told apart by every kind of colour vision.
GOOD, BAD, NEUTRAL = "#0072B2", "#D55E00", "#7F7F7F"
COLOURS = [GOOD, BAD, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]


@functools.cache
def _unfit():
    """A pattern that finds the words of `data/unfit_words.txt`, by their beginnings."""
    stems = (store.ROOT / "data" / "unfit_words.txt").read_text(encoding="utf-8").split()
    return re.compile(rf"\b(?:{'|'.join(stems)})", re.IGNORECASE)


def fit_to_show(text):
    """Whether no word of the text begins as one in `data/unfit_words.txt`; crude, so it rather hides too much."""
    return not _unfit().search(text)


def readable(token):
    """The text of one token for a plot: no blanks around it, a line break as ⏎, offensive words masked."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").strip() or "␣"
    shown = shown if fit_to_show(shown) else shown[0] + "*" * (len(shown) - 1)
    return shown.replace("$", r"\$")  # matplotlib would set it as mathematics


def published():
    """The numbers printed in both versions of the paper: `data/published.json`, named there by table and claim."""
    return json.loads((store.ROOT / "data" / "published.json").read_text(encoding="utf-8"))


def style():
    """One look for all figures, and byte-identical files from identical data."""
    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")
    plt.rcdefaults()
    plt.rcParams.update(
        {
            "figure.figsize": (8, 4.5),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "savefig.dpi": 200,
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": "medium",
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "svg.hashsalt": "deft",
            "pdf.fonttype": 42,
        }
    )


def save_table(profile, name, frame, title, notebook):
    """Write a DataFrame as CSV, Markdown and LaTeX to `figures/<profile>/`; numbers keep full precision in the CSV."""
    folder = _folder(profile)
    store.write_atomic(folder / f"{name}.csv", frame.to_csv())
    store.write_atomic(folder / f"{name}.md", f"**{title}**\n\n{frame.to_markdown(floatfmt='.4g')}\n")
    latex = frame.to_latex(float_format="%.4g", caption=title, label=f"tab:{name}", escape=True)
    store.write_atomic(folder / f"{name}.tex", latex)
    _record(profile, name, title, notebook)


def save_figure(profile, name, figure, frame, title, notebook):
    """Write a figure as PNG and PDF and the numbers it shows as CSV to `figures/<profile>/`."""
    folder = _folder(profile)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "pdf"):
        temporary = folder / f".{name}.tmp.{kind}"
        with store.explained(folder / f"{name}.{kind}"):
            figure.savefig(temporary)
            os.replace(temporary, folder / f"{name}.{kind}")
    store.write_atomic(folder / f"{name}.csv", frame.to_csv())
    _record(profile, name, title, notebook)


def _folder(profile):
    """`figures/<profile>/`, or `figures/<profile>-custom/` if overrides changed it: they never mix."""
    plain = profile == Profile.load(profile.name)
    return store.figures_dir(profile.name if plain else f"{profile.name}-custom")


def _record(profile, name, title, notebook):
    """Add to `provenance.json` what made this table or figure; `profile.yaml` beside it holds all parameters."""
    store.write_atomic(_folder(profile) / "profile.yaml", f"{profile}\n")
    path = _folder(profile) / "provenance.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    command = f"python -m deftlib.run notebooks/{notebook}.ipynb --profile {profile.name}"
    known[name] = {"title": title, "notebook": notebook, "command": command, "seeds": profile.seeds}
    known[name] |= {"stages": list(store.USED.get(profile.name, {})), **store.provenance()}
    store.write_atomic(path, json.dumps(dict(sorted(known.items())), indent=1) + "\n")
