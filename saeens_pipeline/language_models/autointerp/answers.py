"""Answers of a language model on disk, so that each is paid for once.

`answers/7f/7f3c...json` below the data root holds one request with its answer. The name is the hash of the request as sent: model, messages
and parameters. Endpoint and feature are not part of it, so features with equal contexts share answers. `saeens gc` keeps these files; only
the user removes them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeens_pipeline.storage.disk import write_atomically
from saeens_pipeline.storage.recipes import digest

FOLDER = "answers"


@dataclass(frozen=True)
class Answers:
    """The answers below a data root."""

    root: Path

    @property
    def is_empty(self) -> bool:
        """True if the data root has no answers."""
        return not (self.root / FOLDER).exists()

    def find(self, request: dict[str, Any]) -> str | None:
        """Return the answer to a request; None if there is no readable one."""
        try:
            answer = json.loads(self._file(request).read_text("utf-8"))["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return answer if isinstance(answer, str) else None

    def keep(self, request: dict[str, Any], answer: str, **about: Any) -> None:
        """Write an answer with its request and more facts `about` it. The file appears once it is complete."""
        file = self._file(request)
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"request": request, "answer": answer, **about}, indent=1, ensure_ascii=False) + "\n"
        write_atomically(file, text, aside=f".{file.name}.{os.getpid()}.partial")

    def _file(self, request: dict[str, Any]) -> Path:
        name = digest(request)
        return self.root / FOLDER / name[:2] / f"{name}.json"
