"""Checkpoints, resuming and the log, on a trainer of one parameter that needs no model from anywhere."""

import json
import sys

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from deftlib.models import loop
from deftlib.models.loop import (
    COMPLETE,
    PeakMemory,
    Progress,
    arguments,
    fit_or_resume,
    newest_complete,
    read_log,
    with_progress,
)


class Line(torch.nn.Module):
    """Fits y = a x + b; dropout makes the result depend on the random state too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.dropout = torch.nn.Linear(3, 1), torch.nn.Dropout(0.5)

    def forward(self, x, labels=None):
        predicted = self.linear(self.dropout(x)).squeeze(-1)
        return {"loss": (predicted - labels).square().mean(), "logits": predicted}


class Kill(TrainerCallback):
    """Dies after so many updates, as a lost machine would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


ROWS = [{"x": [float(i), float(i % 3), 1.0], "labels": float(i % 5)} for i in range(40)]


def run(folder, kill_after=None, save_steps=3, drawn_before=0):
    """10 updates of 4 rows; the folder is what a user sees."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = arguments(folder, epochs=1, learning_rate=0.1, batch_size=4, seed=0, save_steps=save_steps)
    trainer = Trainer(
        Line(),
        args=TrainingArguments(**settings, logging_steps=1),
        train_dataset=ROWS,
        callbacks=[Progress(folder, "line"), *([Kill(kill_after)] if kill_after else [])],
    )
    torch.rand(drawn_before)  # as calibration does
    fit_or_resume(trainer, folder)
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def killed(folder, after, **options):
    with pytest.raises(KeyboardInterrupt):
        run(folder, kill_after=after, **options)


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("checkpoint-*"))


def test_resuming_reaches_the_weights_of_an_uninterrupted_run(tmp_path, capsys):
    whole = run(tmp_path / "whole")
    killed(tmp_path / "killed", after=8)
    capsys.readouterr()
    resumed = run(tmp_path / "killed")
    assert "resuming from checkpoint-6" in capsys.readouterr().out
    assert torch.equal(resumed, whole)


def test_the_log_has_each_step_once_and_the_same_losses(tmp_path):
    run(tmp_path / "whole")
    killed(tmp_path / "killed", after=8)
    assert [entry["step"] for entry in read_log(tmp_path / "killed")][-1] == 7  # 7 will be written again
    run(tmp_path / "killed")
    logs = [read_log(tmp_path / name) for name in ("whole", "killed")]
    assert [entry["step"] for entry in logs[1]] == list(range(1, 11))
    assert [entry["loss"] for entry in logs[0]] == [entry["loss"] for entry in logs[1]]
    seconds = [entry["seconds"] for entry in logs[1]]
    assert seconds == sorted(seconds)


def test_random_numbers_drawn_before_training_do_not_change_it(tmp_path):
    assert torch.equal(run(tmp_path / "none"), run(tmp_path / "some", drawn_before=5))


def test_two_interruptions_are_no_harder_than_one(tmp_path):
    whole = run(tmp_path / "whole")
    killed(tmp_path / "killed", after=4)
    killed(tmp_path / "killed", after=7)
    assert torch.equal(run(tmp_path / "killed"), whole)
    assert [entry["step"] for entry in read_log(tmp_path / "killed")] == list(range(1, 11))


def test_an_incomplete_checkpoint_is_removed_and_the_one_before_is_used(tmp_path, capsys):
    whole = run(tmp_path / "whole")
    folder = tmp_path / "killed"
    killed(folder, after=8)
    assert steps(folder) == [3, 6]
    (folder / "checkpoints" / "checkpoint-6" / COMPLETE).unlink()
    assert newest_complete(folder / "checkpoints").name == "checkpoint-3"
    assert steps(folder) == [3]
    capsys.readouterr()
    assert torch.equal(run(folder), whole)
    assert "resuming from checkpoint-3" in capsys.readouterr().out


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, capsys):
    killed(tmp_path / "killed", after=2)
    resumed = run(tmp_path / "killed")
    assert "resuming" not in capsys.readouterr().out
    assert torch.equal(resumed, run(tmp_path / "whole"))
    assert [entry["step"] for entry in read_log(tmp_path / "killed")] == list(range(1, 11))


def test_a_log_line_cut_short_by_the_interruption_does_not_stop_the_next_run(tmp_path):
    killed(tmp_path / "killed", after=8)
    with open(tmp_path / "killed" / "log.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    run(tmp_path / "killed")
    assert [entry["step"] for entry in read_log(tmp_path / "killed")] == list(range(1, 11))


def test_the_newest_checkpoint_is_the_highest_step_not_the_last_name(tmp_path):
    assert newest_complete(tmp_path / "none") is None
    for step in (9, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert newest_complete(tmp_path).name == "checkpoint-100"


def test_a_finished_run_leaves_the_model_and_the_log_alone(tmp_path):
    run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "model.safetensors"}


def test_without_save_steps_there_are_no_checkpoints(tmp_path):
    killed(tmp_path, after=8, save_steps=0)
    assert steps(tmp_path) == []


def test_seconds_go_on_where_the_checkpoint_was_written(tmp_path):
    (tmp_path / "seconds.json").write_text(json.dumps({"seconds": 1000.0}))
    progress = Progress(tmp_path, "line")
    progress.on_train_begin(None, type("State", (), {"global_step": 0, "is_world_process_zero": True}), None)
    assert 1000.0 <= progress.seconds < 1010.0


def test_progress_prints_one_line_every_few_seconds(tmp_path, capsys, monkeypatch):
    run(tmp_path / "quick")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  line step")]
    assert len(lines) == 1 and "step 1/10  loss " in lines[0] and lines[0].endswith(" s")
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_LINES", -1.0)
    run(tmp_path / "slow")
    assert capsys.readouterr().out.count("  line step") == 10


def test_a_line_names_the_reward_and_the_rate_when_they_are_logged(tmp_path):
    progress, state = Progress(tmp_path, "dpo"), type("State", (), {"global_step": 5, "max_steps": 10})
    progress.on_train_begin(None, type("State", (), {"global_step": 0, "is_world_process_zero": True}), None)
    line = progress._line(state, {"loss": 0.5, "R_dis": 0.25, "tokens_per_second": 99.6})
    assert line.startswith("  dpo step 5/10  loss 0.5000  R_dis +0.2500  100 tokens/s  eta ")


def test_batches_pass_through_progress_unchanged(capsys, monkeypatch):
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_LINES", -1.0)
    assert list(with_progress([[1, 2], [3]], "scores", total=3)) == [[1, 2], [3]]
    assert capsys.readouterr().out == "  scores: 2/3\n  scores: 3/3\n"


def test_arguments_report_to_nobody_and_keep_two_checkpoints(tmp_path):
    args = TrainingArguments(
        **arguments(tmp_path, epochs=2, learning_rate=1e-3, batch_size=4, seed=7, save_steps=5, warmup_steps=3)
    )
    assert (args.report_to, args.disable_tqdm, args.bf16, args.gradient_checkpointing) == ([], True, False, False)
    assert (args.save_total_limit, args.save_steps, args.warmup_steps) == (2, 5, 3)
    assert (args.seed, args.data_seed, args.output_dir) == (7, 7, str(tmp_path / "checkpoints"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's peak is read from /proc")
def test_peak_memory_is_what_a_block_held_at_its_highest_above_what_was_held_before():
    megabytes = 2**20
    held = torch.ones(50 * megabytes)  # float32: 200 MB, before the block
    with PeakMemory() as memory:
        torch.ones(40 * megabytes).sum()  # 160 MB, given back at once
    assert 155 * megabytes < memory.bytes < 200 * megabytes
    with PeakMemory() as nothing:
        pass
    assert nothing.bytes < 10 * megabytes
    assert held.sum() > 0
