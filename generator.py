"""The trained stages as one object, and what a run makes with them.

from generator import Generator

generator = Generator.load("runs/oasis96")
images = generator.sample([10, 12], seed=1, temperature=0.9)     # (2, 96, 96, 1) float32 in [0, 1]
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import console

console.import_tensorflow()

import keras
import numpy as np
from PIL import Image

import dataset
import model
import sampling
import training
from run import Run, RunError, read_config

Positions = Sequence[int] | np.ndarray


class Generator:
    """A trained VQ-VAE and its priors.

    Codes are lists of one array of code indices per level, (N, h, w) int32, the coarsest level first; with a single
    level the list has one item. Images are (N, H, W, 1); networks compute in batches, so N may be large.

    Args:
        vqvae: The VQ-VAE.
        priors: One prior per level, the coarsest first. Without priors, only images can be encoded and decoded.
        positions: (P,) slice positions that occur in the training data, without repetition.
        batch_size: Number of slices that pass through a network at a time.
    """

    def __init__(
        self, vqvae: model.VQVAE, priors: Sequence[model.PixelCNN], positions: Positions, batch_size: int = 16
    ) -> None:
        self.vqvae, self.priors = vqvae, list(priors)
        self.positions = np.asarray(positions, np.int32)
        self.batch_size = batch_size

    @classmethod
    def load(cls, run_dir: str | Path, batch_size: int = 16) -> "Generator":
        """Load a finished run.

        Args:
            run_dir: The run folder.
            batch_size: See the class.

        Raises:
            RunError: The folder contains no run that this version can read, its training has not finished, or a file
                is damaged.
        """
        run_dir = Path(run_dir)
        config = read_config(run_dir)
        if config is None or "slice_positions" not in config:
            raise RunError(f"{run_dir}: contains no run; give a folder that driver.py has written, as in runs/oasis96")
        vqvae = training.load_model(run_dir / "vqvae.keras", model.VQVAE)
        names = model.prior_names(len(vqvae.grids))
        priors = [training.load_model(run_dir / f"{name}.keras", model.PixelCNN) for name in names]
        return cls(vqvae, priors, config["slice_positions"], batch_size)

    @property
    def level_names(self) -> tuple[str, ...]:
        """Names of the levels, the coarsest first: ("",) for a single level, ("top", "bottom") for two."""
        return self.vqvae.level_names

    @property
    def num_embeddings(self) -> int:
        """Number of codes of each codebook, K."""
        return self.vqvae.quantizers[0].num_embeddings

    def encode(self, images: np.ndarray) -> list[np.ndarray]:
        """Encode images.

        Args:
            images: (N, H, W, 1) or (N, H, W), uint8 or floats in [0, 1], of the size that the VQ-VAE was trained on.

        Returns:
            Code indices, (N, h, w) int32 per level.

        Raises:
            ValueError: The images have another shape.
        """
        images, size = np.asarray(images), self.vqvae.image_size
        if images.ndim == 3:
            images = images[..., None]
        if images.shape[1:] != (size, size, 1):
            raise ValueError(f"images have the shape {images.shape}: must be (N, {size}, {size}, 1)")
        return self._in_batches(lambda batch: self.vqvae.encode(_to_float(batch)), [images], "slices encoded")

    def decode(self, codes: Sequence[np.ndarray]) -> np.ndarray:
        """Decode code indices, (N, h, w) per level, to images (N, H, W, 1) float32 in [0, 1]."""
        return self._in_batches(lambda *batch: [self.vqvae.decode_code(batch)], codes, "slices decoded")[0]

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Encode and decode images; see `encode` and `decode`."""
        return self.decode(self.encode(images))

    def sample_codes(
        self, positions: Positions, seed: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> list[np.ndarray]:
        """Sample code indices, each finer level given the coarser one.

        Args:
            positions: (N,) slice positions.
            seed: The same seed gives the same codes.
            temperature: Below 1 favours likely codes, above 1 varied ones.
            top_k: Sample among the k most likely codes only; 0 for all.
            top_p: Sample among the most likely codes that together have this probability; 1 for all.

        Returns:
            Code indices, (N, h, w) int32 per level.
        """
        positions = np.asarray(positions, np.int32)
        codes: list[np.ndarray] = []
        for level, prior in enumerate(self.priors):
            with console.progress(len(positions), f"{self.level_names[level]} grids sampled".strip()) as bar:
                codes.append(
                    sampling.sample_codes(
                        prior,
                        positions,
                        [seed, level] if level else seed,
                        codes[-1] if level else None,
                        temperature,
                        top_k,
                        top_p,
                        progress=bar.update,
                    )
                )
        return codes

    def sample(
        self, positions: Positions, seed: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> np.ndarray:
        """Sample images (N, H, W, 1) float32 in [0, 1], one per slice position; see `sample_codes`."""
        return self.decode(self.sample_codes(positions, seed, temperature, top_k, top_p))

    def nats_per_code(self, codes: Sequence[np.ndarray], positions: Positions) -> list[np.ndarray]:
        """Cross-entropy of codes under the priors.

        Args:
            codes: Code indices, (N, h, w) int32 per level.
            positions: (N,) slice positions.

        Returns:
            (N,) float32 per level: the mean over a slice's codes, in nats per code.
        """
        positions = np.asarray(positions, np.int32)

        def nats(level: int) -> Callable[..., list[Any]]:
            def of_batch(positions: np.ndarray, targets: np.ndarray, *coarse: np.ndarray) -> list[Any]:
                logits = self.priors[level]((targets, positions, *coarse))
                nats = keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)
                return [keras.ops.mean(nats, axis=(1, 2))]

            return of_batch

        found = []
        for level in range(len(self.priors)):
            arrays = [positions, codes[level], *([codes[level - 1]] if level else [])]
            found += self._in_batches(nats(level), arrays, "grids evaluated")
        return found

    def bits(self, images: np.ndarray, positions: Positions | None = None) -> np.ndarray:
        """Number of bits that the priors need for the codes of each image.

        Args:
            images: See `encode`.
            positions: (N,) slice positions. If None, the prior is averaged over all training positions.

        Returns:
            (N,) float64, bits per image.
        """
        codes = self.encode(images)
        sizes = [level[0].size for level in codes]

        def nats(positions: np.ndarray) -> np.ndarray:
            by_level = self.nats_per_code(codes, positions)
            return sum(size * nats.astype(np.float64) for size, nats in zip(sizes, by_level, strict=True))

        if positions is not None:
            return nats(np.asarray(positions, np.int32)) / math.log(2)
        each = np.stack([nats(np.full(len(codes[0]), position, np.int32)) for position in self.positions])
        return (math.log(len(each)) - np.logaddexp.reduce(-each, axis=0)) / math.log(2)

    def _in_batches(
        self, function: Callable[..., Sequence[Any]], arrays: Sequence[np.ndarray], unit: str
    ) -> list[np.ndarray]:
        """Apply a function to a few rows of the arrays at a time and concatenate what it returns."""
        results = []
        with console.progress(len(arrays[0]), unit) as bar:
            for start in range(0, len(arrays[0]), self.batch_size):
                outputs = function(*[array[start : start + self.batch_size] for array in arrays])
                results.append([keras.ops.convert_to_numpy(tensor) for tensor in outputs])
                bar.update(len(results[-1][0]))
        return [np.concatenate(parts) for parts in zip(*results, strict=True)]


def _to_float(images: np.ndarray) -> np.ndarray:
    return dataset.to_float(images) if images.dtype == np.uint8 else images.astype(np.float32)


@dataclass(frozen=True)
class Samples:
    """Generated slices.

    Attributes:
        images: (N, H, W, 1) float32 in [0, 1].
        codes: Code indices, (N, h, w) int32 per level.
        positions: (N,) int32 slice positions.
    """

    images: np.ndarray
    codes: list[np.ndarray]
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def save(self, folder: Path) -> None:
        """Write the code indices and one 8-bit grey PNG per sample to a new folder."""
        folder.mkdir()
        save_codes(folder, "codes", self.codes)
        for i, (image, position) in enumerate(zip(self.images, self.positions, strict=True)):
            pixels = (image[..., 0] * 255).round().astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"sample_{i:03d}_slice_{position}.png")


def save_codes(folder: Path, name: str, codes: Sequence[np.ndarray]) -> None:
    """Write code indices, (N, h, w) per level, as NAME.npy, or top_NAME.npy and bottom_NAME.npy."""
    for prefix, indices in zip(model.level_prefixes(len(codes)), codes, strict=True):
        np.save(folder / f"{prefix}{name}.npy", indices)


def load_samples(run: Run, name: str, generator: Generator, positions: np.ndarray) -> Samples:
    """Samples whose codes `save_codes` has written to samples/ of a run. Raises RunError if they are damaged."""
    grids = generator.vqvae.grids
    codes = [
        run.read_codes(f"{prefix}{name}", (len(positions), grid, grid), generator.num_embeddings)
        for prefix, grid in zip(model.level_prefixes(len(grids)), grids, strict=True)
    ]
    return Samples(generator.decode(codes), codes, positions)


@dataclass(frozen=True)
class Results:
    """Everything that a run has made: what metrics, pictures and the report read.

    Attributes:
        generator: The trained networks.
        slices: The data, by split.
        codes: Code indices of the slices, by split, (N, h, w) int32 per level.
        reconstructions: (N, H, W, 1) float32 in [0, 1], of the splits "validate" and "test".
        samples: The samples that are saved in samples/.
        test_samples: One sample per test slice, at its position; the metrics use these.
        sampling: How samples are drawn: keyword arguments of `Generator.sample` other than the positions.
        history: Rows of history.csv.
        numbers: Content of metrics.json; empty until the metrics are computed.
        note: What the data are if they are not real slices, otherwise empty.
    """

    generator: Generator
    slices: dict[str, dataset.Slices]
    codes: dict[str, list[np.ndarray]]
    reconstructions: dict[str, np.ndarray]
    samples: Samples
    test_samples: Samples
    sampling: dict[str, Any]
    history: list[dict[str, Any]]
    numbers: dict[str, Any]
    note: str = ""
