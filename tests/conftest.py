"""Settings of all tests."""

import os

import console

if "PYTEST_XDIST_WORKER" in os.environ:  # The workers share the cores.
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
console.import_tensorflow()

import keras
import pytest
from hypothesis import settings

# `pytest --hypothesis-profile=long` tries a hundred times as many damaged files, different ones each time.
settings.register_profile("short", max_examples=1000, deadline=2000, derandomize=True, database=None)
settings.register_profile("long", max_examples=100_000, deadline=2000, database=None)
settings.load_profile("short")


@pytest.fixture(autouse=True, scope="session")
def _cache_folder(tmp_path_factory):
    """Keep decoded slices of tests, also of the processes that they start, out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _reset_random_state():
    """Start each test from the same random state, whichever test ran before."""
    keras.utils.set_random_seed(0)
