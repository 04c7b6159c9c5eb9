"""Servers that call themselves OpenAI-compatible: addresses as people copy them, options refused, limits, odd answers.

| kind | example | right value |
|---|---|---|
| address | no scheme, no /v1, a whole request's, Ollama's own, Azure's | the base URL, and the query |
| an option refused | "Use 'max_completion_tokens' instead" | asked with the other name, or without |
| rate limit | Retry-After, "try again in 2m59.5s", "retryDelay": "7s" | waited as told; a quota is not |
| an answer | reasoning, parts, a refusal, an error with status 200, cut | the reply, or the reason |
"""

import json
import time
from types import SimpleNamespace

import pytest
import servers

from deftlib.models import chat, endpoint
from deftlib.models.chat import NoText, address, option_refused, text_of, wait_told
from deftlib.models.endpoint import ask, replies_from
from deftlib.sections import Endpoint, Generation

serve = servers.serve
REQUEST = {"messages": [{"role": "user", "content": "question 0"}], "max_tokens": 9, "temperature": 0, "seed": 1}


def at(server, **more):
    return Endpoint(server.url, "judge", **more)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


# ---- addresses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("localhost:8000", "http://localhost:8000/v1"),
        ("10.0.0.7/v1", "http://10.0.0.7/v1"),
        ("api.openai.com/v1", "https://api.openai.com/v1"),
        (" https://api.openai.com/v1/chat/completions ", "https://api.openai.com/v1"),
        ("http://localhost:11434/api/chat", "http://localhost:11434/v1"),  # Ollama's own
        ("https://openrouter.ai/api/v1", "https://openrouter.ai/api/v1"),
        (
            "https://generativelanguage.googleapis.com/v1beta/openai/",
            "https://generativelanguage.googleapis.com/v1beta/openai",
        ),
        ("https://mine.openai.azure.com", "https://mine.openai.azure.com/openai/v1"),
        ("https://api.perplexity.ai/chat/completions", "https://api.perplexity.ai"),
    ],
)
def test_an_address_is_understood_as_people_copy_it(given, base):
    assert address(given) == (base, {})


def test_azures_address_keeps_its_query():
    given = "https://mine.openai.azure.com/openai/deployments/gpt/chat/completions?api-version=2024-10-21"
    assert address(given) == ("https://mine.openai.azure.com/openai/deployments/gpt", {"api-version": "2024-10-21"})


def test_the_query_and_the_key_reach_the_server(serve, path):
    server = serve()
    server.paths.add("/v1/chat/completions?api-version=7")
    url = server.url + "/chat/completions?api-version=7"
    assert ask(Endpoint(url, "judge"), [REQUEST], path).texts == ["so: question 0"]


# ---- options that are refused --------------------------------------------------------------------------------------


def refusing(*options, words):
    """A behaviour: 400 with these words for a request that has one of the options, {option} filled in."""

    def behaviour(body):
        found = next((option for option in options if option in body), None)
        return (400, {"error": {"message": words.format(option=found)}}, {}) if found else "ok"

    return behaviour


@pytest.mark.parametrize(
    "words",
    [
        "Unsupported parameter: '{option}' is not supported with this model. Use 'max_completion_tokens' instead.",
        "litellm.UnsupportedParamsError: judge does not support parameters: ['{option}']",
        "Unrecognized request argument supplied: {option}",
        "body -> {option}: Extra inputs are not permitted",
        'Invalid JSON payload received. Unknown name "{option}": Cannot find field.',
    ],
)
def test_what_a_server_refuses_is_asked_otherwise_and_remembered(serve, path, capsys, words):
    server = serve(refusing("max_tokens", "seed", words=words))
    requests = [{**REQUEST, "messages": [{"role": "user", "content": f"question {i}"}]} for i in range(4)]
    assert ask(at(server), requests, path, at_once=1) == ([f"so: question {i}" for i in range(4)], {})
    assert len(server.bodies) == 4 + 2  # one refusal for each option, in the whole run
    assert server.bodies[-1]["max_completion_tokens"] == 9 and "seed" not in server.bodies[-1]
    told = capsys.readouterr().out
    assert "judge refuses max_tokens: asked with max_completion_tokens" in told
    assert told.count("judge refuses seed: asked without it") == 1
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(entry["changed"] == {"max_tokens": "max_completion_tokens", "seed": None} for entry in entries)
    assert all(entry["request"]["max_tokens"] == 9 for entry in entries)  # kept under what was asked for


def test_a_temperature_that_is_refused_is_left_out_and_so_is_the_other_name_of_a_limit(serve, path):
    words = "Unsupported value: '{option}' does not support 0 with this model. Only the default (1) value is supported."
    server = serve(refusing("temperature", "max_tokens", "max_completion_tokens", words=words))
    assert ask(at(server), [REQUEST], path).texts == ["so: question 0"]
    assert set(server.bodies[-1]) == {"model", "messages", "seed"}


@pytest.mark.parametrize(
    "words",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (max_tokens too large)",
        "'max_tokens' or 'max_completion_tokens' is too large: 2048. Unsupported for this context length.",
        "Your prompt was refused.",
    ],
)
def test_a_prompt_that_is_too_long_is_no_option_refused(words):
    assert option_refused(ValueError(words), REQUEST) is None


def test_a_prompt_that_an_error_repeats_is_not_what_it_says():
    words = "You asked why max_tokens is unsupported"
    request = {**REQUEST, "messages": [{"role": "user", "content": words}]}
    error = ValueError("Error code: 422")
    error.body = {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "input": words}]}
    assert option_refused(error, request) == "seed"
    error.body = {"message": f"Unsupported value: 'temperature'. Request: {words}", "param": None}
    assert option_refused(error, request) == "temperature"
    error.body = {"message": f"I cannot read this: {words}"}
    assert option_refused(error, request) is None


# ---- rate limits ---------------------------------------------------------------------------------------------------


def limit(words, **headers):
    response = SimpleNamespace(headers={name.replace("_", "-"): value for name, value in headers.items()})
    error = ValueError(words)
    error.response = response
    return error


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (limit("busy", retry_after="7"), 7),
        (limit("busy", retry_after_ms="1500"), 1.5),
        (limit("Rate limit reached. Please try again in 5.289s. Visit"), 5.289),
        (limit("Please try again in 2m59.56s."), 179.56),
        (limit("please retry after 25s, resets at Wed"), 25),
        (limit("Please retry after 3 seconds."), 3),
        (limit("try again in 750ms"), 0.75),
        (limit("retry in .5s"), 0.5),
        (limit("Try again in 1 minute and 5 seconds."), 65),
        (limit("check your plan and billing details. Please retry in 26.3s."), 26.3),  # Gemini
        (limit("Please try again in 1h2m3s"), 3723),
        (limit("{'retryDelay': '55.8s'}"), 55.8),
        (limit("Too many requests"), None),
        (limit("You exceeded your current quota, insufficient_quota. Try again in 5s"), None),
    ],
)
def test_how_long_to_wait_is_read_from_headers_and_words(error, seconds):
    assert wait_told(error) == (seconds if seconds is None else pytest.approx(seconds))


def test_a_date_in_retry_after_is_seconds_from_the_servers_own_clock():
    date = {"retry_after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}
    assert wait_told(limit("slow down", **date)) == 30.0
    assert wait_told(limit("slow down", retry_after="Wed, 21 Oct 2015 07:28:30 GMT")) == 0.0  # long ago
    assert wait_told(limit("try again in 7s", retry_after="soon")) == 7.0


def test_a_limit_is_waited_for_as_told_and_shown(serve, path, capsys, monkeypatch):
    monkeypatch.setattr(chat, "RETRIES", 0)
    words = {"error": {"message": "Rate limit reached. Please try again in 1.2s.", "code": "rate_limit_exceeded"}}
    server = serve((429, words, {}), "ok")
    start = time.monotonic()
    assert ask(at(server), [REQUEST], path).texts == ["so: question 0"]
    assert time.monotonic() - start > 1.2
    assert "rate limit: waiting 1 s, as the server says" in capsys.readouterr().out


def test_a_quota_is_not_waited_for(serve, path, monkeypatch):
    monkeypatch.setattr(chat, "RETRIES", 0)
    server = serve((429, {"error": {"message": "insufficient_quota. Please try again in 3s"}}, {}))
    _, failures = ask(at(server), [REQUEST], path)
    assert failures[0].startswith("RateLimitError") and len(server.bodies) == 1


# ---- answers -------------------------------------------------------------------------------------------------------


def completion(finish="stop", error=None, **message):
    choice = SimpleNamespace(message=SimpleNamespace(**{"content": None, **message}), finish_reason=finish)
    return SimpleNamespace(choices=[choice], error=error)


def test_a_reply_is_what_is_left_without_reasoning_whatever_shape_it_has():
    raw = "<think>[[5]]</think>[[9]]"
    assert text_of(completion(content=raw)) == ("[[9]]", raw)
    parts = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "A"},
        SimpleNamespace(type="text", text="B"),
    ]
    assert text_of(completion(content=parts))[0] == "AB"
    old = SimpleNamespace(choices=[SimpleNamespace(text=" B", finish_reason="stop")])
    assert text_of(old)[0] == " B"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (completion(content=""), "empty text"),
        (
            completion("length", content="", reasoning_content="hm"),
            "cut at max_tokens while it reasoned, before it said",
        ),
        (completion("length", content="<think>hm"), "cut at max_tokens while it reasoned"),
        (completion("length", content=""), "cut at max_tokens, before it said anything: raise max_tokens"),
        (completion(content=None, reasoning="hm"), "reasoning without an answer"),
        (completion(content="<think>hm</think>"), "reasoning without an answer"),
        (completion(refusal="I cannot"), "refused: I cannot"),
        (completion("content_filter"), "stopped by the server (content_filter)"),
        (completion(content="half \ud83d"), "invalid Unicode"),
    ],
)
def test_where_nothing_is_said_the_reason_is(answer, reason):
    with pytest.raises(NoText) as caught:
        text_of(answer)
    assert str(caught.value).startswith(reason)


def test_an_error_with_status_200_is_the_servers_own_words():
    with pytest.raises(ValueError, match="the server answers with an error: Provider is down"):
        text_of(completion(error={"message": "Provider is down", "code": 502}))


def test_a_judge_that_reasons_is_kept_whole_and_read_without(serve, path):
    server = serve(reply=lambda body: "<think>[[5]] as in the example</think>\n[[9]]")
    assert ask(at(server), [REQUEST], path).texts == ["[[9]]"]
    assert json.loads(path.read_text())["text"].startswith("<think>[[5]]")
    server.stop()
    assert ask(at(server), [REQUEST], path).texts == ["[[9]]"]


def cut_while_reasoning(body):
    message = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    choice = {"index": 0, "finish_reason": "length", "message": message}
    return 200, {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}, {}


def test_an_answer_cut_while_it_reasoned_is_no_empty_reply_and_the_limit_is_a_setting(serve, path):
    server = serve(cut_while_reasoning)
    prompts = ["\n\nHuman: question 0\n\nAssistant:"]
    with pytest.raises(endpoint.EndpointError, match=r"cut at max_tokens while it reasoned, .*: raise max_tokens"):
        replies_from(at(server), prompts, Generation(max_new_tokens=9), path)
    assert server.bodies[-1]["max_tokens"] == 9
    server.behaviours = ("ok",)
    assert replies_from(at(server, max_tokens=4000), prompts, Generation(max_new_tokens=9), path) == [
        ["so: question 0"]
    ]
    assert server.bodies[-1]["max_tokens"] == 4000
