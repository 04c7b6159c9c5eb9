"""The distribution reward inside real trainers: its value, its gradient under accumulation, calibration, refusals."""

from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL
from datasets import concatenate_datasets
from peft import LoraConfig
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from deftlib.method.distribution import distribution_reward
from deftlib.method.guidance import DistributionGuided
from deftlib.method.heads import HeadError, check_head
from deftlib.method.losses import pro_loss, rrhf_loss
from deftlib.method.passes import outputs_of
from deftlib.method.responses import best_responses
from deftlib.models.loop import arguments
from deftlib.training import encoding, trainers

METHODS = ["sft", "dpo", "pro", "rrhf"]
LENGTHS = {"sft": 2, "dpo": 2, "pro": 3, "rrhf": 3}
LIST_LOSSES = {"pro": lambda s: pro_loss(s.sums, s.counts), "rrhf": lambda s: rrhf_loss(s.sums, s.counts, s.rewards)}
GUIDED = {"sft": trainers.GuidedSFTTrainer, "dpo": trainers.GuidedPairTrainer}


class PlainDPOTrainer(DPOTrainer):
    """TRL's own, except that it does not tokenise again."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


@pytest.fixture
def make_trainer(tmp_path, tokenizer, q_diff):
    """A trainer of any method on encoded lists; `guided=False` gives the class without the distribution reward."""

    def make(method, model, lists, guided=True, omega=0.0, ratio_steps=0, reference=None, extra=None, **more):
        settings = {"epochs": 1, "learning_rate": 1.0, "batch_size": 8, "seed": 0, "optim": "sgd", "max_grad_norm": 0.0}
        settings |= {"lr_scheduler_type": "constant", "logging_steps": 1, "use_cpu": True}
        kwargs = arguments(tmp_path, **{**settings, **more})
        common = {"model": model, "processing_class": tokenizer, **(extra or {})}
        if guided:
            common = {"q_diff": q_diff, "omega": omega, "ratio_steps": ratio_steps} | common
        if method == "sft":
            args = SFTConfig(max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **kwargs)
            rows = lists.map(encoding.as_sft, remove_columns=lists.column_names)
            return (GUIDED[method] if guided else SFTTrainer)(args=args, train_dataset=rows, **common)
        if method == "dpo":
            args = DPOConfig(max_length=None, **kwargs)
            rows = lists.map(encoding.as_pair, remove_columns=["response_ids", "rewards"])
            kind = GUIDED[method] if guided else PlainDPOTrainer
            return kind(args=args, train_dataset=rows, ref_model=reference, **common)
        return (trainers.GuidedRankedListTrainer if guided else trainers.RankedListTrainer)(
            args=TrainingArguments(remove_unused_columns=False, **kwargs),
            train_dataset=lists,
            data_collator=lambda rows: trainers.collate_lists(rows, tokenizer.pad_token_id),
            list_loss=LIST_LOSSES[method],
            **common,
        )

    return make


def weights(model):
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def change_by_training(make_trainer, make_model, lists, method, **options):
    """What `trainer.train()` adds to the weights; with SGD at rate 1 and one update, minus the gradient."""
    model = make_model()
    before = weights(model)
    reference = make_model() if method == "dpo" else None
    make_trainer(method, model, lists, reference=reference, **options).train()
    return weights(model) - before


def printed_reward(model, lists, q_diff, tokenizer):
    """R_dis of the best responses [B] from full logits, EOS excluded: Eqs. 16-17 as printed, one list at a time."""
    rewards = []
    for row in lists:
        best = row["response_ids"][0]
        ids = torch.tensor([row["prompt_ids"] + best])
        labels = torch.tensor([[-100] * len(row["prompt_ids"]) + best])
        labels[labels == tokenizer.eos_token_id] = -100
        logits = model(input_ids=ids).logits
        rewards.append(distribution_reward(logits, labels, q_diff)[0])
    return torch.stack(rewards)


def rewards_seen(trainer):
    """R_dis of each best response of the first micro-batch since the last log, sorted: [k]."""
    values, scored = trainer._guided["R_dis"][0]
    return values[scored].sort()[0]


def first_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


# ---- accumulation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_one_batch_of_eight_and_four_of_two_push_equally(
    method, make_trainer, make_model, make_lists, q_diff, tokenizer
):
    lists, omega, pushes, alone = make_lists(8, LENGTHS[method]), 50.0, [], []
    for size, steps in ((8, 1), (2, 4)):
        options = {"batch_size": size, "gradient_accumulation_steps": steps}
        guided, plain = (
            change_by_training(make_trainer, make_model, lists, method, omega=weight, **options)
            for weight in (omega, 0.0)
        )
        pushes.append(guided - plain)
        alone.append(plain)
    assert torch.norm(pushes[0] - pushes[1]) < 1e-5 * torch.norm(pushes[0])
    assert torch.norm(alone[0] - alone[1]) < 1e-5 * torch.norm(alone[0])  # so does the method's own loss

    model = make_model()
    mean_reward = printed_reward(model, lists, q_diff, tokenizer).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(omega * mean_reward, list(model.parameters()))])
    assert torch.norm(pushes[1] - expected) < 1e-5 * torch.norm(expected)


@pytest.mark.parametrize("method", METHODS)
def test_an_update_cut_short_by_the_end_of_the_data_weighs_its_batches_fully(
    method, make_trainer, make_model, make_lists
):
    lists, pushes = make_lists(3, LENGTHS[method]), []
    for size, steps in ((3, 1), (1, 4)):  # three batches of one, though four make an update
        options = {"batch_size": size, "gradient_accumulation_steps": steps}
        guided, plain = (
            change_by_training(make_trainer, make_model, lists, method, omega=weight, **options)
            for weight in (50.0, 0.0)
        )
        pushes.append(guided - plain)
    assert torch.norm(pushes[0] - pushes[1]) < 1e-5 * torch.norm(pushes[0])


@pytest.mark.parametrize(
    "scaled, accepts, items, own_loss, steps",
    [
        (True, False, None, None, 4),  # the trainer says that it divides
        (False, True, 30, None, 1),  # or that it does not
        (None, True, 30, None, 4),  # else a loss by the tokens of the whole update is divided
        (None, True, None, None, 1),
        (None, False, 30, None, 1),
        (None, False, None, len, 4),  # and so is one that the user brings
    ],
)
def test_the_reward_is_divided_where_transformers_takes_the_loss_as_divided(scaled, accepts, items, own_loss, steps):
    trainer = SimpleNamespace(loss_is_scaled_for_ga=scaled, model_accepts_loss_kwargs=accepts)
    trainer.compute_loss_func, trainer.current_gradient_accumulation_steps = own_loss, 4
    assert DistributionGuided._accumulation(trainer, items) == steps


# ---- omega = 0 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_omega_zero_is_the_method_itself_bit_for_bit(method, make_trainer, make_model, make_lists):
    lists = make_lists(6, LENGTHS[method])
    options = {"batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    guided, plain = (
        change_by_training(make_trainer, make_model, lists, method, guided=guided, **options)
        for guided in (True, False)
    )
    assert torch.count_nonzero(plain) > 0
    assert torch.equal(guided, plain)


def test_r_dis_is_logged_under_omega_zero_but_no_gradient_ratio(make_trainer, make_model, make_lists):
    trainer = make_trainer("sft", make_model(), make_lists(), ratio_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert "R_dis" in entry and "gradient_ratio" not in entry
    assert entry["loss_method"] == pytest.approx(entry["loss"], abs=1e-4)


# ---- the value ---------------------------------------------------------------------------------------------------


def phi():
    model = PhiForCausalLM(PhiConfig(**SMALL))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


HEADS = {
    "tied": lambda make: make(),
    "untied": lambda make: make(tie_word_embeddings=False),
    "bias": lambda make: phi(),
    "divided": lambda make: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
    "multiplied": lambda make: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", ["sft", "dpo", "pro"])
def test_the_trainer_sees_r_dis_as_printed(head, method, make_trainer, make_model, make_lists, q_diff, tokenizer):
    torch.manual_seed(0)
    model, lists = HEADS[head](make_model), make_lists(4, LENGTHS[method])
    reference = HEADS[head](make_model) if method == "dpo" else None
    trainer = make_trainer(method, model, lists, reference=reference, omega=1.0)
    model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(model, first_batch(trainer))
    expected = printed_reward(model, lists, q_diff, tokenizer).detach()
    torch.testing.assert_close(rewards_seen(trainer), expected.sort()[0], rtol=1e-5, atol=1e-5)
    assert abs(expected.mean()) > 1e-3


@pytest.mark.parametrize("method", ["sft", "dpo", "pro"])
def test_only_tokens_of_the_best_response_count_and_eos_does_not(method, make_trainer, make_model, make_lists):
    lists = make_lists(4, LENGTHS[method])
    trainer = make_trainer(method, make_model(), lists, reference=make_model() if method == "dpo" else None)
    batch = first_batch(trainer)
    found = best_responses(batch, end_ids=[1])
    tokens = [[t for t in row.tolist() if t != -100] for row in found.labels]
    best = [row["response_ids"][0][:-1] for row in lists]
    assert sorted(row for row in tokens if row) == sorted(best)
    assert found.count == len(lists) and found.of == len(batch["input_ids"])
    scored = found.labels != -100
    assert torch.equal(batch["input_ids"][found.rows][scored], found.labels[scored])


def test_lists_of_different_lengths_share_a_batch(make_trainer, make_model, make_lists, q_diff, tokenizer):
    model, lists = make_model(), concatenate_datasets([make_lists(2, 3), make_lists(2, 2, seed=1), make_lists(1, 4)])
    trainer = make_trainer("pro", model, lists, omega=1.0)
    model.train()
    trainer.compute_loss(model, first_batch(trainer))
    expected = printed_reward(model, lists, q_diff, tokenizer).detach()
    torch.testing.assert_close(rewards_seen(trainer), expected.sort()[0], rtol=1e-5, atol=1e-5)


def test_soft_capped_heads_are_refused_by_name(make_trainer, make_lists):
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=30.0))
    with pytest.raises(HeadError, match="final_logit_softcapping"):
        make_trainer("sft", model, make_lists())


def test_a_head_that_is_not_linear_is_found_by_trying():
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertLMHeadModel(BertConfig(**shape, intermediate_size=32, is_decoder=True)).train()
    with pytest.raises(HeadError, match="the logits of bert are not scale"):  # a layer stands between h and W
        check_head(model)
    assert model.training


def test_a_model_without_an_output_head_is_refused():
    with pytest.raises(HeadError, match="LlamaForSequenceClassification has no output head"):
        check_head(LlamaForSequenceClassification(LlamaConfig(**SMALL)))


def test_a_trainer_without_a_tokenizer_is_refused(make_model, q_diff, tmp_path):
    class DeftTrainer(DistributionGuided, Trainer): ...

    with pytest.raises(ValueError, match="needs a tokenizer as processing_class"):
        DeftTrainer(make_model(), TrainingArguments(tmp_path, use_cpu=True), q_diff=q_diff)


def test_q_diff_of_another_vocabulary_is_refused(make_trainer, make_model, make_lists, q_diff):
    with pytest.raises(
        ValueError, match="q_diff has 39 entries, the head 40 rows and the tokenizer 40 tokens: count it"
    ):
        make_trainer("sft", make_model(), make_lists(), extra={"q_diff": q_diff[:-1]})


def test_a_padded_head_has_no_q_diff_for_rows_that_no_token_has(make_trainer, make_model, make_lists, q_diff):
    trainer = make_trainer("sft", make_model(vocab_size=64), make_lists(), omega=1.0)
    assert trainer.q_diff.tolist() == [*q_diff, *[0.0] * 24]
    trainer.train()
    assert all("R_dis" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_a_batch_of_an_unknown_family_is_refused_with_its_keys():
    with pytest.raises(ValueError, match="input_ids"):
        best_responses({"input_ids": torch.zeros(2, 3)}, end_ids=[1])


@pytest.mark.parametrize("method", METHODS)
def test_in_evaluation_the_plain_loss_is_returned(method, make_trainer, make_model, make_lists):
    model, lists = make_model(), make_lists(4, LENGTHS[method])
    options = {"reference": make_model(1) if method == "dpo" else None}
    guided = make_trainer(method, model, lists, omega=1e3, **options)
    plain = make_trainer(method, model, lists, guided=False, **options)
    model.eval()
    batch = first_batch(guided)
    with torch.no_grad():
        assert guided.compute_loss(model, dict(batch)) == plain.compute_loss(model, dict(batch))
    assert not guided._guided


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_during_training_logs_the_plain_loss(method, make_trainer, make_model, make_lists):
    model, lists = make_model(), make_lists(4, LENGTHS[method])
    reference = make_model(1) if method == "dpo" else None
    plain, guided = (make_trainer(method, model, lists, guided=g, reference=reference) for g in (False, True))
    guided.omega = 1e3
    losses = [t.evaluate(t.train_dataset)["eval_loss"] for t in (plain, guided)]
    assert losses[0] == losses[1]


# ---- adapters and checkpointing ----------------------------------------------------------------------------------


def lora(model_trainer):
    """Adapters that do something: PEFT starts them at zero."""
    torch.manual_seed(3)
    for name, parameter in model_trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model_trainer


LORA = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_lora_is_guided_by_the_adapted_pass_not_by_the_reference(
    method, make_trainer, make_model, make_lists, q_diff, tokenizer
):
    lists, start = make_lists(4), make_model()
    trainer = lora(make_trainer(method, start, lists, omega=1.0, extra=LORA))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    reward = rewards_seen(trainer).mean()
    adapted = printed_reward(trainer.model, lists, q_diff, tokenizer).mean()
    untouched = printed_reward(make_model(), lists, q_diff, tokenizer).mean()
    assert reward == pytest.approx(adapted.item(), rel=1e-5, abs=1e-5)
    assert abs(adapted - untouched) > 1e-3

    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    method_loss = make_trainer_loss(trainer, first_batch(trainer))
    expected = torch.autograd.grad(method_loss - adapted, parameters)
    for found, wanted in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def make_trainer_loss(trainer, batch):
    """The loss of the same trainer at omega = 0."""
    trainer.omega, omega = 0.0, trainer.omega
    loss = trainer.compute_loss(trainer.model, batch)
    trainer.omega = omega
    return loss


def test_a_pass_without_gradients_is_not_captured(make_model):
    model = make_model()
    ids = torch.tensor([[3, 4, 5]])
    with outputs_of(model.model) as captured:
        with torch.no_grad():
            model(ids)
        assert captured == []
        model(ids)
        assert len(captured) == 1
    model(ids)
    assert len(captured) == 1


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing(method, make_trainer, make_model, make_lists):
    lists = make_lists(4, LENGTHS[method])
    options = {"omega": 5.0, "ratio_steps": 1, "batch_size": 2, "learning_rate": 1e-2}
    plain, checkpointed = (
        change_by_training(make_trainer, make_model, lists, method, gradient_checkpointing=on, **options)
        for on in (False, True)
    )
    torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_autocast_trains_and_stays_near_float32(method, make_trainer, make_model, make_lists):
    lists = make_lists(4, LENGTHS[method])
    options = {"omega": 5.0, "ratio_steps": 1, "batch_size": 4, "learning_rate": 1.0}
    exact, rounded = (
        change_by_training(make_trainer, make_model, lists, method, bf16=on, **options) for on in (False, True)
    )
    assert torch.norm(rounded - exact) < 0.1 * torch.norm(exact)


# ---- calibration -------------------------------------------------------------------------------------------------


def gradient_norm(value, model):
    gradients = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], retain_graph=True)
    return torch.cat([g.flatten() for g in gradients]).norm().item()


@pytest.mark.parametrize("method", METHODS)
def test_calibration_reaches_the_wanted_gradient_ratio(
    method, make_trainer, make_model, make_lists, q_diff, tokenizer, monkeypatch
):
    model, lists = make_model(), make_lists(8, LENGTHS[method])
    reference = make_model() if method == "dpo" else None
    trainer = make_trainer(method, model, lists, batch_size=2, reference=reference, ratio_steps=1, learning_rate=1e-7)
    batches = list(trainer.get_train_dataloader())
    monkeypatch.setattr(trainer, "get_train_dataloader", lambda: batches)
    before = weights(model)
    omega = trainer.calibrate(0.03, batches=3)
    assert torch.equal(weights(model), before) and all(p.grad is None for p in model.parameters())
    assert trainer.omega == omega

    plain = make_trainer(method, model, lists, guided=False, reference=reference)
    method_norms, guide_norms = [], []
    for batch in batches[:3]:
        best = best_responses(batch, [tokenizer.eos_token_id])
        inputs = {name: batch[name][best.rows] for name in ("input_ids", "attention_mask")}
        reward = distribution_reward(model(**inputs).logits, best.labels, q_diff).sum() / best.count
        guide_norms.append(gradient_norm(reward, model))
        method_norms.append(gradient_norm(plain.compute_loss(model, dict(batch)), model))
    assert omega * sum(guide_norms) / sum(method_norms) == pytest.approx(0.03, rel=1e-4)

    trainer.train()  # hardly moves, so the logged ratios are those of the start
    logged = [entry["gradient_ratio"] for entry in trainer.state.log_history if "gradient_ratio" in entry]
    assert len(logged) == 4
    assert logged[:3] == pytest.approx([omega * g / m for g, m in zip(guide_norms, method_norms)], rel=1e-3)


def test_the_ratio_is_logged_every_so_many_updates_and_not_divided_by_accumulation(
    make_trainer, make_model, make_lists
):
    ratios = []
    for size, steps in ((4, 1), (2, 2)):
        trainer = make_trainer(
            "sft",
            make_model(),
            make_lists(16),
            omega=2.0,
            ratio_steps=2,
            batch_size=size,
            gradient_accumulation_steps=steps,
            learning_rate=1e-7,
        )
        trainer.train()
        entries = trainer.state.log_history[:-1]
        assert ["gradient_ratio" in entry for entry in entries] == [True, False, True, False]
        for entry in entries:
            assert entry["loss"] == pytest.approx(entry["loss_method"] - 2.0 * entry["R_dis"], abs=1e-3)
        ratios.append(entries[0]["gradient_ratio"])
    assert ratios[1] == pytest.approx(ratios[0], rel=0.3)
