"""In this folder "auto" is the reference: a test of another implementation names it."""

import pytest

from igrpo_kernels.impls import ENVIRONMENT_VARIABLE


@pytest.fixture(autouse=True)
def auto_is_the_reference(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
