"""The page of related methods: complete, its formulas set, and every name of TRL on it one that is installed."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import trl
from latex2mathml.converter import convert

from deftlib.method import losses
from deftlib.reporting import site
from deftlib.training import train, trainers

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "notebooks/related_methods.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part.partition("\n")[2] for part in TEXT.split("\n## ")[1:]}
METHODS = [  # as files 002 and 003 of the issue list them, in the words of the headings
    "UFT", "SFTMix", "TIS-DPO", "ASFT", "Soft-label DPO", "Adaptive preference scaling", "TPO", "HFT", "PreTTY", "RPO",
    "H-DPO", "Uncertainty-penalised DPO", "SPO", "SELM", "ExPO", "P3O", "APA", "PPO",
]  # fmt: skip
GONE = {"rpo_alpha", "PPOTrainer"}  # the page says that TRL has these no longer

TRL = Path(trl.__file__).parent
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(TRL.rglob("*.py"), reverse=True)}  # stable first


def section(method):
    (found,) = (heading for heading in SECTIONS if re.match(rf"{method}(:|$)", heading))
    return SECTIONS[found]


def equations(text):
    return [formula.strip() for formula in re.findall(r"(?s)\$\$(.*?)\$\$", text)]


def prose(text):
    """The text without its code blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def spans(text):
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose(text))]


def home(name):
    """The source file of TRL that defines a class."""
    return next((path for path, text in SOURCES.items() if re.search(rf"^class {name}\b", text, re.M)), None)


def calls():
    """The `SomethingConfig(option=value, ...)` of the page, each with the section it stands in."""
    for heading, text in {"": TEXT.partition("\n## ")[0], **SECTIONS}.items():
        yield from ((span, heading) for span in spans(text) if re.match(r"\w+Config\(", span))


# ---- completeness ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_an_equation_and_says_whether_it_runs_here(method):
    text = section(method)
    assert len(equations(text)) == 1
    assert len(re.findall(r"^Runs here: \w", text, re.M)) == 1
    before, _, after = text.partition("$$")
    assert len(re.findall(r"[.:)](?:\s|$)", before)) >= 2  # sentences, not a formula alone
    assert after.index("Runs here:") > after.index("$$")


def test_the_table_has_a_row_for_every_section_and_links_each_paper():
    rows = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(SECTIONS) and all(len(row) == 5 for row in rows)
    names = [re.split(r": | and ", heading)[0].lower().split(", ")[0] for heading in SECTIONS]
    assert [row[0].lower().split(", ")[0].removeprefix("adaptive ") for row in rows] == [
        name.removeprefix("adaptive preference ") for name in names
    ]
    assert all(len(row[2].split()) <= 8 for row in rows)
    linked = set(re.findall(r"^\[([\d.]+)\]: https://arxiv.org/abs/\1$", TEXT, re.M))
    assert linked == set(re.findall(r"\[(\d{4}\.\d{5})\](?!:)", TEXT))
    for row in rows:
        assert row[0] == "SpaFL" or re.search(r"\[\d{4}\.\d{5}\], 20\d\d$", row[1]), row


def test_what_runs_elsewhere_or_not_at_all_is_named():
    assert "07_methods.ipynb" in SECTIONS["IFT, Sr-DPO and Sr-IPO"]
    assert "another field" in SECTIONS["SpaFL"]
    for name in ("ift", "sr-dpo", "sr-ipo", "asft", "rloo"):
        assert f"`{name}`" in TEXT and name in train.METHODS


def test_links_to_files_resolve_and_lines_fit():
    for url in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert "://" in url or (PAGE.parent / url).is_file(), url
    assert max(map(len, TEXT.splitlines())) <= 120
    assert TEXT.isascii()


# ---- formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", equations(TEXT))
def test_every_display_equation_is_set_by_the_site_and_by_github(formula):
    assert "\\" not in convert(formula, display="block")
    assert formula.count("{") == formula.count("}")
    assert len(re.findall(r"\\left\b", formula)) == len(re.findall(r"\\right\b", formula))
    assert not re.search(r"\\[^a-zA-Z]", formula)  # Markdown would take the backslash
    assert not re.search(r"^\s*(?:[-+*>#]|\d+[.)])\s", formula, re.M)  # nor is a line a list


def test_the_page_of_the_site_has_no_formula_left_over():
    html = site.to_html(TEXT, {})
    shown = re.sub(r"(?s)<(code|pre)\b.*?</\1>", "", html)
    assert "$" not in shown and "[24" not in shown
    assert not any("\\" in formula for formula in re.findall(r"(?s)<math.*?</math>", html))
    assert site.foreign(html) == []


# ---- names of TRL ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "heading"), calls())
def test_every_option_of_trl_on_the_page_is_accepted(call, heading, tmp_path):
    node = ast.parse(call, mode="eval").body
    values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
    assert not node.args and values
    path = home(node.func.id)
    assert path, f"TRL has no {node.func.id}"
    module = ".".join(("trl", *path.relative_to(TRL).with_suffix("").parts))
    if "experimental" in module:
        assert f"`{module.rpartition('.')[0]}`" in SECTIONS[heading], "where to import it from is not said"
    config = getattr(importlib.import_module(module), node.func.id)
    assert values.keys() <= config.__dataclass_fields__.keys()
    made = config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **values)  # and so are their values
    assert all(getattr(made, name) == value or getattr(made, name) == [value] for name, value in values.items())


@pytest.mark.parametrize("call", [call for call, _ in calls() if "loss_type" in call])
def test_every_loss_type_on_the_page_is_one_that_the_trainer_computes(call):
    node = ast.parse(call, mode="eval").body
    (value,) = (ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg == "loss_type")
    tree = ast.parse(SOURCES[home(node.func.id.replace("Config", "Trainer"))])
    compared = [each for each in ast.walk(tree) if isinstance(each, ast.Compare) and "loss_type" in ast.unparse(each)]
    known = {leaf.value for each in compared for leaf in ast.walk(each) if isinstance(leaf, ast.Constant)}
    assert {value} <= known if isinstance(value, str) else set(value) <= known


def test_every_class_and_module_of_trl_on_the_page_is_there_and_what_it_calls_gone_is_gone():
    named = {name for span in spans(TEXT) for name in re.findall(r"\b[A-Z]\w+(?:Config|Trainer)\b", span)}
    classes = [ast.parse(f"{span}: ...").body[0] for span in spans(TEXT) if span.startswith("class ")]
    assert classes and all(each.bases[0].id == "DistributionGuided" for each in classes)
    own = {each.name for each in classes} | {name for name in named if hasattr(trainers, name) and not home(name)}
    assert {name for name in named - own if not home(name)} == {"PPOTrainer"}
    assert {name for span in spans(TEXT) for name in GONE if span == name} == GONE
    assert not any(re.search(rf"\b{name}\b", text) for name in GONE for text in SOURCES.values())
    for module in re.findall(r"`(trl[.\w]+)`", TEXT):
        importlib.import_module(module)
    assert set(re.findall(r"TRL (\d+\.\d+)", TEXT)) == {".".join(trl.__version__.split(".")[:2])}


def test_every_single_name_in_code_on_the_page_is_one_of_trl_or_of_this_library():
    library = "\n".join([*SOURCES.values(), *(path.read_text() for path in (ROOT / "deftlib").rglob("*.py"))])
    words = set(re.findall(r"[\w-]+", library)) | GONE | {"use_asft_loss"}  # LLaMA-Factory's
    assert {span for span in spans(TEXT) if re.fullmatch(r"[\w-]+", span)} <= words


# ---- the worked example ------------------------------------------------------------------------------------------


def code_blocks():
    return re.findall(r"(?ms)^```python\n(.*?)^```$", SECTIONS["ASFT: aligned supervised fine-tuning"])


def test_the_code_of_the_worked_example_is_the_code_of_the_library():
    function, line, fits = code_blocks()
    real = ast.parse(inspect.getsource(losses.asft_loss)).body[0]
    real.body = real.body[1:]  # without its docstring
    assert ast.dump(ast.parse(function).body[0]) == ast.dump(real)
    assert line.strip() in inspect.getsource(trainers)
    methods = re.findall(r'"([\w-]+)"', fits)
    assert [method.removeprefix("deft-") for method in methods] == ["asft", "asft"] and "asft" in train.METHODS


def test_the_numbers_of_the_worked_example():
    sums = torch.tensor([[0.5, 0.25]], dtype=torch.float64).log() * torch.tensor([3, 2])
    loss = losses.asft_loss(sums, torch.tensor([[3, 2]]), align_weight=0.1)
    assert f"= {loss:.4f}." in section("ASFT")
    assert f"0.1 * ({-torch.log(torch.tensor(0.5)):.4f} + {-torch.log(torch.tensor(0.75)):.4f})" in section("ASFT")
