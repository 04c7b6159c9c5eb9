"""The GPUs that this process may use, and whether one has room for another run beside those at work on it.

room = Room(["0", "0", "1", "1"])        # a share of a card for each worker
room.on("0", at_work=1)                  # may another start there?
room.took(9 * 2**30)                     # what a run that ended held at most
"""

import os
import subprocess
import sys
from collections import Counter

OF_CUDA = 2**30  # bytes that CUDA and its libraries hold beside tensors, a process: our allowance


def visible():
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()  # asks the driver, and leaves the GPU alone
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def memory(gpu):
    """(free, total) bytes of a card, whoever holds the rest. None where nvidia-smi does not tell, as of a MIG share."""
    asked = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
        free, total = (2**20 * int(part) for part in said.split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return free, total


def peak():
    """The most bytes that this process held of its GPU since it was last asked, 0 where it held none."""
    cuda = sys.modules["torch"].cuda if "torch" in sys.modules else None
    if cuda is None or not cuda.is_initialized():
        return 0
    held = cuda.max_memory_reserved()
    cuda.reset_peak_memory_stats()
    return held


class Room:
    """Whether a card has room for another run: as much as the largest run took so far, and at first an equal share.

    gpus: the card of every worker. A card without work always has room: what does not fit there fits nowhere.
    """

    def __init__(self, gpus):
        self._shares, self._largest = Counter(gpus), 0

    def on(self, gpu, at_work):
        """Whether another run may start beside the `at_work` runs of a card; what they have yet to take is theirs."""
        if gpu is None or not at_work or (told := memory(gpu)) is None:
            return True
        free, total = told
        run = self._largest or (total // self._shares[gpu] - OF_CUDA)
        return run <= free and (at_work + 1) * run <= total

    def took(self, held):
        """Learn from a run that ended what it held at most, in bytes."""
        self._largest = max(self._largest, held + OF_CUDA if held else 0)
