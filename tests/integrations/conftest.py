"""What the integrations' tests share."""

import logging

import pytest

from kexue_kernels import dispatch


@pytest.fixture
def notes(caplog):
    """What is logged of calls that are left to the original's code, each reason anew."""
    dispatch.note_once.cache_clear()
    caplog.set_level(logging.WARNING, "kexue_kernels")
    return lambda: [r.message for r in caplog.records if "left to Transformers" in r.message]
