import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

import keras
import pytest
from hypothesis import settings

# `pytest --hypothesis-profile=long` tries a hundred times as many damaged files, others each time
settings.register_profile("short", max_examples=1000, deadline=2000, derandomize=True, database=None)
settings.register_profile("long", max_examples=100_000, deadline=2000, database=None)
settings.load_profile("short")


@pytest.fixture(autouse=True)
def _same_start():
    """Each test starts from the same random state, whichever ran before."""
    keras.utils.set_random_seed(0)
