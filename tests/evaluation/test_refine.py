"""References rewritten by a stronger model: what is asked, what is published, what happens to failures."""

import json

import pandas as pd
import pytest
import servers
from servers import KEY, VERSION

from deftlib import store
from deftlib.evaluation import refine
from deftlib.models.endpoint import EndpointError
from deftlib.preferences import mini_world
from deftlib.preferences.lists import read_lists
from deftlib.profile import Profile
from deftlib.training import subset

serve = servers.serve
N = 40


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def profile(tmp_path):
    """Real preferences, as far as refining goes: forty test lists of two replies, and no refiner yet."""
    rows = [
        {
            "id": f"list-{i}",
            "subset": f"subset-{i % 2}",
            "prompt": f"\n\nHuman: Question {i}?\n\nAssistant: What?\n\nHuman: This.\n\nAssistant:",
            "responses": [f" answer {i}", " a worse answer"],
        }
        for i in range(N)
    ]
    (tmp_path / "prefs").mkdir()
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows).replace("Question", f"{split} question")
        (tmp_path / "prefs" / f"{split}.jsonl").write_text(text)
    shares = {"policy": 0.4, "reward_train": 0.2, "reward_eval": 0.2, "dev": 0.2, "test": 0.0}
    data = {"source": str(tmp_path / "prefs"), "shares": shares, "train_share": 1.0}
    return Profile.load("mini", {"data": data})


def with_refiner(profile, server, **data):
    data = {**vars(profile.data), **data}
    return Profile.load("mini", {"data": data, "evaluation.refiner": {"url": server.url, "model": "gpt"}})


def better(body):
    """What a good refiner says."""
    return f" Better: {reference(body)}.\n"


def reference(body):
    return body["messages"][0]["content"].split("[Reference answer]\n")[1]


def refined(profile):
    folder = refine.references(profile, subset.parts(profile))
    rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    return folder, pd.read_parquet(folder / "references.parquet"), rejects


def test_each_reference_of_the_test_part_is_rewritten(profile, serve):
    server = serve(reply=better)
    _, frame, rejects = refined(with_refiner(profile, server))
    test = read_lists(subset.parts(profile) / "test.parquet")
    assert list(frame) == ["id", "subset", "prompt", "original", "refined"] and rejects == []
    for name in ("id", "subset", "prompt"):
        assert list(frame[name]) == list(test[name])
    assert list(frame["original"]) == [f" answer {i}" for i in range(N)]
    assert list(frame["refined"]) == [f" Better: answer {i}." for i in range(N)]


def test_the_refiner_sees_the_dialogue_and_the_reference_and_nothing_else(profile, serve):
    server = serve(reply=better)
    refined(with_refiner(profile, server))
    body = next(body for body in server.bodies if reference(body) == "answer 7")
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt", 0, 1024)
    ((role, content),) = (message.values() for message in body["messages"])
    assert role == "user" and "worse" not in content
    assert content.endswith(
        "[Dialogue]\nHuman: test question 7?\n\nAssistant: What?\n\nHuman: This.\n\n[Reference answer]\nanswer 7"
    )


def test_text_with_braces_is_asked_as_it_stands():
    (message,) = refine.refine_request("\n\nHuman: {x}?\n\nAssistant:", " def f(): {reference}")["messages"]
    assert message["content"].endswith("Human: {x}?\n\n[Reference answer]\ndef f(): {reference}")


def test_a_refiner_that_names_the_speaker_is_understood(profile, serve):
    _, frame, _ = refined(with_refiner(profile, serve(reply=lambda body: "Assistant: Sure.")))
    assert set(frame["refined"]) == {" Sure."}


def test_the_card_says_who_how_and_what_came_of_it(profile, serve):
    server = serve(lambda body: "empty" if reference(body) == "answer 3" else "ok", reply=better)
    folder, _, _ = refined(with_refiner(profile, server))
    card = (folder / "README.md").read_text()
    assert f"the model gpt at {server.url} (it calls itself gpt{VERSION}),\nasked at temperature 0" in card
    assert "39 rows" in card and "1 failed" in card and "0 came back unchanged" in card
    assert "2.0 original,\n3.0 refined" in card
    assert refine.PROMPT.format(dialogue="<the dialogue>", reference="<y_1>") in card
    assert "a\nprompt that is not published" in card and "may not allow training on them" in card


@pytest.mark.parametrize("trouble, reason", [("empty", "empty text"), ("400", "BadRequest"), ("500", "InternalServer")])
def test_a_failed_row_is_left_out_and_listed(profile, serve, trouble, reason):
    server = serve(lambda body: trouble if reference(body) == "answer 3" else "ok", reply=better)
    _, frame, (reject,) = refined(with_refiner(profile, server))
    assert list(frame["id"]) == [f"list-{i}" for i in range(N) if i != 3]
    assert list(frame["refined"]) == [f" Better: answer {i}." for i in range(N) if i != 3]
    assert reject["id"] == "list-3" and reject["reason"].startswith(reason)


def test_too_many_failures_publish_nothing_and_keep_what_was_answered(profile, serve, root):
    bad = {"answer 3", "answer 4", "answer 5"}
    server = serve(lambda body: "empty" if reference(body) in bad else "ok", reply=better)
    with pytest.raises(EndpointError, match=r"^3 of 40 requests have no answer .* 37 answers are kept: run again"):
        refined(with_refiner(profile, server))
    assert not list(store.build_dir("mini").glob("refined-*/manifest.json"))
    server.behaviours = ("ok",)
    asked_before = len(server.bodies)
    _, frame, rejects = refined(with_refiner(profile, server))
    assert len(frame) == N and not rejects and len(server.bodies) == asked_before + 3


def test_a_stricter_share_refuses_what_a_generous_one_let_pass(profile, serve):
    server = serve(lambda body: "empty" if reference(body) in {"answer 3", "answer 4"} else "ok", reply=better)
    _, _, rejects = refined(with_refiner(profile, server, max_reject_share=0.5))
    assert len(rejects) == 2
    with pytest.raises(EndpointError, match=r"^2 of 40 requests have no answer"):
        refined(with_refiner(profile, server, max_reject_share=0.01))


def test_a_server_that_dies_is_not_taken_for_a_few_failures(profile, serve):
    dying = serve(lambda body: "ok" if len(dying.bodies) <= 5 else "hang up", reply=better)
    with pytest.raises(EndpointError, match=r"not asked: 8 failures in a row"):
        refined(with_refiner(profile, dying, max_reject_share=0.9))


def test_it_is_asked_once(profile, serve):
    server = serve(reply=better)
    folders = {refined(with_refiner(profile, server))[0] for _ in range(2)}
    assert len(folders) == 1 and len(server.bodies) == N


def test_no_file_holds_the_key_or_the_password_of_the_url(profile, serve, root):
    server = serve(reply=better)
    server.url = server.url.replace("//", "//me:password@")
    refined(with_refiner(profile, server))
    written = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    assert server.bodies and KEY.encode() not in written and b"me:password" not in written


def test_in_the_mini_world_the_refiner_is_the_worlds_best_answer(monkeypatch, root):
    profile = Profile.load("mini", {"data.test_lists": 12})
    folder, frame, _ = refined(profile)
    earned = [
        [mini_world.true_reward(row["prompt"], row[name]) for name in ("original", "refined")]
        for _, row in frame.iterrows()
    ]
    assert len(frame) == 12 and {better for _, better in earned} == {100.0}
    assert min(before for before, _ in earned) < 100
    card = (folder / "README.md").read_text()
    assert "The refiner is the mini world's best answer: a reply of true reward 100" in card and "the model" not in card
    assert refine.refiner_name(profile) == refine.WORLD


def test_a_refiner_goes_before_the_worlds_best_answer(serve):
    server = serve(reply=better)
    profile = Profile.load("mini", {"data.test_lists": 12, "evaluation.refiner": {"url": server.url, "model": "gpt"}})
    assert refine.refiner_name(profile) == "gpt"
    _, frame, _ = refined(profile)
    assert all(frame["refined"].str.startswith(" Better: "))


def test_without_a_refiner_the_error_says_what_to_set(profile):
    assert refine.refiner_name(profile) is None
    with pytest.raises(
        ValueError, match=r"names no refiner: set evaluation\.refiner\.url and evaluation\.refiner\.mod"
    ):
        refined(profile)


def test_the_command_prints_the_folder_or_one_line_of_error(profile, serve, capsys):
    server = serve(reply=better)
    source = ["--set", f"data.source={profile.data.source}", "--set", f"data.shares={json.dumps(profile.data.shares)}"]
    url = ["--set", f"evaluation.refiner.url={server.url}", "--set", "evaluation.refiner.model=gpt"]
    refine.main([*source, *url])
    assert capsys.readouterr().out.splitlines()[-1] == str(refined(with_refiner(profile, server))[0])
    with pytest.raises(SystemExit, match=r"^error: profile 'mini' names no refiner"):
        refine.main(source)
