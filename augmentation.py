"""Random changes of the slices that the networks are trained on: draw their parameters, and apply them."""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

import seeds

MAX_ANGLE = 5 * np.pi / 180  # Radians.
MAX_SCALE = 0.05  # Relative change of distances.
MAX_BEND = 0.01  # Amplitude of each wave of the smooth deformation, relative to the side of the image.
MAX_GAIN = 0.1  # Relative change of the intensity.
NUM_WAVES = 2  # Waves per axis of the smooth deformation. The priors of finished runs fit this number only.
NUM_PARAMETERS = 5 + 2 * NUM_WAVES**2  # Numbers that describe the augmentation of one image.


def draw(count: int | tf.Tensor, seed: int, step: int | tf.Tensor) -> dict[str, tf.Tensor]:
    """Draw the parameters of random augmentations. Every image is flipped or not; half of them are warped.

    With only about a hundred subjects to train on, the networks overfit without augmentation. Warping interpolates, so
    half of the images keep their sharpness. Images are not shifted, because the slices of OASIS are registered and
    codes would be spent on the position of the brain.

    Args:
        count: Number of images.
        seed, step: They determine the parameters.

    Returns:
        float32 for each parameter, (count,) unless noted:

        - flip: 1, or −1 to exchange left and right.
        - angle: Rotation in radians, at most `MAX_ANGLE` in either direction.
        - scale_x, scale_y: Factors by which distances in the image are shrunk, 1 ± `MAX_SCALE`.
        - bend_x, bend_y: (count, NUM_WAVES²), amplitudes of the waves of a smooth deformation; see `apply`.
        - gain: Factor of the intensity, 1 ± `MAX_GAIN`.
    """
    key = tf.stack([seeds.number(seed, "augmentation"), tf.cast(step, tf.int32)])
    numbers = tf.random.stateless_uniform((NUM_PARAMETERS + 1, count), key, -1, 1)
    side, warp, angle, scale_x, scale_y, gain = tf.unstack(numbers[:6])
    bend_x, bend_y = tf.split(tf.transpose(numbers[6:]), 2, axis=1)
    warp = tf.where(warp < 0, 0.0, 1.0)
    return {
        "flip": tf.where(side < 0, -1.0, 1.0),
        "angle": warp * angle * MAX_ANGLE,
        "scale_x": 1 + warp * scale_x * MAX_SCALE,
        "scale_y": 1 + warp * scale_y * MAX_SCALE,
        "bend_x": warp[:, None] * bend_x * MAX_BEND,
        "bend_y": warp[:, None] * bend_y * MAX_BEND,
        "gain": 1 + MAX_GAIN * gain,
    }


def as_condition(parameters: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """Return the parameters (B,) of `draw` as vectors (B, NUM_PARAMETERS) float32 for a network.

    Each number is in [−1, 1]. All are zero for an image that is not augmented.
    """
    numbers = [
        (1 - parameters["flip"]) / 2,
        parameters["angle"] / MAX_ANGLE,
        (parameters["scale_x"] - 1) / MAX_SCALE,
        (parameters["scale_y"] - 1) / MAX_SCALE,
        (parameters["gain"] - 1) / MAX_GAIN,
    ]
    return tf.concat([tf.stack(numbers, axis=1), parameters["bend_x"] / MAX_BEND, parameters["bend_y"] / MAX_BEND], 1)


def apply(images: tf.Tensor, parameters: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """Flip, rotate, scale and bend images, and change their intensity.

    The output at a point p, relative to the centre, is the input at the point R p + d(p). R flips, rotates and scales.
    The displacement d is smooth and vanishes at the border of an image: a sum of products of half waves, sin(m π x)
    sin(n π y) for m, n = 1 … `NUM_WAVES` with x and y from 0 to 1, each with an amplitude of its own.

    Args:
        images: (B, H, W, 1) float32 in [0, 1], square.
        parameters: See `draw`; tensors or arrays.

    Returns:
        (B, H, W, 1) float32 in [0, 1], interpolated bilinearly. Pixels from outside the image are black.
    """
    size, centre = images.shape[1], (images.shape[1] - 1) / 2
    y, x = tf.meshgrid(*2 * [tf.range(size, dtype=tf.float32) - centre], indexing="ij")  # (H, W)
    flip, angle, scale_x, scale_y, gain = (
        parameters[name][:, None, None] for name in ("flip", "angle", "scale_x", "scale_y", "gain")
    )
    waves = np.sin(np.pi * np.arange(1, NUM_WAVES + 1)[:, None] * (np.arange(size) + 0.5) / size)
    products = np.einsum("my,nx->mnyx", waves, waves).reshape(NUM_WAVES**2, size * size).astype(np.float32) * size

    def displacement(amplitudes: tf.Tensor) -> tf.Tensor:
        return tf.reshape(amplitudes @ products, (-1, size, size))

    x_in = flip * tf.cos(angle) * scale_x * x - tf.sin(angle) * scale_y * y + displacement(parameters["bend_x"])
    y_in = flip * tf.sin(angle) * scale_x * x + tf.cos(angle) * scale_y * y + displacement(parameters["bend_y"])
    return tf.clip_by_value(_interpolate(images, x_in + centre, y_in + centre) * gain[..., None], 0, 1)


def _interpolate(images: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """Return images (B, H, W, 1) at the points x, y (B, H, W) in pixels, bilinearly, with black around them."""
    size = images.shape[1]
    padded = tf.pad(images[..., 0], [(0, 0), (1, 1), (1, 1)])
    # Points beyond the black border are moved onto it.
    x, y = (tf.clip_by_value(coordinate + 1, 0.0, size + 0.999) for coordinate in (x, y))
    left, top = tf.floor(x), tf.floor(y)
    right_weight, bottom_weight = x - left, y - top
    first = tf.cast(top, tf.int32) * (size + 2) + tf.cast(left, tf.int32)  # index into the flattened padded image
    flat = tf.reshape(padded, (-1, (size + 2) ** 2))

    def pixel(offset: int) -> tf.Tensor:
        index = tf.reshape(first + offset, (-1, size * size))
        return tf.reshape(tf.gather(flat, index, batch_dims=1), (-1, size, size))

    above = pixel(0) * (1 - right_weight) + pixel(1) * right_weight
    below = pixel(size + 2) * (1 - right_weight) + pixel(size + 3) * right_weight
    return (above * (1 - bottom_weight) + below * bottom_weight)[..., None]
