"""Profiles: four sizes of one experiment, every key typed, every mistake answered with the nearest valid name."""

import argparse
import dataclasses
import re
import shlex

import pytest

from deftlib import profile as profile_module
from deftlib import sections
from deftlib.profile import FOLDER, Profile, ProfileError

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_the_four_profiles_are_there():
    assert set(NAMES) >= {"mini", "smol", "gpu", "paper"}


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_loads_and_prints_what_it_is(name):
    loaded = Profile.load(name)
    assert loaded.name == name and loaded.seeds
    assert f"name: {name}" in str(loaded)
    assert {method.removeprefix("deft-") for method in loaded.training.methods} <= {"sft", "rrhf", "pro", "dpo"}


@pytest.mark.parametrize("name", NAMES)
def test_shares_of_a_profile_make_a_whole_and_name_the_parts(name):
    shares = Profile.load(name).data.shares
    assert sum(shares.values()) == pytest.approx(1)
    assert {"policy", "dev"} <= shares.keys() <= {"policy", "reward_train", "reward_eval", "dev", "test"}


def test_the_paper_profile_has_the_hyperparameters_of_appendix_a1():
    paper = Profile.load("paper")
    training = paper.training
    assert (training.pro.epochs, training.dpo.epochs) == (2, 1)
    assert (training.pro.learning_rate, training.dpo.learning_rate) == (5e-6, 5e-7)
    assert (training.pro_sft_weight, training.dpo_sft_weight) == (0.05, 0.05)
    assert (training.gradient_accumulation, training.batch_size) == (8, 1)  # one process for their eight
    assert (training.pro.omega.value, training.dpo.omega.value) == (2.5e-5, 2.5e-6)
    assert training.pro.omega.reading == training.dpo.omega.reading == "published"
    assert training.beta == 0.1
    assert paper.text.prompt_tokens + paper.text.reply_tokens == 512  # input length
    assert paper.text.reply_tokens == paper.generation.max_new_tokens == 128  # inference length
    assert (paper.grading.top, paper.grading.bottom) == (3.73, 12.5)  # section 4.1
    assert paper.reward_models.train.source == "OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5"
    assert paper.reward_models.evaluate.source == "OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1"


# ---- overrides -----------------------------------------------------------------------------------------------------


def test_dotted_and_nested_overrides_are_the_same():
    nested = Profile.load("mini", {"training": {"dpo": {"epochs": 3.0}, "batch_size": 2}, "grading": {"top": 10}})
    dotted = Profile.load("mini", {"training.dpo.epochs": 3, "training.batch_size": 2, "grading.top": 10.0})
    assert nested == dotted
    assert (nested.training.dpo.epochs, nested.training.batch_size, nested.grading.top) == (3.0, 2, 10.0)
    assert nested.training.dpo.learning_rate == Profile.load("mini").training.dpo.learning_rate  # beside it: unchanged


def test_overrides_leave_the_profile_of_the_file_alone():
    before = Profile.load("mini")
    Profile.load("mini", {"grading.top": 1.0})
    assert Profile.load("mini") == before


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"gradin.top": 10}, "unknown profile key 'gradin': did you mean 'grading'?"),
        (
            {"training.dpo.learning_rat": 1.0},
            "unknown profile key 'training.dpo.learning_rat': did you mean 'learning_rate'?",
        ),
        ({"training": {"bata": 0.2}}, "unknown profile key 'training.bata': did you mean 'beta'?"),
        ({"seeds.first": 1}, "'seeds' is a value"),
        ({"training.pro.learning_rate": "1e-6"}, "found '1e-6' (in YAML write 1.0e-6, not 1e-6)"),
        ({"training.batch_size": 2.0}, "training.batch_size must be of type int, found 2.0"),
        ({"training.bf16": "yes"}, "training.bf16 must be of type bool, found 'yes'"),
        ({"training.batch_size": True}, "training.batch_size must be of type int, found True"),
        ({"grading.top": True}, "grading.top must be of type float, found True"),
        ({"seeds": 0}, "seeds must be a list, found 0"),
        ({"seeds": [0, "1"]}, "seeds[1] must be of type int, found '1'"),
        ({"data.shares": {"policy": "0.5"}}, "data.shares.policy must be of type float, found '0.5'"),
        ({"grading": 5}, "grading must be a section of keys, found 5"),
        ({"data.rank_by": "rewards"}, "data.rank_by is 'rewards': did you mean 'reward'?"),
        ({"text.template": "chatml"}, "text.template is 'chatml': did you mean 'chat'?"),
        ({"training.gradings": ["reward", "best"]}, "training.gradings[1] is 'best': "),
        ({"jobs": 0}, "jobs is 0: at least 1"),
        ({"launch.processes": -2}, "launch.processes is -2: at least 1"),
        ({"launch.nodes": 2}, "launch.processes=1 cannot be dealt evenly over launch.nodes=2"),
    ],
)
def test_a_mistake_is_refused_with_what_was_meant(overrides, message):
    with pytest.raises(ProfileError, match=re.escape(message)):
        Profile.load("mini", overrides)


def test_an_unknown_profile_is_answered_with_the_nearest_name():
    with pytest.raises(ProfileError, match=r"no profile 'smoll' in profiles/: did you mean 'smol'\?"):
        Profile.load("smoll")
    with pytest.raises(ProfileError, match=r"valid are .*mini.*smol"):
        Profile.load("xxxxxxxx")


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: mine\nabout: x\n", "the profile lacks seeds, data, text"),
        ("name: [mine\n", "mine.yaml is not valid YAML"),
    ],
)
def test_a_profile_file_that_is_not_whole_is_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(profile_module, "FOLDER", tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ProfileError, match=message):
        Profile.load("mine")


def test_a_profile_must_bear_the_name_of_its_file(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text((FOLDER / "mini.yaml").read_text())
    monkeypatch.setattr(profile_module, "FOLDER", tmp_path)
    with pytest.raises(ProfileError, match=r"mine.yaml calls itself 'mini', expected 'mine'"):
        Profile.load("mine")


# ---- identity ------------------------------------------------------------------------------------------------------


def test_a_digest_changes_with_its_sections_and_not_with_others():
    before, after = Profile.load("mini"), Profile.load("mini", {"training.dpo.omega.value": 0.1})
    assert before.digest("training") != after.digest("training")
    assert before.digest() != after.digest()
    assert before.digest("data", "policy", "grading") == after.digest("data", "policy", "grading")


def test_a_whole_number_and_its_float_are_one_setting():
    assert Profile.load("mini", {"grading.top": 25}).digest() == Profile.load("mini", {"grading.top": 25.0}).digest()


# ---- what overrides changed ------------------------------------------------------------------------------------------


def test_changes_are_what_the_file_does_not_say_and_give_the_same_profile_again():
    overrides = {
        "grading": {"top": 10},
        "data.shares": {"policy": 0.5},
        "training.dpo.learning_rate": 1e-6,
        "seeds": [0, 1, 2],
    }
    changed = Profile.load("mini", overrides)
    assert changed.changes == {"data.shares.policy": 0.5, "grading.top": 10.0, "training.dpo.learning_rate": 1e-6}
    assert Profile.load("mini", changed.changes) == changed
    assert Profile.load("mini").changes == {}


def test_the_options_of_a_command_give_the_same_profile_again():
    zero_shot = [
        {"name": "Mistral", "source": "mistralai/Mistral-7B-v0.1"},
        {"name": "it's", "endpoint": {"model": "m"}},
    ]
    changed = Profile.load(
        "mini", {"training.dpo.learning_rate": 1e-6, "evaluation.zero_shot": zero_shot, "seeds": [3]}
    )
    parser = argparse.ArgumentParser()
    profile_module.add_options(parser)
    assert Profile.from_options(parser.parse_args(shlex.split(changed.options))) == changed
    assert Profile.load("mini").options == "--profile mini"


def test_an_edit_of_the_file_while_a_run_goes_on_changes_no_label(tmp_path, monkeypatch):
    (tmp_path / "mini.yaml").write_text((profile_module.FOLDER / "mini.yaml").read_text())
    monkeypatch.setattr(profile_module, "FOLDER", tmp_path)
    plain, other = Profile.load("mini"), Profile.load("mini", {"grading.top": 10})
    label = other.label
    text = (tmp_path / "mini.yaml").read_text()
    (tmp_path / "mini.yaml").write_text(text.replace("top: 25", "top: 10"))
    assert (plain.label, plain.changes, other.label) == ("mini", {}, label)
    assert Profile.load("mini").digest() == other.digest() != plain.digest()


def test_what_is_written_is_the_file_with_overrides_and_not_the_codes_defaults(monkeypatch):
    plain, other = Profile.load("mini"), Profile.load("mini", {"grading.top": 10})
    assert plain.written == Profile.load("mini").written != other.written
    monkeypatch.setattr(sections.Evaluation.__dataclass_fields__["human_prompts"], "default", 7)
    assert Profile.load("mini").written == plain.written


def test_a_profile_for_a_part_of_the_work_keeps_the_label_of_the_whole():
    whole = Profile.load("mini", {"grading.top": 10})
    part = dataclasses.replace(whole, seeds=[5])
    assert part.label == whole.label and part.options == whole.options and part.digest() != whole.digest()


@pytest.mark.parametrize("text", ["data={source: my.jsonl}", "data.source=my.jsonl"])
def test_a_source_is_meant_from_where_the_command_was_typed(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").touch()
    parser = argparse.ArgumentParser()
    profile_module.add_options(parser)
    profile = Profile.from_options(parser.parse_args(["--set", text]))
    assert profile.data.source == str(tmp_path / "my.jsonl") and profile.data.format == "auto"


def test_a_text_of_several_lines_fits_one_line():
    changed = Profile.load("mini", {"training.sr_prefix": 'One.\nTwo: "three".'})
    assert (
        "\n" not in changed.options
        and Profile.load("mini", dict([Profile.override(shlex.split(changed.options)[-1])])) == changed
    )


def test_a_label_reads_what_differs_and_fits_a_file_system():
    assert Profile.load("mini").label == "mini"
    changed = Profile.load("mini", {"data.source": "/home/me/my lists, 2.jsonl", "grading.top": 10})
    assert re.fullmatch(r"mini,data\.source=my-lists,-2\.jsonl,grading\.top=10\.0,[0-9a-f]{8}", changed.label)
    elsewhere = Profile.load("mini", {"data.source": "/home/you/my lists, 2.jsonl", "grading.top": 10})
    assert elsewhere.label != changed.label  # another path may be other data
    every = Profile.load(
        "mini", {f"training.{name}": 0.5 for name in ("beta", "sr_weight", "asft_weight", "ift_gamma")}
    )
    assert len(every.label) < 100


def test_a_file_named_on_the_command_line_is_meant_from_there(tmp_path, monkeypatch):
    (tmp_path / "mine.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    profile_module.add_options(parser)
    loaded = Profile.from_options(parser.parse_args(["--set", "data.source=mine.jsonl"]))
    assert loaded.data.source == str(tmp_path / "mine.jsonl")


def test_outside_a_checkout_one_sentence_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(profile_module, "FOLDER", tmp_path / "notebooks" / "profiles")
    with pytest.raises(ProfileError, match="run inside the project's checkout, or set DEFT_ROOT to it"):
        Profile.load("mini")


def test_what_is_written_down_holds_no_password():
    secret = Profile.load("mini", {"evaluation.refiner.url": "https://me:SECRET@host/v1"})
    assert "SECRET" not in str(secret) + secret.options + secret.label and "https://host/v1" in secret.options


def test_a_path_is_meant_from_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mymodel", "prefs.jsonl", "judge", "questions", "policy"):
        (tmp_path / name).mkdir()
    sets = ["policy.source=mymodel", "data.source=prefs.jsonl", "mt_bench.source=questions", "evaluation.bart=nowhere"]
    sets += ["reward_models.train={source: policy}", "reward_models.evaluate={source: ./judge, train: false}"]
    sets += ["evaluation.zero_shot=[{name: mine, source: mymodel}]"]
    profile = Profile.from_options(argparse.Namespace(profile="mini", set=sets))
    assert profile.policy.source == profile.evaluation.zero_shot[0].source == str(tmp_path / "mymodel")
    assert profile.data.source == str(tmp_path / "prefs.jsonl") and profile.mt_bench.source == str(
        tmp_path / "questions"
    )
    assert profile.reward_models.evaluate.source == str(tmp_path / "judge")
    assert profile.reward_models.train.source == "policy"  # a name, whatever stands here
    assert profile.evaluation.bart == "nowhere"  # a hub id, perhaps
