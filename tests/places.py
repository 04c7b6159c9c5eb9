"""A fixture that tests share: where tables, figures and records of a test go."""

import pytest

from deftlib import store
from deftlib.profile import Profile


@pytest.fixture
def profile(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "figures_dir", lambda name: tmp_path / name)
    monkeypatch.setattr(store, "build_dir", lambda name: tmp_path / "build" / name)
    return Profile.load("mini")
