"""The selector: its log weights, the choice by them, and the likelihood of the choice."""

import keras
import numpy as np
import pytest
from keras import ops

import augmentation
import saving
import selector
import training
from selector import Selector
from tests import test_generator
from tests.randomness import RNG


@pytest.fixture(scope="module", params=[(4,), (4, 8)], ids=["one level", "two levels"])
def made(request) -> Selector:
    return test_generator.with_random_weights(Selector(16, request.param, embedding_dim=4, filters=8))


def inputs_of(grids: tuple[int, ...], count: int = 3) -> dict[str, np.ndarray]:
    codes = {f"codes_{i}": RNG.integers(0, 16, (count, grid, grid)).astype(np.int32) for i, grid in enumerate(grids)}
    return codes | {"positions": np.arange(count, dtype=np.int32)}


def test_every_code_and_the_position_count(made):
    inputs = inputs_of(made.grids, 1)
    before = ops.convert_to_numpy(made.log_weights(inputs))
    assert before.shape == (1,)
    for level, grid in enumerate(made.grids):
        name, changed = f"codes_{level}", np.repeat(inputs[f"codes_{level}"], grid**2, axis=0)
        cells = changed.reshape(grid**2, grid**2)
        np.fill_diagonal(cells, (cells.diagonal() + 1) % 16)
        others = {key: np.repeat(value, grid**2, axis=0) for key, value in inputs.items()} | {name: changed}
        assert (np.abs(ops.convert_to_numpy(made.log_weights(others)) - before) > 1e-6).all()
    assert made.log_weights({**inputs, "positions": np.int32([7])})[0] != before[0]


def test_without_augmentation_its_parameters_are_zero(made):
    inputs = inputs_of(made.grids)
    zeros = np.zeros((3, augmentation.NUM_PARAMETERS), np.float32)
    assert np.array_equal(made(inputs), made({**inputs, "augmentation": zeros}))
    assert not np.allclose(made(inputs), made({**inputs, "augmentation": zeros + 1}))


def test_embeddings_begin_as_the_codebook():
    vqvae = test_generator.make((4, 8)).vqvae
    own = Selector.untrained(vqvae)
    for embedding, quantizer in zip(own.embeddings, vqvae.quantizers, strict=True):
        vectors = ops.convert_to_numpy(embedding.embeddings)
        assert (vectors.mean(), vectors.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-5))
        codebook = ops.convert_to_numpy(quantizer.embeddings)
        assert np.corrcoef(vectors.ravel(), codebook.ravel())[0, 1] == pytest.approx(1)


def test_codes_are_not_rounded_in_mixed_precision():
    with training.dtype_policy("mixed_bfloat16"):
        own = Selector(512, (4,), embedding_dim=4, filters=8)
    codes = np.stack([np.full((4, 4), code, np.int32) for code in (509, 510, 511)])
    weights = ops.convert_to_numpy(own.log_weights({"codes_0": codes, "positions": np.zeros(3, np.int32)}))
    assert weights.dtype == np.float32
    assert len(set(weights.tolist())) == 3


def test_classifiers_are_trained_one_by_one_and_judged_together(made):
    logits, labels = RNG.normal(size=(6, 3)).astype(np.float32), np.float32([1, 0, 1, 0, 1, 0])
    signs = np.where(labels > 0.5, 1, -1)[:, None]
    for in_training, judged in ((True, logits), (False, logits.mean(axis=1, keepdims=True))):
        expected = np.log1p(np.exp(-signs * judged)).mean()
        batch = ops.convert_to_tensor(labels), ops.convert_to_tensor(logits)
        assert float(made.compute_loss(None, *batch, training=in_training)) == pytest.approx(expected, rel=1e-5)
    one = made(inputs_of(made.grids))
    assert one.shape == (3, selector.NUM_CLASSIFIERS)
    assert (np.ptp(ops.convert_to_numpy(one), axis=1) > 1e-6).all()


def test_a_saved_selector_is_the_same(made, tmp_path):
    saving.save_model(made, tmp_path / "selector.keras")
    inputs = inputs_of(made.grids)
    assert np.array_equal(saving.load_model(tmp_path / "selector.keras", Selector)(inputs), made(inputs))


def test_log_weights_approach_the_ratio_of_the_distributions():
    """Real grids have code 1 in 80 % of their cells, proposed ones in 50 %; the ratio is that of two binomials."""
    keras.utils.set_random_seed(0)
    own, count = Selector(2, (2,), embedding_dim=2, filters=16, units=16, dropout=0), 4000
    fractions = np.repeat([0.8, 0.5], count)
    codes = (RNG.random((2 * count, 2, 2)) < fractions[:, None, None]).astype(np.int32)
    own.compile(keras.optimizers.Adam(0.01))
    inputs = {"codes_0": codes, "positions": np.zeros(2 * count, np.int32)}
    own.fit(inputs, np.repeat(np.float32([1, 0]), count), batch_size=400, epochs=15, verbose=0)
    grids = np.stack(np.unravel_index(np.arange(16), (2, 2, 2, 2)), axis=-1).reshape(-1, 2, 2).astype(np.int32)
    found = ops.convert_to_numpy(own.log_weights({"codes_0": grids, "positions": np.zeros(16, np.int32)}))
    ones = grids.sum(axis=(1, 2))
    expected = ones * np.log(0.8 / 0.5) + (4 - ones) * np.log(0.2 / 0.5)
    probable = ones >= 2  # Few real grids have less.
    np.testing.assert_allclose(found[probable], expected[probable], atol=0.35)


def test_candidates_are_chosen_in_proportion_to_their_weights():
    weights = np.array([0.1, 0.6, 0.3])
    chosen = selector.choose(np.tile(np.log(weights), (20000, 1)), np.random.default_rng(0))
    assert np.array_equal(chosen // 3, np.arange(20000))
    np.testing.assert_allclose(np.bincount(chosen % 3) / 20000, weights, atol=0.02)


def test_with_common_random_numbers_equal_weights_give_equal_choices():
    weights = np.tile(RNG.normal(size=8), (50, 1))
    assert len(set(selector.choose(weights, np.random.default_rng(0)) % 8)) > 1
    assert len(set(selector.choose(weights, np.random.default_rng(0), is_common=True) % 8)) == 1


def test_the_gain_is_a_lower_bound_that_needs_candidates():
    """For grids of one code, the distribution of the choice among two proposals can be summed up."""
    proposal, log_weights = np.array([0.7, 0.3]), np.array([0.0, 1.5])
    pairs = np.exp(log_weights) / (np.exp(log_weights) + np.exp(log_weights)[:, None])  # of [other, own]
    exact = np.log(2 * proposal @ pairs)
    others = RNG.choice(2, (20000, 1), p=proposal)
    gains = np.stack(
        [selector.log_likelihood_gain(np.full(20000, log_weights[own]), log_weights[others]) for own in (0, 1)]
    )
    bound = gains.mean(axis=1)
    assert (bound <= exact + 0.01).all()
    np.testing.assert_allclose(bound, exact, atol=0.2)
    assert np.exp(gains).mean(axis=1) == pytest.approx(np.exp(exact), abs=0.02)
    np.testing.assert_allclose(selector.log_likelihood_gain(RNG.normal(size=5), np.zeros((5, 0))), 0, atol=1e-12)
    assert selector.log_likelihood_gain(np.array([50.0]), np.zeros((1, 7)))[0] == pytest.approx(np.log(8))
