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
from medsr_cli.weights.selection import select


def document(*entries: dict[str, Any], **top: Any) -> str:
    return yaml.safe_dump({"version": 1, "default_modality": "mr", "checkpoints": list(entries), **top})


def test_the_manifest_that_ships_is_valid() -> None:
    found = m.load_manifest()
    ids = [entry.id for entry in found.entries]
    assert {"rdst-x4-oasis-e1", "rdst-x4-oasis-hrl", "rdst-e-x4-oasis-e"} <= set(ids)
    for entry in found.entries:
        assert m.parse_entry(json.loads(json.dumps(entry.to_json())), "again") == entry
        assert entry.variant in (None, *catalogue.find(entry.method)[0].variants)
        assert entry.pinned or entry.method in ("rdst", "cohft-released", "medclip")


@pytest.mark.parametrize(
    ("scale", "blob"),
    [
        (2, "c5f03dc4edf444b5aa4d46ee25df1f17f601d05a"),
        (3, "5abde48d5d0e40b4b183fa6aba93dffd4839d2ea"),
        (4, "cab6082398efb0cce2ff2e8f034c09a5cb30d852"),
    ],
)
def test_the_authors_m2trans_is_pinned_at_its_commit(scale: int, blob: str) -> None:
    entry = m.load_manifest().entry(f"m2trans-x{scale}-us")
    assert (entry.method, entry.modality, entry.channels, entry.scales) == ("m2trans", "us", 3, (float(scale),))
    assert (entry.git_blob, entry.bytes, entry.sha256, entry.pinned) == (blob, None, None, True)
    commit = "c4ab8e456b591b013af264e91da03bd84f9a1c21"
    assert entry.sources[0].url == f"https://github.com/eezkni/M2Trans/raw/{commit}/checkpoints/model_x{scale}.pt"
    assert [v.name.split()[0] for v in entry.validation] == ["MMUS1K", "CCA-US", "US-CASE"]
    assert all(v.psnr > v.bicubic_psnr + 1 and v.ssim > v.bicubic_ssim for v in entry.validation)
    assert "not stated apart" in entry.licence.weights


def test_weights_that_nobody_here_can_fetch_say_so() -> None:
    found = m.load_manifest()
    by_hand = [entry for entry in found.entries if not entry.sources]
    assert {entry.method for entry in by_hand} == {"cohft-released"}
    assert {scale for entry in by_hand for scale in entry.scales} == {2.0, 3.0, 4.0}
    for entry in by_hand:
        assert "IQ1W" in (entry.by_hand or "")
        assert "not stated by the authors" in entry.licence.weights
        assert "FLAIR" in entry.notes
        assert "T1gd" in entry.notes


def test_the_loss_network_is_no_method_for_images() -> None:
    found = m.load_manifest()
    entry = found.entry("vgg19-imagenet")
    assert (entry.scales, entry.scale_range, entry.channels, entry.modality) == ((), None, 3, "any")
    assert entry.sha256 is not None
    assert entry.sha256.startswith("dcbb9e9d")
    assert not entry.covers(2)
    for name in ("vgg19", "vgg19-imagenet"):
        with pytest.raises(ArgumentsError, match="enlarges nothing"):
            select(found, name, 4, None, lambda entry: True)


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
    assert field not in OPTIONAL
    with pytest.raises(WeightsError, match=rf"{field} is missing"):
        m.parse_manifest(document(entry_data(**{field: ...})))


OPTIONAL = {"scale_range", "by_hand", "sha256_prefix", "precision_cost_db"}


def test_fields_of_later_releases_may_be_absent_and_are_written_only_if_used() -> None:
    old = m.parse_entry(entry_data(), "old")
    assert [getattr(old, name) for name in sorted(OPTIONAL)] == [None] * len(OPTIONAL)
    assert OPTIONAL.isdisjoint(old.to_json())
    explicit = m.parse_entry(entry_data(**dict.fromkeys(OPTIONAL)), "null")
    assert explicit == old
    new = entry_data(
        method="miassr", variant="miassr", scale_range=[1, 4], sources=[], by_hand="a page", sha256=None,
        sha256_prefix="0123abcd", precision_cost_db={"slices": 3, "bfloat16": 0.002},
    )  # fmt: skip
    assert set(m.parse_entry(new, "new").to_json()) >= OPTIONAL


def test_what_narrower_arithmetic_costs_is_read_from_the_manifest_and_from_metadata() -> None:
    data = {"slices": 24, "bfloat16": 0.003, "float16": -0.001}
    cost = m.parse_entry(entry_data(precision_cost_db=data), "toy").precision_cost_db
    assert cost == m.PrecisionCost(24, 0.003, -0.001)
    assert cost.by_name == {"bfloat16": 0.003, "float16": -0.001}
    assert m.precision_cost_of_json(cost.to_json()) == cost
    only = m.precision_cost_of_json('{"slices": 2, "float16": null, "bfloat16": 1}')
    assert only is not None
    assert only.by_name == {"bfloat16": 1.0}


@pytest.mark.parametrize(
    "text", [None, "", "null", "3", "[", '{"bfloat16": 0.0}', '{"slices": 3, "bfloat16": NaN}', "[" * 100_000]
)
def test_metadata_that_tell_no_sense_tell_no_cost(text: str | None) -> None:
    assert m.precision_cost_of_json(text) is None


def test_every_checkpoint_in_the_package_says_what_bfloat16_costs() -> None:
    bundled = [entry for entry in m.load_manifest().entries if entry.bundled_file and entry.scale_words]
    assert len(bundled) >= 10
    for entry in bundled:
        assert entry.precision_cost_db is not None, entry.id
        assert {"bfloat16", "float16"} == set(entry.precision_cost_db.by_name)
        assert entry.precision_cost_db.slices >= 6


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
        ("notes", ["a"]), ("by_hand", ""), ("by_hand", 3), ("by_hand", "a page, though there are sources"),
        ("scale_range", [1, 4]), ("scale_range", 4), ("scale_range", [4, 1]), ("scale_range", "1-4"),
        ("sha256_prefix", "0123abc"), ("sha256_prefix", "A" * 8), ("sha256_prefix", "a" * 64),
        ("sha256_prefix", "0123abcd"),
        ("precision_cost_db", 0.01), ("precision_cost_db", {}), ("precision_cost_db", {"slices": 3}),
        ("precision_cost_db", {"bfloat16": 0.01}), ("precision_cost_db", {"bfloat16": 0.01, "slices": 0}),
        ("precision_cost_db", {"bfloat16": "0.01", "slices": 3}),
        ("precision_cost_db", {"bfloat16": float("nan"), "slices": 3}),
        ("precision_cost_db", {"bfloat16": None, "slices": 3}),
        ("precision_cost_db", {"int8": 0.01, "bfloat16": 0.01, "slices": 3}),
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
        ({"method": "miassr", "variant": None, "scales": [], "scale_range": None}, "scales"),
        ({"method": "miassr", "variant": None, "scales": [], "scale_range": [0.5, 4]}, "scale_range"),
        ({"method": "miassr", "variant": None, "scales": [], "scale_range": [1, 9]}, "scale_range"),
        ({"method": "vgg19", "variant": None, "scales": [2]}, "scales"),
        ({"method": "m2trans", "variant": None, "scales": []}, "scales"),
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


def test_a_git_blob_id_needs_no_length() -> None:
    entry = m.parse_entry(entry_data(sha256=None, git_blob="a" * 40, bytes=None), "test")
    assert entry.pinned


def any_scale(**changes: Any) -> m.Entry:
    data = entry_data(method="miassr", variant="miassr", scales=[], scale_range=[1.0, 4.0])
    return m.parse_entry({**data, **changes}, "test")


@pytest.mark.parametrize(
    ("scales", "rows", "columns", "covered"),
    [
        ([], 4, None, True), ([], 1, None, False), ([], 1.0001, None, True), ([], 4.001, None, False),
        ([], 2.5, 3.25, True), ([], 2.5, 4.5, False), ([], 1, 2, False), ([6], 6, None, True), ([6], 6, 3, False),
    ],
)  # fmt: skip
def test_a_range_covers_what_lies_above_its_low_and_up_to_its_high(
    scales: list[float], rows: float, columns: float | None, covered: bool
) -> None:
    assert any_scale(scales=scales).covers(rows, columns) is covered


def test_listed_scales_cover_themselves_along_both_axes() -> None:
    entry = m.parse_entry(entry_data(scales=[2, 4]), "test")
    assert [entry.covers(s) for s in (2, 3, 4, 2.5)] == [True, False, True, False]
    assert [entry.covers(*pair) for pair in ((2, 2), (2, 4), (4, 2))] == [True, False, False]
    assert entry.scale_words == ("2", "4")
    assert any_scale(scales=[6]).scale_words == ("6", "1.0-4.0")


FAMILY = m.parse_manifest(
    document(
        entry_data(id="released-4", method="cohft-released", variant=None, sources=[], by_hand="a page (code 1)"),
        entry_data(id="any-scale", method="miassr", variant=None, scales=[], scale_range=[1.0, 4.0]),
        entry_data(id="paper-4", method="cohft", variant=None),
        entry_data(id="paper-2", method="cohft", variant=None, scales=[2]),
    )
)


@pytest.mark.parametrize(
    ("name", "scale", "present", "chosen"),
    [
        ("cohft", 4, {"released-4", "paper-4"}, "released-4"),  # in the manifest's order, whichever of the family
        ("cohft", 4, {"paper-4"}, "paper-4"),
        ("cohft", 2, {"paper-2", "released-4"}, "paper-2"),
        ("cohft-released", 4, {"released-4", "paper-4"}, "released-4"),
        ("miassr", 2.5, {"any-scale"}, "any-scale"),
        ("miassr", (2.5, 4.0), {"any-scale"}, "any-scale"),
        ("cohft", (4.0, 4.0), {"paper-4"}, "paper-4"),
    ],
)
def test_select_knows_families_and_ranges(name: str, scale: m.Scale, present: set[str], chosen: str) -> None:
    assert select(FAMILY, name, scale, "mr", lambda entry: entry.id in present).id == chosen


@pytest.mark.parametrize(
    ("name", "scale", "kind", "sentence"),
    [
        ("cohft-released", 2, ArgumentsError, r"no checkpoint for scale 2\. There is: 4\. .*--fit"),
        ("cohft", 8, ArgumentsError, r"There is: 2, 4\.$"),  # nothing larger to fit from
        ("cohft", 3, ArgumentsError, r"There is: 2, 4\. .*--fit"),
        ("miassr", 6, ArgumentsError, r"scale 6\. There is: 1\.0-4\.0\.$"),
        ("miassr", (2.0, 5.0), ArgumentsError, "scale 2 along rows and 5 along columns"),
        ("cohft", (2.0, 4.0), ArgumentsError, "scale 2 along rows and 4 along columns"),
        ("cohft", 4, WeightsError, r"lists released-4, paper-4.*by hand from a page \(code 1\).*-m cohft-released"),
        ("miassr", 2, WeightsError, "medsr weights pull any-scale"),
        ("msgan", 4, WeightsError, r"No checkpoint of msgan is listed.*untrained.*import FILE -m msgan.*--weights"),
        ("uscyclegan", 4, WeightsError, r"no checkpoint by design.*every image.*import FILE -m uscyclegan"),
        ("rdst-e", 4, WeightsError, r"No checkpoint of rdst-e is listed.*medsr finetune DIR -m rdst-e"),
    ],
)
def test_select_says_how_to_get_one(name: str, scale: m.Scale, kind: type[MedsrError], sentence: str) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        select(FAMILY, name, scale, "mr", lambda entry: False)
    assert caught.value.exit_code == (5 if kind is WeightsError else 2)
    assert ("medsr finetune" in str(caught.value)) is (name in ("rdst-e", "msgan"))


def test_no_method_of_the_shipped_manifest_runs_untrained() -> None:
    """Whatever is asked for where nothing is on the machine, an error says how to get a checkpoint."""
    found = m.load_manifest()
    for arch in catalogue.CATALOGUE:
        if arch.kind == "network":
            with pytest.raises(WeightsError, match=r"medsr weights (pull|import)"):
                select(found, arch.id, 4, None, lambda entry: False)


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
    assert select(MANIFEST, name, scale, modality, lambda entry: entry.id in present).id == chosen


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
        select(MANIFEST, name, scale, modality, lambda entry: entry.id in present)
