"""Random numbers that depend neither on which tests ran before nor on how the tests are shared among processes."""

import keras
import numpy as np

RNG = np.random.default_rng(0)  # Shared by all tests. Do not use it while a module is imported.


def reset(seed: int = 0) -> None:
    """Let `RNG`, Keras, TensorFlow and the global generators of Python and NumPy begin anew."""
    RNG.bit_generator.state = np.random.default_rng(seed).bit_generator.state
    keras.utils.set_random_seed(seed)
