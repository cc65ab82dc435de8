import numpy as np
import pytest
from keras import ops

import masked
from tests.randomness import RNG

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


def random_stacks(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """A vertical and a horizontal stack of features."""
    vertical, horizontal = RNG.normal(size=(2, *shape)).astype(np.float32)
    return vertical, horizontal


def random_attention(filters: int = 8, **settings) -> masked.CausalAttention:
    """A layer with random values also in the weights that are initialised with zeros."""
    layer = masked.CausalAttention(filters, **settings)
    layer(random_stacks(1, 2, 2, filters), None)
    for weight in layer.trainable_variables:
        weight.assign(RNG.normal(0, 0.5, weight.shape))
    return layer


def attended(layer: masked.CausalAttention, stacks: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """What attention adds to both stacks."""
    added = [ops.convert_to_numpy(after) - before for before, after in zip(stacks, layer(stacks, None), strict=True)]
    np.testing.assert_allclose(added[0], added[1], atol=1e-5)
    return added[0]


def test_new_attention_is_the_identity():
    stacks = random_stacks(2, 3, 5, 8)
    for before, after in zip(stacks, masked.CausalAttention(8)(stacks, None), strict=True):
        np.testing.assert_array_equal(before, after)


def test_attention_reads_all_rows_above_and_nothing_else_of_the_horizontal_stack():
    layer, (vertical, horizontal) = random_attention(), random_stacks(1, 3, 4, 8)
    before = attended(layer, (vertical, horizontal))
    for cell in range(12):
        perturbed = horizontal.copy()
        perturbed.reshape(12, 8)[cell] = RNG.normal(size=8)
        changed = np.any(np.abs(attended(layer, (vertical, perturbed)) - before) > 1e-4, axis=-1)[0]  # (3, 4)
        row = cell // 4
        assert not changed[: row + 1].any(), f"cell {cell} changed its own row or one above"
        assert changed[row + 1 :].all(), f"cell {cell} does not reach all rows below"


def test_attention_is_a_weighted_mean_of_values_per_head():
    layer, (vertical, horizontal) = random_attention(num_heads=2), random_stacks(1, 3, 2, 8)
    queries = ops.convert_to_numpy(layer.query(layer.query_norm(vertical))).reshape(6, 8).astype(np.float64)
    features = layer.key_norm(horizontal)
    keys, values = (ops.convert_to_numpy(part(features)).reshape(6, 8) for part in (layer.key, layer.value))
    expected = np.zeros((6, 8))
    for head in (slice(0, 4), slice(4, 8)):
        for cell in range(2, 6):
            above = cell // 2 * 2  # number of cells in the rows above
            scores = keys[:above, head] @ queries[cell, head] / 2
            weights = np.exp(scores - scores.max())
            expected[cell, head] = weights @ values[:above, head] / weights.sum()
    kernel, bias = (ops.convert_to_numpy(weight) for weight in (layer.out.kernel, layer.out.bias))
    found = attended(layer, (vertical, horizontal)).reshape(6, 8)
    np.testing.assert_allclose(found, expected @ kernel + bias, rtol=1e-4, atol=1e-5)


def test_dropout_of_attention_is_active_in_training_only():
    layer, stacks = random_attention(dropout=0.5), random_stacks(1, 4, 4, 8)
    np.testing.assert_array_equal(layer(stacks, None, training=False)[0], layer(stacks, None)[0])
    dropped = ops.convert_to_numpy(layer(stacks, None, training=True)[0])
    assert 0.3 < np.mean(dropped == stacks[0]) < 0.7


@pytest.mark.parametrize("filters", [6, 9, 50])
def test_attention_works_with_any_number_of_filters(filters):
    assert attended(random_attention(filters), random_stacks(1, 2, 3, filters)).shape == (1, 2, 3, filters)


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
