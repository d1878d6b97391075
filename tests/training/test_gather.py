import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medsr_cli.errors import ArgumentsError, InputRefused, unmarked
from medsr_cli.training.companions import Rules, attach
from medsr_cli.training.gather import (
    Found,
    content_sha256,
    find_tree,
    is_label_name,
    pack_images,
    split_subjects,
    subject_of,
)
from medsr_cli.training.pack import LEVELS, PackedSlices
from medsr_cli.training.reading import PackOptions
from medsr_cli.training.sessions import persons_of
from medsr_cli.volume.volume import Volume
from tests.training.anatomy import phantom


class ArrayReader:
    """A reader of .npy files (slices, channels, rows, columns)."""

    def __init__(self, path, **facts):
        self.path = path
        try:
            self.array = np.load(path)
        except ValueError as error:
            raise InputRefused(f"{path.name} is damaged.") from error
        n, channels, rows, columns = self.array.shape
        self.volume = Volume("npy", rows, columns, n, self.array.dtype, channels, **facts)

    def slices(self):
        for pixels in self.array:
            if pixels.dtype.kind == "f" and (pixels == 1e6).any():
                raise InputRefused(f"{self.path.name} is cut short.")
            yield pixels

    def details(self):
        return {}


class Ear:
    def __init__(self):
        self.notes, self.progress = [], []

    def note(self, sentence):
        self.notes.append(sentence)

    def packing(self, done, total):
        self.progress.append((done, total))


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array if array.ndim == 4 else array[:, None])
    return path


def is_npy(path):
    if path.is_dir():
        return any(file.suffix == ".dcm" for file in path.iterdir())
    return path.suffix == ".npy"


def pack(found, target, ear=None, **facts):
    return pack_images(found, lambda image: ArrayReader(image.path, **facts), target, ear or Ear())


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("p1/t1.nii.gz", "p1"),
        ("p1/week2/t1.nii.gz", "p1"),
        ("scan7.nii.gz", "scan7"),
        ("sub-01/anat/sub-01_T1w.nii.gz", "sub-01"),
        ("derivatives/tool/sub-01/anat/x.nii.gz", "sub-01"),
        ("sub-02_T1w.nii.gz", "sub-02"),
        ("sub-02_T2w.nii.gz", "sub-02"),
        ("subdural/x.nii", "subdural"),
    ],
)
def test_subjects(name, subject):
    assert subject_of(name) == subject


@pytest.mark.parametrize(
    "name", ["mask.nii", "p1_brainmask.nii.gz", "a_dseg.nii", "T1-label.nrrd", "labels.nii", "aseg.mgz"]
)
def test_label_names(name):
    assert is_label_name(name)


@pytest.mark.parametrize(
    "name", ["T1w.nii", "OAS1_0001_MR1_t88_masked_gfc.img", "totalsegment.nii", "unmasked.nii", "labelled_x.png"]
)
def test_image_names(name):
    assert not is_label_name(name)


def test_finds_images_in_order_and_says_what_it_passed_over(tmp_path):
    for name in ("b/2.npy", "b/1.npy", "a/x_mask.npy", "a/x.npy", "a/notes.txt", ".hidden/y.npy", "a/.z.npy"):
        save(tmp_path / name, np.zeros((1, 4, 4))) if name.endswith("npy") else (tmp_path / name).write_text("")
    tree = find_tree(tmp_path, is_npy)
    assert [image.name for image in tree.images] == ["a/x.npy", "b/1.npy", "b/2.npy"]
    assert [mask.name for mask in tree.labels] == ["a/x_mask.npy"]
    skipped = attach(tree, Rules(labels=False), lambda image: ArrayReader(image.path)).skipped
    assert len(skipped) == 1
    assert "x_mask.npy" in skipped[0]


def test_patterns(tmp_path):
    for name in ("a/t1.npy", "a/t2.npy", "b/t1.npy", "b/t1_mask.npy"):
        save(tmp_path / name, np.zeros((1, 4, 4)))

    def names(**patterns):
        tree = find_tree(tmp_path, is_npy, **patterns)
        masks = [mask.name for mask in tree.labels]
        return [image.name for image in tree.images] + masks

    assert names(include=["*t1*"]) == ["a/t1.npy", "b/t1.npy", "b/t1_mask.npy"]
    assert names(include=["*t2*"]) == ["a/t2.npy", "b/t1_mask.npy"]
    assert [image.name for image in find_tree(tmp_path, is_npy, ["*t2*"]).others] == ["a/t1.npy", "b/t1.npy"]
    assert names(exclude=["t1.npy", "*_mask*"]) == ["a/t2.npy"]
    assert names(exclude=["b/*"]) == ["a/t1.npy", "a/t2.npy"]
    assert names(include=["*t1*"], exclude=["*_mask*"]) == ["a/t1.npy", "b/t1.npy"]


def test_a_folder_of_dicom_is_one_image_or_as_many_as_it_has_series(tmp_path):
    for name in ("p1/a/1.dcm", "p1/a/2.dcm", "p2/1.dcm", "p3/1.dcm", "p3/scan.npy"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")

    def series_of(path):
        if path.name == "p2":
            raise InputRefused("p2 is damaged.")
        return ["1.2", "1.3"] if path.name == "p3" else ["1.1"]

    found = find_tree(tmp_path, is_npy, series_of=series_of).images
    assert [(image.name, image.subject, image.series) for image in found] == [
        ("p1/a", "p1", None),
        ("p2", "p2", None),
        ("p3/scan.npy", "p3", None),
        ("p3#1", "p3", "1.2"),
        ("p3#2", "p3", "1.3"),
    ]


@pytest.mark.parametrize(
    ("folders", "persons"),
    [
        ("p01_s1 p01_s2 p02_s1", {"p01": ["p01_s1", "p01_s2"]}),
        ("ann_ses-1 ann_ses-02 bob-session2 bob-session3", {"ann": ["ann_ses-02", "ann_ses-1"], "bob": 2}),
        ("ann_visit1 ann_Visit_2 p3_tp1 p3_tp2", {"ann": 2, "p3": 2}),
        ("p1_a_s1x p1_s1 p1_s2", {}),  # p1 has something that is no session
        ("p1 p1_s1 p1_s2", {}),
        ("p1 p10_s1 p10_s2", {"p10": 2}),
        ("control_s1 control_s2", {}),  # s may be a subject
        ("case_1 case_2 week2 week3 s1 s2 p_s001 p_s002", {}),
        ("p1_s1234 p1_s1235", {}),
    ],
)
def test_folders_that_differ_by_a_session_are_one_person(folders, persons):
    found = persons_of(folders.split())
    assert set(found.values()) == set(persons)
    for person, sessions in persons.items():
        own = sorted(folder for folder, name in found.items() if name == person)
        assert own == sessions or len(own) == sessions


def test_one_person_is_on_one_side_of_the_split(tmp_path):
    patients = [f"ms_p{n:02}" for n in range(9)]
    for n, patient in enumerate(patients):
        for session in (1, 2):
            save(tmp_path / f"{patient}_s{session}" / "t1.npy", phantom(10 * n + session, 1, 20, 20))
            save(tmp_path / f"{patient}_s{session}" / "mask.npy", np.zeros((1, 4, 4)))
    (tmp_path / "other_s1").mkdir()
    (tmp_path / "other_s1" / "1.dcm").write_bytes(b"")
    tree = find_tree(tmp_path, is_npy)
    assert list(map(unmarked, tree.notes)) == [
        "ms_p00_s1 and ms_p00_s2 are taken as one subject, and so are the sessions of 8 others."
    ]
    assert {image.subject for image in tree.labels} == set(patients)
    assert {image.subject for image in tree.images} == {*patients, "other_s1"}
    assert attach(tree, Rules(labels=False), lambda image: ArrayReader(image.path)).notes == tree.notes
    pack([image for image in tree.images if image.subject != "other_s1"], tmp_path / "p")
    train, held = split_subjects(PackedSlices(tmp_path / "p").subjects)
    assert sorted(train + held) == patients


def test_sessions_of_dicom_files_are_one_person_and_flat_files_are_not(tmp_path):
    for name in ("p1_visit1/1.dcm", "p1_visit2/1.dcm"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    for name in ("p2_s1.npy", "p2_s2.npy"):
        save(tmp_path / name, np.zeros((1, 4, 4)))
    series = ["1.1", "1.2"]
    tree = find_tree(tmp_path, is_npy, series_of=lambda path: series)
    assert sorted(image.subject for image in tree.images) == ["p1"] * 4 + ["p2_s1", "p2_s2"]
    assert list(map(unmarked, tree.notes)) == ["p1_visit1 and p1_visit2 are taken as one subject."]


@pytest.mark.parametrize("n", [2, 3, 7, 20, 61])
def test_the_split_shares_no_subject_and_stays(n):
    subjects = [f"s{i}" for i in range(n)]
    train, held = split_subjects(subjects)
    assert sorted(train + held) == sorted(subjects)
    assert len(held) == max(round(0.15 * n), 1)
    assert split_subjects(subjects[::-1])[1] == held


def test_a_chosen_split():
    subjects = ["a", "b1", "b2"]
    assert split_subjects(subjects, ["b*"]) == (["a"], ["b1", "b2"])
    assert split_subjects(["a", "val/a"]) == (["a"], ["val/a"])
    with pytest.raises(ArgumentsError, match="0 to validate on"):
        split_subjects(subjects, ["c"])
    with pytest.raises(ArgumentsError, match="0 subjects to train on"):
        split_subjects(subjects, ["*"])
    with pytest.raises(InputRefused, match="at least two"):
        split_subjects(["a"])


def test_values_are_scaled_by_volume_not_by_slice(tmp_path):
    image = phantom(0)
    image[1] *= 0.5
    path = save(tmp_path / "a.npy", (image - 300).astype(np.int16))
    gathered = pack([Found(path, "a", "a.npy")], tmp_path / "p.safetensors", spacing_mm=(0.5, 0.75), modality="mr")
    assert (gathered.volumes, gathered.slices, gathered.skipped) == (1, 3, [])
    slices = PackedSlices(tmp_path / "p.safetensors")
    stored = np.stack([slices.slice(i) for i in range(3)])
    array = np.load(path)[:, 0].astype(float)
    assert stored == pytest.approx((array - array.min()) / np.ptp(array), abs=1 / LEVELS)
    record = slices.volumes[0]
    assert (record.minimum, record.maximum) == (array.min(), array.max())
    assert (record.sha256, record.spacing_mm, record.modality) == (content_sha256(path), [0.5, 0.75], "mr")


def test_padding_does_not_stretch_the_range(tmp_path):
    image = phantom(0).astype(np.int16)
    image[:, :5] = -3000
    path = save(tmp_path / "a.npy", image)
    pack([Found(path, "a", "a.npy")], tmp_path / "p.safetensors", padding=-3000.0)
    slices = PackedSlices(tmp_path / "p.safetensors")
    assert slices.volumes[0].minimum >= 0
    assert (slices.slice(0)[:5] == 0).all()


def test_colours_become_their_mean_without_opacity(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, 4, 20, 20)).astype(np.uint8)
    path = save(tmp_path / "a.npy", image)
    ear = Ear()
    pack([Found(path, "a", "a.npy")], tmp_path / "p.safetensors", ear, alpha=True)
    assert ear.notes == ["The colours of 1 volumes were averaged to grey."]
    grey = image[0, :3].mean(axis=0)
    assert PackedSlices(tmp_path / "p.safetensors").slice(0) == pytest.approx(
        (grey - grey.min()) / np.ptp(grey), abs=1e-4
    )


def test_what_cannot_be_trained_on_is_left_out_with_a_reason(tmp_path):
    good = phantom(0)
    torn = good.copy()
    torn[2, 0, 0] = 1e6
    labels = np.arange(4).repeat(400).reshape(1, 40, 40).astype(np.int16)
    paths = {
        "constant": save(tmp_path / "constant.npy", np.full((2, 20, 20), 7.0)),
        "label": save(tmp_path / "painted.npy", labels),
        "small": save(tmp_path / "small.npy", good[:, :15, :15]),
        "torn": save(tmp_path / "torn.npy", torn),
        "good": save(tmp_path / "good.npy", good),
        "not_finite": save(tmp_path / "nan.npy", np.full((1, 20, 20), np.nan)),
    }
    shutil.copy(paths["good"], tmp_path / "copy.npy")
    paths["copy"] = tmp_path / "copy.npy"
    paths["damaged"] = tmp_path / "damaged.npy"
    paths["damaged"].write_bytes(b"not numpy")
    ear = Ear()
    found = [Found(path, key, path.name) for key, path in paths.items()]
    gathered = pack(found, tmp_path / "p.safetensors", ear)
    assert PackedSlices(tmp_path / "p.safetensors").subjects == ["good"]
    assert gathered.skipped == ear.notes
    reasons = {note.split(" ")[0]: note for note in map(unmarked, ear.notes)}
    for name, words in {
        "constant.npy": "all its pixels are equal",
        "painted.npy": "4 distinct values",
        "small.npy": "15 x 15 pixels",
        "torn.npy": "cut short",
        "copy.npy": "same image as good.npy",
        "damaged.npy": "damaged",
        "nan.npy": "all its pixels are equal",
    }.items():
        assert words in reasons[name]
    assert ear.progress[-1] == (8, 8)
    assert str(tmp_path) not in "".join(ear.notes)


def test_a_copy_of_a_validation_image_is_not_trained_on(tmp_path):
    path = save(tmp_path / "train" / "a.npy", phantom(0))
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    found = [
        Found(path, "a", "a.npy"),
        Found(save(tmp_path / "train" / "b.npy", phantom(1)), "b", "b.npy"),
        Found(tmp_path / "val" / "a.npy", "z", "a.npy", validation=True),
    ]
    pack(found, tmp_path / "p.safetensors")
    slices = PackedSlices(tmp_path / "p.safetensors")
    assert slices.subjects == ["val/z", "b"]
    assert [volume.validation for volume in slices.volumes] == [True, False]


def test_nothing_usable_is_refused_and_leaves_nothing(tmp_path):
    path = save(tmp_path / "a.npy", np.zeros((2, 20, 20)))
    target = tmp_path / "out" / "p.safetensors"
    with pytest.raises(InputRefused, match="None of the 1 images"):
        pack([Found(path, "a", "a.npy")], target)
    assert list(target.parent.iterdir()) == []


def test_the_hash_of_a_folder_follows_its_files(tmp_path):
    folder = tmp_path / "series"
    folder.mkdir()
    Path(folder, "1").write_bytes(b"one")
    first = content_sha256(folder)
    Path(folder, "2").write_bytes(b"two")
    assert content_sha256(folder) != first


def test_the_hash_of_a_header_follows_its_pixels(tmp_path):
    (tmp_path / "a.hdr").write_bytes(b"header")
    (tmp_path / "a.img").write_bytes(b"pixels")
    (tmp_path / "b.img").write_bytes(b"others")
    first = content_sha256(tmp_path / "a.hdr")
    (tmp_path / "b.img").write_bytes(b"changed")
    assert content_sha256(tmp_path / "a.hdr") == first
    (tmp_path / "a.img").write_bytes(b"changed")
    assert content_sha256(tmp_path / "a.hdr") != first


# -- companions, channels, room ----------------------------------------------------------------------------


def image_file(path, seed=0, **kind):
    return Found(save(path, kind.get("array", phantom(seed).astype(np.int16))), path.stem, path.name)


def test_a_tree_keeps_masks_apart(tmp_path):
    for name in ("a/x.npy", "a/x_mask.npy", "b/y.npy", "b/lesion_mask.npy"):
        save(tmp_path / name, np.zeros((1, 4, 4)))
    tree = find_tree(tmp_path, is_npy, include=["x*"], exclude=["b/*mask*"])
    assert [image.name for image in tree.images] == ["a/x.npy"]
    assert [mask.name for mask in tree.labels] == ["a/x_mask.npy"]


def test_companions_are_packed_slice_by_slice(tmp_path):
    labels = np.random.default_rng(0).integers(0, 4, (3, 48, 40)).astype(np.uint8)
    guide = phantom(5) + 50
    low = phantom(0)[:, ::2, ::2].astype(np.int16)
    found = replace(
        image_file(tmp_path / "a.npy"),
        labels=Found(save(tmp_path / "a_mask.npy", labels), "a", "a_mask.npy"),
        guide=Found(save(tmp_path / "g.npy", guide), "a", "g.npy"),
        low=Found(save(tmp_path / "l.npy", low), "a", "l.npy"),
        caption="clear",
    )
    ear = Ear()
    gathered = pack([found], tmp_path / "p.safetensors", ear)
    assert (gathered.labels, gathered.guides, gathered.lows) == (1, 1, 1)
    slices = PackedSlices(tmp_path / "p.safetensors")
    record = slices.volumes[0]
    assert (record.labels, record.guide, record.low, record.caption) == ("a_mask.npy", "g.npy", "l.npy", "clear")
    assert list(record.label_values) == [0, 1, 2, 3]
    assert record.guide_range == pytest.approx([guide.min(), guide.max()])
    for k in range(3):
        assert (slices.labels_of(k) == labels[k]).all()
        assert slices.slice_of("guide", k)[0] == pytest.approx((guide[k] - guide.min()) / np.ptp(guide), abs=1e-4)
        # Values of one scale: the range of the high-resolution image, so that both agree.
        assert slices.slice_of("low", k)[0] == pytest.approx(slices.slice(k)[::2, ::2], abs=1e-4)
    assert "1 images have a guide." in ear.notes


def test_a_mirrored_low_resolution_image_leaves_its_image_out(tmp_path):
    low = phantom(0)[:, ::2, ::2]
    pairs = {"right": low, "down": low[:, ::-1], "across": low[:, :, ::-1], "reverse": low[::-1]}
    found = [
        replace(
            Found(save(tmp_path / name / "a.npy", phantom(0) + k), name, f"{name}/a.npy"),
            low=Found(save(tmp_path / name / "l.npy", pixels + k), name, f"{name}/l.npy"),
        )
        for k, (name, pixels) in enumerate(pairs.items())
    ]
    gathered = pack(found, tmp_path / "p.safetensors")
    assert (gathered.volumes, gathered.lows) == (1, 1)
    ways = ("upside down", "left to right", "in the reverse order of slices")
    assert list(map(unmarked, gathered.skipped)) == [
        f"{name}/a.npy was left out: its low-resolution partner l.npy fits better {how}, so the two are not of one "
        "orientation."
        for name, how in zip(("down", "across", "reverse"), ways, strict=True)
    ]


def test_a_pipe_is_no_image(tmp_path):
    save(tmp_path / "a.npy", phantom(0))
    os.mkfifo(tmp_path / "b.npy")
    assert [image.name for image in find_tree(tmp_path, is_npy).images] == ["a.npy"]


def test_a_copy_is_told_by_its_path(tmp_path):
    found = [Found(save(tmp_path / s / "T2.npy", phantom(0)), s, f"{s}/T2.npy") for s in "ab"]
    gathered = pack(found, tmp_path / "p.safetensors")
    assert list(map(unmarked, gathered.skipped)) == ["b/T2.npy was left out: it is the same image as a/T2.npy."]
    held = [replace(found[0], validation=True), found[0]]
    gathered = pack(held, tmp_path / "q.safetensors")
    assert list(map(unmarked, gathered.skipped)) == [
        "a/T2.npy was left out: it is the same image as a/T2.npy (to validate on)."
    ]


def test_a_low_resolution_image_of_other_values_has_its_own_range(tmp_path):
    low = phantom(0)[:, ::2, ::2] / 4096
    found = replace(image_file(tmp_path / "a.npy"), low=Found(save(tmp_path / "l.npy", low), "a", "l.npy"))
    ear = Ear()
    pack([found], tmp_path / "p.safetensors", ear)
    slices = PackedSlices(tmp_path / "p.safetensors")
    assert slices.volumes[0].low_range == pytest.approx([low.min(), low.max()])
    assert any("its own range" in note for note in ear.notes)


def test_painted_masks_become_ones(tmp_path):
    mask = np.zeros((3, 48, 40), np.uint8)
    mask[1, 5:9, 6:8] = 255
    found = replace(image_file(tmp_path / "a.npy"), labels=Found(save(tmp_path / "m_mask.npy", mask), "a", "m"))
    ear = Ear()
    pack([found], tmp_path / "p.safetensors", ear)
    slices = PackedSlices(tmp_path / "p.safetensors")
    assert (slices.labels_of(1) == (mask[1] > 0)).all()
    assert slices.label_values == [0, 1]
    assert any("0 and 255" in note for note in ear.notes)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.full((3, 48, 40), -1, np.int16), "whole numbers"),
        (np.full((3, 48, 40), 0.5), "whole numbers"),
        (np.full((3, 48, 40), np.nan), "NaN"),
        (np.arange(3 * 48 * 40, dtype=np.int16).reshape(3, 48, 40), "distinct values"),
    ],
)
def test_what_is_no_label_map_is_told_and_the_image_is_kept(tmp_path, mask, words):
    found = replace(image_file(tmp_path / "a.npy"), labels=Found(save(tmp_path / "m_mask.npy", mask), "a", "m"))
    ear = Ear()
    gathered = pack([found], tmp_path / "p.safetensors", ear)
    assert (gathered.volumes, gathered.labels) == (1, 0)
    assert words in gathered.skipped[0]
    assert gathered.skipped[0] in ear.notes


def test_an_image_whose_guide_is_damaged_is_left_out(tmp_path):
    (tmp_path / "g.npy").write_bytes(b"not numpy")
    found = replace(image_file(tmp_path / "a.npy"), guide=Found(tmp_path / "g.npy", "a", "g.npy"))
    flat = replace(
        image_file(tmp_path / "c.npy", 2), guide=Found(save(tmp_path / "f.npy", np.ones((3, 48, 40))), "c", "f.npy")
    )
    gathered = pack([found, flat, image_file(tmp_path / "b.npy", 1)], tmp_path / "p.safetensors")
    assert PackedSlices(tmp_path / "p.safetensors").subjects == ["b"]
    assert ["damaged" in s or "f.npy cannot be used" in unmarked(s) for s in gathered.skipped] == [True, True]


def colour(seed):
    return np.random.default_rng(seed).integers(0, 250, (1, 3, 20, 20)).astype(np.uint8)


def test_colours_are_kept_where_asked_for_and_grey_is_repeated(tmp_path):
    found = [
        image_file(tmp_path / "a.npy", array=colour(0)),
        image_file(tmp_path / "b.npy", array=colour(1)[:, 0]),
    ]
    options = PackOptions(channels=3, full_scale=True)
    pack_images(found, lambda image: ArrayReader(image.path), tmp_path / "p.safetensors", Ear(), options=options)
    slices = PackedSlices(tmp_path / "p.safetensors")
    assert slices.channels == 3
    assert slices.slice(0) == pytest.approx(colour(0)[0] / 255, abs=1e-4)
    assert slices.slice(1) == pytest.approx(np.repeat(colour(1)[:, 0], 3, axis=0) / 255, abs=1e-4)
    assert (slices.volumes[0].minimum, slices.volumes[0].maximum) == (0.0, 255.0)


def test_contrasts_become_channels_each_with_its_range(tmp_path):
    first, second = phantom(0).astype(np.int16), (7 * phantom(1)).astype(np.int16)
    found = replace(
        image_file(tmp_path / "a.npy", array=first),
        contrasts=(Found(save(tmp_path / "b.npy", second), "a", "b.npy"),),
    )
    pack([found], tmp_path / "p.safetensors")
    slices = PackedSlices(tmp_path / "p.safetensors")
    assert slices.channels == 2
    for k in range(3):
        for plane, image in zip(slices.slice(k), (first, second), strict=True):
            assert plane == pytest.approx((image[k] - image.min()) / np.ptp(image), abs=1e-4)
    assert slices.volumes[0].ranges == [[first.min(), first.max()], [second.min(), second.max()]]


def test_mixed_channels_are_refused(tmp_path):
    pair = replace(
        image_file(tmp_path / "a.npy"), contrasts=(Found(save(tmp_path / "b.npy", phantom(1)), "a", "b.npy"),)
    )
    single = image_file(tmp_path / "c.npy", 2)
    with pytest.raises(InputRefused, match="Channels are mixed"):
        pack([pair, single], tmp_path / "p.safetensors")
    two = image_file(tmp_path / "d.npy", array=colour(0)[:, :2])
    with pytest.raises(InputRefused, match="Channels are mixed"):
        pack_images(
            [two], lambda image: ArrayReader(image.path), tmp_path / "p.safetensors", Ear(),
            options=PackOptions(channels=3),
        )  # fmt: skip
    coloured = replace(
        image_file(tmp_path / "e.npy", array=colour(1)[:, 0]),
        contrasts=(Found(save(tmp_path / "f.npy", colour(0)), "e", "f"),),
    )
    with pytest.raises(InputRefused, match="Channels are mixed"):
        pack([coloured], tmp_path / "p.safetensors")
    assert not (tmp_path / "p.safetensors").exists()


def test_too_full_a_disk_is_told_before_a_pixel_is_read(tmp_path, monkeypatch):
    read = []

    class Headers(ArrayReader):
        def slices(self):
            read.append(self.path)
            return super().slices()

    found = [image_file(tmp_path / "a.npy", array=np.random.default_rng(0).random((4, 250, 250)))]
    needed = 2 * 2 * 4 * 250 * 250  # uint16, and once more while it is written
    target = tmp_path / "p.safetensors"
    for free, enough in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(1, 1, free))
        if enough:
            pack_images(found, lambda image: Headers(image.path), target, Ear())
            assert target.stat().st_size <= needed / 2 + 2000
        else:
            with pytest.raises(InputRefused, match="GB are free"):
                pack_images(found, lambda image: Headers(image.path), target, Ear())
            assert read == []
