"""Ask any OpenAI-compatible server (`vllm serve`, Ollama, a hosted model), each question once.

    texts, failures = ask(profile.mt_bench.judge, [{"messages": [...], "temperature": 0}, ...], path)

Every answer is written to `path` as it comes, under the content of its request: a dropped connection or a kill costs
nothing, and what is kept needs no server, no key and no `openai` package. The key is read from OPENAI_API_KEY and
written nowhere.
"""

import os
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from typing import NamedTuple
from urllib.parse import urlsplit

from deftlib import models, store
from deftlib.loop import with_progress

RETRIES = 4  # by the client, with growing pauses: after 429, 5xx, a timeout or a lost connection
TIMEOUT = 600.0  # seconds for one attempt: a laptop's server answers a queue of long requests slowly
IN_A_ROW = 8  # failures one after the other that say the server is at fault: nothing more is sent
ABOUT_ONE_REQUEST = {400, 403, 413, 422}  # a content filter, an unknown option, a long prompt; a moderation's 403
HINTS = {401: "is its key in OPENAI_API_KEY?", 404: "does the URL end in /v1, and does the server know the model?"}
EMPTY = "empty text"
NOT_ASKED = "not asked"
SPENT = Counter()  # {(url, model): tokens} of this process: a budget holds over all calls of a run


class EndpointError(RuntimeError):
    """A server that cannot be asked, or did not answer enough: one sentence with the cause and what to do."""


class NoAnswer(ValueError):
    """A response that carries no text to keep."""


class Answers(NamedTuple):
    texts: list  # of str in the order of the requests, None where there is no answer
    failures: dict  # {index: reason} of those without


def ask(endpoint, requests, path, label="asking", at_once=8):
    """The answers of `endpoint` (a profile `Endpoint`) to chat requests, and why some have none.

    requests: dicts of `messages` and options (temperature, max_tokens, seed, ...); equal ones are asked once. path:
    JSONL file of what is kept: text, the server's name and version of the model, usage, time. at_once: how many
    requests are under way together. Nothing more is sent after `IN_A_ROW` failures in a row that are no matter of one
    request, or once `endpoint.token_budget` is spent in this process; the rest then fails as "not asked: ...".
    Raises EndpointError if there is no answer at all, kept or new, because no server can be asked: no `openai`
    package, no connection, 401, 403 or 404. Raises ValueError for an endpoint without a URL or a model.
    """
    if not (endpoint.url.startswith(("http://", "https://")) and endpoint.model):
        raise ValueError(f"an endpoint is an http(s) URL and a model, found {endpoint.url!r} and {endpoint.model!r}")
    kept = store.Kept(path)
    questions = [{"model": endpoint.model, "request": request} for request in requests]
    todo = {store.content_key(question): question for question in questions if question not in kept}
    reasons = {}
    if todo:
        n_kept = sum(question in kept for question in questions)
        if n_kept:
            print(f"  {label}: {n_kept} of {len(questions)} answers are kept from before", flush=True)
        reasons, nobody_there = _ask_rest(endpoint, todo, kept, n_kept > 0, label, at_once)
        if nobody_there and not any(question in kept for question in questions):
            raise EndpointError(f"{without_password(endpoint.url)}: {nobody_there}")
    texts = [kept[question]["text"] if question in kept else None for question in questions]
    return Answers(texts, {i: reasons[store.content_key(questions[i])] for i, text in enumerate(texts) if text is None})


def require(answers, max_lost_share=0.0):
    """The texts of `answers`. Raises EndpointError if a request was not asked at all or more than this share failed."""
    texts, failures = answers
    not_asked = [reason for reason in failures.values() if reason.startswith(NOT_ASKED)]
    if not_asked or len(failures) > max_lost_share * len(texts):
        raise EndpointError(
            f"{len(failures)} of {len(texts)} requests have no answer: {(not_asked or list(failures.values()))[-1]} "
            f"({len(texts) - len(failures)} answers are kept: run again for the rest)"
        )
    return texts


def chat_requests(prompts, settings, seed=0):
    """`settings.samples` requests for each prompt in the project's text format; samples differ by their seed.

    settings: a profile `Generation`. Prompts are sent whole and as chat messages: the server has its own template.
    """
    options = {"temperature": settings.temperature, "max_tokens": settings.max_new_tokens}
    seeds = [seed * settings.samples + k for k in range(settings.samples)]
    return [{"messages": models.turns(prompt), **options, "seed": s} for prompt in prompts for s in seeds]


def replies_from(endpoint, prompts, settings, path, seed=0):
    """[[reply, ...], ...]: `settings.samples` replies to each prompt as the server wrote them, next turns included.

    An empty answer is an empty reply, as it is for a policy in process. Raises EndpointError if any other is missing.
    """
    texts, failures = ask(endpoint, chat_requests(prompts, settings, seed), path, f"asking {endpoint.model}")
    said = ["" if failures.get(i) == EMPTY else text for i, text in enumerate(texts)]
    require(Answers(said, {i: reason for i, reason in failures.items() if reason != EMPTY}))
    return [said[i : i + settings.samples] for i in range(0, len(said), settings.samples)]


def answered_by(endpoint, requests, path):
    """Names and versions under which the server answered these requests, as it reported them: a sorted list."""
    kept = store.Kept(path)
    questions = [{"model": endpoint.model, "request": request} for request in requests]
    return sorted({kept[question]["model"] for question in questions if question in kept})


def without_password(url):
    """The URL as results may show it: no user, password or query."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _ask_rest(endpoint, todo, kept, answers, label, at_once):
    """({content key: reason for no answer}, why nobody is there to be asked, or None). answers: whether any is kept."""
    try:
        import openai
    except ImportError:
        why = "an endpoint needs the openai package: pip install 'deftlib[endpoint]'"
        return dict.fromkeys(todo, f"{NOT_ASKED}: {why}"), why
    secret = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key-needed"  # by a local server; the client wants one
    nobody_there = (openai.APIConnectionError, openai.AuthenticationError)
    nobody_there += (openai.PermissionDeniedError, openai.NotFoundError)
    name, budget = (endpoint.url, endpoint.model), endpoint.token_budget
    reasons, in_a_row, why = {}, 0, None
    left, under_way = deque(todo), {}

    def over_budget():
        return f"the token budget of {budget} is spent" if budget and SPENT[name] >= budget else None

    stop = over_budget()

    def as_they_come():
        """[(content key, its future), ...] of what is done; as long as nothing stops it, sends the next ones."""
        while under_way or (left and not stop):
            while left and not stop and len(under_way) < at_once:
                under_way[pool.submit(client.chat.completions.create, model=endpoint.model, **todo[left[0]]["request"])]
                under_way
            yield [(under_way.pop(future), future) for future in wait(under_way, return_when=FIRST_COMPLETED).done]
