"""medsr: super-resolution for medical images, in the right place and in the right units."""

__version__ = "0.1.0"
