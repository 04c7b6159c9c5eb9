"""One array over very many items: computed block by block, by one process or several, never held as a whole.

in_blocks(profile, prepare, items, total, folder / "states.npy", "features of policy")
for part in slices(folder / "states.npy"): ...
rewards = computed(profile, prepare, items, folder / "rewards.npy", "scoring")      # where the items are at hand
"""

import math
import os
from functools import partial
from itertools import islice

import numpy as np

from deftlib import jobs

BLOCK = 1024  # items between two files that an interrupted pass goes on from


def in_blocks(profile, prepare, items, total, path, label):
    """Write `prepare()(block, label)` of every block of `total` items as one .npy file.

    prepare: loads what computes a block. items: called for an iterator, read as needed. Both can be pickled: each of
    `profile.launch.processes` processes computes a share of the blocks. A block is on disk before the next one starts:
    a run that was killed goes on after its last. Their files are removed when all are there.
    """
    files = files_of(path, total)
    if not path.is_file():
        jobs.in_shares(profile, partial(compute_share, prepare, items, total, path, label))
        _join(files, path)
    for file in files:
        file.unlink(missing_ok=True)


def computed(profile, prepare, items, path, label):
    """The array of `in_blocks` itself, of a list of N >= 1 items; only an interrupted pass leaves files at `path`."""
    in_blocks(profile, prepare, partial(iter, items), len(items), path, label)
    values = np.load(path)
    path.unlink()
    return values


def compute_share(prepare, items, total, path, label, share, of):
    """Put the blocks share, share + of, share + 2 of … that are not there beside `path`, as `files_of` names them."""
    compute, items = None, iter(items())
    for number, file in enumerate(files_of(path, total)):
        block = list(islice(items, BLOCK))
        if number % of == share and not file.is_file():
            compute = compute or prepare()
            unfinished = file.with_suffix(".tmp.npy")
            np.save(unfinished, compute(block, f"{label}, {number * BLOCK} of {total} done"))
            os.replace(unfinished, file)


def files_of(path, total):
    """The file of each block."""
    return [path.with_name(f"block-{start:09d}.npy") for start in range(0, total, BLOCK)]


def _join(files, path):
    """One .npy file of the arrays in several, one below the other."""
    maps = [np.load(file, mmap_mode="r") for file in files]
    header = np.lib.format.header_data_from_array_1_0(maps[0]) | {"shape": (sum(map(len, maps)), *maps[0].shape[1:])}
    unfinished = path.with_suffix(".tmp.npy")
    with open(unfinished, "wb") as joined:
        np.lib.format.write_array_header_1_0(joined, header)
        for file in files:
            np.load(file).tofile(joined)
    os.replace(unfinished, path)


def slices(path, rows=8192):
    """Yield an array in a .npy file by slices of at most `rows` rows, read one by one: a map would stay resident."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        for start in range(0, shape[0], rows):
            part = (min(rows, shape[0] - start), *shape[1:])
            yield np.fromfile(file, dtype, math.prod(part)).reshape(part)
