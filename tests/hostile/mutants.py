"""Bad files made from good ones, and the process that opens them.

`mutant(kind, index)` is a pure function of its arguments: a file that did harm is made again from its number. Run as a
program, this module opens mutants until it is killed by one of them or through:

    python -m tests.hostile.mutants KIND FIRST STEP END FOLDER

What it finds goes to FOLDER/found.jsonl, one line each; the number at hand is in FOLDER/at, for the case that the
process does not live to tell.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import struct
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pydicom

from medsr_cli.errors import InputRefused, MedsrError
from medsr_cli.formats import open_image
from medsr_cli.volume.intensity import measure
from tests.hostile.seeds import Seed, seeds

SEED = 20261121
SECONDS = 2.0
"""Of processor time for one file."""
RSS_BYTES = 1 << 30
EXTREMES = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE,
            0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)  # fmt: skip
VALUE_REPRESENTATIONS = (
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"OB", b"OD", b"OF", b"OL",
    b"OW", b"PN", b"SH", b"SL", b"SQ", b"SS", b"ST", b"TM", b"UC", b"UI", b"UL", b"UN", b"UR", b"US", b"UT", b"ZZ",
)  # fmt: skip
NUMBERS = (
    b"0",
    b"-1",
    b"1",
    b"nan",
    b"inf",
    b"-0",
    b"1e308",
    b"1e-308",
    b"99999999",
    b"65535",
    b"4294967296",
    b"",
    b"x",
)


# -- bytes of any kind ----------------------------------------------------------------------------------------


def _place(rng: np.random.Generator, data: bytes) -> int:
    """Somewhere in the data, most often where headers are."""
    length = max(len(data), 1)
    return int(rng.integers(min(length, 1024) if rng.random() < 0.6 else length))


def flip(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        changed[_place(rng, data)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def overwrite(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    at, length = _place(rng, data), int(rng.integers(1, 33))
    return data[:at] + rng.bytes(length) + data[at + length :]


def truncate(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    return data[: _place(rng, data)]


def insert(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.bytes(int(rng.integers(1, 65))) + data[at:]


def remove(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + data[at + int(rng.integers(1, 65)) :]


def duplicate(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    at, length = _place(rng, data), int(rng.integers(1, 513))
    return data[:at] + data[at : at + length] * int(rng.integers(2, 9)) + data[at + length :]


def splice(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    return data[: _place(rng, data)] + other[_place(rng, other) :]


def extreme(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """A whole number of 1 to 8 bytes, anywhere, set to one that nobody expects."""
    size = int(rng.choice([1, 2, 4, 8]))
    number = EXTREMES[int(rng.integers(len(EXTREMES)))] & ((1 << (8 * size)) - 1)
    return _put(data, _place(rng, data), number.to_bytes(size, "little" if rng.random() < 0.6 else "big"))


def _put(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


PLAIN = (flip, flip, overwrite, truncate, insert, remove, duplicate, splice, extreme, extreme)


# -- DICOM ----------------------------------------------------------------------------------------------------

_MEANT = (  # what decides sizes
    0x00280008, 0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280102, 0x00280103, 0x00280002, 0x00280006,
    0x00280030, 0x00200032, 0x00200037, 0x00281052, 0x00281053, 0x00020010, 0x00281101, 0x00281102, 0x00280120,
    0x00280004, 0x00180050, 0x7FE00010, 0x52009230, 0x00080005, 0x60000010, 0x60003000,
)  # fmt: skip


@cache
def _elements(data: bytes) -> tuple[tuple[int, int, int, bool, bool], ...]:
    """Tag, start of the value, length, whether its length takes 32 bits, byte order, of a good file's elements."""
    # What `_inflated` gives still says that it is deflated.
    ds = pydicom.dcmread(
        io.BytesIO(data.replace(b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1".ljust(22, b"\0"), 1))
    )
    found = []
    for part in (ds.file_meta, ds):
        for tag in part.keys():  # noqa: SIM118 - a Dataset is no dict
            element = part.get_item(tag)
            at = element.value_tell if hasattr(element, "value_tell") else element.file_tell
            length = getattr(element, "length", 0) or 0
            long = bool(getattr(element, "is_implicit_VR", False)) or data[at - 8 : at - 6] in _LONG
            found.append((int(tag), int(at), int(length), long, getattr(element, "is_little_endian", True)))
    return tuple(found)


_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")


def _chosen(rng: np.random.Generator, data: bytes) -> tuple[int, int, int, bool, bool]:
    elements = _elements(data)
    meant = [element for element in elements if element[0] in _MEANT]
    pool = meant if rng.random() < 0.7 and meant else elements
    return pool[int(rng.integers(len(pool)))]


def dicom_length(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    _, at, length, long, little = _chosen(rng, data)
    numbers = (*EXTREMES, length + 1, length - 1, length * 2, length // 2, len(data), len(data) - at, len(data) * 2)
    number = max(numbers[int(rng.integers(len(numbers)))], 0)
    size = 4 if long else 2
    return _put(data, at - size, (number & ((1 << 8 * size) - 1)).to_bytes(size, "little" if little else "big"))


def dicom_value(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    _, at, length, _, little = _chosen(rng, data)
    if length <= 4:
        number = EXTREMES[int(rng.integers(len(EXTREMES)))] & ((1 << 8 * length) - 1)
        return _put(data, at, number.to_bytes(length, "little" if little else "big"))
    texts = [NUMBERS[int(rng.integers(len(NUMBERS)))] for _ in range(int(rng.integers(1, 7)))]
    length = min(length, 64)  # what is longer, or has no length, is not text
    return _put(data, at, b"\\".join(texts).ljust(length)[:length])


def dicom_vr(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    _, at, _, long, _ = _chosen(rng, data)
    vr = VALUE_REPRESENTATIONS[int(rng.integers(len(VALUE_REPRESENTATIONS)))]
    return _put(data, at - (8 if long else 4), vr)


def dicom_frames(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Another number of frames, put in where it belongs."""
    elements = [e for e in _elements(data) if e[0] >= 0x00280008 and e[0] < 0x00290000 and e[4]]
    if not elements or b"1.2.840.10008.1.2\0" in data[:400]:
        return extreme(rng, data, data)
    start = min(e[1] for e in elements) - 8
    text = NUMBERS[int(rng.integers(len(NUMBERS)))].ljust(12)
    return data[:start] + struct.pack("<HH2sH", 0x28, 8, b"IS", 12) + text + data[start:]


def dicom_fragments(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Damage in the lengths of the fragments and in the offset table."""
    start = data.rfind(b"\xe0\x7f\x10\x00")
    found = []
    at = data.find(b"\xfe\xff\x00\xe0", max(start, 0))
    while at >= 0 and len(found) < 40:
        found.append(at)
        at = data.find(b"\xfe\xff\x00\xe0", at + 4)
    if not found:
        return overwrite(rng, data, data)
    at = found[int(rng.integers(len(found)))] + 4 + int(rng.choice([0, 4, 8, 12]))
    number = EXTREMES[int(rng.integers(len(EXTREMES)))] & 0xFFFFFFFF
    return _put(data, at, struct.pack("<I", number))


def dicom_codestream(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Damage in the first bytes of the pixels, where codestreams have their own headers."""
    start = max(data.rfind(b"\xe0\x7f\x10\x00"), data.rfind(b"\x7f\xe0\x00\x10"), 0)
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        at = min(start + int(rng.integers(20, 220)), len(data) - 1)
        changed[at] = int(rng.integers(256)) if rng.random() < 0.5 else (0, 255, 1, 127)[int(rng.integers(4))]
    return bytes(changed)


DICOM = (dicom_length, dicom_length, dicom_value, dicom_value, dicom_value, dicom_vr, dicom_frames, dicom_fragments,
         dicom_codestream)  # fmt: skip


def _inflated(data: bytes) -> bytes | None:
    """A deflated file as if it were plain, to be deflated again after the damage."""
    if b"1.2.840.10008.1.2.1.99" not in data[:400]:
        return None
    start = 144 + struct.unpack_from("<I", data, 140)[0]
    return data[:start] + zlib.decompress(data[start:], -15)


def _deflated(data: bytes) -> bytes:
    start = 144 + struct.unpack_from("<I", data, 140)[0] if len(data) > 144 else len(data)
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return data[:start] + packer.compress(data[start:]) + packer.flush()


# -- NIfTI ----------------------------------------------------------------------------------------------------

_FIELDS_1 = {  # offset, type, how many
    "sizeof": (0, "i", 1), "dim": (40, "h", 8), "datatype": (70, "h", 1), "bitpix": (72, "h", 1),
    "pixdim": (76, "f", 8), "vox_offset": (108, "f", 1), "scl": (112, "f", 2), "units": (123, "B", 1),
    "codes": (252, "h", 2),
    "quatern": (256, "f", 6), "srow": (280, "f", 12), "magic": (344, "B", 4), "extension": (348, "i", 3),
}  # fmt: skip
_FIELDS_2 = {
    "sizeof": (0, "i", 1), "magic": (4, "B", 8), "datatype": (12, "h", 1), "bitpix": (14, "h", 1), "dim": (16, "q", 8),
    "pixdim": (104, "d", 8), "vox_offset": (168, "q", 1), "scl": (176, "d", 2), "codes": (344, "i", 2),
    "quatern": (352, "d", 6), "srow": (400, "d", 12), "units": (500, "i", 1), "extension": (540, "i", 3),
}  # fmt: skip
_REALS = (0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e38, -1e38, 1e-38, 352.0, 353.5, 1e9, 7e307)
_DATA_TYPES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, -1, 255)


def nifti_field(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    order = "<" if len(data) > 4 and data[0] else ">"
    fields = _FIELDS_2 if len(data) > 4 and struct.unpack_from(order + "i", data)[0] == 540 else _FIELDS_1
    for _ in range(int(rng.integers(1, 4))):
        at, code, count = list(fields.values())[int(rng.integers(len(fields)))]
        at += struct.calcsize(code) * int(rng.integers(count))
        if code in "fd":
            value = _REALS[int(rng.integers(len(_REALS)))]
            packed = struct.pack(order + code, np.float32(min(max(value, -3e38), 3e38)) if code == "f" else value)
        else:
            numbers = EXTREMES if code in "BiQq" or rng.random() < 0.6 else _DATA_TYPES
            size = struct.calcsize(code)
            number = numbers[int(rng.integers(len(numbers)))] & ((1 << 8 * size) - 1)
            packed = number.to_bytes(size, "little" if order == "<" else "big")
        data = _put(data, at, packed)
    return data


NIFTI = (nifti_field,)


# -- PNG ------------------------------------------------------------------------------------------------------


def _chunks(data: bytes) -> list[tuple[int, int]]:
    """Start and length of the data of every chunk."""
    found, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        found.append((at + 8, length))
        at += 12 + length
    return found


def png_chunk(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """A chunk with other bytes, a type or a length of its own, and (often) the checksum that belongs to them."""
    chunks = _chunks(data)
    at, length = chunks[int(rng.integers(len(chunks)))] if rng.random() < 0.6 else chunks[0]
    what = rng.random()
    if what < 0.15:
        number = EXTREMES[int(rng.integers(len(EXTREMES)))] & 0xFFFFFFFF
        return _put(data, at - 8, struct.pack(">I", number))
    if what < 0.25:
        kinds = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"iCCP", b"zTXt", b"iTXt", b"acTL", b"fcTL",
                 b"fdAT", b"eXIf", b"pHYs", b"tEXt")  # fmt: skip
        kind = kinds[int(rng.integers(len(kinds)))]
        return (
            data[: at - 4]
            + kind
            + data[at : at + length]
            + _crc(kind, data[at : at + length])
            + data[at + length + 4 :]
        )
    if what < 0.35:
        return data[: at - 8] + data[at - 8 : at + length + 4] * int(rng.integers(2, 6)) + data[at + length + 4 :]
    body = bytearray(data[at : at + length])
    for _ in range(int(rng.integers(1, 5))):
        if body:
            body[int(rng.integers(len(body)))] = (0, 1, 2, 3, 4, 6, 8, 16, 127, 255)[int(rng.integers(10))]
    kind = data[at - 4 : at]
    return data[:at] + bytes(body) + _crc(kind, bytes(body)) + data[at + length + 4 :]


def png_size(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Another width, height, depth, colour or interlacing, with the right checksum."""
    head = bytearray(data[16:29])
    if rng.random() < 0.6:
        number = EXTREMES[int(rng.integers(len(EXTREMES)))] & 0xFFFFFFFF
        head[:8] = _put(bytes(head[:8]), 4 * int(rng.integers(2)), struct.pack(">I", number))
    else:
        head[int(rng.integers(8, 13))] = (0, 1, 2, 3, 4, 6, 8, 16)[int(rng.integers(8))]
    return data[:16] + bytes(head) + _crc(b"IHDR", bytes(head)) + data[33:]


def png_pixels(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """Damage behind the compression."""
    for at, length in _chunks(data):
        if data[at - 4 : at] == b"IDAT":
            try:
                inside = zlib.decompress(data[at : at + length])
            except zlib.error:
                break
            body = zlib.compress(PLAIN[int(rng.integers(len(PLAIN)))](rng, inside, other), 1)
            return (
                data[: at - 8]
                + struct.pack(">I4s", len(body), b"IDAT")
                + body
                + _crc(b"IDAT", body)
                + data[at + length + 4 :]
            )
    return flip(rng, data, other)


def _crc(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(kind + body))


PNG = (png_chunk, png_chunk, png_size, png_pixels)


# -- mutants --------------------------------------------------------------------------------------------------

OWN = {"dicom": DICOM, "nifti": NIFTI, "png": PNG, "others": (extreme,)}


@cache
def _seeds(kind: str) -> list[Seed]:
    return seeds(kind)


def mutant(kind: str, index: int) -> tuple[Seed, bytes, str]:
    """The seed, the damaged bytes, and how they were damaged."""
    rng = np.random.default_rng([SEED, list(OWN).index(kind), index])
    pool = _seeds(kind)
    seed = pool[int(rng.integers(len(pool)))]
    other = pool[int(rng.integers(len(pool)))].data
    own = rng.random() < 0.6
    change = (OWN[kind] if own else PLAIN)[int(rng.integers(len(OWN[kind] if own else PLAIN)))]
    data, packed = seed.data, ""
    if rng.random() < 0.75 or own:  # else the packed bytes themselves are damaged
        data, packed = _unpacked(seed, data)
    damaged = change(rng, data, other)
    if rng.random() < 0.15:
        damaged = PLAIN[int(rng.integers(len(PLAIN)))](rng, damaged or b"\0", other)
    if packed == "gzip":
        damaged = gzip.compress(damaged, 1, mtime=0)
    elif packed == "deflated":
        damaged = _deflated(damaged)
    return seed, damaged, change.__name__


def _unpacked(seed: Seed, data: bytes) -> tuple[bytes, str]:
    if data[:2] == b"\x1f\x8b":
        return gzip.decompress(data), "gzip"
    inflated = _inflated(data) if seed.suffix == ".dcm" else None
    return (data, "") if inflated is None else (inflated, "deflated")


# -- opening them ---------------------------------------------------------------------------------------------


def attempt(path: Path) -> str:
    """Open, measure and describe; returns `accepted` or `refused`.

    Raises:
        Exception: anything that is not an `InputRefused` with a sentence, which is what is looked for.
    """
    try:
        reader = open_image(path)
        reader.details()
        volume = reader.volume
        shape = (volume.channels, volume.rows, volume.columns)

        def checked() -> Iterator[np.ndarray]:
            count = 0
            for pixels in reader.slices():
                count += 1
                assert pixels.shape == shape, "a slice of another shape"
                assert pixels.dtype == volume.dtype, "a slice of another type"
                yield pixels
            assert count == volume.slices, "another number of slices"

        measured = measure(checked(), volume.padding, volume.alpha)
        assert measured.slices == volume.slices
    except InputRefused as error:
        says = str(error)
    else:
        return "accepted"
    assert "\n" not in says, "more than one line"
    assert "more memory than there is" not in says, "memory was asked for that a small file cannot need"
    return "refused"


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + RSS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def peak_bytes() -> int:
    """The most memory that this process had; `getrusage` would tell that of the process which started it, too."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


def _warm_up(kind: str, folder: Path) -> None:
    """Libraries are imported and tables filled before memory and time are counted."""
    for at, seed in enumerate(_seeds(kind)):
        path = _laid_out(seed, seed.data, folder / f"warm{at}")
        try:
            attempt(path)
        except MedsrError:
            continue


def _laid_out(seed: Seed, data: bytes, stem: Path) -> Path:
    path = stem.with_name(stem.name + seed.suffix)
    path.write_bytes(data)
    for suffix, half in seed.beside.items():
        stem.with_name(stem.name + suffix).write_bytes(half)
    return path


def main(kind: str, first: int, step: int, end: int, folder: Path) -> None:
    """Open every `step`-th mutant."""
    # Nothing here may end up on the terminal: what a codec prints would hide what is looked for.
    _warm_up(kind, folder)
    _limit_memory()
    counts: Counter[str] = Counter()
    slowest, most = (0.0, -1), 0
    files = Path(folder, "file")
    at_file = os.open(folder / "at", os.O_RDWR | os.O_CREAT)
    began = time.monotonic()
    with (folder / "found.jsonl").open("a", encoding="utf-8") as found:
        for index in range(first, end, step):
            os.pwrite(at_file, b"%12d" % index, 0)
            seed, data, change = mutant(kind, index)
            path = _laid_out(seed, data, files)
            start = time.process_time()
            fault = ""
            try:
                counts[attempt(path)] += 1
            except MedsrError as error:
                fault = f"{type(error).__name__} instead of InputRefused: {error}"
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                ours = [f for f in traceback.extract_tb(error.__traceback__) if "medsr_cli" in f.filename][-1:]
                fault = f"{type(error).__name__}: {error} at {where.filename}:{where.lineno}, by {ours}"
            seconds = time.process_time() - start
            slowest = max(slowest, (seconds, index))
            most = peak_bytes()
            if not fault and seconds > SECONDS:
                fault = f"took {seconds:.1f} s"
            if not fault and most > RSS_BYTES:
                fault = f"took {most >> 20} MiB"
            if fault:
                counts["faults"] += 1
                line = {"index": index, "seed": seed.name, "change": change, "fault": fault}
                found.write(json.dumps(line) + "\n")
                found.flush()
    os.pwrite(at_file, b"%12d" % -1, 0)
    summary = {
        **counts,
        "seconds": time.monotonic() - began,
        "slowest_s": slowest[0],
        "slowest": slowest[1],
        "rss_mib": most >> 20,
    }
    (folder / f"summary{first}.json").write_text(json.dumps(summary), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
