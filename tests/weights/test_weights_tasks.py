"""What `medsr weights` does, from the tasks and from the command line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from misbehaving_site import PATIENCE, Site, entry_data, entry_for, leftovers, running, safetensors_bytes, status

from medsr_cli.errors import ArgumentsError, MedsrError, WeightsError
from medsr_cli.networks import checkpoint, load_network
from medsr_cli.networks.m2trans import M2Trans, M2TransConfig
from medsr_cli.networks.rdst import Rdst, RdstConfig
from medsr_cli.weights import bundle
from medsr_cli.weights.headers import read_header
from medsr_cli.weights.manifest import Entry, Manifest
from medsr_cli.weights.store import Store

tasks = pytest.importorskip("medsr_cli.tasks.weights")
pulling = pytest.importorskip("medsr_cli.tasks.pull")
CONFIG = RdstConfig(n_rdstb=1, embed_dim=12, growth_rate=6, num_heads=6, dstb_per_rdstb=1, stl_per_dstb=2, scale=4)
DATA = safetensors_bytes(500)


def shelf_of(store: Store, *entries: Entry) -> Any:
    return tasks.Shelf(Manifest("mr", entries), store)


def author_file(config: RdstConfig = CONFIG) -> bytes:
    torch.manual_seed(2)
    buffer = io.BytesIO()
    torch.save({"model_g": Rdst(config).state_dict(), "epoch": 3}, buffer)
    return buffer.getvalue()


def author_entry(data: bytes, *urls: str, **changes: Any) -> Entry:
    return entry_for(data, *urls, **{"format": "author-pt", "variant": None, **changes})


# -- pull --------------------------------------------------------------------------------------------------


def test_pull_fetches_once_and_repairs(site: Site, store: Store) -> None:
    entry = entry_for(site.data, f"{site.url}/toy")
    shelf = shelf_of(store, entry)
    request = pulling.PullRequest(["toy", "toy"])
    first = pulling.pull(request, shelf=shelf, policy=PATIENCE)
    assert [(done.fetched, done.seen) for done in first.pulled] == [(True, None)]
    assert [done.fetched for done in pulling.pull(request, shelf=shelf).pulled] == [False]
    path = first.pulled[0].path
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert [row.status for row in tasks.verify(shelf=shelf)] == ["corrupt"]
    assert [done.fetched for done in pulling.pull(request, shelf=shelf, policy=PATIENCE).pulled] == [True]
    assert [row.status for row in tasks.verify(shelf=shelf)] == ["ok"]
    assert len(site.requests) == 2


@pytest.mark.parametrize("pin", ["sha256", "git_blob", ""])
def test_pull_converts_an_authors_file(store: Store, pin: str) -> None:
    with running(author_file()) as site:
        entry = author_entry(site.data, f"{site.url}/a.pt", pin=pin)
        shelf = shelf_of(store, entry)
        refused = pulling.pull(pulling.PullRequest(["toy"]), shelf=shelf, policy=PATIENCE)
        if not pin:
            assert "--allow-unpinned" in str(refused.failed[0][1])
            assert site.requests == []
        result = pulling.pull(pulling.PullRequest(["toy"], allow_unpinned=True), shelf=shelf, policy=PATIENCE)
        again = pulling.pull(pulling.PullRequest(["toy"], allow_unpinned=True), shelf=shelf, policy=PATIENCE)
    done = result.pulled[0]
    assert again.pulled[0].fetched is False
    if not pin:
        assert done.seen.sha256 == hashlib.sha256(site.data).hexdigest()
        assert done.seen.bytes == len(site.data)
    assert load_network(store.verified_path(entry, allow_unpinned=not pin)).config == CONFIG
    assert list((store.home / "sources").iterdir()) == []
    record = store.record(entry)
    assert record is not None
    assert record.source_sha256 == hashlib.sha256(site.data).hexdigest()


def test_pull_does_not_keep_a_login_page(store: Store) -> None:
    with running(b"<html>please log in</html>") as site:
        entry = author_entry(b"", f"{site.url}/a.pt", pin="")
        shelf = shelf_of(store, entry)
        result = pulling.pull(pulling.PullRequest(["toy"], allow_unpinned=True), shelf=shelf, policy=PATIENCE)
        assert "not a readable PyTorch checkpoint" in str(result.failed[0][1])
        assert not store.source_path(entry).exists()
        site.data = author_file()
        result = pulling.pull(pulling.PullRequest(["toy"], allow_unpinned=True), shelf=shelf, policy=PATIENCE)
    assert result.failed == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"channels": 4}, "channels 1"), ({"scales": [2]}, "scale 4"), ({"variant": "rdst"}, "variant")],
)
def test_pull_refuses_another_network_than_the_manifest_says(store: Store, changes: dict[str, Any], words: str) -> None:
    with running(author_file()) as site:
        entry = author_entry(site.data, f"{site.url}/a.pt", **changes)
        result = pulling.pull(pulling.PullRequest(["toy"]), shelf=shelf_of(store, entry), policy=PATIENCE)
    assert words in str(result.failed[0][1])
    assert store.state(entry) == "missing"


@pytest.mark.parametrize("kind", ["safetensors", "author-pt"])
def test_a_copy_made_by_hand_is_taken_without_the_network(store: Store, kind: str) -> None:
    data = author_file() if kind == "author-pt" else DATA
    entry = entry_for(data, "https://example.org/x", format=kind, variant=None)
    shelf = shelf_of(store, entry)
    request = pulling.PullRequest(["toy"], offline=True)
    missing = pulling.pull(request, shelf=shelf).failed[0][1]
    path = Path(re.search(r"copy it to (\S+) and run", str(missing))[1])  # type: ignore[index]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[:-1] + b"!")
    assert "expected sha256" in str(pulling.pull(request, shelf=shelf).failed[0][1])
    path.write_bytes(data)
    assert pulling.pull(request, shelf=shelf).failed == []
    assert store.verified_path(entry).is_file()


def test_pull_all_goes_on_after_a_failure_and_leaves_out_unpinned(site: Site, store: Store) -> None:
    entries = [
        entry_for(site.data, f"{site.url}/a", id="a"),
        entry_for(site.data, f"{site.url}/b", id="b"),
        entry_for(site.data, f"{site.url}/c", id="c", pin=""),
    ]
    site.plan = [status(404)]
    result = pulling.pull(pulling.PullRequest(everything=True), shelf=shelf_of(store, *entries), policy=PATIENCE)
    assert [entry.id for entry, _ in result.failed] == ["a"]
    assert [done.entry.id for done in result.pulled] == ["b"]
    assert [entry.id for entry in result.skipped] == ["c"]


@pytest.mark.parametrize(
    ("names", "everything", "words"),
    [([], False, "No checkpoint was named"), (["a"], True, "--all"), (["a"], False, "toy")],
)
def test_pull_refuses_what_it_cannot_mean(store: Store, names: list[str], everything: bool, words: str) -> None:
    with pytest.raises(ArgumentsError, match=words):
        pulling.pull(pulling.PullRequest(names, everything), shelf=shelf_of(store, entry_for(DATA, "https://a.org/x")))


# -- import ------------------------------------------------------------------------------------------------


def imported(tmp_path: Path, state: object, method: str | None = "rdst", name: str = "a.pt") -> Any:
    pytest.importorskip("medsr_cli.formats.atomic")
    torch.save(state, tmp_path / name)
    return tasks.import_weights(tasks.ImportRequest(tmp_path / name, tmp_path / "out.safetensors", method))


@pytest.mark.parametrize("method", ["rdst", None])
def test_import_reads_every_size(tmp_path: Path, method: str | None) -> None:
    config = RdstConfig(3, 24, 12, 4, 4, 2, 4, 1.5, False, 4, 2)
    done = imported(tmp_path, Rdst(config).state_dict(), method)
    assert done.config == {name: getattr(config, name) for name in done.config}
    assert (done.method, done.variant) == ("rdst", None)
    assert done.sha256 == hashlib.sha256(done.path.read_bytes()).hexdigest()
    assert load_network(done.path).config == config


@pytest.mark.parametrize(
    ("method", "words", "kind"),
    [
        ("rdst-e", "not rdst-e", WeightsError),
        ("bicubic", "no weights to import", ArgumentsError),
        ("nothing", "no method", ArgumentsError),
    ],
)
def test_import_refuses_other_methods(tmp_path: Path, method: str, words: str, kind: type[MedsrError]) -> None:
    with pytest.raises(kind, match=words):
        imported(tmp_path, Rdst(CONFIG).state_dict(), method)
    assert not (tmp_path / "out.safetensors").exists()


def test_import_refuses_heads_that_do_not_divide(tmp_path: Path) -> None:
    state = Rdst(RdstConfig(1, 12, 6, 6, 8, 1, 2)).state_dict()
    state = {k: v[:, :5] if k.endswith("bias_table") else v for k, v in state.items()}
    with pytest.raises(WeightsError, match=r"a\.pt"):
        imported(tmp_path, state)


def test_import_writes_once_unless_told(tmp_path: Path) -> None:
    imported(tmp_path, Rdst(CONFIG).state_dict())
    with pytest.raises(MedsrError):
        imported(tmp_path, Rdst(CONFIG).state_dict())
    with pytest.raises(ArgumentsError, match=r"\.safetensors"):
        tasks.import_weights(tasks.ImportRequest(tmp_path / "a.pt", tmp_path / "out.bin"))


def own_file(folder: Path, *, half: bool = False) -> Path:
    """A checkpoint as `medsr finetune` writes it: it declares a rounding that no tensor tells, and says what it is."""
    from medsr_cli.networks.miassr import Miassr, MiassrConfig

    torch.manual_seed(6)
    network = Miassr(MiassrConfig(n_feats=4, n_blocks=1, hidden=8, rounding="exact"))
    told = {"id": "ours-any", "licence_of_weights": "CC0", "trained_on": "3 subjects", "scale_range": "[1.0, 2.0]"}
    (folder / "ours.safetensors").write_bytes(checkpoint.save_network(network, told, half=half))
    return folder / "ours.safetensors"


@pytest.mark.parametrize("method", ["miassr", None])
@pytest.mark.parametrize("half", [False, True])
def test_import_keeps_a_checkpoint_of_our_own_as_it_is(tmp_path: Path, method: str | None, half: bool) -> None:
    ours = own_file(tmp_path, half=half)
    done = tasks.import_weights(tasks.ImportRequest(ours, tmp_path / "again.safetensors", method))
    assert load_network(done.path).config.rounding == done.config["rounding"] == "exact"
    assert read_header(done.path).metadata == read_header(ours).metadata
    # Its card states its sha256, and must stay the card of it.
    assert done.path.read_bytes() == ours.read_bytes()
    assert done.sha256 == done.source_sha256 == hashlib.sha256(ours.read_bytes()).hexdigest()
    assert done.untold == ()


@pytest.mark.parametrize("half", [False, True])
def test_import_changes_only_what_it_is_told_to_in_a_checkpoint_of_our_own(tmp_path: Path, half: bool) -> None:
    ours = own_file(tmp_path, half=half)
    request = tasks.ImportRequest(ours, tmp_path / "again.safetensors", settings={"rounding": "reference"})
    done = tasks.import_weights(request)
    network, before = load_network(done.path), load_network(ours)
    assert network.config.rounding == "reference"
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in network.state_dict().items())
    header, old = read_header(done.path), read_header(ours)
    assert header.tensors == old.tensors
    assert {k: v for k, v in header.metadata.items() if k != "medsr.config"} == {
        k: v for k, v in old.metadata.items() if k != "medsr.config"
    }


def test_import_refuses_a_checkpoint_of_our_own_that_is_another_or_broken(tmp_path: Path) -> None:
    ours = own_file(tmp_path)
    with pytest.raises(WeightsError, match="is not rdst: it declares that it is of miassr"):
        tasks.import_weights(tasks.ImportRequest(ours, tmp_path / "again.safetensors", "rdst"))
    ours.write_bytes(ours.read_bytes().replace(b"exact", b"loose"))
    with pytest.raises(WeightsError, match="loose"):
        tasks.import_weights(tasks.ImportRequest(ours, tmp_path / "again.safetensors"))
    assert not (tmp_path / "again.safetensors").exists()


def m2trans_file(config: M2TransConfig | None = None) -> tuple[M2Trans, bytes]:
    """A network and the file that its authors' training program would write of it after two steps."""
    torch.manual_seed(4)
    network = M2Trans(config or M2TransConfig(n_feats=16, n_blocks=2, scale=4))
    optimizer = torch.optim.Adam([value for value in network.parameters() if value.requires_grad], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200, 1e-6)
    for _ in range(2):
        network(torch.rand(1, 3, 17, 17)).mean().backward()
        optimizer.step()
        scheduler.step()
    saved = {
        "epoch": 2,
        "model_state_dict": {f"module.{key}": value for key, value in network.state_dict().items()},
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "stat_dict": {"epochs": 2, "losses": [0.5, 0.25], "best": {"psnr": {"value": 30.68, "epoch": 1}}},
    }
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return network, buffer.getvalue()


@pytest.mark.parametrize("method", [["-m", "m2trans"], []])
def test_import_takes_the_file_of_the_authors_of_m2trans(tmp_path: Path, method: list[str]) -> None:
    from typer.testing import CliRunner

    from medsr_cli.cli.weights import app

    network, data = m2trans_file()
    (tmp_path / "model_x4.pt").write_bytes(data)
    out = tmp_path / "out.safetensors"
    result = CliRunner().invoke(app, ["import", str(tmp_path / "model_x4.pt"), *method, "-o", str(out), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["method"] == "m2trans"
    assert facts["source_sha256"] == hashlib.sha256(data).hexdigest()
    found = load_network(out)
    assert found.config == network.config
    wanted = network.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in found.state_dict().items())


@pytest.mark.parametrize("scale", [2, 4])
def test_pull_takes_m2trans_by_its_git_blob_id_alone(store: Store, scale: int) -> None:
    network, data = m2trans_file(M2TransConfig(n_feats=16, n_blocks=2, scale=4))
    with running(data) as site:
        facts = {"method": "m2trans", "scales": [scale], "modality": "us", "channels": 3, "pin": "git_blob alone"}
        entry = author_entry(data, f"{site.url}/raw/model_x4.pt", **facts)
        assert entry.bytes is None
        shelf = shelf_of(store, entry)
        result = pulling.pull(pulling.PullRequest(["toy"]), shelf=shelf, policy=PATIENCE)
    if scale == 2:
        assert "scale 4" in str(result.failed[0][1])
        assert store.state(entry) == "missing"
        return
    assert result.failed == []
    path = store.verified_path(entry)
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in load_network(path).state_dict().items())
    record = store.record(entry)
    assert record is not None
    assert (record.source_git_blob, record.source_bytes) == (entry.git_blob, len(data))
    assert [row.status for row in tasks.verify(shelf=shelf)] == ["ok"]


def test_pull_converts_a_loss_network_without_its_classifier(store: Store) -> None:
    from medsr_cli.networks.vgg import Vgg19Features, VggConfig

    network = Vgg19Features(VggConfig(width=2))
    buffer = io.BytesIO()
    torch.save({**network.state_dict(), "classifier.0.weight": torch.ones(4, 4)}, buffer)
    with running(buffer.getvalue()) as site:
        facts = {"method": "vgg19", "scales": [], "channels": 3, "modality": "any", "degradation": "none"}
        entry = author_entry(site.data, f"{site.url}/vgg19-dcbb9e9d.pth", **facts)
        result = pulling.pull(pulling.PullRequest(["toy"]), shelf=shelf_of(store, entry), policy=PATIENCE)
    assert result.failed == []
    found = load_network(store.verified_path(entry)).state_dict()
    assert found.keys() == network.state_dict().keys()


TINY_MEDCLIP = {"width": 4, "depths": "2,2,1", "heads": "1,2,4", "window": 2, "vocabulary": 30, "positions": 20,
                "text_width": 8, "text_layers": 2, "text_heads": 1, "text_hidden": 12, "out": 6}  # fmt: skip


@pytest.mark.parametrize("pin", ["sha256", ""])
def test_pull_takes_the_checkpoint_out_of_its_authors_zip(store: Store, tmp_path: Path, pin: str) -> None:
    from medsr_cli.networks.medclip import MedClip, MedClipConfig

    torch.manual_seed(5)
    network = MedClip(MedClipConfig(**TINY_MEDCLIP))
    state = {**network.state_dict(), "logit_scale": torch.tensor(2.6)}
    state["text_model.model.pooler.dense.weight"] = torch.ones(8, 8)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with zipfile.ZipFile(tmp_path / "published.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "pytorch_model.bin", "medclip-vit-pretrained/pytorch_model.bin")
        archive.writestr("medclip-vit-pretrained/config.json", "{}")
        archive.writestr("__MACOSX/._pytorch_model.bin", "shadow")
    with running((tmp_path / "published.zip").read_bytes()) as site:
        facts = {"method": "medclip", "scales": [], "channels": 3, "modality": "any", "degradation": "none"}
        entry = author_entry(site.data, f"{site.url}/medclip.zip", pin=pin, **facts)
        request = pulling.PullRequest(["toy"], allow_unpinned=not pin)
        result = pulling.pull(request, shelf=shelf_of(store, entry), policy=PATIENCE)
    assert result.failed == []
    found = load_network(store.verified_path(entry, allow_unpinned=not pin))
    assert found.config == network.config
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in found.state_dict().items())
    # The same archive as a file of one's own.
    done = tasks.import_weights(tasks.ImportRequest(tmp_path / "published.zip", tmp_path / "out.safetensors"))
    assert (done.method, load_network(done.path).config) == ("medclip", network.config)


BY_HAND = {"sources": [], "by_hand": "https://example.org/share (extraction code X1)"}


def test_what_a_person_has_to_fetch(store: Store) -> None:
    data = author_file()
    entry = author_entry(data, pin="", **BY_HAND)
    other = entry_for(DATA, "https://example.org/x", id="other", pin="")
    shelf = shelf_of(store, entry, other)
    assert [row.words for row in tasks.list_weights(shelf)] == ["missing, by hand", "missing, unpinned"]
    for request in (pulling.PullRequest(["toy"]), pulling.PullRequest(["toy"], allow_unpinned=True, offline=True)):
        error = pulling.pull(request, shelf=shelf).failed[0][1]
        assert error.exit_code == 5
        assert "https://example.org/share (extraction code X1)" in str(error)
        assert "medsr weights import FILE -m rdst -o OUT.safetensors" in str(error)
    result = pulling.pull(pulling.PullRequest(everything=True), shelf=shelf)
    assert [found.id for found in result.by_hand] == ["toy"]
    assert [found.id for found in result.skipped] == ["other"]
    # Put where pull looks for copies made by hand, it is converted like any other.
    path = store.source_path(entry)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    assert pulling.pull(pulling.PullRequest(["toy"], allow_unpinned=True), shelf=shelf).failed == []
    assert [row.words for row in tasks.list_weights(shelf)] == ["present, by hand", "missing, unpinned"]
    assert load_network(store.verified_path(entry, allow_unpinned=True)).config == CONFIG


def test_a_bundle_carries_ranges_and_what_was_fetched_by_hand(tmp_path: Path, store: Store) -> None:
    entry = author_entry(author_file(), pin="", sha256_prefix=hashlib.sha256(author_file()).hexdigest()[:8], **BY_HAND)
    path = store.source_path(entry)
    path.parent.mkdir(parents=True)
    path.write_bytes(author_file())
    shelf = shelf_of(store, entry)
    assert pulling.pull(pulling.PullRequest(["toy"], allow_unpinned=True), shelf=shelf).failed == []
    tasks.export_bundle(tasks.ExportRequest(tmp_path / "out.zip"), shelf)
    target = Store(tmp_path / "elsewhere", tmp_path / "none")
    assert [item.written for item in tasks.import_bundle(tmp_path / "out.zip", shelf_of(target))] == [True]
    assert target.entries() == (entry,)


# -- bundle ------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(site: Site, store: Store) -> Callable[[Path], list[Entry]]:
    """Two checkpoints in a store, one safetensors and one converted, and how to pack them."""
    pytest.importorskip("medsr_cli.formats.atomic")
    first = entry_for(site.data, f"{site.url}/a", id="first")
    with running(author_file()) as other:
        second = author_entry(other.data, f"{other.url}/b", id="second")
        loose = author_entry(other.data, f"{other.url}/c", id="loose", pin="")
        shelf = shelf_of(store, first, second, loose)
        assert not pulling.pull(
            pulling.PullRequest(everything=True, allow_unpinned=True), shelf=shelf, policy=PATIENCE
        ).failed

    def pack(path: Path) -> list[Entry]:
        return list(tasks.export_bundle(tasks.ExportRequest(path), shelf))

    return pack


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize("known", [True, False])
def test_a_bundle_round_trip(tmp_path: Path, packed: Callable[[Path], list[Entry]], suffix: str, known: bool) -> None:
    path = tmp_path / f"out{suffix}"
    entries = packed(path)
    assert [entry.id for entry in entries] == ["first", "second", "loose"]
    target = Store(tmp_path / "elsewhere", tmp_path / "none")
    shelf = shelf_of(target, *(entries if known else ()))
    arrived = tasks.import_bundle(path, shelf)
    assert [item.written for item in arrived] == [True] * 3
    assert [item.written for item in tasks.import_bundle(path, shelf)] == [False] * 3
    after = tasks.Shelf(shelf.manifest.extended(target.entries()), target)
    assert list(after.manifest.entries) == entries or not known
    assert {entry.id for entry in after.manifest.entries} == {"first", "second", "loose"}
    assert {row.status for row in tasks.verify(shelf=after)} == {"ok"}
    assert leftovers(target.home) == []


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_a_bundle_is_the_same_bytes_each_time(
    tmp_path: Path, packed: Callable[[Path], list[Entry]], suffix: str
) -> None:
    packed(tmp_path / f"a{suffix}")
    packed(tmp_path / f"b{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def rewritten(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target


def edit_list(edit: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        data = json.loads(members[bundle.LIST_NAME])
        edit(data)
        members[bundle.LIST_NAME] = json.dumps(data).encode()

    return change


def flip(members: dict[str, bytes]) -> None:
    data = members["weights/first.safetensors"]
    members["weights/first.safetensors"] = data[:-1] + bytes([data[-1] ^ 1])


def escape(data: Any) -> None:
    data["checkpoints"][0]["file"] = "../../evil"


def evil_id(data: Any) -> None:
    data["checkpoints"][0]["entry"]["id"] = "../evil"


def other_bytes(data: Any) -> None:
    data["checkpoints"][0]["bytes"] += 1


def other_record(data: Any) -> None:
    data["checkpoints"][0]["record"]["sha256"] = "0" * 64


def odd_record(data: Any) -> None:
    data["checkpoints"][0]["record"] = {"id": 3}


def twice(data: Any) -> None:
    data["checkpoints"].append(data["checkpoints"][0])


def huge(data: Any) -> None:
    data["checkpoints"][0]["bytes"] = 10**12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip, "damaged"),
        (edit_list(escape), "does not have the name"),
        (edit_list(evil_id), "id is '../evil'"),
        (edit_list(other_bytes), "not of the length"),
        (edit_list(other_record), "record of first"),
        (edit_list(odd_record), "record of first"),
        (edit_list(twice), "other files"),
        (edit_list(huge), "malformed"),
        (edit_list(lambda data: data.update(format=2)), "format 1"),
        (edit_list(lambda data: data["checkpoints"].pop()), "other files"),
        (lambda members: members.update({"../../evil": b"x"}), "other files"),
        (lambda members: members.pop("weights/first.safetensors"), "missing"),
        (lambda members: members.pop(bundle.LIST_NAME), "has no"),
        (lambda members: members.update({bundle.LIST_NAME: b"{"}), "not JSON"),
        (lambda members: members.update({bundle.LIST_NAME: b" " * 5_000_000}), "5000000 bytes"),
        (lambda members: members.update({"folder/": b""}), "folders"),
    ],
)
def test_a_changed_bundle_is_refused(
    tmp_path: Path, packed: Callable[[Path], list[Entry]], change: Callable[[dict[str, bytes]], None], words: str
) -> None:
    packed(tmp_path / "good.zip")
    bad = rewritten(tmp_path / "good.zip", tmp_path / "bad.zip", change)
    target = Store(tmp_path / "deep" / "er" / "home", tmp_path / "none")
    with pytest.raises(WeightsError, match=re.escape(words)):
        tasks.import_bundle(bad, shelf_of(target))
    assert not list(tmp_path.rglob("evil*"))
    assert not list(target.home.rglob("first.safetensors*"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_archives_are_refused(tmp_path: Path) -> None:
    shelf = shelf_of(Store(tmp_path / "home", tmp_path / "none"))
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(bundle.LIST_NAME, " " * 1000)
    with zipfile.ZipFile(tmp_path / "double.zip", "w") as archive:
        archive.writestr(bundle.LIST_NAME, "{}")
        archive.writestr(bundle.LIST_NAME, "{}")
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        link = tarfile.TarInfo(bundle.LIST_NAME)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with tarfile.open(tmp_path / "gzipped.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    (tmp_path / "noise.zip").write_bytes(b"PK\x05\x06nothing")
    (tmp_path / "noise.tar").write_bytes(os.urandom(2000))
    for name in ("packed.zip", "double.zip", "link.tar", "gzipped.tar", "noise.zip", "noise.tar", "none.zip"):
        with pytest.raises(WeightsError, match=name):
            tasks.import_bundle(tmp_path / name, shelf)
    with pytest.raises(ArgumentsError, match="neither"):
        tasks.import_bundle(tmp_path / "a.7z", shelf)


def test_the_manifests_hash_counts_not_the_bundles(tmp_path: Path, packed: Callable[[Path], list[Entry]]) -> None:
    entries = packed(tmp_path / "good.zip")
    for pinned in entries[:2]:
        other = entry_for(b"x" * 9, "https://a.org/x", id=pinned.id, format=pinned.format, variant=None)
        target = Store(tmp_path / pinned.id, tmp_path / "none")
        with pytest.raises(WeightsError, match=f"not the checkpoint {pinned.id}"):
            tasks.import_bundle(tmp_path / "good.zip", shelf_of(target, other))
        assert not (target.home / "weights" / f"{pinned.id}.safetensors").exists()


def test_nothing_to_bundle_is_said(tmp_path: Path, store: Store) -> None:
    with pytest.raises(WeightsError, match="nothing to bundle"):
        tasks.export_bundle(tasks.ExportRequest(tmp_path / "a.zip"), shelf_of(store))
    entry = entry_for(DATA, "https://a.org/x")
    with pytest.raises(WeightsError, match="not on this machine"):
        tasks.export_bundle(tasks.ExportRequest(tmp_path / "a.zip", ["toy"]), shelf_of(store, entry))
    assert list(tmp_path.glob("*a.zip*")) == []


# -- command line ------------------------------------------------------------------------------------------


@pytest.fixture
def medsr(site: Site, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Run `weights ARGS` over a manifest of two: `toy`, and `loose` which nothing pins."""
    from typer.testing import CliRunner

    from medsr_cli.cli.weights import app
    from medsr_cli.weights import manifest

    pinned = {"bytes": len(site.data), "sha256": hashlib.sha256(site.data).hexdigest()}
    entries = [
        entry_data(**pinned, sources=[{"kind": "url", "url": f"{site.url}/toy", "file": "toy"}]),
        entry_data(id="loose", bytes=None, sha256=None, sources=[{"kind": "url", "url": f"{site.url}/l", "file": "l"}]),
    ]
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "default_modality": "mr", "checkpoints": entries}))
    monkeypatch.setattr(manifest, "manifest_path", lambda: path)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_list(medsr: Callable[..., Any]) -> None:
    rows = [line.split("\t") for line in medsr("list").stdout.splitlines()]
    assert [(row[0], row[5]) for row in rows] == [("toy", "missing"), ("loose", "missing, unpinned")]
    facts = [json.loads(line) for line in medsr("list", "--json").stdout.splitlines()]
    assert [(fact["id"], fact["pinned"], fact["path"]) for fact in facts] == [
        ("toy", True, None),
        ("loose", False, None),
    ]


def test_pull_prints_paths_on_stdout_and_the_hash_seen_on_stderr(medsr: Callable[..., Any], site: Site) -> None:
    result = medsr("pull", "toy")
    assert result.exit_code == 0, result.output
    assert Path(result.stdout.strip()).read_bytes() == site.data
    assert result.stderr == ""
    result = medsr("pull", "loose", "--allow-unpinned")
    assert Path(result.stdout.strip()).read_bytes() == site.data
    assert hashlib.sha256(site.data).hexdigest() in result.stderr
    fact = json.loads(medsr("pull", "toy", "--json").stdout)
    assert (fact["id"], fact["fetched"]) == ("toy", False)


def test_pull_fails_with_code_5_after_the_rest(medsr: Callable[..., Any]) -> None:
    result = medsr("pull", "--all")
    assert result.exit_code == 0
    assert "loose" in result.stderr
    result = medsr("pull", "loose", "toy")
    assert isinstance(result.exception, WeightsError)
    assert result.exception.exit_code == 5
    assert result.stdout.strip().endswith("toy.safetensors")
    assert isinstance(medsr("pull", "nothing").exception, ArgumentsError)


def test_verify_exit_codes(medsr: Callable[..., Any], store: Store) -> None:
    assert medsr("verify").exit_code == 0
    assert medsr("verify", "toy").exit_code == 5
    path = Path(medsr("pull", "toy").stdout.strip())
    assert medsr("verify", "toy").stdout == f"ok\ttoy\t{path}\n"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    result = medsr("verify", "--json")
    assert result.exit_code == 5
    assert [json.loads(line)["status"] for line in result.stdout.splitlines()] == ["corrupt", "missing"]


def test_import_and_bundle_commands(medsr: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("medsr_cli.formats.atomic")
    torch.save(Rdst(CONFIG).state_dict(), tmp_path / "a.pt")
    result = medsr("import", str(tmp_path / "a.pt"), "-m", "rdst", "-o", str(tmp_path / "a.safetensors"), "--json")
    assert json.loads(result.stdout)["config"]["embed_dim"] == 12
    result = medsr("import", str(tmp_path / "a.pt"), "-o", str(tmp_path / "b.safetensors"))
    assert result.stdout == f"{tmp_path / 'b.safetensors'}\n"
    medsr("pull", "toy")
    assert medsr("bundle", "export", str(tmp_path / "b.zip")).stdout == f"{tmp_path / 'b.zip'}\n"
    monkeypatch.setenv("MEDSR_HOME", str(tmp_path / "other"))
    result = medsr("bundle", "import", str(tmp_path / "b.zip"))
    assert result.stdout == f"{tmp_path / 'other' / 'weights' / 'toy.safetensors'}\n"
    assert medsr("verify", "toy").exit_code == 0


def test_a_terminal_gets_a_table_and_a_bar(
    medsr: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from medsr_cli.cli import weights as cli

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    cli.list_command()
    assert "toy" in capsys.readouterr().out
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    cli.pull_command(["toy"])
    assert capsys.readouterr().out.strip().endswith("toy.safetensors")


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from medsr_cli.cli import weights; assert 'yaml' not in sys.modules; weights.list_command(True);"
        "print([m for m in ('torch', 'numpy', 'onnxruntime', 'huggingface_hub') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_numbers_of_numpy_beside_the_network_do_no_harm(tmp_path: Path) -> None:
    """Training programs pickle their figures with the network; an object hidden in one stays refused."""
    import numpy as np

    from medsr_cli.tasks.weights import numpy_scalars

    net = Rdst(CONFIG)
    figures = {"psnr": np.float64(33.1), "losses": [np.float32(0.1)], "epoch": np.int64(7)}
    torch.save({"model_state_dict": net.state_dict(), "stat_dict": figures}, tmp_path / "a.pt")
    with pytest.raises(WeightsError):
        checkpoint.read_author_checkpoint(tmp_path / "a.pt")
    state = checkpoint.read_author_checkpoint(tmp_path / "a.pt", numpy_scalars())
    assert set(state) == set(net.state_dict())
    torch.save({"model_state_dict": net.state_dict(), "stat_dict": {"x": Path("/")}}, tmp_path / "b.pt")
    with pytest.raises(WeightsError):
        checkpoint.read_author_checkpoint(tmp_path / "b.pt", numpy_scalars())
