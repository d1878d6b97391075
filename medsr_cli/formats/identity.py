"""Whether two images are of the same patient and in the same coordinates, without anyone seeing who it is.

What tags say is hashed with a salt that lives as long as the process: two identities can be compared, and nothing
can be read from them, stored or looked up.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

IDENTITY_KEYWORDS = (
    "PatientID", "IssuerOfPatientID", "PatientBirthDate", "StudyInstanceUID", "SeriesInstanceUID",
    "FrameOfReferenceUID",
)  # fmt: skip
"""DICOM tags that an identity is made of."""

_SALT = secrets.token_bytes(32)


@dataclass(frozen=True)
class Identity:
    """Salted hashes of what identifies an image; None for what the file does not say."""

    patient: str | None = None
    issuer: str | None = None
    birth_date: str | None = None
    study: str | None = None
    series: str | None = None
    frame_of_reference: str | None = None

    @classmethod
    def of(cls, tags: Mapping[str, str]) -> Identity:
        """Hash the texts of `IDENTITY_KEYWORDS`; padding around a text does not count, an empty one is none."""
        return cls(*(_hashed(tags.get(keyword, "")) for keyword in IDENTITY_KEYWORDS))

    def same_patient(self, other: Identity) -> bool | None:
        """Whether both are of one patient; None where a file does not say.

        Numbers from different issuers are different patients, and so are different dates of birth.
        """
        if any(_same(a, b) is False for a, b in ((self.issuer, other.issuer), (self.birth_date, other.birth_date))):
            return False
        return _same(self.patient, other.patient)

    def same_study(self, other: Identity) -> bool | None:
        """Whether both are of one study; None where a file does not say."""
        return _same(self.study, other.study)

    def same_series(self, other: Identity) -> bool | None:
        """Whether both are one and the same series; None where a file does not say."""
        return _same(self.series, other.series)

    def same_frame(self, other: Identity) -> bool | None:
        """Whether positions of both count from one origin; None where a file does not say."""
        return _same(self.frame_of_reference, other.frame_of_reference)


def _hashed(text: str) -> str | None:
    text = text.strip("\0 ")
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=_SALT).hexdigest() if text else None


def _same(one: str | None, other: str | None) -> bool | None:
    return None if one is None or other is None else one == other
