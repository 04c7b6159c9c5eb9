"""`deft check`: what was understood of a file, before anything is trained."""

import json

import datasets
import pytest
import warm

from deftlib import store
from deftlib.training import check


def pair(question="Hi", chosen="Hello.", rejected="Go away.", **more):
    return {"prompt": question, "chosen": chosen, "rejected": rejected} | more


def written(folder, *rows):
    path = folder / "prefs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_counts_and_fails_above_the_share_without_a_traceback(tmp_path):
    written(tmp_path, *[pair()] * 3, pair(chosen=""))

    command = lambda *arguments: warm.deft("check", "prefs.jsonl", *arguments, cwd=tmp_path)
    stopped = command()
    assert (stopped.returncode, stopped.stdout.count("\n"), stopped.stderr.count("\n")) == (1, 1, 1)
    assert stopped.stderr.startswith("error: prefs.jsonl: 1 of 4 lists rejected")
    assert (tmp_path / "rejects.jsonl").exists()
    passed = command(
        "--max-reject-share", "0.25", "--out", "lists.parquet", "--rejects", "r.jsonl", "--format", "pairs"
    )
    assert (passed.returncode, passed.stderr) == (0, "")
    first, *rest = passed.stdout.splitlines()
    assert first == "read 3 lists from prefs.jsonl; rejected 1: 1 empty reply (rejects: r.jsonl)"
    assert rest[0] == "format: pairs"
    assert len(datasets.Dataset.from_parquet(str(tmp_path / "lists.parquet"))) == 3


def test_what_was_understood_is_told_in_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    two_turns = [{"role": role, "content": said} for role, said in (("user", "a"), ("assistant", "b"), ("user", "c d"))]
    rated = {"chosen_score": 2, "rejected_score": 2}
    path = written(tmp_path, pair(), pair(two_turns, "one two three", "four"), pair("Ho", **rated), pair("He", **rated))
    assert check.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "format: pairs\nreplies a list: 2: 100 %\nturns of the prompt: 1: 75 %, 3: 25 %\n" in out
    assert "words: prompt 3 (95 %: " in out and "; reply " in out
    assert "rewards: of 2 lists, 2 with a tie (equal ones keep the file's order)" in out
    assert "tokens:" not in out and "with --profile NAME also tokens" in out


def test_with_a_profile_lengths_are_tokens_and_one_list_is_shown_as_it_is_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    long = "please " * 80
    few = ["--set", "text.prompt_tokens=6", "--set", "policy.pretrain_steps=1"]  # only its tokenizer counts
    path = written(tmp_path, pair("May I help?", "Hello, please.", "No."), pair("May I?", long + "yes", long + "no"))
    assert check.main([str(path), "--profile", "mini", *few]) == 0
    out = capsys.readouterr().out
    assert "cut: 100.0% of prompts on the left to text.prompt_tokens=6, 50.0% of replies on the right" in out
    assert "rejected 1 lists: 1 two responses differ only behind the cut" in out
    assert "left to train on: 1 of 2 lists" in out
    assert "y_1: ' Hello, please.<eos>'\n  y_2: ' No.<eos>'" in out
    assert "Assistant:'\n  y_1" in out  # the end of the prompt stays


@pytest.mark.parametrize(
    "arguments", [["nowhere.jsonl"], ["mini", "--profile", "mni"], ["mini", "--profile", "mini", "--set", "x=1"]]
)
def test_what_is_wrong_is_one_sentence(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: [^\n]+$"):
        check.main(arguments)


def test_files_of_several_formats_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(json.dumps(pair()))
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "Hi", "responses": ["a", "b", "c"]}))
    assert check.formats(tmp_path, "train") == "pairs (a.jsonl), lists (b.jsonl)"
    assert store.ROOT.is_dir()
