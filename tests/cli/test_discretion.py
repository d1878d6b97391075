"""What stands in for names: the same digits every time, on stdout and in logs; nothing of what libraries say."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsr_cli.cli import app
from medsr_cli.cli.log import LOG, has_option, keep_log, libraries_held_back, option_value
from medsr_cli.errors import InputRefused, mention, reason_of
from medsr_cli.provenance import discretion
from medsr_cli.provenance.discretion import (
    ENDINGS,
    discreet,
    discreet_command,
    discreet_facts,
    discreet_traceback,
    discreet_usage,
    ending_of,
    id_of,
    kept_salt,
    named_checkpoint,
    stand_in,
    values_of,
)

DIGITS = re.compile(r"[0-9a-f]{8}")
WORDS = frozenset({"rdst", "bicubic", "--scale", "--overwrite", "-m", "-s", "upscale"})


def begin(*arguments: str, shown: bool = False, home: Path | None = None) -> None:
    discretion.begin(shown=shown, arguments=arguments, home=None if home is None else lambda: home, words=lambda: WORDS)


@pytest.fixture(autouse=True)
def quiet():
    begin()
    yield
    begin()
    keep_log(None)


def test_a_sentence_reads_as_before_with_the_ending_that_is_known():
    begin()
    said = discreet(f"{mention('Mueller^Anna.NII.GZ')} is damaged.")
    assert re.fullmatch(r"[0-9a-f]{8}\.nii\.gz is damaged\.", said)
    assert DIGITS.fullmatch(stand_in("Mueller^Anna"))
    assert DIGITS.fullmatch(stand_in("1.2.840.Mueller")), "what follows a dot may be a name"
    assert ending_of("x.dcm#2") == ".dcm#2"
    begin(shown=True)
    assert discreet(f"{mention('Mueller^Anna.nii')} is damaged.") == "Mueller^Anna.nii is damaged."


def test_every_ending_that_formats_know_is_known(tmp_path):
    from medsr_cli import formats

    known = {ending for entry in formats.FORMATS for ending in (*entry.suffixes, *entry.data_suffixes)}
    assert known <= set(ENDINGS)
    for name in ("a.nii.gz", "a.dcm", "a.mha", "a.png", "a.mgz", "a.nrrd", "a.tiff", "a.zip"):
        assert formats.format_of_name(Path(name)) is None or ending_of(name) == name[1:]


def test_one_file_has_one_stand_in_however_it_is_named(tmp_path, monkeypatch):
    file = tmp_path / "a" / "Mueller.nii"
    file.parent.mkdir()
    file.touch()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    begin("a/Mueller.nii")
    digits = id_of(file)
    for said in ("Mueller.nii", "a/Mueller.nii", str(file), str(tmp_path / "b" / "Mueller.nii")):
        assert stand_in(said) == f"{digits}.nii", said
    assert id_of(tmp_path / "b" / "Mueller.nii") == digits


def test_files_of_one_name_differ_by_their_folders(tmp_path):
    first, second = tmp_path / "one" / "T2w.nii", tmp_path / "two" / "T2w.nii"
    begin()
    sentence = f"{mention('T2w.nii')} is damaged."
    assert discreet(sentence, first) == f"{id_of(first)}.nii is damaged."
    assert discreet(sentence, second) == f"{id_of(second)}.nii is damaged."
    assert id_of(first) != id_of(second)


def test_the_salt_is_made_once_for_its_owner_alone(tmp_path):
    home = tmp_path / "home"
    first = kept_salt(home)
    assert kept_salt(home) == first
    assert len(first) == 32
    assert stat.S_IMODE((home / "salt").stat().st_mode) == 0o600
    assert [path.name for path in home.iterdir()] == ["salt"]
    begin(home=home)
    digits = id_of("/x/Mueller.nii")
    begin(home=home)
    assert id_of("/x/Mueller.nii") == digits
    begin(home=tmp_path / "another")
    assert id_of("/x/Mueller.nii") != digits


def test_processes_that_begin_at_once_agree_on_the_salt(tmp_path):
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(kept_salt(tmp_path / "home"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["salt"]


@pytest.mark.parametrize("damage", ["file", "short", "folder"])
def test_where_no_salt_can_be_kept_there_is_one_for_the_process(tmp_path, damage):
    home = tmp_path / "home"
    if damage == "file":
        home.touch()
    else:
        home.mkdir()
        (home / "salt").mkdir() if damage == "folder" else (home / "salt").write_bytes(b"short")
    begin(home=home)
    assert id_of("/x/a.nii") == id_of("/x/a.nii")
    assert kept_salt(home) != kept_salt(home)


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=4))
def test_no_name_survives_a_sentence(name):
    begin()
    said = discreet(f"{mention(name)} is damaged.")
    assert said.endswith(" is damaged.")
    assert DIGITS.match(said)
    number = re.search(r"#\d+$", name)
    assert len(said) <= len("00000000 is damaged.") + max(map(len, ENDINGS)) + (len(number.group()) if number else 0)


@pytest.mark.parametrize(
    ("arguments", "sentence", "kept"),
    [
        (("-s", "Mueller"), "--scale Mueller is no number.", "--scale"),
        (("-m", "mueller"), "There is no method called 'mueller'.", "There is no method called"),
        (("/data/Mueller/x.safetensors",), "x.md is not there: /data/Mueller/x.md.", "is not there"),
        (("--roi=Mueller",), "--roi Mueller is no region.", "is no region"),
        (("rdst=Mueller.pt",), "Mueller.pt cannot be read.", "cannot be read"),
        ((), "/data/Mueller/scan.nii is gone.", "is gone."),
    ],
)
def test_what_the_command_line_named_is_not_repeated(arguments, sentence, kept):
    begin(*arguments)
    said = discreet(sentence)
    assert "mueller" not in said.lower()
    assert kept in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("upscale", "-m", "rdst", "-s", "4"), "rdst has no checkpoint for scale 4. Add --overwrite."),
        (("upscale", "in", "-o", "out"), "What is in there stays, and nothing goes out."),
        (("/x/ours.safetensors", "--to", "https://host.example/m/"), "Now pull https://host.example/m/ours.yaml"),
        (("-m", "rdst"), "Get https://host.example/models/rdst.txt, or hf://ORG/REPO."),
        ((), "1/2 of 3/4 and/or 5 mm/s."),
    ],
)
def test_plain_words_stay(arguments, sentence):
    begin(*arguments)
    assert discreet(sentence) == sentence


def test_medsrs_own_files_are_no_secret(tmp_path):
    begin(home=tmp_path)
    assert discreet(f"{tmp_path}/checkpoints/x.safetensors is damaged.").startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("No such option: --Mueller", ("--Mueller",)),
        ("Got unexpected extra arguments (Mueller Anna.nii)", ("a", "Mueller", "Anna.nii")),
        ("Invalid value for '--scale' / '-s': 'Mueller' is not a valid float.", ("-s", "Mueller")),
        (b"No such command 'M\\xfcller Anna'.".decode("unicode_escape"), ("Müller Anna",)),
    ],
)
def test_usage_errors_repeat_options_alone(text, arguments):
    begin(*arguments)
    said = discreet_usage(text)
    assert not re.search("mueller|anna|müller", said, re.IGNORECASE)
    assert "'--scale' / '-s'" in said or "--scale" not in text


def test_values_are_all_that_is_no_option():
    found = values_of(["upscale", "a.nii", "-sAnna", "--roi=Bert", "-o", "c", "--", "--Carl"])
    assert {"a.nii", "Anna", "Bert", "c", "--Carl"} <= set(found)


def test_commands_are_told_without_their_values():
    begin()
    told = discreet_command("medsr", ["upscale", "/x/Mueller.nii", "-m", "rdst,bicubic", "--scale=4", "-o", "Anna"])
    assert re.fullmatch(r"medsr upscale [0-9a-f]{8}\.nii -m rdst,bicubic --scale=4 -o [0-9a-f]{8}", told)
    begin(shown=True)
    assert discreet_command("medsr", ["upscale", "My scan.nii"]) == "medsr upscale 'My scan.nii'"


def test_facts_are_looked_through_to_the_last_leaf():
    begin()
    marked = mention("Mueller.nii")
    found = discreet_facts({"a": [(marked, 1.5)], marked: {"b": None}, "c": True})
    assert "Mueller" not in json.dumps(found)
    assert found["c"] is True
    assert found["a"][0][1] == 1.5


def test_checkpoints_by_id_keep_it_and_files_do_not():
    assert named_checkpoint("rdst-e-x4-brain-mr") == "rdst-e-x4-brain-mr"
    assert named_checkpoint(None) is None
    assert "Mueller" not in discreet(str(named_checkpoint("Mueller.safetensors")))


def failing(error: BaseException) -> BaseException:
    try:
        try:
            raise error
        except BaseException as first:
            raise InputRefused(f"{mention('Anna.nii')} is damaged.") from first
    except InputRefused as second:
        return second


def test_tracebacks_have_frames_and_types_and_nothing_that_a_library_said():
    begin()
    said = "Muel" + "ler"
    found = discreet_traceback(failing(ExceptionGroup(said, [KeyError(said), SyntaxError(said, (said, 1, 1, said))])))
    assert said not in found
    assert "Anna.nii" not in found.replace("mention('Anna.nii')", "")
    assert "in failing" in found
    assert {"KeyError", "SyntaxError", "ExceptionGroup"} <= set(re.findall(r"\w+", found))
    begin(shown=True)
    assert said in discreet_traceback(failing(KeyError(said)))


def test_a_chain_that_bites_its_tail_ends():
    one, two = ValueError("a"), ValueError("b")
    one.__cause__, two.__cause__ = two, one
    assert discreet_traceback(one).count("ValueError") == 2


def test_reasons_are_the_systems_own():
    assert reason_of(OSError(2, "cannot open Mueller.mnc")) == os.strerror(2)
    assert reason_of(OSError("Mueller")) == "OSError"


def test_libraries_are_held_back_and_let_go_again(capfd):
    keep_log(None)
    shown = warnings.showwarning
    with libraries_held_back():
        warnings.warn("Mueller", UserWarning, stacklevel=1)
        logging.getLogger("pydicom").critical("Mueller")
        logging.critical("Mueller")
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    assert capfd.readouterr() == ("", "")
    assert warnings.showwarning is shown
    assert logging.root.manager.disable == 0


def test_medsrs_own_log_is_written_all_the_same(tmp_path):
    path = tmp_path / "log.txt"
    keep_log(path)
    with libraries_held_back():
        LOG.info("%s", "kept")
    keep_log(None)
    assert path.read_text().endswith("INFO kept\n")


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, capfd):
    keep_log(tmp_path / "nowhere" / "log.txt")
    LOG.info("%s", "lost")
    keep_log(Path("/dev/full"))
    LOG.info("%s", "lost too")
    keep_log(None)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "found"),
    [(["--log-file", "a"], "a"), (["--log-file=b"], "b"), (["--", "--log-file", "a"], None), (["--log-file"], None)],
)
def test_the_log_file_is_known_before_the_command_line_is_read(arguments, found):
    assert option_value(arguments, "--log-file") == found


def test_what_stands_behind_the_dashes_is_no_option():
    assert has_option(["a", "--debug"], "--debug")
    assert not has_option(["a", "--", "--debug"], "--debug")


def commands(command=None, words=()):
    import typer

    command = command or typer.main.get_command(app.app)
    inner = getattr(command, "commands", None)
    if not inner:
        yield words, command
        return
    for name, one in inner.items():
        yield from commands(one, (*words, name))


OTHERS = {("upscale",), ("inspect",), ("module",)}
"""Wired by those who own them."""


@pytest.mark.parametrize(("words", "command"), list(commands()), ids=str)
def test_every_command_has_the_options_of_discretion(words, command):
    if words in OTHERS:
        pytest.skip("another's")
    options = {option for parameter in command.params for option in getattr(parameter, "opts", ())}
    assert {"--log-paths", "--debug", "--log-file"} <= options


def test_a_log_can_be_matched_with_a_json_line(medsr, tmp_path):
    from tests.makers import save_nifti

    source = save_nifti(tmp_path / "Mueller^Anna.nii.gz")
    log = tmp_path / "log.txt"
    done = medsr("compare", source, source, "--json", "--log-file", log)
    facts = json.loads(done.out)
    assert facts["a"]["name"] == source.name
    done = medsr("compare", source, tmp_path / "Mueller^Bert.nii.gz", "--log-file", log)
    assert done.code == 6
    assert "Mueller" not in done.err + log.read_text()
    named = medsr("compare", source, tmp_path / "Mueller^Bert.nii.gz", "--log-paths", "--log-file", log)
    assert "Mueller^Bert.nii.gz" in named.err
    assert "Mueller^Bert.nii.gz" in log.read_text()


def test_the_program_itself_keeps_the_terminal_to_medsr(tmp_path):
    program = (
        "import os, sys, medsr_cli.cli.app as app\n"
        "def run():\n"
        "    os.write(2, b'chatter')\n"
        "    print('said', file=sys.stderr)\n"
        "    raise ValueError('Mueller')\n"
        "app.run = run\n"
        "from medsr_cli.__main__ import main\n"
        "main()\n"
    )
    plain = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert plain.stderr.splitlines() == ["said", "medsr: something went wrong while it ended (ValueError)."]
    named = subprocess.run([sys.executable, "-c", program, "--log-paths"], capture_output=True, text=True, check=False)
    assert "chatter" in named.stderr
    assert "Mueller" in named.stderr
