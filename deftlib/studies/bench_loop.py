"""Training against a bare PyTorch loop: what the trainers cost beside the model's own arithmetic: part of `deft bench`.

The loop has the same model, micro-batches, loss, clipping, schedule and optimizer, computes logits at reply positions
alone as the trainers do, and nothing else: no log, no checkpoint, no R_dis.
"""

import io
import statistics
import tempfile
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, linear, logsigmoid
from transformers import PrinterCallback

from deftlib.method.distribution import IGNORED
from deftlib.models import policies
from deftlib.models.loop import clock
from deftlib.preferences.lists import read_lists, sample
from deftlib.training import building

METHODS = ("sft", "pro", "dpo")


def against_bare(profile, lists, q_diff, methods=METHODS, updates=4, turns=3):
    """Real tokens a second of each method's training over those of the bare loop, measured in turns: dicts.

    lists, q_diff: Parquet and .npz files. The reference of DPO is taken before, by both. Each has "method", "ours" and
    "bare" (medians over turns, tokens a second), "tokens" of a training, "loss" and "weights": how far the last logged
    losses and the weights at the end are apart.
    """
    for method in methods:
        rates, found = {"ours": [], "bare": []}, {}
        for turn in range(turns):
            trainer = _built(profile, method, lists, q_diff, updates)
            batches = [trainer._prepare_inputs(batch) for batch in _of_updates(trainer)]
            tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
            runs = {
                "ours": lambda t=trainer: _trained(t),
                "bare": lambda t=trainer, m=method, b=batches: _bare(t, m, b, profile),
            }
            for name in sorted(runs, reverse=turn % 2 == 0):
                seconds, losses, model = runs[name]()
                rates[name].append(tokens / seconds)
                found[name] = losses, [parameter.detach() for parameter in model.parameters()]
        (losses, weights), (theirs, others) = found["ours"], found["bare"]
        yield {"method": method, "tokens": tokens, **{name: statistics.median(of) for name, of in rates.items()}} | {
            "loss": max(abs(a - b) for a, b in zip(losses, theirs, strict=True)),
            "weights": max(float((a - b).abs().max()) for a, b in zip(weights, others, strict=True)),
            "rates": rates,
        }


def _built(profile, method, lists, q_diff, updates):
    """The method's trainer from the start policy, its lines silenced; its folder goes away when it has read it."""
    start = policies.start_policy(profile)
    batch = profile.training.batch_size * profile.training.gradient_accumulation
    lists = sample(read_lists(lists), updates * batch)  # DPO's reference takes no more of them than are trained on
    with tempfile.TemporaryDirectory() as name, redirect_stdout(io.StringIO()):
        more = {"max_steps": updates, "logging_steps": 1, "save_strategy": "no"}
        trainer = building.build(Path(name), profile, method, 0, start, lists, q_diff, **more)
        trainer.remove_callback(PrinterCallback)
    return trainer


def _of_updates(trainer):
    """The micro-batches of a training of `max_steps` updates, in its order."""
    wanted, epoch = trainer.args.max_steps * trainer.args.gradient_accumulation_steps, 0
    loader, found = trainer.get_train_dataloader(), []
    while len(found) < wanted:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        found += list(loader)[: wanted - len(found)]
        epoch += 1
    return found


def _trained(trainer):
    """(seconds, loss of each update, model) of the trainer's own training."""
    start = clock()
    with redirect_stdout(io.StringIO()):
        trainer.train()
    seconds = clock() - start
    return seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model


def _bare(trainer, method, batches, profile):
    """The same of the bare loop, from the start policy anew."""
    args, model = trainer.args, policies.load_policy(policies.start_policy(profile), profile.policy.dtype)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused="fused" in args.optim
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / args.max_steps))
    many, losses = args.gradient_accumulation_steps, []
    start = clock()
    for update in range(args.max_steps):
        of_update, whole = batches[update * many : (update + 1) * many], 0.0
        tokens = sum(int((_labels(batch)[:, 1:] != IGNORED).sum()) for batch in of_update)
        for batch in of_update:
            mixed = torch.autocast(model.device.type, torch.bfloat16) if args.bf16 else nullcontext()
            with mixed:
                loss = LOSSES[method](*_log_probs(model, batch), batch, tokens, many, profile.training)
            loss.backward()
            whole += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(whole))
    return clock() - start, losses, model


def _labels(batch):
    if "labels" in batch:
        return batch["labels"]
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)


def _log_probs(model, batch):
    """Log-probability of each response, nats, and its tokens: [N] each."""
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).last_hidden_state
    targets = _labels(batch)[:, 1:]
    said = targets != IGNORED
    logits = linear(hidden[:, :-1][said], model.lm_head.weight)
    of_tokens = -cross_entropy(logits.float(), targets[said], reduction="none")
    return torch.zeros(targets.shape).masked_scatter(said, of_tokens).sum(1), said.sum(1)


def _sft(sums, counts, batch, tokens, many, training):
    return -sums.sum() / tokens


def _pro(sums, counts, batch, tokens, many, training):
    losses = []
    for means, of_list in zip((sums / counts).split(batch["list_lengths"]), sums.split(batch["list_lengths"])):
        ranked = sum(means[k:].logsumexp(0) - means[k] for k in range(len(means) - 1))
        losses.append(ranked - training.pro_sft_weight * of_list[0])
    return torch.stack(losses).mean() / many


def _dpo(sums, counts, batch, tokens, many, training):
    chosen, rejected = sums.chunk(2)
    gap = (chosen - batch["ref_chosen_logps"]) - (rejected - batch["ref_rejected_logps"])
    return -logsigmoid(training.beta * gap).mean() / many


LOSSES = {"sft": _sft, "pro": _pro, "dpo": _dpo}
