"""Training against a bare PyTorch loop: what the trainers cost beside the model's own arithmetic: part of `deft bench`.

The loop has the same model, micro-batches, loss, clipping, schedule and optimizer, computes logits at reply positions
alone as the trainers do, and nothing else: no log, no checkpoint, no R_dis.
"""

import io
import tempfile
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, linear
from transformers import PrinterCallback

from deftlib.intervals import mean_interval
from deftlib.method import heads, losses
from deftlib.method.distribution import IGNORED
from deftlib.models import policies
from deftlib.models.loop import clock
from deftlib.preferences.lists import read_lists, sample
from deftlib.profile import ProfileError
from deftlib.training import building, subset


def against_bare(profile, methods=("sft", "pro", "dpo"), updates=2, turns=4):
    """One dict a method: what it trains, ours and the bare loop's tokens a second, and how far apart both end.

    Real tokens, medians over turns; each turn trains both from the start policy, and they take turns at being first.
    ratio: mean over the turns, low and high its 95 % interval. The reference of DPO is taken before, for both. loss,
    weights: the largest difference of a logged loss and of a weight at the end. A first turn warms up. Raises
    ProfileError where the profile trains otherwise than the loop does: all weights by AdamW.
    """
    if profile.lora.rank or not profile.training.optimizer.startswith("adamw_torch"):
        raise ProfileError("the bare loop trains all weights by AdamW: lora.rank=0 training.optimizer=adamw_torch")
    profile = replace(profile, economy=replace(profile.economy, reference="kept"))
    for method in methods:
        seconds, found = torch.empty(turns + 1, 2), {}
        for turn, row in enumerate(seconds):
            trainer = _built(profile, method, updates)
            batches = [trainer._prepare_inputs(batch) for batch in _of_updates(trainer)]
            runs = [partial(_trained, trainer), partial(_bare, profile, method, trainer.args, batches)]
            for which in (0, 1) if turn % 2 else (1, 0):
                row[which], logged, model = runs[which]()
                found[which] = logged, [parameter.detach() for parameter in model.parameters()]
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        ours, bare = (tokens / seconds[1:]).quantile(0.5, dim=0).tolist()
        ratio = mean_interval((seconds[1:, 1] / seconds[1:, 0]).numpy())
        apart = [max(float((a - b).abs().max()) for a, b in zip(*pairs, strict=True)) for pairs in zip(*found.values())]
        row = {"method": method, "tokens": tokens, "ours": ours, "bare": bare}
        row |= {"ratio": ratio.mean, "low": ratio.low, "high": ratio.high}
        yield row | dict(zip(("loss", "weights"), apart))


def _built(profile, method, updates):
    """The method's trainer from the start policy, its lines silenced; its folder goes away when it has read it."""
    lists = read_lists(subset.parts(profile) / "policy.parquet")
    lists = sample(lists, updates * profile.training.batch_size * profile.training.gradient_accumulation)
    given = (method, 0, policies.start_policy(profile), lists, subset.counted(profile) / "q_diff.npz")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        more = {"max_steps": updates, "logging_steps": 1, "save_strategy": "no"}
        trainer = building.build(Path(folder), profile, *given, **more)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _of_updates(trainer):
    """The micro-batches of a training of `max_steps` updates, in its order: one epoch."""
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == trainer.args.max_steps * trainer.args.gradient_accumulation_steps
    return batches


def _trained(trainer):
    """(seconds, loss of each update, model) of the trainer's own training."""
    start = clock()
    with redirect_stdout(io.StringIO()):
        trainer.train()
    seconds = clock() - start
    logged = [torch.tensor(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return seconds, logged, trainer.model


def _bare(profile, method, args, batches):
    """The same of the bare loop, from the start policy anew. args: of the trainer."""
    model = policies.load_policy(policies.start_policy(profile), profile.policy.dtype).train()
    adam = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": "fused" in args.optim}
    optimizer = torch.optim.AdamW(model.parameters(), **adam)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / args.max_steps))
    many, of_updates = args.gradient_accumulation_steps, []
    start = clock()
    for update in range(args.max_steps):
        of_update, whole = batches[update * many : (update + 1) * many], 0.0
        said = sum(int((_labels(batch)[:, 1:] != IGNORED).sum()) for batch in of_update)
        for batch in of_update:
            with torch.autocast(model.device.type, torch.bfloat16) if args.bf16 else nullcontext():
                loss = LOSSES[method](*_log_probs(model, batch), batch, said, many, profile.training)
            loss.backward()
            whole += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        of_updates.append(whole)
    return clock() - start, [loss.cpu() for loss in of_updates], model


def _labels(batch):
    if "labels" in batch:
        return batch["labels"]
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)


def _log_probs(model, batch):
    """Log-probability of each response, nats, and its tokens: [N] each."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    hidden = heads.backbone(model)(**inputs).last_hidden_state
    targets = _labels(batch)[:, 1:]
    said = targets != IGNORED
    logits = linear(hidden[:, :-1][said], model.get_output_embeddings().weight)
    of_tokens = -cross_entropy(logits.float(), targets[said], reduction="none")
    return of_tokens.new_zeros(targets.shape).masked_scatter(said, of_tokens).sum(1), said.sum(1)


def _sft(sums, counts, batch, said, many, training):
    return -sums.sum() / said


def _pro(sums, counts, batch, said, many, training):
    of_lists = len(batch["list_lengths"]), -1  # lists of one length
    return losses.pro_loss(sums.view(of_lists), counts.view(of_lists), training.pro_sft_weight) / many


def _dpo(sums, counts, batch, said, many, training):
    policy = torch.stack(sums.chunk(2), dim=1)  # the better responses of a batch stand before the others
    reference = torch.stack([batch["ref_chosen_logps"], batch["ref_rejected_logps"]], dim=1)
    return losses.dpo_loss(policy, reference, training.beta) / many


LOSSES = {"sft": _sft, "pro": _pro, "dpo": _dpo}
