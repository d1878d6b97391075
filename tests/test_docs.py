"""The documentation cannot drift from the commands: each is in the README, has help, and states its defaults."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import typer

from medsr_cli.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[tuple[str, object]]:
    group = typer.main.get_command(app)
    found = []
    for name, command in group.commands.items():
        nested = getattr(command, "commands", None)
        if nested is None:
            found.append((name, command))
            continue
        for inner, leaf in nested.items():
            deeper = getattr(leaf, "commands", None)
            names = (
                [(f"{name} {inner}", leaf)]
                if deeper is None
                else [(f"{name} {inner} {n}", c) for n, c in deeper.items()]
            )
            found += names
    return found


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_is_documented_and_has_help(name, command):
    assert f"medsr {name}" in README, f"README.md does not mention medsr {name}"
    assert command.help
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            assert parameter.help, f"medsr {name} {parameter.opts} has no help"


def test_every_exit_code_is_documented():
    for code in range(8):
        assert f"| {code} |" in README


def test_nothing_private_is_committed():
    """Paths of a machine have no place in the repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".sh"} and name != "tests/test_docs.py":
            text = path.read_text(encoding="utf-8")
            for word in ("/home/", "/root/", "/work" + "/"):
                assert word not in text, f"{name} holds {word}"
