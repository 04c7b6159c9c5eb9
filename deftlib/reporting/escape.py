"""Text that others wrote, inside Markdown and LaTeX: shown, never obeyed.

Data, models, servers and raters write it; so do overrides. In HTML the standard library's `html.escape` does it.
"""

import re

_LATEX = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "|": r"\textbar{}"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "–": "--", "ω": r"$\omega$"}
_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
_MARKDOWN = {"\\": r"\\", "&": "&amp;", "<": "&lt;", "|": r"\|", "`": r"\`", "$": r"\$"}


def markdown(text):
    """The text on one line, as Markdown that shows it: no HTML, link, picture, code, formula or column of its own."""
    shown = _one_line(text).translate(str.maketrans(_MARKDOWN)).replace("](", r"]\(").replace("://", ":&#47;&#47;")
    return re.sub(r"(?i)\bwww\.", lambda found: f"{found[0][:-1]}&#46;", shown)


def latex(text):
    """The text on one line, as LaTeX that shows it."""
    return _one_line(text).translate(str.maketrans(_LATEX))


def _one_line(text):
    return "" if text is None else " ".join(str(text).split())
