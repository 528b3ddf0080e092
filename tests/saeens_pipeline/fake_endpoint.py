"""A language model on this machine: an HTTP server that speaks OpenAI's protocol and answers by a rule."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Rule = Callable[["Question"], str]


class Question(NamedTuple):
    """A question: explain texts, or detect which of them fit an explanation."""

    explanation: str | None
    """None where one is asked for"""
    texts: list[str]

    @classmethod
    def of(cls, request: dict[str, Any]) -> Question:
        """Read from the first message of the user, as any reader would."""
        content = request["messages"][1]["content"]
        explanation = re.match(r"Explanation: (.*)\n", content)
        texts = [json.loads(text) for text in re.findall(r'^\d+\. (".*")$', content, re.MULTILINE)]
        return cls(explanation[1] if explanation else None, texts)


class Canned(NamedTuple):
    """A response that is given in the place of an answer."""

    status: int
    body: str = "{}"
    headers: dict[str, str] = {}  # noqa: RUF012  # nothing changes it
    delay_seconds: float = 0.0
    trickle_seconds: float = 0.0
    """Between two bytes of the body."""


def completion(text: str | None, finish_reason: str = "stop") -> str:
    """The body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "fake", "choices": [choice], "usage": usage})


def failure(status: int, message: str, **headers: str) -> Canned:
    """An error as OpenAI words it."""
    return Canned(
        status, json.dumps({"error": {"message": message, "type": "error"}}), {k.replace("_", "-"): v for k, v in headers.items()}
    )


@dataclass
class FakeEndpoint:
    """`rule` answers; `canned` responses are given first, one a request; `always` in the place of all answers."""

    rule: Rule
    canned: list[Canned] = field(default_factory=list)
    always: Canned | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def questions(self) -> list[Question]:
        return [Question.of(request) for request in self.requests]


@contextmanager
def serving(endpoint: FakeEndpoint) -> Iterator[FakeEndpoint]:
    """Answer on a free port of the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is printed."""

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                endpoint.requests.append(request)
                endpoint.headers.append(dict(self.headers))
                endpoint.at_once += 1
                endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                response = endpoint.canned.pop(0) if endpoint.canned else endpoint.always
            if self.path != "/v1/chat/completions":
                response = failure(404, f"no {self.path} here")
            if response is None:
                response = Canned(200, completion(endpoint.rule(Question.of(request))))
            time.sleep(response.delay_seconds)
            with endpoint.lock:
                endpoint.at_once -= 1
            try:
                body = response.body.encode()
                self.send_response(response.status)
                for name, value in {"Content-Type": "application/json", **response.headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                for part in [body[i : i + 1] for i in range(len(body))] if response.trickle_seconds else [body]:
                    self.wfile.write(part)
                    time.sleep(response.trickle_seconds)
            except OSError:
                """Who asked did not wait."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield endpoint
        finally:
            server.shutdown()
            thread.join()
