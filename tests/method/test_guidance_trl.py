"""DEFT on every TRL trainer, as a user writes it: a class of one line and a dataset in TRL's own format."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import EOS, SMALL, VOCAB, Waits
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import PhiConfig, PhiForCausalLM, T5Config, T5ForConditionalGeneration
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from deftlib.method.distribution import distribution_reward
from deftlib.method.guidance import DistributionGuided, check_processes
from deftlib.method.heads import HeadError
from deftlib.method.responses import best_responses
from deftlib.models.loop import arguments


class DeftSFTTrainer(DistributionGuided, SFTTrainer): ...


class DeftDPOTrainer(DistributionGuided, DPOTrainer): ...


class DeftKTOTrainer(DistributionGuided, KTOTrainer): ...


class DeftGRPOTrainer(DistributionGuided, GRPOTrainer): ...


class DeftRLOOTrainer(DistributionGuided, RLOOTrainer): ...


class DeftCPOTrainer(DistributionGuided, CPOTrainer): ...


class DeftORPOTrainer(DistributionGuided, ORPOTrainer): ...


def case(guided, config, columns, **settings):
    return SimpleNamespace(guided=guided, plain=guided.__bases__[1], config=config, columns=columns, settings=settings)


PAIRS = ("prompt", "chosen", "rejected")
SAMPLED = {"num_generations": 2, "max_completion_length": 5, "temperature": 0.7}
CASES = {
    "sft": case(DeftSFTTrainer, SFTConfig, ("prompt", "completion")),
    "dpo": case(DeftDPOTrainer, DPOConfig, PAIRS),
    "dpo-ipo": case(DeftDPOTrainer, DPOConfig, PAIRS, loss_type="ipo"),
    "dpo-hinge": case(DeftDPOTrainer, DPOConfig, PAIRS, loss_type="hinge"),
    "dpo-sft": case(DeftDPOTrainer, DPOConfig, PAIRS, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
    "kto": case(DeftKTOTrainer, KTOConfig, ("prompt", "completion", "label")),
    "grpo": case(DeftGRPOTrainer, GRPOConfig, ("prompt",), **SAMPLED),
    "grpo-plain": case(DeftGRPOTrainer, GRPOConfig, ("prompt",), **SAMPLED, loss_type="grpo"),
    "rloo": case(DeftRLOOTrainer, RLOOConfig, ("prompt",), **SAMPLED),
    "cpo": case(DeftCPOTrainer, CPOConfig, PAIRS),
    "simpo": case(DeftCPOTrainer, CPOConfig, PAIRS, loss_type="simpo", cpo_alpha=0.0),
    "orpo": case(DeftORPOTrainer, ORPOConfig, PAIRS),
}
FAMILIES = ["sft", "dpo", "kto", "grpo", "rloo", "cpo", "orpo"]  # one case of each
ONLINE = {"grpo", "grpo-plain", "rloo"}
ENDS = [EOS, *range(3, 12)]  # a random model says EOS itself too rarely: with these, completions differ in length
DESIRABLE = [True, True, True, False, False, False, True, False]  # as pairs: two, one, none, one


def words(generator, low, high):
    ids = torch.randint(3, len(VOCAB), (torch.randint(low, high, (), generator=generator),), generator=generator)
    return "".join(f" w{i - 3}" for i in ids.tolist())


@pytest.fixture(scope="module")
def texts():
    """Eight rows with every column that any TRL trainer reads; prompts of 2-4 words, replies of 1-5."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "prompt": words(generator, 2, 5).strip(),
            "chosen": words(generator, 1, 6),
            "rejected": words(generator, 1, 6),
            "label": label,
        }
        for label in DESIRABLE
    ]
    return [{**row, "completion": row["chosen"]} for row in rows]


def longest_words(completions, **_):
    """A reward function that is the same in every run: the sum of the word numbers."""
    return [float(sum(int(word[1:]) for word in text.split() if word[0] == "w")) for text in completions]


@pytest.fixture
def make_trainer(tmp_path, tokenizer, q_diff, texts, make_model):
    """The trainer of a case on the eight rows; `guided=False` gives TRL's own."""

    def make(name, model=None, guided=True, omega=0.0, ratio_steps=0, peft_config=None, rows=None, **more):
        this, model = CASES[name], make_model() if model is None else model
        settings = {"epochs": 1, "learning_rate": 1.0, "batch_size": 8, "seed": 0, "optim": "sgd", "max_grad_norm": 0.0}
        settings |= {"lr_scheduler_type": "constant", "logging_steps": 1, "use_cpu": True, **this.settings, **more}
        dataset = Dataset.from_list([{name: row[name] for name in this.columns} for row in rows or texts])
        common = {"model": model, "processing_class": tokenizer, "train_dataset": dataset, "eval_dataset": dataset}
        if this.config in (DPOConfig, KTOConfig) and peft_config is None:
            common["ref_model"] = copy.deepcopy(model)
        if name in ONLINE:
            common["reward_funcs"] = longest_words
            model.generation_config.eos_token_id = ENDS
            settings.setdefault("beta", 0.0)  # without adapters TRL would load the reference from a folder
        if peft_config is not None:
            common["peft_config"] = peft_config
        if guided:
            common |= {"q_diff": q_diff, "omega": omega, "ratio_steps": ratio_steps}
        return (this.guided if guided else this.plain)(args=this.config(**arguments(tmp_path, **settings)), **common)

    return make


def first_batch(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def loss_of(trainer, batch):
    return trainer.compute_loss(trainer.model, dict(batch))


def best_tokens(name, texts, tokenizer, batches):
    """(prompt, response without EOS) of every best response that R_dis is to see, as token ids.

    From the texts, not from the trainer; only what GRPO and RLOO sampled has to be read from their batches.
    """
    if name not in ONLINE:
        encode = lambda text: tokenizer(text)["input_ids"]
        rows = [row for row in texts if name != "kto" or row["label"]]
        return [(encode(row["prompt"]), encode(row["chosen"])) for row in rows]
    found = []
    for batch in batches:
        for i in range(len(batch["prompt_ids"])):
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i] == 1].tolist()
            said = batch["completion_ids"][i][batch["completion_mask"][i] == 1].tolist()
            found.append((prompt, [token for token in said if token not in ENDS]))
    return [(prompt, said) for prompt, said in found if said]


def printed_rewards(model, responses, q_diff):
    """R_dis of each response from full logits, Eqs. 16-17 as printed, one unpadded row at a time."""
    rewards = []
    for prompt, response in responses:
        ids = torch.tensor([prompt + response])
        labels = torch.tensor([[-100] * len(prompt) + response])
        logits = model(input_ids=ids).logits[:, -ids.shape[1] :]  # without those of virtual tokens
        rewards.append(distribution_reward(logits, labels, q_diff)[0])
    return torch.stack(rewards)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def weights(model):
    return torch.cat([p.detach().flatten().double() for p in trainable(model)])


def same_direction(found, wanted, tolerance=1e-5):
    return torch.norm(found - wanted) < tolerance * torch.norm(wanted)


def gradient(value, parameters):
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, gradients)]
    )


def phi():
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SMALL))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


HEADS = {"tied": lambda make: make(), "untied": lambda make: make(tie_word_embeddings=False), "bias": lambda _: phi()}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def adapted(trainer):
    """Adapters that do something: PEFT starts them where they change nothing."""
    torch.manual_seed(3)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return trainer


# ---- value and gradient ------------------------------------------------------------------------------------------


def check_value_and_gradient(name, trainer, texts, tokenizer, q_diff):
    """R_dis and what it adds to the gradient of one batch, against the printed form; omega of the trainer is 2."""
    batch = first_batch(trainer)
    guided = loss_of(trainer, batch)
    ((values, scored),) = trainer._guided["R_dis"]
    seen = values[scored]
    trainer.omega = 0.0
    plain = loss_of(trainer, batch)
    expected = printed_rewards(trainer.model, best_tokens(name, texts, tokenizer, [batch]), q_diff)
    torch.testing.assert_close(seen.sort()[0], expected.detach().sort()[0], rtol=1e-4, atol=1e-5)
    assert expected.abs().mean() > 1e-3

    parameters = trainable(trainer.model)
    found = gradient(guided, parameters) - gradient(plain, parameters)
    assert same_direction(found, gradient(-2.0 * expected.sum() / 8, parameters), 1e-4)
    return expected


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", CASES)
def test_the_trainer_sees_r_dis_and_its_gradient_as_printed(
    name, head, make_trainer, make_model, texts, tokenizer, q_diff
):
    trainer = make_trainer(name, HEADS[head](make_model), omega=2.0)
    check_value_and_gradient(name, trainer, texts, tokenizer, q_diff)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_is_guided_by_the_adapted_pass_not_by_the_reference(
    name, make_trainer, make_model, texts, tokenizer, q_diff
):
    reference = {"beta": 0.1} if name in ONLINE else {}  # so that these run the model without its adapter too
    trainer = adapted(make_trainer(name, omega=2.0, peft_config=LORA, **reference))
    check_value_and_gradient(name, trainer, texts, tokenizer, q_diff)


@pytest.mark.parametrize("own", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5, 8]}])
@pytest.mark.parametrize("name", ["cpo", "orpo"])
def test_a_head_with_weights_of_its_own_is_read_as_trained(
    name, own, make_trainer, make_model, texts, tokenizer, q_diff
):
    make = HEADS["untied" if "modules_to_save" in own else "tied"]  # tied, the trained tokens reach the head
    adapters = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **own)
    trainer = adapted(make_trainer(name, make(make_model), omega=2.0, peft_config=adapters))
    seen = check_value_and_gradient(name, trainer, texts, tokenizer, q_diff)
    untouched = printed_rewards(make(make_model), best_tokens(name, texts, tokenizer, []), q_diff)
    assert (seen - untouched).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "cpo", "orpo"])
def test_a_best_response_of_eos_alone_adds_nothing_to_the_mean(name, make_trainer, texts, tokenizer, q_diff):
    rows = [{**texts[0], "chosen": "", "completion": ""}, *texts[1:]]
    check_value_and_gradient(name, make_trainer(name, omega=2.0, rows=rows), rows[1:], tokenizer, q_diff)


def test_a_batch_run_in_chunks_is_put_together(make_trainer, texts, tokenizer, q_diff):
    trainer = make_trainer("grpo", omega=2.0)
    whole = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: whole(*args, **{**kwargs, "batch_size": 3})
    check_value_and_gradient("grpo", trainer, texts, tokenizer, q_diff)


VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "grpo", "rloo"])  # TRL's CPO and ORPO fail on them themselves
def test_virtual_tokens_shift_what_predicts_a_response(name, kind, make_trainer, texts, tokenizer, q_diff):
    equal = [{**row, "prompt": " ".join((row["prompt"].split() * 2)[:3])} for row in texts]  # no padding behind them
    rows = equal if name in ONLINE else texts
    trainer = adapted(make_trainer(name, omega=2.0, peft_config=kind(**VIRTUAL), rows=rows))
    check_value_and_gradient(name, trainer, rows, tokenizer, q_diff)


# ---- packed ------------------------------------------------------------------------------------------------------

PACKED = {
    "without padding": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True, "max_length": 40},
    "bfd, one a row": {"packing": True, "max_length": 11},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 40},
}


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_responses_that_share_a_row_count_as_in_rows_of_their_own(
    packing, attention, make_trainer, make_model, texts, tokenizer, q_diff
):
    trainer = make_trainer("sft", make_model(attn_implementation=attention), omega=2.0, **PACKED[packing])
    assert len(first_batch(trainer)["input_ids"]) == 1
    check_value_and_gradient("sft", trainer, texts, tokenizer, q_diff)


def test_a_packed_response_cut_away_adds_nothing_to_the_mean(make_trainer, texts, tokenizer, q_diff):
    rows = [{**texts[0], "completion": ""}, *texts[1:]]
    trainer = make_trainer("sft", omega=2.0, rows=rows, padding_free=True, max_length=None, pad_to_multiple_of=16)
    check_value_and_gradient("sft", trainer, rows[1:], tokenizer, q_diff)


def test_under_wrapped_packing_a_row_is_a_response(make_trainer, texts, q_diff):
    wrapped = {"packing": True, "packing_strategy": "wrapped", "max_length": 12}
    trainer = make_trainer("sft", omega=2.0, **wrapped)
    loss_of(trainer, first_batch(trainer))
    ((values, scored),) = trainer._guided["R_dis"]
    expected = []
    for row in trainer.train_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        labels[labels == EOS] = -100
        if (labels[:, 1:] != -100).any():
            expected.append(distribution_reward(trainer.model(input_ids=ids).logits, labels, q_diff)[0])
    assert len(expected) > 2
    torch.testing.assert_close(values[scored].sort()[0], torch.stack(expected).sort()[0], rtol=1e-4, atol=1e-5)


# ---- accumulation ------------------------------------------------------------------------------------------------


def change_by_training(make_trainer, name, **options):
    """(trainer, what one update of SGD at rate 1 adds to the weights: minus the gradient)."""
    trainer = make_trainer(name, max_steps=1, **options)
    if "peft_config" in options:
        adapted(trainer)
    before = weights(trainer.model)
    trainer.train()
    return trainer, weights(trainer.model) - before


@pytest.mark.parametrize("name", CASES)
def test_one_batch_of_eight_and_four_of_two_push_equally(name, make_trainer, make_model, texts, tokenizer, q_diff):
    pushes, responses = [], []
    for size, steps in ((8, 1), (2, 4)):
        options = {"batch_size": size, "gradient_accumulation_steps": steps}
        trainer, guided = change_by_training(make_trainer, name, omega=50.0, **options)
        _, plain = change_by_training(make_trainer, name, **options)
        pushes.append(guided - plain)
        responses.append(best_tokens(name, texts, tokenizer, getattr(trainer, "_buffered_inputs", None)))
    assert sorted(responses[0]) == sorted(responses[1])
    assert same_direction(pushes[1], pushes[0])

    model = make_model()
    mean = printed_rewards(model, responses[0], q_diff).sum() / 8
    assert same_direction(pushes[1], gradient(50.0 * mean, trainable(model)).double())


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_accumulation_and_gradient_checkpointing_go_together(name, make_trainer, texts, tokenizer, q_diff):
    together = {"batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True, "ratio_steps": 1}
    trainer, guided = change_by_training(make_trainer, name, omega=50.0, peft_config=LORA, **together)
    _, plain = change_by_training(make_trainer, name, peft_config=LORA, **together)

    model = adapted(make_trainer(name, peft_config=LORA)).model
    responses = best_tokens(name, texts, tokenizer, getattr(trainer, "_buffered_inputs", None))
    mean = printed_rewards(model, responses, q_diff).sum() / 8
    assert same_direction(guided - plain, gradient(50.0 * mean, trainable(model)).double(), 1e-4)


def test_kto_without_a_desirable_row_is_plain_kto(make_trainer, texts):
    rows, ends = [{**row, "label": False} for row in texts], []
    for guided in (True, False):
        trainer = make_trainer("kto", rows=rows, omega=50.0, ratio_steps=1, guided=guided)
        trainer.train()
        ends.append(weights(trainer.model))
        assert all("R_dis" not in entry for entry in trainer.state.log_history)
    assert torch.equal(*ends)


def test_reentrant_checkpointing_changes_neither_the_push_nor_the_ratio_nor_omega(make_trainer):
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    pushes, ratios, omegas = [], [], []
    for options in ({}, reentrant):
        trainer, push = change_by_training(make_trainer, "dpo", omega=5.0, ratio_steps=1, **options)
        pushes.append(push)
        ratios.append(trainer.state.log_history[0]["gradient_ratio"])
        omegas.append(make_trainer("dpo", batch_size=2, **options).calibrate(0.03, batches=3))
    assert same_direction(*pushes)
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-5) and omegas[1] == pytest.approx(omegas[0], rel=1e-5)


# ---- what a step costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, "without padding"])
def test_no_step_waits_for_the_device_because_of_the_reward(name, make_trainer):
    counts = []
    for guided in (False, True):
        options = {"omega": 2.0, "guided": guided, **PACKED.get(name, {})}
        trainer = make_trainer("sft" if name in PACKED else name, **options)
        batch = first_batch(trainer)
        with Waits() as waits:
            loss_of(trainer, batch)
        counts.append(waits.count)
    assert counts[0] == counts[1]
    with Waits() as waits:
        bool(torch.ones(1).any())
    assert waits.count == 1


# ---- the plain method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_omega_zero_is_the_method_itself_bit_for_bit(name, make_trainer):
    ends = []
    for guided in (True, False):
        trainer = make_trainer(name, guided=guided, batch_size=2, optim="adamw_torch", learning_rate=1e-2)
        trainer.train()
        ends.append((weights(trainer.model), torch.get_rng_state()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("name", FAMILIES)
def test_evaluation_gives_the_plain_loss(name, make_trainer):
    losses = []
    for options in ({"omega": 1e3}, {"guided": False}):
        trainer = make_trainer(name, **options)
        torch.manual_seed(0)
        losses.append(trainer.evaluate()["eval_loss"])
        assert not getattr(trainer, "_guided", {})
    assert losses[0] == losses[1]


# ---- calibration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_calibration_reaches_the_ratio_that_training_then_has(name, make_trainer, monkeypatch):
    options = {"steps_per_generation": 4} if name in ONLINE else {}
    trainer = make_trainer(name, batch_size=2, ratio_steps=1, learning_rate=1e-9, **options)
    omega = trainer.calibrate(0.03, batches=3)
    norms, measure = [], trainer.gradient_norms
    monkeypatch.setattr(trainer, "gradient_norms", lambda *values: norms.append(measure(*values)) or norms[-1])
    trainer.train()  # hardly moves
    method, guide = (float(sum(values)) for values in zip(*norms[:3]))
    assert len(norms) >= 3
    assert omega * guide / method == pytest.approx(0.03, rel=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_calibration_changes_nothing_that_follows(name, make_trainer):
    ends = []
    for calibrated in (True, False):
        options = {"batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "optim": "adamw_torch"}
        trainer = make_trainer(name, **options)
        before = weights(trainer.model)
        if calibrated:
            trainer.calibrate(0.03, batches=3)
            assert torch.equal(weights(trainer.model), before)
            assert all(p.grad is None for p in trainer.model.parameters())
        trainer.omega = 0.5
        trainer.train()
        timed = lambda name: name == "step_time" or name.startswith("train_")
        entries = trainer.state.log_history
        ends.append((weights(trainer.model), [{k: v for k, v in e.items() if not timed(k)} for e in entries]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("more", [{}, {"bf16": True}, {"packing": True, "max_length": 40}], ids=str)
def test_the_ratio_asked_for_is_the_one_logged_first(more, make_trainer):
    trainer = make_trainer("sft", batch_size=2, ratio_steps=1, **more)
    trainer.calibrate(0.03, batches=1)
    trainer.train()
    assert trainer.state.log_history[0]["gradient_ratio"] == pytest.approx(0.03, rel=1e-6)


def test_calibration_runs_under_the_autocast_of_training(make_trainer):
    seen = []
    trainer = make_trainer("dpo", bf16=True)
    layer = trainer.model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.calibrate(0.03, batches=1)
    assert set(seen) == {torch.bfloat16} and len(seen) == 2


class Saved:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()  # else an output would hold the graph that holds it
        SAVED.add(self)


SAVED = weakref.WeakSet()


@pytest.mark.parametrize("name", ["dpo", "without padding"])
def test_measuring_holds_one_graph_at_a_time(name, make_trainer):
    trainer, held = make_trainer("sft" if name in PACKED else name, **PACKED.get(name, {})), []
    trainer.model.get_input_embeddings().register_forward_pre_hook(lambda *_: held.append(len(SAVED)))
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        trainer.calibrate(0.03, batches=1)
        trainer.ratio_steps = 1
        trainer.train()
    assert held == [0] * 5  # two passes to calibrate, two for the ratio, one to train


def test_measuring_the_ratio_leaves_dropout_and_gradients_alone(make_trainer, make_model):
    ends = []
    for ratio_steps in (0, 1):
        options = {"batch_size": 2, "gradient_accumulation_steps": 2, "ratio_steps": ratio_steps}
        trainer = make_trainer("sft", make_model(attention_dropout=0.5), omega=0.5, **options)
        trainer.train()
        ends.append((weights(trainer.model), torch.get_rng_state()))
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])


def test_both_gradients_are_measured_under_one_dropout(make_trainer, make_model):
    trainer = make_trainer("sft", make_model(attention_dropout=0.5))
    batch = first_batch(trainer)
    trainer._loss_and_rewards, passes = lambda *_: (loss(trainer.model, batch),) * 2 + (None, 1), []

    def loss(model, inputs):
        passes.append(model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss)
        return passes[-1]

    norms = trainer.gradient_norms(batch)
    assert passes[0] == passes[1] and norms[0] == norms[1]
    assert loss(trainer.model, batch) != passes[0]  # dropout goes on


@pytest.mark.parametrize("name, reason", [("kto", "R_dis"), ("grpo", "the trainer's own loss")])
def test_calibration_without_a_gradient_is_refused(name, reason, make_trainer, texts):
    trainer = make_trainer(name, rows=[{**row, "label": False} for row in texts])
    trainer.reward_funcs = [lambda completions, **_: [1.0] * len(completions)]  # no completion is better than another
    with pytest.raises(ValueError, match=f"{reason} has no gradient in 1 micro-batches"):
        trainer.calibrate(0.03, batches=1)


# ---- where the best responses are --------------------------------------------------------------------------------

X = -100
ANSWERS = {"input_ids": [[5, 6, 7, 1], [5, 8, 1, 0]], "completion_mask": [[0, 1, 1, 1], [0, 1, 1, 0]]}
ANSWERS["attention_mask"] = [[1, 1, 1, 1], [1, 1, 1, 0]]
SAID = {"prompt_ids": [[0, 5], [5, 6]], "completion_ids": [[7, 8, 1], [9, 3, 3]]}
CHOSEN = {"chosen_labels": [[X, 7, 1], [X, X, 8]]}
FOUND = {  # a batch, the labels of its best responses, in which rows, over how many the mean is taken; 1 is EOS
    "sft": ({"labels": [[X, 6, 1]], "attention_mask": [[1, 1, 1]]}, [[X, 6, X]], [0], 1),
    "dpo": (ANSWERS, [[X, 6, 7, X]], [0], 1),
    "kto": ({**ANSWERS, "label": [False, True]}, [[X, X, X, X], [X, 8, X, X]], [0, 1], 2),
    "grpo": ({**SAID, "completion_mask": [[1, 1, 1], [1, 0, 0]]}, [[X, X, 7, 8, X], [X, X, 9, X, X]], [0, 1], 2),
    "grpo, a tool spoke": (
        {**SAID, "completion_mask": [[1, 1, 1], [1, 1, 1]], "tool_mask": [[1, 0, 1], [1, 1, 0]]},
        [[X, X, 7, X, X], [X, X, 9, 3, X]],
        [0, 1],
        2,
    ),
    "cpo, rejected longer": (
        {**CHOSEN, "rejected_labels": [[X, 9, 9, 9, 1]] * 2},
        [[X, 7, X, X, X], [X, X, 8, X, X]],
        [0, 1],
        2,
    ),
    "cpo, chosen longer": ({**CHOSEN, "rejected_labels": [[X, 9]] * 2}, [[X, 7, X], [X, X, 8]], [0, 1], 2),
    "lists of one, three and two": (
        {"labels": [[X, i] for i in range(11, 17)], "attention_mask": [[1, 1]] * 6, "list_lengths": [1, 3, 2]},
        [[X, 11], [X, 12], [X, 15]],
        [0, 1, 4],
        3,
    ),
    "packed, the second cut to its prompt, padded": (
        {"labels": [[X, 6, 1, X, X, 9, 7, X, X]], "position_ids": [[0, 1, 2, 0, 1, 0, 1, 0, 0]]},
        [[X, 6, X, X, X, X, 7, X, X]],
        [0],
        3,
    ),
}


@pytest.mark.parametrize("family", FOUND)
def test_best_responses_by_hand(family):
    batch, labels, rows, count = FOUND[family]
    found = best_responses({name: torch.tensor(values) for name, values in batch.items()}, end_ids=[1])
    of = len(batch.get("labels", batch.get("input_ids", batch.get("completion_ids", "four"))))
    assert (found.labels.tolist(), found.count, found.of) == (labels, count, of)
    assert torch.arange(found.of)[found.rows].tolist() == rows


# ---- refusals ----------------------------------------------------------------------------------------------------


SPLIT = SimpleNamespace(tp_enabled=False, cp_enabled=True, sp_enabled=False)


@pytest.mark.parametrize(
    "setting, reason",
    [
        (("args", "n_gpu", 2), "one process sees 2 GPUs: start one for each, with `accelerate launch`"),
        (("args", "ddp_static_graph", True), "ddp_static_graph counts backward passes"),
        ((None, "is_deepspeed_enabled", True), "not tried with DeepSpeed: train with DDP or FSDP2"),
        ((None, "is_fsdp_enabled", True), "FSDP 1 flattens: set fsdp_version to 2"),
        (("accelerator", "parallelism_config", SPLIT), r"\(tensor, context, sequence parallelism\) has no R_dis"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_ways_to_use_several_devices_that_are_not_known_to_be_exact_are_refused(setting, reason):
    trainer = SimpleNamespace(
        args=SimpleNamespace(n_gpu=1, ddp_static_graph=None),
        accelerator=SimpleNamespace(is_fsdp2=False, parallelism_config=None),
        is_deepspeed_enabled=False,
        is_fsdp_enabled=False,
    )
    check_processes(trainer)
    part, name, value = setting
    setattr(getattr(trainer, part) if part else trainer, name, value)
    with pytest.raises(ValueError, match=reason):
        check_processes(trainer)


def test_lora_on_the_head_is_refused(make_trainer, make_model):
    adapters = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(HeadError, match="an adapter sits on the output head"):  # TRL's other trainers refuse it too
        make_trainer("cpo", make_model(tie_word_embeddings=False), peft_config=adapters)


def test_an_encoder_decoder_is_refused_by_name(make_trainer):
    config = T5Config(vocab_size=len(VOCAB), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    model.config.decoder_start_token_id = 0
    with pytest.raises(HeadError, match="t5 is an encoder-decoder"):
        make_trainer("cpo", model)


def test_virtual_tokens_before_packed_responses_are_refused(make_trainer):
    trainer = make_trainer("sft", peft_config=PromptTuningConfig(**VIRTUAL), padding_free=True, max_length=None)
    with pytest.raises(ValueError, match="virtual tokens stand before the first of the responses of a row"):
        loss_of(trainer, first_batch(trainer))


class DeftTPOTrainer(DistributionGuided, TPOTrainer): ...


def test_tpos_third_part_is_refused_by_name_and_its_pairs_alone_are_not(make_trainer, texts, monkeypatch):
    monkeypatch.setitem(CASES, "tpo", case(DeftTPOTrainer, TPOConfig, (*PAIRS, "reference")))
    rows = [{**row, "reference": row["chosen"]} for row in texts]
    with pytest.raises(ValueError, match="tpo_alpha > 0 is refused"):
        make_trainer("tpo", rows=rows, tpo_alpha=1.0)
    assert make_trainer("tpo", rows=rows, tpo_alpha=0.0).omega == 0


class TwoPassTrainer(CPOTrainer):
    """Runs the chosen and the rejected responses one after the other, as no trainer of TRL's does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        chosen, rejected = (model(inputs[f"{side}_input_ids"]).logits for side in ("chosen", "rejected"))
        return rejected.mean() - chosen.mean()


class DeftTwoPassTrainer(DistributionGuided, TwoPassTrainer): ...


def test_passes_that_are_not_the_batch_are_refused(make_trainer, texts, monkeypatch):
    monkeypatch.setattr(CASES["cpo"], "guided", DeftTwoPassTrainer)
    trainer = make_trainer("cpo", rows=[{"prompt": "w1", "chosen": " w2 w3", "rejected": " w4"}])
    with pytest.raises(ValueError, match=r"ran with gradients on \[\(1, 4\), \(1, 3\)\] .* the batch holds \(2, 4\)"):
        loss_of(trainer, first_batch(trainer))
