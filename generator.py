"""The trained stages as one object, and what a run makes with them.

from generator import Generator

generator = Generator.load("runs/oasis96")
images = generator.sample([10, 12], seed=1, temperature=0.9)     # (2, 96, 96, 1) float32 in [0, 1]
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import console

console.import_tensorflow()

import keras
import numpy as np
from PIL import Image

import augmentation
import cache
import dataset
import model
import sampling
import saving
import seeds
import sharp
from run import Run, RunError, read_config
from selector import Selector, choose, log_likelihood_gain

Positions = Sequence[int] | np.ndarray


class Generator:
    """A trained VQ-VAE, its priors, the selector and the sharp decoder.

    `decode` gives what is known to be right: reconstructions blur what the codes do not determine. `draw` gives what
    looks real: fine folds are plausible, not true.

    Codes are lists of one array of code indices per level, (N, h, w) int32, the coarsest level first; with a single
    level the list has one item. Images are (N, H, W, 1); networks compute in batches, so N may be large.

    Args:
        vqvae: The VQ-VAE.
        priors: One prior per level, the coarsest first. Without priors, only images can be encoded and decoded.
        positions: (P,) slice positions that occur in the training data, without repetition.
        batch_size: Number of slices that pass through a network at a time.
        crop: Side in pixels of the central square of the slices that the networks were trained on, resized; 0 for whole
            slices. Images that are encoded must be cropped alike, as by `pngs.decode`, and generated ones are.
        decoder: The sharp decoder. Without it, `draw` and `sample` use that of the VQ-VAE.
        selector: Chooses among the grids of codes that the priors propose. Without it, the first proposal is used.
        num_candidates: Number of proposals for each sample, 1 or more.
    """

    def __init__(
        self,
        vqvae: model.VQVAE,
        priors: Sequence[model.PixelCNN],
        positions: Positions,
        batch_size: int = 16,
        crop: int = 0,
        decoder: sharp.SharpDecoder | None = None,
        selector: Selector | None = None,
        num_candidates: int = 1,
    ) -> None:
        self.vqvae, self.priors = vqvae, list(priors)
        self.positions = np.asarray(positions, np.int32)
        self.batch_size, self.crop, self.decoder = batch_size, crop, decoder
        self.selector, self.num_candidates = selector, num_candidates

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
        if config is None or not {"slice_positions", "crop"} <= config.keys():
            raise RunError(f"{run_dir}: contains no run; give a folder that driver.py has written, as in runs/oasis96")
        vqvae = saving.load_model(run_dir / "vqvae.keras", model.VQVAE)
        names = model.prior_names(len(vqvae.grids))
        priors = [saving.load_model(run_dir / f"{name}.keras", model.PixelCNN) for name in names]
        constants, decoder, selector = config["constants"], None, None
        if constants.get("decoder_epochs") and constants["sharp_samples"]:
            decoder = saving.load_model(run_dir / "decoder.keras", sharp.SharpDecoder)
            decoder.copy_decoders(vqvae)  # A compact copy of a run leaves them out.
        if constants.get("selector_epochs"):
            selector = saving.load_model(run_dir / "selector.keras", Selector)
        candidates = constants.get("num_candidates", 1)
        return cls(vqvae, priors, config["slice_positions"], batch_size, config["crop"], decoder, selector, candidates)

    def replace(self, **parts: Any) -> "Generator":
        """Return a copy of which some attributes are replaced."""
        other = copy.copy(self)
        if parts.keys() & {"vqvae", "decoder"}:
            vars(other).pop("_draw", None)  # Compiled for the networks that are replaced.
        vars(other).update(parts)
        return other

    def compiled(self) -> "Generator":
        """Return a copy whose `draw` and `walk` are compiled: several times as fast for single images.

        The first call takes some seconds; with JAX, the first of each batch size. Images may differ from those of the
        original by rounding.
        """
        drawing = self.decoder or self.vqvae
        return self.replace(_draw=sampling.compile_function(self._draw, drawing.variables))

    @property
    def level_names(self) -> tuple[str, ...]:
        """Names of the levels, the coarsest first: ("",) for a single level, ("top", "bottom") for two."""
        return self.vqvae.level_names

    @property
    def num_embeddings(self) -> int:
        """Number of codes of each codebook, K."""
        return self.vqvae.quantizers[0].num_embeddings

    @property
    def background_code(self) -> bool:
        """Whether code 0 is reserved for background."""
        return self.vqvae.background_threshold is not None

    @property
    def networks(self) -> list[str]:
        """Names of those networks that not every run has: "selector", "decoder"."""
        return [name for name in ("selector", "decoder") if getattr(self, name) is not None]

    @property
    def candidates(self) -> int:
        """Number of grids that the priors propose for each sample: `num_candidates`, or 1 without a selector."""
        return self.num_candidates if self.selector else 1

    def encode(self, images: np.ndarray, parameters: Mapping[str, np.ndarray] | None = None) -> list[np.ndarray]:
        """Encode images.

        Args:
            images: (N, H, W, 1) or (N, H, W), uint8 or floats in [0, 1], of the size that the VQ-VAE was trained on.
            parameters: Those of an augmentation that is applied first, (N, ...) each; see `augmentation.draw`.

        Returns:
            Code indices, (N, h, w) int32 per level.

        Raises:
            ValueError: The images have another shape.
        """
        images, size = np.asanyarray(images), self.vqvae.image_size  # Keeps an array mapped from a file as it is.
        if images.ndim == 3:
            images = images[..., None]
        if images.shape[1:] != (size, size, 1):
            raise ValueError(f"images have the shape {images.shape}: must be (N, {size}, {size}, 1)")
        parameters = parameters or {}

        def encode(batch: np.ndarray, *drawn: np.ndarray) -> list[Any]:
            batch = _to_float(batch)
            if drawn:
                batch = np.asarray(augmentation.apply(batch, dict(zip(parameters, drawn, strict=True))))
            return self.vqvae.encode(batch)

        return self._in_batches(encode, [images, *parameters.values()], "slices encoded")

    def decode(self, codes: Sequence[np.ndarray]) -> np.ndarray:
        """Decode code indices, (N, h, w) per level, to images (N, H, W, 1) float32 in [0, 1]."""
        return self._in_batches(lambda *batch: [self.vqvae.decode_code(batch)], codes, "slices decoded")[0]

    def draw(
        self, codes: Sequence[np.ndarray], seed: int = 0, purpose: str = "samples", is_common: bool = False
    ) -> np.ndarray:
        """Decode code indices with the sharp decoder, if there is one, which draws the detail that they leave open.

        Args:
            codes: Code indices, (N, h, w) int32 per level.
            seed: The same seed gives the same detail for the same purpose; 0 or more.
            purpose: What the images are for, as in `sample_codes`.
            is_common: Whether all images are drawn with the same noise.

        Returns:
            (N, H, W, 1) float32 in [0, 1].
        """
        lookups = [quantizer.lookup for quantizer in self.vqvae.quantizers]

        def draw(noise: np.ndarray, *batch: np.ndarray) -> Any:
            return self._draw([lookup(indices) for lookup, indices in zip(lookups, batch, strict=True)], noise)

        return self._with_noise(draw, codes, seed, purpose, is_common)

    def walk(self, first: Sequence[np.ndarray], second: Sequence[np.ndarray], steps: int, seed: int = 0) -> np.ndarray:
        """Draw the way from one image to another: codebook vectors are interpolated, and the noise stays the same.

        Args:
            first, second: Code indices, (1, h, w) int32 per level.
            steps: Number of images, at least 2, including both ends.
            seed: Seed of the noise.

        Returns:
            (steps, H, W, 1) float32 in [0, 1].
        """
        weights = np.linspace(0, 1, steps, dtype=np.float32)[:, None, None, None]
        quantized = []
        for quantizer, *ends in zip(self.vqvae.quantizers, first, second, strict=True):
            begin, end = (keras.ops.convert_to_numpy(quantizer.lookup(indices)) for indices in ends)
            quantized.append((1 - weights) * begin + weights * end)
        return self._with_noise(lambda noise, *batch: self._draw(batch, noise), quantized, seed, "samples", True)

    def _draw(self, quantized: Sequence[Any], noise: np.ndarray) -> Any:
        """Decode quantized vectors, (B, h, w, D) per level, and noise (B, H, W, 1)."""
        return self.decoder.decode(quantized, noise) if self.decoder else self.vqvae.decode(quantized)

    def _with_noise(
        self, draw: Callable[..., Any], arrays: Sequence[np.ndarray], seed: int, purpose: str, is_common: bool
    ) -> np.ndarray:
        """Call `draw` with noise (B, H, W, 1), a stream of it per image, and a few rows of the arrays at a time."""
        shape = (self.vqvae.image_size, self.vqvae.image_size, 1)

        def draw_batch(index: np.ndarray, *batch: np.ndarray) -> list[Any]:
            streams = [seeds.generator(seed, f"noise of {purpose}", int(i)) for i in index]
            return [draw(np.stack([random.standard_normal(shape, np.float32) for random in streams]), *batch)]

        index = np.arange(len(arrays[0])) * (not is_common)
        return self._in_batches(draw_batch, [index, *arrays], "slices decoded")[0]

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Encode and decode images; see `encode` and `decode`."""
        return self.decode(self.encode(images))

    def sample_codes(
        self,
        positions: Positions,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        purpose: str = "samples",
        is_common: bool = False,
    ) -> list[np.ndarray]:
        """Sample code indices: of those that the priors propose, the selector chooses one grid for each position.

        Args:
            positions: (N,) slice positions.
            seed: The same seed gives the same codes for the same purpose; 0 or more.
            temperature: Below 1 favours likely codes, above 1 varied ones.
            top_k: Sample among the k most likely codes only; 0 for all.
            top_p: Sample among the most likely codes that together have this probability; 1 for all.
            purpose: What the samples are for. Samples for different purposes are independent.
            is_common: Whether all grids are sampled with the same random numbers.

        Returns:
            Code indices, (N, h, w) int32 per level.
        """
        count = self.candidates
        repeated, period = np.repeat(np.asarray(positions, np.int32), count), count if is_common else None
        codes = self.propose_codes(repeated, seed, temperature, top_k, top_p, purpose, period=period)
        if count == 1:
            return codes
        log_weights = self.log_weights(codes, repeated).reshape(-1, count)
        chosen = choose(log_weights, seeds.generator(seed, f"choice of {purpose}"), is_common)
        return [level[chosen] for level in codes]

    def propose_codes(
        self,
        positions: Positions,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        purpose: str = "samples",
        known: Sequence[np.ndarray] | None = None,
        augmentation: np.ndarray | None = None,
        period: int | None = None,
    ) -> list[np.ndarray]:
        """Sample code indices from the priors alone, each finer level given the coarser one.

        Args:
            positions: (N,) slice positions.
            seed, temperature, top_k, top_p, purpose: See `sample_codes`.
            known: Codes that are known, (N, h, w) int32 per level, with −1 for those that are sampled; see
                `sampling.sample_codes`.
            augmentation: Parameters of the augmentation of the slices, (N, P) float32; see `augmentation.as_condition`.
            period: Number of grids after which the random numbers are repeated; None: never.

        Returns:
            Code indices, (N, h, w) int32 per level.
        """
        codes: list[np.ndarray] = []
        for level, prior in enumerate(self.priors):
            conditioning = _conditioning(level, positions, codes)
            if augmentation is not None:
                conditioning["augmentation"] = augmentation
            cells, random = math.prod(prior.grid_size), seeds.generator(seed, f"codes of {purpose}", level)
            # They are generated first, so that the codes do not depend on the size of a batch.
            uniforms = np.resize(random.random((period or len(positions), cells), np.float32), (len(positions), cells))
            with console.progress(len(positions), f"{self.level_names[level]} grids sampled".strip()) as bar:
                codes.append(
                    sampling.sample_codes(
                        prior,
                        conditioning,
                        uniforms,
                        temperature,
                        top_k,
                        top_p,
                        progress=bar.update,
                        known=known[level] if known else None,
                    )
                )
        return codes

    def log_weights(self, codes: Sequence[np.ndarray], positions: Positions) -> np.ndarray:
        """Return by how much the selector finds grids more probable among real slices than among proposals.

        Args:
            codes: Code indices, (N, h, w) int32 per level.
            positions: (N,) slice positions.

        Returns:
            (N,) float32, logarithms; zeros without a selector.
        """
        selector = self.selector
        if selector is None:
            return np.zeros(len(positions), np.float32)
        inputs = {f"codes_{level}": indices for level, indices in enumerate(codes)}
        inputs["positions"] = np.asarray(positions, np.int32)
        names = list(inputs)
        return self._in_batches(
            lambda *batch: [selector.log_weights(dict(zip(names, batch, strict=True)))],
            list(inputs.values()),
            "grids judged",
        )[0]

    def sample(
        self,
        positions: Positions,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        purpose: str = "samples",
    ) -> np.ndarray:
        """Sample images (N, H, W, 1) float32 in [0, 1], one per slice position; see `sample_codes` and `draw`."""
        return self.draw(self.sample_codes(positions, seed, temperature, top_k, top_p, purpose), seed, purpose)

    def nats_of_codes(self, codes: Sequence[np.ndarray], positions: Positions) -> list[np.ndarray]:
        """Cross-entropy of each code under the priors, given those before it.

        Args:
            codes: Code indices, (N, h, w) int32 per level.
            positions: (N,) slice positions.

        Returns:
            (N, h, w) float32 per level, in nats.
        """

        def nats(logits: Any, targets: np.ndarray) -> list[Any]:
            return [keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)]

        return [values for (values,) in self._from_logits(nats, codes, positions)]

    def nats_per_code(self, codes: Sequence[np.ndarray], positions: Positions) -> list[np.ndarray]:
        """The mean of `nats_of_codes` over each slice's codes, (N,) float32 per level."""
        return [values.mean(axis=(1, 2)) for values in self.nats_of_codes(codes, positions)]

    def surprise(self, codes: Sequence[np.ndarray], positions: Positions) -> np.ndarray:
        """How much less probable codes are under the priors than codes that the priors themselves would sample.

        The nats of each code, minus their expectation under the prior's own distribution for this code, are summed over
        the grid and divided by their standard deviation. Codes sampled from the priors therefore have mean 0 and
        variance 1, however detailed the slice. The nats alone depend more on the amount of detail.

        Args:
            codes: Code indices, (N, h, w) int32 per level.
            positions: (N,) slice positions.

        Returns:
            (N,) float64, over all levels.
        """

        def moments(logits: Any, targets: np.ndarray) -> list[Any]:
            log_probabilities = keras.ops.log_softmax(logits)
            probabilities = keras.ops.exp(log_probabilities)
            nats = keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)
            expected = -keras.ops.sum(probabilities * log_probabilities, axis=-1)
            variance = keras.ops.sum(probabilities * keras.ops.square(log_probabilities), axis=-1) - expected**2
            return [keras.ops.sum(nats - expected, axis=(1, 2)), keras.ops.sum(variance, axis=(1, 2))]

        by_level = self._from_logits(moments, codes, positions)
        excess, variance = (sum(level[i].astype(np.float64) for level in by_level) for i in (0, 1))
        return excess / np.sqrt(np.maximum(variance, 1e-12))

    def _from_logits(
        self, function: Callable[[Any, np.ndarray], list[Any]], codes: Sequence[np.ndarray], positions: Positions
    ) -> list[list[np.ndarray]]:
        """Apply a function to the logits (B, h, w, K) and the codes (B, h, w) of each batch of each level.

        Returns:
            For each level, the tensors (N, …) that the function returns.
        """
        found = []
        for level, prior in enumerate(self.priors):
            inputs = {"codes": codes[level], **_conditioning(level, positions, codes)}

            def of_batch(
                *batch: np.ndarray, prior: model.PixelCNN = prior, keys: Sequence[str] = tuple(inputs)
            ) -> list[Any]:
                return function(prior(dict(zip(keys, batch, strict=True))), batch[0])

            found.append(self._in_batches(of_batch, list(inputs.values()), "grids evaluated"))
        return found

    def bits(self, images: np.ndarray, positions: Positions | None = None) -> np.ndarray:
        """Number of bits that the priors need for the codes of each image.

        Args:
            images: See `encode`.
            positions: (N,) slice positions. If None, the prior is averaged over all training positions.

        Returns:
            (N,) float64, bits per image.
        """
        return self.bits_of_codes(self.encode(images), positions)

    def bits_of_codes(self, codes: Sequence[np.ndarray], positions: Positions | None = None) -> np.ndarray:
        """Number of bits that the priors need for code indices, (N, h, w) int32 per level; see `bits`."""
        sizes = [level[0].size for level in codes]

        def nats(positions: np.ndarray) -> np.ndarray:
            by_level = self.nats_per_code(codes, positions)
            return sum(size * nats.astype(np.float64) for size, nats in zip(sizes, by_level, strict=True))

        if positions is not None:
            return nats(np.asarray(positions, np.int32)) / math.log(2)
        each = np.stack([nats(np.full(len(codes[0]), position, np.int32)) for position in self.positions])
        return (math.log(len(each)) - np.logaddexp.reduce(-each, axis=0)) / math.log(2)

    def selector_bits(self, codes: Sequence[np.ndarray], positions: Positions, seed: int = 0) -> np.ndarray:
        """By how many bits per image the choice of the selector makes grids cheaper than under the priors, at least.

        It is a lower bound that is random, see `selector.log_likelihood_gain`.

        Args:
            codes: Code indices, (N, h, w) int32 per level.
            positions: (N,) slice positions.
            seed: Seed of the proposals that the grids are compared with.

        Returns:
            (N,) float64; zeros without a selector.
        """
        if self.candidates == 1:
            return np.zeros(len(positions))
        repeated = np.repeat(np.asarray(positions, np.int32), self.candidates - 1)
        proposed = self.propose_codes(repeated, seed, purpose="likelihood")
        others = self.log_weights(proposed, repeated).reshape(len(positions), -1)
        return log_likelihood_gain(self.log_weights(codes, positions), others) / math.log(2)

    def _in_batches(
        self, function: Callable[..., Sequence[Any]], arrays: Sequence[np.ndarray], unit: str
    ) -> list[np.ndarray]:
        """Apply a function to a few rows of the arrays at a time and put together what it returns."""
        results: list[np.ndarray] = []
        begin = 0
        with console.progress(len(arrays[0]), unit) as bar:
            while begin < len(arrays[0]):
                rows = slice(begin, begin + self.batch_size)
                outputs = [keras.ops.convert_to_numpy(t) for t in function(*[cache.read(a, rows) for a in arrays])]
                results = results or [np.empty((len(arrays[0]), *o.shape[1:]), o.dtype) for o in outputs]
                for result, output in zip(results, outputs, strict=True):
                    result[rows] = output
                bar.update(len(outputs[0]))
                begin += len(outputs[0])
        return results


def _conditioning(level: int, positions: Positions, codes: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of a level's prior other than its own codes, given the codes of the coarser levels."""
    conditioning = {"positions": np.asarray(positions, np.int32)}
    return conditioning | {"coarse": codes[level - 1]} if level else conditioning


def _to_float(images: np.ndarray) -> np.ndarray:
    return dataset.to_float(images) if images.dtype == np.uint8 else images.astype(np.float32)


@dataclass(frozen=True)
class Samples:
    """Generated slices.

    Attributes:
        images: (N, H, W, 1) uint8.
        codes: Code indices, (N, h, w) int32 per level.
        positions: (N,) int32 slice positions.
    """

    images: np.ndarray
    codes: list[np.ndarray]
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    @property
    def files(self) -> list[str]:
        """Names of the PNGs in a run folder."""
        return [f"samples/sample_{i:03d}_slice_{position}.png" for i, position in enumerate(self.positions)]

    def save(self, *paths: Path) -> None:
        """Write one 8-bit grey PNG per sample."""
        for image, path in zip(self.images, paths, strict=True):
            Image.fromarray(image[..., 0]).save(path)


def code_files(name: str, num_levels: int) -> list[str]:
    """Names of files of code indices in a run folder: samples/NAME.npy, or top_NAME.npy and bottom_NAME.npy."""
    return [f"samples/{prefix}{name}.npy" for prefix in model.level_prefixes(num_levels)]


def make_samples(
    run: Run,
    name: str,
    generator: Generator,
    positions: np.ndarray,
    arguments: dict[str, Any],
    made_from: Sequence[str],
) -> Samples:
    """Samples whose codes are in the `code_files` of a run. The codes are sampled if these files are not up to date.

    Args:
        run: The run.
        name: Name of the files, as in "codes".
        generator: The trained networks.
        positions: (N,) int32 slice positions.
        arguments: Keyword arguments of `Generator.sample_codes` other than the positions and the purpose.
        made_from: Names of the networks and facts that determine the samples; see `Run.make`.
    """
    files, purpose = code_files(name, len(generator.level_names)), name.replace("codes", "samples")

    def write(*paths: Path) -> None:
        print(f"sampling {len(positions)} slices")
        drawn = generator.sample_codes(positions, **arguments, purpose=purpose)
        for path, indices in zip(paths, drawn, strict=True):
            np.save(path, indices)

    run.make(files, made_from, write)
    codes = [np.load(run.folder / file) for file in files]
    images = run.remember(
        f"images of {name}",
        [*made_from, *files],
        lambda: dataset.to_uint8(generator.draw(codes, arguments["seed"], purpose)),
    )
    return Samples(images, codes, positions)


@dataclass(frozen=True)
class Results:
    """Everything that a run has made: what metrics, pictures and the report read.

    Attributes:
        generator: The trained networks.
        slices: The data, by split.
        codes: Code indices of the slices, by split, (N, h, w) int32 per level.
        reconstructions: (N, H, W, 1) float32 in [0, 1], of the splits "validate" and "test", by the VQ-VAE.
        sharp_reconstructions: The same of the test split by the sharp decoder, None if there is none.
        critic: The VQ-VAE with other priors, which were trained independently of the generator's.
        samples: The samples that are saved as pictures.
        compared: Indices of the slices of each split that are compared with samples.
        compared_samples: One sample at the position of each of these slices, by split.
        sampling: How samples are drawn: keyword arguments of `Generator.sample` other than the positions.
        history: Rows of history.csv.
        numbers: Content of metrics.json; empty until the metrics are computed.
        note: What the data are if they are not real slices, otherwise empty.
    """

    generator: Generator
    slices: dict[str, dataset.Slices]
    codes: dict[str, list[np.ndarray]]
    reconstructions: dict[str, np.ndarray]
    critic: Generator
    samples: Samples
    compared: dict[str, np.ndarray]
    compared_samples: dict[str, Samples]
    sampling: dict[str, Any]
    history: list[dict[str, Any]]
    numbers: dict[str, Any]
    sharp_reconstructions: np.ndarray | None = None
    note: str = ""
