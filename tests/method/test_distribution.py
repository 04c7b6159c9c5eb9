"""Counts, q_diff and the two forms of R_dis: golden numbers, values by hand, and the identity as a property."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from deftlib.method import distribution
from deftlib.method.distribution import (
    count_tokens,
    discrepancy,
    distribution_reward,
    folded_reward,
    folded_reward_of_segments,
    folded_reward_or_zero,
    mean_response_hidden,
    reward_direction,
)
from deftlib.method.grading import sides

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "golden.json").read_text())
FIXTURES = GOLDEN["fixtures"]
LABELS = torch.tensor(GOLDEN["inputs"]["labels"])


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def test_counts_of_one_list_per_level_equal_the_golden_numbers():
    samples = FIXTURES["deft_qdiff_counts"]["samples"]
    expected = FIXTURES["deft_qdiff_counts"]["out"]
    list_sides = [sides(level, sample["rewards"]) for level, sample in samples.items()]
    pos, neg = count_tokens((sample["responses"] for sample in samples.values()), iter(list_sides), vocab_size=11)
    assert pos.tolist() == expected["counts_pos"]
    assert neg.tolist() == expected["counts_neg"]
    assert pos.dtype == neg.dtype == np.int64
    assert discrepancy(pos, neg).tolist() == pytest.approx(expected["q_diff"], abs=1e-15)


def test_a_token_counts_as_often_as_it_occurs_and_side_zero_counts_nowhere():
    pos, neg = count_tokens([[[1, 1, 2], [0, 0], [1]], [[], [2, 2]]], [[+1, 0, -1], [+1, -1]], vocab_size=4)
    assert pos.tolist() == [0, 2, 1, 0]
    assert neg.tolist() == [0, 1, 2, 0]


@given(
    st.lists(st.lists(st.tuples(st.lists(st.integers(0, 5)), st.sampled_from([1, -1, 0])), max_size=4)),
    st.integers(1, 20),
)
def test_tokens_are_counted_alike_however_many_are_held(lists, held):
    by_hand = {1: np.zeros(6, int), -1: np.zeros(6, int), 0: np.zeros(6, int)}
    for replies in lists:
        for tokens, side in replies:
            np.add.at(by_hand[side], tokens, 1)
    token_lists, list_sides = ([[reply[i] for reply in replies] for replies in lists] for i in (0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distribution, "TOKENS_HELD", held)
        pos, neg = count_tokens(token_lists, list_sides, vocab_size=6)
    assert np.array_equal(pos, by_hand[1]) and np.array_equal(neg, by_hand[-1])


@pytest.mark.parametrize(
    ("token_lists", "list_sides", "message"),
    [
        ([[[0], [1]], [[0], [3]]], [[+1, -1], [+1, -1]], "list 1: token ids 3 to 3, expected 0 to 2"),
        ([[[0], [-1]]], [[+1, -1]], "list 0: token ids -1"),
        ([[[0], [1]]], [[+1]], "list 0: 2 responses but 1 sides"),
        ([[[0], [1]]], [[+1, 2]], "list 0: side 2"),
        ([[[0], [1]], [[0], [1]]], [[+1, -1]], "shorter"),
    ],
)
def test_counting_names_the_list_it_refuses(token_lists, list_sides, message):
    with pytest.raises(ValueError, match=message):
        count_tokens(token_lists, list_sides, vocab_size=3)


def test_discrepancy_by_hand():
    # Good: 3 of 4 tokens are word 0. Bad: 1 of 2. Form words cancel, here word 1.
    assert discrepancy([3, 1, 0, 0], [2, 1, 1, 0]).tolist() == [0.25, 0.0, -0.25, 0.0]


@given(arrays(np.int64, st.tuples(st.just(2), st.integers(1, 500)), elements=st.integers(0, 10**9)))
def test_discrepancy_sums_to_zero_and_its_absolute_values_to_at_most_two(counts):
    counts[:, 0] += 1  # neither side is empty
    q_diff = discrepancy(*counts)
    assert abs(q_diff.sum()) < 1e-14
    assert np.abs(q_diff).sum() <= 2 + 1e-14
    assert np.array_equal(discrepancy(*counts[::-1]), -q_diff)


@pytest.mark.parametrize(
    ("pos", "neg", "message"),
    [
        ([0, 0], [1, 0], "Q_pos is empty"),
        ([1, 0], [0, 0], "Q_neg is empty"),
        ([2, -1], [1, 0], "Q_pos holds a negative"),
        ([1, 0], [1, 0, 0], "one length"),
    ],
)
def test_discrepancy_refuses_empty_negative_or_unequal_counts(pos, neg, message):
    with pytest.raises(ValueError, match=message):
        discrepancy(pos, neg)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_distribution_reward_and_its_gradient_equal_the_golden_numbers(dtype, tolerance):
    fixture = FIXTURES["deft_rdis"]
    q_diff = discrepancy(fixture["counts_pos"], fixture["counts_neg"])
    assert q_diff.tolist() == pytest.approx(fixture["q_diff"], abs=1e-15)
    logits = torch.tensor(GOLDEN["inputs"]["logits"], dtype=dtype, requires_grad=True)
    rewards = distribution_reward(logits, LABELS, q_diff)
    rewards.sum().backward()
    torch.testing.assert_close(rewards.double(), exact(fixture["out"]["R_dis"]), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logits.grad.double(), exact(fixture["grad_logits"]), rtol=tolerance, atol=tolerance)


def test_distribution_reward_by_hand():
    # Two words; log-probabilities ln 3/4, ln 1/4 at the one position that predicts the response: R_dis = 1/2 ln 3.
    logits = exact([[[0.0, 9.0], [math.log(3), 0.0], [9.0, 0.0]]])
    labels = torch.tensor([[-100, -100, 0]])
    assert distribution_reward(logits, labels, np.array([0.5, -0.5])).item() == pytest.approx(math.log(3) / 2)


@st.composite
def heads(draw):
    """A linear head, hidden states within +-scale, labels with at least one response token a row, and a q_diff."""
    batch, time, vocab, width = (draw(st.integers(1, 3)), *(draw(st.integers(2, high)) for high in (8, 500, 24)))
    scale = draw(st.sampled_from([1e-3, 0.1, 1.0, 5.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def uniform(*shape):
        return scale * (2 * torch.rand(shape, dtype=torch.float64, generator=generator) - 1)

    hidden, weight, bias = uniform(batch, time, width), uniform(vocab, width), uniform(vocab)
    labels = torch.randint(0, vocab, (batch, time), generator=generator)
    labels[torch.rand(batch, time, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9]))] = -100
    labels[:, -1] = 0
    counts = torch.randint(0, 50, (2, vocab), generator=generator).numpy()
    counts[:, 0] += 1
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels, discrepancy(*counts)


@settings(deadline=None)
@given(heads(), st.booleans())
def test_folded_reward_equals_the_printed_one_in_value_and_gradient(head, has_bias):
    hidden, weight, bias, labels, q_diff = head
    logits = hidden @ weight.T + (bias if has_bias else 0)
    printed = distribution_reward(logits, labels, q_diff)
    offset = reward_direction(bias, q_diff) if has_bias else 0.0
    folded = folded_reward(hidden, labels, reward_direction(weight, q_diff), offset)
    parameters = (hidden, weight, bias) if has_bias else (hidden, weight)
    tolerance = 1e-12 * (1 + logits.abs().max().item())
    torch.testing.assert_close(folded, printed, rtol=0, atol=tolerance)
    folded_gradients = torch.autograd.grad(folded.sum(), parameters)
    printed_gradients = torch.autograd.grad(printed.sum(), parameters)
    torch.testing.assert_close(folded_gradients, printed_gradients, rtol=0, atol=tolerance)


@settings(deadline=None, max_examples=25)
@given(heads())
def test_single_precision_stays_close_to_double(head):
    hidden, weight, _, labels, q_diff = head
    double = folded_reward(hidden, labels, reward_direction(weight, q_diff))
    single = folded_reward(hidden.float(), labels, reward_direction(weight.float(), q_diff))
    assert single.dtype == torch.float32
    scale = 1 + (hidden @ weight.T).abs().max().item()
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5 * scale)


@settings(deadline=None, max_examples=25)
@given(heads(), st.randoms())
def test_each_row_has_its_own_reward_whatever_the_batch(head, random):
    hidden, weight, _, labels, q_diff = head
    rows = random.sample(range(len(labels)), len(labels))
    direction = reward_direction(weight, q_diff)
    in_order = folded_reward(hidden, labels, direction)
    assert torch.equal(folded_reward(hidden[rows], labels[rows], direction), in_order[rows])


@settings(deadline=None, max_examples=25)
@given(heads())
def test_responses_in_one_row_have_the_rewards_of_rows_of_their_own(head):
    hidden, weight, bias, labels, q_diff = head
    direction, offset = reward_direction(weight, q_diff), reward_direction(bias, q_diff)
    labels[0] = -100  # a response without a token: 0, and so said
    alone, has_any = folded_reward_or_zero(hidden, labels, direction, offset)
    assert alone[0] == 0 and not has_any[0]
    assert torch.equal(alone[has_any], folded_reward(hidden[has_any], labels[has_any], direction, offset))

    rows, time = labels.shape
    first, segments = torch.arange(rows * time) % time == 0, torch.arange(rows * time) // time
    packed = labels.flatten().masked_fill(first, -100)[None], segments[None]
    together, of_segment = folded_reward_of_segments(hidden.flatten(0, 1)[None], *packed, direction, offset)
    assert of_segment.nonzero().flatten().tolist() == has_any.nonzero().flatten().tolist()
    torch.testing.assert_close(together[:rows], alone, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(r.sum(), (hidden, weight), retain_graph=True) for r in (together, alone))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_adding_a_constant_to_all_logits_changes_nothing():
    logits, q_diff = exact(GOLDEN["inputs"]["logits"]), FIXTURES["deft_rdis"]["q_diff"]
    shifted = distribution_reward(logits + 7, LABELS, q_diff)
    torch.testing.assert_close(shifted, distribution_reward(logits, LABELS, q_diff), rtol=0, atol=1e-13)


def test_reward_is_linear_in_the_logits_so_nothing_bounds_it():
    logits, q_diff = exact(GOLDEN["inputs"]["logits"]), FIXTURES["deft_rdis"]["q_diff"]
    reward = distribution_reward(logits, LABELS, q_diff)
    torch.testing.assert_close(distribution_reward(1000 * logits, LABELS, q_diff), 1000 * reward, rtol=1e-9, atol=0)


def test_half_precision_weights_are_folded_in_single_precision_even_under_autocast():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 16, generator=generator).bfloat16()
    hidden = torch.randn(2, 5, 16, generator=generator).bfloat16()
    labels = torch.zeros(2, 5, dtype=torch.int64)
    q_diff = discrepancy(range(300), range(300, 0, -1))
    expected = folded_reward(hidden.double(), labels, reward_direction(weight.double(), q_diff))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        direction = reward_direction(weight, q_diff)
        reward = folded_reward(hidden, labels, direction)
    assert direction.dtype == reward.dtype == torch.float32
    torch.testing.assert_close(reward.double(), expected, rtol=0, atol=1e-6)


def test_one_mean_hidden_state_serves_every_discrepancy():
    hidden = exact([[[1.0, 0.0], [3.0, 2.0], [100.0, 100.0]], [[5.0, 5.0], [7.0, 1.0], [0.0, 0.0]]])
    labels = torch.tensor([[-100, 4, 4], [-100, -100, 4]])
    mean = mean_response_hidden(hidden, labels)
    assert mean.tolist() == [[2.0, 1.0], [7.0, 1.0]]
    for direction in exact([[1.0, 0.0], [0.5, -2.0]]):
        assert torch.equal(mean @ direction, folded_reward(hidden, labels, direction))


def test_positions_outside_the_response_cannot_spoil_the_reward():
    hidden = exact([[[math.nan, math.inf], [3.0, 2.0], [math.nan, 0.0]]])
    labels, direction = torch.tensor([[1, -100, 1]]), exact([1.0, -1.0])
    assert mean_response_hidden(hidden, labels).tolist() == [[3.0, 2.0]]
    for rewards in (
        folded_reward_or_zero(hidden, labels, direction)[0],
        folded_reward_of_segments(hidden, labels, torch.zeros(1, 3, dtype=torch.int64), direction)[0][:1],
    ):
        assert rewards.tolist() == [1.0]


def test_a_row_without_response_tokens_is_refused_by_number():
    labels = torch.tensor([[-100, 1, 1], [1, -100, -100]])  # the first token of a row is never predicted
    with pytest.raises(ValueError, match=r"rows \[1\] have none"):
        mean_response_hidden(torch.zeros(2, 3, 4), labels)
    with pytest.raises(ValueError, match=r"rows \[1\] have none"):
        distribution_reward(torch.zeros(2, 3, 4), labels, np.zeros(4))


def test_a_q_diff_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="one entry per row of the head: 4"):
        reward_direction(torch.zeros(4, 2), np.zeros(5))
    with pytest.raises(ValueError, match="one entry per row of the head: 4"):
        distribution_reward(torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.int64), np.zeros(5))


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        mean_response_hidden(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64))
