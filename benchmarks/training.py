"""Speed of the training steps, and the time until the VQ-VAE reconstructs reasonably (TensorFlow only).

    python -m benchmarks.training [--data-dir FOLDER] [--seconds 60]

Prints the images per second of one training step (forward pass, backward pass, optimizer) of the VQ-VAE, the prior and
the student model, and the fraction of the machine's convolution peak that their arithmetic reaches: the floating-point
operations of all convolutions and matrix products in the graph of the step, divided by its time. The peak is measured
in the same run: the best speed of a 3 × 3 convolution, forward and backward, with 64, 128 or 256 channels. Then both
autoencoders are trained from scratch until the SSIM on the validation split exceeds 0.75. The time for building graphs
and for measuring SSIM does not count.

The student model is the usual one of student projects: three 3 × 3 convolutions of stride 2 with 32, 64 and 128
channels, a codebook of 128 codes of 16 dimensions trained by gradients, a mirrored decoder, MSE divided by the
variance, batches of 128, and slices scaled to −0.5 … 0.5.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

import dataset
import driver
import stages
from benchmarks import common
from layers import Shape, Tensor, VectorQuantizer
from training import make_optimizer

TARGET = 0.75  # SSIM on the validation split


@dataclass(frozen=True)
class Options:
    """What to measure, and for how long."""

    data_dir: Path | None = None  # folder of OASIS PNG slices; None generates synthetic ones
    steps: int = 10  # timed per model; the median counts
    seconds: float = 900.0  # of training per model at most, if it does not reach SSIM 0.75 before


class Student(keras.Model):
    """The usual VQ-VAE of student projects.

    Args:
        data_variance: Variance of all pixels of the training slices, with values in [0, 1].
    """

    def __init__(self, data_variance: float) -> None:
        super().__init__()
        self.data_variance = data_variance
        down = [keras.layers.Conv2D(width, 3, strides=2, padding="same", activation="relu") for width in (32, 64, 128)]
        up = [
            keras.layers.Conv2DTranspose(width, 3, strides=2, padding="same", activation="relu")
            for width in (128, 64, 32)
        ]
        self.encoder = keras.Sequential([*down, keras.layers.Conv2D(16, 1, padding="same")])
        self.quantizer = VectorQuantizer(128, 16, codebook="gradient", dead_code_threshold=0.0)
        self.decoder = keras.Sequential([*up, keras.layers.Conv2DTranspose(1, 3, padding="same")])

    def build(self, input_shape: Shape) -> None:
        self.encoder.build(input_shape)
        self.quantizer.build((None, None, None, 16))
        self.quantizer.embeddings.assign(keras.random.uniform((128, 16), -0.05, 0.05, seed=0))
        self.decoder.build((None, *self.encoder.output_shape[1:]))

    def call(self, images: Tensor, training: bool = False) -> Tensor:
        """Reconstruct images (B, H, W, 1) in [0, 1]."""
        quantized, _ = self.quantizer(self.encoder(images - 0.5), training=training)
        return self.decoder(quantized) + 0.5

    def compute_loss(
        self,
        x: Tensor = None,
        y: Tensor = None,
        y_pred: Tensor = None,
        sample_weight: Tensor = None,
        training: bool = True,
    ) -> Tensor:
        return ops.mean(ops.square(x - y_pred)) / self.data_variance + self.quantizer.loss_and_metrics()


def seconds_to_target(
    network: keras.Model, slices: dict[str, dataset.Slices], batch_size: int, limit: float, check_every: float
) -> float:
    """Train until the SSIM on the validation split exceeds the target.

    Args:
        network: A compiled autoencoder.
        slices: Slices by split.
        batch_size: Slices per step.
        limit: Seconds of training at most.
        check_every: Seconds of training between measurements of SSIM.

    Returns:
        Seconds of training; NaN if the target was not reached.
    """
    spent = checked = 0.0
    for step, (images, positions) in enumerate(dataset.image_batches(slices["train"], batch_size, seed=0)):
        start = time.perf_counter()
        network.train_on_batch(images, positions)
        if step > 0:  # The first step builds the graph.
            spent += time.perf_counter() - start
        if spent - checked >= check_every:
            checked = spent
            if common.validation_ssim(network, slices["validate"].images) >= TARGET:
                return spent
        if spent >= limit:
            break
    return math.nan


def make_networks(config: driver.Config, slices: dict[str, dataset.Slices]) -> dict[str, tuple[keras.Model, int]]:
    """Return the networks by name with their batch sizes, compiled as they are trained."""
    variance = dataset.pixel_variance(slices["train"])
    keras.utils.set_random_seed(config.seed)
    student = Student(variance)
    student.build((None, config.image_size, config.image_size, 1))
    student.compile(keras.optimizers.Adam())
    vqvae = stages.make_vqvae(config, variance)
    steps = dataset.steps_per_epoch(len(slices["train"]), config.batch_size)
    vqvae.compile(make_optimizer(config.vqvae_learning_rate, config.vqvae_epochs, steps))
    prior = stages.make_prior(config)
    prior.compile(make_optimizer(config.prior_learning_rate, config.prior_epochs, steps))
    return {"vqvae": (vqvae, config.batch_size), "prior": (prior, config.batch_size), "student": (student, 128)}


def main(options: Options) -> dict[str, Any]:
    """Measure all networks and return their numbers by name."""
    config = driver.Config(data_dir=options.data_dir)
    slices = driver.load_slices(config)
    numbers: dict[str, Any] = common.report_machine()

    print(f"{'training step':14} {'images/s':>9} {'GFLOP/s':>9} {'of the peak':>12}")
    for name, (network, batch_size) in make_networks(config, slices).items():
        x, y = next(iter(dataset.image_batches(slices["train"], batch_size, seed=0)))
        if name == "prior":
            shape = (batch_size, *network.grid_size)
            codes = np.random.default_rng(0).integers(0, config.num_embeddings, shape).astype(np.int32)
            x, y = {"codes": codes, "positions": y}, codes
        images, operations = common.training_speed(network, x, y, options.steps)
        fraction = operations / numbers["convolution_peak_gflops"] / 1e9
        print(f"{name:14} {images:9.1f} {operations / 1e9:9.0f} {fraction:12.0%}", flush=True)
        numbers[name] = {"images_per_second": images, "share_of_peak": fraction}

    print(f"\nseconds of training until SSIM {TARGET} on {len(slices['validate'])} validation slices")
    networks = make_networks(config, slices)
    for name, check_every in (("vqvae", 1.0), ("student", 5.0)):
        network, batch_size = networks[name]
        seconds = seconds_to_target(network, slices, batch_size, options.seconds, check_every)
        print(f"{name:14} {f'over {options.seconds:.0f}' if math.isnan(seconds) else f'{seconds:.0f}':>9}", flush=True)
        numbers[name]["seconds_to_ssim"] = seconds
    ratio = numbers["student"]["seconds_to_ssim"] / numbers["vqvae"]["seconds_to_ssim"]
    if not math.isnan(ratio):
        print(f"the student model takes {ratio:.1f} times as long")
    return {**numbers, "sooner_by": ratio}


if __name__ == "__main__":
    common.run_benchmark(main, Options, __doc__)
