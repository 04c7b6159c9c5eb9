"""Losses against golden numbers of the authors' code and the printed equations, and against values by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deftlib.distribution import distribution_reward
from deftlib.losses import (
    deft_loss,
    dpo_loss,
    ipo_loss,
    pro_loss,
    pro_official_loss,
    rrhf_loss,
    sequence_log_probs,
    sft_loss,
)

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "golden.json").read_text())
INPUTS = GOLDEN["inputs"]
LABELS = torch.tensor(INPUTS["labels"])
REWARDS = torch.tensor(INPUTS["rewards"], dtype=torch.float64)
REWARDS_TIE = torch.tensor(INPUTS["rewards_tie"], dtype=torch.float64)


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


REFERENCE_SUMS, COUNTS = sequence_log_probs(exact(INPUTS["ref_logits"]), LABELS)


def official_labels():
    """Labels under the mask of the PRO authors, which scores one padding token after every response but the longest."""
    ids, attention = torch.tensor(INPUTS["input_ids"]), torch.tensor(INPUTS["attention_mask"])
    position = torch.arange(ids.shape[-1])
    scored = (attention == 1) & (position >= torch.tensor(INPUTS["prompt_len"]).unsqueeze(-1) - 1)
    labels = torch.full_like(ids, -100)
    labels[..., 1:] = ids[..., 1:].where(scored[..., :-1], -100)
    return labels


def pair(sums):
    return sums[:, [0, -1]]


def with_sft(sums):
    return dpo_loss(pair(sums), pair(REFERENCE_SUMS)) + 0.05 * sft_loss(sums[:, 0])


# fixture: loss of (sums, counts) under the labels beside it
LOSSES = {
    "seq_logps_canonical": (lambda sums, counts: sums.sum(), LABELS),
    "sft_sum": (lambda sums, counts: sft_loss(sums[:, 0]), LABELS),
    "rrhf_deft_eq7_10": (lambda sums, counts: rrhf_loss(sums, counts, REWARDS), LABELS),
    "pro_deft_eq11_12_w1.0": (lambda sums, counts: pro_loss(sums, counts, sft_weight=1.0), LABELS),
    "pro_deft_eq11_12_w0.05": (lambda sums, counts: pro_loss(sums, counts), LABELS),
    "pro_official": (lambda sums, counts: pro_official_loss(sums, counts, REWARDS), official_labels()),
    "pro_official_tie": (lambda sums, counts: pro_official_loss(sums, counts, REWARDS_TIE), official_labels()),
    "dpo_sigmoid_b0.1": (lambda sums, counts: dpo_loss(pair(sums), pair(REFERENCE_SUMS)), LABELS),
    "dpo_plus_0.05_sft_sum": (lambda sums, counts: with_sft(sums), LABELS),
    "ipo_trl_lengthnorm_b0.1": (lambda sums, counts: ipo_loss(pair(sums), pair(REFERENCE_SUMS), pair(counts)), LABELS),
    "ipo_sum_b0.1": (
        lambda sums, counts: ipo_loss(pair(sums), pair(REFERENCE_SUMS), pair(counts), length_normalised=False),
        LABELS,
    ),
}


def loss_and_gradient(name, dtype):
    loss, labels = LOSSES[name]
    logits = torch.tensor(INPUTS["logits"], dtype=dtype, requires_grad=True)
    value = loss(*sequence_log_probs(logits, labels))
    value.backward()
    return value.detach().double(), logits.grad.double()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_its_gradient_equal_the_golden_numbers(name, dtype, tolerance):
    value, gradient = loss_and_gradient(name, dtype)
    fixture = GOLDEN["fixtures"][name]
    torch.testing.assert_close(value, exact(fixture["out"]["loss"]), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, exact(fixture["grad_logits"]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "labels", "sums", "counts"),
    [
        ("seq_logps_canonical", LABELS, "sum", "n"),
        ("pro_official", official_labels(), "sum_logp", "mask_len"),
    ],
)
def test_sums_and_counts_of_each_response_equal_the_golden_numbers(name, labels, sums, counts):
    expected = GOLDEN["fixtures"][name]["out"]
    found_sums, found_counts = sequence_log_probs(exact(INPUTS["logits"]), labels)
    torch.testing.assert_close(found_sums, exact(expected[sums]), rtol=1e-10, atol=0)
    assert found_counts.tolist() == expected[counts]


@pytest.mark.parametrize("case", GOLDEN["fixtures"]["pro_stages_from_scores"]["cases"])
def test_pro_rounds_equal_the_golden_numbers_for_two_to_four_responses(case):
    scores, rewards = exact([case["scores"]]), exact([case["rewards"]])
    scores.requires_grad_()
    counts = torch.ones_like(scores, dtype=torch.int64)
    assert pro_loss(scores, counts, sft_weight=0).item() == pytest.approx(case["deft_eq11"], abs=1e-10)
    official = pro_official_loss(scores, counts, rewards, sft_weight=0)
    official.backward()
    assert official.item() == pytest.approx(sum(case["official_stages"]), abs=1e-10)
    assert scores.grad[0].tolist() == pytest.approx(case["official_grad_scores"], abs=1e-10)


def test_a_response_is_as_likely_as_the_product_of_its_tokens():
    # Three words with probabilities 1/2, 1/4, 1/4 everywhere; the response is words 0 and 1 after a one-token prompt.
    logits = exact([2.0, 1.0, 1.0]).log().expand(3, 3)
    sums, counts = sequence_log_probs(logits, torch.tensor([-100, 0, 1]))
    assert sums.item() == pytest.approx(math.log(1 / 8))
    assert counts.item() == 2


def test_positions_outside_the_response_cannot_spoil_a_sum():
    logits = exact(INPUTS["logits"])
    spoilt = logits.clone()
    spoilt[..., :2, :] = math.nan  # these predict prompt tokens
    spoilt[..., -1, :] = math.inf  # and this one nothing
    spoilt.requires_grad_()
    sums, _ = sequence_log_probs(spoilt, LABELS)
    sums.sum().backward()
    assert torch.equal(sums, sequence_log_probs(logits, LABELS)[0])
    assert spoilt.grad.isfinite().all()


def test_half_precision_logits_give_single_precision_sums():
    logits = torch.tensor(INPUTS["logits"], dtype=torch.bfloat16)
    sums, _ = sequence_log_probs(logits, LABELS)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, sequence_log_probs(logits.float(), LABELS)[0])


def test_logits_and_labels_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        sequence_log_probs(torch.zeros(2, 4, 3), torch.zeros(2, 5, dtype=torch.int64))


def test_a_response_without_tokens_is_refused_where_its_mean_is_needed():
    sums, counts = exact([[-1.0, 0.0]]), torch.tensor([[2, 0]])
    for loss in (
        lambda: pro_loss(sums, counts),
        lambda: pro_official_loss(sums, counts, sums),
        lambda: rrhf_loss(sums, counts, sums),
        lambda: ipo_loss(sums, sums, counts),
    ):
        with pytest.raises(ValueError, match="no tokens"):
            loss()


def test_pairwise_losses_refuse_three_responses():
    three = exact([[-1.0, -2.0, -3.0]])
    with pytest.raises(ValueError, match="best and the worst"):
        dpo_loss(three, three)
    with pytest.raises(ValueError, match="best and the worst"):
        ipo_loss(three, three, torch.ones(1, 3))


def test_rrhf_counts_only_inversions():
    # Scores -1, -3, -2: only the last two stand in the wrong order, by 1; the best response has log-likelihood -4.
    sums, counts = exact([[-4.0, -6.0, -4.0]]), torch.tensor([[4, 2, 2]])
    assert rrhf_loss(sums, counts, exact([[3.0, 2.0, 1.0]])).item() == 1 + 4


def test_rrhf_takes_responses_in_any_order():
    sums, counts = REFERENCE_SUMS, COUNTS
    shuffle = [2, 0, 1]
    shuffled = rrhf_loss(sums[:, shuffle], counts[:, shuffle], REWARDS[:, shuffle])
    torch.testing.assert_close(shuffled, rrhf_loss(sums, counts, REWARDS))


def test_rrhf_ignores_tied_pairs():
    sums, counts = exact([[-4.0, -2.0]]), torch.tensor([[2, 2]])
    assert rrhf_loss(sums, counts, exact([[1.0, 1.0]])).item() == 4  # the first response's own log-likelihood alone


def test_pro_of_equal_scores_is_the_logarithm_of_the_number_of_orders():
    sums, counts = exact([[-5.0, -5.0, -5.0, -5.0]]), torch.full((1, 4), 5)
    assert pro_loss(sums, counts, sft_weight=0).item() == pytest.approx(math.log(math.factorial(4)))


SUMS = st.floats(-500, 0)


@settings(deadline=None)
@given(good=SUMS, bad=SUMS, good_count=st.integers(1, 128), bad_count=st.integers(1, 128))
def test_pro_of_a_pair_is_its_log_sigmoid(good, bad, good_count, bad_count):
    margin = exact(good / good_count - bad / bad_count)
    loss = pro_loss(exact([[good, bad]]), torch.tensor([[good_count, bad_count]]), sft_weight=0)
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(margin), rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(good=SUMS, bad=SUMS, beta=st.floats(0.01, 10))
def test_dpo_starts_at_ln_2_and_ipo_at_the_square_of_its_target(good, bad, beta):
    sums = exact([[good, bad]])
    assert dpo_loss(sums, sums, beta).item() == pytest.approx(math.log(2), rel=1e-12)
    assert ipo_loss(sums, sums, torch.tensor([[3, 4]]), beta).item() == pytest.approx(1 / (4 * beta**2), rel=1e-12)


def test_dpo_falls_when_the_good_response_gains_on_the_bad_one():
    reference = exact([[-10.0, -10.0]])
    better = dpo_loss(exact([[-9.0, -11.0]]), reference, beta=0.5)
    assert better.item() == pytest.approx(math.log(1 + math.exp(-1)))  # beta * margin = 0.5 * 2


@settings(deadline=None)
@given(order=st.permutations(range(4)), seed=st.integers(0, 2**32 - 1))
def test_the_order_of_lists_in_a_batch_does_not_matter(order, seed):
    generator = torch.Generator().manual_seed(seed)
    sums, reference = -50 * torch.rand(2, 4, 3, dtype=torch.float64, generator=generator)
    counts = torch.randint(1, 20, (4, 3), generator=generator)
    rewards = torch.randn(4, 3, dtype=torch.float64, generator=generator).sort(-1, descending=True).values

    def all_losses(rows):
        return torch.stack(
            [
                rrhf_loss(sums[rows], counts[rows], rewards[rows]),
                pro_loss(sums[rows], counts[rows]),
                pro_official_loss(sums[rows], counts[rows], rewards[rows]),
                dpo_loss(pair(sums[rows]), pair(reference[rows])),
                ipo_loss(pair(sums[rows]), pair(reference[rows]), pair(counts[rows])),
            ]
        )

    torch.testing.assert_close(all_losses(list(order)), all_losses(list(range(4))), rtol=1e-12, atol=1e-12)


def test_deft_subtracts_omega_times_the_mean_distribution_reward():
    assert deft_loss(exact(2.0), exact([0.1, 0.3]), omega=5).item() == pytest.approx(2 - 5 * 0.2)


@pytest.mark.parametrize("name", LOSSES)
def test_omega_zero_is_the_method_itself_in_value_and_gradient(name):
    loss, labels = LOSSES[name]
    logits = exact(INPUTS["logits"]).requires_grad_()
    reward = distribution_reward(logits[:, 0], LABELS[:, 0], GOLDEN["fixtures"]["deft_rdis"]["q_diff"])
    value = deft_loss(loss(*sequence_log_probs(logits, labels)), reward, omega=0.0)
    value.backward()
    plain_value, plain_gradient = loss_and_gradient(name, torch.float64)
    assert torch.equal(value, plain_value)
    assert torch.equal(logits.grad, plain_gradient)


def test_a_batch_without_any_scored_response_leaves_the_method_as_it_is():
    assert deft_loss(exact(2.0), torch.empty(0, dtype=torch.float64), omega=5).item() == 2
