"""`medsr weights push` as a shell sees it: results on stdout, words on stderr, no secret anywhere, exit codes."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "weights"))

from receiving_site import SECRET, Hub, Place, card_text, checkpoint_in, described, receiving, running_hub, status

Medsr = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "http_proxy", "https_proxy", "all_proxy", "ALL_PROXY", "HF_ENDPOINT",
                 "HF_TOKEN", "MEDSR_OFFLINE", "HF_HUB_OFFLINE", "MEDSR_PUSH_TOKEN"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MEDSR_HOME", str(tmp_path / "home"))


@pytest.fixture
def place() -> Iterator[Place]:
    with receiving() as place:
        yield place


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return checkpoint_in(tmp_path / "made")


def test_push_prints_addresses_and_then_pull_works(medsr: Medsr, place: Place, ours: Path) -> None:
    folder = f"{place.url}/models"
    done = medsr("weights", "push", ours, "--to", folder)
    assert done.code == 0
    assert done.out.splitlines() == [f"sent\t{folder}/ours-x2.{suffix}" for suffix in ("safetensors", "md", "yaml")]
    sha256 = hashlib.sha256(ours.read_bytes()).hexdigest()
    assert sha256 in done.err
    assert "CC-BY-4.0" in done.err
    assert f"medsr weights pull {folder}/ours-x2.yaml" in done.err

    again = medsr("weights", "push", ours, "--to", folder, "--json", "-q")
    rows = [json.loads(line) for line in again.out.splitlines()]
    assert again.code == 0
    assert again.err == ""
    assert {(row["status"], row["verified"]) for row in rows} == {("already there", True)}
    assert (rows[0]["sha256"], rows[0]["bytes"], rows[0]["id"]) == (sha256, ours.stat().st_size, "ours-x2")

    pulled = medsr("weights", "pull", f"{folder}/ours-x2.yaml", "--no-progress")
    assert pulled.code == 0
    assert Path(pulled.out.strip()).read_bytes() == ours.read_bytes()
    assert "ours-x2" in medsr("weights", "list").out


def test_a_pulled_push_upscales(medsr: Medsr, place: Place, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    from medsr_cli.networks import load_network
    from medsr_cli.networks.checkpoint import save_network
    from medsr_cli.tasks.weights import open_shelf

    # A trained network under an id that this machine has never heard of.
    shelf = open_shelf()
    trained = load_network(shelf.store.verified_path(shelf.manifest.entry("rdst-e-x4-brain-mr")))
    data = save_network(trained, {**described("ours-x4"), "scales": "[4]"}, half=True)
    path = tmp_path / "ours-x4.safetensors"
    path.write_bytes(data)
    path.with_suffix(".md").write_text(card_text(hashlib.sha256(data).hexdigest(), id="ours-x4", scales=[4]))
    assert medsr("weights", "push", path, "--to", f"{place.url}/models", "-q").code == 0
    path.unlink()
    assert medsr("weights", "pull", f"{place.url}/models/ours-x4.yaml").code == 0
    picture = tmp_path / "slice.png"
    Image.fromarray(np.add.outer(np.arange(24) * 5, np.arange(20) * 6).astype(np.uint8)).save(picture)
    done = medsr("upscale", picture, "-s", "4", "--weights", "ours-x4", "--offline", "-o", tmp_path / "out.png")
    assert done.code == 0, done.err
    assert Image.open(tmp_path / "out.png").size == (80, 96)


def test_a_dry_run_prints_the_plan(medsr: Medsr, place: Place, ours: Path) -> None:
    done = medsr("weights", "push", ours, "--to", place.url, "--dry-run", "--json")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["to"] for row in rows] == [f"{place.url}/ours-x2.{suffix}" for suffix in ("safetensors", "md", "yaml")]
    assert {row["status"] for row in rows} == {"would be sent"}
    assert place.requests == []


@pytest.mark.parametrize("where", ["site", "hub"])
@pytest.mark.parametrize("refused", [None, 403, 500])
def test_the_token_is_in_no_output_not_even_in_tracebacks(
    medsr: Medsr, hub: Hub, place: Place, ours: Path, monkeypatch: pytest.MonkeyPatch, where: str, refused: int | None
) -> None:
    monkeypatch.setenv("STORE_TOKEN", SECRET)
    hub.make(a__txt=b"a")
    to = "hf://our-group/our-models" if where == "hub" else f"{place.url}/models"
    if refused == 403:
        hub.plan["POST"] = place.plan["PUT"] = [status(refused, X_Error_Message=f"no {SECRET}")]
    elif refused == 500:
        hub.plan["GET"] = [status(501)]
        place.plan["GET"] = [status(505)]
    log = ours.with_name("log.txt")
    done = medsr("weights", "push", ours, "--to", to, "--token-env", "STORE_TOKEN", "--debug", "--log-file", log)
    assert done.code == (1 if refused else 0), done.err
    told = done.out + done.err + (log.read_text() if log.exists() else "")
    assert SECRET not in told
    assert ("Traceback" in told) == bool(refused)
    seen = (hub if where == "hub" else place).requests
    assert any(SECRET in request.headers.get("Authorization", "") for request in seen)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("FILE", "--to", "ftp://host/"), 2, "neither hf://ORG/REPO nor an http address"),
        (("FILE", "--to", "http://10.1.2.3/"), 2, "--insecure-http"),
        (("FILE", "--to", "https://host/", "--token-env", "NO_SUCH"), 2, "names is not set"),
        (("FILE", "--to", "https://host/", "--offline"), 5, "--offline forbids sending"),
        (("no-such-id", "--to", "https://host/"), 2, "neither a file nor the id"),
        (("no-such.safetensors", "--to", "https://host/"), 5, "There is no checkpoint"),
        (("FILE",), 2, "--to"),
    ],
)
def test_exit_codes(medsr: Medsr, ours: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    done = medsr("weights", "push", *(str(ours) if word == "FILE" else word for word in arguments))
    assert (done.code, done.out) == (code, "")
    assert words in done.err


def test_a_card_without_a_licence_is_an_input_refused_and_one_of_another_file_is_not(medsr: Medsr, ours: Path) -> None:
    card = ours.with_suffix(".md")
    text = card.read_text()
    card.write_text(text.replace("license: CC-BY-4.0", "license: not stated"))
    done = medsr("weights", "push", ours, "--to", "https://host/", "--dry-run")
    assert (done.code, done.out) == (6, "")
    assert "does not say the licence of the weights" in done.err
    card.write_text(text.replace(hashlib.sha256(ours.read_bytes()).hexdigest(), 64 * "0"))
    assert medsr("weights", "push", ours, "--to", "https://host/", "--dry-run").code == 5


def test_a_server_that_is_not_there_is_a_run_error(medsr: Medsr, ours: Path) -> None:
    done = medsr("weights", "push", ours, "--to", "http://127.0.0.1:9/models")
    assert done.code == 1
    assert "refuses connections" in done.err
    assert "Nothing was sent" in done.err


def test_the_help_tells_a_stranger_what_happens(medsr: Medsr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    told = " ".join(medsr("weights", "push", "--help").out.split())
    for words in ("ID.safetensors", "ID.yaml", "hf://ORG/REPO", "https://HOST/FOLDER/", "never from the command line",
                  "--dry-run", "--overwrite", "MEDSR_PUSH_TOKEN", "medsr weights pull ADDRESS/ID.yaml"):  # fmt: skip
        assert words in told
