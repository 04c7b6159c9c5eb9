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

from deftlib import credentials, store
from deftlib.models import chat
from deftlib.models.chat import EMPTY, NoText
from deftlib.models.loop import with_progress
from deftlib.models.said import reply_in
from deftlib.preferences.dialogues import messages

TIMEOUT = 600.0  # seconds for one attempt: a laptop's server answers a queue of long requests slowly
IN_A_ROW = 8  # failures one after the other that speak against the server: nothing more is sent
ABOUT_ONE_REQUEST = {400, 403, 413, 422}  # an unknown option, moderation, a long prompt, a content filter
HINTS = {401: "is its key in OPENAI_API_KEY?", 404: "does the URL end in /v1, and does the server know the model?"}
NOT_ASKED = "not asked"
SPENT = Counter()  # {(url, model): tokens} of this process: a budget holds over all calls of a run


class EndpointError(RuntimeError):
    """A server that cannot be asked, or did not answer enough: one sentence with the cause and what to do."""


class Answers(NamedTuple):
    texts: list[str | None]  # in the order of the requests, None where there is no answer
    failures: dict[int, str]  # index of each request without an answer: why


def ask(endpoint, requests, path, label="asking", at_once=8):
    """The answers of `endpoint` (a profile `Endpoint`) to chat requests, and why some have none.

    requests: dicts of `messages` and options (temperature, max_tokens, seed, ...); equal ones are asked once;
    `endpoint.max_tokens` replaces theirs. path: JSONL file of what is kept: request, what of it the server refused
    ("changed"), its whole text, its name and version of the model, usage, time. An answer is the text without its
    reasoning (`said.reply_in`). at_once: how many requests are under way together. Nothing more is sent once
    `endpoint.token_budget` is spent in this process, or after `IN_A_ROW` failures in a row that are no matter of one
    request; the rest then fails as "not asked: ...".
    Raises EndpointError if there is no answer at all, kept or new, because no server can be asked (no `openai`
    package, no connection, 401, 403, 404), ValueError for an endpoint without a URL or a model.
    """
    if not (endpoint.url and endpoint.model):
        found = f"{credentials.without(endpoint.url)!r} and {endpoint.model!r}"
        raise ValueError(f"an endpoint is a URL (http://localhost:8000/v1) and the name of a model, found {found}")
    kept = store.Kept(path)
    questions = _questions(endpoint, requests)
    reasons = {}
    if not all(question in kept for question in questions):
        with kept.asking():
            reasons = _ask_rest(endpoint, questions, kept, label, at_once)
    texts = [reply_in(kept[question]["text"]) if question in kept else None for question in questions]
    keys = [store.content_key(question) for question in questions]
    return Answers(texts, {i: reasons[key] for i, key in enumerate(keys) if key in reasons})


def require(answers, max_lost_share=0.0):
    """The texts of `answers`. Raises EndpointError if a request was not asked at all or more than this share failed."""
    texts, failures = answers
    worst = sorted(failures.values(), key=lambda reason: not reason.startswith(NOT_ASKED))
    if len(failures) > max_lost_share * len(texts) or (worst and worst[0].startswith(NOT_ASKED)):
        raise EndpointError(
            f"{len(failures)} of {len(texts)} requests have no answer ({worst[0]}); "
            f"{len(texts) - len(failures)} answers are kept: run again for the rest"
        )
    return texts


def chat_requests(prompts, settings, seed=0):
    """`settings.samples` (a profile `Generation`) requests for each prompt; samples differ by their seed.

    Prompts in the project's text format are sent whole, as chat messages: the server has a template of its own.
    """
    options = {"temperature": settings.temperature, "max_tokens": settings.max_new_tokens}
    seeds = [seed * settings.samples + k for k in range(settings.samples)]
    return [{"messages": messages(prompt), **options, "seed": s} for prompt in prompts for s in seeds]


def replies_from(endpoint, prompts, settings, path, seed=0):
    """[[reply, ...], ...]: `settings.samples` replies to each prompt as the server wrote them, next turns included.

    An empty answer is an empty reply, as it is of a policy in process. Raises EndpointError if any other is missing.
    """
    texts, failures = ask(endpoint, chat_requests(prompts, settings, seed), path, f"asking {endpoint.model}")
    said = ["" if failures.get(i) == EMPTY else text for i, text in enumerate(texts)]
    require(Answers(said, {i: reason for i, reason in failures.items() if reason != EMPTY}))
    return [said[i : i + settings.samples] for i in range(0, len(said), settings.samples)]


def answered_by(endpoint, requests, path):
    """The names, with versions, under which the server answered these requests: a sorted list."""
    kept = store.Kept(path)
    return sorted({str(kept[question]["model"]) for question in _questions(endpoint, requests) if question in kept})


def cut_short(endpoint, requests, path):
    """The indices of the requests whose kept answer ended at max_tokens."""
    kept = store.Kept(path)
    questions = enumerate(_questions(endpoint, requests))
    return {i for i, question in questions if question in kept and kept[question].get("finish_reason") == "length"}


def kept_file(profile_name, endpoint):
    """Where the answers of a server are kept for all results that ask for no file of their own."""
    return store.build_dir(profile_name) / "kept" / f"{store.content_key([endpoint.url, endpoint.model])}.jsonl"


def _questions(endpoint, requests):
    """What the answers to these requests are kept under."""
    limit = {"max_tokens": endpoint.max_tokens} if endpoint.max_tokens else {}
    return [{"model": endpoint.model, "request": {**request, **limit}} for request in requests]


def _ask_rest(endpoint, questions, kept, label, at_once):
    """Ask what is not kept, and keep what is answered. Returns {content key: reason} of all others."""
    todo = {store.content_key(question): question for question in questions if question not in kept}
    n_kept = sum(question in kept for question in questions)
    if n_kept:
        print(f"  {label}: {n_kept} of {len(questions)} answers are kept from before", flush=True)
    if not todo:  # another process asked meanwhile
        return {}
    any_answer = bool(n_kept)
    try:
        import openai
    except ImportError as error:
        reason = "an endpoint needs the openai package: pip install 'deftlib[endpoint]'"
        if any_answer:
            return dict.fromkeys(todo, f"{NOT_ASKED}: {reason}")
        raise EndpointError(reason) from error
    nobody_there = openai.APIConnectionError, openai.AuthenticationError
    nobody_there += openai.PermissionDeniedError, openai.NotFoundError
    secret = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key-needed"  # by a local server; the client wants one
    name, budget = (endpoint.url, endpoint.model), endpoint.token_budget
    spent = f"the token budget of {budget} is spent"
    stop = spent if budget and SPENT[name] >= budget else None
    reasons, in_a_row, in_vain = {}, 0, not any_answer  # in vain: no answer, and never a sign that one could come
    left, under_way = deque(todo), {}

    def as_they_come():
        """[(content key, future), ...] of what is done; sends the next ones as long as nothing says stop."""
        while under_way or (left and not stop):
            while left and not stop and len(under_way) < at_once:
                key = left.popleft()
                future = pool.submit(client.complete, endpoint.model, todo[key]["request"])
                under_way[future] = key
            yield [(under_way.pop(future), future) for future in wait(under_way, return_when=FIRST_COMPLETED).done]

    with (
        chat.Client(credentials.given(endpoint.url), secret, TIMEOUT) as client,
        ThreadPoolExecutor(at_once) as pool,
    ):
        for done in with_progress(as_they_come(), label, total=len(todo)):
            for key, future in done:
                try:
                    completion, changed = future.result()
                    tokens = _tokens(completion)
                    SPENT[name] += tokens
                    kept.add(todo[key], _entry(todo[key]["request"], completion, changed))
                    any_answer, in_a_row, in_vain = True, 0, False
                    if budget and not tokens:
                        stop = "the server counts no tokens, so no token budget can be kept: set it to 0"
                except (openai.OpenAIError, ValueError) as error:
                    reasons[key] = _reason(error, secret)
                    in_vain = in_vain and isinstance(error, nobody_there)
                    about_it = isinstance(error, NoText) or getattr(error, "status_code", None) in ABOUT_ONE_REQUEST
                    in_a_row += not (about_it and any_answer)
                    if in_a_row >= IN_A_ROW:
                        stop = stop or f"{in_a_row} failures in a row, the last: {reasons[key]}"
                if budget and SPENT[name] >= budget:
                    stop = spent
    if in_vain and reasons:
        raise EndpointError(f"{credentials.without(endpoint.url)}: {list(reasons.values())[-1]}")
    return reasons | dict.fromkeys(left, f"{NOT_ASKED}: {stop}")


def _entry(request, completion, changed):
    """What is kept of an answer. Raises as `chat.text_of`."""
    _, raw = chat.text_of(completion)
    said = {"request": request, "text": raw, "finish_reason": completion.choices[0].finish_reason}
    said |= {"changed": changed} if changed else {}
    said |= {"model": completion.model, "fingerprint": getattr(completion, "system_fingerprint", None)}
    said |= {"usage": completion.usage and completion.usage.to_dict()}
    return said | {"created": datetime.now(UTC).isoformat(timespec="seconds")}


def _tokens(completion):
    """What an answer cost, 0 where the server does not count; some count in text."""
    try:
        return int(completion.usage.total_tokens)
    except (AttributeError, TypeError, ValueError):
        return 0


def _reason(error, secret):
    """One line: what went wrong, without the key, and a question that often finds the cause."""
    plain = type(error) in (ValueError, NoText)
    cause = f" ({error.__cause__})" if type(error).__name__ == "APIConnectionError" else ""
    text = f"{error}" if plain else f"{type(error).__name__}: {error}{cause}"
    hint = HINTS.get(getattr(error, "status_code", None))
    return " ".join(credentials.redacted(text.replace(secret, "***")).split())[:200] + (f"; {hint}" if hint else "")
