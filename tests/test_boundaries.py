"""The rooms of the house: who may import whom, who writes, who opens sockets, and what start-up costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "medsr_cli"
ROOMS = {
    "cli": {"cli", "tasks", "errors"},
    "tasks": {
        "tasks",
        "engines",
        "formats",
        "weights",
        "training",
        "evaluation",
        "provenance",
        "networks",
        "volume",
        "errors",
    },
    "engines": {"engines", "networks", "volume", "errors"},
    "formats": {"formats", "volume", "errors"},
    "weights": {"weights", "networks", "errors"},
    # Training saves its state and its result through the one writer, and scores with the metrics.
    "training": {"training", "evaluation", "provenance", "formats", "networks", "volume", "errors"},
    "evaluation": {"evaluation", "networks", "volume", "errors"},
    "provenance": {"provenance", "errors"},
    "networks": {"networks", "errors"},
    "volume": {"volume", "errors"},
    "errors": {"errors"},
}
FOREIGN = {
    "cli": {"typer", "click", "rich"},
    "tasks": {"numpy", "torch", "PIL", "yaml", "packaging", "psutil", "distributed"},
    "engines": {"numpy", "torch", "onnx", "onnxruntime", "psutil"},
    "formats": {"numpy", "nibabel", "pydicom", "SimpleITK", "PIL", "isal", "gdcm", "scipy", "h5py", "png", "zlib"},
    "weights": {"yaml", "huggingface_hub", "filelock"},
    "training": {"numpy", "torch", "filelock", "yaml", "accelerate", "matplotlib"},
    "evaluation": {"numpy", "torch", "scipy", "PIL"},
    "provenance": set(),
    "networks": {"torch", "safetensors"},
    "volume": {"numpy"},
    "errors": set(),
}
HEAVY = {"torch", "onnx", "onnxruntime", "SimpleITK", "pydicom", "nibabel", "numpy", "PIL"}
SOCKETS = {
    *("socket", "socketserver", "ssl", "http", "urllib", "ftplib", "smtplib", "poplib", "imaplib", "xmlrpc", "asyncio"),
    *("urllib3", "requests", "httpx", "aiohttp", "huggingface_hub"),
}
"""Libraries that open connections."""
WRITERS = {
    *("formats/atomic.py", "formats/delivery.py", "weights/store.py", "training/workfolder.py"),
    *("tasks/batch_locks.py", "tasks/batch_record.py"),
}
"""Results are written by `formats/atomic.py` alone, and by `delivery` into a hub's folder that is there already; the
store keeps its downloads, a training removes its work; a batch adds lines to its record and has files for locks."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every dotted name that a module imports, anywhere in it, but for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in set(ast.walk(tree)) - for_types:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "medsr_cli" else set()
            found |= names or {node.module or ""}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "medsr_cli":
            target = parts[1] if len(parts) > 1 else ""
            if target in ("", "__version__"):
                continue
            assert target in ROOMS[room], f"{room} must not import {name}"
        elif parts[0] not in sys.stdlib_module_names:
            assert parts[0] in FOREIGN[room], f"{room} must not import {parts[0]}"


def test_every_room_is_known():
    rooms = {room_of(path) for path in modules()} - {"__init__", "__main__"}
    assert rooms <= set(ROOMS), "a folder that the layout does not name"


def socket_libraries(path: Path) -> set[str]:
    """What a module imports that can open a connection; `urllib.parse` takes addresses apart and opens none."""
    return {name for name in imports(path) if name.split(".")[0] in SOCKETS and name != "urllib.parse"}


def test_only_one_module_opens_sockets():
    used = {path.relative_to(PACKAGE).as_posix(): socket_libraries(path) for path in modules()}
    assert {name: libraries for name, libraries in used.items() if libraries}.keys() == {"weights/fetch.py"}, used


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import urllib.parse", set()),
        ("from urllib.parse import urlsplit", set()),
        ("import urllib", {"urllib"}),
        ("from urllib import request", {"urllib"}),
        ("import urllib.request as r", {"urllib.request"}),
        ("def f():\n    from huggingface_hub import HfApi", {"huggingface_hub"}),
        ("import http.client", {"http.client"}),
    ],
)
def test_a_socket_library_is_seen_wherever_it_is_imported(tmp_path, line, found):
    (tmp_path / "module.py").write_text(line)
    assert socket_libraries(tmp_path / "module.py") == found


def writing_calls(path: Path) -> list[str]:
    """Calls that open a file for writing or change a folder."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in {"write_text", "write_bytes", "replace_file", "rename", "rmtree"}:
            found.append(name)
        if name == "open":
            # Path.open(mode) or open(path, mode); an archive's member, opened by (info, mode), is not a file.
            position = 0 if isinstance(node.func, ast.Attribute) else 1
            mode = (
                node.args[position].value
                if len(node.args) > position and isinstance(node.args[position], ast.Constant)
                else ""
            )
            if isinstance(mode, str) and set(mode) <= set("rwxab+t") and set(mode) & set("wxa"):
                found.append(f"open {mode}")
    return found


def test_only_the_named_writers_write():
    for path in modules():
        relative = path.relative_to(PACKAGE).as_posix()
        if relative not in WRITERS:
            assert not writing_calls(path), f"{relative}: {writing_calls(path)}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["models"],
        ["upscale", "--help"],
        ["weights", "list"],
        ["evaluate", "--help"],
        ["compare", "--help"],
        ["finetune", "--help"],
        ["export", "--help"],
        ["doctor", "--help"],
    ],
)
def test_start_up_imports_nothing_heavy(arguments):
    program = (
        "import sys\n"
        "from medsr_cli.cli import app\n"
        f"sys.argv = ['medsr', *{arguments!r}]\n"
        "try:\n    app.run()\nexcept SystemExit as end:\n    code = end.code\n"
        f"heavy = sorted(set(sys.modules) & {HEAVY!r})\n"
        "assert not heavy, heavy\n"
        "assert code == 0, code\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_networks_package_costs_nothing_to_import():
    program = "import sys, medsr_cli.networks, medsr_cli.networks.catalogue; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("3", "3")])
def test_numpy_leaves_the_cores_to_the_engine_unless_told_otherwise(monkeypatch, given, expected):
    import os

    from medsr_cli.__main__ import share_cores

    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", given)
    share_cores()
    assert os.environ["OPENBLAS_NUM_THREADS"] == expected


def test_numpy_is_not_imported_before_it_is_told():
    program = "import sys, medsr_cli.__main__\nassert 'numpy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, check=False).returncode == 0
