import io
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from medsr_cli.errors import InputRefused
from medsr_cli.training.pack import LEVELS, PackedSlices, PackedVolume, PackWriter
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
