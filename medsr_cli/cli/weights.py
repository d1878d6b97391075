"""`medsr weights`: the checkpoints on this machine. Results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medsr_cli.errors import ArgumentsError

if TYPE_CHECKING:
    from medsr_cli.tasks.weights import Listed, Pulled
    from medsr_cli.weights.manifest import Entry

CORRUPT = 5
"""Exit code where a checkpoint is corrupt, or one that was named is missing."""

app = typer.Typer(
    help="List, fetch, verify, convert and carry checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
)
bundle_app = typer.Typer(help="Carry checkpoints to a machine without a network, in one file.", no_args_is_help=True)
app.add_typer(bundle_app, name="bundle")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors on stderr.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]


@app.command("list")
def list_command(as_json: AsJson = False) -> None:
    """Show every checkpoint: what it is for, its licence, and whether it is on this machine."""
    from medsr_cli.tasks.weights import list_weights

    rows = list_weights()
    if as_json:
        for row in rows:
            _print_json(_listed_json(row))
    elif sys.stdout.isatty():
        _print_table(rows)
    else:
        for row in rows:
            print("\t".join(_columns(row)))


@app.command("pull")
def pull_command(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="Checkpoint ids.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every checkpoint of the manifest.")] = False,
    allow_unpinned: Annotated[
        bool, typer.Option("--allow-unpinned", help="Also those whose hash nobody has written down yet.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Open no connection.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fetch checkpoints, check their hashes, convert them where needed, and print where they are."""
    from medsr_cli.tasks.weights import PullRequest, pull

    request = PullRequest(names or (), everything, allow_unpinned, offline)
    with _progress_bar(shown=not (no_progress or quiet)) as progress:
        result = pull(request, progress)
    for pulled in result.pulled:
        _print_pulled(pulled, as_json=as_json, quiet=quiet)
    if result.skipped and not quiet:
        ids = ", ".join(entry.id for entry in result.skipped)
        _say(f"Left out, because the manifest does not say their hash: {ids}. Add --allow-unpinned to fetch them.")
    for entry, error in result.failed[1:]:
        _say(f"{entry.id}: {error}")
    if result.failed:
        raise result.failed[0][1]


@app.command("verify")
def verify_command(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="Checkpoint ids; none: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compute the hashes again: ok, missing or corrupt. Exit 5 if one is corrupt, or one named is missing."""
    from medsr_cli.tasks.weights import verify

    rows = verify(names or ())
    for row in rows:
        if as_json:
            _print_json({"id": row.entry.id, "status": row.status, "path": str(row.path), "reason": row.reason})
        else:
            print(f"{row.status}\t{row.entry.id}\t{row.path}")
            if row.reason:
                _say(f"{row.entry.id}: {row.reason}")
    if any(row.status == "corrupt" or (names and row.status == "missing") for row in rows):
        raise typer.Exit(CORRUPT)


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .pt, .pth, .tar or .safetensors checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    method: Annotated[str | None, typer.Option("--model", "-m", help="Its method; default: recognised.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="What no tensor tells, such as scale=2 of a uscyclegan."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint of an author, reading every size of the network from its tensors.

    Nothing in the file is executed. The result is what --weights takes.
    """
    from medsr_cli.tasks.weights import ImportRequest, import_weights

    given = dict(parsed_setting(text) for text in settings or ())
    done = import_weights(ImportRequest(file, output, method, overwrite, given))
    if as_json:
        facts = {name: getattr(done, name) for name in done.__dataclass_fields__}
        _print_json({**facts, "path": str(done.path)})
    else:
        print(done.path)
        sizes = ", ".join(f"{key} {value}" for key, value in done.config.items())
        _say(f"{done.variant or done.method}, {done.parameters} parameters: {sizes}. sha256 {done.sha256}.")
        assumed = [f"{name} {done.config[name]}" for name in done.untold if name not in given]
        if assumed:
            _say(f"No tensor tells these, they were assumed (--set NAME=VALUE says otherwise): {', '.join(assumed)}.")


def parsed_setting(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        msg = f"--set {text} is not of the form NAME=VALUE."
        raise ArgumentsError(msg, "Such as --set scale=2.")
    return name.strip(), value.strip()


@bundle_app.command("export")
def bundle_export_command(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A .zip or .tar file.")],
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="Checkpoint ids; none: all here.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Pack checkpoints with their hashes and licences into one file."""
    from medsr_cli.tasks.weights import ExportRequest, export_bundle

    entries = export_bundle(ExportRequest(output, names or (), overwrite))
    if as_json:
        _print_json({"path": str(output), "ids": [entry.id for entry in entries]})
    else:
        print(output)
        _say(f"Packed {', '.join(entry.id for entry in entries)}.")


@bundle_app.command("import")
def bundle_import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that bundle export wrote.")],
    as_json: AsJson = False,
) -> None:
    """Verify a bundle and put its checkpoints in the store; prints where they are."""
    from medsr_cli.tasks.weights import import_bundle

    for arrived in import_bundle(file):
        if as_json:
            _print_json({"id": arrived.entry.id, "path": str(arrived.path), "written": arrived.written})
        else:
            print(arrived.path)


def _listed_json(row: Listed) -> dict[str, Any]:
    return {
        **row.entry.to_json(),
        "pinned": row.entry.pinned,
        "state": row.state,
        "path": str(row.path) if row.state != "missing" else None,
    }


def _columns(row: Listed) -> tuple[str, ...]:
    entry = row.entry
    scales = ",".join(entry.scale_words)
    size = f"{entry.bytes / 1e6:.1f} MB" if entry.bytes else "?"
    return (entry.id, entry.variant or entry.method, scales, _subject(entry), size, row.words, entry.licence.weights)


def _subject(entry: Entry) -> str:
    return f"{entry.modality} {entry.body_part}"


def _print_table(rows: list[Listed]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("checkpoint", "method", "scale", "for", "size", "here", "licence of the weights", box=None)
    for row in rows:
        table.add_row(*_columns(row))
    Console().print(table)


def _print_pulled(pulled: Pulled, *, as_json: bool, quiet: bool) -> None:
    seen = pulled.seen
    if as_json:
        facts = {"id": pulled.entry.id, "path": str(pulled.path), "fetched": pulled.fetched}
        if seen:
            facts |= {"bytes_seen": seen.bytes, "sha256_seen": seen.sha256}
        _print_json(facts)
    else:
        print(pulled.path)
    if seen and not quiet:
        _say(f"{pulled.entry.id} is not pinned. Seen, for pinning: bytes {seen.bytes}, sha256 {seen.sha256}.")


def _print_json(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, ensure_ascii=False))


def _say(message: str) -> None:
    print(message, file=sys.stderr)


@contextlib.contextmanager
def _progress_bar(*, shown: bool) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on stderr where that is a terminal; nothing in a job's log."""
    if not (shown and sys.stderr.isatty()):
        yield lambda done_bytes, total_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done_bytes: int, total_bytes: int | None) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes)

        yield show
