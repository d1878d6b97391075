"""What several test folders need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says nothing about what is right, and machines differ.
settings.register_profile("medsr", deadline=None)
settings.load_profile("medsr")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the checkout; CI always has it."""
    if not SHARED.is_dir():
        assert not os.environ.get("CI"), "CI must have the shared data"
        pytest.skip("needs the shared data")
    return SHARED


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own for every test: the user's is never touched."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("MEDSR_HOME", str(folder))
    return folder
