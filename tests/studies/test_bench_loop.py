"""The bare loop does what the trainers do: the same losses and weights, else its tokens a second are no measure."""

import pytest

from deftlib.profile import Profile
from deftlib.studies import bench_loop


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_bare_loop_trains_the_same_policy(accumulated):
    batch = {"training.batch_size": 4 // accumulated, "training.gradient_accumulation": accumulated}
    profile = Profile.load("mini", batch)
    for row in bench_loop.against_bare(profile, turns=2):
        assert row["loss"] < 1e-4 and row["weights"] < 1e-5, row
