"""Text scores: how close a reply is to a reference, and how it is written.

score = 100 * np.mean([character_bleu(h, r) for h, r in zip(hypotheses, references)])
"""

import sys

from nltk.translate.bleu_score import sentence_bleu


def character_bleu(hypothesis, reference):
    """BLEU as the PRO evaluation code computes it: nltk on raw strings, so on characters, and unsmoothed.

    hypothesis, reference: str, stripped here. Returns a float in [0, 1]; papers report 100 times its mean.
    An order of n-grams without any match counts as 2e-308 rather than 0, so texts without overlap give nearly 0.
    """
    return float(sentence_bleu([reference.strip()], hypothesis.strip(), smoothing_function=_unsmoothed))


def _unsmoothed(precisions, **_):
    """nltk's own default, `SmoothingFunction().method0`, without the warning it prints for every short text."""
    return [precision if precision.numerator else sys.float_info.min for precision in precisions]
