"""Runs the command line in this process, as a shell would see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from medsr_cli.cli import app


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def medsr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    def run(*arguments: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["medsr", *(str(a) for a in arguments)])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        with pytest.raises(SystemExit) as end:
            app.run()
        captured = capsys.readouterr()
        return Ended(int(end.value.code or 0), captured.out, captured.err)

    return run
