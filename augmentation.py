"""Random changes of the slices that the VQ-VAE trains on: draw their parameters, and apply them."""

import numpy as np
import tensorflow as tf

import seeds


def draw(count: int | tf.Tensor, seed: int | None, step: int | tf.Tensor) -> dict[str, tf.Tensor]:
    """Draw the parameters of random augmentations. Every image is flipped or not; half of them are rotated and scaled.

    With only about a hundred subjects to train on, the VQ-VAE overfits without augmentation. Rotation and scaling
    interpolate, so half of the images keep their sharpness. Images are not shifted, because the slices of OASIS are
    registered and codes would be spent on the position of the brain.

    Args:
        count: Number of images.
        seed, step: They determine the parameters.

    Returns:
        (count,) float32 for each parameter:

        - flip: 1, or −1 to exchange left and right.
        - angle: Rotation in radians, at most 5° in either direction.
        - scale_x, scale_y: Factors by which distances in the image are shrunk, from 0.95 to 1.05.
        - gain: Factor of the intensity, from 0.9 to 1.1.
    """
    key = tf.stack([seeds.number(seed or 0, "augmentation"), tf.cast(step, tf.int32)])
    side, warp, angle, scale_x, scale_y, gain = tf.unstack(tf.random.stateless_uniform((6, count), key, -1, 1))
    warp = tf.where(warp < 0, 0.0, 1.0)
    return {
        "flip": tf.where(side < 0, -1.0, 1.0),
        "angle": warp * angle * (5 * np.pi / 180),
        "scale_x": 1 + warp * scale_x * 0.05,
        "scale_y": 1 + warp * scale_y * 0.05,
        "gain": 1 + 0.1 * gain,
    }


def apply(images: tf.Tensor, parameters: dict[str, tf.Tensor]) -> tf.Tensor:
    """Flip, rotate and scale images about their centre, and change their intensity.

    Args:
        images: (B, H, W, 1) float32 in [0, 1], square.
        parameters: (B,) float32 for each parameter of `draw`.

    Returns:
        (B, H, W, 1) float32 in [0, 1], interpolated bilinearly. Pixels from outside the image are black.
    """
    size, flip, angle = images.shape[1], parameters["flip"], parameters["angle"]
    # The output pixel (x, y) is the input at (a0 x + a1 y + a2, b0 x + b1 y + b2), which keeps the centre in place.
    a0, a1 = flip * tf.cos(angle) * parameters["scale_x"], -tf.sin(angle) * parameters["scale_y"]
    b0, b1 = flip * tf.sin(angle) * parameters["scale_x"], tf.cos(angle) * parameters["scale_y"]
    centre = (size - 1) / 2
    a2, b2 = centre * (1 - a0 - a1), centre * (1 - b0 - b1)
    zeros = tf.zeros_like(a0)
    warped = tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.stack([a0, a1, a2, b0, b1, b2, zeros, zeros], axis=1),
        output_shape=[size, size],
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
        fill_value=0.0,
    )
    return tf.ensure_shape(tf.clip_by_value(warped * parameters["gain"][:, None, None, None], 0, 1), images.shape)
