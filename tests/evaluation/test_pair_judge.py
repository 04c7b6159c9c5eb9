"""A judge of pairs: asked in both orders, ties where the order decides, and held to human labels like any other."""

import numpy as np
import pandas as pd
import pytest
import servers
from datasets import Dataset

from deftlib import store
from deftlib.evaluation import pair_judge
from deftlib.models.endpoint import EndpointError
from deftlib.preferences.lists import FEATURES
from deftlib.profile import Profile

serve = servers.serve
PROMPT = "\n\nHuman: Why?\n\nAssistant:"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)


def judged_by(server, **more):
    judge = {"url": server.url, "model": "judge"}
    return Profile.load("mini", {"evaluation": {"pair_judge": judge, **more}})


def shown(body):
    """(reply A, reply B) of a request."""
    text = body["messages"][-1]["content"]
    return text.split("[Reply A]\n")[1].split("\n\n[Reply B]\n")[0].strip(), text.split("[Reply B]\n")[1].strip()


def longer(body):
    a, b = shown(body)
    return f"It says more. [[{'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'C'}]]"


def test_both_orders_are_asked_and_the_better_reply_is_found_in_either(serve):
    server = serve(reply=longer)
    found = pair_judge.preferred(
        judged_by(server), [PROMPT] * 3, [" long one", " x", " a"], [" y", " longer", " b"], ["helpful"] * 3
    )
    assert found.tolist() == [1.0, 0.0, 0.5] and len(server.bodies) == 6
    assert {shown(body) for body in server.bodies} >= {("long one", "y"), ("y", "long one")}


def test_a_verdict_that_turns_with_the_order_is_a_tie(serve):
    server = serve(reply=lambda body: "The first, of course. [[A]]")
    assert pair_judge.preferred(judged_by(server), [PROMPT], [" x"], [" y"], ["harmless"]).tolist() == [0.5]


def test_what_gives_no_verdict_is_none(serve):
    server = serve(reply=lambda body: "I cannot say.")
    assert np.isnan(pair_judge.preferred(judged_by(server), [PROMPT], [" x"], [" y"], ["helpful"])).all()


@pytest.mark.parametrize(
    ("text", "value"),
    [("[[A]]", 1.0), ("If [[A]] were true ... [[B]]", 0.0), ("[[C]]", 0.5), ("[A]", None), ("", None), (None, None)],
)
def test_the_last_verdict_counts(text, value):
    found = pair_judge.verdict(text)
    assert np.isnan(found) if value is None else found == value


def test_each_axis_has_a_question_of_its_own():
    asked = [pair_judge.request(PROMPT, " a", " b", axis)["messages"][0]["content"] for axis in ("harmless", "helpful")]
    assert "more harmless" in asked[0] and "more helpful" in asked[1] and "Human: Why?" in asked[0]


def test_it_is_held_to_human_labels(serve):
    rows = [
        {
            "id": str(i),
            "subset": "helpful-base" if i % 2 else "harmless-base",
            "prompt": f"\n\nHuman: {i}?\n\nAssistant:",
        }
        | {"responses": [" a long answer", " no"] if i % 2 else [" no", " a long answer"], "rewards": None}
        for i in range(8)
    ]
    server = serve(reply=longer)
    profile = judged_by(server)
    save = lambda folder: Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "dev.parquet")
    accuracy = pair_judge.accuracy(profile, store.stage(profile, "parts", {}, save, "training.subset"))
    assert {axis: (interval.mean, interval.n) for axis, interval in accuracy.items()} == {
        "harmless": (0.0, 4),
        "helpful": (1.0, 4),
    }


def test_two_policies_are_compared_axis_by_axis(serve):
    frame = pd.DataFrame({"subset": ["helpful-base"] * 3, "prompt": [PROMPT] * 3})
    ours, other = frame.assign(reply=[" long one", " x", " a"]), frame.assign(reply=[" y", " longer", " b"])
    table = pair_judge.win_rates(judged_by(serve(reply=longer)), ours, other)
    assert table.loc["helpful", ["wins", "pairs"]].tolist() == [50, 3] and list(table.index) == ["helpful"]


def test_a_server_that_is_not_there_is_one_sentence(serve):
    server = serve()
    server.stop()
    with pytest.raises(EndpointError, match=r"^http://127\.0\.0\.1"):
        pair_judge.preferred(judged_by(server), [PROMPT], [" x"], [" y"], ["helpful"])


def test_no_profile_names_one_by_itself():
    assert not any(pair_judge.is_named(Profile.load(name)) for name in ("mini", "smol", "gpu", "paper"))
