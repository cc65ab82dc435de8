"""Independent random streams: one for each purpose, derived from the seed of the run.

Two uses of randomness that share a stream are correlated, however different they look. Every use therefore names its
purpose here, and adds the level, epoch or whatever else distinguishes its streams.
"""

import zlib

import numpy as np


def sequence(seed: int, purpose: str, *keys: int) -> np.random.SeedSequence:
    """Return the seed sequence of a purpose.

    Args:
        seed: Seed of the run, 0 or more.
        purpose: What the random numbers are for, such as "split".
        keys: Numbers that distinguish streams of the same purpose, such as the level; 0 or more.
    """
    return np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()), *keys))


def generator(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """Return a new generator of the stream of a purpose; see `sequence`."""
    return np.random.default_rng(sequence(seed, purpose, *keys))


def number(seed: int, purpose: str, *keys: int) -> int:
    """Return a seed from 0 to 2³¹ − 1 for libraries that take a number; see `sequence`."""
    return int(sequence(seed, purpose, *keys).generate_state(1)[0]) >> 1
