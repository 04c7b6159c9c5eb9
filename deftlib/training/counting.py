"""Token counts of ranked lists, Q_pos and Q_neg, as fast as the tokenizer goes and however many lists there are.

counts = count_lists(lists, sides, tokenizer, vocab_size, profile.text, num_proc=8)
"""

from functools import partial

import numpy as np

from deftlib.method.distribution import count_tokens
from deftlib.models import policies
from deftlib.preferences.batches import pieces_of
from deftlib.workers import in_order

LISTS_AT_ONCE = 1000  # of one call of the tokenizer


def count_lists(lists, list_sides, tokenizer, vocab_size, text, num_proc=1):
    """(Q_pos, Q_neg) over the response text of the lists: no prompt, template, EOS or special token (decision 3).

    lists: anything with a column "responses", which is read once, a thousand lists at a time; so are their sides, as
    `count_tokens` takes them. num_proc: processes that share the work; int64 adds up the same in any number of them.
    """
    pairs = pieces_of(zip(lists["responses"], list_sides, strict=True), LISTS_AT_ONCE)
    numbered = ((number * LISTS_AT_ONCE, piece) for number, piece in enumerate(pairs))
    count = partial(_count, tokenizer=tokenizer, vocab_size=vocab_size, reply_tokens=text.reply_tokens)
    pos, neg = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)
    for more_pos, more_neg in in_order(count, numbered, num_proc):
        pos += more_pos
        neg += more_neg
    return pos, neg


def _count(numbered, tokenizer, vocab_size, reply_tokens):
    """Both counts of one piece: (number of its first list, [(responses, sides)])."""
    first, pairs = numbered
    read = [reply for responses, sides in pairs for reply, side in zip(responses, sides) if side]
    ids = iter(policies.encode_texts(tokenizer, read))
    token_lists = [
        [next(ids)[:reply_tokens] if i < len(sides) and sides[i] else [] for i in range(len(responses))]
        for responses, sides in pairs
    ]
    counts = count_tokens(token_lists, [sides for _, sides in pairs], vocab_size, first)
    special = [i for i in tokenizer.all_special_ids if i < vocab_size]  # <unk> among them: it is no word
    for of_side in counts:
        of_side[special] = 0
    return counts
