"""UIDs: valid, never twice, and the same again where that was asked for."""

import re
import subprocess
import sys
import uuid
from dataclasses import dataclass, replace

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsr_cli.formats.contract import DicomOutput
from medsr_cli.formats.dicom_identity import FreshIdentities, StableIdentities, fresh_uid, stable_uid
from tests.formats.dicom_makers import DERIVATION

VALID = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))*")
GRID = (64, 48, 128, 96, 0, 0)


@dataclass
class FakeMember:
    content: bytes

    def open(self):
        import io

        return io.BytesIO(self.content)


@dataclass
class FakeInstance:
    sop_instance: str = "1.2.3"
    member: FakeMember | None = None


@dataclass
class FakeFrame:
    instance: FakeInstance
    index: int = 0


FRAMES = [FakeFrame(FakeInstance(f"1.2.{at}")) for at in range(3)]


def check_valid(uid, version):
    assert len(uid) <= 64
    assert VALID.fullmatch(uid)
    assert pydicom.uid.UID(uid).is_valid
    assert uid.startswith("2.25.")
    parsed = uuid.UUID(int=int(uid[5:]))
    assert parsed.variant == uuid.RFC_4122  # the variant of RFC 4122 and 9562
    assert parsed.version == version


@given(st.lists(st.text(), min_size=1))
@settings(max_examples=300)
def test_stable_uids_are_valid_whatever_they_follow_from(parts):
    check_valid(stable_uid(*parts), 8)


def test_fresh_uids_are_valid():
    for _ in range(100):
        check_valid(fresh_uid(), 4)


def test_no_two_of_a_hundred_thousand_are_the_same():
    # Neighbours: one digit, one letter, the same letters divided otherwise.
    uids = {stable_uid("image", f"1.2.{at}", str(at % 7)) for at in range(90_000)}
    uids |= {stable_uid(*(f"{at:04x}"[:cut], f"{at:04x}"[cut:])) for at in range(2_500) for cut in range(4)}
    assert len(uids) == 100_000
    assert len({fresh_uid() for _ in range(10_000)}) == 10_000


def test_texts_divided_otherwise_are_other_texts():
    assert len({stable_uid("ab", "c"), stable_uid("a", "bc"), stable_uid("abc"), stable_uid("abc", "")}) == 4


def test_another_process_makes_the_same():
    code = (
        "from tests.formats.test_dicom_identity import FRAMES, GRID, FakeInstance;"
        "from tests.formats.dicom_makers import DERIVATION;"
        "from medsr_cli.formats.dicom_identity import StableIdentities;"
        "i = StableIdentities.derived(DERIVATION, GRID, FRAMES, 0);"
        "print(i.series(), i.image(FRAMES[1].instance, None), i.image(FRAMES[1].instance, 4))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = StableIdentities.derived(DERIVATION, GRID, FRAMES, 0)
    one = FRAMES[1].instance
    assert done.stdout.split() == [here.series(), here.image(one, None), here.image(one, 4)]


CHANGES = {
    "method": {"method": "rdst"},
    "scale": {"scale": (2.0, 3.0)},
    "version": {"software": "medsr 0.1.1"},
    "checkpoint": {"checkpoint_id": "other"},
    "sha256": {"checkpoint_sha256": "cd" * 32},
    "degradation": {"degradation": "other"},
    "settings": {"settings": "other"},
    "private": {"dicom": DicomOutput(private_tags="all")},
    "multiframe": {"dicom": DicomOutput(multiframe=True)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_result_decides_the_uid(change):
    def uids(derivation):
        made = StableIdentities.derived(derivation, GRID, FRAMES, 0)
        return {made.series(), made.study(), made.image(FRAMES[0].instance, None), made.concatenation("1.2")}

    assert len(uids(DERIVATION) | uids(replace(DERIVATION, **CHANGES[change]))) == 8


def test_sources_order_part_and_ordinal_decide_and_the_transfer_syntax_does_not():
    def series(derivation=DERIVATION, grid=GRID, frames=FRAMES, ordinal=0):
        return StableIdentities.derived(derivation, grid, frames, ordinal).series()

    packed = replace(DERIVATION, dicom=DicomOutput(transfer_syntax="rle", stable_uids=True))
    assert series() == series(packed)
    other = [
        series(frames=FRAMES[:2]), series(frames=FRAMES[::-1]), series(grid=(64, 48, 128, 96, 1, 0)),
        series(grid=(64, 48, 192, 144, 0, 0)), series(ordinal=1),
        series(frames=[FakeFrame(frame.instance, 1) for frame in FRAMES]),
    ]  # fmt: skip
    assert len({series(), *other}) == 7


def test_images_without_uids_are_told_by_their_bytes():
    def series(content):
        return StableIdentities.derived(
            DERIVATION, GRID, [FakeFrame(FakeInstance("", FakeMember(content)))], 0
        ).series()

    assert series(b"one") == series(b"one") != series(b"two")


def test_fresh_ones_differ_by_image_and_agree_on_what_is_shared():
    made = FreshIdentities()
    one = FakeInstance()
    assert made.series() == made.series() != FreshIdentities().series()
    assert made.image(one, 0) != made.image(one, 1)
    assert made.concatenation("1") == made.concatenation("1") != made.concatenation("2")
    assert not made.stable
