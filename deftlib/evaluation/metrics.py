"""Text scores: how close a reply is to a reference, how likely a model finds it, and how varied a set of replies is.

    score = 100 * np.mean([character_bleu(h, r) for h, r in zip(hypotheses, references)])
    sacre_bleu(hypotheses, references)                       # Interval(mean, low, high, n), word level
    bart_score(*load_bart("facebook/bart-large-cnn"), references, replies)

The paper reports BLEU (anonymous version) and BARTScore beside it (final version). Scores of single replies come in the
order given, so that two policies can be compared prompt by prompt.
"""

import json
import math
import sys

import torch
from nltk.translate.bleu_score import sentence_bleu
from nltk.util import ngrams
from sacrebleu.metrics import BLEU
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSeq2SeqLM

from deftlib.intervals import Interval
from deftlib.models import policies
from deftlib.models.loop import length_buckets, with_progress

IGNORED = -100  # labels that `cross_entropy` leaves out
AUTHORS_LIMIT = 1024  # tokens a side in BARTScore's own code; for models that state no limit


# ---- against a reference -----------------------------------------------------------------------------------------


def character_bleu(hypothesis, reference):
    """BLEU as the PRO evaluation code computes it: nltk on raw strings, so on characters, and unsmoothed.

    hypothesis, reference: str, stripped here. Returns a float in [0, 1]; papers report 100 times its mean.
    An order of n-grams without any match counts as 2e-308 rather than 0, so texts without overlap give nearly 0.
    """
    return float(sentence_bleu([reference.strip()], hypothesis.strip(), smoothing_function=_unsmoothed))


def _unsmoothed(precisions, **_):
    """nltk's own default, `SmoothingFunction().method0`, without the warning it prints for every short text."""
    return [precision if precision.numerator else sys.float_info.min for precision in precisions]


def sacre_bleu(hypotheses, references):
    """sacreBLEU, 0 to 100: BLEU of the whole corpus on words (its 13a tokens), with sacreBLEU's own bootstrap interval.

    hypotheses, references: lists of N >= 1 str. Returns Interval(mean = the corpus score, low, high, n = N).
    The interval is the mean of 1000 resampled corpora, give or take half their 95 % range: its middle is not quite the
    score. There is no score of one reply (our choice): short replies rarely share four words in a row, and smoothing
    would decide; where two policies are compared prompt by prompt, `character_bleu` is.
    Raises ValueError if the lengths differ or there is nothing to score.
    """
    if len(hypotheses) != len(references) or not hypotheses:  # sacreBLEU would cut the longer list in silence
        raise ValueError(f"expected as many references as replies, and some: {len(references)}, {len(hypotheses)}")
    bleu = BLEU(force=True)  # "force" only keeps it from warning about texts that end in " ."
    score = bleu.corpus_score(hypotheses, [references], n_bootstrap=1000)
    said = json.loads(score.format(width=12, is_json=True, signature=bleu.get_signature().format()))
    middle, half = said.get("confidence_mean", 0.0), said.get("confidence_var", 0.0)  # none where all scores are 0
    return Interval(score.score, middle - half, middle + half, len(hypotheses))


def load_bart(path):
    """(model, tokenizer) of a BART, or any other seq2seq model, from a folder or hub id, on the GPU if there is one."""
    model = AutoModelForSeq2SeqLM.from_pretrained(**policies.origin(path), dtype=torch.float32)
    return model.to(policies.device()).eval(), policies.load_tokenizer(path)


@torch.no_grad()
def bart_score(model, tokenizer, references, replies, direction="precision", token_budget=4096, label="BARTScore"):
    """BARTScore (Yuan et al., 2021) of each reply: mean log-likelihood of the target's tokens given the source, <= 0.

    direction: "precision" scores the reply given its reference, "recall" the reference given the reply. The paper does
    not say which; precision is our choice, since there the text that is scored is the policy's own. As in the authors'
    code every token of the target counts, `<s>` and `</s>` too, so an empty reply has a score; longer texts are cut at
    the model's limit. Texts are stripped. About `token_budget` padded tokens share a batch; scores do not depend on it.
    Raises ValueError for another direction, or if the two lists differ in length.
    """
    if direction not in ("precision", "recall"):
        raise ValueError(f'direction is "precision" or "recall", found {direction!r}')
    sources, targets = (references, replies) if direction == "precision" else (replies, references)
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", AUTHORS_LIMIT))
    cut = lambda said: tokenizer(said.strip(), truncation=True, max_length=limit)["input_ids"]
    encoded = [(cut(source), cut(target)) for source, target in zip(sources, targets, strict=True)]

    def log_likelihoods(pairs):
        ids, mask = _padded([source for source, _ in pairs], model)
        labels = _labels([target for _, target in pairs], model)
        return _label_means(model(input_ids=ids, attention_mask=mask, labels=labels).logits, labels)

    return _in_batches(log_likelihoods, encoded, token_budget, label)


# ---- without a reference -----------------------------------------------------------------------------------------


@torch.no_grad()
def start_log_likelihood(model, tokenizer, prompts, replies, text, token_budget=4096, label="log-likelihood"):
    """Mean log-likelihood of each reply's tokens given its prompt, under the start policy: <= 0, nats a token.

    It stands in where no BART can be loaded, and is not BARTScore: it knows no reference, and it likes what the policy
    would have said anyway. text: the profile's Text. Tokens are those the policy is trained on
    (`policies.encode_reply`): the reply's and its EOS, which alone counts for an empty reply; a cut reply has none.
    Up to `token_budget` padded tokens share a batch; scores do not depend on it.
    """

    def log_likelihoods(pairs):
        ids, mask, labels = _dialogues(pairs, model)
        return _label_means(model(input_ids=ids, attention_mask=mask).logits[:, :-1], labels[:, 1:])

    return _in_batches(log_likelihoods, _encoded(tokenizer, prompts, replies, text), token_budget, label)


@torch.no_grad()
def kl_divergence(policy, reference, tokenizer, prompts, replies, text, token_budget=4096, label="KL divergence"):
    """How far a policy went from its reference: KL(policy || reference) of each reply's tokens, summed, >= 0, in nats.

    At every token of a reply the two next-token distributions are compared whole. Of replies that the policy sampled at
    temperature 1 the mean estimates the divergence of the two models' replies, with less noise than log-ratios of the
    tokens drawn; of greedy replies it is the divergence along them. Tokens and the budget as in `start_log_likelihood`.
    """

    def divergences(pairs):
        ids, mask, labels = _dialogues(pairs, policy)
        row, position = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        inputs = {"input_ids": ids, "attention_mask": mask}
        p, q = (m(**inputs).logits[row, position].float().log_softmax(-1) for m in (policy, reference))
        of_token = (p.exp() * (p - q)).sum(-1)
        return of_token.new_zeros(len(pairs)).index_add(0, row, of_token).tolist()

    return _in_batches(divergences, _encoded(tokenizer, prompts, replies, text), token_budget, label)


def distinct_n(replies, n):
    """Share of different n-grams of words among all n-grams of a set of replies, 0 to 1 (Li et al., 2016).

    It falls as the set grows, so compare sets of one size only. nan if no reply has n words.
    """
    grams = [gram for reply in replies for gram in ngrams(reply.split(), n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def words(reply):
    """Length of a reply in words, as blanks part them."""
    return len(reply.split())


# ---- batches -----------------------------------------------------------------------------------------------------


def _in_batches(function, pairs, token_budget, label):
    """function(some pairs) -> their scores, asked for pairs of like length together; all scores in the order given."""
    scores = [math.nan] * len(pairs)
    for batch in with_progress(length_buckets([len(a) + len(b) for a, b in pairs], token_budget), label, len(pairs)):
        for i, score in zip(batch, function([pairs[i] for i in batch])):
            scores[i] = score
    return scores


def _encoded(tokenizer, prompts, replies, text):
    """(prompt, reply) as token ids, each reply with its EOS."""
    pairs = zip(prompts, replies, strict=True)
    return [(policies.encode_prompt(tokenizer, p, text), policies.encode_reply(tokenizer, r, text)) for p, r in pairs]


def _dialogues(pairs, model):
    """Token ids, attention mask and labels [B, T] of (prompt, reply) pairs; the labels are those of the replies."""
    labels = _labels([[IGNORED] * len(prompt) + reply for prompt, reply in pairs], model)
    return *_padded([prompt + reply for prompt, reply in pairs], model), labels


def _padded(rows, model):
    """Token ids and attention mask [B, T], padded right whatever the tokenizer would do."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return ids.to(model.device), mask.to(model.device)


def _labels(rows, model):
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=IGNORED).to(model.device)


def _label_means(logits, labels):
    """Mean log-likelihood of the labels of each row, a list of B floats. logits[B, T, V], labels[B, T]."""
    flat = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return (-flat.view_as(labels).sum(1) / (labels != IGNORED).sum(1)).tolist()
