"""How fast the training steps are, how much of the machine they use, and how soon the VQ-VAE is any good.

    python benchmarks/training.py [--data-dir FOLDER] [--seconds 60]

Prints images a second of one training step (forward, backward, optimiser) of the VQ-VAE, the prior and the
student model, and the share of the convolution peak that their arithmetic reaches: the floating-point
operations of the convolutions and matrix products in the step's own graph, forward and backward, over its time.
The peak is the best that the machine does, in the same run, in a forward and backward pass of a 3 × 3 convolution
of 64, 128 or 256 channels. Then both autoencoders train from scratch until SSIM on validation passes 0.75;
building the graph and measuring SSIM do not count.

The student model is the common one: three 3 × 3 convolutions of stride 2 with 32, 64 and 128 channels, a codebook
of 128 codes of 16 dimensions trained by gradients, the mirrored decoder, MSE over the variance, batch 128, slices
scaled to −0.5 … 0.5.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import numpy as np
import tensorflow as tf
import tyro
from keras import layers, ops

import dataset
import driver
import model

TARGET = 0.75  # SSIM on validation


@dataclass(frozen=True)
class Options:
    data_dir: Path | None = None  # folder of OASIS PNG slices; None makes synthetic ones
    steps: int = 10  # timed for each model; the median counts
    seconds: float = 900.0  # at most, until SSIM 0.75


class Student(keras.Model):
    """The common student VQ-VAE."""

    def __init__(self, data_variance: float):
        super().__init__()
        self.data_variance = data_variance
        down = [layers.Conv2D(n, 3, strides=2, padding="same", activation="relu") for n in (32, 64, 128)]
        up = [layers.Conv2DTranspose(n, 3, strides=2, padding="same", activation="relu") for n in (128, 64, 32)]
        self.encoder = keras.Sequential([*down, layers.Conv2D(16, 1, padding="same")])
        self.quantizer = model.VectorQuantizer(128, 16, codebook="gradient", restart_below=0.0)
        self.decoder = keras.Sequential([*up, layers.Conv2DTranspose(1, 3, padding="same")])

    def build(self, input_shape):
        self.encoder.build(input_shape)
        self.quantizer.build((None, None, None, 16))
        self.quantizer.embeddings.assign(keras.random.uniform((128, 16), -0.05, 0.05, seed=0))
        self.decoder.build((None, *self.encoder.output_shape[1:]))

    def call(self, images, training=False):
        # that work scales slices to −0.5 … 0.5
        return self.decoder(self.quantizer(self.encoder(images - 0.5), training=training)[0]) + 0.5

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(ops.square(x - y_pred)) / self.data_variance + sum(self.losses)


def convolution_peak() -> float:
    """Floating-point operations a second, the best of three sizes, forward and backward."""
    best = 0.0
    for size, channels in ((48, 64), (24, 128), (12, 256)):
        images = tf.random.normal((32, size, size, channels))
        kernel = tf.random.normal((3, 3, channels, channels))

        @tf.function(autograph=False)
        def step(images, kernel):
            with tf.GradientTape() as tape:
                tape.watch((images, kernel))
                output = tf.nn.conv2d(images, kernel, 1, "SAME")
            gradients = tape.gradient(output, (images, kernel), output)
            return [tf.reduce_max(gradient) for gradient in gradients]

        work = 3 * 2 * 32 * size**2 * 9 * channels**2
        seconds = min(timed(lambda f=step, a=images, b=kernel: [g.numpy() for g in f(a, b)], 6))
        best = max(best, work / seconds)
    return best


def timed(run, times: int) -> list[float]:
    """Seconds of each of some runs, after one that does not count."""
    run()
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return seconds


def step_operations(network: keras.Model, x, y) -> int:
    """Floating-point operations of all convolutions and matrix products in the graph of a training step."""

    @tf.function(autograph=False)
    def step():
        with tf.GradientTape() as tape:
            predicted = network(x, training=True)
            loss = network.compute_loss(x=x, y=y, y_pred=predicted)
        return tape.gradient(loss, [v.value for v in network.trainable_variables])

    total = 0
    for op in step.get_concrete_function().graph.get_operations():
        shapes = [tensor.shape.as_list() for tensor in op.inputs]
        out = op.outputs[0].shape.as_list() if op.outputs else []
        if op.type == "Conv2D":
            total += 2 * math.prod(out) * math.prod(shapes[1][:-1])
        elif op.type == "Conv2DBackpropInput":  # inputs: sizes, kernel, gradient
            total += 2 * math.prod(shapes[2]) * math.prod(shapes[1][:-1])
        elif op.type == "Conv2DBackpropFilter":  # inputs: images, sizes, gradient; the output is the kernel's
            total += 2 * math.prod(shapes[2]) * math.prod(out[:-1])
        elif op.type in ("MatMul", "BatchMatMulV2"):
            inner = shapes[0][-2 if op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x") else -1]
            total += 2 * math.prod(out) * inner
    return total


def speed(network: keras.Model, x, y, steps: int) -> tuple[float, float]:
    """Images a second and operations a second of a training step."""
    x, y = (tf.nest.map_structure(tf.constant, value) for value in (x, y))
    seconds = float(np.median(timed(lambda: network.train_on_batch(x, y), steps)))
    batch_size = len(tf.nest.flatten(x)[0])
    return batch_size / seconds, step_operations(network, x, y) / seconds


def validation_ssim(network: keras.Model, images: np.ndarray) -> float:
    values = []
    for start in range(0, len(images), 90):
        batch = dataset.to_float(images[start : start + 90])
        values.append(ops.convert_to_numpy(model.ssim(batch, ops.clip(network(batch, training=False), 0, 1))))
    return float(np.concatenate(values).mean())


def seconds_to_target(network: keras.Model, slices: dict, batch_size: int, limit: float, check_every: float) -> float:
    """Seconds of training until SSIM on validation passes the target; NaN if it does not within the limit."""
    spent = checked = 0.0
    for step, (images, positions) in enumerate(dataset.image_batches(slices["train"], batch_size, seed=0)):
        begun = time.perf_counter()
        network.train_on_batch(images, positions)
        if step > 0:  # the first step builds the graph
            spent += time.perf_counter() - begun
        if spent - checked >= check_every:
            checked = spent
            if validation_ssim(network, slices["validate"].images) >= TARGET:
                return spent
        if spent >= limit:
            break
    return math.nan


def make_networks(config: driver.Config, slices: dict) -> dict[str, tuple[keras.Model, int]]:
    """The models with their batch sizes, compiled as they are trained."""
    keras.utils.set_random_seed(config.seed)
    student = Student(driver.data_variance(slices["train"]))
    student.build((None, config.image_size, config.image_size, 1))
    student.compile(keras.optimizers.Adam())
    vqvae = driver.make_vqvae(config, slices["train"])
    steps = dataset.steps_per_epoch(len(slices["train"]), config.batch_size)
    vqvae.compile(driver.make_optimizer(config.vqvae_learning_rate, config.vqvae_epochs, steps))
    prior = driver.make_prior(config)
    prior.compile(driver.make_optimizer(config.prior_learning_rate, config.prior_epochs, steps))
    return {"vqvae": (vqvae, config.batch_size), "prior": (prior, config.batch_size), "student": (student, 128)}


def main(options: Options) -> None:
    config = driver.Config(data_dir=options.data_dir)
    slices = dataset.load(config.data_dir, config.image_size, config.seed)
    summary = {"convolution_peak_gflops": convolution_peak() / 1e9}
    print(f"{os.cpu_count()} cores; convolution peak {summary['convolution_peak_gflops']:.0f} GFLOP/s")

    print(f"{'training step':14} {'images/s':>9} {'GFLOP/s':>9} {'of the peak':>12}")
    for name, (network, batch_size) in make_networks(config, slices).items():
        x, y = next(iter(dataset.image_batches(slices["train"], batch_size, seed=0)))
        if name == "prior":
            grid = network.grid_size
            codes = np.random.default_rng(0).integers(0, config.num_embeddings, (batch_size, *grid)).astype(np.int32)
            x, y = (codes, y), codes
        images, operations = speed(network, x, y, options.steps)
        share = operations / summary["convolution_peak_gflops"] / 1e9
        print(f"{name:14} {images:9.1f} {operations / 1e9:9.0f} {share:12.0%}")
        summary[name] = {"images_per_second": images, "share_of_peak": share}

    print(f"\nseconds of training until SSIM {TARGET} on {len(slices['validate'])} validation slices")
    networks = make_networks(config, slices)
    for name, check_every in (("vqvae", 1.0), ("student", 5.0)):
        network, batch_size = networks[name]
        seconds = seconds_to_target(network, slices, batch_size, options.seconds, check_every)
        print(f"{name:14} {seconds:9.0f}")
        summary[name]["seconds_to_ssim"] = seconds
    ratio = summary["student"]["seconds_to_ssim"] / summary["vqvae"]["seconds_to_ssim"]
    print(f"the student model takes {ratio:.1f} times as long")
    print(json.dumps({**summary, "sooner_by": ratio}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
