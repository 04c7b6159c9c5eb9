"""Credentials in URLs reach the server that they are for, and nothing that is shown."""

import json
import os
import subprocess
import sys

import pytest

from deftlib import credentials
from deftlib.credentials import given, hidden, redacted, without
from deftlib.profile import Profile
from deftlib.reporting import claims_page, settings
from deftlib.typed import ProfileError

URL = "http://me:SECRET@host:8000/v1?api-key=SECRET&api-version=2024-10-21#SECRET"
SHOWN = "http://host:8000/v1?api-version=2024-10-21"


@pytest.fixture(autouse=True)
def unknown(monkeypatch):
    monkeypatch.setenv(credentials.VARIABLE, "{}")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, SHOWN),
        ("https://SECRET@host/v1", "https://host/v1"),
        ("https://host/v1?key=SECRET", "https://host/v1"),
        ("http://user:SE@CRET@host/v1", "http://host/v1"),
        ("http://localhost:11434/v1", "http://localhost:11434/v1"),
        ("host:8000/v1?api-key=SECRET", "host:8000/v1"),
        ("me:SECRET@host/v1", "host/v1"),
        ("https://host/v1?key=SECRET!)", "https://host/v1"),
    ],
)
def test_a_url_is_shown_without_what_is_secret_and_given_as_it_was(url, shown):
    assert without(url) == shown and hidden({"a": [{"url": url}]}) == {"a": [{"url": shown}]}
    assert given(shown) == url
    if "://" in url and url[-1].isalnum():
        assert redacted(f"no answer from {url}, sorry") == f"no answer from {shown}, sorry"
    assert redacted("http://[2001:db8") == "(URL)"


def test_text_that_is_no_url_stays():
    assert hidden({"a": "no://url here", "b": 1, "c": None}) == {"a": "no://url here", "b": 1, "c": None}


def test_no_form_of_a_profile_holds_a_secret():
    changes = {"mt_bench.judge": {"url": URL, "model": "judge"}, "evaluation.refiner.url": URL.replace("v1", "v2")}
    changes["evaluation.zero_shot"] = [{"name": "big", "endpoint": {"url": URL.replace("v1", "v3"), "model": "m"}}]
    profile = Profile.load("mini", changes)
    assert profile.mt_bench.judge.url == SHOWN and given(profile.mt_bench.judge.url) == URL
    shown = settings.shown(profile, "mt_bench", "evaluation")
    forms = [str(profile), repr(profile), profile.options, profile.label, json.dumps(profile.changes)]
    forms += [repr(shown), shown._repr_html_(), claims_page.differences(profile), json.dumps(profile.settings())]
    assert not any("SECRET" in form for form in forms)
    assert all("host:8000" in form for form in forms[:3])


def test_two_credentials_that_would_be_shown_alike_are_refused_and_a_new_one_replaces_the_old():
    one, other = ("http://me:SECRET@host/v1", "http://you:SECRET@host/v1")
    changes = {"mt_bench.judge.url": one, "evaluation.refiner.url": other}
    with pytest.raises(ProfileError, match=r"two different credentials for http://host/v1: give one") as caught:
        Profile.load("mini", changes)
    assert "SECRET" not in str(caught.value)
    for url in (one, other):
        assert given(Profile.load("mini", {"mt_bench.judge.url": url}).mt_bench.judge.url) == url


def test_a_process_that_this_one_starts_knows_them_too():
    hidden(URL)
    code = f"from deftlib.credentials import given; print(given({SHOWN!r}))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert said.stdout.strip() == URL
