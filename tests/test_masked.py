import keras
import numpy as np
import pytest
from keras import ops

import masked

RNG = np.random.default_rng(0)


# ----------------------------------------------------------------------------------------- convolutions


def test_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel_size is 4: must be odd"):
        masked.MaskedConv2D(8, 4, "A")


def test_unknown_mask_is_refused():
    with pytest.raises(ValueError, match="mask is 'C'"):
        masked.MaskedConv2D(8, 3, "C")


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
def test_masked_convolution_reads_the_taps_of_its_mask(mask, offsets, dilation):
    layer = masked.MaskedConv2D(1, 3, mask, dilation)
    layer.build((None, 9, 9, 1))
    layer.kernel.assign(RNG.random(layer.kernel.shape) + 1)
    impulse = np.zeros((1, 9, 9, 1), np.float32)
    impulse[0, 4, 4, 0] = 1
    rows, columns = np.nonzero(ops.convert_to_numpy(layer(impulse))[0, :, :, 0])
    # a cell reads the impulse through the tap (4 − row, 4 − column)
    assert set(zip((4 - rows).tolist(), (4 - columns).tolist(), strict=True)) == {
        (dilation * row, dilation * column) for row, column in offsets
    }


# -------------------------------------------------------------------------------------------- attention


def random_attention(filters: int = 8, **settings) -> masked.CausalAttention:
    """A layer with random values also in the weights that are initialised with zeros."""
    layer = masked.CausalAttention(filters, **settings)
    layer((np.zeros((1, 2, 2, filters), np.float32),), None)
    for weight in layer.trainable_variables:
        weight.assign(RNG.normal(0, 0.5, weight.shape))
    return layer


def attended(layer: masked.CausalAttention, features: np.ndarray) -> np.ndarray:
    return ops.convert_to_numpy(layer((features,), None)[0])


def test_new_attention_is_the_identity():
    stacks = tuple(RNG.normal(size=(2, 3, 5, 8)).astype(np.float32) for _ in range(2))
    for before, after in zip(stacks, masked.CausalAttention(8)(stacks, None), strict=True):
        np.testing.assert_array_equal(before, after)


def test_attention_leaves_the_vertical_stack_alone():
    vertical, horizontal = (RNG.normal(size=(2, 3, 5, 8)).astype(np.float32) for _ in range(2))
    layer = random_attention()
    stacks = layer((vertical, horizontal), None)
    np.testing.assert_array_equal(stacks[0], vertical)
    np.testing.assert_array_equal(stacks[1], attended(layer, horizontal))


def test_attention_reads_the_cell_itself_and_all_earlier_ones():
    layer, features = random_attention(), RNG.normal(size=(1, 3, 4, 8)).astype(np.float32)
    before = attended(layer, features)
    for i in range(12):
        perturbed = features.copy()
        perturbed.reshape(12, 8)[i] = RNG.normal(size=8)
        changed = np.any(attended(layer, perturbed) != before, axis=-1).reshape(-1)
        assert not changed[:i].any(), f"features before cell {i} changed"
        assert changed[i:].all(), f"not all features from cell {i} on depend on it"


def test_attention_is_a_weighted_mean_of_values_per_head():
    layer, features = random_attention(num_heads=2), RNG.normal(size=(1, 2, 3, 8)).astype(np.float32)
    flat = ops.convert_to_numpy(layer.norm(features)).reshape(6, 8).astype(np.float64)
    query, key, value = (flat @ ops.convert_to_numpy(part.kernel) for part in (layer.query, layer.key, layer.value))
    expected = np.zeros((6, 8))
    for head in (slice(0, 4), slice(4, 8)):
        for cell in range(6):
            scores = key[: cell + 1, head] @ query[cell, head] / 2
            weights = np.exp(scores - scores.max())
            expected[cell, head] = weights @ value[: cell + 1, head] / weights.sum()
    kernel, bias = (ops.convert_to_numpy(weight) for weight in (layer.out.kernel, layer.out.bias))
    added = (attended(layer, features) - features).reshape(6, 8)
    np.testing.assert_allclose(added, expected @ kernel + bias, rtol=1e-4, atol=1e-5)


def test_dropout_of_attention_is_active_in_training_only():
    layer, features = random_attention(dropout=0.5), (RNG.normal(size=(1, 4, 4, 8)).astype(np.float32),)
    plain = attended(layer, features[0])
    np.testing.assert_array_equal(layer(features, None, training=False)[0], plain)
    dropped = ops.convert_to_numpy(layer(features, None, training=True)[0])
    assert 0.3 < np.mean(dropped == features[0]) < 0.7


@pytest.mark.parametrize("filters", [6, 9, 50])
def test_attention_works_with_any_number_of_filters(filters):
    features = RNG.normal(size=(1, 2, 3, filters)).astype(np.float32)
    assert attended(random_attention(filters), features).shape == (1, 2, 3, filters)


def test_attention_weights_are_exact_under_mixed_precision():
    """Attention to a thousand equal cells is their mean; bfloat16 would round the weights."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        layer = random_attention()
        weights = layer._weights(ops.zeros((1, 1, 1000), "bfloat16"), np.ones((1, 1000), bool))
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(weights, 0.001, rtol=1e-5)


# ----------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    "layer",
    [
        masked.MaskedConv2D(8, 3, "B", dilation=2),
        masked.Stem(8, 7, (4, 6), gated=False),
        masked.GatedBlock(8, 3, dropout=0.1, last=True),
        masked.PlainBlock(8, 5),
        masked.CausalAttention(8, num_heads=2, dropout=0.1),
    ],
)
def test_layers_can_be_made_again_from_their_configuration(layer):
    config = layer.get_config()
    assert type(layer).from_config(config).get_config() == config


def test_write_replaces_one_item():
    array = RNG.normal(size=(4, 2, 3)).astype(np.float32)
    expected = array.copy()
    expected[2] = 1
    np.testing.assert_array_equal(masked.write(array, np.int32(2), np.ones((2, 3), np.float32)), expected)
