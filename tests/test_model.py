import keras
import numpy as np
import pytest
from keras import ops
from skimage.metrics import structural_similarity

import augmentation
import masked
import model
from layers import resize
from tests.randomness import RNG
from training import dtype_policy


def random_images(count: int, size: int = 32) -> np.ndarray:
    return RNG.random((count, size, size, 1), np.float32)


def square_images(count: int) -> np.ndarray:
    """Images (count, 32, 32, 1) of 4 × 4 random squares, which 4 × 4 codes can encode."""
    return random_images(count, 4).repeat(8, axis=1).repeat(8, axis=2)


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
    """A prior with random values also in the weights that are initialised with zeros."""
    prior = model.PixelCNN(8, grid, **{"filters": 16, "num_blocks": 3, "gated": gated, **settings})
    for weight in prior.trainable_variables:
        weight.assign(RNG.normal(0, 0.3, weight.shape))
    return prior


def random_inputs(prior: model.PixelCNN, count: int) -> dict[str, np.ndarray]:
    """Codes, slice positions and, for a bottom prior, coarse codes."""
    grids = {"codes": prior.grid_size, "coarse": prior.coarse_grid_size}
    codes = {key: RNG.integers(0, 8, (count, *grid)).astype(np.int32) for key, grid in grids.items() if grid}
    return {**codes, "positions": np.arange(4, 4 + count, dtype=np.int32)}


# ----------------------------------------------------------------------------------------------- levels


def test_names_of_levels():
    assert model.level_names(1) == ("",)
    assert model.level_names(2) == ("top", "bottom")
    assert model.level_prefixes(1) == ("",)
    assert model.level_prefixes(2) == ("top_", "bottom_")
    assert model.prior_names(1) == ("prior",)
    assert model.prior_names(2) == ("top_prior", "bottom_prior")


@pytest.mark.parametrize(
    ("image_size", "grids"),
    [(36, (4,)), (32, (32,)), (32, ()), (32, (8, 4)), (32, (2, 4, 8)), (32, (0,)), (32, (4, 4))],
)
def test_impossible_grids_are_refused(image_size, grids):
    with pytest.raises(ValueError, match="one or two grids"):
        small_vqvae(image_size=image_size, grids=grids)


# ----------------------------------------------------------------------------------------------- VQ-VAE


@pytest.mark.parametrize("grids", [(16,), (8,), (4,), (4, 16), (4, 8), (2, 8)])
def test_shapes_follow_the_grids(grids):
    vqvae, x = small_vqvae(grids=grids), random_images(2)
    codes = vqvae.encode(x)
    assert [indices.shape for indices in codes] == [(2, grid, grid) for grid in grids]
    assert all(indices.dtype == "int32" for indices in codes)
    np.testing.assert_allclose(vqvae.decode_code(codes), vqvae(x), atol=1e-5)
    quantized = [layer.lookup(indices) for layer, indices in zip(vqvae.quantizers, codes, strict=True)]
    np.testing.assert_allclose(vqvae.decode(quantized), vqvae(x), atol=1e-5)


def test_quantizer_computes_in_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        vqvae = small_vqvae()
        assert vqvae.encoders[0].layers[0].compute_dtype == "bfloat16"
        assert vqvae.quantizers[0].compute_dtype == "float32"
        assert vqvae(random_images(1)).dtype == "float32"
    finally:
        keras.config.set_dtype_policy("float32")


def test_bottom_codes_depend_on_the_top_and_the_decoder_reads_both():
    vqvae, x = small_vqvae(grids=(4, 8)), random_images(1)
    for weight in vqvae.trainable_variables:
        weight.assign(RNG.normal(0, 0.2, weight.shape))
    top, bottom = (ops.convert_to_numpy(indices) for indices in vqvae.encode(x))
    image = ops.convert_to_numpy(vqvae.decode_code([top, bottom]))
    assert not np.allclose(image, vqvae.decode_code([(top + 1) % 16, bottom]))
    assert not np.allclose(image, vqvae.decode_code([top, (bottom + 1) % 16]))
    embeddings = ops.convert_to_numpy(vqvae.quantizers[0].embeddings)
    vqvae.quantizers[0].embeddings.assign(embeddings[::-1] * 2)  # changes the top vectors, but not the encoders' output
    assert not np.array_equal(bottom, vqvae.encode(x)[1])


def decode_top_alone(vqvae: model.VQVAE, x: np.ndarray) -> np.ndarray:
    """Reconstructions from the top codes, with all bottom vectors replaced by their mean."""
    top, bottom = (layer.lookup(codes) for layer, codes in zip(vqvae.quantizers, vqvae.encode(x), strict=True))
    mean = ops.mean(bottom, axis=(0, 1, 2), keepdims=True)
    return ops.convert_to_numpy(vqvae.decode([top, ops.broadcast_to(mean, bottom.shape)]))


def test_top_level_alone_encodes_much_of_the_image():
    x = square_images(8)
    vqvae = small_vqvae(grids=(4, 8), num_embeddings=64)
    vqvae.compile(keras.optimizers.Adam(3e-3))
    vqvae.fit(x, epochs=60, batch_size=8, verbose=0)
    error_of_mean_image = np.abs(x - x.mean(axis=0)).mean()
    assert np.abs(x - decode_top_alone(vqvae, x)).mean() < 0.6 * error_of_mean_image


def test_bottom_dropout_replaces_whole_images_by_the_mean_in_training_only():
    vqvae, vectors = small_vqvae(grids=(4, 8), bottom_dropout=0.5), RNG.normal(size=(64, 2, 2, 4)).astype(np.float32)
    dropped = ops.convert_to_numpy(vqvae._drop_bottom(vectors))
    mean = vectors.mean(axis=(0, 1, 2))
    replaced = np.isclose(dropped, mean, atol=1e-6).all(axis=(1, 2, 3))
    assert 0.25 < replaced.mean() < 0.75
    np.testing.assert_array_equal(dropped[~replaced], vectors[~replaced])
    x = random_images(2)
    np.testing.assert_array_equal(vqvae(x), vqvae(x))


@pytest.mark.parametrize(("codebook", "grids"), [("ema", (4,)), ("gradient", (4,)), ("gradient", (4, 8))])
def test_training_lowers_the_loss_and_reports_its_parts(codebook, grids):
    vqvae, x = small_vqvae(codebook=codebook, grids=grids, bottom_dropout=0.0), square_images(4)
    vqvae.compile(keras.optimizers.Adam(3e-3))
    history = vqvae.fit(x, epochs=30, batch_size=4, verbose=0).history
    prefixes = model.level_prefixes(len(grids))
    parts = {f"{p}{part}" for p in prefixes for part in ("codebook", "commitment", "codes_used", "perplexity")}
    assert {"loss", "reconstruction", "ssim"} | parts <= history.keys()
    assert history["reconstruction"][-1] < 0.7 * history["reconstruction"][0]
    assert history["ssim"][-1] > history["ssim"][0]
    total = history["reconstruction"][-1] + sum(history[f"{prefix}commitment"][-1] for prefix in prefixes)
    total += sum(history[f"{prefix}codebook"][-1] for prefix in prefixes) if codebook == "gradient" else 0
    np.testing.assert_allclose(history["loss"][-1], total, rtol=1e-4)


WEIGHTS = {"mse_weight": 0.7, "l1_weight": 1.3, "ssim_weight": 2.1, "commitment_weight": 0.4, "data_variance": 0.08}


@pytest.mark.parametrize(("codebook", "grids"), [("ema", (4,)), ("gradient", (4,)), ("gradient", (4, 8))])
def test_loss_is_the_weighted_sum_of_its_terms(codebook, grids):
    """Each term has another weight, and none is negligible."""
    vqvae, x = small_vqvae(codebook=codebook, grids=grids, **WEIGHTS), square_images(3)
    for weight in vqvae.trainable_variables:
        weight.assign(RNG.normal(0, 0.2, weight.shape))
    y = ops.convert_to_numpy(vqvae(x))
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0, "full": True}
    ssim = np.mean([structural_similarity(a[..., 0], b[..., 0], **settings)[1] for a, b in zip(x, y, strict=True)])
    terms = [0.7 * np.mean((x - y) ** 2) / 0.08, 1.3 * np.mean(np.abs(x - y)), 2.1 * (1 - ssim)]

    features, decoded = vqvae.features(x), []
    for level, codes in enumerate(vqvae.encode(x)):
        inputs = ops.concatenate([features[level], *decoded], axis=-1)
        vectors = ops.convert_to_numpy(vqvae.projections[level](inputs))
        quantized = ops.convert_to_numpy(vqvae.quantizers[level].embeddings)[ops.convert_to_numpy(codes)]
        if level + 1 < len(grids):  # the bottom level reads what the top level decodes
            decoded = [vqvae.decoders[level](quantized)]
        distance = np.mean((vectors - quantized) ** 2)
        terms += [0.4 * distance, distance] if codebook == "gradient" else [0.4 * distance]

    loss = float(vqvae.compute_loss(x=x, y_pred=vqvae(x)))
    np.testing.assert_allclose(loss, sum(terms), rtol=1e-4)
    assert min(terms) > 0.002 * loss
    np.testing.assert_allclose(float(vqvae.reconstruction_loss.result()), sum(terms[:3]), rtol=1e-4)


def test_loss_of_the_prior_is_the_mean_cross_entropy_in_nats():
    prior = small_prior(True)
    inputs = random_inputs(prior, 3)
    logits = ops.convert_to_numpy(prior(inputs)).astype(np.float64)
    log_probabilities = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    nats = -np.take_along_axis(log_probabilities, inputs["codes"][..., None], axis=-1).mean()
    loss = prior.compute_loss(x=inputs, y=inputs["codes"], y_pred=prior(inputs))
    np.testing.assert_allclose(float(loss), nats, rtol=1e-5)
    np.testing.assert_allclose(float(prior.bits_per_code.result()), nats / np.log(2), rtol=1e-5)


def trained_on(vqvae: model.VQVAE, x: np.ndarray) -> list[bool]:
    """Train for a step, and return for each weight whether it has changed."""
    before = vqvae.get_weights()
    vqvae.compile(keras.optimizers.SGD(0.1))
    vqvae.fit(x, epochs=1, verbose=0)
    return [not np.array_equal(a, b) for a, b in zip(before, vqvae.get_weights(), strict=True)]


BACKGROUND = 0.05  # what counts as background in these tests


def brain_images(count: int, size: int = 32) -> np.ndarray:
    """Images (count, size, size, 1) of a few bright pixels in some of the 4 × 4 squares; all others are up to 0.05."""
    bright = RNG.random((count, size // 4, size // 4, 1)) < 0.3
    bright = bright.repeat(4, axis=1).repeat(4, axis=2) & (RNG.random((count, size, size, 1)) < 0.2)
    images = np.where(bright, RNG.uniform(0.051, 0.2, bright.shape), RNG.uniform(0, BACKGROUND, bright.shape))
    images[:, 1::4, 1::4] = np.maximum(images[:, 1::4, 1::4], BACKGROUND)
    return images.astype(np.float32)


def brightest(images: np.ndarray, grid: int) -> np.ndarray:
    """The brightest pixel of each cell of a grid: (N, grid, grid)."""
    side = images.shape[1] // grid
    return images.reshape(-1, grid, side, grid, side).max(axis=(2, 4))


def with_random_weights(vqvae: model.VQVAE) -> model.VQVAE:
    """Set random values in all weights other than the codes."""
    for layer in (*vqvae.encoders, *vqvae.projections, *vqvae.decoders):
        for weight in layer.trainable_variables:
            weight.assign(RNG.normal(0, 0.2, weight.shape))
    return vqvae


@pytest.mark.parametrize(("codebook", "grids"), [("gradient", (8,)), ("ema", (2, 8))])
def test_background_is_encoded_as_code_0_and_decoded_to_black(grids, codebook):
    vqvae = with_random_weights(small_vqvae(grids=grids, codebook=codebook, background_threshold=BACKGROUND))
    x = brain_images(3)
    codes = [ops.convert_to_numpy(indices) for indices in vqvae.encode(x)]
    for indices, grid in zip(codes, grids, strict=True):
        np.testing.assert_array_equal(indices == 0, brightest(x, grid) <= BACKGROUND)
    y = ops.convert_to_numpy(vqvae(x))
    background = (brightest(x, grids[-1]) <= BACKGROUND).repeat(4, axis=1).repeat(4, axis=2)
    assert np.all(y[background] == 0)
    assert np.any(y[~background] > 0)
    np.testing.assert_allclose(vqvae.decode_code(codes), y, atol=1e-5)
    quantized = [layer.lookup(indices) for layer, indices in zip(vqvae.quantizers, codes, strict=True)]
    np.testing.assert_allclose(vqvae.decode(quantized), y, atol=1e-5)


def test_any_codes_are_decoded_to_black_where_they_are_background():
    vqvae = with_random_weights(small_vqvae(grids=(4, 8), background_threshold=BACKGROUND))
    top, bottom = (RNG.integers(0, 3, (2, grid, grid)).astype(np.int32) for grid in (4, 8))
    y = brightest(ops.convert_to_numpy(vqvae.decode_code([top, bottom])), 8)
    assert np.all(y[bottom == 0] == 0)
    assert np.mean(y[bottom != 0] > 0) > 0.5


@pytest.mark.parametrize(("codebook", "grids"), [("gradient", (8,)), ("ema", (4, 8))])
def test_training_keeps_background_black(codebook, grids):
    vqvae, x = small_vqvae(grids=grids, codebook=codebook, background_threshold=BACKGROUND), brain_images(8)
    vqvae.compile(keras.optimizers.Adam(3e-3), run_eagerly=True)
    vqvae.fit(x, epochs=3, batch_size=8, verbose=0)
    for level, indices in enumerate(vqvae.encode(x)):
        np.testing.assert_array_equal(indices == 0, brightest(x, grids[level]) <= BACKGROUND)
        codes = ops.convert_to_numpy(vqvae.quantizers[level].embeddings)
        np.testing.assert_array_equal(codes[0], 0)
        assert np.all(np.any(codes[1:] != 0, axis=1))
    for training in (False, True):
        y = brightest(ops.convert_to_numpy(vqvae(x, training=training)), 8)
        assert np.all(y[brightest(x, 8) <= BACKGROUND] == 0)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_background_is_the_same_in_mixed_precision(policy):
    levels = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1).repeat(4, axis=1).repeat(4, axis=2)
    keras.config.set_dtype_policy(policy)
    try:
        vqvae = with_random_weights(small_vqvae(grids=(8,), background_threshold=BACKGROUND))
        y = ops.convert_to_numpy(vqvae(levels.astype(np.float32) / 255, training=True))
    finally:
        keras.config.set_dtype_policy("float32")
    black = np.all(y.reshape(8, 4, 8, 4) == 0, axis=(1, 3))
    np.testing.assert_array_equal(black.ravel(), np.arange(64) <= 12)


def test_images_are_encoded_at_the_coding_size():
    small = with_random_weights(small_vqvae(background_threshold=BACKGROUND))
    large = small_vqvae(image_size=64, coding_size=32, background_threshold=BACKGROUND)
    large.set_weights(small.get_weights())
    images = random_images(3, 64)
    images[:, :, :32] = 0
    shrunk = np.clip(ops.convert_to_numpy(resize(images, 32)), 0, 1)
    codes = large.encode(images)
    np.testing.assert_array_equal(codes[0], small.encode(shrunk)[0])
    decoded = ops.convert_to_numpy(large.decode_code(codes))
    assert decoded.shape == images.shape
    np.testing.assert_allclose(decoded, large(images), atol=1e-5)
    assert not decoded[:, :, :16].any()
    assert decoded[:, :, 32:].any()


def test_without_a_threshold_code_0_and_black_are_like_all_others():
    vqvae, black = with_random_weights(small_vqvae()), np.zeros((1, 32, 32, 1), np.float32)
    quantizer = vqvae.quantizers[0]
    assert np.any(ops.convert_to_numpy(quantizer.embeddings)[0])
    assert np.any(ops.convert_to_numpy(vqvae(black)))
    assert np.any(ops.convert_to_numpy(vqvae.decode([np.zeros((1, 4, 4, 4), np.float32)])))
    vectors = ops.convert_to_numpy(vqvae.projections[0](vqvae.features(black)[0]))
    for code in (3, 0):
        embeddings = RNG.normal(10, 1, (16, 4))
        embeddings[code] = vectors[0, 1, 1]
        quantizer.embeddings.assign(embeddings)
        for x in (black, random_images(1) / 100):
            assert ops.convert_to_numpy(vqvae.encode(x)[0])[0, 1, 1] == code


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_a_frozen_model_does_not_change_in_training(codebook):
    vqvae, x = small_vqvae(codebook=codebook, grids=(4, 8)), random_images(4)
    assert any(trained_on(vqvae, x))
    vqvae.trainable = False
    assert not any(trained_on(vqvae, x))


def test_codes_depend_on_every_decoder_but_that_of_the_image():
    vqvae, x = small_vqvae(grids=(4, 8)), random_images(4)
    before = [ops.convert_to_numpy(codes) for codes in vqvae.encode(x)]
    for level in (1, 0):
        for weight in vqvae.decoders[level].weights:
            weight.assign(RNG.normal(0, 1, weight.shape))
        top, bottom = vqvae.encode(x)
        np.testing.assert_array_equal(top, before[0])
        assert np.array_equal(bottom, before[1]) == (vqvae.decoders[level] is vqvae.decoders[-1])


def test_each_level_and_the_bottom_dropout_have_random_streams_of_their_own():
    vqvaes = [small_vqvae(grids=(4, 8), seed=seed) for seed in (0, 1)]
    generators = [g for v in vqvaes for g in (v.seed_generator, *[q.seed_generator for q in v.quantizers])]
    states = {tuple(ops.convert_to_numpy(generator.state).tolist()) for generator in generators}
    assert len(states) == 6


@pytest.mark.parametrize(
    "make",
    [
        small_vqvae,
        lambda: small_vqvae(grids=(4, 8)),
        lambda: small_vqvae(background_threshold=0.5),
        lambda: small_prior(True),
        lambda: small_prior(True, attention=2),
        lambda: small_prior(False),
        lambda: small_prior(True, (6, 8), coarse_grid_size=(3, 4)),
    ],
)
def test_saved_and_loaded_models_give_the_same_output(tmp_path, make):
    network = make()
    inputs = random_images(2) if isinstance(network, model.VQVAE) else random_inputs(network, 2)
    network.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(network(inputs), loaded(inputs))


# ------------------------------------------------------------------------------------------------ prior


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("grid", "coarse", "attention"), [((5, 7), None, 0), ((6, 6), None, 0), ((6, 6), (3, 3), 0), ((4, 6), None, 2)]
)
def test_prior_depends_on_all_earlier_cells_and_on_no_later_one(gated, grid, coarse, attention):
    """Changing a cell changes no logits at or before it, and all logits after it that should depend on it."""
    prior = small_prior(gated, grid, coarse_grid_size=coarse, attention=attention if gated else 0)
    height, width = grid
    inputs = random_inputs(prior, 1)
    before = ops.convert_to_numpy(prior(inputs))
    for i in range(height * width):
        perturbed = inputs["codes"].copy()
        perturbed.reshape(-1)[i] = (perturbed.reshape(-1)[i] + 1) % 8
        after = ops.convert_to_numpy(prior({**inputs, "codes": perturbed}))
        changed = np.any(after != before, axis=-1).reshape(-1)
        assert not changed[: i + 1].any(), f"logits at or before cell {i} changed"
        if gated:
            assert changed[i + 1 :].all(), f"not all later logits depend on cell {i}"
        else:  # the plain prior has a blind spot
            dependent = [i + 1] if (i + 1) % width else []  # the right neighbour
            dependent += range(i + width, height * width, width)  # the column below
            assert changed[dependent].all(), f"not all logits of {dependent} depend on cell {i}"


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("grid_size", [12, 32])
def test_receptive_field_covers_the_whole_grid(gated, grid_size):
    """With the default depth and kernel, the logits of the last cell depend on the first code.

    Some random weights suppress the dependence, so several are tried.
    """
    prior = model.PixelCNN(4, (grid_size, grid_size), filters=8, gated=gated)

    def last_logits(codes):
        return ops.convert_to_numpy(prior({"codes": codes, "positions": np.array([0])}))[0, -1, -1]

    def depends(seed: int) -> bool:
        random = np.random.default_rng(seed)
        for weight in prior.trainable_variables:
            weight.assign(random.normal(0, 0.4, weight.shape))
        codes = random.integers(0, 4, (1, grid_size, grid_size)).astype(np.int32)
        other = codes.copy()
        other[0, 0, 0] = (codes[0, 0, 0] + 1) % 4
        return np.any(last_logits(codes) != last_logits(other))

    assert any(map(depends, range(10)))


def test_dilations_cover_the_grid_in_the_shortest_cycle():
    assert model.block_dilations(8, 7, 3, 6) == [1] * 6
    assert model.block_dilations(12, 7, 3, 6) == [1, 2, 1, 2, 1, 2]
    assert model.block_dilations(32, 7, 3, 6) == [1, 2, 4, 8, 16, 1]


def test_too_few_blocks_for_the_grid_are_refused():
    with pytest.raises(ValueError, match=r"too few blocks.*32.*use more"):
        model.PixelCNN(8, (32, 32), num_blocks=2)


@pytest.mark.parametrize("gated", [True, False])
def test_prior_is_conditioned_on_the_slice_position(gated):
    codes = RNG.integers(0, 8, (1, 5, 7)).astype(np.int32).repeat(2, axis=0)
    inputs = {"codes": codes, "positions": np.array([2, 9])}
    first, second = ops.convert_to_numpy(small_prior(gated)(inputs))
    assert not np.allclose(first, second)
    first, second = ops.convert_to_numpy(small_prior(gated, use_position=False)(inputs))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("gated", [True, False])
def test_prior_is_conditioned_on_the_augmentation(gated):
    prior = small_prior(gated, use_position=False)
    codes, count = RNG.integers(0, 8, (1, 5, 7)).astype(np.int32), augmentation.NUM_PARAMETERS
    inputs = {"codes": codes.repeat(1 + count, axis=0), "positions": np.zeros(1 + count, np.int32)}
    parameters = np.concatenate([np.zeros((1, count)), np.eye(count)]).astype(np.float32)
    logits = ops.convert_to_numpy(prior({**inputs, "augmentation": parameters}))
    np.testing.assert_allclose(logits[0], ops.convert_to_numpy(prior(inputs))[0], atol=1e-5)
    assert np.all(np.abs(logits[1:] - logits[0]).max(axis=(1, 2, 3)) > 0.01)  # each parameter matters


def test_the_plain_prior_has_no_attention():
    with pytest.raises(ValueError, match="no attention"):
        small_prior(False, attention=1)


def test_attention_layers_are_spread_evenly_over_the_blocks():
    def places(num_blocks: int, attention: int) -> list[int]:
        prior = model.PixelCNN(8, (3, 3), filters=8, num_blocks=num_blocks, attention=attention)
        blocks = [i for i, layer in enumerate(prior.blocks) if not isinstance(layer, masked.CausalAttention)]
        assert len(blocks) == num_blocks
        assert len(prior.blocks) == num_blocks + attention
        return [i for i in range(len(prior.blocks)) if i not in blocks]

    assert places(4, 2) == [2, 5]
    assert places(2, 2) == [1, 3]


@pytest.mark.parametrize("gated", [True, False])
def test_prior_learns_that_codes_repeat(gated):
    """Each code repeats its left neighbour, so only the first of every 7 costs ln 8 nats once this is learned."""
    codes = np.repeat(RNG.integers(0, 8, (64, 5, 1)), 7, axis=2).astype(np.int32)
    prior = model.PixelCNN(8, (5, 7), filters=16, num_blocks=2, dropout=0.0, gated=gated)
    prior.compile(keras.optimizers.Adam(1e-2))
    inputs = {"codes": codes, "positions": np.zeros(64, np.int32)}
    history = prior.fit(inputs, codes, epochs=30, verbose=0).history
    assert history["loss"][-1] < 1.5 * np.log(8) / 7
    np.testing.assert_allclose(history["bits_per_code"][-1], history["loss"][-1] / np.log(2), rtol=1e-4)


@pytest.mark.parametrize("gated", [True, False])
def test_each_coarse_code_affects_the_logits_at_its_place(gated):
    prior = small_prior(gated, (8, 8), coarse_grid_size=(4, 4))
    inputs = random_inputs(prior, 1)
    before = ops.convert_to_numpy(prior(inputs))
    for row, column in ((0, 0), (1, 2), (3, 3)):
        changed = inputs["coarse"].copy()
        changed[0, row, column] = (changed[0, row, column] + 1) % 8
        after = ops.convert_to_numpy(prior({**inputs, "coarse": changed}))
        assert not np.allclose(before[0, 2 * row, 2 * column], after[0, 2 * row, 2 * column])


def test_mixed_precision_does_not_round_coarse_codes():
    """In bfloat16, 510 and 511 are both 512, which is no code of a codebook of 512."""
    with dtype_policy("mixed_bfloat16"):
        prior = model.PixelCNN(512, (4, 4), filters=8, num_blocks=2, coarse_grid_size=(2, 2))
    coarse = np.repeat(np.array([510, 511], np.int32), 4).reshape(2, 2, 2)
    inputs = {"codes": np.zeros((2, 4, 4), np.int32), "positions": np.zeros(2, np.int32), "coarse": coarse}
    first, second = ops.convert_to_numpy(prior(inputs))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("gated", [True, False])
def test_bottom_prior_uses_the_top_codes(gated):
    """The cross-entropy rises clearly if each slice is combined with the top codes of another one."""
    coarse = RNG.integers(0, 8, (64, 3, 3)).astype(np.int32)
    codes = (coarse.repeat(2, axis=1).repeat(2, axis=2) + RNG.integers(0, 2, (64, 6, 6)).astype(np.int32)) % 8
    prior = model.PixelCNN(8, (6, 6), 16, num_blocks=2, dropout=0.0, gated=gated, coarse_grid_size=(3, 3))
    prior.compile(keras.optimizers.Adam(1e-2))
    inputs = {"codes": codes, "positions": np.zeros(64, np.int32), "coarse": coarse}
    prior.fit(inputs, codes, epochs=30, verbose=0)
    of_others = {**inputs, "coarse": np.roll(coarse, 1, axis=0)}
    own, others = (prior.evaluate(x, codes, verbose=0, return_dict=True)["loss"] for x in (inputs, of_others))
    assert own < 1.3 * np.log(2)  # given its top code, a code has two equally likely values
    assert others > own + 0.5
