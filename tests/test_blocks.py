"""An array over many items, block by block: resumed, shared among processes, always the same."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from deftlib import blocks
from deftlib.blocks import in_blocks, slices
from deftlib.sections import Launch

N = 2500  # two blocks and a part of a third


def profile(processes=1):
    return SimpleNamespace(launch=Launch(processes))


def squares(asked=None):
    """What a block is made by: remembers, in a file, which blocks it was asked for."""

    def compute(block, label):
        if asked:
            with open(asked, "a") as file:
                file.write(f"{block[0]}\n")
        return np.stack([np.square(block), block], axis=1).astype(np.float32)

    return compute


def made(path, processes=1, asked=None):
    in_blocks(profile(processes), partial(squares, asked), partial(iter, range(N)), N, path, "squares")
    return np.load(path)


def test_blocks_are_joined_in_order_and_nothing_else_is_left(tmp_path):
    found = made(tmp_path / "found.npy")
    assert found.dtype == np.float32
    assert np.array_equal(found, np.stack([np.square(np.arange(N)), np.arange(N)], 1).astype(np.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["found.npy"]
    assert np.array_equal(np.concatenate(list(slices(tmp_path / "found.npy", rows=700))), found)


def test_two_processes_compute_a_share_each_of_what_is_left(tmp_path):
    whole = made(tmp_path / "whole.npy")
    (tmp_path / "shared").mkdir()
    np.save(tmp_path / "shared" / "block-000001024.npy", whole[1024:2048])  # of an interrupted run
    shared = made(tmp_path / "shared" / "found.npy", 2, str(tmp_path / "asked.txt"))
    assert np.array_equal(shared, whole)
    assert sorted((tmp_path / "asked.txt").read_text().split()) == ["0", "2048"]


def test_an_interrupted_pass_goes_on_after_its_last_block(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    asked = []

    def fails_at_the_third():
        def compute(block, label):
            asked.append((len(block), label))
            if len(asked) == 3:
                raise KeyboardInterrupt
            return squares()(block, label)

        return compute

    with pytest.raises(KeyboardInterrupt):
        in_blocks(profile(), fails_at_the_third, partial(iter, range(N)), N, tmp_path / "found.npy", "squares")
    assert len(made(tmp_path / "found.npy", asked=str(tmp_path / "asked.txt"))) == N
    assert [length for length, _ in asked] == [1000, 1000, 500]
    assert (tmp_path / "asked.txt").read_text() == "2000\n"
