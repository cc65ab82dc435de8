import numpy as np
import pytest
from keras import ops

import model
import sampling

RNG = np.random.default_rng(0)


@pytest.fixture(params=[True, False], ids=["gated", "plain"])
def prior(request) -> model.PixelCNN:
    prior = model.PixelCNN(8, (3, 5), filters=16, num_blocks=2, gated=request.param)
    for weight in prior.trainable_variables:
        weight.assign(RNG.normal(0, 0.4, weight.shape))
    return prior


POSITIONS = np.array([1, 5, 9, 5, 1], np.int32)


def test_codes_have_the_grids_shape_and_range(prior):
    codes = sampling.draw(prior, POSITIONS, seed=0)
    assert codes.shape == (5, 3, 5)
    assert codes.dtype == np.int32
    assert codes.min() >= 0
    assert codes.max() < 8


def test_the_same_seed_draws_the_same_codes_whatever_the_batch_size(prior):
    codes = sampling.draw(prior, POSITIONS, seed=3)
    assert np.array_equal(codes, sampling.draw(prior, POSITIONS, seed=3))
    assert np.array_equal(codes, sampling.draw(prior, POSITIONS, seed=3, batch_size=2))
    assert not np.array_equal(codes, sampling.draw(prior, POSITIONS, seed=4))


def test_draws_are_those_of_one_forward_pass_a_position(prior):
    """The compiled loop draws what a loop in Python does that calls the prior once for each position."""
    uniforms = np.random.default_rng(7).random((5, 15), np.float32)
    codes = np.zeros((5, 15), np.int32)
    for i in range(15):
        logits = prior((codes.reshape(5, 3, 5), POSITIONS))
        codes[:, i] = sampling.choose(ops.reshape(logits, (5, 15, 8))[:, i], uniforms[:, i])
    assert np.array_equal(sampling.draw(prior, POSITIONS, seed=7), codes.reshape(5, 3, 5))


def test_the_bottom_is_drawn_given_the_top():
    prior = model.PixelCNN(8, (4, 6), filters=16, num_blocks=2, coarse_grid_size=(2, 3))
    for weight in prior.trainable_variables:
        weight.assign(RNG.normal(0, 0.4, weight.shape))
    coarse = RNG.integers(0, 8, (5, 2, 3)).astype(np.int32)
    uniforms = np.random.default_rng(7).random((5, 24), np.float32)
    codes = np.zeros((5, 24), np.int32)
    for i in range(24):
        logits = prior((codes.reshape(5, 4, 6), POSITIONS, coarse))
        codes[:, i] = sampling.choose(ops.reshape(logits, (5, 24, 8))[:, i], uniforms[:, i])
    assert np.array_equal(sampling.draw(prior, POSITIONS, 7, coarse, batch_size=2), codes.reshape(5, 4, 6))


def test_the_likeliest_codes_are_drawn_where_only_one_may_be(prior):
    greedy = sampling.draw(prior, POSITIONS, seed=0, top_k=1)
    assert np.array_equal(greedy, sampling.draw(prior, POSITIONS, seed=1, top_k=1))
    assert np.array_equal(greedy, sampling.draw(prior, POSITIONS, seed=0, top_p=1e-6))
    assert np.array_equal(greedy, sampling.draw(prior, POSITIONS, seed=0, temperature=1e-4))
    logits = ops.convert_to_numpy(prior((greedy, POSITIONS)))
    assert np.array_equal(greedy, logits.argmax(-1))


def test_draws_follow_the_distribution():
    probabilities = np.array([0.5, 0.0, 0.3, 0.2])
    logits = np.log(np.maximum(probabilities, 1e-30)).astype(np.float32)
    drawn = sampling.choose(np.tile(logits, (20000, 1)), RNG.random(20000, np.float32))
    shares = np.bincount(drawn, minlength=4) / 20000
    np.testing.assert_allclose(shares, probabilities, atol=0.015)  # over 4 standard errors
    assert shares[1] == 0


def test_the_largest_number_draws_the_last_possible_code():
    one = np.array([1.0], np.float32)
    assert int(sampling.choose(np.zeros((1, 4), np.float32), one)[0]) == 3
    assert int(sampling.choose(np.array([[0, 0, -1e9, -1e9]], np.float32), one)[0]) == 1


def kept(logits, **limits) -> list[int]:
    return np.flatnonzero(ops.convert_to_numpy(sampling.restrict(logits, **limits))[0] > -1e8).tolist()


def test_top_k_and_top_p_keep_the_likeliest_codes():
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32))
    assert kept(logits) == [0, 1, 2, 3]
    assert kept(logits, top_k=2) == [1, 3]
    assert kept(logits, top_k=9) == [0, 1, 2, 3]
    assert kept(logits, top_p=0.39) == [1]
    assert kept(logits, top_p=0.65) == [1, 3]
    assert kept(logits, top_p=0.75) == [1, 2, 3]
    assert kept(logits, top_k=2, top_p=0.5) == [1]


def test_temperature_divides_the_logits():
    logits = np.array([[1.0, 2.0]], np.float32)
    np.testing.assert_allclose(sampling.restrict(logits, temperature=0.5), 2 * logits)


def test_progress_counts_every_grid(prior):
    counted = []
    sampling.draw(prior, POSITIONS, seed=0, batch_size=2, progress=counted.append)
    assert counted == [2, 2, 1]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("use_position", [True, False])
@pytest.mark.parametrize(
    ("grid", "num_blocks", "kernel_size", "coarse_grid_size"),
    [
        ((3, 5), 1, 3, None),
        ((6, 4), 2, 3, None),
        ((5, 7), 3, 5, None),
        ((4, 9), 3, 3, None),
        ((7, 7), 1, 7, None),
        ((13, 3), 4, 3, None),
        ((6, 4), 2, 3, (3, 2)),
        ((8, 8), 3, 3, (2, 2)),
    ],
)
def test_incremental_logits_are_those_of_the_full_forward_pass(
    gated, use_position, grid, num_blocks, kernel_size, coarse_grid_size
):
    prior = model.PixelCNN(
        8,
        grid,
        16,
        num_blocks=num_blocks,
        kernel_size=kernel_size,
        gated=gated,
        use_position=use_position,
        coarse_grid_size=coarse_grid_size,
    )
    for weight in prior.trainable_variables:
        weight.assign(RNG.normal(0, 0.3, weight.shape))
    codes = RNG.integers(0, 8, (3, *grid)).astype(np.int32)
    told = [np.array([0, 4, 11], np.int32)]
    if coarse_grid_size:
        told.append(RNG.integers(0, 8, (3, *coarse_grid_size)).astype(np.int32))
    full = ops.convert_to_numpy(prior((codes, *told)))
    seen = []

    def pick(logits, given):
        seen.append(ops.convert_to_numpy(logits))
        return given

    given = ops.transpose(ops.convert_to_tensor(codes), (1, 2, 0))
    returned = sampling.incremental(
        prior, [ops.convert_to_tensor(array) for array in told], given, pick
    )  # not compiled: see each
    np.testing.assert_array_equal(returned, given)
    logits = np.stack(seen, axis=1).reshape(full.shape)
    np.testing.assert_allclose(logits, full, atol=1e-4)
