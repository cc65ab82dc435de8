import keras
import numpy as np
import pytest
from keras import ops
from skimage.metrics import structural_similarity

import model

RNG = np.random.default_rng(0)


def images(count: int, size: int = 32) -> np.ndarray:
    return RNG.random((count, size, size, 1), np.float32)


def small_vqvae(**settings) -> model.VQVAE:
    return model.VQVAE(
        **{
            "image_size": 32,
            "grids": (4,),
            "channels": 8,
            "num_embeddings": 16,
            "embedding_dim": 4,
            "residual_blocks": 1,
            **settings,
        }
    )


def small_prior(gated: bool, grid=(5, 7), **settings) -> model.PixelCNN:
    """A prior with random weights everywhere, also where training starts from zero."""
    prior = model.PixelCNN(8, grid, **{"filters": 16, "num_blocks": 3, "gated": gated, **settings})
    for weight in prior.trainable_variables:
        weight.assign(RNG.normal(0, 0.3, weight.shape))
    return prior


def told(prior: model.PixelCNN, count: int) -> tuple[np.ndarray, ...]:
    """Codes, slice positions and, where the prior is told them, coarser codes."""
    shapes = [(count, *prior.grid_size), *([(count, *prior.coarse_grid_size)] if prior.coarse_grid_size else [])]
    codes, *coarse = (RNG.integers(0, 8, shape).astype(np.int32) for shape in shapes)
    return (codes, np.arange(4, 4 + count, dtype=np.int32), *coarse)


# ------------------------------------------------------------------------------------------------- SSIM


@pytest.mark.parametrize("size", [16, 33, 96])
def test_ssim_is_scikit_images(size):
    x = images(3, size)
    y = np.clip(x + RNG.normal(0, 0.1, x.shape), 0, 1).astype(np.float32)
    maps, means = ops.convert_to_numpy(model.ssim_map(x, y)), ops.convert_to_numpy(model.ssim(x, y))
    for i in range(3):
        mean, whole = structural_similarity(
            x[i, ..., 0],
            y[i, ..., 0],
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            full=True,
        )
        np.testing.assert_allclose(maps[i], whole, atol=2e-4)
        np.testing.assert_allclose(means[i], mean, atol=2e-5)


def test_a_single_image_in_a_graph_of_any_batch_size():
    tf = pytest.importorskip("tensorflow")
    images = tf.TensorSpec((None, 32, 32, 1), tf.float32)
    compiled = tf.function(model.ssim, input_signature=[images, images], autograph=False)
    x, y = (tf.constant(RNG.random((1, 32, 32, 1)), tf.float32) for _ in range(2))
    np.testing.assert_allclose(compiled(x, y), model.ssim(x, y), rtol=1e-5)


def test_ssim_of_an_image_with_itself_is_one():
    x = images(2)
    np.testing.assert_allclose(model.ssim_map(x, x), 1, atol=1e-5)


# --------------------------------------------------------------------------------------------- codebook


def quantizer(**settings) -> model.VectorQuantizer:
    layer = model.VectorQuantizer(**{"num_embeddings": 6, "embedding_dim": 3, **settings})
    layer.build((None, 4, 4, 3))
    layer.embeddings.assign(RNG.normal(size=(6, 3)))
    return layer


def state(layer) -> list[np.ndarray]:
    return [ops.convert_to_numpy(v) for v in (layer.embeddings, layer.counts, layer.sums)]


def test_each_vector_becomes_its_nearest_code():
    layer, features = quantizer(), RNG.normal(size=(2, 4, 4, 3)).astype(np.float32)
    quantized, indices = layer(features)
    codebook = ops.convert_to_numpy(layer.embeddings)
    nearest = np.linalg.norm(features[..., None, :] - codebook, axis=-1).argmin(-1)
    np.testing.assert_array_equal(indices, nearest)
    np.testing.assert_allclose(quantized, codebook[nearest], atol=1e-6)
    np.testing.assert_allclose(layer.lookup(indices), codebook[nearest])


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_gradients_pass_the_quantizer_unchanged(codebook):
    tf = pytest.importorskip("tensorflow")
    layer, features = quantizer(codebook=codebook), tf.constant(RNG.normal(size=(2, 4, 4, 3)), tf.float32)
    direction = RNG.normal(size=features.shape).astype(np.float32)
    with tf.GradientTape() as tape:
        tape.watch(features)
        quantized, _ = layer(features)
        loss = ops.sum(quantized * direction)
    np.testing.assert_allclose(tape.gradient(loss, features), direction, rtol=1e-5)


def test_the_commitment_loss_pulls_features_to_their_codes_and_nothing_else():
    tf = pytest.importorskip("tensorflow")
    layer = quantizer(codebook="gradient", commitment_weight=0.25)
    features = tf.constant(RNG.normal(size=(1, 4, 4, 3)), tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(features)
        quantized, _ = layer(features)
        loss = sum(layer.losses)
    offset = features - quantized  # mean over 48 elements: the gradient of (z − e)² is 2 (z − e) / 48
    np.testing.assert_allclose(tape.gradient(loss, features), 0.25 * 2 * offset / 48, atol=1e-6)
    assert np.any(tf.convert_to_tensor(tape.gradient(loss, layer.embeddings.value)))
    assert not quantizer(codebook="ema").trainable_variables


def test_moving_averages_are_those_of_the_paper():
    layer = quantizer(decay=0.9, restart_below=0.0)
    layer.counts.assign(np.full(6, 5.0))
    layer.sums.assign(5.0 * ops.convert_to_numpy(layer.embeddings))
    _, counts, sums = state(layer)
    features = RNG.normal(size=(2, 4, 4, 3)).astype(np.float32)
    chosen = ops.convert_to_numpy(layer(features, training=True)[1]).ravel()
    for k in range(6):
        mine = features.reshape(-1, 3)[chosen == k]
        counts[k] = 0.9 * counts[k] + 0.1 * len(mine)
        sums[k] = 0.9 * sums[k] + 0.1 * mine.sum(axis=0)
    for after, expected in zip(state(layer), (sums / counts[:, None], counts, sums), strict=True):
        np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-6)


def test_the_codebook_stands_still_in_evaluation():
    layer, features = quantizer(), RNG.normal(size=(2, 4, 4, 3)).astype(np.float32)
    before = state(layer)
    layer(features, training=False)
    for old, new in zip(before, state(layer), strict=True):
        np.testing.assert_array_equal(old, new)
    layer(features, training=True)
    assert not np.array_equal(before[0], state(layer)[0])


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_a_dead_code_restarts_with_its_count_and_sum(codebook):
    layer = quantizer(codebook=codebook, restart_below=0.1)
    layer.embeddings.assign(np.concatenate([np.zeros((5, 3)), np.full((1, 3), 1000.0)]))  # the last is out of reach
    layer.counts.assign(np.concatenate([np.full(5, 5.0), [0.0]]))
    if codebook == "ema":
        layer.sums.assign(ops.convert_to_numpy(layer.embeddings) * ops.convert_to_numpy(layer.counts)[:, None])
    features = RNG.normal(size=(2, 4, 4, 3)).astype(np.float32)
    layer(features, training=True)
    embedding, count = (ops.convert_to_numpy(v)[-1] for v in (layer.embeddings, layer.counts))
    assert np.isclose(features.reshape(-1, 3), embedding, atol=1e-5).all(axis=1).any()  # a vector of the batch
    np.testing.assert_allclose(count, 0.1 * 32 / 6, rtol=1e-6)
    if codebook == "ema":
        np.testing.assert_allclose(ops.convert_to_numpy(layer.sums)[-1], embedding * count, rtol=1e-5)


def test_the_first_batch_sets_the_whole_codebook():
    layer, features = quantizer(), RNG.normal(size=(2, 4, 4, 3)).astype(np.float32)
    layer(features, training=True)
    vectors = features.reshape(-1, 3)
    for code in ops.convert_to_numpy(layer.embeddings):
        assert np.isclose(vectors, code, atol=1e-4).all(axis=1).any() or ops.max(layer.counts) > 1


def test_without_restarts_an_unused_code_keeps_its_place():
    layer = quantizer(restart_below=0.0)
    layer.embeddings.assign(np.concatenate([np.zeros((5, 3)), np.full((1, 3), 1000.0)]))
    layer(RNG.normal(size=(2, 4, 4, 3)).astype(np.float32), training=True)
    np.testing.assert_allclose(ops.convert_to_numpy(layer.embeddings)[-1], 1000.0)


def test_use_is_counted_over_an_epoch():
    usage = model.CodeUsage(4)
    usage.update_state(np.array([3.0, 0, 0, 0]))
    usage.update_state(np.array([0.0, 3, 0, 0]))
    result = usage.result()
    assert float(result["codes_used"]) == 0.5
    np.testing.assert_allclose(float(result["perplexity"]), 2, rtol=1e-5)
    usage.reset_state()
    assert float(usage.result()["codes_used"]) == 0


def test_moving_averages_do_not_drift_under_mixed_precision():
    centres = 4.0 * np.eye(6, 3).astype(np.float32) - np.arange(6)[:, None]
    layers = {policy: quantizer(decay=0.98, restart_below=0.0) for policy in ("float32", "mixed_bfloat16")}
    for policy, layer in layers.items():
        layer.embeddings.assign(centres)
        random = np.random.default_rng(0)
        keras.config.set_dtype_policy(policy)
        try:
            for _ in range(200):
                features = centres[random.integers(0, 6, (2, 4, 4))] + 0.1 * random.normal(size=(2, 4, 4, 3))
                layer(ops.cast(features, keras.config.dtype_policy().compute_dtype), training=True)
        finally:
            keras.config.set_dtype_policy("float32")
    for exact, rounded in zip(*map(state, layers.values()), strict=True):
        np.testing.assert_allclose(rounded, exact, rtol=5e-3, atol=5e-3)


def test_the_quantizer_runs_in_float32_whatever_the_policy():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        vqvae = small_vqvae()
        assert vqvae.encoders[0].layers[0].compute_dtype == "bfloat16"
        assert vqvae.quantizers[0].compute_dtype == "float32"
        assert vqvae(images(1)).dtype == "float32"
    finally:
        keras.config.set_dtype_policy("float32")


# ----------------------------------------------------------------------------------------------- VQ-VAE


@pytest.mark.parametrize("grids", [(16,), (8,), (4,), (4, 16), (4, 8), (2, 8)])
def test_shapes_follow_the_grids(grids):
    vqvae, x = small_vqvae(grids=grids), images(2)
    codes = vqvae.encode(x)
    assert [indices.shape for indices in codes] == [(2, grid, grid) for grid in grids]
    assert all(indices.dtype == "int32" for indices in codes)
    np.testing.assert_allclose(vqvae.decode_code(codes), vqvae(x), atol=1e-5)
    quantized = [layer.lookup(indices) for layer, indices in zip(vqvae.quantizers, codes, strict=True)]
    np.testing.assert_allclose(vqvae.decode(quantized), vqvae(x), atol=1e-5)


@pytest.mark.parametrize(
    ("image_size", "grids"),
    [(36, (4,)), (32, (32,)), (32, ()), (32, (8, 4)), (32, (2, 4, 8)), (32, (0,)), (32, (4, 4))],
)
def test_grids_that_do_not_fit_are_refused(image_size, grids):
    with pytest.raises(ValueError, match="is not one or two grids"):
        small_vqvae(image_size=image_size, grids=grids)


def test_the_bottom_is_quantized_given_the_top_and_the_decoder_reads_both():
    vqvae, x = small_vqvae(grids=(4, 8)), images(1)
    for weight in vqvae.trainable_variables:
        weight.assign(RNG.normal(0, 0.2, weight.shape))
    top, bottom = (ops.convert_to_numpy(indices) for indices in vqvae.encode(x))
    image = ops.convert_to_numpy(vqvae.decode_code([top, bottom]))
    assert not np.allclose(image, vqvae.decode_code([(top + 1) % 16, bottom]))
    assert not np.allclose(image, vqvae.decode_code([top, (bottom + 1) % 16]))
    seen = ops.convert_to_numpy(vqvae.quantizers[0].embeddings)
    vqvae.quantizers[0].embeddings.assign(seen[::-1] * 2)  # another top, the same features
    assert not np.array_equal(bottom, vqvae.encode(x)[1])


def top_alone(vqvae: model.VQVAE, x: np.ndarray) -> np.ndarray:
    """Images of the top's codes, the bottom's vectors replaced by their mean."""
    top, bottom = (layer.lookup(codes) for layer, codes in zip(vqvae.quantizers, vqvae.encode(x), strict=True))
    mean = ops.mean(bottom, axis=(0, 1, 2), keepdims=True)
    return ops.convert_to_numpy(vqvae.decode([top, ops.broadcast_to(mean, bottom.shape)]))


def test_the_top_carries_what_it_can():
    x = np.repeat(images(8, 4), 8, axis=1).repeat(8, axis=2)  # 4 × 4 squares: all of it fits the top's 4 × 4 codes
    vqvae = small_vqvae(grids=(4, 8), num_embeddings=64)
    vqvae.compile(keras.optimizers.Adam(3e-3))
    vqvae.fit(x, epochs=60, batch_size=8, verbose=0)
    told_nothing = np.abs(x - x.mean(axis=0)).mean()
    assert np.abs(x - top_alone(vqvae, x)).mean() < 0.6 * told_nothing


def test_bottom_dropout_replaces_whole_images_by_the_mean_and_only_in_training():
    vqvae, vectors = small_vqvae(grids=(4, 8), bottom_dropout=0.5), RNG.normal(size=(64, 2, 2, 4)).astype(np.float32)
    dropped = ops.convert_to_numpy(vqvae._drop(vectors))
    mean = vectors.mean(axis=(0, 1, 2))
    replaced = np.isclose(dropped, mean, atol=1e-6).all(axis=(1, 2, 3))
    assert 0.25 < replaced.mean() < 0.75
    np.testing.assert_array_equal(dropped[~replaced], vectors[~replaced])
    x = images(2)
    np.testing.assert_array_equal(vqvae(x), vqvae(x))


@pytest.mark.parametrize(("codebook", "grids"), [("ema", (4,)), ("gradient", (4,)), ("gradient", (4, 8))])
def test_training_lowers_every_error_and_reports_the_parts(codebook, grids):
    vqvae, x = (
        small_vqvae(codebook=codebook, grids=grids, bottom_dropout=0.0),
        np.repeat(images(4, 4), 8, axis=1).repeat(8, axis=2),
    )
    vqvae.compile(keras.optimizers.Adam(3e-3))
    history = vqvae.fit(x, epochs=30, batch_size=4, verbose=0).history
    prefixes = [""] if len(grids) == 1 else ["top_", "bottom_"]
    parts = {f"{p}{part}" for p in prefixes for part in ("codebook", "commitment", "codes_used", "perplexity")}
    assert {"loss", "reconstruction", "ssim"} | parts <= history.keys()
    assert history["reconstruction"][-1] < 0.7 * history["reconstruction"][0]
    assert history["ssim"][-1] > history["ssim"][0]
    total = history["reconstruction"][-1] + sum(history[f"{prefix}commitment"][-1] for prefix in prefixes)
    total += sum(history[f"{prefix}codebook"][-1] for prefix in prefixes) if codebook == "gradient" else 0
    np.testing.assert_allclose(history["loss"][-1], total, rtol=1e-4)


def test_a_residual_block_starts_as_the_identity():
    features = RNG.normal(size=(1, 4, 4, 8)).astype(np.float32)
    np.testing.assert_array_equal(model.ResidualBlock(8)(features), features)


@pytest.mark.parametrize(
    "make",
    [
        small_vqvae,
        lambda: small_vqvae(grids=(4, 8)),
        lambda: small_prior(True),
        lambda: small_prior(False),
        lambda: small_prior(True, (6, 8), coarse_grid_size=(3, 4)),
    ],
)
def test_saved_and_loaded_models_give_the_same_output(tmp_path, make):
    network = make()
    inputs = images(2) if isinstance(network, model.VQVAE) else told(network, 2)
    network.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(network(inputs), loaded(inputs))


# ------------------------------------------------------------------------------------------------ prior


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("grid", "coarse"), [((5, 7), None), ((6, 6), None), ((6, 6), (3, 3))])
def test_the_prior_sees_all_earlier_positions_and_no_later_one(gated, grid, coarse):
    """Perturb each position: no logits at it or before it change; all those after it that should do, change."""
    prior = small_prior(gated, grid, coarse_grid_size=coarse)
    height, width = grid
    codes, *rest = told(prior, 1)
    before = ops.convert_to_numpy(prior((codes, *rest)))
    for i in range(height * width):
        perturbed = codes.copy()
        perturbed.reshape(-1)[i] = (perturbed.reshape(-1)[i] + 1) % 8
        after = ops.convert_to_numpy(prior((perturbed, *rest)))
        changed = np.any(after != before, axis=-1).reshape(-1)
        assert not changed[: i + 1].any(), f"logits at or before position {i} changed"
        if gated:
            assert changed[i + 1 :].all(), f"position {i} is not seen by all later ones"
        else:
            seen = [i + 1] if (i + 1) % width else []  # the right neighbour
            seen += range(i + width, height * width, width)  # the column below
            assert changed[seen].all(), f"position {i} is not seen from {seen}"


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("grid_size", [12, 32])
def test_the_receptive_field_reaches_over_the_whole_grid(gated, grid_size):
    """At the default depth and kernel, the last position's logits depend on the very first code: with some weights, for
    others let nothing of it through."""
    prior = model.PixelCNN(4, (grid_size, grid_size), filters=8, gated=gated)

    def last_logits(codes):
        return ops.convert_to_numpy(prior((codes, np.array([0]))))[0, -1, -1]

    def depends(seed: int) -> bool:
        random = np.random.default_rng(seed)
        for weight in prior.trainable_variables:
            weight.assign(random.normal(0, 0.4, weight.shape))
        codes = random.integers(0, 4, (1, grid_size, grid_size)).astype(np.int32)
        other = codes.copy()
        other[0, 0, 0] = (codes[0, 0, 0] + 1) % 4
        return np.any(last_logits(codes) != last_logits(other))

    assert any(map(depends, range(10)))


def test_too_few_blocks_for_the_grid_are_refused():
    with pytest.raises(ValueError, match="2 blocks are too few"):
        model.PixelCNN(8, (32, 32), num_blocks=2)


@pytest.mark.parametrize("gated", [True, False])
def test_the_prior_is_told_the_slice_position(gated):
    codes = RNG.integers(0, 8, (2, 5, 7)).astype(np.int32)
    codes[1] = codes[0]
    here, there = ops.convert_to_numpy(small_prior(gated)((codes, np.array([2, 9]))))
    assert not np.allclose(here, there)
    here, there = ops.convert_to_numpy(small_prior(gated, use_position=False)((codes, np.array([2, 9]))))
    np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("gated", [True, False])
def test_the_prior_learns(gated):
    """Codes that repeat the one to their left cost next to nothing once learned; a fair choice costs ln 8."""
    codes = np.repeat(RNG.integers(0, 8, (64, 5, 1)), 7, axis=2).astype(np.int32)
    prior = model.PixelCNN(8, (5, 7), filters=16, num_blocks=2, dropout=0.0, gated=gated)
    prior.compile(keras.optimizers.Adam(1e-2))
    history = prior.fit((codes, np.zeros(64, np.int32)), codes, epochs=30, verbose=0).history
    assert history["loss"][-1] < 1.5 * np.log(8) / 7
    np.testing.assert_allclose(history["bits_per_code"][-1], history["loss"][-1] / np.log(2), rtol=1e-4)


@pytest.mark.parametrize("gated", [True, False])
def test_every_coarse_code_reaches_the_logits_it_lies_over_also_the_first(gated):
    prior = small_prior(gated, (8, 8), coarse_grid_size=(4, 4))
    codes, positions, coarse = told(prior, 1)
    before = ops.convert_to_numpy(prior((codes, positions, coarse)))
    for row, column in ((0, 0), (1, 2), (3, 3)):
        changed = coarse.copy()
        changed[0, row, column] = (changed[0, row, column] + 1) % 8
        after = ops.convert_to_numpy(prior((codes, positions, changed)))
        assert not np.allclose(before[0, 2 * row, 2 * column], after[0, 2 * row, 2 * column])


@pytest.mark.parametrize("gated", [True, False])
def test_a_bottom_prior_uses_the_top(gated):
    """Its cross-entropy rises clearly when each slice is given another slice's top codes."""
    coarse = RNG.integers(0, 8, (64, 3, 3)).astype(np.int32)
    codes = (coarse.repeat(2, axis=1).repeat(2, axis=2) + RNG.integers(0, 2, (64, 6, 6)).astype(np.int32)) % 8
    prior = model.PixelCNN(8, (6, 6), 16, num_blocks=2, dropout=0.0, gated=gated, coarse_grid_size=(3, 3))
    prior.compile(keras.optimizers.Adam(1e-2))
    positions = np.zeros(64, np.int32)
    prior.fit((codes, positions, coarse), codes, epochs=30, verbose=0)
    own = prior.evaluate((codes, positions, coarse), codes, verbose=0, return_dict=True)["loss"]
    others = prior.evaluate((codes, positions, np.roll(coarse, 1, axis=0)), codes, verbose=0, return_dict=True)["loss"]
    assert own < 1.3 * np.log(2)  # what is left to know is a fair coin
    assert others > own + 0.5


def test_even_kernels_have_no_centre_to_mask():
    with pytest.raises(ValueError, match="kernel_size is 4: must be odd"):
        model.MaskedConv2D(8, 4, "A")


def test_unknown_masks_are_refused():
    with pytest.raises(ValueError, match="mask is 'C'"):
        model.MaskedConv2D(8, 3, "C")


@pytest.mark.parametrize(
    ("mask", "offsets"),
    [
        ("A", {(-1, -1), (-1, 0), (-1, 1), (0, -1)}),
        ("B", {(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 0)}),
        ("vertical A", {(-1, -1), (-1, 0), (-1, 1)}),
        ("vertical B", {(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 0), (0, 1)}),
        ("horizontal A", {(0, -1)}),
        ("horizontal B", {(0, -1), (0, 0)}),
    ],
)
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_masked_convolution_reads_the_taps_of_its_mask(mask, offsets, dilation):
    layer = model.MaskedConv2D(1, 3, mask, dilation)
    layer.build((None, 9, 9, 1))
    layer.kernel.assign(RNG.random(layer.kernel.shape) + 1)
    impulse = np.zeros((1, 9, 9, 1), np.float32)
    impulse[0, 4, 4, 0] = 1
    rows, columns = np.nonzero(ops.convert_to_numpy(layer(impulse))[0, :, :, 0])
    # a position reads the impulse through tap (4 − row, 4 − column)
    assert set(zip((4 - rows).tolist(), (4 - columns).tolist(), strict=True)) == {
        (dilation * row, dilation * column) for row, column in offsets
    }
