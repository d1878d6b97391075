import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from medsr_cli.errors import InputRefused
from medsr_cli.training.pack import LEVELS, PackedSlices, PackedVolume, PackWriter, Planes
from tests.training.anatomy import packed


def volume(subject="a", name="a.nii"):
    return PackedVolume(subject, name, "0" * 64, 0.0, 1.0, spacing_mm=(1.0, 1.5), modality="mr")


def write(path, volumes):
    pixels = io.BytesIO()
    writer = PackWriter(pixels)
    kept = [writer.add(record, slices) for record, slices in volumes]
    with path.open("wb") as file:
        writer.finish(file)
    return kept


def test_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 9, 7)), rng.random((3, 5, 6))
    path = tmp_path / "p.safetensors"
    assert write(path, [(volume("a"), first), (volume("b", "b.nii"), second)]) == [2, 3]
    slices = PackedSlices(path)
    assert len(slices) == 5
    assert slices.subjects == ["a", "b"]
    assert list(slices.indices_of(["b"])) == [2, 3, 4]
    for index, original in enumerate([*first, *second]):
        assert slices.slice(index).shape == original.shape
        assert slices.slice(index) == pytest.approx(original, abs=0.51 / LEVELS)
    assert slices.volumes[0].spacing_mm == [1.0, 1.5]


def test_is_a_safetensors_file(tmp_path):
    path = packed(tmp_path / "p.safetensors", subjects=2)
    arrays = load_file(path)
    assert arrays["pixels"].dtype == np.uint16
    assert arrays["shapes"].tolist() == [[48, 40]] * 6
    assert arrays["volumes"].tolist() == [0, 0, 0, 1, 1, 1]


def test_crop_repeats_the_edge(tmp_path):
    path = tmp_path / "p.safetensors"
    image = np.arange(1, 13).reshape(1, 3, 4) / 12
    write(path, [(volume(), image)])
    crop = PackedSlices(path).crop(0, 1, 2, 4, 3)
    expected = np.pad(image[0, 1:, 2:], ((0, 2), (0, 1)), mode="edge")
    assert crop == pytest.approx(expected, abs=1 / LEVELS)


def test_empty_slices_and_volumes_are_left_out_and_odd_values_saturated(tmp_path):
    path = tmp_path / "p.safetensors"
    odd = np.array([[[np.nan, -1.0], [2.0, 0.5]]])
    zero = np.zeros((2, 2, 2))
    assert write(path, [(volume("zero"), zero), (volume("odd"), np.concatenate((zero, odd)))]) == [0, 1]
    slices = PackedSlices(path)
    assert slices.subjects == ["odd"]
    assert slices.slice(0).tolist() == [[0, 0], [1, pytest.approx(0.5, abs=1e-4)]]


def test_a_volume_that_fails_half_way_leaves_nothing(tmp_path):
    def torn():
        yield np.ones((4, 4))
        msg = "cut short"
        raise InputRefused(msg)

    pixels = io.BytesIO()
    writer = PackWriter(pixels)
    good = np.random.default_rng(0).random((1, 3, 3))
    with pytest.raises(InputRefused):
        writer.add(volume("torn"), torn())
    writer.add(volume("good"), good)
    path = tmp_path / "p.safetensors"
    with path.open("wb") as file:
        writer.finish(file)
    slices = PackedSlices(path)
    assert slices.subjects == ["good"]
    assert slices.slice(0) == pytest.approx(good[0], abs=1 / LEVELS)


def _edited(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


HOSTILE = {
    "no volumes": lambda h: h["__metadata__"].pop("volumes"),
    "no pixels": lambda h: h.pop("pixels"),
    "other type": lambda h: h["pixels"].update(dtype="F32"),
    "pixels beyond the file": lambda h: h["pixels"].update(shape=[10**9], data_offsets=[0, 2 * 10**9]),
    "shape and bytes differ": lambda h: h["pixels"].update(shape=[3]),
    "negative": lambda h: h["offsets"].update(data_offsets=[-8, 40]),
    "huge number": lambda h: h["pixels"].update(shape=[10**30], data_offsets=[0, 2 * 10**30]),
    "unknown field": lambda h: h["__metadata__"].update(volumes='[{"subject": "x", "nonsense": 1}]'),
    "fewer volumes than used": lambda h: h["__metadata__"].update(volumes="[]"),
    "slices beyond the pixels": lambda h: h["offsets"].update(data_offsets=h["shapes"]["data_offsets"], shape=[12]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused(tmp_path, change):
    path = packed(tmp_path / "p.safetensors", subjects=2)
    PackedSlices(path)
    _edited(path, change)
    with pytest.raises(InputRefused, match="packed slices"):
        PackedSlices(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"not a file"])
def test_other_bytes_are_refused(tmp_path, content):
    path = tmp_path / "p.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputRefused):
        PackedSlices(path)


def test_a_file_cut_short_is_refused(tmp_path):
    path = packed(tmp_path / "p.safetensors", subjects=2)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputRefused):
        PackedSlices(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputRefused, match=r"p\.safetensors"):
        PackedSlices(tmp_path / "p.safetensors")


# -- companions, channels and later versions ---------------------------------------------------------------


def with_companions(path):
    """Two volumes: one of three channels with everything, one grey with nothing; returns what went in."""
    rng = np.random.default_rng(1)
    full = [
        Planes(rng.random((3, 8, 6)), rng.random((8, 6)), rng.integers(0, 5, (8, 6)), rng.random((3, 4, 3)))
        for _ in range(2)
    ]
    grey = rng.random((1, 5, 7))
    record = PackedVolume(
        "a", "a.nii", "0" * 64, 0.0, 1.0, channels=3, ranges=[(0.0, 1.0)] * 3, labels="m.nii", label_values=[0, 1, 4],
        guide="g.nii", guide_range=(0.0, 2.0), low="l.nii", low_range=(0.0, 1.0), caption="a clear image",
    )  # fmt: skip
    write(path, [(record, full), (volume("b", "b.nii"), grey)])
    return full, grey


def test_companions_round_trip(tmp_path):
    path = tmp_path / "p.safetensors"
    full, grey = with_companions(path)
    slices = PackedSlices(path)
    assert (slices.version, slices.channels, len(slices)) == (2, 3, 3)
    assert slices.label_values == [0, 1, 4]
    assert slices.volumes[0].caption == "a clear image"
    for index, planes in enumerate(full):
        assert all(slices.has(role, index) for role in ("image", "guide", "labels", "low"))
        assert slices.slice(index) == pytest.approx(planes.image, abs=0.51 / LEVELS)
        assert slices.slice_of("guide", index) == pytest.approx(planes.guide[None], abs=0.51 / LEVELS)
        assert slices.slice_of("low", index) == pytest.approx(planes.low, abs=0.51 / LEVELS)
        assert (slices.labels_of(index) == planes.labels).all()
        assert slices.labels_of(index).dtype == np.int64
        assert slices.size_of("low", index) == (4, 3)
        crop = slices.crop_of("guide", index, 2, 1, 3, 4)
        assert crop == pytest.approx(planes.guide[None, 2:5, 1:5], abs=0.51 / LEVELS)
        labels = slices.labels(index, 6, 4, 4, 4)
        assert (labels == np.pad(planes.labels[6:, 4:], ((0, 2), (0, 2)), mode="edge")).all()
    assert slices.slice(2) == pytest.approx(np.repeat(grey, 3, axis=0), abs=0.51 / LEVELS)
    assert not slices.has("labels", 2)
    assert slices.has("labels")
    assert list(slices.with_role("guide", np.arange(3))) == [0, 1]
    with pytest.raises(KeyError):
        slices.slice_of("low", 2)


def test_slices_with_labels_are_those_that_have_some(tmp_path):
    path = tmp_path / "p.safetensors"
    image, empty = np.ones((4, 4)), np.zeros((4, 4), int)
    write(path, [(volume(), [Planes(image, labels=empty), Planes(image, labels=np.eye(4, dtype=int)), Planes(image)])])
    assert list(PackedSlices(path).labelled(np.arange(3))) == [1]


def test_files_of_version_1_are_read(tmp_path):
    path = packed(tmp_path / "p.safetensors", subjects=2)
    now = PackedSlices(path)
    volumes, images = now.volumes, [now.slice(index) for index in range(len(now))]
    del now

    def as_before(header):
        header["__metadata__"]["medsr.format"] = "1"
        for name in ("guides", "labels", "lows", "low_shapes"):
            header.pop(name)

    _edited(path, as_before)
    before = PackedSlices(path)
    assert before.version == 1
    assert before.volumes == volumes
    assert not any(before.has(role) for role in ("guide", "labels", "low"))
    for index, image in enumerate(images):
        assert (before.slice(index) == image).all()


def test_a_later_version_says_so(tmp_path):
    path = packed(tmp_path / "p.safetensors", subjects=2)
    _edited(path, lambda header: header["__metadata__"].update({"medsr.format": "3"}))
    with pytest.raises(InputRefused, match="later medsr"):
        PackedSlices(path)


def _in_volumes(**fields):
    def change(header):
        volumes = json.loads(header["__metadata__"]["volumes"])
        volumes[0].update(fields)
        header["__metadata__"]["volumes"] = json.dumps(volumes)

    return change


HOSTILE_COMPANIONS = {
    "no guides": lambda h: h.pop("guides"),
    "labels beyond the pixels": lambda h: h.update(labels=h["volumes"], guides=h["offsets"], lows=h["offsets"]),
    "low of another length": lambda h: h["low_shapes"].update(shape=[6, 1]),
    "too many channels": _in_volumes(channels=65),
    "channels that the pixels have not": _in_volumes(channels=64),
    "channels as text": _in_volumes(channels="3"),
    "channels of two kinds": lambda h: h["__metadata__"].update(
        volumes=h["__metadata__"]["volumes"].replace('"name": "b.nii"', '"name": "b.nii", "channels": 2')
    ),
    "a name that is none": _in_volumes(name=7),
    "a range that is none": _in_volumes(minimum="a"),
    "a range of one": _in_volumes(guide_range=[1]),
    "labels that are none": _in_volumes(label_values=[-1]),
    "not a number": _in_volumes(maximum=float("nan")),
    "no version": lambda h: h["__metadata__"].update({"medsr.format": "0"}),
}


@pytest.mark.parametrize("change", HOSTILE_COMPANIONS.values(), ids=HOSTILE_COMPANIONS.keys())
def test_hostile_companions_are_refused(tmp_path, change):
    path = tmp_path / "p.safetensors"
    with_companions(path)
    PackedSlices(path)
    _edited(path, change)
    with pytest.raises(InputRefused, match="packed slices"):
        PackedSlices(path)


ENTRIES = st.sampled_from([-(2**63), -2, -1, 0, 1, 5, 143, 2**24, 2**24 + 1, 2**40, 2**62, 2**63 - 1])


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.integers(0, 26), ENTRIES, min_size=1, max_size=4))
def test_whatever_the_tables_say_nothing_outside_is_read(tmp_path, entries):
    """Numbers of the tables are overwritten: the file is refused, or all that is read is inside of it."""
    path = tmp_path / "p.safetensors"
    with_companions(path)
    data = bytearray(path.read_bytes())
    tables = len(data) - 3 * 9 * 8
    for place, value in entries.items():
        data[tables + 8 * place : tables + 8 * place + 8] = value.to_bytes(8, "little", signed=True)
    path.write_bytes(data)
    try:
        slices = PackedSlices(path)
    except InputRefused:
        return
    for index in range(len(slices)):
        assert slices.slice(index).shape[-2:] == slices.size_of("image", index)
        for role in ("guide", "low"):
            if slices.has(role, index):
                assert slices.slice_of(role, index).shape[-2:] == slices.size_of(role, index)
        if slices.has("labels", index):
            assert slices.labels_of(index).shape == slices.size_of("image", index)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 1 << 30), st.binary(min_size=1, max_size=3))
def test_whatever_the_header_says_nothing_else_escapes(tmp_path, place, written):
    path = tmp_path / "p.safetensors"
    with_companions(path)
    data = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(data[:8], "little")
    start = place % length
    data[start : start + len(written)] = written
    path.write_bytes(data)
    with contextlib.suppress(InputRefused):
        slices = PackedSlices(path)
        for index in range(len(slices)):
            slices.slice(index)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_every_crop_is_that_of_the_padded_plane(tmp_path, data):
    path = tmp_path / "p.safetensors"
    full, _ = with_companions(path)
    slices = PackedSlices(path)
    role = data.draw(st.sampled_from(["image", "guide", "low"]))
    height, width = slices.size_of(role, 0)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    plane = {"image": full[0].image, "guide": full[0].guide[None], "low": full[0].low}[role]
    padded = np.pad(plane, ((0, 0), (0, 24), (0, 24)), mode="edge")[:, top : top + rows, left : left + columns]
    assert slices.crop_of(role, 0, top, left, rows, columns) == pytest.approx(padded, abs=0.51 / LEVELS)


def test_an_image_of_other_channels_than_said_is_an_error_and_leaves_nothing(tmp_path):
    pixels = io.BytesIO()
    writer = PackWriter(pixels)
    with pytest.raises(ValueError, match="channels"):
        writer.add(volume(), [np.ones((2, 4, 4))])
    assert pixels.tell() == 0
