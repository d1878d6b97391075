import re

import pytest

from medsr_cli.errors import InputRefused
from medsr_cli.training.captions import TEMPLATES, WORDS, made_caption, read_captions

TEXT = "a nice image of an ultrasound\nune échographie nette\n\nlast one"
LINES = ["a nice image of an ultrasound", "une échographie nette", "", "last one"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n\r\n"])
def test_every_encoding_gives_the_lines(tmp_path, encoding, end):
    path = tmp_path / "captions.txt"
    path.write_bytes(
        (TEXT.replace("\n", "\r\n") if "\r" in end else TEXT).encode(encoding)
        + end.encode(
            encoding
            if encoding not in ("utf-8-sig", "utf-16")
            else {"utf-8-sig": "utf-8", "utf-16": "utf-16-le"}[encoding]
        )
    )
    assert read_captions(path) == LINES


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_bytes(b"\xff\xfe\x00\xd8\x00\xd8\x01")
    with pytest.raises(InputRefused, match="neither UTF-8 nor UTF-16"):
        read_captions(path)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InputRefused, match="neither UTF-8 nor UTF-16"):
        read_captions(path)
    with pytest.raises(InputRefused, match=r"gone\.txt cannot be read"):
        read_captions(tmp_path / "gone.txt")


def test_made_captions_are_of_the_paper():
    patterns = [re.compile(re.escape(t).replace(re.escape("{attr}"), "(.+)")) for t in TEMPLATES]
    counts, used = set(), set()
    for image in range(300):
        caption = made_caption(3, image)
        assert caption == made_caption(3, image)
        which, found = next((n, m) for n, m in enumerate(p.fullmatch(caption) for p in patterns) if m)
        words = found[1].split(", ")
        assert set(words) <= set(WORDS)
        assert len(set(words)) == len(words)
        counts.add(len(words))
        used.add(which)
    assert counts == set(range(1, 8))
    assert used == {0, 1, 2}
    assert [made_caption(3, i) for i in range(20)] != [made_caption(4, i) for i in range(20)]
