"""A server is asked once for each question, whatever it does: what it answers is kept, the rest is reported."""

import json
import sys
import threading

import pytest
import servers
from servers import KEY, VERSION

from deftlib.models import endpoint
from deftlib.models.endpoint import EndpointError, ask, chat_requests, replies_from, require
from deftlib.preferences.dialogues import messages
from deftlib.sections import Endpoint, Generation

serve = servers.serve


def requests(n, **options):
    return [{"messages": [{"role": "user", "content": f"question {i}"}], **options} for i in range(n)]


def answered(n):
    return [f"so: question {i}" for i in range(n)]


def number(body):
    return int(body["messages"][-1]["content"].split()[1])


def at(server, **more):
    return Endpoint(server.url, "judge", **more)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "kept" / "answers.jsonl"


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- what is kept --------------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_requests(serve, path):
    server = serve()
    assert ask(at(server), requests(20, temperature=0), path) == (answered(20), {})
    assert sorted(map(number, server.bodies)) == list(range(20))
    assert all(body["model"] == "judge" and body["temperature"] == 0 for body in server.bodies)
    assert server.keys == {f"Bearer {KEY}"}


def test_what_is_kept_names_request_version_usage_and_time(serve, path):
    ask(at(serve()), requests(1, seed=3), path)
    (entry,) = entries(path)
    assert entry.pop("created").startswith("20") and len(entry.pop("key")) == 20
    expected = {"request": requests(1, seed=3)[0], "text": "so: question 0", "finish_reason": "stop"}
    expected |= {"model": "judge" + VERSION, "fingerprint": None, "usage": servers.USAGE}
    assert entry == expected
    assert endpoint.answered_by(Endpoint("http://elsewhere", "judge"), requests(2, seed=3), path) == ["judge" + VERSION]


def test_a_question_is_asked_once_in_one_call_and_in_all_later_ones(serve, path):
    server = serve()
    assert ask(at(server), requests(2) + requests(2), path).texts == answered(2) * 2
    assert ask(at(server), requests(3), path).texts == answered(3)
    assert len(server.bodies) == 3
    ask(Endpoint(server.url, "another"), requests(3), path)
    ask(at(server), requests(3, seed=1), path)
    assert len(server.bodies) == 9


def test_what_is_kept_needs_no_server_and_no_package(serve, path, monkeypatch):
    server = serve()
    ask(at(server), requests(3), path)
    server.stop()
    monkeypatch.setitem(sys.modules, "openai", None)
    assert ask(at(server), requests(3), path) == (answered(3), {})
    texts, failures = ask(at(server), requests(4), path)
    assert texts == [*answered(3), None]
    assert failures == {3: "not asked: an endpoint needs the openai package: pip install 'deftlib[endpoint]'"}


def test_after_a_kill_only_the_rest_is_asked(serve, path, capsys):
    ask(at(serve()), requests(5), path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:9])  # killed while it wrote
    server = serve()
    assert ask(at(server), requests(5), path, "judging").texts == answered(5)
    assert len(server.bodies) == 2
    assert "judging: 3 of 5 answers are kept from before" in capsys.readouterr().out


def test_many_are_under_way_together_but_no_more_than_allowed(serve, path):
    server = serve("slow")
    ask(at(server), requests(6), path, at_once=3)
    assert server.most == 3


# ---- servers that misbehave ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["429", "500", "cut", "hang up", "408"])
def test_a_server_that_stumbles_is_asked_again(serve, path, trouble):
    server = serve(trouble, "ok")
    assert ask(at(server), requests(3), path) == (answered(3), {})
    assert len(server.bodies) == 6


def test_a_server_that_takes_too_long_is_asked_again(serve, path, monkeypatch):
    monkeypatch.setattr(endpoint, "TIMEOUT", 0.1)
    server = serve("slow", "ok")
    assert ask(at(server), requests(2), path) == (answered(2), {})
    assert len(server.bodies) == 4


@pytest.mark.parametrize(
    "trouble, reason, asked",
    [
        ("429", "RateLimitError", 5),
        ("500", "InternalServerError", 5),
        ("cut", "APIConnectionError: Connection error. (peer closed connection", 5),
        ("hang up", "APIConnectionError", 5),
        ("400", "BadRequestError", 1),
        ("422", "UnprocessableEntityError", 1),
        ("401", "AuthenticationError", 1),
        ("html", "the answer is not a chat completion, does the URL end in /v1? '<html><body>Welcome", 1),
        ("empty", "empty text", 1),
    ],
)
def test_one_request_that_fails_costs_no_other(serve, path, trouble, reason, asked):
    server = serve(lambda body: trouble if number(body) == 4 else "ok")
    texts, failures = ask(at(server), requests(12), path)
    assert texts == [text if i != 4 else None for i, text in enumerate(answered(12))]
    assert list(failures) == [4] and failures[4].startswith(reason)
    assert [number(body) for body in server.bodies].count(4) == asked  # by the client's own retries, where that helps
    well = serve()
    assert ask(at(well), requests(12), path) == (answered(12), {})  # only the failed one is asked again
    assert len(well.bodies) == 1


def test_half_a_character_is_no_text(serve, path):
    texts, failures = ask(at(serve(reply=lambda body: "half a pair \ud83d")), requests(1), path)
    assert (texts, failures) == ([None], {0: "invalid Unicode"})


@pytest.mark.parametrize("trouble", ["500", "429", "html", "cut", "401"])
def test_a_server_that_fails_from_some_point_on_is_soon_left_alone(serve, path, trouble):
    server = serve(lambda body: "ok" if number(body) < 10 else trouble)
    texts, failures = ask(at(server), requests(100), path)
    assert texts == answered(10) + [None] * 90
    assert len({number(body) for body in server.bodies}) < 10 + 4 * endpoint.IN_A_ROW  # some were under way
    assert len(entries(path)) == 10
    assert failures[99].startswith("not asked: 8 failures in a row, the last: ")
    with pytest.raises(EndpointError, match=r"^90 of 100 .* \(not asked: 8 failures .* 10 answers are kept: run again"):
        require((texts, failures))


def test_a_server_that_answers_now_and_then_is_asked_to_the_end(serve, path):
    server = serve(lambda body: "ok" if number(body) % 4 == 0 else "html")
    texts, _ = ask(at(server), requests(40), path, at_once=1)
    assert texts == [text if i % 4 == 0 else None for i, text in enumerate(answered(40))]


def test_what_is_kept_stands_where_nothing_more_can_be_asked(serve, path):
    ask(at(serve()), requests(3), path)
    texts, failures = ask(at(serve("401")), requests(4), path)
    assert texts == [*answered(3), None] and failures[3].startswith("AuthenticationError")


def test_refusals_do_not_stop_a_run_that_gets_answers(serve, path):
    server = serve(lambda body: "ok" if number(body) == 0 else "400")
    texts, failures = ask(at(server), requests(30), path, at_once=1)
    assert texts == ["so: question 0"] + [None] * 29
    assert len(server.bodies) == 30 and all(reason.startswith("BadRequestError") for reason in failures.values())


@pytest.mark.parametrize("trouble", ["400", "empty"])
def test_refusals_stop_a_run_that_gets_nothing_else(serve, path, trouble):
    server = serve(trouble)
    texts, failures = ask(at(server), requests(30), path, at_once=1)
    assert texts == [None] * 30 and len(failures) == 30
    assert len(server.bodies) == endpoint.IN_A_ROW


@pytest.mark.parametrize(
    "trouble, reason",
    [
        ("401", r"AuthenticationError: .*; is its key in OPENAI_API_KEY\?"),
        ("403", "PermissionDeniedError"),
        ("404", r"NotFoundError: .*; does the URL end in /v1, and does the server know the model\?"),
        ("hang up", "APIConnectionError: Connection error"),
    ],
)
@pytest.mark.parametrize("n", [2, 30])
def test_where_nothing_can_be_asked_the_error_is_one_sentence(serve, path, trouble, reason, n):
    server = serve(trouble)
    with pytest.raises(EndpointError, match=rf"^{server.url}: {reason}") as caught:
        ask(at(server), requests(n), path)
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)
    assert not path.exists()


def test_without_a_server_the_error_names_the_cause_but_not_the_password(serve, path):
    server = serve()
    server.stop()
    with pytest.raises(EndpointError, match=rf"^http://127.0.0.1:{server.port}/v1: .*Connection refused") as caught:
        ask(Endpoint(server.url.replace("//", "//me:password@"), "judge"), requests(1), path)
    assert "password" not in str(caught.value)


def test_without_the_package_the_error_names_the_extra(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(EndpointError, match=r"pip install 'deftlib\[endpoint\]'"):
        ask(Endpoint("http://127.0.0.1:9/v1", "judge"), requests(1), path)


@pytest.mark.parametrize("wrong", [("http://127.0.0.1:9/v1", ""), ("", "judge")])
def test_an_endpoint_is_a_url_and_a_model(path, wrong):
    with pytest.raises(ValueError, match=r"^an endpoint is a URL .* and the name of a model, found"):
        ask(Endpoint(*wrong), requests(1), path)


# ---- the key and the bill ------------------------------------------------------------------------------------------


def test_no_file_line_or_reason_holds_the_key_or_the_password(serve, path, capsys):
    server = serve(lambda body: "400" if number(body) else "ok")
    url = server.url.replace("//", "//me:password@")
    _, failures = ask(Endpoint(url, "judge"), requests(2), path)
    server.keys.clear()
    _, more = ask(at(server), requests(2), path)
    assert server.keys == {f"Bearer {KEY}"} and "***" in more[1]  # the server repeats the key it was sent
    shown = path.read_text() + capsys.readouterr().out + json.dumps([failures, more])
    assert KEY not in shown and "password" not in shown


def test_a_local_server_needs_no_key(serve, path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve()
    assert ask(at(server), requests(1), path).texts == answered(1)
    assert server.keys == {"Bearer no-key-needed"}


def test_once_the_token_budget_is_spent_nothing_more_is_sent_in_this_run(serve, path, monkeypatch):
    server = serve()  # ten tokens an answer
    texts, failures = ask(at(server, token_budget=25), requests(5), path, at_once=1)
    assert texts == [*answered(3), None, None]
    assert failures == dict.fromkeys([3, 4], "not asked: the token budget of 25 is spent")
    assert ask(at(server, token_budget=25), requests(5), path).texts == texts  # one run may ask more than once
    assert len(server.bodies) == 3
    endpoint.SPENT.clear()  # a new run
    assert ask(at(server, token_budget=25), requests(5), path).failures == {}


def test_tokens_that_a_server_counts_in_text_are_tokens(serve, path):
    server = serve()
    server.usage = {"total_tokens": "10"}
    answers = ask(at(server, token_budget=15), requests(4), path, at_once=1)
    assert sum(text is not None for text in answers.texts) == 2


def test_two_that_ask_the_same_pay_once(serve, path):
    server = serve("slow")
    both = [threading.Thread(target=ask, args=(at(server), requests(3), path)) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert len(server.bodies) == 3


def test_empty_answers_cost_tokens_too(serve, path):
    server = serve(lambda body: "empty" if number(body) else "ok")
    ask(at(server, token_budget=25), requests(9), path, at_once=1)
    assert len(server.bodies) == 3


def test_a_budget_that_nobody_counts_is_not_taken_as_kept(serve, path):
    server = serve()
    server.usage = None
    texts, failures = ask(at(server, token_budget=25), requests(3), path, at_once=1)
    assert texts == [*answered(1), None, None]
    assert failures[2].startswith("not asked: the server counts no tokens")
    assert ask(at(server), requests(3), path).texts == answered(3)


# ---- who needs them all, and policies ------------------------------------------------------------------------------


def test_few_failures_may_be_tolerated_but_a_request_never_asked_may_not():
    assert require((["a", "b"], {})) == ["a", "b"]
    lost = ["a", "b", "c", None], {3: "empty text"}
    assert require(lost, max_lost_share=0.25) == lost[0]
    with pytest.raises(EndpointError, match=r"^1 of 4 requests have no answer \(empty text\); 3 answers are kept"):
        require(lost, max_lost_share=0.24)
    with pytest.raises(EndpointError, match=r"^1 of 4 .*\(not asked: the token budget"):
        require((lost[0], {3: "not asked: the token budget of 5 is spent"}), max_lost_share=0.9)


PROMPTS = [f"\n\nHuman: One?\n\nAssistant: Two.\n\nHuman: question {i}\n\nAssistant:" for i in range(3)]


def test_a_policy_behind_a_server_gives_its_samples_to_each_prompt(serve, path):
    server = serve(reply=lambda body: f"{number(body)} by seed {body['seed']}.\n\nHuman: more")
    settings = Generation(max_new_tokens=9, temperature=0.7, samples=2)
    said = replies_from(at(server), PROMPTS, settings, path, seed=3)
    assert said == [[f"{i} by seed {seed}.\n\nHuman: more" for seed in (6, 7)] for i in range(3)]
    options = {"model": "judge", "temperature": 0.7, "max_tokens": 9, "seed": 6}
    assert {"messages": messages(PROMPTS[1]), **options} in server.bodies
    assert [turn["content"] for turn in messages(PROMPTS[1])] == ["One?", "Two.", "question 1"]


def test_samples_of_different_seeds_are_different_requests():
    seeds = [request["seed"] for seed in (0, 1) for request in chat_requests(["x"], Generation(samples=3), seed)]
    assert seeds == [0, 1, 2, 3, 4, 5]


def test_a_policy_that_says_nothing_has_said_so_and_one_that_fails_has_not(serve, path):
    server = serve(lambda body: "empty" if number(body) == 1 else "ok")
    assert replies_from(at(server), PROMPTS, Generation(), path)[1] == [""]
    server = serve(lambda body: "400" if number(body) == 1 else "ok")
    with pytest.raises(EndpointError, match=r"^1 of 3 requests have no answer \(BadRequestError"):
        replies_from(at(server), PROMPTS, Generation(), path)
