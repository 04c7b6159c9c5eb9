"""Heads of reward models, one per axis, by Bradley-Terry (Eq. 1): fitted on frozen features, or with the backbone.

    fit_on_features(profile, spec, lists_path, folder)     # seconds: Newton's method, its regularisation held out
    load(folder).rewards(states, axes)                     # float64[N]

HH-RLHF asks two questions: is a reply harmless, is it helpful. A head that answers both at once learns neither, so
every list is learned and scored by the head of its own axis.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import logsigmoid
from transformers import Trainer, TrainingArguments

from deftlib.models import features
from deftlib.models.loop import Progress, arguments, fit_or_resume
from deftlib.preferences.lists import read_lists, split

AXES = ("harmless", "helpful")
STRENGTHS = (10000.0, 3000.0, 1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0)  # of the penalty on squared weights
FOLDS = 5  # of a head's lists, by first human turn: each is held out once to choose the strength


def axis_of(subset):
    """The axis of a subset: "harmless" for those named so, "helpful" for all others (our choice)."""
    return "harmless" if str(subset).startswith("harmless") else "helpful"


class Heads(NamedTuple):
    """One linear head per axis on standardised features."""

    axes: list[str]
    weights: np.ndarray  # float64[axes, d]
    mean: np.ndarray  # float64[d], of the features
    scale: np.ndarray

    def rewards(self, states, axes):
        """float64[N]: raw rewards. states: float[N, d]. axes: N names; one without a head goes to the first."""
        known = [self.axes.index(axis) if axis in self.axes else 0 for axis in axes]
        return (((np.asarray(states, np.float64) - self.mean) / self.scale) * self.weights[known]).sum(1)


def load(folder):
    """The `Heads` in a published folder."""
    with np.load(Path(folder) / "heads.npz") as stored:
        arrays = {name: stored[name] for name in ("weights", "mean", "scale")}
        return Heads(axes=list(map(str, stored["axes"])), **arrays)


def save(heads, folder):
    np.savez(folder / "heads.npz", **heads._asdict())


# ---- on frozen features ------------------------------------------------------------------------------------------


def fit_on_features(profile, spec, path, folder, label):
    """Fit a head for each axis that has lists and write `heads.npz` and `chosen.json`: strength and lists per axis."""
    lists = read_lists(path)
    states, lengths = features.of_lists(profile, spec.source, path)
    states = np.asarray(states, np.float64)
    mean, scale = states.mean(0), states.std(0)
    used, scale = scale > 0, np.where(scale > 0, scale, 1.0)  # of "words", many never occur
    of_list = np.split(((states - mean) / scale)[:, used], np.cumsum(lengths)[:-1])
    axes, folds = np.array(list(map(axis_of, lists["subset"]))), _folds(lists)
    found, chosen = {}, {}
    for axis in [axis for axis in AXES if axis in axes]:
        mine = np.flatnonzero(axes == axis)
        losses = held_out_losses([of_list[i] for i in mine], folds[mine])
        strength = min(losses, key=losses.get)
        found[axis] = np.zeros(len(used))
        found[axis][used] = fit(_differences([of_list[i] for i in mine]), strength)
        chosen[axis] = {"strength": strength, "held-out loss": losses[strength], "lists": len(mine)}
        print(f"  {label}, {axis}: {len(mine)} lists, strength {strength:g}, held-out loss {losses[strength]:.3f}")
    save(Heads(list(found), np.stack(list(found.values())), mean, scale), folder)
    (folder / "chosen.json").write_text(json.dumps(chosen, indent=1))


def fit(differences, strength, weights=None):
    """float64[d]: the weights w that minimise sum log(1 + exp(-w . d)) + strength / 2 |w|^2, by Newton's method.

    differences: float64[M, d], features of the better reply less those of the worse one. weights: where to start.
    """
    weights = np.zeros(differences.shape[1]) if weights is None else weights
    identity = np.eye(differences.shape[1])
    for _ in range(50):
        wrong = 1 / (1 + np.exp(np.clip(differences @ weights, -500, 500)))
        gradient = strength * weights - differences.T @ wrong
        curvature = (differences * (wrong * (1 - wrong))[:, None]).T @ differences + strength * identity
        step = np.linalg.solve(curvature, gradient)
        weights = weights - step
        if np.abs(step).max() < 1e-8:
            break
    return weights


def held_out_losses(states, folds, strengths=STRENGTHS):
    """{strength: mean loss of the pairs of each fold under weights that the others gave}; inf where one fold holds all.

    states: [float[l, d], best reply first]. folds: int[lists]. strengths: strongest first, each starts from the last.
    """
    losses = {strength: [] for strength in strengths}
    for fold in np.unique(folds):
        held, rest = ([s for s, f in zip(states, folds) if (f == fold) == is_held] for is_held in (True, False))
        learn, test, weights = _differences(rest), _differences(held), None
        for strength in strengths:
            weights = fit(learn, strength, weights) if len(learn) else None
            losses[strength] += [np.inf] if weights is None else np.logaddexp(0, -test @ weights).tolist()
    return {strength: float(np.mean(of_strength)) for strength, of_strength in losses.items()}


def _folds(lists):
    """int[lists]: dealt by first human turn, so that no dialogue is on two sides."""
    indexed = lists.add_column("row", list(range(len(lists))))
    found = np.zeros(len(lists), int)
    for fold, part in split(indexed, {str(fold): 1 / FOLDS for fold in range(FOLDS)}).items():
        found[part["row"][:]] = int(fold)
    return found


def _differences(states):
    """float64[M, d] over every ordered pair of every list, better less worse."""
    return np.array([s[i] - s[j] for s in states for i in range(len(s)) for j in range(i + 1, len(s))])


# ---- with the backbone -------------------------------------------------------------------------------------------


class WithHeads(torch.nn.Module):
    """A backbone with a linear head for every axis, on the mean hidden state over the reply."""

    def __init__(self, reader):
        super().__init__()
        self.reader, self.backbone = reader, reader.model.train()
        self.head = torch.nn.Linear(reader.model.config.get_text_config().hidden_size, len(AXES), bias=False)
        torch.nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, better, worse, axes):
        """Mean loss of B pairs of encoded replies, each on its axis."""
        states = features.batch_states(self.reader, [*better, *worse])
        rewards = self.head(states).gather(1, torch.tensor([*axes, *axes], device=states.device)[:, None])
        first, second = rewards.squeeze(1).chunk(2)
        return {"loss": -logsigmoid(first - second).mean()}


def fit_whole(profile, spec, path, folder, label):
    """Train backbone and heads together on every ordered pair of every list; write both, and `heads.npz`."""
    torch.manual_seed(0)
    reader = features.reader(profile, spec.source)
    model = WithHeads(reader).to(reader.model.device)
    args = arguments(
        folder,
        epochs=spec.epochs,
        learning_rate=spec.learning_rate,
        batch_size=spec.batch_size,
        seed=0,
        save_steps=profile.training.save_steps,
        logging_steps=5,
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**args, remove_unused_columns=False),
        train_dataset=_pairs(read_lists(path), reader),
        data_collator=lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
        callbacks=[Progress(folder, label)],
    )
    fit_or_resume(trainer, folder)
    (folder / "model.safetensors").unlink(missing_ok=True)  # backbone and head, under names that no loader knows
    model.backbone.save_pretrained(folder)
    reader.tokenizer.save_pretrained(folder)
    width = model.head.weight.shape[1]
    save(Heads(list(AXES), model.head.weight.detach().double().cpu().numpy(), np.zeros(width), np.ones(width)), folder)


def _pairs(lists, reader):
    """[{"better", "worse": encoded replies, "axes": index of the axis}] of every ordered pair."""
    pairs = []
    for row in lists:
        encoded = [reader.encode(row["prompt"], reply) for reply in row["responses"]]
        axis = AXES.index(axis_of(row["subset"]))
        for i in range(len(encoded)):
            pairs += [{"better": encoded[i], "worse": worse, "axes": axis} for worse in encoded[i + 1 :]]
    return pairs
