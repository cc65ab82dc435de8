import itertools

import numpy as np
import pytest

import seeds


def test_a_stream_is_a_function_of_seed_purpose_and_keys():
    first, second = (seeds.generator(1, "split", 2, 3).random(5) for _ in range(2))
    assert np.array_equal(first, second)
    assert seeds.number(1, "split", 2) == seeds.number(1, "split", 2)


STREAMS = [  # Trailing zeros, the order of keys, and neighbouring seeds all matter.
    (0, "a"),
    (0, "a", 0),
    (0, "a", 0, 0),
    (0, "a", 1),
    (0, "a", 0, 1),
    (0, "a", 1, 0),
    (0, "b"),
    (0, "b", 0),
    (1, "a"),
    (1, "a", 0),
    (2, "a"),
]


def test_different_streams_are_uncorrelated():
    streams = np.stack([seeds.generator(*stream).standard_normal(2000) for stream in STREAMS])
    assert np.abs(np.corrcoef(streams) - np.eye(len(STREAMS))).max() < 0.1  # 4.5 standard errors


def test_different_streams_give_different_numbers():
    assert len({seeds.number(*stream) for stream in STREAMS}) == len(STREAMS)


def test_the_streams_of_successive_epochs_differ():
    orders = [seeds.generator(0, "order", epoch).permutation(20).tolist() for epoch in range(5)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_numbers_are_seeds_that_every_library_accepts(seed):
    numbers = [seeds.number(seed, "weights", key) for key in range(100)]
    assert all(0 <= number < 2**31 for number in numbers)
    assert max(numbers) > 2**30  # They use the whole range.
