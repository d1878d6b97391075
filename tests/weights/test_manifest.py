"""The manifest is refused by entry and field, and the choice of a checkpoint is the documented one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from misbehaving_site import entry_data

from medsr_cli.errors import ArgumentsError, MedsrError, WeightsError
from medsr_cli.networks import catalogue
from medsr_cli.weights import manifest as m


def document(*entries: dict[str, Any], **top: Any) -> str:
    return yaml.safe_dump({"version": 1, "default_modality": "mr", "checkpoints": list(entries), **top})


def test_the_manifest_that_ships_is_valid() -> None:
    found = m.load_manifest()
    ids = [entry.id for entry in found.entries]
    assert {"rdst-x4-oasis-e1", "rdst-x4-oasis-hrl", "rdst-e-x4-oasis-e"} <= set(ids)
    for entry in found.entries:
        assert m.parse_entry(json.loads(json.dumps(entry.to_json())), "again") == entry
        assert entry.variant in catalogue.find(entry.method)[0].variants


def test_a_bundled_checkpoint_of_the_manifest_is_in_the_package_and_right() -> None:
    from medsr_cli.weights.store import Store

    for entry in m.load_manifest().entries:
        if entry.bundled_file:
            Store().verified_path(entry)


def test_a_whole_entry_is_read() -> None:
    entry = m.parse_manifest(document(entry_data(validation=[
        {"name": "a", "contrast": "T1w", "psnr": 33, "ssim": 0.9, "bicubic_psnr": 30.5, "bicubic_ssim": 0.8}
    ]))).entries[0]  # fmt: skip
    assert (entry.id, entry.scales, entry.spacing_mm, entry.pinned) == ("toy", (4.0,), (0.5, 1.5), True)
    assert entry.validation[0].psnr == 33.0


@pytest.mark.parametrize("field", sorted(set(entry_data()) - {"notes"}))
def test_every_field_must_be_there(field: str) -> None:
    with pytest.raises(WeightsError, match=rf"{field} is missing"):
        m.parse_manifest(document(entry_data(**{field: ...})))


URL = {"kind": "url", "url": "https://a.org/f", "file": "f"}
HF = {"kind": "hf", "repo": "a/b", "file": "f.safetensors", "revision": "0" * 40}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "../etc"), ("id", "UP"), ("id", ""), ("id", 3), ("id", "a" * 65), ("id", "a/b"), ("id", ".hidden"),
        ("method", "bicubic"), ("method", "nothing"), ("method", None), ("variant", "rdst-xl"),
        ("scales", []), ("scales", [1]), ("scales", [9]), ("scales", [4, 4]), ("scales", 4), ("scales", ["4"]),
        ("scales", [True]), ("scales", [float("nan")]), ("scales", [float("inf")]),
        ("modality", "pet"), ("modality", None), ("body_part", "Left Knee"), ("body_part", None),
        ("channels", 0), ("channels", 17), ("channels", 1.0), ("channels", True), ("channels", None),
        ("value_range", [1, 0]), ("value_range", [0, 0]), ("value_range", [0]), ("value_range", [0, "x"]),
        ("degradation", "?"), ("spacing_mm", [0, 1]), ("spacing_mm", [2, 1]), ("spacing_mm", [-1, 1]),
        ("format", "pickle"), ("sources", []), ("sources", [{}]), ("sources", ["https://a.org"]),
        ("sources", [{**URL, "url": "http://a.org/f"}]), ("sources", [{**URL, "url": "file:///etc/passwd"}]),
        ("sources", [{**URL, "url": "https://user:pw@a.org/f"}]), ("sources", [{**URL, "file": "../f"}]),
        ("sources", [{**URL, "more": 1}]), ("sources", [{"kind": "ftp", "file": "f"}]),
        ("sources", [{**HF, "revision": "main"}]), ("sources", [{**HF, "repo": "a"}]),
        ("sources", [{**HF, "file": "../f"}]), ("sources", [{**HF, "file": "a/../../f"}]),
        ("sources", [{"kind": "bundled", "file": "a/b"}]),
        ("bytes", 0), ("bytes", 5_000_000_000), ("bytes", "12"), ("bytes", 1.5),
        ("sha256", "a" * 63), ("sha256", "A" * 64), ("sha256", 0), ("git_blob", "a" * 64),
        ("licence", "MIT"), ("licence", {"code": "a", "weights": "b"}),
        ("licence", {"code": 1, "weights": "", "data": ""}),
        ("licence", {"code": "a", "weights": "b", "data": "c", "more": "d"}), ("trained_on", ""),
        ("validation", {}), ("validation", [{"name": "a"}]), ("command", 3), ("date", "20/11/2026"), ("date", 2026),
        ("notes", ["a"]),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_entry_and_field(field: str, value: object) -> None:
    with pytest.raises(WeightsError) as caught:
        m.parse_manifest(document(entry_data(**{field: value})))
    assert field in str(caught.value)
    assert "checkpoint 1" in str(caught.value) or "toy" in str(caught.value)
    assert caught.value.exit_code == 5


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"toy: sha512 is not a field"):
        m.parse_manifest(document(entry_data(sha512="x")))
    with pytest.raises(WeightsError, match="extra is not a field"):
        m.parse_manifest(document(entry_data(), extra=1))


def test_what_no_single_field_says() -> None:
    for changes, field in (
        ({"sha256": None, "git_blob": "a" * 40, "bytes": None}, "bytes"),
        ({"format": "author-pt", "sources": [{"kind": "bundled", "file": "a.pt"}]}, "sources"),
        ({"sha256": None, "sources": [{"kind": "bundled", "file": "a.safetensors"}]}, "sha256"),
    ):
        with pytest.raises(WeightsError, match=f"toy: {field}"):
            m.parse_manifest(document(entry_data(**changes)))


def test_ids_and_keys_stand_once() -> None:
    with pytest.raises(WeightsError, match="toy stands twice"):
        m.parse_manifest(document(entry_data(), entry_data()))
    with pytest.raises(WeightsError, match="'version' is no text or stands twice"):
        m.parse_manifest("version: 1\nversion: 1\n")


@pytest.mark.parametrize("text", ["", "[]", "version: 2", "!!python/object/apply:os.system [ls]", "a: [", "\x00"])
def test_other_documents_are_refused(text: str) -> None:
    with pytest.raises(WeightsError, match="manifest"):
        m.parse_manifest(text)


def test_nothing_in_a_manifest_is_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    with pytest.raises(WeightsError, match="not valid YAML"):
        m.parse_manifest(f"version: !!python/object/apply:os.mkdir [{str(made)!r}]")
    assert not made.exists()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        m.load_manifest(tmp_path / "none.yaml")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(field=st.sampled_from(sorted(entry_data())), value=JSON_VALUES)
def test_any_value_is_accepted_or_refused_in_a_sentence(field: str, value: object) -> None:
    try:
        entry = m.parse_entry(entry_data(**{field: value}), "fuzz")
    except MedsrError as error:
        assert field in str(error)  # noqa: PT017 -- either outcome is fine, another exception is not
    else:
        assert m.parse_entry(json.loads(json.dumps(entry.to_json())), "again") == entry


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(WeightsError):
        m.parse_manifest(text)


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://a.org/x?y=1", True), ("http://127.0.0.1:80/x", True), ("http://localhost/x", True),
        ("http://[::1]:8080/x", True), ("http://127.0.0.1.evil.org/", False), ("http://localhost@evil.org/", False),
        ("ftp://a.org/x", False), ("//a.org/x", False), ("https://", False), ("https://a.org:99999/", False),
        ("https://a.org/\nx", False), ("https://a b/", False), ("http://[bad/", False),
    ],
)  # fmt: skip
def test_addresses(url: str, allowed: bool) -> None:
    assert m.allowed_url(url) is allowed


MANIFEST = m.parse_manifest(
    document(
        entry_data(id="e-mr-4", variant="rdst-e"),
        entry_data(id="r-mr-4", variant="rdst"),
        entry_data(id="r-ct-4", variant="rdst", modality="ct"),
        entry_data(id="r-mr-2", variant="rdst", scales=[2]),
        entry_data(id="r-any-3", variant="rdst", scales=[3], modality="any"),
        entry_data(id="loose", variant="rdst", scales=[8], sha256=None),
    )
)
ALL = {entry.id for entry in MANIFEST.entries}


@pytest.mark.parametrize(
    ("name", "scale", "modality", "present", "chosen"),
    [
        ("rdst", 4, "mr", ALL, "e-mr-4"),
        ("rdst", 4, None, ALL, "e-mr-4"),
        ("rdst", 4, "mr", {"r-mr-4"}, "r-mr-4"),
        ("rdst", 4, "ct", ALL, "r-ct-4"),
        ("rdst-e", 4, "mr", ALL, "e-mr-4"),
        ("rdst-e", 4, "ct", ALL, "e-mr-4"),  # none for CT is listed: the nearest, and the caller warns
        ("rdst", 3, "us", ALL, "r-any-3"),
        ("rdst", 2, "mr", ALL, "r-mr-2"),
        ("r-ct-4", 4, "mr", ALL, "r-ct-4"),
    ],
)
def test_select(name: str, scale: float, modality: str | None, present: set[str], chosen: str) -> None:
    assert m.select(MANIFEST, name, scale, modality, lambda entry: entry.id in present).id == chosen


@pytest.mark.parametrize(
    ("name", "scale", "modality", "present", "kind", "sentence"),
    [
        ("rdst", 5, "mr", ALL, ArgumentsError, "no checkpoint for scale 5.*There is: 2, 3, 4, 8"),
        ("rdst-e", 2, "mr", ALL, ArgumentsError, "There is: 4"),
        ("r-mr-4", 2, "mr", ALL, ArgumentsError, "There is: 4"),
        ("nothing", 4, "mr", ALL, ArgumentsError, "There are: rdst.*Checkpoints: e-mr-4"),
        ("bicubic", 4, "mr", ALL, ArgumentsError, "no checkpoints"),
        ("rdst", 4, "mr", set(), WeightsError, "lists e-mr-4, r-mr-4.*medsr weights pull e-mr-4"),
        ("rdst", 4, "ct", {"e-mr-4"}, WeightsError, "pull r-ct-4.*another modality: e-mr-4"),
        ("loose", 8, "mr", set(), WeightsError, "pull loose --allow-unpinned"),
    ],
)
def test_select_says_what_there_is(
    name: str, scale: float, modality: str, present: set[str], kind: type[MedsrError], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        m.select(MANIFEST, name, scale, modality, lambda entry: entry.id in present)
