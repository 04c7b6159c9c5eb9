"""What goes wrong in a command is one sentence; a bug keeps its traceback."""

import pytest

from deftlib.command import one_sentence
from deftlib.training import train


@pytest.mark.parametrize("error", [ValueError("a\n  b"), OSError("a b"), RuntimeError("a b"), LookupError("a b")])
def test_what_is_expected_is_one_sentence(error):
    with pytest.raises(SystemExit, match=r"^error: a b$"), one_sentence():
        raise error


def test_another_exit_code_prints_the_sentence(capsys):
    with pytest.raises(SystemExit) as ended, one_sentence(2):
        raise ValueError("a")
    assert ended.value.code == 2 and capsys.readouterr().err == "error: a\n"


@pytest.mark.parametrize("bug", [KeyError("a"), IndexError("a"), TypeError("a"), AssertionError("a")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)), one_sentence():
        raise bug


def test_an_interrupted_run_says_that_it_can_go_on(capsys):
    with pytest.raises(SystemExit) as ended, one_sentence():
        raise KeyboardInterrupt
    assert ended.value.code == 130 and "the same command goes on" in capsys.readouterr().err


def test_a_policy_that_cannot_be_reached_is_one_sentence(monkeypatch):
    def unreachable(*args, **options):
        raise OSError("We couldn't connect to the hub\nto load this file.")

    monkeypatch.setattr(train, "fit", unreachable)
    with pytest.raises(SystemExit, match=r"^error: We couldn't connect to the hub to load this file.$"):
        train.main(["--method", "sft"])
