"""A trained run that the tests of the commands share."""

from support.trained_run import run

__all__ = ["run"]
