"""A picture archive of its own for a test: Debian's Orthanc on free loopback ports, ended with the test."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

MISSING = [tool for tool in ("Orthanc", "storescu", "findscu", "movescu") if shutil.which(tool) is None]
NEEDED = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

TITLE = "MEDSRTEST"
CALLER = "STORESCU"
START_S = 30.0

# What storescu has to propose for each transfer syntax: it opens one association for one of them.
PROPOSALS = {
    "1.2.840.10008.1.2": "-xi",
    "1.2.840.10008.1.2.1": "-xe",
    "1.2.840.10008.1.2.5": "-xr",
    "1.2.840.10008.1.2.4.80": "-xt",
    "1.2.840.10008.1.2.4.90": "-xv",
}


class Archive:
    """A running Orthanc."""

    def __init__(self, dicom_port: int, http_port: int) -> None:
        self.dicom_port, self.http_port = dicom_port, http_port

    def send(self, folder: Path, transfer_syntax: str = "1.2.840.10008.1.2.1") -> None:
        """C-STORE every file below a folder; any status but success fails."""
        done = _run(
            "storescu", "-aet", CALLER, "-aec", TITLE, PROPOSALS[transfer_syntax], "+sd", "+r",
            "127.0.0.1", str(self.dicom_port), str(folder),
        )  # fmt: skip
        assert "Warning" not in done, done

    def find(self, level: str, **keys: str) -> list[str]:
        """C-FIND in the study root; what findscu prints of each answer."""
        asked = [f"-k={name}={value}" for name, value in {"QueryRetrieveLevel": level, **keys}.items()]
        words = [word for key in asked for word in ("-k", key.removeprefix("-k="))]
        printed = _run("findscu", "-S", "-aec", TITLE, *words, "127.0.0.1", str(self.dicom_port))
        return [part for part in printed.split("Find Response")[1:] if keys]

    def get(self, path: str) -> object:
        """Parsed answer of the REST interface."""
        return json.loads(self.fetch(path))

    def fetch(self, path: str) -> bytes:
        """Raw answer of the REST interface."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=60) as answer:
            return answer.read()

    def instances(self) -> dict[str, str]:
        """Orthanc's identifier of every stored object, by SOPInstanceUID."""
        return {one["MainDicomTags"]["SOPInstanceUID"]: one["ID"] for one in self.get("/instances?expand")}

    def series(self) -> dict[str, list[str]]:
        """SOPInstanceUIDs of every stored series."""
        found = {}
        for one in self.get("/series?expand"):
            members = [self.get(f"/instances/{i}")["MainDicomTags"]["SOPInstanceUID"] for i in one["Instances"]]
            found[one["MainDicomTags"]["SeriesInstanceUID"]] = sorted(members)
        return found


@contextlib.contextmanager
def running_archive(folder: Path) -> Iterator[Archive]:
    """Start Orthanc with an empty store in `folder`; it has ended when the block has."""
    archive = Archive(_free_port(), _free_port())
    configuration = {
        "Name": "medsr test",
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "index"),
        "Plugins": [],
        "HttpServerEnabled": True,
        "HttpPort": archive.http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomServerEnabled": True,
        "DicomAet": TITLE,
        "DicomPort": archive.dicom_port,
        "DicomCheckCalledAet": True,
        "DicomAlwaysAllowStore": True,
        "DicomAlwaysAllowFind": True,
        "UnknownSopClassAccepted": False,
        "OverwriteInstances": False,
        "DefaultEncoding": "Latin1",
    }
    file = folder / "orthanc.json"
    file.write_text(json.dumps(configuration))
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen(["Orthanc", str(file)], stdout=log, stderr=log)
        try:
            _wait_for(archive, process, folder / "orthanc.log")
            yield archive
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)


def _wait_for(archive: Archive, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            archive.get("/system")
            return
        time.sleep(0.1)
    pytest.fail(f"Orthanc did not start: {log.read_text(errors='replace')[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{command[0]}: {said[-2000:]}"
    return said
