"""What a NIfTI or Analyze header says, whether it can be true, and the header of the result.

Headers are nibabel's; they are never "fixed" on the way in. Fields that stay true are copied bit by bit, so
that a volume which is not enlarged comes back with the header that it had.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.quaternions import quat2mat
from nibabel.spm99analyze import Spm99AnalyzeHeader

from medsr_cli.errors import InputRefused, mention
from medsr_cli.formats.gzip_stream import ForwardStream
from medsr_cli.formats.limits import Limits, allowed
from medsr_cli.volume.geometry import (
    Affine,
    cropped_affine,
    enlarged_affine,
    enlarged_spacing,
    is_usable,
    spacings_mm,
)
from medsr_cli.volume.volume import Volume

Kind = Literal["nifti1", "nifti2", "analyze"]
RawHeader = Any  # nibabel's headers, whose methods are not typed

HEADER_CLASSES: dict[tuple[Kind, bool], Any] = {
    ("nifti1", False): nib.Nifti1Header,
    ("nifti1", True): nib.nifti1.Nifti1PairHeader,
    ("nifti2", False): nib.Nifti2Header,
    ("nifti2", True): nib.nifti2.Nifti2PairHeader,
    ("analyze", True): Spm99AnalyzeHeader,
}
"""By kind, and whether the pixels lie in a file of their own."""

SIZES: dict[int, Kind] = {348: "nifti1", 540: "nifti2"}
EXTENSION_FLAG_BYTES = 4
LARGEST_NIFTI1_LENGTH = 32767

# What a voxel is, by NIfTI's data type code: type of its numbers, how many of them.
VOXEL_TYPES: dict[int, tuple[str, int]] = {
    2: ("u1", 1), 4: ("i2", 1), 8: ("i4", 1), 16: ("f4", 1), 64: ("f8", 1), 128: ("u1", 3), 256: ("i1", 1),
    512: ("u2", 1), 768: ("u4", 1), 1024: ("i8", 1), 1280: ("u8", 1), 2304: ("u1", 4),
}  # fmt: skip
COMPLEX_TYPES = (32, 1792, 2048)

MM_PER_UNIT = {1: ("metre", 1000.0), 2: ("mm", 1.0), 3: ("micron", 0.001)}
"""NIfTI's codes for units of length; any other is taken for millimetres, as every reader does."""

SAME_PLACE_VOXELS = 0.01
"""Two matrices that put no corner further apart than this are the same one, rounded differently."""


@dataclass(frozen=True)
class NiftiHeader:
    """A header that was read and found usable."""

    raw: RawHeader
    """nibabel's header, every field as it is stored, extensions included."""
    kind: Kind
    paired: bool
    shape: tuple[int, ...]
    """Two to four axes; trailing axes of one voxel left out."""
    value_type: np.dtype[Any]
    """Type of one number, in the file's byte order."""
    channels: int
    data_offset: int
    """First byte of the pixels in their file."""
    affine: Affine
    """Array index to millimetres, RAS+."""
    value_scale: tuple[float, float]
    """Slope and intercept of the stored values; 1 and 0 where there is no scaling."""
    warnings: tuple[str, ...]

    @property
    def voxel_bytes(self) -> int:
        """Bytes of one voxel, all channels."""
        return self.value_type.itemsize * self.channels

    @property
    def data_bytes(self) -> int:
        """Bytes of all voxels."""
        return int(np.prod(self.shape, dtype=object)) * self.voxel_bytes

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Voxels along the three axes of space."""
        first, second, third = (*self.shape, 1)[:3]
        return first, second, third

    @property
    def volumes(self) -> int:
        """Volumes that follow each other in time."""
        return self.shape[3] if len(self.shape) > 3 else 1


def read_header(stream: ForwardStream, name: str, *, paired: bool, limits: Limits | None = None) -> NiftiHeader:
    """Read and judge the header at the start of a file.

    Args:
        stream: the `.nii` or `.hdr` file, decoded, at its start.
        name: what errors call the file.
        paired: whether the pixels lie in a file of their own.
        limits: how many bytes the extensions may have; None for the limits that hold here.

    Raises:
        InputRefused: it is no header, or one that cannot be true or cannot be upscaled.
    """
    raw, kind = _parse(stream, name, paired, (limits or allowed()).metadata_bytes)
    shape = _shape(raw, name)
    value_type, channels = _voxel_type(raw, name)
    _refuse_odd_scaling(raw, name)
    warnings: list[str] = []
    affine = _affine_mm(raw, kind, shape, name, warnings)
    slope, intercept = scaling(raw)
    return NiftiHeader(
        raw,
        kind,
        paired,
        shape,
        value_type,
        channels,
        data_offset=_data_offset(raw, kind, paired, name),
        affine=affine,
        value_scale=(slope, intercept) if slope and channels == 1 else (1.0, 0.0),
        warnings=tuple(warnings),
    )


def enlarged_header(
    source: NiftiHeader, shape: tuple[int, ...], value_type: np.dtype[Any], *, paired: bool
) -> RawHeader:
    """The header of the same image with `shape` instead of its own; all else that is true is kept.

    Args:
        source: the header of the input.
        shape: lengths of the result, as many as the source's shape has.
        value_type: type of one number of the result, commonly that of the source.
        paired: whether the pixels of the result lie in a file of their own; Analyze is always written so,
            and becomes NIfTI without orientation codes in a single file.

    Raises:
        InputRefused: an Analyze file cannot be as large, or NIfTI has no such voxels.
    """
    kind: Kind = "nifti1" if source.kind == "analyze" and not paired else source.kind
    if max(shape) > LARGEST_NIFTI1_LENGTH:
        if kind == "analyze":
            msg = "The result is too large for Analyze 7.5."
            raise InputRefused(msg, "Name it .nii.gz instead.")
        kind = "nifti2"
    header = _copied(source.raw, kind, paired)
    _set_voxel_type(header, value_type, source.channels)
    changed = {axis: (n, new) for axis, (n, new) in enumerate(zip(source.shape, shape, strict=True)) if n != new}
    _set_lengths(header, shape[: len(source.shape)])
    for axis, (n, new) in changed.items():
        pixdim = header["pixdim"].copy()
        pixdim[axis + 1] = enlarged_spacing(float(pixdim[axis + 1]), n, new)
        header["pixdim"] = pixdim
    if source.kind == "analyze":
        if kind == "analyze":
            _move_spm_origin(header, changed)
    else:
        _move_sform(header, source.raw, changed)
        _move_qform(header, source.raw, changed)
        _forget_slice_timing(header, changed)
    return header


def cropped_header(source: NiftiHeader, first: Mapping[int, int], shape: tuple[int, ...]) -> NiftiHeader:
    """The header of a part of the image; the voxels that are left keep their places.

    A header without orientation places the part as it placed the whole: around its own middle.

    Args:
        source: the header of the whole.
        first: axis to the index of its voxel that the part begins with.
        shape: lengths of the part, as many as the source's shape has.
    """
    raw, affine = source.raw.copy(), source.affine
    _set_lengths(raw, shape)
    if source.kind == "analyze":
        _cut_spm_origin(raw, source.raw, first)
    else:
        sform, qform = _sform(source.raw), None if _has_no_qform(source.raw) else _qform(source.raw)
        for axis, index in first.items():
            sform = cropped_affine(sform, axis, index)
            qform = None if qform is None else cropped_affine(qform, axis, index)
        for row, name in enumerate("xyz"):
            raw[f"srow_{name}"] = sform[row]
            if qform is not None:
                raw[f"qoffset_{name}"] = qform[row, 3]
        _forget_slice_timing(raw, {axis: (n, shape[axis]) for axis, n in enumerate(source.shape) if n != shape[axis]})
    if is_placed(source):
        for axis, index in first.items():
            affine = cropped_affine(affine, axis, index)
    else:
        affine = _completed(np.asarray(raw.get_base_affine(), np.float64), (*shape[:3], 1)[:3])
        affine[:3] *= units_of_length(raw, source.kind)[1]
    return replace(source, raw=raw, shape=shape, affine=affine)


def is_placed(header: NiftiHeader) -> bool:
    """Whether a header says where the image lies."""
    return any(_code(header.raw, header.kind, field) > 0 for field in ("sform_code", "qform_code"))


def fresh_header(
    result: Volume, shape: tuple[int, ...], value_type: np.dtype[Any], channels: int, *, paired: bool
) -> RawHeader:
    """A header for an image that comes from another format.

    Args:
        result: where the image lies: its affine becomes sform and, unless it is sheared, qform.
        shape: lengths of the array.
        value_type: type of one number.
        channels: numbers of one voxel.
        paired: whether the pixels lie in a file of their own.

    Raises:
        InputRefused: NIfTI has no such voxels.
    """
    kind: Kind = "nifti2" if max(shape) > LARGEST_NIFTI1_LENGTH else "nifti1"
    cls = HEADER_CLASSES[kind, paired]
    header = cls(cls.default_structarr("<").tobytes(), "<", False)
    _set_voxel_type(header, value_type, channels)
    header["scl_slope"], header["scl_inter"] = result.value_scale
    _set_lengths(header, shape)
    _place(header, result)
    return header


# ------------------------------------------------------------------------------------------------ reading


def _parse(stream: ForwardStream, name: str, paired: bool, most: int) -> tuple[RawHeader, Kind]:
    start = stream.read(4)
    for order in "<>":
        size = struct.unpack(f"{order}i", start)[0] if len(start) == 4 else 0
        if size in SIZES:
            break
    else:
        msg = f"{mention(name)} is not NIfTI: it does not begin with a header."
        raise InputRefused(msg, "Check that the file is what its name says.")
    block = start + stream.read(size - 4)
    if len(block) < size:
        msg = f"{mention(name)} is cut short: it ends within its header."
        raise InputRefused(msg, "Copy or export it again.")
    kind = _kind(block, SIZES[size], paired, name)
    raw: RawHeader = HEADER_CLASSES[kind, paired](block, order, False)
    if kind != "analyze":
        raw.extensions[:] = _extensions(stream, order, _extension_bytes(raw, kind, paired, name, most), name)
    return raw, kind


def _kind(block: bytes, kind: Kind, paired: bool, name: str) -> Kind:
    magic = block[344:348] if kind == "nifti1" else block[4:8]
    version = b"1" if kind == "nifti1" else b"2"
    if magic == (b"ni" if paired else b"n+") + version + b"\0":
        return kind
    if magic == (b"n+" if paired else b"ni") + version + b"\0":
        expected = "a NIfTI pair" if paired else "a single NIfTI file"
        msg = f"{mention(name)} is named like {expected}, but its header says otherwise."
        raise InputRefused(msg, "Rename it: .nii for a single file, .hdr and .img for a pair.")
    if paired and kind == "nifti1":
        return "analyze"
    msg = f"{mention(name)} is not NIfTI: its header does not say so."
    raise InputRefused(msg, "Check that the file is what its name says.")


def _data_offset(raw: RawHeader, kind: Kind, paired: bool, name: str) -> int:
    offset = float(raw["vox_offset"])
    smallest = 0 if paired else raw.single_vox_offset
    if not paired and offset == 0:
        return int(smallest)  # some programs leave it out; there is one place only where pixels can begin
    if kind == "analyze":
        offset = abs(offset)  # Analyze marks with a negative offset that each slice has one; nobody writes that
    if not (np.isfinite(offset) and offset >= smallest and offset == int(offset) and offset < 2**62):
        msg = f"{mention(name)} says that its pixels begin where they cannot."
        raise InputRefused(msg, "The header is damaged; export it again.")
    return int(offset)


def _extension_bytes(raw: RawHeader, kind: Kind, paired: bool, name: str, most: int) -> int:
    """Bytes that follow the header and may be extensions; of a pair, whatever the file still holds."""
    if paired:
        return most
    size = _data_offset(raw, kind, paired, name) - int(raw.single_vox_offset)
    if size > most:
        msg = f"{mention(name)} claims {size} bytes of header extensions, more than is allowed."
        raise InputRefused(msg, "The header is damaged; export it again.")
    return size


def _extensions(stream: ForwardStream, order: str, size: int, name: str) -> list[Any]:
    """Extensions with every byte of theirs; nibabel's own reader drops trailing zeros and trusts sizes."""
    flag = stream.read(EXTENSION_FLAG_BYTES)
    if len(flag) < EXTENSION_FLAG_BYTES or flag[0] == 0:
        return []
    block = stream.read(size)
    found, position = [], 0
    while position + 16 <= len(block):
        length, code = struct.unpack_from(f"{order}ii", block, position)
        if length == 0 and not any(block[position:]):
            break  # zeros up to the first pixel
        if length < 8 or position + length > len(block):
            msg = f"{mention(name)} has a damaged header extension."
            raise InputRefused(msg, "Export it again.")
        found.append(nib.nifti1.Nifti1Extension(code, block[position + 8 : position + length]))
        position += length
    return found


def _shape(raw: RawHeader, name: str) -> tuple[int, ...]:
    dim = [int(n) for n in raw["dim"]]
    if not 1 <= dim[0] <= 7:
        msg = f"{mention(name)} claims an impossible number of axes."
        raise InputRefused(msg, "The header is damaged; export it again.")
    shape = dim[1 : dim[0] + 1]
    if min(shape) < 1:
        msg = f"{mention(name)} has an axis without voxels."
        raise InputRefused(msg, "Surfaces and empty images cannot be upscaled.")
    if max([1, *shape[4:]]) > 1:
        msg = f"{mention(name)} holds several values per voxel (a vector or tensor field), which cannot be upscaled."
        raise InputRefused(msg, "Give one image per value.")
    while len(shape) > 4:
        shape.pop()
    if len(shape) < 2:
        msg = f"{mention(name)} has one axis only and is no image."
        raise InputRefused(msg)
    return tuple(shape)


def _voxel_type(raw: RawHeader, name: str) -> tuple[np.dtype[Any], int]:
    code = int(raw["datatype"])
    if code in VOXEL_TYPES:
        letters, channels = VOXEL_TYPES[code]
        return np.dtype(letters).newbyteorder(raw.endianness), channels
    what = "complex numbers" if code in COMPLEX_TYPES else "a data type that cannot be upscaled"
    msg = f"{mention(name)} holds {what}."
    raise InputRefused(msg, "Convert it to integers or 32-bit floating point first.")


def _refuse_odd_scaling(raw: RawHeader, name: str) -> None:
    slope, intercept = scaling(raw)
    if not np.isfinite(slope) or (slope != 0 and not np.isfinite(intercept)):
        msg = f"{mention(name)} scales its values by something that is not a number (scl_slope or scl_inter)."
        raise InputRefused(msg, "Set scl_slope to 1 and scl_inter to 0 if the stored values are what is meant.")


def scaling(raw: RawHeader) -> tuple[float, float]:
    """Slope and intercept as they are stored; a slope of 0 means that there is no scaling."""
    return float(raw["scl_slope"]), float(raw["scl_inter"]) if "scl_inter" in raw.keys() else 0.0  # noqa: SIM118


# ------------------------------------------------------------------------------------------------ geometry


def _affine_mm(raw: RawHeader, kind: Kind, shape: tuple[int, ...], name: str, warnings: list[str]) -> Affine:
    """The matrix that NIfTI's rule picks, in millimetres; what is odd about it goes into `warnings`."""
    lengths = (*shape[:3], 1)[:3]
    _refuse_odd_spacing(raw, lengths, name)
    sform = _sform(raw) if kind != "analyze" else None
    qform = _qform(raw) if kind != "analyze" else None
    has_sform, has_qform = _code(raw, kind, "sform_code") > 0, _code(raw, kind, "qform_code") > 0
    if has_sform:
        affine = sform
    elif has_qform:
        affine = qform
    else:
        affine = np.asarray(raw.get_base_affine(), np.float64)
        warnings.append(_no_orientation(kind))
        if kind == "analyze" and _spm_origin(raw) is not None:
            warnings.append("The SPM origin is kept to the nearest voxel only, which is all that Analyze can hold.")
    affine = None if affine is None else _completed(affine, lengths)
    if affine is None or not is_usable(affine):
        msg = f"{mention(name)} has a damaged orientation: its matrix is singular or not a number."
        raise InputRefused(msg, "Correct sform and qform, or set their codes to 0.")
    if has_sform and has_qform:
        _compare_forms(affine, None if qform is None else _completed(qform, lengths), lengths, warnings)
    elif has_sform:
        _compare_spacing(raw, affine, lengths, warnings)
    _, mm = units_of_length(raw, kind)
    affine[:3] *= mm
    return affine


def units_of_length(raw: RawHeader, kind: Kind) -> tuple[str, float]:
    """Name of the header's unit of length and how many millimetres it is; unknown ones count as 1."""
    code = int(raw["xyzt_units"]) & 7 if kind != "analyze" else 0
    return MM_PER_UNIT.get(code, ("unknown", 1.0))


def _refuse_odd_spacing(raw: RawHeader, lengths: tuple[int, ...], name: str) -> None:
    spacing = np.asarray(raw["pixdim"][1:4], np.float64)
    for axis, length in enumerate(lengths):
        if length > 1 and not (np.isfinite(spacing[axis]) and spacing[axis] > 0):
            msg = f"{mention(name)} has a voxel spacing that is zero, negative or not a number."
            raise InputRefused(msg, "Correct pixdim; without it nobody knows how large a voxel is.")


def _no_orientation(kind: Kind) -> str:
    if kind == "analyze":
        return "Analyze 7.5 does not say which side is left: the orientation is a guess."
    return "The header has no orientation (both codes are 0): which side is left is a guess."


def _code(raw: RawHeader, kind: Kind, field: str) -> int:
    return int(raw[field]) if kind != "analyze" else 0


def _sform(raw: RawHeader) -> Affine:
    affine = np.eye(4)
    for row, field in enumerate(("srow_x", "srow_y", "srow_z")):
        affine[row] = raw[field]
    return affine


def _qform(raw: RawHeader) -> Affine | None:
    """The matrix of quaternion, spacing and offset; None if the quaternion is none."""
    try:
        rotation = quat2mat(raw.get_qform_quaternion())  # type: ignore[no-untyped-call]
    except ValueError:
        return None
    spacing = np.array(raw["pixdim"][1:4], np.float64)
    # Whatever is not -1 is +1: the standard's own code tests the sign, and 0 is often found.
    spacing[2] *= -1.0 if float(raw["pixdim"][0]) < 0 else 1.0
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    affine[:3, 3] = [float(raw[f"qoffset_{axis}"]) for axis in "xyz"]
    return affine


def _completed(affine: Affine, lengths: tuple[int, ...]) -> Affine:
    """An axis of one voxel may have no direction; the one across the other two then stands in for it."""
    affine = np.array(affine, np.float64)
    empty = [axis for axis in range(3) if lengths[axis] == 1 and not affine[:3, axis].any()]
    if len(empty) == 1:
        across = np.cross(affine[:3, (empty[0] + 1) % 3], affine[:3, (empty[0] + 2) % 3])
        affine[:3, empty[0]] = across / (np.linalg.norm(across) or 1.0)
    return affine


def _compare_forms(sform: Affine, qform: Affine | None, lengths: tuple[int, ...], warnings: list[str]) -> None:
    if qform is None or not is_usable(qform):
        warnings.append("The qform is damaged and stays as it is; the sform is what counts.")
        return
    apart = np.abs((sform - qform)[:3] @ _corners(lengths)).max()
    extent = np.abs(sform[:3] @ _corners(lengths)).max()
    if apart > SAME_PLACE_VOXELS * min(spacings_mm(sform)) + 1e-5 * extent:
        warnings.append("The sform and the qform place the image differently; the sform is what counts, both are kept.")


def _corners(lengths: tuple[int, ...]) -> Affine:
    """Outer corners of a grid as homogeneous columns, (4, 8)."""
    edges = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in lengths], indexing="ij")).reshape(3, -1)
    return np.vstack([edges, np.ones(edges.shape[1])])


def _compare_spacing(raw: RawHeader, affine: Affine, lengths: tuple[int, ...], warnings: list[str]) -> None:
    pixdim, steps = np.asarray(raw["pixdim"][1:4], np.float64), spacings_mm(affine)
    if any(n > 1 and abs(p - s) > 0.01 * s for n, p, s in zip(lengths, pixdim, steps, strict=True)):
        warnings.append("The voxel spacing in pixdim is not that of the sform; the sform is what counts.")


# ------------------------------------------------------------------------------------------------ writing


def _copied(raw: RawHeader, kind: Kind, paired: bool) -> RawHeader:
    """The fields of a header in a zeroed one of that kind: nothing that is not a field's value comes along."""
    cls = HEADER_CLASSES[kind, paired]
    header = cls(bytes(cls.template_dtype.itemsize), raw.endianness, False)
    defaults = cls.default_structarr(raw.endianness)
    for field in cls.template_dtype.names:
        if field in ("sizeof_hdr", "magic", "eol_check"):
            header[field] = defaults[field]
        elif field not in raw.keys() or field == "vox_offset":  # noqa: SIM118 - nibabel's headers are no dicts
            continue  # zero; nibabel fills the offset in
        elif cls.template_dtype[field].kind == "S":
            # What follows the end of a text is not part of it; names of patients have been found there.
            header[field] = raw[field].item().split(b"\0")[0]
        else:
            header[field] = raw[field]
    if hasattr(header, "extensions"):
        header.extensions[:] = getattr(raw, "extensions", [])
    return header


def _set_lengths(header: RawHeader, shape: tuple[int, ...]) -> None:
    # Not `set_data_shape`: it resets zooms, and encodes some shapes as surfaces.
    dim = header["dim"].copy()
    if not 1 <= int(dim[0]) <= 7 or dim[0] < len(shape):
        dim[0] = len(shape)
    dim[1 : len(shape) + 1] = shape
    header["dim"] = dim


def _set_voxel_type(header: RawHeader, value_type: np.dtype[Any], channels: int) -> None:
    code = next((c for c, voxel in VOXEL_TYPES.items() if voxel == (value_type.str[1:], channels)), None)
    if code is None:
        what = f"{channels} channels of type {value_type.name}" if channels > 1 else f"the type {value_type.name}"
        msg = f"NIfTI cannot hold {what}."
        raise InputRefused(msg, "Write the format of the input, or PNG.")
    header["datatype"] = code
    header["bitpix"] = value_type.itemsize * 8 * channels


def _move_sform(header: RawHeader, raw: RawHeader, changed: dict[int, tuple[int, int]]) -> None:
    affine = _sform(raw)
    if not np.isfinite(affine).all() or not affine[:3].any():
        return  # no matrix, and no code that claims one
    for axis, (n, new) in changed.items():
        affine = enlarged_affine(affine, axis, n, new)
    for row, field in enumerate(("srow_x", "srow_y", "srow_z")):
        header[field] = affine[row]


def _move_qform(header: RawHeader, raw: RawHeader, changed: dict[int, tuple[int, int]]) -> None:
    """Only the offset moves: the rotation is as it was, and the spacing is in pixdim."""
    affine = _qform(raw)
    if _has_no_qform(raw) or affine is None or not np.isfinite(affine).all():
        return
    for axis, (n, new) in changed.items():
        affine = enlarged_affine(affine, axis, n, new)
    if changed:
        for row, axis_name in enumerate("xyz"):
            header[f"qoffset_{axis_name}"] = affine[row, 3]


def _has_no_qform(raw: RawHeader) -> bool:
    """Whether the fields of the qform are empty and no code claims one."""
    return int(raw["qform_code"]) <= 0 and not any(float(raw[field]) for field in _QFORM_FIELDS)


_QFORM_FIELDS = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")


def _forget_slice_timing(header: RawHeader, changed: dict[int, tuple[int, int]]) -> None:
    """Along an enlarged axis there are no slices any more that were acquired one after the other."""
    slice_axis = (int(header["dim_info"]) >> 4 & 3) - 1
    if slice_axis in changed:
        for field in ("slice_start", "slice_end", "slice_code", "slice_duration"):
            header[field] = 0


def _spm_origin(raw: RawHeader) -> list[int] | None:
    """SPM's origin, in voxels from 1, or None where the field holds none (nibabel's own test)."""
    origin, dim = [int(o) for o in raw["origin"][:3]], [int(n) for n in raw["dim"][1:4]]
    usable = any(origin) and all(-n < o < 2 * n for o, n in zip(origin, dim, strict=True))
    return origin if usable else None


def _cut_spm_origin(header: RawHeader, raw: RawHeader, first: Mapping[int, int]) -> None:
    """The origin counted from another first voxel; none where the field could not hold it as one."""
    if _spm_origin(raw) is None:
        return
    origin = header["origin"].copy()
    for axis, index in first.items():
        origin[axis] -= index
    header["origin"] = origin
    if _spm_origin(header) is None:
        header["origin"] = 0


def _move_spm_origin(header: RawHeader, changed: dict[int, tuple[int, int]]) -> None:
    # Judged by the lengths that it belongs to, which the header no longer holds.
    origin, dim = header["origin"].copy(), header["dim"][1:4].astype(int)
    for axis, (n, _) in changed.items():
        if axis < 3:
            dim[axis] = n
    if not origin[:3].any() or not all(-n < int(o) < 2 * n for o, n in zip(origin[:3], dim, strict=True)):
        return
    for axis, (n, new) in changed.items():
        moved = round((int(origin[axis]) - 0.5) * new / n + 0.5)
        origin[axis] = min(max(moved, -LARGEST_NIFTI1_LENGTH), LARGEST_NIFTI1_LENGTH)
    header["origin"] = origin


def _place(header: RawHeader, result: Volume) -> None:
    """Matrices, spacing and units of a fresh header."""
    if result.affine is not None:
        affine = np.asarray(result.affine, np.float64)
        directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        square = np.allclose(directions.T @ directions, np.eye(3), atol=1e-4)
        header.set_qform(affine, code=1 if square else 0)
        header.set_sform(affine, code=1)
        header["xyzt_units"] = 2
        return
    pixdim = header["pixdim"].copy()
    pixdim[:4] = [1.0, *_spacings_by_axis(result)]
    header["pixdim"] = pixdim
    header["xyzt_units"] = 2 if result.spacing_mm is not None else 0


def _spacings_by_axis(result: Volume) -> list[float]:
    """Spacing along columns, rows and slices: the order in which an image without a place is laid out."""
    rows_mm, columns_mm = result.spacing_mm or (1.0, 1.0)
    return [columns_mm, rows_mm, result.slice_spacing_mm or 1.0]
