"""A chat server on localhost that behaves and misbehaves as told, for tests of whatever asks such a server.

    serve = servers.serve                      # in a test module: makes the fixture known there

    def test_a_busy_server_is_asked_again(serve):
        server = serve("429", "ok")            # the first and all later times that one request arrives
        ... Endpoint(server.url, "judge") ...
        assert len(server.bodies) == 2

A behaviour is a name or a function of the request body that returns one:

    "ok" answers `reply(body)`   "slow" does so after `server.delay` seconds   "empty" answers with an empty text
    "html" sends a web page      "cut" sends half an answer and hangs up       "hang up" sends nothing at all
    "400", "401", "429", "500" and any other status: an error that repeats the key it was sent, as some servers do
    (status, body, headers): that answer, body and all
"""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deftlib.models import chat, endpoint

KEY = "sk-not-to-be-written-anywhere"
VERSION = "-2024-08-06"  # what the server adds to the name of the model it was asked for
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}  # of every answer


def echo(body):
    """A reply that names the message it answers."""
    return f"so: {body['messages'][-1]['content']}"


class Listener(ThreadingHTTPServer):
    request_queue_size = 64  # of the default five, some callers would wait a second


class ChatServer:
    """bodies: every request that arrived, in order. keys: the Authorization headers. usage: what answers report.
    most: how many slow requests were under way together at most."""

    def __init__(self, *behaviours, reply=echo, port=0):
        self.behaviours, self.reply, self.delay, self.usage = behaviours, reply, 0.3, USAGE
        self.bodies, self.keys, self.waiting, self.most = [], set(), 0, 0
        self.times, self.lock, self.paths = Counter(), threading.Lock(), {"/v1/chat/completions"}

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                behaviour = self.behaviour(body) if handler.path in self.paths else "404"
                self.answer(handler, body, behaviour)

            def log_message(handler, *args):
                pass

        self.server = Listener(("127.0.0.1", port), Handler)
        self.server.handle_error = lambda *args: None  # a client that gave up waiting is part of the test
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def behaviour(self, body):
        """The name of what to do with this request; the last behaviour holds for ever."""
        with self.lock:
            self.bodies.append(body)
            request = json.dumps(body, sort_keys=True)
            behaviour = self.behaviours[min(self.times[request], len(self.behaviours) - 1)]
            self.times[request] += 1
            return behaviour(body) if callable(behaviour) else behaviour

    def answer(self, handler, body, behaviour):
        self.keys.add(handler.headers["Authorization"])
        if behaviour == "hang up":
            return handler.connection.close()
        if behaviour == "slow":
            with self.lock:
                self.waiting += 1
                self.most = max(self.most, self.waiting)
            time.sleep(self.delay)
            with self.lock:
                self.waiting -= 1
        status, kind, headers = 200, "application/json", {}
        if isinstance(behaviour, tuple):
            status, content, headers = behaviour
            content = json.dumps(content)
        else:
            content = json.dumps(self.completion(body, behaviour))
        if behaviour == "html":
            kind, content = "text/html", "<html><body>Welcome</body></html>"
        elif isinstance(behaviour, str) and behaviour.isdigit():
            message = f"no luck, you with the key {handler.headers['Authorization']}"
            status, content = int(behaviour), json.dumps({"error": {"message": message}})
        content = content.encode()
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2] if behaviour == "cut" else content)
        handler.close_connection = True

    def completion(self, body, behaviour):
        message = {"role": "assistant", "content": "" if behaviour == "empty" else self.reply(body)}
        answer = {"id": "x", "object": "chat.completion", "created": 1722902400, "model": body["model"] + VERSION}
        answer |= {"choices": [{"index": 0, "finish_reason": "stop", "message": message}], "usage": self.usage}
        return answer


@pytest.fixture
def serve(monkeypatch):
    """Start servers that are stopped after the test: serve(*behaviours, reply=echo, port=0). Retries hardly wait."""
    client = pytest.importorskip("openai")._base_client
    monkeypatch.setattr(client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(client, "MAX_RETRY_DELAY", 0.01)
    monkeypatch.setattr(endpoint, "SPENT", Counter())
    monkeypatch.setattr(chat, "CHANGES", {})
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    servers = []

    def start(*behaviours, reply=echo, port=0):
        servers.append(ChatServer(*(behaviours or ("ok",)), reply=reply, port=port))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
