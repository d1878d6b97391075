"""An environment, a store and a server of their own for every test of the weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test modules here import their makers by name, whatever import mode pytest runs in.
sys.path.insert(0, str(Path(__file__).parent))

from misbehaving_site import Site, running, safetensors_bytes

from medsr_cli.weights.store import Store

NETWORK_VARIABLES = (
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_ENDPOINT", "HF_TOKEN",
    "HF_HUB_OFFLINE", "MEDSR_OFFLINE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR",
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in NETWORK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MEDSR_HOME", str(tmp_path / "home"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    bundled = tmp_path / "bundled"
    bundled.mkdir()
    return Store(tmp_path / "home", bundled)


@pytest.fixture
def site() -> Iterator[Site]:
    with running(safetensors_bytes()) as site:
        yield site
