"""The version: the package's metadata and every checkpoint and report read it from here."""

__version__ = "0.1.0"
