"""Which residual block trains best for its time: group norm, standardised weights, or neither.

    python benchmarks/blocks.py [--data-dir FOLDER] [--seconds 60]

Trains the driver's VQ-VAE with each block for the same time, from the same seed, and prints images a second, the
share of the convolution peak, and SSIM on validation.
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import training
import tyro
from keras import layers, ops

import dataset
import driver
import model


@dataclass(frozen=True)
class Options:
    data_dir: Path | None = None  # folder of OASIS PNG slices; None makes synthetic ones
    seconds: float = 60.0  # of training for each block
    steps: int = 10  # timed for each block; the median counts


class StandardizedConv2D(layers.Layer):
    """A 3 × 3 convolution whose kernel has zero mean and unit gain for each filter, times a learned gain
    (Qiao et al. 2019, "Weight Standardization"; the scale is that of Brock et al. 2021, equation 1)."""

    def __init__(self, filters: int, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(3, 3, input_shape[-1], self.filters), initializer="he_normal")
        self.gain = self.add_weight(shape=(self.filters,), initializer="ones")
        self.bias = self.add_weight(shape=(self.filters,), initializer="zeros")

    def call(self, inputs):
        fan_in = math.prod(self.kernel.shape[:-1])
        mean, variance = ops.moments(self.kernel, axes=(0, 1, 2), keepdims=True)
        kernel = (self.kernel - mean) * self.gain * ops.rsqrt(fan_in * variance + 1e-4)
        return ops.conv(inputs, kernel, padding="same") + self.bias


class StandardizedBlock(layers.Layer):
    """x + a · conv(relu(conv(relu(x)))), kernels standardised, a from zero (De & Smith 2020, SkipInit)."""

    def __init__(self, filters: int, **kwargs):
        super().__init__(**kwargs)
        self.inner, self.outer = StandardizedConv2D(filters), StandardizedConv2D(filters)
        self.scale = self.add_weight(shape=(), initializer="zeros")

    def call(self, inputs):
        return inputs + self.scale * self.outer(ops.relu(self.inner(ops.relu(inputs))))


class BareBlock(layers.Layer):
    """x + conv(relu(conv(relu(x)))), the second convolution starting at zero (Zhang et al. 2019, Fixup)."""

    def __init__(self, filters: int, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Conv2D(filters, 3, padding="same", kernel_initializer="he_normal")
        self.outer = layers.Conv2D(filters, 3, padding="same", kernel_initializer="zeros")

    def call(self, inputs):
        return inputs + self.outer(ops.relu(self.inner(ops.relu(inputs))))


BLOCKS = {"group norm": model.ResidualBlock, "standardised weights": StandardizedBlock, "neither": BareBlock}


def make_network(block: type, config: driver.Config, slices: dict) -> model.VQVAE:
    """The driver's VQ-VAE, compiled, with another residual block."""
    model.ResidualBlock = block
    network = driver.make_vqvae(config, slices["train"])
    steps = dataset.steps_per_epoch(len(slices["train"]), config.batch_size)
    network.compile(driver.make_optimizer(config.vqvae_learning_rate, config.vqvae_epochs, steps))
    return network


def train(network: model.VQVAE, slices: dict, batch_size: int, limit: float) -> float:
    """Train for some seconds, not counting the first step, which builds the graph; returns validation SSIM."""
    spent = 0.0
    for step, (images, positions) in enumerate(dataset.image_batches(slices["train"], batch_size, seed=0)):
        begun = time.perf_counter()
        network.train_on_batch(images, positions)
        spent += (time.perf_counter() - begun) if step else 0
        if spent >= limit:
            break
    return training.validation_ssim(network, slices["validate"].images)


def main(options: Options) -> None:
    config = driver.Config(data_dir=options.data_dir)
    slices = dataset.load(config.data_dir, config.image_size, config.seed)
    peak = training.convolution_peak()
    x, y = next(iter(dataset.image_batches(slices["train"], config.batch_size, seed=0)))
    summary = {}
    print(f"{'block':22} {'images/s':>9} {'of the peak':>12} {f'SSIM after {options.seconds:.0f} s':>18}")
    for name, block in BLOCKS.items():
        images, operations = training.speed(make_network(block, config, slices), x, y, options.steps)
        ssim = train(make_network(block, config, slices), slices, config.batch_size, options.seconds)
        print(f"{name:22} {images:9.1f} {operations / peak:12.0%} {ssim:18.3f}")
        summary[name] = {"images_per_second": images, "share_of_peak": operations / peak, "ssim": ssim}
    print(json.dumps(summary))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
