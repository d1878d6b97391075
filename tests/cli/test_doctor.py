"""`medsr doctor`: it finds this machine sound, names what is broken, and says what to do about it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from medsr_cli.networks import catalogue
from medsr_cli.tasks import doctor, engine_trials
from medsr_cli.tasks.engine_trials import Subject, Trial, _compared
from medsr_cli.tasks.progress import Silent
from tests.makers import almost_nearest


def checks(medsr, *arguments):
    ended = medsr("doctor", "--json", *arguments)
    return ended.code, [json.loads(line) for line in ended.out.splitlines()]


def test_this_machine_is_sound(medsr):
    code, found = checks(medsr, "--quick")
    assert code == 0
    assert not [check for check in found if check["state"] == "fault"]
    assert {check["group"] for check in found} == {"versions", "devices", "providers", "codecs", "store"}
    versions = {check["name"]: check["found"] for check in found if check["group"] == "versions"}
    assert versions["numpy"] == np.__version__
    assert all(check["name"] and check["found"] for check in found)


def test_a_person_reads_lines(medsr):
    ended = medsr("doctor", "--quick")
    assert ended.code == 0
    assert "codecs\n  ok    gzip: isal\n" in ended.out


def test_faults_are_told_with_their_remedies_and_end_with_one(medsr, monkeypatch):
    monkeypatch.setattr(doctor, "_floors", lambda: {"numpy": ">=99", "no-such-thing": ">=1"})
    broken = Trial("rdst", "fault", "onnx on cpu differs by 3e-01 of the range", "Use --backend torch.")
    monkeypatch.setattr(doctor, "trials", lambda *arguments: iter([broken]))
    ended = medsr("doctor")
    assert ended.code == 1
    assert f"FAULT numpy: {np.__version__}, needs >=99\n        Install another: pip install 'numpy>=99'." in ended.out
    assert "FAULT no-such-thing: not installed" in ended.out
    assert "FAULT rdst: onnx on cpu differs by 3e-01 of the range\n        Use --backend torch." in ended.out


def test_a_damaged_checkpoint_is_a_fault(medsr, monkeypatch, tmp_path):
    from medsr_cli.tasks.weights import open_shelf

    shelf = open_shelf()
    entry = next(entry for entry in shelf.manifest.entries if entry.bundled_file)
    shelf.store.bundled = tmp_path
    data = bytearray((open_shelf().store.path(entry)).read_bytes())
    data[-1] ^= 1
    (tmp_path / entry.bundled_file).write_bytes(data)
    monkeypatch.setattr(doctor, "open_shelf", lambda: shelf)
    code, found = checks(medsr, "--quick")
    assert code == 1
    (fault,) = [check for check in found if check["state"] == "fault"]
    assert fault["name"] == entry.id
    assert fault["remedy"]


# -- the methods -----------------------------------------------------------------------------------------------


def exported(net):
    from medsr_cli.engines.onnx_export import exported_network
    from medsr_cli.engines.onnx_file import checked_onnx
    from medsr_cli.networks.checkpoint import FORMAT, config_of

    said = {"medsr.format": FORMAT, "medsr.method": "rdst", "medsr.config": json.dumps(config_of(net))}
    return checked_onnx(exported_network(net, said, checkpoint_sha256="0" * 64), "rdst")


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_an_engine_with_other_results_is_found_out(factor):
    other = almost_nearest(2)
    other.tail[-1].weight.data *= factor
    trial = _compared(Subject(catalogue.RDST, lambda: almost_nearest(2), lambda: exported(other), "test"), 1)
    assert trial.state == ("ok" if factor == 1 else "fault")
    assert ("onnx on cpu differs by" in trial.found) is (factor != 1)
    assert set(trial.facts["differences"]) == {"onnx on cpu"}
    assert trial.facts["largest_difference"] < engine_trials.FAR or factor != 1


def test_an_engine_that_fails_does_not_hide_the_others(monkeypatch):
    def broken() -> None:
        msg = "no library"
        raise OSError(msg)

    monkeypatch.setattr(engine_trials, "_subject", lambda *_: Subject(catalogue.RDST, broken, broken, "test"))
    found = {trial.name: trial for trial in engine_trials.trials(None, Silent())}
    assert found["bicubic"].state == "ok"
    assert found["rdst"].state == "fault"
    assert "OSError: no library" in found["rdst"].found
