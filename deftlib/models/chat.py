"""One answer from any server that calls itself OpenAI-compatible: its address, what it refuses, how it answers.

    with Client("http://localhost:8000", key) as client:
        completion, changed = client.complete("judge", {"messages": [...], "max_tokens": 64, "temperature": 0})
    text_of(completion)      # what was meant to be read; raises NoText with the reason where there is nothing

What servers do differently is taken from the public bug reports of their users: vLLM, SGLang, TGI, llama.cpp, Ollama,
LM Studio, LiteLLM, OpenRouter, Azure, Groq, Gemini, Mistral.
"""

import re
import threading
import time
from email.utils import parsedate_to_datetime
from urllib.parse import parse_qsl, urlsplit

from deftlib.models.said import reply_in
from deftlib.preferences.dialogues import text_of_parts

RETRIES = 4  # the client's own, with growing pauses: after 408, 409, 429, 5xx, a timeout or a lost connection
WAITS = 6  # then, where a server says how long its rate limit lasts, as many times
LONGEST_WAIT = 900.0  # seconds: what asks for more is a quota and no rate
EMPTY = "empty text"
OTHER_NAMES = {"max_tokens": "max_completion_tokens"}  # what is tried before an option is left out
REASONING = ("reasoning_content", "reasoning", "thinking")  # where servers put it, beside the content
CHANGES = {}  # {(url, model): {option: another name, or None: left out}}, learned in this process

_REFUSED = re.compile(
    r"unsupported|not support|unknown|unrecognized|unexpected|not allowed|not permitted|forbidden|only the default"
    r"|deprecated|instead|invalid (?:parameter|argument|field)|strictly positive|cannot find field",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(r"context length|context window|too (?:large|long)|exceed|at most", re.IGNORECASE)
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = r"(\d*\.?\d+)\s*(h|ms|m|s)(?:ours?|rs?|in(?:ute)?s?|ec(?:ond)?s?)?(?![a-z])"
_WAIT = re.compile(rf"(?:try again|retry|retrydelay|reset)\D{{0,24}}?((?:{_DURATION}[\s,]*(?:and )?)+)", re.IGNORECASE)


class NoText(ValueError):
    """A chat completion without a text that can be kept."""


class Client:
    """An `openai` client that learns which options a server refuses, and waits as long as its rate limit says."""

    def __init__(self, url, key, timeout):
        import openai

        base, query = address(url)
        more = {"default_query": query, "default_headers": {"api-key": key}} if query else {}  # Azure wants its own
        self.client = openai.OpenAI(base_url=base, api_key=key, max_retries=RETRIES, timeout=timeout, **more)
        self.errors, self.url, self.lock, self.free_at = openai, url, threading.Lock(), 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()

    def complete(self, model, request):
        """(completion, {option: another name or None}) of a request; raises what `openai` raises."""
        for waits in range(WAITS + 1):
            time.sleep(max(0.0, self.free_at - time.monotonic()))
            try:
                return self._complete(model, request)
            except self.errors.RateLimitError as error:
                seconds = wait_told(error)
                if seconds is None or seconds > LONGEST_WAIT or waits == WAITS:
                    raise
                self._pause(seconds)

    def _complete(self, model, request):
        while True:
            changes = dict(CHANGES.get((self.url, model), {}))
            sent = {changes.get(option, option): value for option, value in request.items()}
            sent.pop(None, None)
            try:
                completion = self.client.chat.completions.create(model=model, **sent)
                return completion, {option: changes[option] for option in request if option in changes}
            except (self.errors.BadRequestError, self.errors.UnprocessableEntityError) as error:
                refused = option_refused(error, sent)
                if refused is None:
                    raise
                self._learn(model, refused)

    def _learn(self, model, refused):
        option = next((plain for plain, other in OTHER_NAMES.items() if refused == other), refused)
        other = OTHER_NAMES.get(option) if refused == option else None
        with self.lock:
            changes = CHANGES.setdefault((self.url, model), {})
            if changes.get(option, option) == refused:  # no other thread has learned it meanwhile
                changes[option] = other
                how = f"asked with {other}" if other else "asked without it"
                print(f"  {model} refuses {refused}: {how}", flush=True)

    def _pause(self, seconds):
        with self.lock:
            until = time.monotonic() + seconds
            if until > self.free_at + 1:
                print(f"  rate limit: waiting {seconds:.0f} s, as the server says", flush=True)
            self.free_at = max(self.free_at, until)


def address(url):
    """(base URL, query) for the client, of an address as people copy it: no scheme, no /v1, or a whole request's."""
    url = url.strip()
    if "://" not in url:
        host = url.split("/")[0]
        local = ":" in host or host == "localhost" or re.fullmatch(r"[\d.]+", host)
        url = f"{'http' if local else 'https'}://{url}"
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    spelled = re.sub(r"/(?:chat/completions|completions|responses|models|embeddings)$", "", path)
    is_whole, path = spelled != path, spelled  # the address of a request says itself whether there is a version
    if parts.port == 11434 and path.startswith("/api"):  # Ollama's own interface
        path = ""
    if not path and not is_whole:
        path = "/openai/v1" if (parts.hostname or "").endswith(".azure.com") else "/v1"
    return parts._replace(path=path, query="", fragment="").geturl(), dict(parse_qsl(parts.query))


def option_refused(error, sent):
    """The option of `sent` that the server will not take, by its error's parameter or words; None if it says other."""
    words = f"{getattr(error, 'param', None) or ''} {' '.join(_said_in(getattr(error, 'body', None) or str(error)))}"
    for message in sent.get("messages", []):  # some servers repeat what they were sent
        words = words.replace(str(message["content"]), " ")
    if _TOO_LONG.search(words) or not _REFUSED.search(words):
        return None
    options = [option for option in ("max_tokens", "max_completion_tokens", "temperature", "seed") if option in sent]
    named = {option: re.search(rf"(?<!\w){option}(?!\w)", words) for option in options}
    return min((option for option in options if named[option]), key=lambda option: named[option].start(), default=None)


def _said_in(body):
    """Every text in an error's body but the input that it repeats."""
    if isinstance(body, dict):
        return [text for name, part in body.items() if name not in ("input", "messages") for text in _said_in(part)]
    if isinstance(body, list):
        return [text for part in body for text in _said_in(part)]
    return [str(body)]


def wait_told(error):
    """Seconds that a rate limit says to wait, in its headers or its words; None where it does not, or is a quota."""
    words = f"{error} {getattr(error, 'body', None) or ''}"
    if "insufficient_quota" in words:
        return None
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        if re.fullmatch(r"\d+(\.\d+)?", headers.get(name, "")):
            return scale * float(headers[name])
    until, now = (_seconds_of_date(headers.get(name, "")) for name in ("retry-after", "date"))
    if until:
        return max(0.0, until - (now or time.time()))
    told = _WAIT.search(words)
    parts = re.findall(_DURATION, told[1], re.IGNORECASE) if told else []
    return sum(float(size) * _UNITS[unit.lower()] for size, unit in parts) if parts else None


def _seconds_of_date(text):
    """Since 1970, of a date as HTTP writes it; None of anything else."""
    try:
        return parsedate_to_datetime(text).timestamp()
    except ValueError:
        return None


def text_of(completion):
    """What a completion was meant to say, by `said.reply_in`, and its raw text: (said, raw).

    Raises NoText with the reason where nothing is left (it was cut, refused, or only reasoned), ValueError with the
    server's own words for what is no chat completion.
    """
    told = getattr(completion, "error", None)
    if told:  # OpenRouter sends it with status 200
        message = told.get("message", told) if isinstance(told, dict) else told
        raise ValueError(f"the server answers with an error: {message}")
    try:
        choice = completion.choices[0]
        message = getattr(choice, "message", None)
        raw = _joined(message.content) if message is not None else choice.text
        if not isinstance(raw, str):
            raise TypeError(raw)
    except (AttributeError, LookupError, TypeError) as error:
        shown = str(completion)[:80]
        raise ValueError(f"the answer is not a chat completion, does the URL end in /v1? {shown!r}") from error
    if raw.encode(errors="ignore").decode() != raw:  # half a surrogate pair: nothing can store it
        raise NoText("invalid Unicode")
    said = reply_in(raw)
    if choice.finish_reason in ("error", "content_filter"):
        raise NoText(f"stopped by the server ({choice.finish_reason})")
    if said.strip():
        return said, raw
    reasoned = bool(raw.strip() or any(getattr(message, name, None) for name in REASONING))
    if choice.finish_reason == "length":
        raise NoText(f"cut at max_tokens{' while it reasoned' * reasoned}, before it said anything: raise max_tokens")
    if getattr(message, "refusal", None):
        raise NoText(f"refused: {message.refusal}")
    raise NoText("reasoning without an answer" if reasoned else EMPTY)


def _joined(content):
    """The text of a message's content: a string, nothing, or a list of parts, of which those that think are left."""
    if isinstance(content, list):
        return text_of_parts([part if isinstance(part, dict) else vars(part) for part in content])
    return content or ""
