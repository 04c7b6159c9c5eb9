"""Text scores against the numbers of the PRO evaluation code and by hand."""

import json
import math
import warnings
from pathlib import Path

import pytest

from deftlib.metrics import character_bleu

CASES = json.loads((Path(__file__).parent / "fixtures" / "golden_bleu.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["hyp"] or "empty")
def test_character_bleu_equals_the_official_numbers_without_a_warning(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score = character_bleu(case["hyp"], case["ref"])
    assert score == pytest.approx(case["official_char_level"], rel=1e-12, abs=0)


def test_character_bleu_by_hand():
    # "abcd" in "abcde": every n-gram matches, and the brevity penalty is exp(1 - 5/4).
    assert character_bleu("abcd", "abcde") == pytest.approx(math.exp(-1 / 4))
