"""Losses against golden numbers of the authors' code and the printed equations, and against values by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deftlib.method.distribution import distribution_reward
from deftlib.method.losses import (
    asft_loss,
    deft_loss,
    dpo_loss,
    greedy_inputs,
    ift_loss,
    intuitive_embeddings,
    ipo_loss,
    pro_loss,
    pro_official_loss,
    propagation_weights,
    rrhf_loss,
    rrhf_official_loss,
    sequence_log_probs,
    sft_loss,
    sr_dpo_loss,
    sr_ipo_loss,
    token_log_probs,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "golden.json").read_text())
INPUTS = GOLDEN["inputs"]
LABELS = torch.tensor(INPUTS["labels"])
REWARDS = torch.tensor(INPUTS["rewards"], dtype=torch.float64)
REWARDS_TIE = torch.tensor(INPUTS["rewards_tie"], dtype=torch.float64)
REWARDS_UNSORTED = torch.tensor(INPUTS["rewards_unsorted"], dtype=torch.float64)
PADDED = torch.full((2,), LABELS.shape[-1])  # both lists hold a row that fills the width


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


REFERENCE_SUMS, COUNTS = sequence_log_probs(exact(INPUTS["ref_logits"]), LABELS)
QUALITY_SUMS, _ = sequence_log_probs(exact(INPUTS["logits_px"]), LABELS)  # after a quality prefix
QUALITY_REFERENCE_SUMS, _ = sequence_log_probs(exact(INPUTS["ref_logits_px"]), LABELS)


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


def dpo(sums):
    return dpo_loss(pair(sums), pair(REFERENCE_SUMS))


def normalised_dpo(sums, counts):
    return dpo_loss(pair(sums / counts), pair(REFERENCE_SUMS / counts))


def rrhf_with_true_lengths(sums, counts):
    """What RRHF's authors meant: scores by true length, the SFT term by padded length."""
    best = sums[:, 0]
    return rrhf_loss(sums, counts, REWARDS) - sft_loss(best) + sft_loss(best / PADDED)


def self_refined(loss, with_reference):
    extra = (pair(QUALITY_REFERENCE_SUMS),) if with_reference else ()
    return lambda sums, counts: loss(pair(sums), pair(REFERENCE_SUMS), pair(QUALITY_SUMS), *extra, weight=0.5)


# fixture: loss of (sums, counts) under the labels beside it
LOSSES = {
    "seq_logps_canonical": (lambda sums, counts: sums.sum(), LABELS),
    "sft_sum": (lambda sums, counts: sft_loss(sums[:, 0]), LABELS),
    "sft_seq_mean": (lambda sums, counts: sft_loss(sums[:, 0] / counts[:, 0]), LABELS),
    "sft_token_mean": (lambda sums, counts: -sums[:, 0].sum() / counts[:, 0].sum(), LABELS),
    "rrhf_deft_eq7_10": (lambda sums, counts: rrhf_loss(sums, counts, REWARDS), LABELS),
    "rrhf_official": (lambda sums, counts: rrhf_official_loss(sums, PADDED, REWARDS), LABELS),
    "rrhf_official_tie": (lambda sums, counts: rrhf_official_loss(sums, PADDED, REWARDS_TIE), LABELS),
    "rrhf_official_unsorted": (lambda sums, counts: rrhf_official_loss(sums, PADDED, REWARDS_UNSORTED), LABELS),
    "rrhf_fixed_len": (rrhf_with_true_lengths, LABELS),
    "pro_deft_eq11_12_w1.0": (lambda sums, counts: pro_loss(sums, counts, sft_weight=1.0), LABELS),
    "pro_deft_eq11_12_w0.05": (lambda sums, counts: pro_loss(sums, counts), LABELS),
    "pro_official": (lambda sums, counts: pro_official_loss(sums, counts, REWARDS), official_labels()),
    "pro_official_tie": (lambda sums, counts: pro_official_loss(sums, counts, REWARDS_TIE), official_labels()),
    "pro_official_clean_mask": (lambda sums, counts: pro_official_loss(sums, counts, REWARDS), LABELS),
    "dpo_sigmoid_b0.1": (lambda sums, counts: dpo(sums), LABELS),
    "dpo_sigmoid_norm_b0.1": (normalised_dpo, LABELS),
    "cdpo_ls0.1_b0.1": (
        lambda sums, counts: dpo_loss(pair(sums), pair(REFERENCE_SUMS), label_smoothing=0.1),
        LABELS,
    ),
    "dpo_plus_0.05_sft_sum": (lambda sums, counts: dpo(sums) + 0.05 * sft_loss(sums[:, 0]), LABELS),
    "dpo_plus_0.05_sft_seq_mean": (
        lambda sums, counts: dpo(sums) + 0.05 * sft_loss(sums[:, 0] / counts[:, 0]),
        LABELS,
    ),
    "dpo_plus_0.05_sft_token_mean": (
        lambda sums, counts: dpo(sums) - 0.05 * sums[:, 0].sum() / counts[:, 0].sum(),
        LABELS,
    ),
    "ipo_trl_lengthnorm_b0.1": (lambda sums, counts: ipo_loss(pair(sums), pair(REFERENCE_SUMS), pair(counts)), LABELS),
    "ipo_sum_b0.1": (
        lambda sums, counts: ipo_loss(pair(sums), pair(REFERENCE_SUMS), pair(counts), length_normalised=False),
        LABELS,
    ),
    "sr_dpo_with_ref_lam0.5_b0.1": (self_refined(sr_dpo_loss, with_reference=True), LABELS),
    "sr_dpo_no_ref_lam0.5_b0.1": (self_refined(sr_dpo_loss, with_reference=False), LABELS),
    "sr_ipo_with_ref_lam0.5_b0.1": (self_refined(sr_ipo_loss, with_reference=True), LABELS),
    "sr_ipo_no_ref_lam0.5_b0.1": (self_refined(sr_ipo_loss, with_reference=False), LABELS),
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


IFT = [name for name in GOLDEN["fixtures"] if name.startswith("ift_")]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", IFT)
def test_intuitive_fine_tuning_equals_the_golden_numbers_step_by_step(name, dtype, tolerance):
    fixture = GOLDEN["fixtures"][name]
    given, settings, expected = fixture["inputs"], fixture["params"], fixture["out"]
    embedding = torch.tensor(given["E"], dtype=dtype)
    head = torch.tensor(given["W"], dtype=dtype, requires_grad=True)  # a toy model: logits are embedding @ W
    ids, labels = torch.tensor(given["input_ids"]), torch.tensor(given["labels"])
    own_ids = greedy_inputs(ids, labels, (embedding[ids] @ head.detach())[:, :-1].argmax(-1))
    mixed = intuitive_embeddings(embedding[ids], embedding[own_ids], settings["lambda"])
    log_probs, is_response = token_log_probs(mixed @ head, labels)
    weights = propagation_weights(-log_probs, is_response, settings["gamma"])
    loss = ift_loss(log_probs, is_response, settings["gamma"], settings["detach_weights"])
    loss.backward()
    assert own_ids.tolist() == expected["input_ids_further"]
    found = {"inputs_embeds_further": mixed, "token_logps_further": log_probs, "weights": weights, "loss": loss}
    for key, value in found.items():
        torch.testing.assert_close(value.double(), exact(expected[key]), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(head.grad.double(), exact(fixture["grad_W"]), rtol=tolerance, atol=tolerance)


def test_every_loss_among_the_golden_numbers_is_held():
    elsewhere = {"pro_stages_from_scores", "deft_rdis", "deft_qdiff_counts"}
    assert GOLDEN["fixtures"].keys() - LOSSES.keys() - set(IFT) == elsewhere


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


def test_asft_by_hand():
    # Two tokens each: the good response has likelihood 1/2 a token, the bad one 1/4.
    sums, counts = exact([[2 * math.log(1 / 2), 2 * math.log(1 / 4)]]), torch.tensor([[2, 2]])
    aligned = -math.log(1 / 2) - math.log(1 - 1 / 4)
    assert asft_loss(sums, counts, align_weight=0.5).item() == pytest.approx(math.log(2) + 0.5 * aligned)
    assert asft_loss(sums, counts, align_weight=0.0).item() == pytest.approx(math.log(2))  # SFT, the sequence mean


def test_asft_pushes_each_response_by_itself():
    sums, counts = exact([[-3.0, -1.0]]).requires_grad_(), torch.tensor([[3, 1]])
    asft_loss(sums, counts).backward()
    assert sums.grad[0, 0] < 0 < sums.grad[0, 1]
    alone = exact([[-3.0, -9.0]]).requires_grad_()  # another bad response: the good one is pushed as before
    asft_loss(alone, counts).backward()
    assert alone.grad[0, 0] == sums.grad[0, 0]


def test_ift_weighs_a_token_by_the_discounted_losses_from_there_on():
    # Losses 1, 2, 4 after a prompt token, discount 1/2: 1 + 1 + 1, 2 + 2, 4; rescaled to mean 1.
    losses, is_response = exact([[0.0, 1.0, 2.0, 4.0]]), torch.tensor([[False, True, True, True]])
    weights = propagation_weights(losses, is_response, gamma=0.5)
    assert weights[0].tolist() == pytest.approx([0, 9 / 11, 12 / 11, 12 / 11])
    assert ift_loss(-losses, is_response, gamma=0.5).item() == pytest.approx((9 * 1 + 12 * 2 + 12 * 4) / 33)


def test_ift_without_propagation_is_the_sequence_mean_and_the_gradient_flows_through_its_weights():
    log_probs = exact([[-1.0, -2.0, -3.0], [-5.0, 0.0, 0.0]])
    is_response = log_probs != 0
    assert ift_loss(log_probs, is_response, gamma=0).item() == (2 + 5) / 2
    gradients = []
    for detach in (False, True):
        given = log_probs.clone().requires_grad_()
        ift_loss(given, is_response, gamma=0.9, detach_weights=detach).backward()
        gradients.append(given.grad)
    assert not torch.allclose(*gradients)


def test_the_gradient_through_ifts_weights_pushes_easy_last_tokens_down():
    """Two hard tokens in the middle: the authors' gradient makes the easy end less likely, a detached one does not."""
    log_probs, is_response = -exact([[0.1] * 4 + [3.0] * 2 + [0.1] * 6]), torch.ones(1, 12, dtype=bool)
    last = []
    for detach in (False, True):
        given = log_probs.clone().requires_grad_()
        ift_loss(given, is_response, gamma=0.95, detach_weights=detach).backward()
        last.append(given.grad[0, -1].item())
    assert last == pytest.approx([0.092, -0.003], abs=1e-3)  # descent moves against the gradient


def test_intuitive_inputs_mix_embeddings_and_replace_response_tokens_alone():
    assert intuitive_embeddings(exact([1.0, 0.0]), exact([0.0, 1.0]), weight=0.2).tolist() == [0.8, 0.2]
    ids, labels = torch.tensor([[5, 6, 7, 2]]), torch.tensor([[-100, 6, 7, -100]])
    assert greedy_inputs(ids, labels, predicted=torch.tensor([[8, 9, 4]])).tolist() == [[5, 8, 9, 2]]


@settings(deadline=None)
@given(good=SUMS, bad=SUMS)
def test_a_self_refined_loss_of_weight_zero_is_its_carrier_and_the_refinement_has_no_gradient(good, bad):
    policy, reference, counts = exact([[good, bad]]), exact([[-5.0, -4.0]]), torch.tensor([[3, 2]])
    quality = exact([[bad, good]]).requires_grad_()
    assert sr_dpo_loss(policy, reference, quality, weight=0).item() == dpo_loss(policy, reference).item()
    ipo = ipo_loss(policy, reference, counts, length_normalised=False)
    assert sr_ipo_loss(policy, reference, quality, weight=0).item() == ipo.item()
    assert not sr_dpo_loss(policy, reference, quality).requires_grad


def test_a_refinement_that_agrees_lowers_the_margin():
    policy, reference = exact([[-1.0, -3.0]]), exact([[-2.0, -2.0]])
    agrees, disagrees = exact([[-1.0, -2.0]]), exact([[-2.0, -1.0]])  # D = 1, D = -1
    refined = [sr_dpo_loss(policy, reference, quality, weight=0.5).item() for quality in (agrees, disagrees)]
    assert refined == pytest.approx([math.log1p(math.exp(-0.1 * (2 - 0.5 * d))) for d in (1, -1)])
    assert refined[0] > dpo_loss(policy, reference).item() > refined[1]


def test_rrhfs_own_code_divides_by_the_padded_length_and_weighs_the_ranking():
    sums, rewards = exact([[-8.0, -4.0]]), exact([[1.0, 0.0]])
    for rank_weight in (1, 100):
        loss = rrhf_official_loss(sums, torch.tensor([8]), rewards, rank_weight)
        assert loss.item() == pytest.approx(rank_weight * (-4 + 8) / 8 + 8 / 8)


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
                rrhf_official_loss(sums[rows], counts[rows].amax(-1), rewards[rows]),
                asft_loss(sums[rows], counts[rows]),
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
