"""The pictures of a run: one list of them, and how each is made from the results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

import dataset
import metrics
import model
import plots
import seeds
from dataset import to_float
from generator import Generator, Results
from plots import History

NUM_NOISES = 8  # Images that are drawn from the same codes.
NUM_BLIND = 48  # Images in the test for people.


@dataclass(frozen=True)
class Picture:
    """One picture of a run.

    Attributes:
        name: Its file is images/NAME.png.
        draw: Writes the PNG, given its path and the results of the run.
        caption: What it shows and how to read it.
        min_levels: Number of levels of codes that a run must have for the picture to make sense.
        needs: Name of the network that a run must have for the picture to make sense: "decoder", the sharp one, or
            "selector"; None if any run has what it needs.
    """

    name: str
    draw: Callable[[Path, Results], None]
    caption: str
    min_levels: int = 1
    needs: str | None = None


def of_run(num_levels: int, networks: Sequence[str]) -> tuple[Picture, ...]:
    """Return the pictures of a run with this number of levels and these networks, in the order of the report."""
    return tuple(
        picture for picture in PICTURES if picture.min_levels <= num_levels and picture.needs in (None, *networks)
    )


def _shown(results: Results) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Choose up to ten test slices, spread over the positions: indices, images (N, H, W, 1) and labels."""
    test = results.slices["test"]
    index = dataset.spread_over_positions(test.positions, 10)
    return index, to_float(test.images[index]), [f"slice {position}" for position in test.positions[index]]


def _history(results: Results, stage: str) -> History:
    return [row for row in results.history if row["stage"] == stage]


def _embeddings(generator: Generator) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(quantizer.embeddings) for quantizer in generator.vqvae.quantizers]


def _draw_samples_by_position(path: Path, results: Results) -> None:
    test, positions, rows = results.slices["test"], np.unique(results.slices["train"].positions), 4
    chosen = positions[np.unique(np.linspace(0, len(positions) - 1, 8).astype(int))]
    nearest = [int(np.argmin(np.abs(test.positions - position))) for position in chosen]
    images = results.generator.sample(np.repeat(chosen, rows), **results.sampling, purpose="samples by position")
    images = images.reshape(len(chosen), rows, *images.shape[1:])
    plots.samples_by_position(path, to_float(test.images[nearest]), images, chosen, results.note)


def _draw_samples(path: Path, results: Results) -> None:
    plots.samples(path, to_float(results.samples.images), results.samples.positions, results.note)


def _draw_reconstructions(path: Path, results: Results) -> None:
    index, originals, labels = _shown(results)
    plots.reconstructions(path, originals, results.reconstructions["test"][index], labels, results.note)


def _draw_worst_reconstructions(path: Path, results: Results) -> None:
    rows = results.numbers["worst_slices"]
    index = [row["index"] for row in rows]
    quality = ["no brain" if row["ssim_brain"] is None else f"brain SSIM {row['ssim_brain']:.2f}" for row in rows]
    labels = [f"{row['subject']} slice {row['position']}\n{text}" for row, text in zip(rows, quality, strict=True)]
    originals, decoded = to_float(results.slices["test"].images[index]), results.reconstructions["test"][index]
    title = f"The {len(rows)} test slices with the lowest SSIM over the brain"
    plots.reconstructions(path, originals, decoded, labels, results.note, title)


def _draw_quality_by_position(path: Path, results: Results) -> None:
    plots.quality_by_position(path, results.numbers["by_position"], results.note)


def _draw_power_spectrum(path: Path, results: Results) -> None:
    sets = {
        "test slices": to_float(results.slices["test"].images),
        "their reconstructions": results.reconstructions["test"],
        "generated slices": to_float(results.compared_samples["test"].images),
    }
    if results.sharp_reconstructions is not None:
        sets["sharp reconstructions"] = results.sharp_reconstructions
        sets["generated slices, faithful decoder"] = results.generator.decode(results.compared_samples["test"].codes)
    spectra = {name: metrics.power_spectrum(images) for name, images in sets.items()}
    plots.power_spectrum(path, spectra, results.numbers["half_power_frequency"], results.note)


def _draw_nearest_training_slices(path: Path, results: Results) -> None:
    rows, compared = results.numbers["samples"]["nearest_to_training"], results.compared_samples["test"]
    labels = [f"slice {compared.positions[row['index']]}, RMSE {row['distance']:.3f}" for row in rows]
    images = to_float(compared.images[[row["index"] for row in rows]])
    nearest = to_float(results.slices["train"].images[[row["train_index"] for row in rows]])
    title = "Generated slices closest to a training slice, and that slice"
    plots.comparison(path, {"generated": images, "training slice": nearest}, labels, title, results.note)


def _draw_codebook(path: Path, results: Results) -> None:
    generator, decoded = results.generator, results.reconstructions["test"]
    plots.codebook(path, results.codes["test"], decoded, generator.num_embeddings, generator.level_names, results.note)


def _draw_codes(path: Path, results: Results) -> None:
    index, originals, labels = _shown(results)
    maps, generator = [indices[index] for indices in results.codes["test"]], results.generator
    plots.codes(path, originals, maps, _embeddings(generator), generator.level_names, labels, results.note)


def _draw_levels(path: Path, results: Results) -> None:
    index, originals, labels = _shown(results)
    names = results.generator.level_names
    single = [_decode_single_level(results.generator, results.codes["test"], i, index) for i in range(len(names))]
    sets = {"original": originals, "all codes": results.reconstructions["test"][index]}
    sets |= {f"only {name} codes": images for name, images in zip(names, single, strict=True)}
    title = "What each level contains (the codes of the other level are replaced by their mean vector)"
    plots.comparison(path, sets, labels, title, results.note)


def _decode_single_level(generator: Generator, codes: list[np.ndarray], level: int, index: np.ndarray) -> np.ndarray:
    """Decode one level's codes of the slices `index` (S,), with the other levels' replaced by their mean vector.

    Returns:
        (S, H, W, 1) float32 in [0, 1].
    """
    quantized = []
    for i, (quantizer, embeddings, indices) in enumerate(
        zip(generator.vqvae.quantizers, _embeddings(generator), codes, strict=True)
    ):
        if i == level:
            quantized.append(quantizer.lookup(indices[index]))
            continue
        frequencies = np.bincount(indices.ravel(), minlength=len(embeddings)) / indices.size
        mean = (frequencies @ embeddings).astype(np.float32)
        quantized.append(np.broadcast_to(mean, (len(index), *indices.shape[1:], len(mean))))
    decoded = keras.ops.convert_to_numpy(generator.vqvae.decode(quantized))
    if not generator.background_code:
        return decoded
    # The decoder is not trained on cells of the background.
    return keras.ops.convert_to_numpy(model.blacken(decoded, codes[-1][index] == 0))


def _draw_code_usage(path: Path, results: Results) -> None:
    generator, history = results.generator, _history(results, "vqvae")
    plots.code_usage(path, history, generator.level_names, _codes_in_use(generator), results.note)


def _codes_in_use(generator: Generator) -> int:
    """Number of codes of each codebook without the one that is reserved for background."""
    return generator.num_embeddings - generator.background_code


def _draw_ssim(path: Path, results: Results) -> None:
    plots.metric(path, _history(results, "vqvae"), "ssim", "SSIM of reconstructions, whole image", "SSIM", results.note)


def _draw_vqvae_loss(path: Path, results: Results) -> None:
    plots.vqvae_loss(path, _history(results, "vqvae"), results.generator.level_names, results.note)


def _draw_decoder_loss(path: Path, results: Results) -> None:
    history = _history(results, "decoder")
    plots.metric(path, history, "loss", "Sharp decoder", "squared error of the velocity", results.note)


def _draw_sharp_reconstructions(path: Path, results: Results) -> None:
    assert results.sharp_reconstructions is not None
    index, originals, labels = _shown(results)
    sets = {
        "original": originals,
        "faithful": results.reconstructions["test"][index],
        "sharp": results.sharp_reconstructions[index],
    }
    title = "Test slices, and what both decoders make of their codes"
    plots.comparison(path, sets, labels, title, results.note)


def _draw_invented_detail(path: Path, results: Results) -> None:
    index, originals, labels = _shown(results)
    shown = list(range(0, len(index), max(1, len(index) // 3)))[:3]
    repeated = [np.repeat(level[index[shown]], NUM_NOISES, axis=0) for level in results.codes["test"]]
    drawn = results.generator.draw(repeated, results.sampling["seed"], "invented detail")
    drawn = drawn.reshape(len(shown), NUM_NOISES, *drawn.shape[1:])
    plots.invented_detail(path, originals[shown], drawn, [labels[i] for i in shown], results.note)


def blind_test(results: Results) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Choose slices of all kinds for a test of people, in random order: as many of each kind as possible.

    If there are enough test slices, none is chosen twice, so that an original cannot be found by its reconstruction.

    Returns:
        Images (N, H, W, 1) in [0, 1], N at most `NUM_BLIND`, and the key: a row for each of them, with its number from
        1, its kind, its slice position, and the subject, which is empty for generated slices.
    """
    test, samples = results.slices["test"], results.compared_samples["test"]
    sets = {"real": to_float(test.images), "faithful reconstruction": results.reconstructions["test"]}
    if results.sharp_reconstructions is not None:
        sets["sharp reconstruction"] = results.sharp_reconstructions
    random = seeds.generator(results.sampling["seed"], "test for people")
    each = max(1, min(NUM_BLIND // (len(sets) + 1), len(test) // len(sets), len(samples)))
    chosen = np.split(np.resize(random.permutation(len(test)), each * len(sets)), len(sets))
    tiles = [
        (images[i], {"kind": kind, "position": int(test.positions[i]), "subject": test.subjects[i]})
        for (kind, images), index in zip(sets.items(), chosen, strict=True)
        for i in index
    ]
    tiles += [
        (to_float(samples.images[i]), {"kind": "generated", "position": int(samples.positions[i]), "subject": ""})
        for i in random.permutation(len(samples))[:each]
    ]
    mixed = [tiles[i] for i in random.permutation(len(tiles))]
    key = [{"number": number, **row} for number, (_, row) in enumerate(mixed, 1)]
    return np.array([image for image, _ in mixed]), key


def _draw_blind_test(path: Path, results: Results) -> None:
    plots.numbered(path, blind_test(results)[0], "Which of these slices are real?", results.note)


def _draw_selector_loss(path: Path, results: Results) -> None:
    plots.metric(path, _history(results, "selector"), "loss", "Selector", "logistic loss", results.note)


def _draw_prior_loss(path: Path, results: Results) -> None:
    names = model.prior_names(len(results.generator.level_names))
    histories = {name: _history(results, name) for name in names}
    plots.prior_loss(path, histories, results.generator.num_embeddings, results.note)


PICTURES = (
    Picture(
        "samples_by_position",
        _draw_samples_by_position,
        "Top row: real slices of subjects that the model has never seen. Below: four generated slices at each of "
        "these slice positions.",
    ),
    Picture("samples", _draw_samples, "The generated slices in the folder samples/."),
    Picture(
        "reconstructions",
        _draw_reconstructions,
        "Slices of unseen subjects, their reconstructions from the codes, and the errors (red: too bright, blue: too "
        "dark).",
    ),
    Picture(
        "sharp_reconstructions",
        _draw_sharp_reconstructions,
        "Slices of unseen subjects, decoded from their codes by the VQ-VAE (faithful) and by the sharp decoder, whose "
        "fine folds are plausible, not true.",
        needs="decoder",
    ),
    Picture(
        "invented_detail",
        _draw_invented_detail,
        "The codes of a slice, decoded by the sharp decoder with different noise, and the standard deviation of each "
        "pixel: bright where the codes leave open what the decoder draws.",
        needs="decoder",
    ),
    Picture(
        "blind_test",
        _draw_blind_test,
        "A test for people: real test slices, reconstructions and generated slices in random order, as many of each. "
        "Decide which are real, then open the key below, which is also in blind_test_key.csv.",
    ),
    Picture(
        "worst_reconstructions",
        _draw_worst_reconstructions,
        "The ten test slices with the lowest SSIM over the brain, worst first.",
    ),
    Picture(
        "quality_by_position",
        _draw_quality_by_position,
        "Quality of the reconstructions from the lowest slice position to the highest.",
    ),
    Picture(
        "power_spectrum",
        _draw_power_spectrum,
        "Fine details are on the right. If a curve is below that of the real slices, the images are blurred at this "
        "frequency; if it is above, they are noisy.",
    ),
    Picture(
        "nearest_training_slices",
        _draw_nearest_training_slices,
        "The ten generated slices that are closest to a training slice, above that slice, with their root mean square "
        "error (RMSE). If the model copied its training data, the two rows would agree in all "
        "large structures.",
    ),
    Picture(
        "codebook",
        _draw_codebook,
        "Decoded pixels around each code, averaged over its occurrences in the test split, the most frequent code "
        "first. Without a code reserved for the background, the codes there can carry information about distant "
        "regions.",
    ),
    Picture(
        "codes",
        _draw_codes,
        "Test slices and their code maps. The colours show the first three principal components of the codebook "
        "vectors, so similar codes have similar colours.",
    ),
    Picture(
        "levels",
        _draw_levels,
        "What each level of codes contains: images decoded from one level, with the codes of the other level replaced "
        "by the mean of their vectors.",
        min_levels=2,
    ),
    Picture("code_usage", _draw_code_usage, "Fraction of the codes that are used, and their perplexity, by epoch."),
    Picture("ssim", _draw_ssim, "SSIM of the reconstructions by epoch."),
    Picture("vqvae_loss", _draw_vqvae_loss, "Terms of the VQ-VAE's loss by epoch."),
    Picture(
        "prior_loss",
        _draw_prior_loss,
        "Loss of the prior by epoch. If the validation loss rises while the training loss falls, the prior overfits. "
        "The epoch with the lowest validation loss is kept.",
    ),
    Picture(
        "selector_loss",
        _draw_selector_loss,
        "Loss of the selector by epoch. At 0.69, it cannot distinguish codes of real slices from those that the prior "
        "proposes. The epoch with the lowest validation loss is kept.",
        needs="selector",
    ),
    Picture(
        "decoder_loss",
        _draw_decoder_loss,
        "Loss of the sharp decoder by epoch. If the validation loss rises, the decoder memorises slices. The epoch "
        "with the lowest validation loss is kept.",
        needs="decoder",
    ),
)
