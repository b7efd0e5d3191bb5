"""Fixtures of the tests of interrupted runs."""

from support.interrupted_runs import signals_act, uninterrupted

__all__ = ["signals_act", "uninterrupted"]
