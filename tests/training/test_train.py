"""Training a policy by name: the readings of omega, resuming, the command line."""

import json
import sys

import numpy as np
import pytest
import torch
import warm
from datasets import Dataset

from deftlib.models import policies
from deftlib.profile import Profile
from deftlib.sections import Omega
from deftlib.training import building, one_run, subset, train, trainers


@pytest.fixture
def start(tmp_path, make_model, tokenizer):
    """A start policy, lists and q_diff on disk, as `fit` finds them."""
    folder = tmp_path / "start"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    counts = np.arange(40), np.arange(40)[::-1].copy()
    subset.save_q_diff(tmp_path / "q_diff.npz", *counts, policies.fingerprint(tokenizer))
    return folder


@pytest.mark.parametrize(
    ("reduction", "summed", "kinds"), [("sum", 0.05, ["sigmoid"]), ("token_mean", 0.0, ["sigmoid", "sft"])]
)
def test_the_profile_names_the_reduction_of_the_sft_term(reduction, summed, kinds, start, tmp_path):
    settings = {"training.dpo_sft_weight": 0.05, "training.sft_reduction": reduction}
    lists = Dataset.from_list(TEXTS)
    trainer = building.build(tmp_path, Profile.load("mini", settings), "dpo", 0, start, lists, tmp_path / "q_diff.npz")
    assert (trainer.summed_sft_weight, trainer.args.loss_type) == (summed, kinds)
    if reduction == "token_mean":
        assert trainer.args.loss_weights == [1.0, 0.05]


# ---- omega -------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(tmp_path, tokenizer):
    """Counts of 600 good and 200 bad tokens."""
    pos, neg = np.zeros(40, int), np.zeros(40, int)
    pos[[3, 4]], neg[5] = 300, 200
    subset.save_q_diff(tmp_path / "q_diff.npz", pos, neg, policies.fingerprint(tokenizer))
    return tmp_path / "q_diff.npz"


class Calibrates:
    """Stands for a trainer: remembers how often it was asked."""

    asked = 0

    def is_world_process_zero(self):
        return True

    def calibrate(self, ratio, batches):
        self.asked += 1
        return ratio * 1000 + batches


def omega_of(trainer, omega, counted, folder):
    return one_run._omega(trainer, vars(omega) if isinstance(omega, Omega) else omega, counted, folder)


def test_omega_as_given_as_printed_and_times_the_counts(counted, tmp_path):
    assert omega_of(None, 0.25, counted, tmp_path) == 0.25
    assert omega_of(None, Omega("published", 2.5e-5), counted, tmp_path) == 2.5e-5
    assert omega_of(None, Omega("counts", 2.5e-5), counted, tmp_path) == pytest.approx(2.5e-5 * 400)


def test_omega_by_ratio_is_calibrated_once_and_remembered(counted, tmp_path):
    trainer = Calibrates()
    by_ratio = Omega("ratio", 0.03, calibration_batches=8)
    first = omega_of(trainer, by_ratio, counted, tmp_path)
    assert first == pytest.approx(38.0)
    assert omega_of(trainer, by_ratio, counted, tmp_path) == first
    assert trainer.asked == 1


# ---- a whole training --------------------------------------------------------------------------------------------


def ranked(*responses, prompt="w1 w2", rewards=None, name="a"):
    return {"id": name, "prompt": prompt, "responses": list(responses), "rewards": rewards}


TEXTS = [ranked(f"w{i} w{i + 1} w3", f"w{30 - i} w4", prompt=f"w{i} w9", name=str(i)) for i in range(12)]
TEXTS = [{**row, "subset": "s"} for row in TEXTS]
QUICK = {
    "training.batch_size": 2,
    "training.log_steps": 1,
    "training.save_steps": 2,
    "training.ratio_steps": 2,
    **{f"training.{method}": {"epochs": 1.0, "learning_rate": 1e-2} for method in ("sft", "dpo", "pro")},
}


def texts(start):
    """A Parquet file of TEXTS, beside a start policy."""
    path = start.parent / "texts.parquet"
    if not path.is_file():
        Dataset.from_list(TEXTS).to_parquet(path)
    return path


class Killed(Exception):
    pass


def run(folder, start, method, kill_after=None, monkeypatch=None):
    """A training on 12 lists, 6 updates, checkpoints at 2 and 4; dies after `kill_after` updates."""
    folder.mkdir(exist_ok=True)

    class Progress(one_run.Progress):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == kill_after:
                raise Killed

    q_diff = start.parent / "q_diff.npz"
    with monkeypatch.context() as patch:
        patch.setattr(one_run, "Progress", Progress)
        profile, omega = Profile.load("mini", QUICK), vars(Omega("ratio", 0.5, 2))
        one_run.train_into(folder, profile, method, 0, start, texts(start), q_diff, omega)
    return folder


@pytest.mark.parametrize("method", ["deft-sft", "deft-dpo", "deft-pro", "deft-ift", "deft-sr-dpo"])
def test_a_killed_training_continues_as_if_nothing_had_happened(method, start, tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "whole", start, method, monkeypatch=monkeypatch)
    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        run(killed, start, method, kill_after=5, monkeypatch=monkeypatch)
    omega = json.loads((killed / "omega.json").read_text())
    monkeypatch.setattr(trainers.GuidedSFTTrainer, "calibrate", None)  # must not be asked again
    monkeypatch.setattr(trainers.GuidedPairTrainer, "calibrate", None)
    monkeypatch.setattr(trainers.GuidedRankedListTrainer, "calibrate", None)
    monkeypatch.setattr(trainers.GuidedIntuitiveTrainer, "calibrate", None)
    capsys.readouterr()
    run(killed, start, method, monkeypatch=monkeypatch)
    assert "resuming from checkpoint-4" in capsys.readouterr().out

    after, before = (policies.load_policy(folder).state_dict() for folder in (killed, whole))
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
    records = [json.loads((folder / "summary.json").read_text()) for folder in (killed, whole)]
    assert records[0]["omega"] == omega == records[1]["omega"] > 0
    assert records[0]["gradient_ratio"] == pytest.approx(records[1]["gradient_ratio"], rel=1e-4)
    assert len(records[0]["gradient_ratio"]) == 3
    logs = [[json.loads(line) for line in (folder / "log.jsonl").open()] for folder in (killed, whole)]
    for log in logs:
        assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert [e["R_dis"] for e in logs[0]] == pytest.approx([e["R_dis"] for e in logs[1]], abs=1e-5)
    assert not (killed / "checkpoints").exists()
    assert {p.name for p in killed.iterdir()} == {p.name for p in whole.iterdir()}


def test_a_plain_method_logs_r_dis_and_never_optimises_it(start, tmp_path):
    run = {"method": "sft", "seed": 0, "start": start, "q_diff": start.parent / "q_diff.npz", "omega": 0.0}
    (tmp_path / "sft").mkdir()
    one_run.train_into(tmp_path / "sft", Profile.load("mini", QUICK), lists=texts(start), **run)
    record = json.loads((tmp_path / "sft" / "summary.json").read_text())
    assert (record["omega"], record["omega_reading"], record["gradient_ratio"]) == (0.0, 0.0, [])
    assert (record["method"], record["lists"], record["updates"]) == ("sft", 12, 6)
    assert all("R_dis" in json.loads(line) for line in (tmp_path / "sft" / "log.jsonl").open())


@pytest.mark.parametrize("method", [prefix + method for method in train.METHODS for prefix in ("", "deft-")])
def test_every_method_trains_with_and_without_the_reward(method, start, tmp_path, monkeypatch):
    """Two updates through `build`, as `fit` runs them; r_train, which only RLOO asks, counts a word."""
    monkeypatch.setattr(building, "_r_train_reward", lambda profile: counts_w3)
    short = {"text.reply_tokens": 4, "training.rloo.generations": 2, "training.rloo.learning_rate": 1e-2}
    profile, folder = Profile.load("mini", QUICK | short), tmp_path / "run"
    q_diff, lists = start.parent / "q_diff.npz", Dataset.from_list(TEXTS)
    trainer = building.build(folder, profile, method, 0, start, lists, q_diff, max_steps=2, save_strategy="no")
    if method.startswith("deft-"):
        assert trainer.calibrate(ratio=0.1, batches=1) > 0
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert all(name in trainer.state.log_history[0] for name in ("loss", "R_dis", "num_tokens"))


def counts_w3(prompts, completions, **_):
    return [float(said.split().count("w3")) + 0.1 * len(said) for said in completions]


def test_a_reader_adds_a_method_with_one_loss_and_one_line(start, tmp_path, monkeypatch):
    """The README's example: here it is a test that keeps that promise."""

    def simpo_loss(sums, counts, beta=2.0, gamma=0.5):
        scores = sums / counts
        return -torch.nn.functional.logsigmoid(beta * (scores[:, 0] - scores[:, -1]) - gamma).mean()

    line = trainers.ListMethod(lambda s, t: simpo_loss(s.sums, s.counts), recipe="dpo", pairs=True)
    monkeypatch.setitem(trainers.LIST_METHODS, "simpo", line)
    monkeypatch.setitem(building.RECIPES, "simpo", line.recipe)  # both tables are made from it when deftlib is imported
    q_diff, lists = start.parent / "q_diff.npz", Dataset.from_list(TEXTS)
    trainer = building.build(tmp_path / "run", Profile.load("mini", QUICK), "deft-simpo", 0, start, lists, q_diff)
    trainer.omega = 1.0
    trainer.train()
    assert trainer.state.global_step == 6


# ---- asking for it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kto", "deft-kto", "DPO", "deft-"])
def test_an_unknown_method_is_refused_before_anything_is_computed(method, monkeypatch):
    monkeypatch.setattr(train, "policies", None)
    with pytest.raises(ValueError, match=f"unknown method '{method}': one of sft, ift, dpo, rloo, rrhf"):
        train.fit(Profile.load("mini"), method)


def test_the_command_line_explains_itself():
    result = warm.deft("train", "--help")
    assert result.returncode == 0
    assert all(option in result.stdout for option in ("--profile", "--method", "--seed", "--grading", "--omega"))


def test_the_command_line_reports_a_mistake_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--method", "kto"])
    with pytest.raises(SystemExit, match="error: unknown method 'kto'"):
        train.main()


def test_settings_that_change_no_result_stay_out_of_its_key():
    settings = train._shared_settings(Profile.load("mini").training)
    changed = train._shared_settings(
        Profile.load("mini", {"training.save_steps": 7, "training.log_steps": 1, "training.methods": ["sft"]}).training
    )
    assert settings == changed
    assert settings != train._shared_settings(Profile.load("mini", {"training.beta": 0.2}).training)
