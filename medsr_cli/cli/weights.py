"""`medsr weights`: the checkpoints on this machine. Results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medsr_cli.cli.log import LOG
from medsr_cli.cli.options import Debug, LogFile, LogPaths
from medsr_cli.errors import ArgumentsError, mention
from medsr_cli.tasks.discretion import discreet, discreet_facts

if TYPE_CHECKING:
    from medsr_cli.tasks.pull import Pulled
    from medsr_cli.tasks.weights import Listed
    from medsr_cli.weights.manifest import Entry

CORRUPT = 5
"""Exit code where a checkpoint is corrupt, or one that was named is missing."""

app = typer.Typer(
    help="List, fetch, verify, convert, send and carry checkpoints.",
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
def list_command(
    as_json: AsJson = False, log_file: LogFile = None, log_paths: LogPaths = False, debug: Debug = False
) -> None:
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
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME…", help="Checkpoint ids, or the ID.yaml of one that was pushed: file or address."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every checkpoint of the manifest.")] = False,
    allow_unpinned: Annotated[
        bool, typer.Option("--allow-unpinned", help="Also those whose hash nobody has written down yet.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Open no connection.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
    log_paths: LogPaths = False,
    debug: Debug = False,
) -> None:
    """Fetch checkpoints, check their hashes, convert them where needed, and print where they are."""
    from medsr_cli.tasks.pull import PullRequest, pull

    request = PullRequest(names or (), everything, allow_unpinned, offline)
    with _progress_bar(shown=not (no_progress or quiet)) as progress:
        result = pull(request, progress)
    for pulled in result.pulled:
        _print_pulled(pulled, as_json=as_json, quiet=quiet)
    if result.skipped and not quiet:
        ids = ", ".join(entry.id for entry in result.skipped)
        _say(f"Left out, because the manifest does not say their hash: {ids}. Add --allow-unpinned to fetch them.")
    for entry, error in result.failed[1:]:
        _say(f"{entry.id}: {error.marked}")
    if result.failed:
        raise result.failed[0][1]


@app.command("verify")
def verify_command(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="Checkpoint ids; none: all.")] = None,
    as_json: AsJson = False,
    log_file: LogFile = None,
    log_paths: LogPaths = False,
    debug: Debug = False,
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
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .pt, .pth, .tar, .zip or .safetensors checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    method: Annotated[str | None, typer.Option("--model", "-m", help="Its method; default: recognised.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="What no tensor tells, such as scale=2 of a uscyclegan."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
    log_paths: LogPaths = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint of an author, reading every size of the network from its tensors.

    Nothing in the file is executed. The result is what --weights takes. A file that medsr itself wrote is copied as it
    is, but for what --set changes.
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


@app.command("push")
def push_command(
    what: Annotated[
        str,
        typer.Argument(metavar="FILE|ID", help="A .safetensors file, its card beside it; or a checkpoint's id."),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="ADDRESS",
            help="hf://ORG/REPO, hf://ORG/REPO@BRANCH or https://HOST/FOLDER/ (by PUT).",
        ),
    ],
    card: Annotated[Path | None, typer.Option("--card", help="The model card; default: FILE.md beside FILE.")] = None,
    token_env: Annotated[
        str | None,
        typer.Option(
            "--token-env",
            metavar="VARIABLE",
            help="Environment variable that holds the token, or USER:PASSWORD. Default: HF_TOKEN or the hub's own "
            "login; MEDSR_PUSH_TOKEN for a web server.",
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, say what would go, send nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other bytes under the same names.")] = False,
    insecure_http: Annotated[
        bool, typer.Option("--insecure-http", help="Allow http: to another machine, unencrypted, token included.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Open no connection.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
    log_paths: LogPaths = False,
    debug: Debug = False,
) -> None:
    """Send a checkpoint to a model hub or to your own server, with its card.

    Three files go out: ID.safetensors, its model card ID.md, and ID.yaml, which says what it is, its sha256 and
    where it lies; anyone who may read there then runs medsr weights pull ADDRESS/ID.yaml. A fourth, ID.png, goes
    along where the card shows it and it lies beside the card; nothing else does. On a hub without a README.md the
    card becomes that too.

    Before: the file must load, be safetensors, and have a card that states its sha256, licence, data and recipe.
    Equal files that are there already stay as they are; other ones are replaced with --overwrite alone.
    After: each file is read back and compared.

    A token is read from the environment, never from the command line, and never shown. HF_ENDPOINT names another
    hub, such as a mirror. Certificates are always verified (SSL_CERT_FILE names your own authority).

    \b
    Examples:
      medsr weights push ours-x4.safetensors --to hf://our-group/models --private
      medsr weights push ours-x4.safetensors --to https://store.example/models/
      medsr weights push rdst-e-x4-brain-mr --to https://store.example/models/
    """
    from medsr_cli.tasks.push import PushRequest, push

    request = PushRequest(what, to, card, token_env, private, dry_run, overwrite, insecure_http, offline)
    with _progress_bar(shown=not (no_progress or quiet)) as progress:
        done = push(request, progress=progress, say=_say if not quiet else lambda sentence: None)
    for planned in done.plan if dry_run else ():
        facts = {"name": planned.name, "to": planned.to, "bytes": planned.bytes, "sha256": planned.sha256}
        _print_row({"id": done.id, "status": "would be sent", **facts}, planned.to, as_json=as_json)
    for sent in done.sent:
        facts = {"name": sent.name, "to": sent.url, "bytes": sent.digest.bytes, "sha256": sent.digest.sha256}
        row = {"id": done.id, "status": sent.status, **facts, "verified": sent.verified}
        _print_row(row, sent.url, as_json=as_json)
        if not sent.verified:
            _say(f"{sent.name}: the server does not let it be read back, so nothing proves that it arrived whole.")
    if done.sent and done.pull and not quiet:
        _say(f"To have it on another machine: medsr weights pull {done.pull}")


def _print_row(row: dict[str, Any], address: str, *, as_json: bool) -> None:
    if as_json:
        _print_json(row)
    else:
        print(f"{row['status']}\t{address}")


def parsed_setting(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        msg = f"--set {mention(text)} is not of the form NAME=VALUE."
        raise ArgumentsError(msg, "Such as --set scale=2.")
    return name.strip(), value.strip()


@bundle_app.command("export")
def bundle_export_command(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A .zip or .tar file.")],
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="Checkpoint ids; none: all here.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    log_file: LogFile = None,
    log_paths: LogPaths = False,
    debug: Debug = False,
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
    log_file: LogFile = None,
    log_paths: LogPaths = False,
    debug: Debug = False,
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
    print(json.dumps(discreet_facts(facts), ensure_ascii=False))


def _say(sentence: str) -> None:
    sentence = discreet(sentence)
    LOG.info("%s", sentence)
    print(sentence, file=sys.stderr)


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
