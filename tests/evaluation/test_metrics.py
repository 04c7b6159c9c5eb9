"""Text scores against the numbers of the PRO evaluation code and by hand; models are tiny and random."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from deftlib.evaluation.metrics import (
    bart_score,
    character_bleu,
    distinct_n,
    kl_divergence,
    load_bart,
    sacre_bleu,
    start_log_likelihood,
    words,
)
from deftlib.sections import Text

CASES = json.loads((Path(__file__).parents[1] / "fixtures" / "golden_bleu.json").read_text())["cases"]
TEXT = Text(prompt_tokens=8, reply_tokens=6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["hyp"] or "empty")
def test_character_bleu_equals_the_official_numbers_without_a_warning(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score = character_bleu(case["hyp"], case["ref"])
    assert score == pytest.approx(case["official_char_level"], rel=1e-12, abs=0)


def test_character_bleu_by_hand():
    # "abcd" in "abcde": every n-gram matches, and the brevity penalty is exp(1 - 5/4).
    assert character_bleu("abcd", "abcde") == pytest.approx(math.exp(-1 / 4))


# ---- sacreBLEU -----------------------------------------------------------------------------------------------------


def test_sacre_bleu_by_hand():
    # One word of eight differs: precisions 7/8, 5/7, 3/6, 2/5 and no brevity penalty.
    score = sacre_bleu(["a b c d e f g h"], ["a b X d e f g h"])
    assert score.mean == pytest.approx(100 * (7 / 8 * 5 / 7 * 3 / 6 * 2 / 5) ** 0.25)
    assert score.n == 1
    assert (score.low, score.high) == pytest.approx((score.mean, score.mean))  # one reply resamples to itself


def test_sacre_bleu_is_one_score_of_the_corpus_not_a_mean_of_replies():
    hypotheses, references = ["a b c d", "e f g h i j k l"], ["a b c d", "e f g h X j k l"]
    # Matches and n-grams are added up first: 11/12, 8/10, 5/8, 2/6 (of 4 and 8 words).
    assert sacre_bleu(hypotheses, references).mean == pytest.approx(100 * (11 / 12 * 8 / 10 * 5 / 8 * 2 / 6) ** 0.25)


def test_sacre_bleu_has_an_interval_around_the_score_and_the_same_one_each_time():
    hypotheses = ["the cat sat on the mat", "a dog ran home today", "it is raining in the town"] * 10
    references = ["the cat sat on a mat", "the dog ran home", "it is sunny in the town"] * 10
    score = sacre_bleu(hypotheses, references)
    assert score.low < score.mean < score.high and score.high - score.low < 40
    assert score == sacre_bleu(hypotheses, references)


def test_sacre_bleu_of_replies_that_say_nothing_is_zero():
    assert sacre_bleu(["", ""], ["a b c d", "e f"]) == (0.0, 0.0, 0.0, 2)


def test_sacre_bleu_does_not_warn_about_spaced_full_stops(caplog):
    sacre_bleu(["a b c ."] * 120, ["a b c ."] * 120)
    assert not caplog.records


@pytest.mark.parametrize(("hypotheses", "references"), [([], []), (["a"], ["a", "b"])])
def test_sacre_bleu_refuses_lists_that_do_not_pair(hypotheses, references):
    with pytest.raises(ValueError, match="as many references as replies"):
        sacre_bleu(hypotheses, references)


# ---- BARTScore -----------------------------------------------------------------------------------------------------

BART_WORDS = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(20))]
LIMIT = 8  # tokens that the tiny BART can read
REFERENCES = [" w1 w2 w3", " w4", " w5 w6 w7 w8 w9", " w2 w2"]
REPLIES = [" w1 w2", " w9 w8 w7 w6", "", " w3 w3 w3"]


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    """A random BART of width 16, saved and loaded as the real one would be."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(BART_WORDS), d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=LIMIT,
        init_std=0.5, bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2,
        forced_eos_token_id=2, dropout=0.3,
    )  # fmt: skip
    spelled = Tokenizer(WordLevel({word: i for i, word in enumerate(BART_WORDS)}, unk_token="<unk>"))
    spelled.pre_tokenizer = WhitespaceSplit()
    spelled.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    folder = tmp_path_factory.mktemp("bart")
    BartForConditionalGeneration(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=spelled, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return load_bart(folder)


@torch.no_grad()
def bart_by_hand(model, source, target):
    """log P of each target token, one decoder step at a time: BART starts from </s>. Both: lists of words."""
    ids = torch.tensor([[BART_WORDS.index(word) for word in ["<s>", *source, "</s>"]]])
    total, said = 0.0, [2]
    for word in ["<s>", *target, "</s>"]:
        logits = model(input_ids=ids, decoder_input_ids=torch.tensor([said])).logits[0, -1]
        total += logits.log_softmax(0)[BART_WORDS.index(word)].item()
        said.append(BART_WORDS.index(word))
    return total / (len(target) + 2)


def test_bart_score_is_the_mean_log_likelihood_of_every_token_of_the_reply(bart):
    expected = [bart_by_hand(bart[0], r.split(), y.split()) for r, y in zip(REFERENCES, REPLIES)]
    assert bart_score(*bart, REFERENCES, REPLIES) == pytest.approx(expected, abs=1e-5)
    assert max(expected) < -1 and max(expected) - min(expected) > 0.1


def test_recall_asks_the_other_way_round(bart):
    expected = [bart_by_hand(bart[0], y.split(), r.split()) for r, y in zip(REFERENCES, REPLIES)]
    assert bart_score(*bart, REFERENCES, REPLIES, direction="recall") == pytest.approx(expected, abs=1e-5)
    assert bart_score(*bart, REPLIES, REFERENCES) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="found 'f1'"):
        bart_score(*bart, REFERENCES, REPLIES, direction="f1")


@pytest.mark.parametrize("token_budget", [1, 12, 1000])
def test_bart_score_does_not_depend_on_the_batch(bart, token_budget):
    one_by_one = [bart_score(*bart, [r], [y])[0] for r, y in zip(REFERENCES, REPLIES)]
    assert bart_score(*bart, REFERENCES, REPLIES, token_budget=token_budget) == pytest.approx(one_by_one, abs=1e-5)


def test_bart_score_cuts_both_sides_at_the_limit_of_the_model(bart):
    long = [f"w{i}" for i in range(20)]
    kept = long[: LIMIT - 2]  # with <s> and </s>
    score = bart_score(*bart, [" ".join(long)], [" ".join(long)])
    assert score == pytest.approx([bart_by_hand(bart[0], kept, kept)], abs=1e-5)


def test_bart_score_refuses_lists_that_do_not_pair(bart):
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        bart_score(*bart, REFERENCES, REPLIES[:2])


# ---- the start policy's own likelihood -----------------------------------------------------------------------------


@torch.no_grad()
def likelihood_by_hand(model, prompt, reply):
    """Both: lists of token ids."""
    log_probs = model(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
    return sum(log_probs[len(prompt) + t - 1, token].item() for t, token in enumerate(reply)) / len(reply)


def ids_of(tokenizer, said):
    return tokenizer(said)["input_ids"]


def test_start_log_likelihood_counts_the_reply_and_its_end_but_not_the_prompt(make_model, tokenizer):
    model = make_model().eval()
    prompts, replies = ["w1 w2 w3 w4", "w5"], [" w6 w7", " w8 w8 w9"]
    end = [tokenizer.eos_token_id]
    expected = [
        likelihood_by_hand(model, ids_of(tokenizer, p), ids_of(tokenizer, r) + end) for p, r in zip(prompts, replies)
    ]
    assert start_log_likelihood(model, tokenizer, prompts, replies, TEXT) == pytest.approx(expected, abs=1e-5)


def test_of_an_empty_reply_only_its_end_is_scored(make_model, tokenizer):
    model = make_model().eval()
    (score,) = start_log_likelihood(model, tokenizer, ["w1 w2"], [""], TEXT)
    assert score == pytest.approx(likelihood_by_hand(model, ids_of(tokenizer, "w1 w2"), [tokenizer.eos_token_id]))


def test_a_prompt_is_cut_on_the_left_and_a_cut_reply_has_no_end(make_model, tokenizer):
    model, long = make_model().eval(), " ".join(f"w{i}" for i in range(12))
    ids = ids_of(tokenizer, long)
    expected = likelihood_by_hand(model, ids[-TEXT.prompt_tokens :], ids[: TEXT.reply_tokens])
    assert start_log_likelihood(model, tokenizer, [long], [long], TEXT) == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize("token_budget", [1, 10, 1000])
def test_start_log_likelihood_does_not_depend_on_the_batch(make_model, tokenizer, token_budget):
    model = make_model(seed=3).eval()
    prompts = ["w1 w2 w3 w4 w5 w6", "w5", "w9 w9", "w3 w2"]
    replies = ["", " w8 w8 w9 w7 w6", " w2", " w30 w31"]
    one_by_one = [start_log_likelihood(model, tokenizer, [p], [r], TEXT)[0] for p, r in zip(prompts, replies)]
    together = start_log_likelihood(model, tokenizer, prompts, replies, TEXT, token_budget)
    assert together == pytest.approx(one_by_one, abs=1e-5)
    assert start_log_likelihood(model, tokenizer, [], [], TEXT) == []


# ---- distance from a reference -------------------------------------------------------------------------------------


@torch.no_grad()
def kl_by_hand(policy, reference, prompt, reply):
    """Both: lists of token ids. Token by token, word by word."""
    total = 0.0
    for t in range(len(reply)):
        seen = torch.tensor([prompt + reply[:t]])
        p, q = (model(seen).logits[0, -1].softmax(-1) for model in (policy, reference))
        total += sum((a * (a / b).log()).item() for a, b in zip(p, q))
    return total


def test_kl_is_summed_over_the_tokens_of_the_reply_and_its_end(make_model, tokenizer):
    policy, reference = make_model().eval(), make_model(seed=1).eval()
    prompts, replies = ["w1 w2 w3 w4", "w5"], [" w6 w7", " w8 w8 w9"]
    end = [tokenizer.eos_token_id]
    expected = [
        kl_by_hand(policy, reference, ids_of(tokenizer, p), ids_of(tokenizer, r) + end)
        for p, r in zip(prompts, replies)
    ]
    for budget in (1, 1000):
        found = kl_divergence(policy, reference, tokenizer, prompts, replies, TEXT, budget)
        assert found == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0.1
    assert kl_divergence(reference, policy, tokenizer, prompts, replies, TEXT) != pytest.approx(expected, rel=1e-2)


def test_a_policy_is_at_no_distance_from_itself(make_model, tokenizer):
    policy = make_model().eval()
    assert kl_divergence(policy, policy, tokenizer, ["w1"], [" w2 w3"], TEXT) == [0.0]


# ---- a set of replies ----------------------------------------------------------------------------------------------


def test_distinct_n_by_hand():
    replies = [" a b a b", " a b"]  # 2 words among 6; pairs ab ba ab, ab: 2 of 4
    assert distinct_n(replies, 1) == 2 / 6
    assert distinct_n(replies, 2) == 2 / 4
    assert distinct_n(replies, 4) == 1.0
    assert math.isnan(distinct_n(replies, 5))


def test_no_n_gram_crosses_from_one_reply_to_the_next():
    assert math.isnan(distinct_n(["a", "b"], 2))


def test_words_are_parted_by_any_blanks():
    assert words(" It's  raining,\nstill.") == 3
    assert words("") == 0
