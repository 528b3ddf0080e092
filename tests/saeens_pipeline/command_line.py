"""The `saeens` command in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from saeens_pipeline import cli


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """Text of standard error without line breaks."""
        return " ".join(self.err.split())


Saeens = Callable[..., Outcome]


@pytest.fixture
def saeens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Saeens:
    """Runs the command in this process."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["saeens", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        printed = capsys.readouterr()
        return Outcome(code or 0, printed.out, printed.err)

    return call
