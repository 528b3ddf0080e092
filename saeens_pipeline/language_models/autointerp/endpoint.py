"""A language model behind an HTTP endpoint with OpenAI's protocol of chat completions.

Address and key are read from the environment when they are needed, and are never stored. The key and a password in the URL are removed from
log lines, error messages and texts of the endpoint, and escape sequences from what it says.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from saeens_pipeline.errors import ConfigurationError, SaeensError, printable

URL_VARIABLE, KEY_VARIABLE = "SAEENS_LLM_BASE_URL", "SAEENS_LLM_API_KEY"

_INSTALL = "install it with `pip install --constraint constraints.txt --editable '.[autointerp]'`"
SHOWN_CHARACTERS = 300  # of a text of the endpoint in messages
_SHORTEST_SECRET = 8  # characters; shorter placeholder keys, such as x, are parts of many words
_NO_KEY = "none"  # without a key the client would read other variables


class Reply(NamedTuple):
    """Reply of an endpoint to a request; token counts are 0 if it does not give them."""

    text: str | None
    """None for a reply without a text"""
    is_cut_off: bool
    tokens_in: int
    tokens_out: int
    excerpt: str = ""
    """start of a reply without a text, on one line; otherwise empty"""


class RefusedError(SaeensError):
    """The endpoint refuses this request: for example an unknown parameter or a filtered text."""


@dataclass(frozen=True)
class Endpoint:
    """Address and credentials of the endpoint of a language model. `str` and `repr` show the host only."""

    base_url: str = field(repr=False)
    host: str
    key: str = field(repr=False, default="")
    credentials: str = field(repr=False, default="")  # user:password of the URL

    @classmethod
    def from_environment(cls) -> Endpoint | None:
        """Return the endpoint in SAEENS_LLM_BASE_URL and SAEENS_LLM_API_KEY; None if no URL is set.

        Raises ConfigurationError for an invalid URL or key, for two kinds of credentials, and without the package openai.
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
            raise ConfigurationError(f"{URL_VARIABLE} is set, but requests need the package openai: {_INSTALL}")
        return cls(parts._replace(netloc=address).geturl(), f"{parts.scheme}://{address}", key, unquote(user))

    @staticmethod
    def is_configured() -> bool:
        """Return whether the environment sets a URL, which need not be valid."""
        return bool(os.environ.get(URL_VARIABLE, "").strip())

    @property
    def authorization(self) -> str:
        """Value of the Authorization header."""
        if self.credentials:
            return f"Basic {base64.b64encode(self.credentials.encode()).decode()}"
        return f"Bearer {self.key or _NO_KEY}"

    def without_secrets(self, text: str) -> str:
        """Return the text with *** in place of key, user and password."""
        for secret in (self.key, *self.credentials.partition(":")[::2], self.authorization.partition(" ")[2]):
            if len(secret) >= _SHORTEST_SECRET:
                text = text.replace(secret, "***")
        return text


class Client:
    """Client of an endpoint, for use inside one event loop.

    Temporary failures (no connection, time-outs, status 408, 409, 429, 5xx) are retried `retries` times, after the delay that the endpoint
    requests, otherwise after 0.5 s, 1 s, 2 s and so on up to 8 s.
    """

    def __init__(self, endpoint: Endpoint, timeout_seconds: float, retries: int) -> None:
        import httpx2  # of openai
        import openai

        self.endpoint = endpoint
        others = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}  # the client reads them from the environment
        self._headers: dict[str, Any] = {"Authorization": endpoint.authorization, **others}

        class InTime(openai.DefaultAsyncHttpxClient):
            async def send(self, *arguments: Any, **options: Any) -> Any:
                try:
                    async with asyncio.timeout(timeout_seconds):  # the client's own is one between two bytes
                        return await super().send(*arguments, **options)
                except TimeoutError:
                    raise httpx2.ReadTimeout("the answer is not complete in time") from None

        self._client = openai.AsyncOpenAI(
            api_key=endpoint.key or _NO_KEY,
            base_url=endpoint.base_url,
            timeout=timeout_seconds,
            max_retries=retries,
            http_client=InTime(),
        )

    async def ask(self, request: Mapping[str, Any]) -> Reply:
        """Send a request (`model`, `messages` and other fields of a chat completion) and return the reply.

        Raises RefusedError if the endpoint refuses this request, ConfigurationError for an unknown key, model or path, SaeensError if it
        does not answer. The errors have no cause, since that may hold the key.
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
            failure = SaeensError(f"{self.endpoint.host} does not answer in time: increase autointerp.timeout_seconds and run again")
        except openai.APIConnectionError as error:
            why = self._shown(str(error.__cause__ or error))
            failure = SaeensError(f"{self.endpoint.host} cannot be reached ({why}): check that it runs, and that {URL_VARIABLE} is right")
        raise failure

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _explain(self, status: int, message: str, model: str) -> SaeensError:
        host, said = self.endpoint.host, self._shown(message)
        match status:
            case 401 | 403:  # the message of the endpoint may quote a part of the key
                given = "the key" if self.endpoint.key or self.endpoint.credentials else "requests without a key"
                return ConfigurationError(f"{host} refuses {given} ({status}): set {KEY_VARIABLE}")
            case 404:
                return ConfigurationError(
                    f"{host} knows no such path or no model {model!r} ({said}): {URL_VARIABLE} usually ends in /v1, "
                    "and autointerp.model is a name that the endpoint lists"
                )
            case 400 | 413 | 422:
                return RefusedError(f"{host} refuses a request ({said}): autointerp.parameters holds the fields next to the messages")
        return SaeensError(f"{host} keeps failing ({said}): its answers so far are kept; run again when it works")

    def _shown(self, text: str) -> str:
        return " ".join(printable(self.endpoint.without_secrets(text)).split())[:SHOWN_CHARACTERS]

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
            self.endpoint.without_secrets(printable(text.encode(errors="replace").decode()))
            if isinstance(text, str)
            else None,  # halves of pairs
            choice.get("finish_reason") == "length",
            *(count if isinstance(count, int) else 0 for count in counts),
            excerpt="" if isinstance(text, str) else self._shown(body),
        )


def _parts(url: str) -> SplitResult | None:
    """Return the parts of the URL of an endpoint; None for other texts."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for a port that is not a number
    except ValueError:
        return None
    return parts if parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment else None
