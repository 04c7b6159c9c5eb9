"""One more reply for every list: ranked by r_train, from the SFT policy or from a real (local) chat server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from deftlib import evaluate, extend, models, rewards, store, subset, train
from deftlib.preferences import read, read_lists
from deftlib.profile import Profile

SHARES = {"policy": 0.4, "reward_train": 0.2, "reward_eval": 0.1, "dev": 0.1, "test": 0.2}
KEY = "sk-not-to-be-written-anywhere"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return tmp_path


@pytest.fixture(autouse=True)
def reward_by_length(monkeypatch):
    """A reward model that likes long replies; returns the replies it was shown."""
    seen = []

    def score(model, tokenizer, prompts, replies, spec, budget, label):
        seen.extend(replies)
        return [float(len(reply)) for reply in replies]

    monkeypatch.setattr(rewards, "reward_model", lambda *args: "someone/reward")
    monkeypatch.setattr(rewards, "load_reward_model", lambda path: (None, None))
    monkeypatch.setattr(rewards, "score", score)
    return seen


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
    return Profile.load("mini", {"data": {"source": str(source), "shares": SHARES}, "text.reply_tokens": 9})


@pytest.fixture
def sft_says(monkeypatch):
    """Let the SFT policy answer with `said(prompt)`; returns what it was asked with."""

    def install(said):
        asked = []

        def generate(model, tokenizer, prompts, text, generation, seed, label):
            asked.append(SimpleNamespace(generation=generation, seed=seed))
            return [[said(prompt)] for prompt in prompts]

        monkeypatch.setattr(train, "fit", lambda profile, method, seed: f"someone/{method}-seed{seed}")
        monkeypatch.setattr(models, "load_policy", lambda path, dtype: None)
        monkeypatch.setattr(models, "load_tokenizer", lambda path: None)
        monkeypatch.setattr(evaluate, "generate", generate)
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
    settings = asked[0].generation
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


@pytest.mark.parametrize(
    "said, reason",
    [
        (lambda i: " \n ", "empty reply"),
        (lambda i: f"  another reply {i}\n", "identical replies"),
        (lambda i: "half a pair \ud83d", "invalid Unicode"),
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


class ChatServer:
    """A chat server on localhost. behave(n, body): (status, reply) for the n-th request, None to hang up."""

    def __init__(self, behave, port=0):
        self.bodies, self.keys, lock = [], set(), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    self.bodies.append(body)
                    self.keys.add(handler.headers["Authorization"])
                    said = (
                        behave(len(self.bodies), body) if handler.path == "/v1/chat/completions" else (404, "no page")
                    )
                if said is None:
                    return handler.connection.close()
                message = {"role": "assistant", "content": said[1]}
                answer = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
                answer |= {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
                content = json.dumps(answer if said[0] == 200 else {"error": {"message": said[1]}}).encode()
                handler.send_response(said[0])
                handler.send_header("Content-Type", "application/json")
                handler.send_header("Content-Length", str(len(content)))
                handler.end_headers()
                handler.wfile.write(content)

            def log_message(handler, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve(monkeypatch):
    import openai._base_client

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.01)
    servers = []

    def start(behave, port=0):
        servers.append(ChatServer(behave, port))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def echo(n, body):
    """A reply that names the question it answers."""
    return 200, f"so: {body['messages'][0]['content']}"


def test_an_endpoint_is_asked_once_a_list_with_the_dialogue_as_messages(profile, serve):
    server = serve(echo)
    folder = extend.longer_lists(profile, server.url, "org/chat", seed=3)
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
    assert f"written by the model `org/chat` at {server.url}, sampled at temperature 1 with seed 3" in card


def test_another_seed_asks_again(profile, serve):
    server = serve(echo)
    folders = {extend.longer_lists(profile, server.url, "chat", seed=seed) for seed in (0, 1, 0)}
    assert len(folders) == 2 and len(server.bodies) == 2 * len(scored_lists(profile))


def test_no_file_holds_the_key_or_the_password_of_the_url(profile, serve, root):
    server = serve(echo)
    extend.longer_lists(profile, server.url.replace("//", "//me:password@"), "chat")
    assert server.bodies
    written = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    assert not any(word in written for word in (KEY.encode(), b"me:password"))


def test_a_local_server_needs_no_key(profile, serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve(echo)
    extend.longer_lists(profile, server.url, "chat")
    assert server.keys == {"Bearer no-key-needed"}


def test_the_reply_ends_where_the_next_turn_begins(profile, serve):
    server = serve(lambda n, body: (200, "Sure.\n\nHuman: and now?"))
    rows = lines(extend.longer_lists(profile, server.url, "chat") / "lists.jsonl")
    assert all(" Sure." in row["responses"] for row in rows)


def test_a_server_that_stumbles_is_asked_again(profile, serve):
    tried = set()

    def behave(n, body):
        question = body["messages"][0]["content"]
        if question in tried:
            return echo(n, body)
        tried.add(question)
        return 500, "still loading"

    folder = extend.longer_lists(profile, serve(behave).url, "chat")
    assert len(lines(folder / "lists.jsonl")) == len(scored_lists(profile)) == len(tried)


def test_answers_outlive_a_server_that_dies_midway(profile, serve, capsys):
    dying = serve(lambda n, body: echo(n, body) if n <= 11 else None)
    n_lists = len(scored_lists(profile))
    with pytest.raises(extend.EndpointError, match=rf"11 of {n_lists} answers are kept: run again for the rest"):
        extend.longer_lists(profile, dying.url, "chat")
    (cache,) = store.build_dir("mini").glob("D_3-chat-*.partial/answers.jsonl")
    assert len(lines(cache)) == 11
    with open(cache, "a") as file:  # killed while it wrote
        file.write('{"id": "list-')
    dying.stop()
    alive = serve(echo, dying.port)
    folder = extend.longer_lists(profile, alive.url, "chat")
    assert "11 answers kept from an interrupted run" in capsys.readouterr().out
    assert len(alive.bodies) == n_lists - 11 and len(lines(folder / "answers.jsonl")) == n_lists
    rows = lines(folder / "lists.jsonl")
    assert len(rows) == n_lists
    assert all(f" so: Question {number(row['prompt'])}?" in row["responses"] for row in rows)


def test_empty_answers_are_rejected_and_not_asked_again(profile, serve):
    bad = scored_lists(profile)["id"][0]

    def behave(n, body):
        text = echo(n, body)[1]
        return 200, None if f"list-{text.split()[2].rstrip('?')}" == bad else text

    folder = extend.longer_lists(profile, serve(behave).url, "chat")
    assert lines(folder / "rejects.jsonl") == [{"id": bad, "reason": "empty reply"}]
    assert {"id": bad, "reply": ""} in lines(folder / "answers.jsonl")


def test_a_request_refused_costs_its_list_and_too_many_stop_the_run(profile, serve):
    profile = Profile.load("mini", {"data": {**vars(profile.data), "max_reject_share": 0.1}})
    lists = scored_lists(profile)
    bad = lists["id"][5]

    def behave(n, body):
        status, text = echo(n, body)
        return (400, "content filter") if f"list-{text.split()[2].rstrip('?')}" == bad else (status, text)

    folder = extend.longer_lists(profile, serve(behave).url, "chat")
    assert lines(folder / "rejects.jsonl") == [{"id": bad, "reason": "refused by the endpoint"}]
    server = serve(lambda n, body: (400, f"no such option; you are {KEY}"))
    with pytest.raises(extend.EndpointError) as caught:
        extend.longer_lists(profile, server.url, "chat")
    assert f"8 of {len(lists)} lists refused, the last: BadRequestError" in str(caught.value)
    assert KEY not in str(caught.value) and len(server.bodies) == 8


def test_a_wrong_url_or_model_is_one_sentence(profile, serve):
    server = serve(lambda n, body: (404, "the model nobody does not exist"))
    with pytest.raises(extend.EndpointError, match=r"^http://127.*: NotFoundError: .*nobody does not exist"):
        extend.longer_lists(profile, server.url, "nobody")
    with pytest.raises(extend.EndpointError, match=r"NotFoundError: .*no page"):
        extend.longer_lists(profile, server.url.removesuffix("/v1"), "chat")


def test_without_the_openai_package_the_error_names_the_extra(profile, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(extend.EndpointError, match=r"pip install 'deftlib\[endpoint\]'"):
        extend.longer_lists(profile, "http://127.0.0.1:9/v1", "chat")


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
