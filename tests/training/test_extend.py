"""One more reply for every list: ranked by r_train, from the SFT policy or from a real (local) chat server."""

import json
from types import SimpleNamespace

import pytest
import servers
from conftest import FakeJudge
from datasets import Dataset
from servers import KEY, VERSION

from deftlib import store
from deftlib.models import generation, rewards
from deftlib.models.endpoint import EndpointError
from deftlib.preferences.lists import read, read_lists
from deftlib.profile import Profile
from deftlib.sections import Endpoint
from deftlib.training import extend, subset, train

serve = servers.serve

SHARES = {"policy": 0.4, "reward_train": 0.2, "reward_eval": 0.1, "dev": 0.1, "test": 0.2}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def reward_by_length(monkeypatch):
    """A reward model that likes long replies; returns the replies it was shown."""
    judge = FakeJudge()
    monkeypatch.setattr(rewards, "judge", lambda *args: judge)
    return judge.scored


@pytest.fixture
def profile(tmp_path):
    """mini's sizes on 60 lists of two from two subsets, in annotators' order."""
    rows = [
        {
            "id": f"list-{i}",
            "subset": f"subset-{i % 2}",
            "prompt": f"\n\nHuman: Question {i}?\n\nAssistant: What?\n\nHuman: This.\n\nAssistant:",
            "responses": [f" reply {i}", f" another reply {i}"],
        }
        for i in range(60)
    ]
    source = tmp_path / "prefs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(source), "shares": SHARES, "train_share": 1.0}
    return Profile.load("mini", {"data": data, "text.reply_tokens": 9})


@pytest.fixture
def sft_says(monkeypatch):
    """Let the SFT policy answer with `said(prompt)`; returns what it was asked with."""

    def install(said):
        asked = []

        def replies(profile, policy, prompts, seed, settings, label):
            asked.append(SimpleNamespace(settings=settings, seed=seed))
            return [[said(prompt)] for prompt in prompts]

        monkeypatch.setattr(train, "fit", lambda profile, method, seed: f"someone/{method}-seed{seed}")
        monkeypatch.setattr(generation, "replies", replies)
        return asked

    return install


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored_lists(profile):
    return read_lists(subset.scored(profile) / "lists.parquet")


def number(prompt):
    return int(prompt.split("Question ")[1].split("?")[0])


# ---- sampled from the SFT policy -----------------------------------------------------------------------------------


def test_the_new_reply_takes_its_place_by_reward(profile, sft_says):
    sft_says(lambda prompt: " middle reply " if number(prompt) % 2 else "tiny")
    folder = extend.longer_lists(profile)
    rows = lines(folder / "lists.jsonl")
    assert [row["id"] for row in rows] == scored_lists(profile)["id"][:]
    for row in rows:
        i = number(row["prompt"])
        by_length = [f" another reply {i}", *([" middle reply", f" reply {i}"] if i % 2 else [f" reply {i}", " tiny"])]
        assert row["responses"] == by_length
        assert row["rewards"] == [float(len(reply)) for reply in by_length]
        assert row["subset"] == f"subset-{i % 2}"
    summary = json.loads((folder / "summary.json").read_text())
    odd = sum(number(row["prompt"]) % 2 for row in rows)
    assert summary["place_of_the_new_reply"] == {"2": odd, "3": len(rows) - odd}


def test_only_the_new_replies_are_scored(profile, sft_says, reward_by_length):
    sft_says(lambda prompt: "new")
    n_lists = len(scored_lists(profile))
    reward_by_length.clear()
    extend.longer_lists(profile)
    assert reward_by_length == [" new"] * n_lists


def test_it_is_named_sampled_and_its_card_keeps_it_from_published_numbers(profile, sft_says):
    asked = sft_says(lambda prompt: "new")
    folder = extend.longer_lists(profile, seed=7)
    assert folder.name.startswith("D_3-sampled-")
    assert json.loads((folder / "summary.json").read_text())["name"] == "D_3-sampled"
    card = (folder / "README.md").read_text()
    assert card.startswith("# D_3-sampled:")
    assert "the SFT policy of profile `mini` (seed 7)" in card and "ranked by r_train (policy)" in card
    assert "no number made from\nthem may stand beside a published D_3 number" in card
    settings = asked[0].settings
    assert (settings.temperature, settings.samples, settings.max_new_tokens, asked[0].seed) == (1.0, 1, 9, 7)


def test_lists_of_three_become_d_4(tmp_path, profile, sft_says):
    sft_says(lambda prompt: "new")
    longer = extend.longer_lists(profile)
    row = lines(longer / "lists.jsonl")[0]
    lists = [SimpleNamespace(), {"responses": [row["responses"]] * 2}, {"responses": [["a", "b"], ["a", "b", "c"]]}]
    assert extend._name(lists[1], "sampled") == "D_4-sampled"
    assert extend._name(lists[2], "org/chat model:8b") == "D_3-4-org-chat-model-8b"


def test_a_second_call_reuses_the_result_and_another_seed_does_not(profile, sft_says):
    asked = sft_says(lambda prompt: "new")
    folders = [extend.longer_lists(profile, seed=seed) for seed in (0, 0, 1)]
    assert folders[0] == folders[1] != folders[2] and len(asked) == 2


def test_the_lists_are_read_back_as_a_source(profile, sft_says):
    sft_says(lambda prompt: "new")
    folder = extend.longer_lists(profile)
    lists = read(folder / "lists.jsonl", max_reject_share=0)
    assert list(lists) == lines(folder / "lists.jsonl")


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_overrides_on_the_card_train_on_the_longer_lists_with_all_other_parts_as_they_were(
    tmp_path, profile, sft_says, split
):
    sft_says(lambda prompt: "new" if number(prompt) % 5 else "")  # some are rejected
    before = subset.parts(profile)
    if split == "test":  # as smol: only test files at hand, and fewer lists trained on than there are
        (tmp_path / "hh").mkdir()
        (tmp_path / "prefs.jsonl").rename(tmp_path / "hh" / "test.jsonl")
        data = {"source": str(tmp_path / "hh"), "split": "test", "shares": SHARES, "train_lists": 10}
        profile = Profile.load("mini", {"data": data})
        before = subset.parts(profile)
    folder = extend.longer_lists(profile)
    card = (folder / "README.md").read_text()
    overrides = json.loads(card.split("```json\n")[1].split("```")[0])
    assert overrides.pop("data.source") == "<this folder>"
    data = vars(profile.data) | {"source": str(folder)}
    again = subset.parts(Profile.load("mini", {"data": data, **overrides}))
    assert list(read_lists(again / "policy.parquet")) == lines(folder / "lists.jsonl")
    for name in ("reward_train", "reward_eval", "dev", "test"):
        assert list(read_lists(again / f"{name}.parquet")) == list(read_lists(before / f"{name}.parquet"))


def test_a_test_file_of_its_own_stays_one(tmp_path, profile, sft_says):
    sft_says(lambda prompt: "new")
    (tmp_path / "hh").mkdir()
    (tmp_path / "prefs.jsonl").rename(tmp_path / "hh" / "train.jsonl")
    row = {"id": "t", "subset": "s", "prompt": "\n\nHuman: Unseen?\n\nAssistant:", "responses": [" a", " b"]}
    (tmp_path / "hh" / "test.jsonl").write_text(json.dumps(row))
    shares = {"policy": 0.4, "reward_train": 0.2, "reward_eval": 0.2, "dev": 0.2, "test": 0.0}
    profile = Profile.load("mini", {"data": {"source": str(tmp_path / "hh"), "shares": shares}})
    folder = extend.longer_lists(profile)
    assert [row["id"] for row in lines(folder / "test.jsonl")] == ["t"]
    assert "t" not in {row["id"] for row in lines(folder / "train.jsonl")}


def test_finished_reward_models_leave_no_parts_to_carry_over(tmp_path):
    row = {
        "id": "a",
        "subset": "s",
        "prompt": "\n\nHuman: Hi?\n\nAssistant:",
        "responses": [" x", " y"],
        "rewards": None,
    }
    for name in ("dev", "test"):
        Dataset.from_list([row | {"id": name}]).to_parquet(tmp_path / f"{name}.parquet")
    extend._write_source(tmp_path, Profile.load("paper").data, tmp_path, [row])
    assert [row["id"] for row in lines(tmp_path / "train.jsonl")] == ["a", "dev"]
    assert [row["id"] for row in lines(tmp_path / "test.jsonl")] == ["test"]


@pytest.mark.parametrize(
    "said, reason",
    [
        (lambda i: " \n ", "empty reply"),
        (lambda i: f"  another reply {i}\n", "identical replies"),
    ],
)
def test_a_reply_that_makes_no_longer_list_is_rejected_with_its_reason(profile, sft_says, capsys, said, reason):
    bad = scored_lists(profile)["id"][:3]
    sft_says(lambda prompt: said(number(prompt)) if f"list-{number(prompt)}" in bad else "new")
    folder = extend.longer_lists(profile)
    assert lines(folder / "rejects.jsonl") == [{"id": row_id, "reason": reason} for row_id in bad]
    n_lists = len(scored_lists(profile))
    assert f"rejected 3 of {n_lists} lists: 3 {reason}" in capsys.readouterr().out
    kept = [row["id"] for row in lines(folder / "lists.jsonl")]
    assert len(kept) == n_lists - 3 and not set(bad) & set(kept)


def test_where_no_reply_is_usable_nothing_is_published(profile, sft_says, root):
    sft_says(lambda prompt: "")
    with pytest.raises(ValueError, match=r"no list is left, every new reply was rejected: see rejects\.jsonl"):
        extend.longer_lists(profile)
    assert not list(store.build_dir("mini").glob("D_3-*/manifest.json"))


# ---- from an endpoint ----------------------------------------------------------------------------------------------


def about(body):
    return f"list-{number(body['messages'][0]['content'])}"


def reply(body):
    """One that names the question it answers."""
    return f"so: {body['messages'][0]['content']}"


def chat(server, model="chat"):
    return Endpoint(server.url, model)


def test_an_endpoint_is_asked_once_a_list_with_the_dialogue_as_messages(profile, serve):
    server = serve(reply=reply)
    folder = extend.longer_lists(profile, chat(server, "org/chat"), seed=3)
    assert folder.name.startswith("D_3-org-chat-")
    rows = lines(folder / "lists.jsonl")
    assert all(f" so: Question {number(row['prompt'])}?" in row["responses"] for row in rows)
    assert len(server.bodies) == len(rows) == len(scored_lists(profile))
    i = number(rows[0]["prompt"])
    messages = [("user", f"Question {i}?"), ("assistant", "What?"), ("user", "This.")]
    expected = {"model": "org/chat", "seed": 3, "max_tokens": 9, "temperature": 1.0}
    expected["messages"] = [{"role": role, "content": content} for role, content in messages]
    assert expected in server.bodies
    card = (folder / "README.md").read_text()
    who = f"by the model org/chat at {server.url} (it calls itself org/chat{VERSION})"
    assert f"{who}, sampled at temperature 1 with seed 3" in card


def test_another_seed_asks_again(profile, serve):
    server = serve(reply=reply)
    folders = {extend.longer_lists(profile, chat(server), seed) for seed in (0, 1, 0)}
    assert len(folders) == 2 and len(server.bodies) == 2 * len(scored_lists(profile))


def test_no_file_holds_the_key_or_the_password_of_the_url(profile, serve, root):
    server = serve(reply=reply)
    extend.longer_lists(profile, Endpoint(server.url.replace("//", "//me:password@"), "chat"))
    assert server.bodies
    written = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    assert not any(word in written for word in (KEY.encode(), b"me:password"))


def test_the_reply_ends_where_the_next_turn_begins(profile, serve):
    server = serve(reply=lambda body: "Sure.\n\nHuman: and now?")
    rows = lines(extend.longer_lists(profile, chat(server)) / "lists.jsonl")
    assert all(" Sure." in row["responses"] for row in rows)


def test_answers_outlive_a_server_that_dies_midway(profile, serve, capsys):
    dying = serve(lambda body: "ok" if len(dying.bodies) <= 11 else "hang up", reply=reply)
    n_lists = len(scored_lists(profile))
    with pytest.raises(EndpointError, match=r"\(APIConnectionError: .* 11 answers are kept: run again for the rest"):
        extend.longer_lists(profile, chat(dying))
    (cache,) = (store.build_dir("mini") / "kept").glob("*.jsonl")
    assert len(lines(cache)) == 11
    with open(cache, "a") as file:  # killed while it wrote
        file.write('{"key": "list-')
    dying.stop()
    alive = serve(reply=reply, port=dying.port)
    folder = extend.longer_lists(profile, chat(alive))
    assert f"11 of {n_lists} answers are kept from before" in capsys.readouterr().out
    assert len(alive.bodies) == n_lists - 11 and len(lines(cache)) == n_lists
    rows = lines(folder / "lists.jsonl")
    assert len(rows) == n_lists
    assert all(f" so: Question {number(row['prompt'])}?" in row["responses"] for row in rows)


@pytest.mark.parametrize("trouble, reason", [("empty", "empty text"), ("400", "BadRequest"), ("500", "Internal")])
def test_an_answer_that_fails_costs_its_list_and_is_not_asked_for_again(profile, serve, trouble, reason):
    bad = scored_lists(profile)["id"][5]
    server = serve(lambda body: trouble if about(body) == bad else "ok", reply=reply)
    folder = extend.longer_lists(profile, chat(server))
    (reject,) = lines(folder / "rejects.jsonl")
    assert reject["id"] == bad and reject["reason"].startswith(reason)
    n_asked = len(server.bodies)
    assert extend.longer_lists(profile, chat(server)) == folder and len(server.bodies) == n_asked


def test_too_many_failures_publish_nothing(profile, serve):
    bad = set(scored_lists(profile)["id"][:3])
    server = serve(lambda body: "400" if about(body) in bad else "ok", reply=reply)
    strict = Profile.load("mini", {"data": {**vars(profile.data), "max_reject_share": 0.1}})
    with pytest.raises(EndpointError, match=rf"^3 of {len(scored_lists(profile))} requests have no answer \(BadReq"):
        extend.longer_lists(strict, chat(server))
    generous = Profile.load("mini", {"data": {**vars(profile.data), "max_reject_share": 0.2}})
    assert len(lines(extend.longer_lists(generous, chat(server)) / "rejects.jsonl")) == 3
    with pytest.raises(EndpointError, match=r"^3 of \d+ requests have no answer"):  # what was generous is not reused
        extend.longer_lists(strict, chat(server))


def test_a_wrong_url_is_one_sentence(profile, serve):
    server = serve()
    with pytest.raises(EndpointError, match=r"^http://127.*: NotFoundError: .*; does the URL end in /v1"):
        extend.longer_lists(profile, Endpoint(server.url.replace("/v1", "/v2"), "chat"))


# ---- command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_folder_or_one_line_of_error(profile, sft_says, monkeypatch, capsys):
    sft_says(lambda prompt: "new")
    loaded = []
    monkeypatch.setattr(Profile, "load", lambda *given: loaded.append(given) or profile)
    extend.main(["--profile", "mini", "--seed", "2", "--set", "data.train_lists=4"])
    assert loaded == [("mini", {"data.train_lists": 4})]
    assert capsys.readouterr().out.splitlines()[-1] == str(extend.longer_lists(profile, seed=2))
    with pytest.raises(
        SystemExit, match=r"^error: an endpoint and a model go together \(--endpoint URL --model NAME\)"
    ):
        extend.main(["--endpoint", "http://127.0.0.1:9/v1"])
