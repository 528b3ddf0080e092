"""What a language model has answered, kept on disk: an answer is paid for once.

`answers/7f/7f3c...json` below the data root holds one request with its answer. Its name is the hash of all that the answer depends on, the
request as it is sent: model, messages and parameters. Where it is sent is no part of it, and neither is who asks: features with the same
contexts have their answers in common. Nothing removes these files but you: `saeens gc` leaves the folder alone.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeens_pipeline.storage.disk import flush
from saeens_pipeline.storage.recipes import digest

FOLDER = "answers"


@dataclass(frozen=True)
class Answers:
    """The answers below a data root."""

    root: Path

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever answered here."""
        return not (self.root / FOLDER).exists()

    def find(self, request: dict[str, Any]) -> str | None:
        """The answer to a request; None where there is none, or none that can be read."""
        try:
            answer = json.loads(self._file(request).read_text("utf-8"))["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return answer if isinstance(answer, str) else None

    def keep(self, request: dict[str, Any], answer: str, **about: Any) -> None:
        """Write an answer, and what is good to know of it. It appears when it is whole."""
        file = self._file(request)
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name}.{os.getpid()}.partial")
        beside.write_text(json.dumps({"request": request, "answer": answer, **about}, indent=1, ensure_ascii=False) + "\n", "utf-8")
        flush(beside)
        beside.replace(file)

    def _file(self, request: dict[str, Any]) -> Path:
        name = digest(request)
        return self.root / FOLDER / name[:2] / f"{name}.json"
