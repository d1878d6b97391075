"""Many results into one folder that is there already, for whoever waits for a last file before looking.

A routing hub gives a program an output folder, mounted and perhaps not empty. It cannot be renamed into place as
`atomic_folder` does; its files are, one after the other, when all of them are whole and on the disk, and the file
that says so comes last. A run that is killed between two of them leaves whole files and no last one; the next run
replaces them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from medsr_cli.errors import ArgumentsError, mention
from medsr_cli.formats.atomic import _fsync_folder, _fsync_path, _locked, _reported, sweep_stale, temporary_beside


class Delivery:
    """Files on their way into a folder."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        """An empty folder on the same file system; what is in it and was not added is removed."""
        self._files: dict[str, Path] = {}

    def add(self, path: Path, name: str) -> None:
        """Deliver a file that lies in the temporary folder under this name.

        Raises:
            ArgumentsError: another file has the name already.
        """
        if name in self._files or Path(name).name != name:
            msg = f"Two files would become {mention(name)}."
            raise ArgumentsError(msg, "Give files of different names.")
        self._files[name] = path

    def add_copy(self, path: Path, name: str) -> None:
        """Deliver a copy of a file, byte for byte."""
        with _reported(self.temporary / "copy"):
            copies = self.temporary / "copies"
            copies.mkdir(exist_ok=True)
            copy = copies / f"{len(self._files)}"
            shutil.copyfile(path, copy)
        self.add(copy, name)

    def add_text(self, text: str, name: str) -> None:
        """Deliver a text file, UTF-8."""
        with _reported(self.temporary / "text"):
            path = self.temporary / f"text{len(self._files)}"
            with path.open("xb") as file:
                file.write(text.encode())
        self.add(path, name)

    def finish(self, folder: Path, last: str) -> None:
        """Bring everything to the disk, then rename it: first the old last file goes, at the end the new one comes."""
        for path in self._files.values():
            _fsync_path(path)
        with contextlib.suppress(FileNotFoundError):
            (folder / last).unlink()
        for name in sorted(self._files, key=lambda name: (name == last, name)):
            if name == last:
                _fsync_folder(folder)
            os.replace(self._files[name], folder / name)
        _fsync_folder(folder)


@contextlib.contextmanager
def delivery_into(folder: Path, last: str) -> Iterator[Delivery]:
    """Yield a delivery whose files appear in `folder` when the block ends without an error, `last` after all others.

    Args:
        folder: there already, or made; files of the same names in it are replaced, all others stay as they are.
        last: the name of the file that says that the delivery is whole; an older one is removed before anything
            else changes.

    Raises:
        RunError: the folder cannot be written, or the disk is full; nothing is delivered then, or a part of the files
            without `last`.
    """
    with _reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
    sweep_stale(folder)
    temporary = temporary_beside(folder / last)
    guard = temporary.with_suffix(".lock")
    try:
        with _reported(folder / last):
            lock = _locked(guard)
            try:
                temporary.mkdir()
                delivery = Delivery(temporary)
                yield delivery
                delivery.finish(folder, last)
            finally:
                lock.close()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            guard.unlink()
