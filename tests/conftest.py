import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest


@pytest.fixture(autouse=True)
def _same_start():
    """Each test starts from the same random state, whichever ran before."""
    keras.utils.set_random_seed(0)
