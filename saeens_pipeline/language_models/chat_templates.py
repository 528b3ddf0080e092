"""Chat templates of tokenizers, which write a conversation as one text.

A template is the file chat_template.jinja in the folder of the tokenizer, or else `chat_template` in tokenizer_config.json; of a GGUF file,
it is in the header.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models import hub, records
from saeens_pipeline.language_models.descriptions import LanguageModelDescription
from saeens_pipeline.language_models.gguf_loading import dequantise
from saeens_pipeline.language_models.gguf_models import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TODAY = datetime(2024, 7, 26)
"""The date in conversations, for templates that ask for today's: the default date of Llama 3.1's. Texts are the same on any day."""
_DATE: dict[str, Any] = {
    "fixed_date": {f"%{each}": TODAY.strftime(f"%{each}") for each in "aAbBcdHIjmMpSuUwWxXyY"} | {"%-d": "26", "%-m": "7"}
}
_FIXED_DATE = (  # transformers passes no functions to templates; the empty expression keeps a first newline
    "{% macro strftime_now(format) %}{% set date = namespace(text=format) %}{% for name, value in fixed_date.items() %}"
    "{% set date.text = date.text | replace(name, value) %}{% endfor %}{{ date.text }}{% endmacro %}{{ '' }}"
)
_TEMPLATE, _CONFIGURATION, _SPECIAL_TOKENS = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"
_READ = ("role", "content")
_SHOWN_KEYS = 12


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a language model."""

    model: LanguageModelDescription
    text: str
    folder: Path
    """Folder of the tokenizer's configuration; of a GGUF model, the cache, filled before its first use."""

    @property
    def identity(self) -> dict[str, Any]:
        """Values that identify the template in recipes. They differ if conversations may be written in another way."""
        found: dict[str, Any] = {"sha256": hashlib.sha256(self.text.encode()).hexdigest()}
        # the hash of a GGUF file, which is in the tokenizer's identity, covers its tokens
        return found if self.model.gguf_file else found | {"special_tokens": self.special_tokens}

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The tokens that templates use by name, such as `bos_token`. Raises as `dequantise`."""
        dequantise(self.model)
        return _special_tokens(self.folder)

    def write(self, messages: object) -> str:
        """Return a conversation as text, as the tokenizer's `apply_chat_template` writes it, with the special tokens that belong to it.

        messages: a list of mappings with the texts `role` and `content`; other keys are not read.
        Raises ValueError, which says what is wrong with a conversation or why the template refuses it, ConfigurationError for a template
        that is not valid.
        """
        from jinja2 import TemplateSyntaxError

        read, writer = _read(messages), self._writer
        template, variables = self.text, dict[str, Any](self.special_tokens)
        if "strftime_now" in template:
            template, variables = f"{_FIXED_DATE}{template}", variables | _DATE
        try:
            return str(writer.apply_chat_template(read, chat_template=template, tokenize=False, **variables))
        except TemplateSyntaxError as error:
            raise ConfigurationError(f"the chat template of {self.model.name} is not valid: {error}") from error
        except Exception as error:  # what a template raises, and what it does with a role that it does not know
            why = " ".join(str(error).split()) or type(error).__name__
            roles = ", ".join(each["role"] for each in read[:_SHOWN_KEYS])
            raise ValueError(f"is refused by the chat template of {self.model.name}: {why} (roles: {roles})") from error

    @cached_property
    def _writer(self) -> PreTrainedTokenizerFast:
        """A tokenizer without tokens: text and special tokens are given to it, so that they are those of `identity`."""
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


def read_chat_template(description: LanguageModelDescription) -> ChatTemplate:
    """Return the chat template of a language model. Downloads at most three small files of a model on the hub.

    Raises ConfigurationError for a tokenizer without a chat template, and files that cannot be read.
    """
    folder, template = description.tokenizer_file.parent, None
    if description.commit is not None and folder == description.path:
        folder = hub.download(description.name, description.commit, [_TEMPLATE, _CONFIGURATION, _SPECIAL_TOKENS])
    if description.gguf_file is not None:
        template = read_header(description.name, description.gguf_file).fields.get("tokenizer.chat_template")
    elif (folder / _TEMPLATE).is_file():
        template = records.read_text(folder / _TEMPLATE)
    else:
        template = _read_json(folder / _CONFIGURATION).get("chat_template")
        if isinstance(template, list):  # several with names
            template = {each.get("name"): each.get("template") for each in template if isinstance(each, Mapping)}.get("default")
    if not isinstance(template, str) or not template.strip():
        where = description.gguf_file or f"{folder} ({_TEMPLATE}, or chat_template in {_CONFIGURATION})"
        raise ConfigurationError(
            f"messages_field needs a chat template, and {description.name} has none in {where}: take a model that was trained for chats, "
            "add the template there, or give texts with text_field"
        )
    return ChatTemplate(description, template, folder)


def _special_tokens(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in (_SPECIAL_TOKENS, _CONFIGURATION):  # the latter counts
        for name, token in _read_json(folder / file).items():
            content = token.get("content") if isinstance(token, Mapping) else token
            if name.endswith("_token") and isinstance(content, str):
                found[name] = content
    return found


def _read_json(file: Path) -> Mapping[str, Any]:
    """Return a JSON object, empty without the file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{file} does not hold a JSON object")
    return found


def _read(messages: object) -> list[dict[str, str]]:
    """Return role and content of each message. Raises ValueError, the end of a sentence about the field."""
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"is {records.kind(messages)}, and it has to be a list of messages with role and content")
    if not messages:
        raise ValueError("is an empty list: a conversation has at least one message; remove the record")
    found: list[dict[str, str]] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise ValueError(f"has {records.kind(message)} as message {number}, and it has to be an object with role and content")
        values = {key: records.as_text(message.get(key)) for key in _READ}
        for key, value in values.items():
            if not isinstance(value, str):
                keys = ", ".join([str(each) for each in message][:_SHOWN_KEYS]) or "none"
                what = f"{records.kind(value)}, and it has to be a text" if key in message else f"missing; there are: {keys}"
                raise ValueError(f"has a message {number} whose {key} is {what}")
        if message.get("tool_calls"):
            raise ValueError(
                f"has a message {number} with tool_calls, and calls of tools are not read: remove the record, or write it as text"
            )
        found.append(values)
    return found
