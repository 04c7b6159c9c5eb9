"""Every table, figure and claim has a cell that makes it, and none of them is orphaned."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from deftlib.profile import Profile
from deftlib.reporting import claims, claims_page, records

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
MODULES = {"first_updates": "studies"}  # commands that save something themselves, and their room
MEASURED = [path for path in sorted((ROOT / "figures").glob("*")) if path.name in ("smol", "gpu", "paper")]
PARTS = claims.parts(records.published())
SAVERS = {"save_table": ("csv", "md", "tex"), "save_figure": ("csv", "pdf", "png"), "save_claim": ()}
# Of no single cell; run.md says how a run was made elsewhere.
BESIDE = {"claims.json", "claims.parquet", "claims.md", "differences.md", "profile.yaml", "provenance.json", "run.md"}

# What both versions of the paper show, and the one name it has here.
OF_THE_PAPER = {
    "Table 1": "table1",
    "Table 2": "table2",
    "Table 3": "table3",
    "Table A.1": "tableA1",
    "Table 4, case study": "table4_case_study",
    "Figure 1 (both versions)": "fig1",
    "Figure 2 (final)": "fig2_final",
    "Figure 2 (anonymous), 3 (final): refined references": "fig2_references",
    "Figure 3 (anonymous), 4 (final): human evaluation": "fig_human",
    "Figure 4 (anonymous): MT-Bench, radar": "fig4_mt_bench",
    "Figure 4 (anonymous): MT-Bench, averages": "fig4_mt_bench_bar",
    "Figure 5 left (final)": "fig5_left",
    "Figure 5 right (final)": "fig5_right",
    "human evaluation in numbers": "table_human",
    "MT-Bench in numbers": "table_mt_bench",
    "training time": "table_time",
}


def calls(source):
    """[(function, name argument)] of the calls in a cell that save something; the argument is an ast node."""
    found = []
    for node in ast.walk(ast.parse(source)):
        function = getattr(node, "func", None)
        name = getattr(function, "attr", getattr(function, "id", None))
        if name in SAVERS:
            given = [keyword.value for keyword in node.keywords if keyword.arg in ("name", "claim")]
            found.append((name, (node.args[1:2] or given)[0]))
    return found


def saved_in(notebook):
    return [call for source in claims_page.code_cells(notebook) for call in calls(source)]


def saved_by(module):
    return calls((ROOT / "deftlib" / MODULES[module] / f"{module}.py").read_text())


def makers(*functions):
    """[(name, maker)] of every table, figure or claim that a cell or a module saves."""
    saved = {**{n: saved_in(n) for n in NOTEBOOKS}, **{m: saved_by(m) for m in MODULES}}
    return [
        (argument.value, maker)
        for maker, found in saved.items()
        for function, argument in found
        if function in functions and isinstance(argument, ast.Constant)
    ]


MADE = dict(makers("save_table", "save_figure"))


def test_calls_are_found_however_they_are_written():
    source = (
        'report.save_table(p, "a", f)\nsave_figure(p, name="b", fig=g)\nsave_claim(p, f"c{x}", i, N)\nprint(save_table)'
    )
    assert [(function, getattr(name, "value", None)) for function, name in calls(source)] == [
        ("save_table", "a"), ("save_figure", "b"), ("save_claim", None)
    ]  # fmt: skip


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_names_are_literals_so_that_a_reader_can_search_for_them(notebook):
    for function, name in saved_in(notebook):
        assert isinstance(name, ast.Constant), f"{notebook}: {function}({ast.unparse(name)})"


def test_no_two_cells_write_one_table_or_figure():
    written = Counter(name for name, _ in makers("save_table", "save_figure"))
    assert [name for name, times in written.items() if times > 1] == []


@pytest.mark.parametrize(("shown", "name"), OF_THE_PAPER.items(), ids=OF_THE_PAPER.values())
def test_what_the_paper_shows_has_a_cell_that_makes_it(shown, name):
    assert name in MADE, f"no cell makes {shown}"


@pytest.mark.parametrize("part", PARTS, ids=[part.name for part in PARTS])
def test_every_part_of_every_claim_has_a_cell_that_records_it_in_one_notebook(part):
    named = [claims_page.cell_of(claims_page.code_cells(n), "save_claim", part.claim, part.part) for n in NOTEBOOKS]
    assert sum(number is not None for number in named) == 1, dict(zip(NOTEBOOKS, named))


def test_no_cell_records_a_claim_that_is_none():
    assert {claim for claim, _ in makers("save_claim")} <= {part.claim for part in PARTS}


@pytest.mark.parametrize("folder", MEASURED, ids=lambda folder: folder.name)
def test_every_committed_file_has_a_cell_that_makes_it(folder):
    files = {path for path in folder.iterdir() if path.name not in BESIDE}
    assert {path.stem for path in files} - MADE.keys() == set()


@pytest.mark.parametrize("folder", MEASURED, ids=lambda folder: folder.name)
def test_a_committed_table_or_figure_is_whole_and_has_its_provenance(folder):
    recorded = records.recorded_provenance(folder / "provenance.json")
    provenance, stages = recorded["artefacts"], recorded["stages"]
    kinds = {name: SAVERS[f] for f in SAVERS if SAVERS[f] for name, _ in makers(f)}
    stems = {path.stem for path in folder.iterdir() if path.name not in BESIDE}
    assert stems == provenance.keys()
    for stem in stems & kinds.keys():
        assert tuple(sorted(path.suffix[1:] for path in folder.glob(f"{stem}.*"))) == kinds[stem]
        assert provenance[stem]["notebook"] == MADE[stem]
        if "settings" in provenance[stem]:  # what is older was made before stages were kept
            assert set(provenance[stem]["stages"]) <= stages.keys()


@pytest.mark.parametrize("folder", MEASURED, ids=lambda folder: folder.name)
def test_the_committed_pages_are_those_of_the_committed_claims(folder):
    """After an edit that moves cells or rewords a claim: `report.write_claims(Profile.load("smol"))`."""
    profile, recorded = Profile.load(folder.name), records.recorded_claims(folder / "claims.json")
    assert (folder / "claims.md").read_text() == claims_page.page(profile, PARTS, recorded)
    assert (folder / "differences.md").read_text() == claims_page.differences(profile)
