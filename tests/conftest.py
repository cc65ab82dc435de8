"""Settings of all tests."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # The workers share the cores.
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of NumPy, which reads it when it is imported

import console

console.import_tensorflow()

import pytest
from hypothesis import settings

import seeds
from tests import randomness

# `pytest --hypothesis-profile=long` tries a hundred times as many damaged files, different ones each time.
settings.register_profile("short", max_examples=1000, deadline=2000, derandomize=True, database=None)
settings.register_profile("long", max_examples=100_000, deadline=2000, database=None)
settings.load_profile("short")


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """Make each fixture from random numbers of its own, whichever test is the first to need it."""
    randomness.reset(seeds.number(0, f"fixture {fixturedef.argname}"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    """Start each test from the same random state, whatever its fixtures have drawn."""
    randomness.reset()


@pytest.fixture(autouse=True, scope="session")
def _cache_folder(tmp_path_factory):
    """Keep decoded slices of tests, also of the processes that they start, out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
