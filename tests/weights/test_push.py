"""What is sent is what was checked, it goes where it was told to, and nobody learns the token."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from misbehaving_site import entry_for
from PIL import Image
from receiving_site import (
    CONFIG,
    SECRET,
    Hub,
    Place,
    card_text,
    checkpoint_in,
    receiving,
    reset_after,
    running_hub,
    spoilt,
    status,
    taken_without_an_answer,
)
from test_fetch import running_tls

from medsr_cli.errors import ArgumentsError, InputRefused, MedsrError, RunError, WeightsError
from medsr_cli.networks import load_network
from medsr_cli.networks.rdst import Rdst
from medsr_cli.tasks.pull import PullRequest, pull
from medsr_cli.tasks.push import PushRequest, push
from medsr_cli.tasks.weights import Shelf, open_shelf
from medsr_cli.weights.manifest import Manifest, load_manifest, parse_manifest
from medsr_cli.weights.model_card import card_of_entry, hub_front_page
from medsr_cli.weights.patience import Policy
from medsr_cli.weights.push import HubTarget, SiteTarget, authorization, parcel_of_file, parse_target
from medsr_cli.weights.send import OtherBytesError, SendError
from medsr_cli.weights.store import Store

PATIENCE = Policy(timeout_s=2.0, attempts=3, backoff_s=0.0, max_wait_s=0.0)


@pytest.fixture
def place() -> Iterator[Place]:
    with receiving() as place:
        yield place


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        # The library waits between attempts, and takes no other number for it.
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return checkpoint_in(tmp_path / "made")


def sent_to(place: Place, what: Path | str, **options: Any) -> Any:
    shelf = options.pop("shelf", None)
    request = PushRequest(str(what), f"{place.url}/models/", **options)
    return push(request, shelf=shelf, policy=PATIENCE)


def statuses(done: Any) -> list[str]:
    return [sent.status for sent in done.sent]


# -- to a web server ---------------------------------------------------------------------------------------


def test_what_is_pushed_is_pulled_by_another_store_and_upscales(place: Place, ours: Path, tmp_path: Path) -> None:
    done = sent_to(place, ours)
    assert statuses(done) == ["sent"] * 3
    assert all(sent.verified for sent in done.sent)
    assert set(place.files) == {f"/models/ours-x2.{suffix}" for suffix in ("safetensors", "md", "yaml")}
    assert place.files["/models/ours-x2.safetensors"] == ours.read_bytes()
    assert place.files["/models/ours-x2.md"] == ours.with_suffix(".md").read_bytes()

    other = Store(tmp_path / "elsewhere", tmp_path / "none")
    result = pull(PullRequest([done.pull]), shelf=Shelf(Manifest("mr", ()), other), policy=PATIENCE)
    assert result.failed == []
    assert result.pulled[0].path.read_bytes() == ours.read_bytes()
    image = torch.from_numpy(np.linspace(0, 1, 144, dtype=np.float32).reshape(1, 1, 12, 12))
    torch.manual_seed(3)
    assert torch.equal(load_network(result.pulled[0].path)(image), Rdst(CONFIG).eval()(image))
    # From now on that machine knows it by its id.
    entry = open_shelf(store=other).manifest.entry("ours-x2")
    assert (entry.method, entry.scales, entry.body_part) == ("rdst", (2,), "knee")
    assert (entry.sha256, entry.bytes) == (hashlib.sha256(ours.read_bytes()).hexdigest(), ours.stat().st_size)
    assert entry.licence.weights == "CC-BY-4.0"
    assert (entry.validation[0].psnr, entry.validation[0].contrast) == (33.5, "not told")
    assert other.verified_path(entry) == result.pulled[0].path


def test_the_entry_may_be_carried_as_a_file(place: Place, ours: Path, tmp_path: Path) -> None:
    sent_to(place, ours)
    carried = tmp_path / "mail.yaml"
    carried.write_bytes(place.files["/models/ours-x2.yaml"])
    shelf = Shelf(Manifest("mr", ()), Store(tmp_path / "elsewhere", tmp_path / "none"))
    assert pull(PullRequest([str(carried)]), shelf=shelf, policy=PATIENCE).pulled[0].fetched
    data = yaml.safe_load(carried.read_text())
    data["checkpoints"][0]["sha256"] = "0" * 64
    carried.write_text(yaml.safe_dump(data))
    known = open_shelf(store=shelf.store)
    assert pull(PullRequest(["ours-x2"]), shelf=known, policy=PATIENCE).pulled[0].fetched is False
    with pytest.raises(ArgumentsError, match="the id of another one here"):
        pull(PullRequest([str(carried)]), shelf=known, policy=PATIENCE)


def test_a_second_push_finds_everything_there(place: Place, ours: Path) -> None:
    sent_to(place, ours)
    before = len(place.of("PUT"))
    assert statuses(sent_to(place, ours)) == ["already there"] * 3
    assert len(place.of("PUT")) == before == 3


def test_other_bytes_are_replaced_only_when_asked(place: Place, ours: Path) -> None:
    place.files["/models/ours-x2.md"] = b"somebody else's"
    with pytest.raises(SendError, match=r"ours-x2\.md exists and has other bytes") as caught:
        sent_to(place, ours)
    assert (caught.value.kind, caught.value.exit_code) == ("exists", 1)
    assert place.of("PUT") == []
    assert statuses(sent_to(place, ours, overwrite=True)) == ["sent", "replaced", "sent"]
    conditions = [(seen.headers.get("If-None-Match"), "If-Match" in seen.headers) for seen in place.of("PUT")]
    assert conditions == [("*", False), (None, True), ("*", False)]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_name_that_changes_in_between_is_left(place: Place, ours: Path, overwrite: bool) -> None:
    name = "/models/ours-x2.safetensors"
    if overwrite:
        place.files[name] = b"what was seen"

    def meanwhile(handler: Any) -> None:
        place.files[name] = b"a third one's"
        handler.take()

    place.plan["PUT"] = [meanwhile]
    with pytest.raises(SendError, match="changed by someone else"):
        sent_to(place, ours, overwrite=overwrite)
    assert place.files == {name: b"a third one's"}


def test_a_dry_run_opens_no_socket(place: Place, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("a connection"))
    said: list[str] = []
    request = PushRequest(str(ours), f"{place.url}/models", dry_run=True)
    done = push(request, say=said.append)
    assert [line.to for line in done.plan] == [f"{place.url}/models/ours-x2.{s}" for s in ("safetensors", "md", "yaml")]
    assert done.plan[0].sha256 == hashlib.sha256(ours.read_bytes()).hexdigest()
    assert done.sent == place.requests == []
    assert all(any(line.to in sentence for sentence in said) for line in done.plan)
    monkeypatch.setenv("MEDSR_OFFLINE", "1")
    push(request)
    with pytest.raises(WeightsError, match="MEDSR_OFFLINE=1 forbids sending"):
        push(dataclasses.replace(request, dry_run=False))
    monkeypatch.delenv("MEDSR_OFFLINE")
    with pytest.raises(WeightsError, match="--offline forbids sending"):
        push(dataclasses.replace(request, dry_run=False, offline=True))


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (401, "forbidden", "asks for a login"),
        (403, "forbidden", "does not let this login write"),
        (404, "not-found", "no such folder"),
        (405, "not-taken", "takes no uploads"),
        (409, "conflict", "cannot put it there"),
        (413, "too-large", "no file of this size"),
        (507, "full", "no room left"),
        (418, "status", "HTTP 418"),
    ],
)
def test_refusals_are_told_apart_and_not_repeated(
    place: Place, ours: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: str, words: str
) -> None:
    monkeypatch.setenv("MEDSR_PUSH_TOKEN", SECRET)
    place.plan["PUT"] = [status(code)]
    with pytest.raises(SendError, match=words) as caught:
        sent_to(place, ours)
    assert caught.value.kind == kind
    assert "ours-x2.safetensors" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert len(place.of("PUT")) == 1
    assert place.files == {}


def test_a_server_that_may_not_be_read_is_written_only_when_asked(place: Place, ours: Path) -> None:
    place.plan["GET"] = [status(403)] * 3
    with pytest.raises(SendError, match="cannot be told whether it exists"):
        sent_to(place, ours)
    assert place.of("PUT") == []
    place.plan["GET"] = [status(403)] * 6
    done = sent_to(place, ours, overwrite=True)
    assert [sent.verified for sent in done.sent] == [False] * 3
    place.plan["GET"] = [status(401)]
    with pytest.raises(SendError, match="asks for a login") as caught:
        sent_to(place, ours)
    assert "--token-env" in caught.value.remedy


@pytest.mark.parametrize("n_bytes", [0, 1, 10_000])
@pytest.mark.parametrize("keeps_halves", [False, True])
def test_an_upload_broken_once_arrives(place: Place, ours: Path, n_bytes: int, keeps_halves: bool) -> None:
    place.keeps_halves = keeps_halves
    place.plan["PUT"] = [reset_after(n_bytes)]
    if keeps_halves:
        # Its own half stands in the way of the condition: said, not overwritten.
        with pytest.raises(SendError, match="what the server kept of it"):
            sent_to(place, ours)
        assert "/models/ours-x2.yaml" not in place.files
        return
    assert statuses(sent_to(place, ours)) == ["sent"] * 3
    assert place.files["/models/ours-x2.safetensors"] == ours.read_bytes()


@pytest.mark.parametrize("keeps_halves", [False, True])
def test_an_upload_broken_every_time_is_never_announced(place: Place, ours: Path, keeps_halves: bool) -> None:
    place.plan["PUT"] = [reset_after(4096)] * PATIENCE.attempts
    place.keeps_halves = keeps_halves
    with pytest.raises(SendError, match="the connection broke") as caught:
        sent_to(place, ours)
    assert caught.value.kind == "reset"
    assert ("incomplete ours-x2.safetensors" in caught.value.remedy) == keeps_halves
    assert set(place.files) == ({"/models/ours-x2.safetensors"} if keeps_halves else set())
    sent_to(place, ours, overwrite=True)
    assert place.files["/models/ours-x2.safetensors"] == ours.read_bytes()


def test_an_answer_that_was_lost_is_not_a_conflict(place: Place, ours: Path) -> None:
    place.plan["PUT"] = [taken_without_an_answer]
    assert statuses(sent_to(place, ours)) == ["sent"] * 3
    assert len(place.of("PUT")) == 4


def test_a_busy_server_is_waited_for(place: Place, ours: Path) -> None:
    place.plan = {"PUT": [status(503, Retry_After="7"), status(429)], "GET": [status(502)]}
    waits: list[float] = []
    policy = dataclasses.replace(PATIENCE, max_wait_s=9.0, sleep=waits.append)
    push(PushRequest(str(ours), f"{place.url}/models/"), policy=policy)
    assert waits == [0.0, 7.0, 0.0]


def test_a_hang_ends(place: Place, ours: Path) -> None:
    import time

    place.plan["PUT"] = [lambda handler: time.sleep(0.6)]
    policy = dataclasses.replace(PATIENCE, timeout_s=0.2, attempts=1)
    with pytest.raises(SendError, match="did not answer in time"):
        push(PushRequest(str(ours), f"{place.url}/models/"), policy=policy)


def test_bytes_that_arrive_wrong_are_noticed(place: Place, ours: Path) -> None:
    place.plan["PUT"] = [spoilt]
    with pytest.raises(OtherBytesError, match="other bytes than were sent") as caught:
        sent_to(place, ours)
    assert caught.value.exit_code == 5
    assert "/models/ours-x2.yaml" not in place.files
    place.files.clear()
    place.plan["PUT"] = [status(200)]
    with pytest.raises(OtherBytesError, match="nothing, though the server took it"):
        sent_to(place, ours)


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_an_upload_follows_no_redirect(place: Place, ours: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setenv("MEDSR_PUSH_TOKEN", SECRET)
    with receiving() as elsewhere:
        place.plan["PUT"] = [status(code, Location=elsewhere.url.replace("127.0.0.1", "localhost") + "/models/x")]
        with pytest.raises(SendError, match="sends the upload on to localhost"):
            sent_to(place, ours)
        assert elsewhere.requests == []


def test_progress_goes_from_nothing_to_all(place: Place, ours: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    push(PushRequest(str(ours), f"{place.url}/models/"), progress=lambda *step: seen.append(step), policy=PATIENCE)
    size = ours.stat().st_size
    of_weights = [done for done, total in seen if total == size]
    assert of_weights == sorted(of_weights)
    assert of_weights[-1] == size
    assert len(set(of_weights)) > 1


def test_a_file_that_shrinks_while_it_is_sent_is_not_sent(
    place: Place, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shrink(sentence: str) -> None:
        ours.write_bytes(ours.read_bytes()[:-100])

    with pytest.raises(SendError, match="became shorter"):
        push(PushRequest(str(ours), f"{place.url}/models/"), say=shrink, policy=PATIENCE)
    assert place.files == {}


def test_a_certificate_is_verified(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", str(key), "-out", str(certificate), "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    with running_tls(ours.read_bytes(), certificate, key) as url:
        request = PushRequest(str(ours), f"{url}/models/")
        with pytest.raises(SendError, match="certificate was not accepted") as caught:
            push(request, policy=PATIENCE)
        assert caught.value.kind == "tls"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        # Trusted now, and answering every question with the checkpoint: the card has other bytes there.
        with pytest.raises(SendError, match=r"ours-x2\.md exists and has other bytes"):
            push(request, policy=PATIENCE)


@pytest.mark.parametrize(
    ("secret", "header"),
    [(SECRET, f"Bearer {SECRET}"), ("doctor:pass", "Basic ZG9jdG9yOnBhc3M="), ("", "")],
)
def test_a_secret_is_a_token_or_a_login(
    place: Place, ours: Path, monkeypatch: pytest.MonkeyPatch, secret: str, header: str
) -> None:
    assert authorization(secret) == header
    monkeypatch.setenv("STORE_SECRET", secret or "unused")
    sent_to(place, ours, token_env="STORE_SECRET" if secret else None)
    assert {seen.headers.get("Authorization", "") for seen in place.requests} == {header}


# -- addresses and secrets ---------------------------------------------------------------------------------


def test_addresses() -> None:
    assert parse_target("hf://a/b") == HubTarget("a/b")
    assert parse_target("hf://a/b@dev/x") == HubTarget("a/b", "dev/x")
    assert parse_target("https://host/x") == SiteTarget("https://host/x/")
    assert parse_target("http://localhost:8/x//") == SiteTarget("http://localhost:8/x/")
    assert parse_target("http://10.0.0.5/x", insecure_http=True).can_be_pulled is False


@pytest.mark.parametrize(
    "text",
    [
        "hf://a", "hf://a/b/c", "hf://a/b@", "hf://a/../b", "hf://a/b@../x", "ftp://host/x", "host/x", "",
        f"https://me:{SECRET}@host/x", f"https://host/x?sig={SECRET}", f"https://host/#{SECRET}", "https:///x",
        "https://host/a b", "https://host:port/", "http://10.0.0.5/x", "http://localhost.evil.org/",
    ],
)  # fmt: skip
def test_addresses_that_are_refused_are_not_repeated(text: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        parse_target(text)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "two words", "line\nbreak", "ümlaut"])
def test_a_token_that_is_none_is_refused_without_being_shown(
    ours: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is not None:
        monkeypatch.setenv(SECRET, value)
    with pytest.raises(ArgumentsError, match=r"variable|characters") as caught:
        push(PushRequest(str(ours), "https://host/", token_env=SECRET))
    assert SECRET not in str(caught.value)
    assert not value or value not in str(caught.value)


def test_private_is_for_a_hub(ours: Path) -> None:
    with pytest.raises(ArgumentsError, match="--private"):
        push(PushRequest(str(ours), "https://host/", private=True))


def test_an_address_that_cannot_be_pulled_from_is_told_as_one_for_people(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = push(PushRequest(str(ours), "http://10.0.0.5/models/", insecure_http=True, dry_run=True))
    assert done.pull == ""
    parcel = parcel_of_file(ours)
    entry = parse_manifest(bytes(parcel.described(by_hand="http://10.0.0.5/x").content).decode()).entries[0]
    assert (entry.sources, entry.by_hand) == ((), "http://10.0.0.5/x")


# -- what may be sent --------------------------------------------------------------------------------------


def refusal(path: Path, card: Path | None = None, code: int = 5) -> str:
    with pytest.raises(MedsrError) as caught:
        push(PushRequest(str(path), "https://host.example/", card=card, dry_run=True))
    assert caught.value.exit_code == code
    return str(caught.value)


def test_pickles_are_refused_whatever_they_are_called(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pt")
    assert "a pickle can run code" in refusal(tmp_path / "a.pt")
    shutil.copy(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert "not a whole safetensors file" in refusal(tmp_path / "a.safetensors")
    assert "There is no checkpoint" in refusal(tmp_path / "none.safetensors")


def test_a_checkpoint_that_does_not_load_is_refused(ours: Path) -> None:
    data = bytearray(ours.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    ours.write_bytes(data)
    ours.with_suffix(".md").write_text(card_text(hashlib.sha256(data).hexdigest()))
    assert "NaN" in refusal(ours)
    ours.write_bytes(data[:-1])
    assert "not a whole safetensors file" in refusal(ours)


def test_the_card_must_be_there_and_of_this_file(ours: Path, tmp_path: Path) -> None:
    card, moved = ours.with_suffix(".md"), tmp_path / "elsewhere.md"
    card.rename(moved)
    assert "has no model card" in refusal(ours)
    assert push(PushRequest(str(ours), "https://host.example/", card=moved, dry_run=True)).id == "ours-x2"
    moved.write_text(card_text("0" * 64))
    assert "card of another file" in refusal(ours, moved)
    for text in ("# A title", "---\n[1, 2\n---\n", "---\nlicense: mit\n---\n", "---\n- a\n---\n"):
        moved.write_text(text)
        assert "YAML block" in refusal(ours, moved)
    moved.write_bytes(b"\xff\xfe")
    assert "cannot be read as text" in refusal(ours, moved)
    moved.write_bytes(b"a" * 1_000_001)
    assert "1000000 bytes" in refusal(ours, moved)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("license: CC-BY-4.0", "license: not stated", "licence of the weights"),
        ("license: CC-BY-4.0", "license: Unknown", "licence of the weights"),
        ("trained_on: 3 subjects", "trained_on: ''", "what it was trained on"),
        ("## Recipe", "## Cooking", "recipe"),
    ],
)
def test_a_card_with_a_gap_is_refused(ours: Path, old: str, new: str, words: str) -> None:
    card = ours.with_suffix(".md")
    text = card_text(hashlib.sha256(ours.read_bytes()).hexdigest(), command=None if "recipe" in words else "medsr ...")
    assert old in text
    card.write_text(text.replace(old, new))
    assert words in refusal(ours, code=6)
    assert card.name in refusal(ours, code=6)


def test_a_card_that_the_manifest_cannot_take_names_the_field(ours: Path) -> None:
    text = card_text(hashlib.sha256(ours.read_bytes()).hexdigest(), modality="x-ray")
    ours.with_suffix(".md").write_text(text)
    said = refusal(ours)
    assert "modality is 'x-ray'" in said
    assert "Correct the card." in said


def test_figures_of_another_kind_stay_in_the_card(ours: Path) -> None:
    rows = [{"name": "subject 1", "contrast": "T1w", "dice": 0.9, "threshold_dice": 0.5}]
    ours.with_suffix(".md").write_text(card_text(hashlib.sha256(ours.read_bytes()).hexdigest(), validation=rows))
    assert parcel_of_file(ours).entry.validation == ()


def test_what_finetune_writes_is_taken(tmp_path: Path) -> None:
    training = pytest.importorskip("tests.training.test_release", exc_type=ImportError)
    from medsr_cli.networks.checkpoint import save_network
    from medsr_cli.training.card import metadata, write_card
    from tests.training.anatomy import tiny_network

    facts = training.facts()
    data = save_network(tiny_network(scale=4), metadata(facts))
    path = tmp_path / f"{facts.id}.safetensors"
    path.write_bytes(data)
    path.with_suffix(".md").write_text(write_card(facts, len(data), hashlib.sha256(data).hexdigest()))
    parcel = parcel_of_file(path)
    assert (parcel.entry.id, parcel.entry.scales) == (facts.id, (4.0,))
    assert parcel.entry.licence.weights == facts.licence
    assert len(parcel.entry.validation) == 2


# -- the picture of the card -------------------------------------------------------------------------------


def with_picture(ours: Path, data: bytes | None = None, name: str = "ours-x2.png", link: str = "ours-x2.png") -> bytes:
    """Show a picture in the card of a checkpoint and put one beside it; returns its bytes."""
    card = ours.with_suffix(".md")
    card.write_text(card.read_text() + f"\n![gain and loss over the steps]({link})\n")
    data = png() if data is None else data
    (ours.parent / name).write_bytes(data)
    return data


def png(side: int = 3) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(side * side, dtype=np.uint8).reshape(side, side)).save(file, "PNG")
    return file.getvalue()


def test_the_picture_of_the_card_goes_along(place: Place, ours: Path, tmp_path: Path) -> None:
    data = with_picture(ours)
    done = sent_to(place, ours)
    assert statuses(done) == ["sent"] * 4
    assert [sent.name for sent in done.sent] == [f"ours-x2.{suffix}" for suffix in ("safetensors", "md", "png", "yaml")]
    assert [line.name for line in done.plan] == [sent.name for sent in done.sent]
    assert all(sent.verified for sent in done.sent)
    assert place.files["/models/ours-x2.png"] == data
    assert statuses(sent_to(place, ours)) == ["already there"] * 4
    place.files["/models/ours-x2.png"] = png(5)
    with pytest.raises(SendError, match=r"ours-x2\.png exists and has other bytes"):
        sent_to(place, ours)
    shelf = Shelf(Manifest("mr", ()), Store(tmp_path / "elsewhere", tmp_path / "none"))
    assert pull(PullRequest([done.pull]), shelf=shelf, policy=PATIENCE).failed == []


def test_the_picture_of_the_card_goes_to_a_hub_in_the_same_commit(hub: Hub, ours: Path) -> None:
    data = with_picture(ours)
    assert statuses(to_hub(ours)) == ["sent"] * 4
    assert hub.summaries == ["Add ours-x2", "Describe ours-x2"]
    assert hub.commits[1].files["ours-x2.png"] == hub.commits[-1].files["ours-x2.png"] == data
    # The front page shows it too.
    assert "](ours-x2.png)" in hub.commits[-1].files["README.md"].decode()
    assert statuses(to_hub(ours)) == ["already there"] * 4


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("ours-x2.png", "other.png"),  # beside it, but not shown
        ("other.png", "other.png"),  # shown, but by a name that is not the checkpoint's
        ("other.png", "ours-x2.png"),  # not there
        ("ours-x2.png", "../ours-x2.png"),
        ("ours-x2.png", "https://host.example/ours-x2.png"),
    ],
)
def test_no_other_picture_goes_along(ours: Path, name: str, link: str) -> None:
    with_picture(ours, name=name, link=link)
    assert parcel_of_file(ours).picture is None


def test_a_picture_is_looked_for_beside_the_card_that_was_given(ours: Path, tmp_path: Path) -> None:
    data = with_picture(ours)
    moved = tmp_path / "elsewhere.md"
    ours.with_suffix(".md").rename(moved)
    assert parcel_of_file(ours, moved).picture is None
    (tmp_path / "ours-x2.png").write_bytes(data)
    picture = parcel_of_file(ours, moved).picture
    assert picture is not None
    assert (picture.name, picture.content, picture.content_type) == ("ours-x2.png", data, "image/png")


def test_what_is_no_picture_is_refused(ours: Path) -> None:
    whole = with_picture(ours)
    picture = ours.with_suffix(".png")
    flipped = bytearray(whole)
    flipped[-20] ^= 1
    empty = whole[:33] + whole[-12:]  # IHDR and IEND alone
    for data in (b"", b"\xff\xd8\xff\xe0 a JPEG", whole[:-1], whole + b"and more", bytes(flipped), empty, whole[:8]):
        picture.write_bytes(data)
        assert "not a whole PNG" in refusal(ours)
    picture.write_bytes(whole + bytes(5_000_000 - len(whole)))
    assert "5000000 bytes or more" in refusal(ours)
    picture.write_bytes(whole)
    assert parcel_of_file(ours).picture is not None


def test_the_curve_that_finetune_draws_is_taken(ours: Path) -> None:
    curve = pytest.importorskip("medsr_cli.training.curve")
    history = [{"step": step, "gain_db": 0.1 * step} for step in range(3)]
    data = with_picture(
        ours, curve.curve_png(history, [(0, 1.0), (1, 0.5)], unit="dB", baseline="bicubic", best_step=2)
    )
    picture = parcel_of_file(ours).picture
    assert picture is not None
    assert picture.content == data


# -- by id -------------------------------------------------------------------------------------------------


def test_a_bundled_checkpoint_is_pushed_by_its_id_with_a_card_made_of_its_entry(place: Place, tmp_path: Path) -> None:
    shelf = open_shelf()
    entry = next(entry for entry in shelf.manifest.entries if shelf.store.present(entry))
    sent_to(place, entry.id, shelf=shelf)
    card = place.files[f"/models/{entry.id}.md"].decode()
    assert entry.sha256 is not None
    for words in (entry.sha256, entry.licence.weights, entry.trained_on, entry.command or ""):
        assert words in yaml.safe_load(card.split("---\n")[1])["medsr"].values()
    assert f"| {entry.validation[0].name} | {entry.validation[0].contrast} |" in card
    # The same card and checkpoint, as files, may be pushed on.
    path = tmp_path / "copy.safetensors"
    path.write_bytes(place.files[f"/models/{entry.id}.safetensors"])
    path.with_suffix(".md").write_text(card)
    again = parcel_of_file(path).entry
    kept = ("id", "method", "variant", "scales", "scale_range", "modality", "body_part", "sha256", "licence", "date")
    assert {name: getattr(again, name) for name in kept} == {name: getattr(entry, name) for name in kept}
    assert again.validation == entry.validation


def test_every_entry_makes_a_card_that_reads_back(store: Store) -> None:
    for entry in load_manifest().entries:
        front = yaml.safe_load(card_of_entry(entry).split("---\n")[1])
        assert front["medsr"]["id"] == entry.id
        page = yaml.safe_load(hub_front_page(card_of_entry(entry).encode()).decode().split("---\n")[1])
        assert page["license"] == page["license"].lower()
        assert page["license"] != "other" or page["license_name"]


def test_an_unknown_id_and_one_that_is_not_here(store: Store) -> None:
    shelf = Shelf(Manifest("mr", (entry_for(b"x", "https://example.org/x"),)), store)
    with pytest.raises(ArgumentsError, match="neither a file nor the id"):
        push(PushRequest("nothing", "https://host/", dry_run=True), shelf=shelf)
    with pytest.raises(WeightsError, match="not on this machine"):
        push(PushRequest("toy", "https://host/", dry_run=True), shelf=shelf)


def test_weights_without_a_licence_are_not_handed_on(store: Store, ours: Path) -> None:
    licence = {"code": "MIT", "weights": "not stated by the authors", "data": "CC0"}
    entry = entry_for(ours.read_bytes(), "https://example.org/x", scales=[2], licence=licence)
    store.write(store.path(entry), ours.read_bytes())
    with pytest.raises(InputRefused, match="may not be handed on"):
        push(PushRequest("toy", "https://host/", dry_run=True), shelf=Shelf(Manifest("mr", (entry,)), store))


# -- to a hub ----------------------------------------------------------------------------------------------


def to_hub(ours: Path | str, target: str = "hf://our-group/our-models", **options: Any) -> Any:
    said = options.pop("say", lambda sentence: None)
    return push(PushRequest(str(ours), target, **options), say=said, policy=PATIENCE)


@pytest.mark.parametrize("private", [False, True])
def test_a_hub_gets_a_new_repository_and_another_machine_pulls(
    hub: Hub, ours: Path, tmp_path: Path, private: bool
) -> None:
    said: list[str] = []
    done = to_hub(ours, private=private, say=said.append)
    assert statuses(done) == ["sent"] * 3
    assert all(sent.verified for sent in done.sent)
    assert hub.private is private
    assert any("making it" in sentence and ("private" in sentence) for sentence in said)
    assert hub.summaries == ["Add ours-x2", "Describe ours-x2"]
    files = hub.commits[-1].files
    assert files["ours-x2.safetensors"] == ours.read_bytes()
    assert files["ours-x2.md"] == ours.with_suffix(".md").read_bytes()
    assert yaml.safe_load(files["README.md"].decode().split("---\n")[1])["license"] == "cc-by-4.0"
    assert set(files) == {".gitattributes", "README.md", "ours-x2.safetensors", "ours-x2.md", "ours-x2.yaml"}
    entry = parse_manifest(files["ours-x2.yaml"].decode()).entries[0]
    pinned = hub.at(entry.sources[0].revision)
    assert pinned is not None
    assert pinned.files["ours-x2.safetensors"] == ours.read_bytes()

    shelf = Shelf(Manifest("mr", ()), Store(tmp_path / "elsewhere", tmp_path / "none"))
    result = pull(PullRequest([done.pull]), shelf=shelf, policy=PATIENCE)
    assert [row.path.read_bytes() for row in result.pulled] == [ours.read_bytes()]
    assert load_network(result.pulled[0].path).config == CONFIG


def test_a_hub_that_has_it_is_left_alone(hub: Hub, ours: Path) -> None:
    to_hub(ours)
    commits = len(hub.commits)
    assert statuses(to_hub(ours)) == ["already there"] * 3
    assert len(hub.commits) == commits


def test_a_hub_with_other_content_is_changed_only_when_asked(hub: Hub, ours: Path, tmp_path: Path) -> None:
    hub.make(README__md=b"mine")
    to_hub(ours)
    assert hub.commits[-1].files["README.md"] == b"mine"
    other = checkpoint_in(tmp_path / "second", seed=4)
    commits = len(hub.commits)
    with pytest.raises(SendError, match=r"ours-x2\.safetensors, ours-x2\.md, ours-x2\.yaml with other content"):
        to_hub(other)
    assert len(hub.commits) == commits
    assert statuses(to_hub(other, overwrite=True)) == ["replaced"] * 3
    assert hub.commits[-1].files["ours-x2.safetensors"] == other.read_bytes()


def test_an_existing_public_repository_is_not_taken_for_a_private_one(hub: Hub, ours: Path) -> None:
    hub.make(a__txt=b"a")
    with pytest.raises(SendError, match="exists and is public"):
        to_hub(ours, private=True)
    assert len(hub.commits) == 1


def test_a_branch_that_is_not_there(hub: Hub, ours: Path) -> None:
    hub.make(a__txt=b"a")
    with pytest.raises(SendError, match="no branch dev"):
        to_hub(ours, "hf://our-group/our-models@dev")
    assert statuses(to_hub(ours, "hf://our-group/our-models@main")) == ["sent"] * 3


def test_a_commit_in_between_is_not_run_over(hub: Hub, ours: Path) -> None:
    hub.make(a__txt=b"a")

    def meanwhile(handler: Any) -> None:
        hub.add({"b.txt": b"b"})
        handler.post()

    hub.plan["POST"] = [meanwhile]
    with pytest.raises(SendError, match="changed by someone else"):
        to_hub(ours)
    assert set(hub.commits[-1].files) == {"a.txt", "b.txt"}


def test_a_front_page_that_the_hub_refuses_is_left_out(hub: Hub, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.validates = False
    said: list[str] = []
    assert statuses(to_hub(ours, say=said.append)) == ["sent"] * 3
    assert "README.md" not in hub.commits[-1].files
    assert any("README.md" in sentence for sentence in said)


@pytest.mark.parametrize(
    ("method", "at", "code", "kind"),
    [
        ("POST", 0, 403, "forbidden"),
        ("POST", 1, 413, "too-large"),
        ("POST", 1, 507, "full"),
        ("POST", 2, 409, "conflict"),
        ("PUT", 0, 403, "forbidden"),
        ("GET", 0, 500, "status"),
    ],
)
def test_refusals_of_a_hub_are_told_apart_without_its_words(
    hub: Hub, ours: Path, capfd: pytest.CaptureFixture[str], method: str, at: int, code: int, kind: str
) -> None:
    hub.make(a__txt=b"a")
    hub.plan[method] = [_serve] * at + [status(code, X_Error_Message=f"see {SECRET}")] * 9
    with pytest.raises(SendError) as caught:
        to_hub(ours)
    assert caught.value.kind == kind
    assert caught.value.__suppress_context__
    assert SECRET not in str(caught.value)
    assert SECRET not in "".join(capfd.readouterr())
    assert len(hub.commits) == 1


def _serve(handler: Any) -> None:
    {"GET": handler.give, "PUT": handler.take, "POST": handler.post}[handler.command]()


def test_a_large_file_that_breaks_off_shows_nowhere(hub: Hub, ours: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hub.make(a__txt=b"a")
    hub.plan["PUT"] = [reset_after(1000)] * 9
    with pytest.raises(SendError) as caught:
        to_hub(ours)
    assert caught.value.kind == "reset"
    assert len(hub.commits) == 1
    assert "signature" not in "".join(capfd.readouterr()) + str(caught.value)
    hub.plan["PUT"] = [reset_after(1000)]
    assert statuses(to_hub(ours)) == ["sent"] * 3


def test_a_hub_does_not_send_an_upload_on_to_another_host(hub: Hub, ours: Path) -> None:
    hub.make(a__txt=b"a")
    with receiving() as elsewhere:
        away = elsewhere.url.replace("127.0.0.1", "localhost")
        hub.plan["POST"] = [status(307, Location=f"{away}/x")]
        with pytest.raises(SendError, match="sends the upload on to localhost"):
            to_hub(ours)
        assert elsewhere.requests == []


def test_a_hub_without_a_login(hub: Hub, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(SendError, match="does not know this login") as caught:
        to_hub(ours)
    assert "HF_TOKEN" in caught.value.remedy
    monkeypatch.delenv("HF_ENDPOINT")
    with monkeypatch.context() as isolated:
        isolated.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("a connection"))
        with pytest.raises(SendError, match="no login for the model hub"):
            to_hub(ours)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: SECRET)
    assert statuses(to_hub(ours)) == ["sent"] * 3


def test_a_mirror_without_encryption_is_refused(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.hospital.example")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(RunError, match="neither https nor this machine"):
        to_hub(ours)


def test_a_hub_that_is_not_there(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with pytest.raises(SendError, match="refuses connections"):
        to_hub(ours)


def test_what_the_entry_says_is_json_too(ours: Path) -> None:
    json.dumps(parcel_of_file(ours).entry.to_json())
