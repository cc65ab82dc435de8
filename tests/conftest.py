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


@pytest.fixture(autouse=True)
def _reset_random_state():
    """Start each test from the same random state, whichever test ran before."""
    keras.utils.set_random_seed(0)
