"""Every picture: functions that draw one PNG each, and `PICTURES`, the list of those that a run has.

The functions take arrays. Their argument `note` goes into the title and says what the data are if they are not real.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import metrics
import model
from dataset import to_float
from generator import Generator, Results

matplotlib.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3})

History = list[dict[str, Any]]  # Rows of history.csv of one stage.

# ----------------------------------------------------------------------------------------------- curves


def vqvae_loss(path: Path, history: History, levels: Sequence[str] = ("",), note: str = "") -> None:
    """Draw each term of the VQ-VAE's loss by epoch, for the training and validation splits."""
    figure = _figure(11, 3.2, "VQ-VAE loss", note)
    for axes, term in zip(figure.subplots(1, 3), ("reconstruction", "codebook", "commitment"), strict=True):
        _curves_by_level(axes, history, term, ("",) if term == "reconstruction" else levels)
        axes.set(title=term, xlabel="epoch", ylabel="loss", yscale="log")
    _save(figure, path)


def ssim(path: Path, history: History, note: str = "") -> None:
    """Draw the SSIM of reconstructions by epoch, over the whole images that the VQ-VAE is trained on."""
    figure = _figure(5.5, 3.6, "SSIM of reconstructions, whole image", note)
    axes = figure.subplots()
    _curves(axes, history, "ssim")
    axes.set(xlabel="epoch", ylabel="SSIM")
    _save(figure, path)


def code_usage(path: Path, history: History, levels: Sequence[str], num_embeddings: int, note: str = "") -> None:
    """Draw the fraction of codes used and the perplexity by epoch."""
    figure = _figure(9, 3.4, f"Use of the codebook ({num_embeddings} codes)", note)
    used, perplexity = figure.subplots(1, 2)
    _curves_by_level(used, history, "codes_used", levels)
    used.set(xlabel="epoch", ylabel="fraction of codes used", ylim=(0, 1.03))
    _curves_by_level(perplexity, history, "perplexity", levels)
    perplexity.axhline(num_embeddings, color="grey", linestyle=":", label="uniform use of all codes")
    perplexity.set(xlabel="epoch", ylabel="perplexity", ylim=(0, None))
    perplexity.legend()
    _save(figure, path)


def prior_loss(path: Path, histories: dict[str, History], num_embeddings: int, note: str = "") -> None:
    """Draw the cross-entropy of each prior by epoch, in nats (left axis) and bits (right axis) per code.

    Args:
        histories: {name of the prior: its history}.
    """
    title = f"Cross-entropy of the prior (uniform codes: {np.log(num_embeddings):.2f} nats per code)"
    figure = _figure(5.5 * len(histories), 3.6, title, note)
    panels = figure.subplots(1, len(histories), squeeze=False)[0]
    for axes, (name, history) in zip(panels, histories.items(), strict=True):
        _curves(axes, history, "loss")
        axes.set(xlabel="epoch", ylabel="nats per code", title=name.replace("_", " ") if len(histories) > 1 else "")
        bits = axes.secondary_yaxis("right", functions=(lambda nats: nats / np.log(2), lambda bits: bits * np.log(2)))
        bits.set_ylabel("bits per code")
    _save(figure, path)


def quality_by_position(path: Path, rows: list[dict[str, Any]], note: str = "") -> None:
    """Draw the quality of reconstructions by slice position; `rows` are `by_position` of metrics.json."""
    figure = _figure(9, 3.4, "Reconstruction quality by slice position (means over test slices)", note)
    similarity, psnr = figure.subplots(1, 2)
    positions = [row["position"] for row in rows]
    for name, label in (("ms_ssim", "MS-SSIM"), ("ssim", "SSIM"), ("ssim_brain", "SSIM, brain only")):
        values = [math.nan if row[name] is None else row[name] for row in rows]
        similarity.plot(positions, values, label=label, marker=".")
    similarity.set(xlabel="slice position", ylabel="similarity")
    similarity.legend()
    psnr.plot(positions, [row["psnr_db"] for row in rows], marker=".")
    psnr.set(xlabel="slice position", ylabel="PSNR (dB)")
    for axes in (similarity, psnr):
        axes.locator_params("x", integer=True)
    _save(figure, path)


def power_spectrum(path: Path, spectra: dict[str, np.ndarray], half_power: float, note: str = "") -> None:
    """Draw radially averaged power spectra.

    Args:
        spectra: {name of a set of images: (S // 2,) its `metrics.power_spectrum`}.
        half_power: Frequency of the vertical line, in cycles per pixel; see `metrics.half_power_frequency`.
    """
    figure = _figure(6.5, 4.2, "Sharpness: power by spatial frequency", note)
    axes = figure.subplots()
    for name, power in spectra.items():
        axes.plot(np.arange(1, len(power) + 1) / (2 * len(power)), power, label=name)
    label = f"reconstructions have at least\nhalf of the power up to {half_power:.2f}"
    axes.axvline(half_power, color="grey", linestyle=":", label=label)
    axes.set(xlabel="spatial frequency (cycles per pixel)", ylabel="power", xscale="log", yscale="log")
    axes.legend()
    _save(figure, path)


def rate_distortion(path: Path, rows: list[dict[str, Any]], note: str = "") -> None:
    """Draw reconstruction quality against bits per image, one point per grid.

    There is one line for each combination of crop, image size and codebook size.

    Args:
        rows: Each with `crop`, `image_size`, `grid`, `num_embeddings`, `prior_bits_per_image`, `ssim`, `ssim_brain` and
            `psnr_db`.
    """
    figure = _figure(11, 4, "Rate and distortion on the test split", note)
    labels = {"ssim": "SSIM", "ssim_brain": "SSIM, brain only", "psnr_db": "PSNR (dB)"}
    for axes, (name, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        for geometry in sorted({_geometry(row) for row in rows}):
            line = sorted((r for r in rows if _geometry(r) == geometry), key=lambda row: row["prior_bits_per_image"])
            bits, values = [row["prior_bits_per_image"] for row in line], [row[name] for row in line]
            crop, size, num_embeddings = geometry
            axes.plot(bits, values, marker="o", label=f"crop {crop}, {size} × {size}, {num_embeddings} codes")
            for row, x, y in zip(line, bits, values, strict=True):
                text = f"{row['grid']} × {row['grid']}"
                axes.annotate(text, (x, y), (4, -10), textcoords="offset points", fontsize=7)
        axes.set(xlabel="bits per image, by the prior", ylabel=label, xscale="log")
        axes.margins(x=0.2, y=0.1)
        axes.legend()
    _save(figure, path)


def _geometry(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["crop"], row["image_size"], row["num_embeddings"]


# ----------------------------------------------------------------------------------------------- images


def reconstructions(
    path: Path,
    originals: np.ndarray,
    decoded: np.ndarray,
    labels: Sequence[str],
    note: str = "",
    title: str = "Test slices and their reconstructions",
) -> None:
    """Draw originals, reconstructions and errors below one another.

    Args:
        originals: (N, H, W, 1) in [0, 1].
        decoded: (N, H, W, 1) in [0, 1].
        labels: N labels of the columns.
    """
    error = (decoded - originals)[..., 0]
    limit = max(0.1, float(np.percentile(np.abs(error), 99.8)))
    figure, columns, grid = _columns(len(originals), ("original", "reconstruction", "error"), title, note)
    for i, (original, reconstruction, difference) in enumerate(columns):
        _image(original, originals[i], title=labels[i])
        _image(reconstruction, decoded[i])
        drawn = difference.imshow(error[i], cmap="RdBu_r", vmin=-limit, vmax=limit)
        _remove_frame(difference)
    figure.colorbar(drawn, ax=grid, fraction=0.03, pad=0.01, shrink=0.5)
    _save(figure, path)


def samples(path: Path, images: np.ndarray, positions: np.ndarray, note: str = "") -> None:
    """Draw generated slices in a grid; images (N, H, W, 1) in [0, 1], positions (N,)."""
    columns = min(10, max(5, int(np.ceil(np.sqrt(len(images) * 2)))), len(images))
    rows = -(-len(images) // columns)
    figure = _figure(max(1.35 * columns, 4) + 0.2, 1.5 * rows + 0.5, f"{len(images)} generated slices", note)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, position in zip(grid.flat, images, positions, strict=False):
        axes.set_axis_on()
        _image(axes, image, title=f"slice {position}")
    _save(figure, path)


def samples_by_position(
    path: Path, originals: np.ndarray, images: np.ndarray, positions: np.ndarray, note: str = ""
) -> None:
    """Draw one column per slice position: a test slice above samples at that position.

    Args:
        originals: (P, H, W, 1) in [0, 1].
        images: (P, S, H, W, 1) in [0, 1], S samples at each position.
        positions: (P,) slice positions.
    """
    columns, rows = images.shape[:2]
    figure = _figure(1.35 * columns + 0.4, 1.4 * (rows + 1) + 0.7, "Generated slices by slice position", note)
    grid = figure.subplots(rows + 1, columns, squeeze=False)
    for column in range(columns):
        _image(grid[0, column], originals[column], title=f"slice {positions[column]}")
        for row in range(rows):
            _image(grid[row + 1, column], images[column, row])
    grid[0, 0].set_ylabel("test slice")
    for axes in grid[1:, 0]:
        axes.set_ylabel("generated")
    _save(figure, path)


def nearest_training_slices(
    path: Path, images: np.ndarray, nearest: np.ndarray, labels: Sequence[str], note: str = ""
) -> None:
    """Draw samples above the training slices nearest to them; both (N, H, W, 1) in [0, 1], N labels."""
    title = "Generated slices closest to a training slice, and that slice"
    figure, columns, _ = _columns(len(images), ("generated", "training slice"), title, note)
    for i, (above, below) in enumerate(columns):
        _image(above, images[i], title=labels[i])
        _image(below, nearest[i])
    _save(figure, path)


def codebook(
    path: Path,
    codes: Sequence[np.ndarray],
    decoded: np.ndarray,
    num_embeddings: int,
    levels: Sequence[str] = ("",),
    note: str = "",
) -> None:
    """Draw what each code decodes to: the mean of the decoded images around its occurrences.

    A code has no meaning in isolation, because the decoder combines it with its neighbours. Each tile is therefore
    the mean over up to 200 occurrences, with the code's own pixels in the centre and half as many on each side.

    Args:
        codes: (N, h, w) code indices of each level.
        decoded: (N, H, W, 1) in [0, 1], the images decoded from these codes.
    """
    sheets = [_code_tiles(indices, decoded, num_embeddings) for indices in codes]
    ratios = [sheet.shape[0] / sheet.shape[1] for sheet in sheets]
    height = sum(11 * ratio + 0.4 for ratio in ratios)
    figure = _figure(11, 0.5 + height, "Mean decoded pixels around each code, most frequent code first", note)
    panels = figure.subplots(len(sheets), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, sheet, indices, level in zip(panels, sheets, codes, levels, strict=True):
        cell = decoded.shape[1] // indices.shape[1]
        axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        title = f"{len(np.unique(indices))} codes of {cell} × {cell} pixels, with a margin of {cell // 2} pixels"
        axes.set_title(f"{level}: {title}" if level else title)
        _remove_frame(axes)
    _save(figure, path)


def _code_tiles(indices: np.ndarray, decoded: np.ndarray, num_embeddings: int) -> np.ndarray:
    """Return one image with a tile for each code in use, on white."""
    counts = np.bincount(indices.ravel(), minlength=num_embeddings)
    order = [code for code in np.argsort(-counts, kind="stable") if counts[code]]
    cell = decoded.shape[1] // indices.shape[1]
    margin = cell // 2
    padded = np.pad(decoded[..., 0], ((0, 0), (margin, margin), (margin, margin)))
    size, columns = cell + 2 * margin, int(np.ceil(np.sqrt(2 * len(order))))
    step = size + max(size // 8, 1)
    sheet = np.ones((-(-len(order) // columns) * step, columns * step))
    occurrences = np.argsort(indices.ravel(), kind="stable")  # All occurrences of a code are adjacent.
    starts = np.concatenate([[0], np.cumsum(counts)])
    for i, code in enumerate(order):
        chosen = occurrences[starts[code] : starts[code + 1]]
        chosen = chosen[:: -(-len(chosen) // 200)]
        n, row, column = np.unravel_index(chosen, indices.shape)
        tiles = [padded[k, r : r + size, c : c + size] for k, r, c in zip(n, row * cell, column * cell, strict=True)]
        top, left = i // columns * step, i % columns * step
        sheet[top : top + size, left : left + size] = np.mean(tiles, axis=0)
    return sheet


def codes(
    path: Path,
    originals: np.ndarray,
    codes: Sequence[np.ndarray],
    embeddings: Sequence[np.ndarray],
    levels: Sequence[str],
    labels: Sequence[str],
    note: str = "",
) -> None:
    """Draw test slices above their code maps, with similar colours for codes with similar codebook vectors.

    Args:
        originals: (N, H, W, 1) in [0, 1].
        codes: (N, h, w) code indices of each level.
        embeddings: (K, D) codebook of each level.
        levels: Names of the levels.
        labels: N labels of the columns.
    """
    grids = " and ".join(f"{indices.shape[1]} × {indices.shape[2]}" for indices in codes)
    title = f"Code maps ({grids} of {len(embeddings[0])} codes; similar codes have similar colours)"
    rows = ("original", *[f"{level} codes".strip() for level in levels])
    figure, columns, _ = _columns(len(originals), rows, title, note)
    colours = [_code_colours(vectors) for vectors in embeddings]
    for i, (original, *maps) in enumerate(columns):
        _image(original, originals[i], title=labels[i])
        for axes, colour, indices in zip(maps, colours, codes, strict=True):
            axes.imshow(colour[indices[i]], interpolation="nearest")
            _remove_frame(axes)
    _save(figure, path)


def _code_colours(embeddings: np.ndarray) -> np.ndarray:
    """Map a codebook (K, D) to colours (K, 3) in [0, 1]: ranks along its first three principal components."""
    centred = embeddings - embeddings.mean(axis=0)
    components = np.linalg.svd(centred, full_matrices=False)[2][:3]
    ranks = (centred @ components.T).argsort(axis=0).argsort(axis=0) / max(len(embeddings) - 1, 1)
    return np.pad(ranks, ((0, 0), (0, 3 - ranks.shape[1])), constant_values=0.5)


def levels(
    path: Path,
    originals: np.ndarray,
    decoded: np.ndarray,
    single: Sequence[np.ndarray],
    levels: Sequence[str],
    labels: Sequence[str],
    note: str = "",
) -> None:
    """Draw what each level of codes contains: slices, reconstructions, and images decoded from a single level.

    Args:
        originals: (N, H, W, 1) in [0, 1].
        decoded: (N, H, W, 1) in [0, 1], decoded from all levels.
        single: (N, H, W, 1) in [0, 1] for each level, decoded from that level's codes only.
        levels: Names of the levels.
        labels: N labels of the columns.
    """
    rows = ("original", "all codes", *[f"only {level} codes" for level in levels])
    title = "What each level contains (the codes of the other level are replaced by their mean vector)"
    figure, columns, _ = _columns(len(originals), rows, title, note)
    for i, column in enumerate(columns):
        for axes, images in zip(column, (originals, decoded, *single), strict=True):
            _image(axes, images[i], title=labels[i] if axes is column[0] else "")
    _save(figure, path)


# ------------------------------------------------------------------------------- the pictures of a run


@dataclass(frozen=True)
class Picture:
    """One picture of a run.

    Attributes:
        name: Its file is images/NAME.png.
        draw: Writes the PNG, given its path and the results of the run.
        caption: What it shows and how to read it.
        min_levels: Number of levels of codes that a run must have for the picture to make sense.
    """

    name: str
    draw: Callable[[Path, Results], None]
    caption: str
    min_levels: int = 1


def pictures(num_levels: int) -> tuple[Picture, ...]:
    """Return the pictures of a run with this number of levels, in the order of the report."""
    return tuple(picture for picture in PICTURES if picture.min_levels <= num_levels)


def _shown(results: Results) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Choose up to ten test slices, spread over the positions: indices, images (N, H, W, 1) and labels."""
    test = results.slices["test"]
    ranks = np.unique(np.linspace(0, len(test) - 1, min(10, len(test))).astype(int))
    index = np.argsort(test.positions, kind="stable")[ranks]
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
    samples_by_position(path, to_float(test.images[nearest]), images, chosen, results.note)


def _draw_samples(path: Path, results: Results) -> None:
    samples(path, results.samples.images, results.samples.positions, results.note)


def _draw_reconstructions(path: Path, results: Results) -> None:
    index, originals, labels = _shown(results)
    reconstructions(path, originals, results.reconstructions["test"][index], labels, results.note)


def _draw_worst_reconstructions(path: Path, results: Results) -> None:
    rows = results.numbers["worst_slices"]
    index = [row["index"] for row in rows]
    quality = ["no brain" if row["ssim_brain"] is None else f"brain SSIM {row['ssim_brain']:.2f}" for row in rows]
    labels = [f"{row['subject']} slice {row['position']}\n{text}" for row, text in zip(rows, quality, strict=True)]
    originals, decoded = to_float(results.slices["test"].images[index]), results.reconstructions["test"][index]
    title = f"The {len(rows)} test slices with the lowest SSIM over the brain"
    reconstructions(path, originals, decoded, labels, results.note, title)


def _draw_quality_by_position(path: Path, results: Results) -> None:
    quality_by_position(path, results.numbers["by_position"], results.note)


def _draw_power_spectrum(path: Path, results: Results) -> None:
    sets = {
        "test slices": to_float(results.slices["test"].images),
        "their reconstructions": results.reconstructions["test"],
        "generated slices": results.compared_samples["test"].images,
    }
    spectra = {name: metrics.power_spectrum(images) for name, images in sets.items()}
    half_power = metrics.half_power_frequency(spectra["test slices"], spectra["their reconstructions"])
    power_spectrum(path, spectra, half_power, results.note)


def _draw_nearest_training_slices(path: Path, results: Results) -> None:
    rows, compared = results.numbers["samples"]["nearest_to_training"], results.compared_samples["test"]
    labels = [f"slice {compared.positions[row['index']]}, RMSE {row['distance']:.3f}" for row in rows]
    images = compared.images[[row["index"] for row in rows]]
    nearest = to_float(results.slices["train"].images[[row["train_index"] for row in rows]])
    nearest_training_slices(path, images, nearest, labels, results.note)


def _draw_codebook(path: Path, results: Results) -> None:
    generator, decoded = results.generator, results.reconstructions["test"]
    codebook(path, results.codes["test"], decoded, generator.num_embeddings, generator.level_names, results.note)


def _draw_codes(path: Path, results: Results) -> None:
    index, originals, labels = _shown(results)
    maps, generator = [indices[index] for indices in results.codes["test"]], results.generator
    codes(path, originals, maps, _embeddings(generator), generator.level_names, labels, results.note)


def _draw_levels(path: Path, results: Results) -> None:
    index, originals, labels = _shown(results)
    names = results.generator.level_names
    single = [_decode_single_level(results.generator, results.codes["test"], i, index) for i in range(len(names))]
    levels(path, originals, results.reconstructions["test"][index], single, names, labels, results.note)


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
    side = decoded.shape[1] // codes[-1].shape[1]  # The decoder is not trained on cells of the background.
    return np.where(np.kron(codes[-1][index] == 0, np.ones((1, side, side), bool))[..., None], 0, decoded)


def _draw_code_usage(path: Path, results: Results) -> None:
    generator, history = results.generator, _history(results, "vqvae")
    code_usage(path, history, generator.level_names, _codes_in_use(generator), results.note)


def _codes_in_use(generator: Generator) -> int:
    """Number of codes of each codebook without the one that is reserved for background."""
    return generator.num_embeddings - generator.background_code


def _draw_ssim(path: Path, results: Results) -> None:
    ssim(path, _history(results, "vqvae"), results.note)


def _draw_vqvae_loss(path: Path, results: Results) -> None:
    vqvae_loss(path, _history(results, "vqvae"), results.generator.level_names, results.note)


def _draw_prior_loss(path: Path, results: Results) -> None:
    names = model.prior_names(len(results.generator.level_names))
    histories = {name: _history(results, name) for name in names}
    prior_loss(path, histories, results.generator.num_embeddings, results.note)


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
        "error (RMSE). If the model copied its training data, the two rows would be identical.",
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
)


# ---------------------------------------------------------------------------------------------- helpers


def _figure(width: float, height: float, title: str, note: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{title}\n{note}" if note else title, fontsize=11)
    return figure


def _columns(
    count: int, rows: Sequence[str], title: str, note: str, across: int = 5
) -> tuple[Figure, list[list[Axes]], np.ndarray]:
    """Make axes for `count` columns of images, `across` columns beside one another, then a new band below.

    Returns:
        The figure, the axes of each column from the top, and all axes as one array.
    """
    across = min(count, across)
    deep = -(-count // across) * len(rows)
    figure = _figure(1.9 * across + 0.6, 1.95 * deep + 0.8, title, note)
    grid = figure.subplots(deep, across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    columns = []
    for i in range(count):
        top = i // across * len(rows)
        columns.append(list(grid[top : top + len(rows), i % across]))
        for axes, label in zip(columns[-1], rows, strict=True):
            axes.set_axis_on()
            if i % across == 0:
                axes.set_ylabel(label)
    return figure, columns, grid


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)


def _curves(axes: Axes, history: History, name: str, label: str = "") -> None:
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) == 1 else None
    axes.plot(epochs, [row[name] for row in history], label=f"{label}training", marker=marker)
    axes.plot(epochs, [row[f"val_{name}"] for row in history], label=f"{label}validation", marker=marker)
    axes.locator_params("x", integer=True)
    axes.legend()


def _curves_by_level(axes: Axes, history: History, term: str, levels: Sequence[str]) -> None:
    for level in levels:
        _curves(axes, history, f"{level}_{term}".lstrip("_"), f"{level} " if level else "")


def _image(axes: Axes, image: np.ndarray, title: str = "") -> None:
    axes.imshow(image[..., 0], cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=8)
    _remove_frame(axes)


def _remove_frame(axes: Axes) -> None:
    """Remove ticks and frame but keep the label of the row."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
