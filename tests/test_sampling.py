import math

import numpy as np
import pytest
from keras import ops

import model
import sampling
from tests.randomness import RNG


def random_prior(*arguments, **settings) -> model.PixelCNN:
    """A prior with random values also in the weights that are initialised with zeros."""
    prior = model.PixelCNN(*arguments, **settings)
    for weight in prior.trainable_variables:
        weight.assign(RNG.normal(0, 0.4, weight.shape))
    return prior


@pytest.fixture(scope="module", params=[(True, 0), (False, 0), (True, 2)], ids=["gated", "plain", "attention"])
def prior(request) -> model.PixelCNN:
    """Shared by all tests, because compiling its sampling takes longer than sampling."""
    gated, attention = request.param
    return random_prior(8, (3, 5), filters=16, num_blocks=2, gated=gated, attention=attention)


CONDITIONING = {"positions": np.array([1, 5, 9, 5, 1], np.int32)}


def random_numbers(prior: model.PixelCNN, seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).random((count, math.prod(prior.grid_size)), np.float32)


def sample(prior: model.PixelCNN, seed: int = 0, conditioning=CONDITIONING, **settings) -> np.ndarray:
    uniforms = random_numbers(prior, seed, len(conditioning["positions"]))
    return sampling.sample_codes(prior, conditioning, uniforms, **settings)


def test_sampled_codes_have_the_shape_and_range_of_the_grid(prior):
    codes = sample(prior)
    assert codes.shape == (5, 3, 5)
    assert codes.dtype == np.int32
    assert codes.min() >= 0
    assert codes.max() < 8


def test_codes_depend_on_the_seed_and_not_on_the_batch_size(prior):
    codes = sample(prior, 3)
    assert np.array_equal(codes, sample(prior, 3))
    assert np.array_equal(codes, sample(prior, 3, batch_size=2))
    assert not np.array_equal(codes, sample(prior, 4))


def sample_with_full_passes(prior: model.PixelCNN, seed: int, conditioning) -> np.ndarray:
    """Codes sampled with one forward pass of the whole prior per cell."""
    (height, width), count = prior.grid_size, len(conditioning["positions"])
    uniforms = random_numbers(prior, seed, count)
    codes = np.zeros((count, height * width), np.int32)
    for i in range(height * width):
        logits = prior({"codes": codes.reshape(-1, height, width), **conditioning})
        logits = ops.reshape(logits, (count, height * width, -1))
        codes[:, i] = sampling.sample_categorical(logits[:, i], uniforms[:, i])
    return codes.reshape(-1, height, width)


def test_codes_equal_those_of_one_forward_pass_per_cell(prior):
    assert np.array_equal(sample(prior, 7), sample_with_full_passes(prior, 7, CONDITIONING))


@pytest.mark.parametrize("attention", [0, 2])
def test_bottom_codes_equal_those_of_one_forward_pass_per_cell(attention):
    prior = random_prior(8, (4, 6), filters=16, num_blocks=2, coarse_grid_size=(2, 3), attention=attention)
    conditioning = CONDITIONING | {"coarse": RNG.integers(0, 8, (5, 2, 3)).astype(np.int32)}
    expected = sample_with_full_passes(prior, 7, conditioning)
    assert np.array_equal(sample(prior, 7, conditioning, batch_size=2), expected)


def test_known_codes_are_kept_and_the_others_are_sampled_given_those_before(prior):
    codes = sample(prior, 3)
    known = np.where(RNG.random(codes.shape) < 0.5, codes, -1)
    assert np.array_equal(sample(prior, 3, known=known), codes)  # The same random numbers give the other codes again.
    other = np.where(known >= 0, (known + 1) % 8, -1)
    sampled = sample(prior, 3, known=other)
    assert np.array_equal(sampled[other >= 0], other[other >= 0])
    first = np.full_like(codes, -1)
    first[:, 1] = (codes[:, 1] + 1) % 8
    assert np.array_equal(sample(prior, 3, known=first)[:, 0], codes[:, 0])
    assert not np.array_equal(sample(prior, 3, known=first)[:, 2], codes[:, 2])


def test_a_prior_that_has_been_trained_further_gives_other_codes(prior):
    prior = model.PixelCNN(**prior.get_config())
    before = sample(prior, 3)
    for weight in prior.trainable_variables:
        weight.assign(RNG.normal(0, 0.4, weight.shape))
    assert not np.array_equal(sample(prior, 3), before)
    assert np.array_equal(sample(prior, 3), sample_with_full_passes(prior, 3, CONDITIONING))


def test_strict_filters_give_the_most_likely_codes(prior):
    greedy = sample(prior, 0, top_k=1)
    assert np.array_equal(greedy, sample(prior, 1, top_k=1))
    assert np.array_equal(greedy, sample(prior, 0, top_p=1e-6))
    assert np.array_equal(greedy, sample(prior, 0, temperature=1e-4))
    logits = ops.convert_to_numpy(prior({"codes": greedy, **CONDITIONING}))
    assert np.array_equal(greedy, logits.argmax(-1))


def test_sampled_frequencies_match_the_probabilities():
    probabilities = np.array([0.5, 0.0, 0.3, 0.2])
    logits = np.log(np.maximum(probabilities, 1e-30)).astype(np.float32)
    codes = sampling.sample_categorical(np.tile(logits, (20000, 1)), RNG.random(20000, np.float32))
    frequencies = np.bincount(codes, minlength=4) / 20000
    np.testing.assert_allclose(frequencies, probabilities, atol=0.015)  # more than 4 standard errors
    assert frequencies[1] == 0


def test_largest_number_selects_the_last_possible_code():
    one = np.array([1.0], np.float32)
    assert int(sampling.sample_categorical(np.zeros((1, 4), np.float32), one)[0]) == 3
    assert int(sampling.sample_categorical(np.array([[0, 0, -1e9, -1e9]], np.float32), one)[0]) == 1


def kept_codes(logits, **limits) -> list[int]:
    return np.flatnonzero(ops.convert_to_numpy(sampling.filter_logits(logits, **limits))[0] > -1e8).tolist()


def test_top_k_and_top_p_keep_the_most_likely_codes():
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32))
    assert kept_codes(logits) == [0, 1, 2, 3]
    assert kept_codes(logits, top_k=2) == [1, 3]
    assert kept_codes(logits, top_k=9) == [0, 1, 2, 3]
    assert kept_codes(logits, top_p=0.39) == [1]
    assert kept_codes(logits, top_p=0.65) == [1, 3]
    assert kept_codes(logits, top_p=0.75) == [1, 2, 3]
    assert kept_codes(logits, top_k=2, top_p=0.5) == [1]


def test_temperature_divides_the_logits():
    logits = np.array([[1.0, 2.0]], np.float32)
    np.testing.assert_allclose(sampling.filter_logits(logits, temperature=0.5), 2 * logits)


def test_progress_counts_every_grid(prior):
    counts = []
    sample(prior, batch_size=2, progress=counts.append)
    assert counts == [2, 2, 1]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("use_position", [True, False])
@pytest.mark.parametrize(
    ("grid", "num_blocks", "kernel_size", "coarse_grid_size", "attention"),
    [
        ((3, 5), 1, 3, None, 0),
        ((6, 4), 2, 3, None, 2),
        ((5, 7), 3, 5, None, 0),
        ((4, 9), 3, 3, None, 1),
        ((7, 7), 1, 7, None, 0),
        ((13, 3), 4, 3, None, 0),
        ((6, 4), 2, 3, (3, 2), 1),
        ((8, 8), 3, 3, (2, 2), 0),
    ],
)
def test_cached_logits_equal_those_of_the_full_forward_pass(
    gated, use_position, grid, num_blocks, kernel_size, coarse_grid_size, attention
):
    prior = model.PixelCNN(
        8,
        grid,
        16,
        num_blocks=num_blocks,
        kernel_size=kernel_size,
        gated=gated,
        use_position=use_position,
        attention=attention if gated else 0,
        coarse_grid_size=coarse_grid_size,
    )
    for weight in prior.trainable_variables:
        weight.assign(RNG.normal(0, 0.3, weight.shape))
    codes = RNG.integers(0, 8, (3, *grid)).astype(np.int32)
    conditioning = {"positions": np.array([0, 4, 11], np.int32)}
    if coarse_grid_size:
        conditioning["coarse"] = RNG.integers(0, 8, (3, *coarse_grid_size)).astype(np.int32)
    full = ops.convert_to_numpy(prior({"codes": codes, **conditioning}))
    np.testing.assert_allclose(cached_logits(prior, codes, conditioning), full, atol=1e-4)


def cached_logits(prior: model.PixelCNN, codes: np.ndarray, conditioning) -> np.ndarray:
    """The logits (B, h, w, K) of a walk through given codes (B, h, w)."""
    cached = []

    def sample_cell(logits, inputs):
        cached.append(ops.convert_to_numpy(logits))
        return inputs

    inputs = ops.transpose(ops.convert_to_tensor(codes), (1, 2, 0))
    # not compiled, so that `sample_cell` is called for every cell
    np.testing.assert_array_equal(sampling.cached_sampling(prior, conditioning, inputs, sample_cell), inputs)
    return np.stack(cached, axis=1).reshape(*codes.shape, -1)


def test_one_graph_serves_every_batch_size_so_that_results_do_not_depend_on_earlier_calls():
    shapes = []

    def scale(images, factor):
        shapes.append((tuple(images["x"].shape), tuple(factor.shape)))
        return factor * images["x"]

    compiled = sampling.compile_function(scale)
    for size in (4, 2, 3, 4):
        scaled = compiled({"x": np.ones((size, 1), np.float32)}, np.float32(size))
        assert np.asarray(scaled).tolist() == [[size]] * size
    assert shapes == [((None, 1), ())]
