from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from medsr_cli import formats
from medsr_cli.errors import ArgumentsError, InputRefused, unmarked
from medsr_cli.training.companions import Rules, attach, in_brief, is_called, misfit
from medsr_cli.training.gather import Found, find_tree, pack_images, subject_of
from medsr_cli.training.own_results import is_own_result
from medsr_cli.training.pack import PackedSlices
from medsr_cli.training.partners import chosen_slices, fits_mirrored, misplaced
from medsr_cli.training.reading import PackOptions
from medsr_cli.volume.volume import Volume

TRAIN = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "train"


def grid(rows=40, columns=30, slices=5, origin=(0.0, 0.0, 0.0), step=1.0, **fields):
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = origin
    fields = {"affine": affine, "array_shape": (columns, rows, slices), **fields}
    return Volume("nifti", rows, columns, slices, np.dtype(np.int16), **fields)


def picture(rows=40, columns=30):
    return Volume("png", rows, columns, 1, np.dtype(np.uint8), array_shape=(rows, columns))


class Headers:
    """A folder of headers by name; files named in `broken` cannot be opened."""

    def __init__(self, root, volumes):
        self.root, self.volumes = root, volumes
        for name in volumes:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"")

    def __call__(self, found):
        volume = self.volumes[found.path.relative_to(self.root).as_posix()]
        if volume is None:
            raise InputRefused(f"{found.path.name} is damaged.")
        return type("Reader", (), {"volume": volume, "path": found.path})()

    def attach(self, folder=".", **rules):
        attached = attach(find_tree(self.root / folder, formats.is_image_name), Rules(**rules), self)
        for said in (attached.skipped, attached.notes):
            said[:] = map(unmarked, said)
        return attached


def masks(attached):
    return {image.name: image.labels.name for image in attached.images if image.labels}


def guides(attached):
    return {image.name: image.guide.name for image in attached.images}


# -- masks -------------------------------------------------------------------------------------------------


def test_a_mask_named_after_an_image_is_that_images(tmp_path):
    names = ["a/005.png", "a/0059.png", "a/0059_lv_mask.png", "a/0060.png", "a/0061_mask.png", "b/0059.png"]
    attached = Headers(tmp_path, dict.fromkeys(names, picture())).attach()
    assert masks(attached) == {"a/0059.png": "a/0059_lv_mask.png"}
    assert len(attached.images) == 4
    assert attached.skipped == ["a/0061_mask.png is not used: it fits no image by name and grid."]


def test_a_mask_is_not_that_of_another_image_because_its_own_was_not_asked_for(tmp_path):
    names = ["a/0059.png", "a/0060.png", "a/0060_lv_mask.png"]
    headers = Headers(tmp_path, dict.fromkeys(names, picture()))
    attached = attach(find_tree(tmp_path, formats.is_image_name, ["*/0059.png"]), Rules(), headers)
    assert [image.name for image in attached.images] == ["a/0059.png"]
    assert masks(attached) == {}
    assert attached.skipped == []


def test_files_left_out_are_told_in_brief():
    assert in_brief(["a", "b"]) == ["a", "b"]
    assert in_brief(["a", "b", "c", "d", "e"]) == ["a", "b", "c", "2 more were left out or are not used."]


def test_a_mask_of_its_own_name_is_that_of_all_images_on_its_grid(tmp_path):
    volumes = {"p/T1.nii.gz": grid(), "p/T2.nii.gz": grid(), "p/raw.nii.gz": grid(41), "q/T1.nii.gz": grid()}
    attached = Headers(tmp_path, {**volumes, "p/lesion_mask.nii.gz": grid()}).attach()
    assert masks(attached) == dict.fromkeys(["p/T1.nii.gz", "p/T2.nii.gz"], "p/lesion_mask.nii.gz")
    assert len(attached.images) == 4
    assert attached.skipped == []


def test_a_mask_elsewhere_is_told_and_not_used(tmp_path):
    for wrong, words in ((grid(origin=(0, 0, 1.0)), "another place"), (grid(39), "39 x 30 x 5 voxels")):
        attached = Headers(tmp_path, {"p/T1.nii": grid(), "p/T1_mask.nii": wrong}).attach()
        assert masks(attached) == {}
        assert len(attached.images) == 1
        assert words in attached.skipped[0]
    attached = Headers(tmp_path, {"p/T1.nii": grid(), "p/T1_mask.nii": None}).attach()
    assert "damaged" in attached.skipped[0]


def test_of_two_masks_the_one_named_after_the_image_is_taken_and_patterns_choose(tmp_path):
    names = ["p/T1.nii", "p/T2.nii", "p/T1_seg.nii", "p/brain_mask.nii", "p/lesion_mask.nii"]
    headers = Headers(tmp_path, dict.fromkeys(names, grid()))
    attached = headers.attach()
    assert masks(attached) == {"p/T1.nii": "p/T1_seg.nii", "p/T2.nii": "p/brain_mask.nii"}
    assert attached.skipped == ["p/lesion_mask.nii is not used: its images have another mask already."]
    chosen = headers.attach(label_names=["lesion*"])
    assert set(masks(chosen).values()) == {"p/lesion_mask.nii"}
    without = headers.attach(labels=False)
    assert masks(without) == {}
    assert len(without.skipped) == 3


def test_masks_of_bids(tmp_path):
    names = [
        "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_dseg.nii.gz",
        "sub-02/anat/sub-02_T1w.nii.gz",
        "sub-02/anat/sub-02_T2w.nii.gz",
        "sub-02/anat/sub-02_T2w_mask.nii.gz",
        "derivatives/m/sub-01/ses-1/anat/sub-01_ses-1_desc-lesion_mask.nii.gz",
    ]
    attached = Headers(tmp_path, dict.fromkeys(names, grid())).attach()
    assert masks(attached) == {names[0]: names[6], names[1]: names[2], names[4]: names[5]}
    assert {image.subject for image in attached.images} == {"sub-01", "sub-02"}


# -- guides ------------------------------------------------------------------------------------------------


def test_guides_by_name_and_by_grid(tmp_path):
    volumes = {
        "a/T2W.nii.gz": grid(40),
        "a/T1W_in_T2W.nii.gz": grid(40),
        "a/T1W.nii.gz": grid(40),
        "a/FLAIR.nii.gz": grid(44),
        "a/T1W_in_FLAIR.nii.gz": grid(44),
        "b/T1.nii.gz": grid(),
        "b/T1POST.nii.gz": grid(),
        "b/T2.nii.gz": grid(),
        "b/FLAIR.nii.gz": grid(origin=(3.0, 0, 0)),
        "c/T2.nii.gz": grid(),
        "c/T1POST.nii.gz": grid(),
        "sub-01/anat/sub-01_T2w.nii.gz": grid(),
        "sub-01/anat/sub-01_T1w.nii.gz": grid(),
    }
    headers = Headers(tmp_path, volumes)
    attached = headers.attach(guided=True)
    assert guides(attached) == {
        "a/T2W.nii.gz": "a/T1W_in_T2W.nii.gz",
        "a/FLAIR.nii.gz": "a/T1W_in_FLAIR.nii.gz",
        "b/T2.nii.gz": "b/T1.nii.gz",
        "sub-01/anat/sub-01_T2w.nii.gz": "sub-01/anat/sub-01_T1w.nii.gz",
    }
    assert len(attached.skipped) == 2
    assert "b/FLAIR.nii.gz was left out: it has no guide in its folder; T1.nii.gz does not fit" in attached.skipped[0]
    assert attached.skipped[1] == "c/T2.nii.gz was left out: it has no guide in its folder."
    assert "b/T1.nii.gz guides b/T2.nii.gz." in attached.notes
    named = headers.attach(guided=True, targets=["T2*"], guides=["T1POST"])
    assert guides(named) == {"b/T2.nii.gz": "b/T1POST.nii.gz", "c/T2.nii.gz": "c/T1POST.nii.gz"}


def test_targets_without_any_guide_are_refused(tmp_path):
    headers = Headers(tmp_path, {"a/T2.nii": grid(), "b/T1.nii": grid()})
    with pytest.raises(InputRefused, match="a guide without its partner") as refused:
        headers.attach(guided=True)
    assert refused.value.exit_code == 6


@pytest.mark.parametrize(
    ("name", "pattern", "is_it"),
    [
        ("T1.nii.gz", "T1*", True),
        ("t1w.nii", "T1*", True),
        ("sub-01_ses-2_T2w.nii.gz", "T2*", True),
        ("sub-01_T1w.nii.gz", "T2*", False),
        ("x_T2.nii.gz", "T2*", False),
        ("x_T2.nii.gz", "*T2*", True),
    ],
)
def test_names(name, pattern, is_it):
    assert is_called(Found(Path(name), "s", name), [pattern]) is is_it


# -- low-resolution partners -------------------------------------------------------------------------------


def test_partners_beside_the_images(tmp_path):
    volumes = {"a/x.png": picture(40, 32), "a/x_lr.png": picture(10, 8), "b/y.png": picture(), "b/y_LR.tif": picture(5)}
    headers = Headers(tmp_path, volumes)
    attached = headers.attach(scale=4)
    assert [(image.name, image.low.name) for image in attached.images] == [("a/x.png", "a/x_lr.png")]
    assert "not 40 x 30 x 1" in attached.skipped[0]
    unscaled = headers.attach()
    assert [image.name for image in unscaled.images] == ["a/x.png", "b/y.png"]
    assert "at low resolution" in unscaled.skipped[0]


def low_grid(**fields):
    """Half the rows and columns of `grid(40, 32)`, edges aligned."""
    affine = np.diag([2.0, 2.0, 1.0, 1.0])
    affine[:2, 3] = 0.5
    return grid(20, 16, **{"affine": affine, **fields})


def moved(volume, matrix):
    """The grid with its array indices changed: by a flip, a step or another order of axes."""
    return replace(volume, affine=volume.affine @ matrix)


def flip(axis, length):
    matrix = np.eye(4)
    matrix[axis, axis], matrix[axis, 3] = -1, length - 1
    return matrix


def step(axis, by):
    matrix = np.eye(4)
    matrix[axis, 3] = by
    return matrix


def test_a_partner_has_the_place_of_its_image():
    image, low = grid(40, 32), low_grid()
    assert misplaced(image, low, 2) is None
    # Turned and moved together in the patient, and stored with other axes for rows and columns: still the same.
    turn = np.array([[0.8, -0.6, 0, 5], [0.6, 0.8, 0, -7], [0, 0, 1, 3], [0, 0, 0, 1.0]])
    both = [replace(volume, affine=turn @ volume.affine) for volume in (image, low)]
    assert misplaced(*both, 2) is None
    swap = np.eye(4)[:, [1, 0, 2, 3]]
    stored = replace(moved(low, swap), plane_axes=(0, 1), array_shape=(20, 16, 5))
    assert misplaced(image, stored, 2) is None
    for by, fits in ((0.04, True), (0.06, False)):  # of a low-resolution voxel: twice as many of the image
        for axis in (0, 1):
            assert (misplaced(image, moved(low, step(axis, by)), 2) is None) is fits
    assert "0.2 voxels" in misplaced(image, moved(low, step(2, 0.2)), 2)


def test_a_partner_in_another_order_or_place_is_no_partner():
    image, low = grid(40, 32), low_grid()
    for axis, length in enumerate((16, 20, 5)):
        assert "run in other directions" in misplaced(image, moved(low, flip(axis, length)), 2)
        assert "in another place" in misplaced(image, moved(low, step(axis, 0.5)), 2)
    # First voxels' centres aligned, as by taking every second voxel.
    assert "0.5 voxels" in misplaced(image, moved(low, step(0, -0.25)), 2)
    square, small = grid(40, 40), low_grid(array_shape=(20, 20, 5))
    small = replace(small, columns=20)
    assert misplaced(square, small, 2) is None
    assert "run in other directions" in misplaced(square, moved(small, np.eye(4)[:, [1, 0, 2, 3]]), 2)
    assert "only one of the two" in misplaced(image, replace(low, affine=None), 2)
    assert "20 x 16 x 5 voxels" in misplaced(image, low, 3)
    assert misplaced(picture(40, 32), picture(20, 16), 2) is None
    assert "nowhere" in misplaced(image, replace(low, affine=np.full((4, 4), np.nan)), 2)


def test_a_partner_in_another_place_is_told_with_its_image(tmp_path):
    volumes = {
        "high/a/x.nii": grid(40, 32),
        "high/b/x.nii": grid(40, 32),
        "low/a/x.nii": low_grid(),
        "low/b/x.nii": moved(low_grid(), flip(0, 16)),
    }
    attached = Headers(tmp_path, volumes).attach("high", low=tmp_path / "low", scale=2)
    assert [image.name for image in attached.images] == ["a/x.nii"]
    assert attached.skipped[0].startswith("b/x.nii was left out: its partner x.nii does not fit (its voxels run in")


def test_pixels_that_fit_better_mirrored():
    rng = np.random.default_rng(3)
    high = gaussian_filter(rng.random((40, 36, 36)), (1, 3, 3))
    low = high.reshape(40, 12, 3, 12, 3).mean((2, 4)) + rng.normal(0, 0.01, (40, 12, 12))
    chosen = chosen_slices(40)
    assert chosen == sorted(39 - k for k in chosen)
    assert len(chosen) == 16
    assert (chosen_slices(1), chosen_slices(2), chosen_slices(3)) == ([0], [0, 1], [0, 1, 2])

    def told(other):
        return fits_mirrored(high[chosen], 100 * other[chosen] - 7)

    assert told(low) is None
    assert told(low[:, ::-1]) == "upside down"
    assert told(low[:, :, ::-1]) == "left to right"
    assert told(low[::-1]) == "in the reverse order of slices"
    assert told(low[::-1, ::-1]) == "upside down and in the reverse order of slices"
    assert told(low.transpose(0, 2, 1)) == "with rows for columns"
    assert told(np.zeros_like(low)) is None
    even = high + high[:, ::-1]
    assert fits_mirrored(even, even.reshape(40, 12, 3, 12, 3).mean((2, 4))[:, ::-1]) is None


def test_partners_of_a_second_folder(tmp_path):
    volumes = {
        "high/a/x.nii.gz": grid(40, 32),
        "high/b/y.nii.gz": grid(40, 32),
        "high/c/z.nii.gz": grid(40, 32),
        "low/a/x.nii.gz": low_grid(),
        "low/b/y_lr.nii": low_grid(),
    }
    headers = Headers(tmp_path, volumes)
    attached = headers.attach("high", low=tmp_path / "low", scale=2)
    assert [image.low.path.name for image in attached.images] == ["x.nii.gz", "y_lr.nii"]
    assert attached.skipped == ["c/z.nii.gz was left out: it has no low-resolution partner."]
    inside = Headers(tmp_path / "both", {name.removeprefix("high/"): volume for name, volume in volumes.items()})
    attached = inside.attach(low=tmp_path / "both" / "low", scale=2)
    assert [image.name for image in attached.images] == ["a/x.nii.gz", "b/y.nii.gz"]
    with pytest.raises(InputRefused, match="divided by 3"):
        headers.attach("high", low=tmp_path / "low", scale=3)
    with pytest.raises(ArgumentsError, match="one scale"):
        headers.attach("high", low=tmp_path / "low")


# -- contrasts and captions --------------------------------------------------------------------------------


def test_contrasts_are_those_of_one_folder_on_one_grid(tmp_path):
    volumes = {
        "a/T1.nii": grid(), "a/T2.nii": grid(), "a/T1POST.nii": grid(),
        "b/T1.nii": grid(), "b/T2.nii": grid(41),
        "c/PD.nii": grid(),
    }  # fmt: skip
    headers = Headers(tmp_path, volumes)
    attached = headers.attach(contrasts=["T2*", "T1*"])
    assert [(i.name, [c.name for c in i.contrasts]) for i in attached.images] == [("a/T2.nii", ["a/T1.nii"])]
    assert "b was left out: T1.nii is on another grid (it has 40 x 30 x 5 voxels, the image 41" in attached.skipped[0]
    assert attached.skipped[1] == "c was left out: it has none of T2*, T1*."
    with pytest.raises(InputRefused, match="Channels are mixed: b has no T1POST"):
        headers.attach(contrasts=["T1", "T1POST"])
    with pytest.raises(InputRefused, match="No folder has"):
        headers.attach(contrasts=["T7", "T9"])


def test_captions_go_by_the_order_of_names(tmp_path):
    headers = Headers(tmp_path, dict.fromkeys(["b/1.png", "a/2.png", "a/10.png"], picture()))
    (tmp_path / "texts.txt").write_text("ten\ntwo\none\n", encoding="utf-16")
    attached = headers.attach(captions=tmp_path / "texts.txt")
    assert {image.name: image.caption for image in attached.images} == {
        "a/10.png": "ten", "a/2.png": "two", "b/1.png": "one",
    }  # fmt: skip
    (tmp_path / "texts.txt").write_text("ten\ntwo\n", encoding="utf-8")
    with pytest.raises(InputRefused, match="2 captions for 3 images"):
        headers.attach(captions=tmp_path / "texts.txt")


# -- grids -------------------------------------------------------------------------------------------------


def test_grids():
    assert misfit(grid(), grid()) is None
    assert misfit(grid(), grid(origin=(0.04, 0, 0))) is None
    assert misfit(grid(), grid(origin=(0.06, 0, 0))) == "it lies in another place"
    # A step that is a little longer adds up along the axis.
    assert misfit(grid(), grid(step=1.002)) == "it lies in another place"
    assert misfit(grid(), grid(origin=(np.nan, 0, 0))) == "it lies in another place"
    assert misfit(grid(), grid(slice_axis=1)) == "its slices run along another axis"
    assert misfit(grid(), grid(affine=None)) == "only one of the two says where it lies"
    assert misfit(grid(slices=1), grid(slices=1, affine=None)) is None
    assert misfit(picture(), picture()) is None


# -- the shared data ---------------------------------------------------------------------------------------


def shared(folder, **rules):
    if not (TRAIN / folder).is_dir():
        pytest.skip("the shared data is not there")
    return attach(
        find_tree(TRAIN / folder, formats.is_image_name), Rules(**rules), lambda found: formats.open_image(found.path)
    )


def test_the_pairs_of_the_shared_brains():
    attached = shared("brain_mr", guided=True)
    assert guides(attached) == {
        "ms_long_p01_s1/T2W.nii.gz": "ms_long_p01_s1/T1W_in_T2W.nii.gz",
        "ms_long_p01_s2/T2W.nii.gz": "ms_long_p01_s2/T1W_in_T2W.nii.gz",
        "ms_long_p12_s1/T2W.nii.gz": "ms_long_p12_s1/T1W_in_T2W.nii.gz",
        "ms_long_p20_s2/FLAIR.nii.gz": "ms_long_p20_s2/T1W_in_FLAIR.nii.gz",
        "ms_mni_p07/FLAIR.nii.gz": "ms_mni_p07/T1.nii.gz",
        "ms_mni_p07/T2.nii.gz": "ms_mni_p07/T1.nii.gz",
        "tcga_FG-6692/T2.nii.gz": "tcga_FG-6692/T1_in_T2.nii.gz",
    }
    plain = shared("brain_mr")
    assert masks(plain) == {
        f"ms_mni_p07/{name}.nii.gz": "ms_mni_p07/lesion_mask.nii.gz" for name in ("FLAIR", "T1", "T1POST", "T2")
    }


class Quiet:
    def note(self, sentence):
        pass

    def packing(self, done, total):
        pass


def test_a_shared_heart_and_its_masks(tmp_path):
    attached = shared("cardiac_mr")
    assert len(masks(attached)) == len(attached.images) == 168
    assert all(mask == name.replace(".png", "_lv_mask.png") for name, mask in masks(attached).items())
    few = [replace(image, subject=subject_of(image.name)) for image in attached.images[:3]]
    gathered = pack_images(few, lambda found: formats.open_image(found.path), tmp_path / "p.safetensors", Quiet())
    assert (gathered.volumes, gathered.labels) == (3, 3)
    slices = PackedSlices(tmp_path / "p.safetensors")
    assert slices.label_values == [0, 1]
    for k, image in enumerate(few):
        pixels = next(iter(formats.open_image(image.labels.path).slices()))[0]
        assert (slices.labels_of(k) == (pixels == 255)).all()


def test_shared_ultrasound_in_three_channels(tmp_path):
    attached = shared("us")
    assert len(attached.images) == 78
    coloured = TRAIN.parent / "formats" / "png" / "us_with_scanner_ui_rgb.png"
    few = [attached.images[0], Found(coloured, "ui", coloured.name)]
    target = tmp_path / "p.safetensors"
    options = PackOptions(channels=3, full_scale=True)
    pack_images(few, lambda found: formats.open_image(found.path), target, Quiet(), options=options)
    slices = PackedSlices(target)
    assert slices.channels == 3
    assert [volume.channels for volume in slices.volumes] == [1, 3]
    for k, image in enumerate(few):
        pixels = next(iter(formats.open_image(image.path).slices()))[:3] / 255
        assert np.abs(slices.slice(k) - pixels).max() < 1e-4


# -- results of medsr itself -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "is_it"),
    [
        ("T2_x4-rdst", True),
        ("T2_x2.5-miassr_consistency", True),
        ("T2_x2x3-cohft-s_spread", True),
        ("T2_0.5mm-miassr_intermediate", True),
        ("T2_X3-bicubic-roi", True),
        ("T2_consistency", False),
        ("T2_x4", False),
        ("T2_x4-axial", False),
        ("x4-rdst", False),
        ("T2_x4-rdst_mask", False),
    ],
)
def test_names_of_results(stem, is_it):
    assert is_own_result(stem) is is_it


def test_results_of_upscale_are_no_images_unless_asked_for(tmp_path):
    names = ["p/T2.nii.gz", "p/T2_x4-rdst.nii.gz", "p/T2_x4-rdst_consistency.nii.gz", "q/T1.nii.gz"]
    headers = Headers(tmp_path, dict.fromkeys(names, grid()))
    attached = headers.attach()
    assert [image.name for image in attached.images] == ["p/T2.nii.gz", "q/T1.nii.gz"]
    assert attached.skipped == [
        f"{name} was left out: by its name it is a result of medsr upscale." for name in names[1:3]
    ]
    tree = find_tree(tmp_path, formats.is_image_name, ["*_x4-rdst.nii.gz"])
    assert [image.name for image in tree.images] == names[1:2]
    tree = find_tree(tmp_path, formats.is_image_name, results=["*rdst*"])
    assert [image.name for image in tree.images] == names
