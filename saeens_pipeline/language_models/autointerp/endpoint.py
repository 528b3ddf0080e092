"""A language model behind an HTTP endpoint that speaks OpenAI's protocol of chat completions.

Where it is and the key come from the environment when they are needed. Neither is ever stored; the key, or a password in the URL, is kept
out of log lines and error messages, too, also where the endpoint repeats it.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from saeens_pipeline.errors import ConfigurationError, SaeensError

URL_VARIABLE, KEY_VARIABLE = "SAEENS_LLM_BASE_URL", "SAEENS_LLM_API_KEY"

_INSTALL = "install it with `pip install --constraint constraints.txt --editable '.[autointerp]'`"
SHOWN_CHARACTERS = 300  # of what an endpoint says
_SHORTEST_SECRET = 8  # characters; what servers that ask for none are given, such as x, is a part of many words
_NO_KEY = "none"  # or the client would look for one in other variables


class Reply(NamedTuple):
    """What an endpoint made of a request; the counts are 0 where it does not give them."""

    text: str | None
    """None where there is no text in it"""
    is_cut_off: bool
    tokens_in: int
    tokens_out: int
    excerpt: str = ""
    """of what came in the place of a text, on one line; empty where there is one"""


class RefusedError(SaeensError):
    """The endpoint answers, and does not take this request: a parameter that it does not know, a text that it does not like."""


@dataclass(frozen=True)
class Endpoint:
    """Where the language model is. `str` and `repr` show the host alone."""

    base_url: str = field(repr=False)
    host: str
    key: str = field(repr=False, default="")
    credentials: str = field(repr=False, default="")  # user:password of the URL

    @classmethod
    def from_environment(cls) -> Endpoint | None:
        """As SAEENS_LLM_BASE_URL and SAEENS_LLM_API_KEY say; None where no URL is set.

        Raises ConfigurationError for what is no such URL, for two kinds of credentials, and without the package that asks.
        """
        url, key = os.environ.get(URL_VARIABLE, "").strip(), os.environ.get(KEY_VARIABLE, "").strip()
        if not url:
            return None
        parts = _parts(url)
        if parts is None:
            raise ConfigurationError(
                f"{URL_VARIABLE} is not the address of an endpoint: it has to look like http://localhost:8080/v1 or "
                f"https://api.openai.com/v1; a key belongs into {KEY_VARIABLE}"
            )
        user, _, address = parts.netloc.rpartition("@")
        if user and key:
            raise ConfigurationError(f"{URL_VARIABLE} has a user and a password in it, and {KEY_VARIABLE} is set: give one of the two")
        if not key.isascii() or any(character.isspace() for character in key):
            raise ConfigurationError(f"{KEY_VARIABLE} holds characters that no key has, such as blanks: copy it again")
        if importlib.util.find_spec("openai") is None:
            raise ConfigurationError(f"{URL_VARIABLE} is set, and asking it needs the package openai: {_INSTALL}")
        return cls(parts._replace(netloc=address).geturl(), f"{parts.scheme}://{address}", key, unquote(user))

    @staticmethod
    def is_configured() -> bool:
        """Whether a URL is set, whatever it is."""
        return bool(os.environ.get(URL_VARIABLE, "").strip())

    @property
    def authorization(self) -> str:
        """What the header of that name says."""
        if self.credentials:
            return f"Basic {base64.b64encode(self.credentials.encode()).decode()}"
        return f"Bearer {self.key or _NO_KEY}"

    def without_secrets(self, text: str) -> str:
        """The text with *** for the key or the password."""
        for secret in (self.key, *self.credentials.partition(":")[::2], self.authorization.partition(" ")[2]):
            if len(secret) >= _SHORTEST_SECRET:
                text = text.replace(secret, "***")
        return text


class Client:
    """Asks an endpoint; made and used inside one event loop.

    What may pass (no connection, time-outs, 408, 409, 429, 5xx) is tried again `retries` times, after the seconds that the endpoint asks
    for or else after 0.5 s, 1 s, 2 s and so on up to 8 s.
    """

    def __init__(self, endpoint: Endpoint, timeout_seconds: float, retries: int) -> None:
        import openai

        self.endpoint = endpoint
        others = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}  # of variables that were set for others
        self._headers: dict[str, Any] = {"Authorization": endpoint.authorization, **others}
        self._client = openai.AsyncOpenAI(
            api_key=endpoint.key or _NO_KEY, base_url=endpoint.base_url, timeout=timeout_seconds, max_retries=retries
        )

    async def ask(self, request: Mapping[str, Any]) -> Reply:
        """Send a request: `model`, `messages`, and other fields of a chat completion.

        Raises RefusedError where the endpoint answers and does not take it, ConfigurationError for a key, a model or a path that it does
        not know, SaeensError where it does not answer. None of these has a cause, which may hold the key.
        """
        import openai

        model, messages = request["model"], request["messages"]
        others = {name: value for name, value in request.items() if name not in ("model", "messages")}
        try:
            response = await self._client.chat.completions.with_raw_response.create(
                model=model, messages=messages, extra_headers=self._headers, extra_body=others
            )
            return self._read(response.text)
        except openai.APIStatusError as error:
            failure = self._explain(error.status_code, error.message, model)
        except openai.APITimeoutError:
            failure = SaeensError(
                f"{self.endpoint.host} does not answer in time: give it longer, autointerp.timeout_seconds, and run again"
            )
        except openai.APIConnectionError as error:
            why = self._shown(str(error.__cause__ or error))
            failure = SaeensError(f"{self.endpoint.host} cannot be reached ({why}): see that it runs, and that {URL_VARIABLE} is right")
        raise failure

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    def _explain(self, status: int, message: str, model: str) -> SaeensError:
        host, said = self.endpoint.host, self._shown(message)
        match status:
            case 401 | 403:  # what it says may quote a part of the key
                given = "the key" if self.endpoint.key or self.endpoint.credentials else "requests without a key"
                return ConfigurationError(f"{host} refuses {given} ({status}): set {KEY_VARIABLE}")
            case 404:
                return ConfigurationError(
                    f"{host} knows no such path or no model {model!r} ({said}): {URL_VARIABLE} usually ends in /v1, "
                    "and autointerp.model is a name that the endpoint lists"
                )
            case 400 | 413 | 422:
                return RefusedError(f"{host} does not take a request ({said}): autointerp.parameters says what is sent beside the messages")
        return SaeensError(f"{host} goes on failing ({said}): what it answered is kept; run again when it works")

    def _shown(self, text: str) -> str:
        return " ".join(self.endpoint.without_secrets(text).split())[:SHOWN_CHARACTERS]

    def _read(self, body: str) -> Reply:
        try:
            answer = json.loads(body)
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return Reply(None, False, 0, 0, self._shown(body))
        usage = answer.get("usage")
        counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
        return Reply(
            self.endpoint.without_secrets(text.encode(errors="replace").decode()) if isinstance(text, str) else None,  # halves of pairs
            choice.get("finish_reason") == "length",
            *(count if isinstance(count, int) else 0 for count in counts),
            excerpt="" if isinstance(text, str) else self._shown(body),
        )


def _parts(url: str) -> SplitResult | None:
    """Of the URL of an endpoint; None for what is none."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for what is no number
    except ValueError:
        return None
    return parts if parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment else None
