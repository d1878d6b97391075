"""Texts to BERT's token ids: WordPiece with a given vocabulary (Devlin et al., NAACL 2019; Wu et al., 2016).

As Bio_ClinicalBERT reads text: in lower case and without accents, although its vocabulary is the cased one of BERT.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from medsr_cli.errors import WeightsError, mention

if TYPE_CHECKING:
    from os import PathLike

FIRST, LAST, UNKNOWN = "[CLS]", "[SEP]", "[UNK]"
CONTINUED = "##"
"""Begins a piece that goes on with the piece before it."""
LONGEST_WORD = 100
"""Longer words are unknown, as in BERT."""
MAX_FILE_BYTES = 10_000_000


class WordPiece:
    """`ids(text)`: [CLS], the longest pieces of every word from its start, [SEP]."""

    def __init__(self, pieces: Mapping[str, int]) -> None:
        absent = [piece for piece in (FIRST, LAST, UNKNOWN) if piece not in pieces]
        if absent:
            msg = f"The vocabulary has no {absent[0]}."
            raise WeightsError(msg, "Use the vocab.txt that belongs to the text encoder.")
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, those of its beginning and end included."""
        inner = (number for word in words(text) for number in self._word(word))
        return [self.pieces[FIRST], *inner, self.pieces[LAST]]

    def _word(self, word: str) -> Iterable[int]:
        if len(word) > LONGEST_WORD:
            return [self.pieces[UNKNOWN]]
        found: list[int] = []
        start = 0
        while start < len(word):
            prefix = CONTINUED if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self.pieces), None)
            if end is None:
                return [self.pieces[UNKNOWN]]
            found.append(self.pieces[prefix + word[start:end]])
            start = end
        return found


def words(text: str) -> list[str]:
    """Words and punctuation marks, in lower case, without accents and control characters."""
    plain = unicodedata.normalize("NFD", text.lower())
    spaced = []
    for character in plain:
        category = unicodedata.category(character)
        if category == "Mn" or (category.startswith("C") and character not in "\t\n\r"):
            continue
        spaced.append(f" {character} " if _stands_alone(character, category) else character)
    return "".join(spaced).split()


def _stands_alone(character: str, category: str) -> bool:
    symbol = character.isascii() and character.isprintable() and not character.isalnum() and character != " "
    return symbol or category.startswith("P") or "\u4e00" <= character <= "\u9fff"


def read_vocabulary(path: str | PathLike[str]) -> WordPiece:
    """The tokeniser of a `vocab.txt`: one piece a line, UTF-8, numbered from 0.

    Raises:
        WeightsError: not readable, not a vocabulary, or a piece stands twice.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            msg = f"{mention(path.name)} is too large for a vocabulary."
            raise WeightsError(msg, "Use the vocab.txt that belongs to the text encoder.")
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"The vocabulary {mention(path)} cannot be read as text."
        raise WeightsError(msg, "Use the vocab.txt that belongs to the text encoder.") from error
    if lines and not lines[-1]:
        lines.pop()
    pieces = {line.removesuffix("\r"): i for i, line in enumerate(lines)}
    if len(pieces) != len(lines):
        msg = f"{mention(path.name)} has a piece twice, so that numbers of pieces are not certain."
        raise WeightsError(msg, "Use the vocab.txt that belongs to the text encoder.")
    return WordPiece(pieces)
