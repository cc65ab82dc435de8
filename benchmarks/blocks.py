"""Residual blocks compared by what they learn in a given time: group norm, standardised weights, or neither.

    python -m benchmarks.blocks [--data-dir FOLDER] [--seconds 60]

Trains the VQ-VAE of driver.py with each kind of block for the same time and from the same seed. Prints the images per
second, the fraction of the machine's convolution peak, and the SSIM on the validation split (TensorFlow only).
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import keras
from keras import ops

import dataset
import driver
import model
import stages
from benchmarks import common
from layers import ResidualBlock, Shape, Tensor
from training import make_optimizer


@dataclass(frozen=True)
class Options:
    """What to train on, and for how long."""

    data_dir: Path | None = None  # folder of OASIS PNG slices; None generates synthetic ones
    seconds: float = 60.0  # of training per block
    steps: int = 10  # timed per block; the median counts


class StandardizedConv2D(keras.layers.Layer):
    """3 × 3 convolution whose kernel has mean 0 and gain 1 for each filter, times a learned gain.

    Weight standardisation (Qiao et al. 2019), scaled as in Brock et al. 2021, equation 1.
    """

    def __init__(self, filters: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters

    def build(self, input_shape: Shape) -> None:
        self.kernel = self.add_weight(shape=(3, 3, input_shape[-1], self.filters), initializer="he_normal")
        self.gain = self.add_weight(shape=(self.filters,), initializer="ones")
        self.bias = self.add_weight(shape=(self.filters,), initializer="zeros")

    def call(self, inputs: Tensor) -> Tensor:
        fan_in = math.prod(self.kernel.shape[:-1])
        mean, variance = ops.moments(self.kernel, axes=(0, 1, 2), keepdims=True)
        kernel = (self.kernel - mean) * self.gain * ops.rsqrt(fan_in * variance + 1e-4)
        return ops.conv(inputs, kernel, padding="same") + self.bias


class StandardizedBlock(keras.layers.Layer):
    """x + a · conv(relu(conv(relu(x)))) with standardised kernels and a learned a, initially 0.

    The scalar a is that of SkipInit (De & Smith 2020).
    """

    def __init__(self, filters: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inner, self.outer = StandardizedConv2D(filters), StandardizedConv2D(filters)
        self.scale = self.add_weight(shape=(), initializer="zeros")

    def call(self, inputs: Tensor) -> Tensor:
        return inputs + self.scale * self.outer(ops.relu(self.inner(ops.relu(inputs))))


class BareBlock(keras.layers.Layer):
    """x + conv(relu(conv(relu(x)))), with the second convolution initially 0 as in Fixup (Zhang et al. 2019)."""

    def __init__(self, filters: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inner = keras.layers.Conv2D(filters, 3, padding="same", kernel_initializer="he_normal")
        self.outer = keras.layers.Conv2D(filters, 3, padding="same", kernel_initializer="zeros")

    def call(self, inputs: Tensor) -> Tensor:
        return inputs + self.outer(ops.relu(self.inner(ops.relu(inputs))))


BLOCKS = {"group norm": ResidualBlock, "standardised weights": StandardizedBlock, "neither": BareBlock}


def make_network(block: type, config: driver.Config, slices: dict[str, dataset.Slices]) -> model.VQVAE:
    """Return the VQ-VAE of driver.py, compiled, with another kind of residual block."""
    with mock.patch.object(model, "ResidualBlock", block):
        network = stages.make_vqvae(config, dataset.pixel_variance(slices["train"]))
    steps = dataset.steps_per_epoch(len(slices["train"]), config.batch_size)
    network.compile(make_optimizer(config.vqvae_learning_rate, config.vqvae_epochs, steps))
    return network


def train(network: model.VQVAE, slices: dict[str, dataset.Slices], batch_size: int, limit: float) -> float:
    """Train for some seconds, without the first step, which builds the graph; returns the SSIM on validation."""
    spent = 0.0
    for step, (images, positions) in enumerate(dataset.image_batches(slices["train"], batch_size, seed=0)):
        start = time.perf_counter()
        network.train_on_batch(images, positions)
        spent += (time.perf_counter() - start) if step else 0
        if spent >= limit:
            break
    return common.validation_ssim(network, slices["validate"].images)


def main(options: Options) -> dict[str, Any]:
    """Measure every kind of block and return the numbers by its name."""
    config = driver.Config(data_dir=options.data_dir)
    slices = driver.load_slices(config)
    x, y = next(iter(dataset.image_batches(slices["train"], config.batch_size, seed=0)))
    numbers: dict[str, Any] = common.report_machine()
    print(f"{'block':22} {'images/s':>9} {'of the peak':>12} {f'SSIM after {options.seconds:.0f} s':>18}")
    for name, block in BLOCKS.items():
        images, operations = common.training_speed(make_network(block, config, slices), x, y, options.steps)
        ssim = train(make_network(block, config, slices), slices, config.batch_size, options.seconds)
        fraction = operations / numbers["convolution_peak_gflops"] / 1e9
        print(f"{name:22} {images:9.1f} {fraction:12.0%} {ssim:18.3f}", flush=True)
        numbers[name] = {"images_per_second": images, "share_of_peak": fraction, "ssim": ssim}
    return numbers


if __name__ == "__main__":
    common.run_benchmark(main, Options, __doc__)
