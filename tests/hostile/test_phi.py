"""No tag value and no name of a file leaves medsr but where it was asked for: canaries in all of them, every command.

Most cases run in this process with captured streams; what needs a process of its own (a signal, a broken pipe, a
full disk, what C++ writes to the terminal) runs as one.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest

from medsr_cli.cli import app
from tests.hostile import canaries
from tests.hostile.canaries import ALL, NAME_CANARIES, SERIES_UID, TAG_CANARIES

LOUD = ("-v", "--debug")
WRITTEN: list[tuple[str, str]] = []
"""Event and path of everything that this process opens for writing, makes or renames, see `_watch`."""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        flags = arguments[2] or 0
        mode = arguments[1]
        if (isinstance(mode, str) and set(mode) & set("wxa+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            WRITTEN.append((event, os.fsdecode(arguments[0])))
    elif event == "os.mkdir" and os.path.isdir(arguments[0]):
        return  # it is made sure of, not made
    elif event in ("os.mkdir", "os.symlink", "tempfile.mkstemp", "tempfile.mkdtemp"):
        WRITTEN.append((event, os.fsdecode(arguments[0])))


@pytest.fixture(scope="module", autouse=True)
def _watched() -> None:
    sys.addaudithook(_watch)


@dataclass
class Scene:
    """Files full of canaries, and a plain place to work in."""

    root: Path
    plain: Path
    leaks: dict[str, set[str]] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home = self.root / "Qzda folder"
        self.series = canaries.dicom(self.home / "Qzdb series")
        self.nifti = canaries.nifti(self.home / "Qzdb^scan.nii.gz")
        self.other = canaries.nifti(self.home / "Qzdb^other.nii.gz", 1)
        self.pictures = canaries.pictures(self.home)
        self.archive = canaries.archive(self.home / "Qzdc.zip", self.series)
        self.checkpoint = canaries.checkpoint(self.home / "Qzdd.safetensors")
        self.recipe = self.home / "Qzde.yaml"
        self.recipe.write_text("# Qzcj\nmethod: rdst\nnonsense: 1\n")
        self.tree = canaries.tree(self.root / "Qzda tree")
        self.damaged = self.home / "Qzdh.nii.gz"
        self.damaged.write_bytes(self.nifti.read_bytes()[:900])
        self.number = 0

    def run(self, *arguments: object, reports: dict[str, Path] | None = None, names: tuple[str, ...] = ALL) -> int:
        """Run a command, and look for `names` in stderr, the log, reports, stdout's sentences and temporary names."""
        self.number += 1
        log = self.plain / f"log{self.number}.txt"
        words = [str(word) for word in arguments]
        case = " ".join(words)[:90]
        if words[0] != "frame":
            words += ["--log-file", str(log)] if takes(words[0], "--log-file") else []
        WRITTEN.clear()
        code, out, err = in_process(words)
        self.codes[case] = code
        told = {"stderr": err, "log": read(log), "stdout": sentences(out)}
        told |= {name: read(path) for name, path in (reports or {}).items()}
        told["names"] = "\n".join(os.path.basename(path.rstrip("/")) for _, path in WRITTEN)
        self.look(case, told, names)
        return code

    def look(self, case: str, told: dict[str, str], names: tuple[str, ...] = ALL) -> None:
        """Note every canary that is where it should not be."""
        for place, text in told.items():
            for canary in names:
                at = text.lower().find(canary.lower())
                if at >= 0:
                    self.leaks.setdefault(canary, set()).add(
                        f"{place} of {case!r}: {text[max(at - 80, 0) : at + 40]!r}"
                    )


def takes(command: str, option: str) -> bool:
    """Whether a command has an option; groups are asked by their own commands in the tests."""
    done = in_process([command, "--help"])
    return option in done[1]


def in_process(words: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    argv, handler = sys.argv, signal.signal
    sys.argv = ["medsr", *words]
    signal.signal = lambda *_: None  # type: ignore[assignment]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            app.run()
    finally:
        sys.argv, signal.signal = argv, handler  # type: ignore[assignment]
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


def read(path: Path) -> str:
    """A file as text, unpacked where it is compressed; empty where there is none."""
    if not path.is_file():
        return ""
    data = path.read_bytes()
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8", "replace")
    # Pixels in a page are letters too, any letters.
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)


def sentences(out: str) -> str:
    """What stdout says in words: the errors and warnings of its JSON lines. Paths there are results."""
    found = []
    for line in out.splitlines():
        if line.startswith("{"):
            facts = json.loads(line)
            found += [json.dumps(facts.get(key)) for key in ("error", "warnings", "notes", "report", "reason")]
    return "\n".join(found)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    plain = tmp_path_factory.mktemp("plain")
    before = Path.cwd()
    os.chdir(plain)
    yield Scene(tmp_path_factory.mktemp("root"), plain)
    os.chdir(before)


@pytest.fixture(autouse=True)
def fresh(scene: Scene) -> None:
    scene.leaks.clear()


def none_leaked(scene: Scene) -> None:
    told = "\n".join(f"{canary}: {sorted(where)[0]}" for canary, where in scene.leaks.items())
    if told:
        pytest.fail(told, pytrace=False)


def test_there_are_forty_canaries_in_tags_and_each_is_in_the_series(scene: Scene):
    held = b"".join(path.read_bytes() for path in scene.series.iterdir()).decode("latin-1").lower()
    assert len(TAG_CANARIES) == 40
    assert [canary for canary in TAG_CANARIES if canary.lower() not in held] == []
    assert len(set(ALL)) == len(ALL) == 60


@pytest.mark.parametrize("kind", ["series", "nifti", "archive", "png", "tiff", "nrrd"])
def test_upscale_keeps_names_to_itself(scene: Scene, kind: str):
    source = scene.pictures.get(kind) or getattr(scene, kind)
    report, preview = scene.plain / f"{kind}.json", scene.plain / f"{kind}.png"
    out = scene.plain / {"series": "one", "archive": "two", "nifti": "r.nii.gz"}.get(kind, f"r.{kind}")
    common = ("upscale", source, "-m", "bicubic", "-s", 2, "-o", out, "--overwrite", "--report", report)
    reports = {"report": report, "preview": preview}
    assert scene.run(*common, "--preview", preview, *LOUD, reports=reports) == 0
    assert report.is_file()
    assert scene.run(*common, "--json", *LOUD, reports=reports) == 0
    none_leaked(scene)


def test_learned_models_and_checkpoints_by_name(scene: Scene):
    report = scene.plain / "learned.json"
    shipped = ("upscale", scene.series, "-m", "rdst-e", "-s", 4, "-o", scene.plain / "learned", "--backend", "torch")
    assert scene.run(*shipped, "--report", report, "--json", *LOUD, reports={"report": report}) == 0
    own = ("upscale", scene.nifti, "--weights", scene.checkpoint, "-s", 2, "-o", scene.plain / "own.nii.gz")
    assert scene.run(*own, "--backend", "torch", "--report", report, *LOUD, reports={"report": report}) == 0
    none_leaked(scene)


def test_maps_and_pictures_made_of_dicom_hold_no_tag(scene: Scene):
    target, preview = scene.plain / "map.nii.gz", scene.plain / "map.png"
    common = ("upscale", scene.series, "-m", "bicubic", "-s", 2, "-o", scene.plain / "mapped")
    made = {"map": target, "preview": preview}
    assert scene.run(*common, "--consistency-map", target, "--preview", preview, reports=made) == 0
    header = nib.load(target).header
    scene.look("map", {"header": str(header) + repr(header.extensions), "bytes": read(target)})
    none_leaked(scene)


def test_results_are_named_after_the_input_and_nothing_after_a_tag(scene: Scene):
    before = set(scene.root.rglob("*"))
    assert scene.run("upscale", scene.home, "-m", "bicubic", "-s", 2, "--recursive", "--skip-existing", *LOUD) in (0, 3)
    new = [path.relative_to(scene.root) for path in set(scene.root.rglob("*")) - before]
    assert new
    # Names of inputs are in the names of results, for that is what the user chose; tags are nowhere.
    scene.look("tree", {"paths": "\n".join(map(str, new))}, TAG_CANARIES)
    assert not [path for path in scene.root.parent.iterdir() if "bb" in path.name.lower() and path != scene.root]
    none_leaked(scene)
    for path in new:
        if (scene.root / path).is_file():
            (scene.root / path).unlink()


def test_batches_tell_each_failure_without_its_name(scene: Scene):
    missing = scene.home / "Qzdi gone.nii.gz"
    for more in ((), ("--json",), ("-q",)):
        common = ("upscale", scene.nifti, scene.damaged, missing, "-m", "bicubic", "-s", 2, "-o", scene.plain / "batch")
        code = scene.run(*common, "--overwrite", *more, "--debug")
        assert code == 3
    none_leaked(scene)


def test_evaluate_reports_without_names_unless_they_are_asked_for(scene: Scene):
    out = scene.plain / "evaluated"
    reports = {name: out / name for name in ("evaluation.json", "slices.csv", "report.html")}
    (scene.tree / "Qzdg^One" / "Qzdh.nii.gz").write_bytes(scene.damaged.read_bytes())
    common = ("evaluate", scene.tree, "-m", f"bicubic,lanczos,rdst={scene.checkpoint}", "-s", 2, "-o", out)
    assert scene.run(*common, "--overwrite", "--backend", "torch", "--json", "--debug", reports=reports) == 3
    assert all(path.is_file() for path in reports.values())
    assert scene.run(*common, "--overwrite", "--backend", "torch", reports=reports) == 3
    none_leaked(scene)
    assert scene.run(*common, "--overwrite", "--backend", "torch", "--log-paths", reports=reports) == 3
    assert {"Qzdg", "Qzdb", "Qzda"} <= set(scene.leaks), "names are shown where they are asked for"
    assert all(any(place in where for where in scene.leaks["Qzdg"]) for place in reports)
    (scene.tree / "Qzdg^One" / "Qzdh.nii.gz").unlink()


def test_compare_reports_without_names(scene: Scene):
    out = scene.plain / "compared"
    reports = {name: out / name for name in ("comparison.json", "comparison.html")}
    for more in (("--json",), ("--reference", "--map", scene.plain / "flagged.nii.gz")):
        assert scene.run("compare", scene.nifti, scene.other, "-o", out, "--overwrite", *more, reports=reports) == 0
    assert scene.run("compare", scene.series, scene.series, "-o", out, "--overwrite", "--debug", reports=reports) == 0
    assert scene.run("compare", scene.nifti, scene.series, "-o", out, "--overwrite", "--debug", reports=reports) == 6
    none_leaked(scene)


def test_finetune_keeps_names_in_its_packed_slices_alone(scene: Scene):
    output = scene.plain / "ours.safetensors"
    common = ("finetune", scene.tree, "-m", "rdst-e", "-s", 2, "-o", output, "--preset", "quick", "--iterations", 2)
    small = ("--batch", 1, "--patch", 12, "--validate-every", 1, "--keep-work", "--overwrite", "--device", "cpu")
    code = scene.run(*common, *small, "--threads", 1, "--json", "--debug")
    work = output.with_suffix(".work")
    assert code in (0, 7), code
    made = {path.name: path for path in (*work.iterdir(), *scene.plain.glob("ours*")) if path.is_file()}
    assert {"run.json", "log.jsonl", "state.pt"} <= set(made)
    told = {name: path.read_bytes().decode("latin-1") for name, path in made.items() if name != "slices.safetensors"}
    scene.look("finetune", told)
    none_leaked(scene)
    # Going on finds the same split again, though no name of it was written down.
    run = json.loads((work / "run.json").read_text())
    assert run["validation"]
    assert all(re.fullmatch(r"subject \d+", subject) for subject in run["validation"])
    again = ("finetune", scene.tree, "-m", "rdst-e", "-s", 2, "-o", output, "--resume", "--iterations", 3)
    assert scene.run(*again, "--keep-work", "--device", "cpu", "--threads", 1) in (0, 7)
    assert json.loads((work / "run.json").read_text())["validation"] == run["validation"]
    none_leaked(scene)


def test_the_other_commands(scene: Scene):
    plain = scene.plain
    for source in (scene.series, scene.nifti, scene.archive, scene.damaged, *scene.pictures.values()):
        scene.run("inspect", source, "--debug")
    for source in (scene.series, scene.damaged):
        scene.run("inspect", source, "--json", "--debug", names=tuple(set(ALL) - {"77.90003"}))
    scene.run("doctor", "--quick")
    scene.run("models")
    scene.run("models", "Qzdi")
    scene.run("weights", "verify", "Qzdd")
    scene.run("weights", "import", scene.checkpoint, "-o", plain / "imported.safetensors", "--overwrite")
    scene.run("weights", "import", scene.nifti, "-o", plain / "never.safetensors")
    scene.run("weights", "pull", scene.home / "Qzdd.yaml", "--offline")
    scene.run("weights", "push", scene.checkpoint, "--to", "https://store.example/models/", "--dry-run")
    scene.run("weights", "bundle", "import", scene.archive)
    scene.run("export", "--weights", scene.checkpoint, "-o", plain / "net.onnx", "--overwrite", "--no-check", "--debug")
    scene.run("export", "--weights", scene.nifti, "-o", plain / "never.onnx", "--debug")
    scene.run("finetune", scene.home / "Qzdi", "-o", plain / "x.safetensors")
    scene.run("finetune", scene.tree, "-o", plain / "x.safetensors", "--recipe", scene.recipe)
    scene.run("demo", "-o", scene.home / "nowhere" / "there" / "demo.png", "--threads", 1)
    none_leaked(scene)


WRONG = [
    ("upscale", "{nifti}", "-s", "Qzdi"),
    ("upscale", "{nifti}", "--spacing", "Qzdi"),
    ("upscale", "{nifti}", "--tile", "Qzdi"),
    ("upscale", "{nifti}", "--threads", "Qzdi"),
    ("upscale", "{nifti}", "--Qzdi"),
    ("upscale", "{nifti}", "--modality", "Qzdi"),
    ("upscale", "{nifti}", "--roi", "Qzdi"),
    ("upscale", "{nifti}", "--max-vram", "Qzdi"),
    ("upscale", "{nifti}", "--axis", "Qzdi"),
    ("upscale", "{nifti}", "--channels", "Qzdi,"),
    ("upscale", "{nifti}", "--device", "Qzdi"),
    ("upscale", "{nifti}", "--precision", "Qzdi"),
    ("upscale", "{nifti}", "--backend", "Qzdi"),
    ("upscale", "{nifti}", "-m", "Qzdi"),
    ("upscale", "{nifti}", "-m", "{nifti}"),
    ("upscale", "{nifti}", "--weights", "Qzdi"),
    ("upscale", "{nifti}", "--weights", "{nifti}"),
    ("upscale", "{nifti}", "-m", "bicubic", "-o", "{nifti}"),
    ("upscale", "{nifti}", "-m", "bicubic", "-o", "{other}"),
    ("upscale", "{nifti}", "-m", "bicubic", "-o", "{home}/Qzdi.xyz"),
    ("upscale", "{nifti}", "-m", "bicubic", "-o", "/proc/1/Qzdi.nii.gz"),
    ("upscale", "{nifti}", "{series}", "-m", "cohft-s", "--guide", "{other}"),
    ("upscale", "{recipe}"),
    ("Qzdi",),
    ("{nifti}",),
    ("compare", "{nifti}"),
    ("compare", "{nifti}", "{other}", "Qzdi"),
    ("compare", "{nifti}", "{other}", "--degradation", "Qzdi"),
    ("compare", "{nifti}", "{other}", "--report", "{nifti}"),
    ("evaluate", "{home}/Qzdi"),
    ("evaluate", "{tree}", "-s", "Qzdi"),
    ("evaluate", "{tree}", "-m", "Qzdi"),
    ("evaluate", "{tree}", "-m", "Qzdi="),
    ("evaluate", "{tree}", "--protocol", "Qzdi"),
    ("evaluate", "{tree}", "--subject", "Qzdi"),
    ("evaluate", "{tree}", "--segmentation", "Qzdi"),
    ("finetune", "{tree}", "-o", "Qzdi.nii.gz"),
    ("finetune", "{tree}", "-o", "x", "--preset", "Qzdi"),
    ("finetune", "{tree}", "-o", "x", "--set", "Qzdi"),
    ("finetune", "{tree}", "-o", "x", "--set", "Qzdi=3"),
    ("finetune", "{tree}", "-o", "x", "--task", "Qzdi"),
    ("finetune", "{tree}", "-o", "x", "--val", "Qzdi"),
    ("finetune", "{tree}", "-o", "x", "--captions", "Qzdi"),
    ("finetune", "{tree}", "-o", "x", "--weights", "Qzdi"),
    ("weights", "import", "{checkpoint}", "-o", "x", "--set", "Qzdi"),
    ("weights", "import", "{checkpoint}", "-o", "x", "-m", "Qzdi"),
    ("weights", "Qzdi"),
    ("export", "-o", "Qzdi.png"),
    ("export", "-o", "x.onnx", "--weights", "Qzdi.pth"),
    ("models", "rdst", "--size", "Qzdi"),
    ("doctor", "Qzdi"),
]


@pytest.mark.parametrize("words", WRONG, ids=lambda words: " ".join(words)[:60])
def test_wrong_arguments_are_not_repeated(scene: Scene, words: tuple[str, ...]):
    code = scene.run(*(word.format(**vars(scene)) for word in words))
    assert code != 0
    none_leaked(scene)


SAID = "Qz" + "ci"
"""Put together, so that the lines of this file in a traceback do not hold it."""


def _warn() -> None:
    warnings.warn(SAID, UserWarning, stacklevel=1)
    logging.getLogger("pydicom").error(SAID)
    logging.getLogger("distributed").critical(SAID)
    logging.warning(SAID)
    thread = threading.Thread(target=_fail, args=(ValueError(SAID),))
    thread.start()
    thread.join()


def _fail(error: BaseException) -> None:
    raise error


def _chained() -> None:
    try:
        try:
            _fail(KeyError(SAID))
        except KeyError as error:
            raise ValueError(SAID) from error
    except ValueError:
        local = f"{SAID} local"
        raise RuntimeError(local)  # noqa: B904 - the context is what this is about


CRASHES: dict[str, tuple[Callable[[], None], int]] = {
    "chained": (_chained, 1),
    "unicode": (lambda: (SAID.encode() + b"\xff").decode() and None, 1),
    "key": (lambda: _fail(KeyError(SAID)), 1),
    "system": (lambda: _fail(OSError(SAID)), 1),
    "memory": (lambda: _fail(MemoryError(SAID)), 1),
    "syntax": (lambda: _fail(SyntaxError(SAID, (SAID, 1, 1, SAID))), 1),
    "group": (lambda: _fail(ExceptionGroup(SAID, [ValueError(SAID), KeyError(SAID)])), 1),
    "recursion": (lambda: _fail(RecursionError(SAID)), 1),
    "interrupt": (lambda: _fail(KeyboardInterrupt(SAID)), 130),
}


@pytest.mark.parametrize("where", ["medsr_cli.formats.open_image", "medsr_cli.tasks.enlarge.Enlarger.run"])
@pytest.mark.parametrize("what", CRASHES)
def test_what_a_library_says_is_not_passed_on(scene: Scene, monkeypatch, what: str, where: str):
    crash, code = CRASHES[what]

    def broken(*_: object, **__: object) -> None:
        _warn()
        crash()

    monkeypatch.setattr(where, broken)
    common = ("upscale", scene.nifti, "-m", "bicubic", "-s", 2, "-o", scene.plain / "crash.nii.gz")
    assert scene.run(*common, "--overwrite", "--debug", "-v") in (code, 6)
    none_leaked(scene)


def process(scene: Scene, program: str, *arguments: object, **more: Any) -> subprocess.Popen[bytes]:
    code = f"import os, sys\n{program}\nfrom medsr_cli.__main__ import main\nmain()\n"
    environment = {**os.environ, "MEDSR_HOME": str(scene.plain / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(Path(app.__file__).resolve().parents[2])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, cwd=scene.plain, env=environment, **more)


def upscaling(scene: Scene, target: str) -> tuple[object, ...]:
    return "upscale", scene.nifti, "-m", "bicubic", "-s", "2", "-o", scene.plain / target, "--debug", "-v"


def test_what_c_code_writes_to_the_terminal_stays_inside(scene: Scene):
    program = (
        "import medsr_cli.formats, atexit, subprocess\n"
        "def broken(*_, **__):\n"
        "    os.write(2, b'Qzci chatter of a library\\n')\n"
        "    subprocess.run(['sh', '-c', 'echo Qzci >&2'])\n"
        "    raise ValueError('Qzci')\n"
        "medsr_cli.formats.open_image = broken\n"
        "atexit.register(lambda: 1 / 0)\n"
        "class Odd:\n"
        "    def __del__(self): raise ValueError('Qzci')\n"
        "odd = Odd()\n"
    )
    ended = process(scene, program, *upscaling(scene, "c.nii.gz"), stdout=subprocess.PIPE)
    out, err = ended.communicate(timeout=60)
    assert ended.returncode == 1
    assert b"ValueError" in err
    scene.look("c", {"stderr": err.decode(), "stdout": out.decode()})
    none_leaked(scene)


def test_a_full_disk_names_nothing(scene: Scene):
    program = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"
    ended = process(scene, program, *upscaling(scene, "full.nii.gz"), stdout=subprocess.PIPE)
    out, err = ended.communicate(timeout=60)
    assert ended.returncode != 0
    assert not (scene.plain / "full.nii.gz").exists()
    scene.look("full", {"stderr": err.decode(), "stdout": out.decode()})
    none_leaked(scene)


def test_a_reader_that_went_away_names_nothing(scene: Scene):
    reader, writer = os.pipe()
    os.close(reader)
    ended = process(scene, "", *upscaling(scene, "pipe.nii.gz"), stdout=writer)
    os.close(writer)
    _, err = ended.communicate(timeout=60)
    scene.look("pipe", {"stderr": err.decode()})
    none_leaked(scene)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_names_nothing(scene: Scene, number: signal.Signals):
    program = (
        "import time, medsr_cli.tasks.enlarge as e\n"
        "def slow(*_, **__):\n    print('begun', flush=True)\n    time.sleep(30)\n"
        "e.Enlarger.run = slow\n"
    )
    ended = process(scene, program, *upscaling(scene, "signal.nii.gz"), stdout=subprocess.PIPE)
    assert ended.stdout is not None
    assert ended.stdout.readline() == b"begun\n"
    time.sleep(0.1)
    ended.send_signal(number)
    out, err = ended.communicate(timeout=60)
    assert ended.returncode in (130, 143)
    scene.look("signal", {"stderr": err.decode(), "stdout": out.decode()})
    none_leaked(scene)


def test_a_damaged_series_is_refused_without_its_tags(scene: Scene):
    """Cut at several places: in the header, before the pixels, within them."""
    whole = sorted(scene.series.iterdir())[0].read_bytes()
    for number, share in enumerate((0.02, 0.1, 0.3, 0.6, 0.95)):
        folder = scene.home / f"Qzdj cut{number}"
        folder.mkdir()
        (folder / "Qzdb.dcm").write_bytes(whole[: int(len(whole) * share)])
        (folder / "Qzdc.dcm").write_bytes(whole.replace(b"Qzaa", b"\xff\xfe\xff\xfe"))
        scene.run("upscale", folder, "-m", "bicubic", "-s", 2, "-o", scene.plain / f"cut{number}", "--debug")
        scene.run("inspect", folder, "--debug")
    none_leaked(scene)


def test_two_series_are_listed_by_their_uids_alone(scene: Scene):
    import pydicom

    folder = canaries.dicom(scene.home / "Qzdj two")
    for path in sorted(folder.iterdir())[:2]:
        ds = pydicom.dcmread(path)
        ds.SeriesInstanceUID = SERIES_UID + ".1"
        ds.save_as(path)
    scene.run(
        "upscale", folder, "-m", "bicubic", "-s", 2, "-o", scene.plain / "which", "--debug",
        names=tuple(set(ALL) - {"77.90003"}),
    )  # fmt: skip
    none_leaked(scene)


def test_a_series_that_is_not_there_is_answered_by_a_list_of_uids(scene: Scene):
    names = tuple(set(ALL) - {"77.90003"})
    assert scene.run("upscale", scene.series, "--series", "Qzdi", "--debug", names=names) != 0
    none_leaked(scene)


def test_no_path_is_built_from_a_tag():
    """The names that results get come from inputs and numbers: no module joins a tag's value to a path."""
    import ast

    package = Path(app.__file__).resolve().parents[1]
    tags = re.compile(r"^(Patient|Study|Series|Accession|SOP|Institution|Protocol)[A-Z]\w+$")
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            joined = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
            called = isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
                "Path",
                "joinpath",
                "with_name",
                "join",
                "mkdir",
            )
            if joined or called:
                names = {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
                assert not [name for name in names if tags.match(name)], f"{path.name}, line {node.lineno}"


def test_names_are_where_results_are(scene: Scene):
    """stdout is for a pipeline: it has paths as they are, and digits that are in the log too."""
    code, out, err = in_process(["compare", str(scene.nifti), str(scene.other), "--json"])
    assert code == 0
    facts = json.loads(out)
    assert facts["a"]["name"] == scene.nifti.name
    assert any(name in out for name in NAME_CANARIES)
    code, out, err = in_process(["compare", str(scene.nifti), str(scene.damaged), "--json"])
    assert code == 6
    from medsr_cli.provenance.discretion import id_of

    assert f"{id_of(scene.damaged)}.nii.gz" in err
