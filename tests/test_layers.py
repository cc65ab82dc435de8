import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image
from skimage.metrics import structural_similarity

import layers
from tests.randomness import RNG


def random_images(count: int, size: int = 32) -> np.ndarray:
    return RNG.random((count, size, size, 1), np.float32)


# ------------------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("new_size", [16, 32, 48, 64])
def test_resizing_equals_that_of_pillow(new_size):
    image = random_images(1)
    expected = Image.fromarray(image[0, ..., 0]).resize((new_size, new_size), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(ops.convert_to_numpy(layers.resize(image, new_size))[0, ..., 0], expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------- SSIM


@pytest.mark.parametrize("size", [16, 33, 96])
def test_ssim_equals_scikit_image(size):
    x = random_images(3, size)
    y = np.clip(x + RNG.normal(0, 0.1, x.shape), 0, 1).astype(np.float32)
    maps, means = ops.convert_to_numpy(layers.ssim_map(x, y)), ops.convert_to_numpy(layers.ssim(x, y))
    for i in range(3):
        mean, full = structural_similarity(
            x[i, ..., 0],
            y[i, ..., 0],
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            full=True,
        )
        np.testing.assert_allclose(maps[i], full, atol=2e-4)
        np.testing.assert_allclose(means[i], mean, atol=2e-5)


def test_ssim_of_one_image_in_a_graph_with_unknown_batch_size():
    tf = pytest.importorskip("tensorflow")
    images = tf.TensorSpec((None, 32, 32, 1), tf.float32)
    compiled = tf.function(layers.ssim, input_signature=[images, images], autograph=False)
    x, y = (tf.constant(RNG.random((1, 32, 32, 1)), tf.float32) for _ in range(2))
    np.testing.assert_allclose(compiled(x, y), layers.ssim(x, y), rtol=1e-5)


def test_ssim_of_identical_images_is_one():
    x = random_images(2)
    np.testing.assert_allclose(layers.ssim_map(x, x), 1, atol=1e-5)


# --------------------------------------------------------------------------------------------- codebook


def make_quantizer(**settings) -> layers.VectorQuantizer:
    layer = layers.VectorQuantizer(**{"num_embeddings": 6, "embedding_dim": 3, **settings})
    layer.build((None, 4, 4, 3))
    layer.embeddings.assign(RNG.normal(size=(6, 3)))
    return layer


def random_features() -> np.ndarray:
    return RNG.normal(size=(2, 4, 4, 3)).astype(np.float32)


def ema_state(layer) -> list[np.ndarray]:
    return [ops.convert_to_numpy(v) for v in (layer.embeddings, layer.counts, layer.sums)]


def test_each_vector_is_replaced_by_the_nearest_code():
    layer, features = make_quantizer(), random_features()
    quantized, indices = layer(features)
    codebook = ops.convert_to_numpy(layer.embeddings)
    nearest = np.linalg.norm(features[..., None, :] - codebook, axis=-1).argmin(-1)
    np.testing.assert_array_equal(indices, nearest)
    np.testing.assert_allclose(quantized, codebook[nearest], atol=1e-6)
    np.testing.assert_allclose(layer.lookup(indices), codebook[nearest])


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_gradients_pass_straight_through_the_quantizer(codebook):
    tf = pytest.importorskip("tensorflow")
    layer, features = make_quantizer(codebook=codebook), tf.constant(RNG.normal(size=(2, 4, 4, 3)), tf.float32)
    direction = RNG.normal(size=features.shape).astype(np.float32)
    with tf.GradientTape() as tape:
        tape.watch(features)
        quantized, _ = layer(features)
        loss = ops.sum(quantized * direction)
    np.testing.assert_allclose(tape.gradient(loss, features), direction, rtol=1e-5)


def test_commitment_loss_moves_features_towards_their_codes():
    tf = pytest.importorskip("tensorflow")
    layer = make_quantizer(codebook="gradient", commitment_weight=0.25)
    features = tf.constant(RNG.normal(size=(1, 4, 4, 3)), tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(features)
        quantized, _ = layer(features)
        loss = layer.loss_and_metrics()
    offset = features - quantized  # the loss is a mean over 48 elements, so the gradient of (z − e)² is 2 (z − e) / 48
    np.testing.assert_allclose(tape.gradient(loss, features), 0.25 * 2 * offset / 48, atol=1e-6)
    assert np.any(tf.convert_to_tensor(tape.gradient(loss, layer.embeddings.value)))
    assert not make_quantizer(codebook="ema").trainable_variables


def test_moving_averages_follow_the_paper():
    layer = make_quantizer(decay=0.9, dead_code_threshold=0.0)
    layer.counts.assign(np.full(6, 5.0))
    layer.sums.assign(5.0 * ops.convert_to_numpy(layer.embeddings))
    _, counts, sums = ema_state(layer)
    features = random_features()
    indices = ops.convert_to_numpy(layer(features, training=True)[1]).ravel()
    for k in range(6):
        assigned = features.reshape(-1, 3)[indices == k]
        counts[k] = 0.9 * counts[k] + 0.1 * len(assigned)
        sums[k] = 0.9 * sums[k] + 0.1 * assigned.sum(axis=0)
    for after, expected in zip(ema_state(layer), (sums / counts[:, None], counts, sums), strict=True):
        np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-6)


def test_codebook_changes_in_training_only():
    layer, features = make_quantizer(), random_features()
    before = ema_state(layer)
    layer(features, training=False)
    for old, new in zip(before, ema_state(layer), strict=True):
        np.testing.assert_array_equal(old, new)
    layer(features, training=True)
    assert not np.array_equal(before[0], ema_state(layer)[0])


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_frozen_codebook_does_not_change_in_training(codebook):
    layer, features = make_quantizer(codebook=codebook, dead_code_threshold=10.0), random_features()
    layer.trainable = False
    before = layer.get_weights()
    layer(features, training=True)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert not layer.trainable_variables
    layer.trainable = True
    layer(features, training=True)
    assert not np.array_equal(before[0], layer.get_weights()[0])


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_dead_code_is_replaced_together_with_its_count_and_sum(codebook):
    layer = make_quantizer(codebook=codebook, dead_code_threshold=0.1)
    # no vector of the batch is close to the last code
    layer.embeddings.assign(np.concatenate([np.zeros((5, 3)), np.full((1, 3), 1000.0)]))
    layer.counts.assign(np.concatenate([np.full(5, 5.0), [0.0]]))
    if codebook == "ema":
        layer.sums.assign(ops.convert_to_numpy(layer.embeddings) * ops.convert_to_numpy(layer.counts)[:, None])
    features = random_features()
    layer(features, training=True)
    embedding, count = (ops.convert_to_numpy(v)[-1] for v in (layer.embeddings, layer.counts))
    assert np.isclose(features.reshape(-1, 3), embedding, atol=1e-5).all(axis=1).any()
    np.testing.assert_allclose(count, 0.1 * 32 / 6, rtol=1e-6)
    if codebook == "ema":
        np.testing.assert_allclose(ops.convert_to_numpy(layer.sums)[-1], embedding * count, rtol=1e-5)


def test_first_batch_initialises_the_whole_codebook():
    layer, features = make_quantizer(), random_features()
    layer(features, training=True)
    vectors = features.reshape(-1, 3)
    for code in ops.convert_to_numpy(layer.embeddings):
        assert np.isclose(vectors, code, atol=1e-4).all(axis=1).any()


def test_unused_code_keeps_its_vector_without_replacement():
    layer = make_quantizer(dead_code_threshold=0.0)
    layer.embeddings.assign(np.concatenate([np.zeros((5, 3)), np.full((1, 3), 1000.0)]))
    layer(random_features(), training=True)
    np.testing.assert_allclose(ops.convert_to_numpy(layer.embeddings)[-1], 1000.0)


def test_unknown_codebook_is_refused():
    with pytest.raises(ValueError, match="codebook is 'none'.*ema.*gradient"):
        make_quantizer(codebook="none")


def test_last_call_reports_losses_and_counts():
    layer, features = make_quantizer(codebook="gradient", commitment_weight=0.5), random_features()
    quantized, indices = layer(features)
    error = np.mean(np.square(features - ops.convert_to_numpy(quantized)))
    np.testing.assert_allclose(layer.loss_and_metrics(), 1.5 * error, rtol=1e-5)
    np.testing.assert_allclose(layer.codebook_loss.result(), error, rtol=1e-5)
    np.testing.assert_allclose(layer.commitment_loss.result(), 0.5 * error, rtol=1e-5)
    counts = np.bincount(ops.convert_to_numpy(indices).ravel(), minlength=6)
    np.testing.assert_array_equal(layer.last_call.counts, counts)
    np.testing.assert_array_equal(layer.usage.counts, counts)
    assert layer.last_call.batch_size == 2


def test_code_usage_accumulates_until_reset():
    usage = layers.CodeUsage(4)
    usage.update_state(np.array([3.0, 0, 0, 0]))
    usage.update_state(np.array([0.0, 3, 0, 0]))
    result = usage.result()
    assert float(result["codes_used"]) == 0.5
    np.testing.assert_allclose(float(result["perplexity"]), 2, rtol=1e-5)
    usage.reset_state()
    assert float(usage.result()["codes_used"]) == 0


def test_moving_averages_do_not_drift_under_mixed_precision():
    centres = 4.0 * np.eye(6, 3).astype(np.float32) - np.arange(6)[:, None]
    policies = ("float32", "mixed_bfloat16")
    quantizers = {policy: make_quantizer(decay=0.98, dead_code_threshold=0.0) for policy in policies}
    for policy, layer in quantizers.items():
        layer.embeddings.assign(centres)
        random = np.random.default_rng(0)
        keras.config.set_dtype_policy(policy)
        try:
            for _ in range(200):
                features = centres[random.integers(0, 6, (2, 4, 4))] + 0.1 * random.normal(size=(2, 4, 4, 3))
                layer(ops.cast(features, keras.config.dtype_policy().compute_dtype), training=True)
        finally:
            keras.config.set_dtype_policy("float32")
    for exact, rounded in zip(*map(ema_state, quantizers.values()), strict=True):
        np.testing.assert_allclose(rounded, exact, rtol=5e-3, atol=5e-3)


# ----------------------------------------------------------------------------------------- background code


BACKGROUND = np.zeros((2, 4, 4), bool)
BACKGROUND[:, :, :3] = True


def background_quantizer(**settings) -> layers.VectorQuantizer:
    """A quantizer whose first code is reserved, as it is made, with random values in the others."""
    layer = layers.VectorQuantizer(**{"num_embeddings": 6, "embedding_dim": 3, "background_code": True, **settings})
    layer.build((None, 4, 4, 3))
    return layer


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_background_and_nothing_else_gets_the_first_code(codebook):
    layer, features = background_quantizer(codebook=codebook), random_features()
    features[:, 0] = 0  # the other cells of this row are as close to the first code as can be
    quantized, indices = (ops.convert_to_numpy(output) for output in layer(features, BACKGROUND))
    np.testing.assert_array_equal(indices == 0, BACKGROUND)
    np.testing.assert_array_equal(quantized[BACKGROUND], 0)
    np.testing.assert_array_equal(layer.nearest(features, BACKGROUND), indices)
    others = ops.convert_to_numpy(layer.embeddings)[1:]
    nearest = 1 + np.linalg.norm(features[..., None, :] - others, axis=-1).argmin(-1)
    np.testing.assert_array_equal(indices[~BACKGROUND], nearest[~BACKGROUND])


def test_background_has_no_loss_and_no_gradient():
    tf = pytest.importorskip("tensorflow")
    layer, features = background_quantizer(codebook="gradient"), tf.constant(random_features())
    with tf.GradientTape() as tape:
        tape.watch(features)
        layer(features, BACKGROUND)
        loss = layer.loss_and_metrics()
    gradient = tape.gradient(loss, features).numpy()
    assert np.all(gradient[BACKGROUND] == 0)
    assert np.all(np.any(gradient[~BACKGROUND] != 0, axis=-1))
    other = features.numpy()
    other[BACKGROUND] += 1
    layer(other, BACKGROUND)
    np.testing.assert_allclose(layer.loss_and_metrics(), loss, rtol=1e-6)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_training_on_much_background_keeps_its_code_at_zero_and_all_others_elsewhere(codebook):
    layer = background_quantizer(num_embeddings=16, codebook=codebook, decay=0.5, dead_code_threshold=0.5)
    optimizer = keras.optimizers.Adam(0.1)
    tf = pytest.importorskip("tensorflow")
    replaced = 0
    for _ in range(50):
        before = ops.convert_to_numpy(layer.embeddings)
        with tf.GradientTape() as tape:
            layer(random_features() + 5, BACKGROUND, training=True)
            loss = layer.loss_and_metrics()
        if codebook == "gradient":
            optimizer.apply(tape.gradient(loss, layer.trainable_variables), layer.trainable_variables)
        codes = ops.convert_to_numpy(layer.embeddings)
        np.testing.assert_array_equal(codes[0], 0)
        assert np.all(np.any(codes[1:] != 0, axis=1))
        replaced += np.sum(np.abs(codes - before).max(axis=1) > 2)
    assert replaced >= 10  # the codes began near zero, and all are now among the vectors
    assert np.all(np.linalg.norm(codes[1:], axis=1) > 4)
    assert ops.convert_to_numpy(layer.counts)[0] == 0


def test_usage_leaves_the_background_out():
    layer, features = background_quantizer(), random_features()
    indices = ops.convert_to_numpy(layer(features, BACKGROUND)[1])
    layer.loss_and_metrics()
    counts = np.bincount(indices[~BACKGROUND], minlength=6)
    assert counts[0] == 0
    assert counts.sum() == 8
    np.testing.assert_array_equal(layer.last_call.counts, counts)
    np.testing.assert_array_equal(layer.usage.counts, counts[1:])
    frequencies = counts[counts > 0] / 8
    perplexity = np.exp(-np.sum(frequencies * np.log(frequencies)))
    np.testing.assert_allclose(float(layer.usage.result()["perplexity"]), perplexity, rtol=1e-5)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_a_batch_of_nothing_but_background_changes_no_code(codebook):
    layer, everywhere = background_quantizer(codebook=codebook), np.ones((2, 4, 4), bool)
    layer(random_features(), BACKGROUND, training=True)
    before = ops.convert_to_numpy(layer.embeddings)
    indices = layer(random_features(), everywhere, training=True)[1]
    assert not np.any(indices)
    np.testing.assert_allclose(layer.embeddings, before, rtol=1e-5, atol=1e-6)


def test_without_a_background_code_the_mask_is_ignored():
    layer, features = make_quantizer(), random_features()
    for with_mask, without in zip(layer(features, BACKGROUND), layer(features), strict=True):
        np.testing.assert_array_equal(with_mask, without)
    np.testing.assert_array_equal(layer.nearest(features, BACKGROUND), layer.nearest(features))


# --------------------------------------------------------------------------------------- residual block


def test_new_residual_block_is_the_identity():
    features = RNG.normal(size=(1, 4, 4, 8)).astype(np.float32)
    np.testing.assert_array_equal(layers.ResidualBlock(8)(features), features)


@pytest.mark.parametrize(
    "layer",
    [
        layers.VectorQuantizer(6, 3, codebook="gradient", prefix="top_"),
        layers.VectorQuantizer(6, 3, background_code=True),
        layers.ResidualBlock(8),
    ],
)
def test_layers_can_be_made_again_from_their_configuration(layer):
    config = layer.get_config()
    assert type(layer).from_config(config).get_config() == config
