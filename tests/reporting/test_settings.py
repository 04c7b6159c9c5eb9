"""The first screen of a notebook: one line, what it reads folded, changed settings marked."""

import json
from pathlib import Path

import pytest

from deftlib.profile import Profile, ProfileError
from deftlib.reporting import settings

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_one_line_says_name_policy_data_and_sizes():
    assert settings.in_one_line(Profile.load("smol")) == (
        "smol: policy smollm2-135m-instruct (float32), 256 lists of the policy's part of hh-rlhf, "
        "prompts of 128 and replies of 96 tokens, seeds [0]"
    )


def test_the_named_sections_and_settings_are_shown_and_no_others():
    shown = settings.shown(Profile.load("mini"), "grading", "training.dpo.epochs")
    assert shown.keys == ["grading.top", "grading.bottom", "grading.keep", "grading.direction", "training.dpo.epochs"]
    page = shown._repr_html_()
    assert "<details><summary>the 5 settings that this notebook reads</summary>" in page
    assert "<td>grading.top</td><td>25.0</td><td></td>" in page and "changed:" not in page
    text = repr(shown)
    assert "grading: top 25.0, bottom 12.5, keep 25.0, direction lowest" in text
    assert all(len(line) <= 79 for line in text.splitlines())


def test_a_notebook_that_reads_none_shows_the_line_alone():
    shown = settings.shown(Profile.load("mini"))
    assert shown._repr_html_() == f"<p>{settings.in_one_line(Profile.load('mini')).replace(chr(39), '&#x27;')}</p>"
    assert "changed" not in repr(shown) and ":" not in repr(shown).partition(": ")[2]


def test_changed_settings_are_marked_even_those_that_this_notebook_does_not_read():
    shown = settings.shown(Profile.load("mini", {"grading.top": 10, "data.source": "<b>.jsonl"}), "grading")
    assert "<td>grading.top</td><td>10.0</td><td>25.0 in mini.yaml</td>" in shown._repr_html_()
    assert "changed: data.source <b>&lt;b&gt;.jsonl</b> (mini in mini.yaml)" in shown._repr_html_()
    assert "changed: data.source <b>.jsonl (mini in mini.yaml)" in repr(shown)
    assert "top 10.0 (changed)" in repr(shown)


def test_a_setting_that_does_not_exist_is_refused():
    with pytest.raises(ProfileError, match="no setting 'gradin' in a profile: a section is one of name, about, seeds"):
        settings.shown(Profile.load("mini"), "gradin")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_opens_with_it_and_names_the_sections_that_its_cells_read(path):
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    shown = cells[1].partition("settings.shown(")[2]
    assert shown, "the second cell shows the settings"
    names = [name for name in vars(Profile.load("mini")) if name not in ("name", "about")]
    for name in names:
        if any(f"profile.{name}" in cell for cell in cells[2:]):
            assert f'"{name}' in shown, f"{path.stem} reads profile.{name}"
