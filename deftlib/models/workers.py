"""The same function on many pieces of work, in worker processes: results in order, few pieces in memory at a time.

for counts in in_order(partial(count, tokenizer), pieces_of(texts, 1000), num_proc=8): ...
"""

import multiprocessing
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from itertools import islice

_work = None  # what a worker process does


def in_order(work, pieces, num_proc=1):
    """Yield `work(piece)` of every piece, in order; by `num_proc` processes, or in this one if that is 1.

    pieces: any iterable, read as workers come free, at most two ahead for each. Pieces and results are pickled; work,
    which may hold a tokenizer, is not.
    """
    if num_proc == 1:
        yield from map(work, pieces)
        return
    pieces = iter(pieces)
    # Forked, as `datasets.map` does: they are there at once, and touch neither torch nor a GPU.
    with ProcessPoolExecutor(num_proc, multiprocessing.get_context("fork"), _begin, (work,)) as pool:
        waiting = deque(pool.submit(_do, piece) for piece in islice(pieces, 2 * num_proc))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(_do, piece) for piece in islice(pieces, 1))
            yield result


def _begin(work):
    global _work
    _work = work


def _do(piece):
    return _work(piece)
