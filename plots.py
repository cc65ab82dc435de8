"""Functions that draw one picture each; pictures.py lists those of a run.

They take arrays. Their argument `note` goes into the title and says what the data are if they are not real.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3})

DPI = 130  # Pixels per inch of all pictures.
History = list[dict[str, Any]]  # Rows of history.csv of one stage.

# ----------------------------------------------------------------------------------------------- curves


def vqvae_loss(path: Path, history: History, levels: Sequence[str] = ("",), note: str = "") -> None:
    """Draw each term of the VQ-VAE's loss by epoch, for the training and validation splits."""
    figure = _figure(11, 3.2, "VQ-VAE loss", note)
    for axes, term in zip(figure.subplots(1, 3), ("reconstruction", "codebook", "commitment"), strict=True):
        _curves_by_level(axes, history, term, ("",) if term == "reconstruction" else levels)
        axes.set(title=term, xlabel="epoch", ylabel="loss", yscale="log")
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


def metric(path: Path, history: History, name: str, title: str, label: str, note: str = "") -> None:
    """Draw a metric, such as "loss", by epoch for the training and validation splits; `label` says what it is."""
    figure = _figure(5.5, 3.6, title, note)
    axes = figure.subplots()
    _curves(axes, history, name)
    axes.set(xlabel="epoch", ylabel=label)
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
    axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
    axes.minorticks_off()  # Their labels would overlap.
    axes.legend()
    _save(figure, path)


def rate_distortion(path: Path, rows: list[dict[str, Any]], note: str = "") -> None:
    """Draw the quality of reconstructions and samples against bits per image, one point per run.

    Args:
        rows: Each with `name`, the bits `prior_bits_per_image`, and `ssim_brain`, `c2st_reconstructions`,
            `ms_ssim_of_pairs` and `ms_ssim_of_reconstructed_pairs`; NaN or None if it is not known.
    """
    figure = _figure(12, 4, "Rate and distortion on the test split", note)
    bits = [row["prior_bits_per_image"] for row in rows]
    excess = [_number(row["ms_ssim_of_pairs"]) - _number(row["ms_ssim_of_reconstructed_pairs"]) for row in rows]
    panels = {
        "SSIM of reconstructions, brain only": [_number(row["ssim_brain"]) for row in rows],
        "c2st, samples against reconstructions": [_number(row["c2st_reconstructions"]) for row in rows],
        "pairs: MS-SSIM above reconstructions": excess,
    }
    for axes, (label, values) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axes.scatter(bits, values)
        for row, x, y in zip(rows, bits, values, strict=True):
            axes.annotate(row["name"], (x, y), (4, -10), textcoords="offset points", fontsize=7)
        axes.set(xlabel="bits per image, by the prior", ylabel=label, xscale="log")
        axes.margins(x=0.2, y=0.1)
    _save(figure, path)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


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


def comparison(path: Path, sets: dict[str, np.ndarray], labels: Sequence[str], title: str, note: str = "") -> None:
    """Draw sets of images, (N, H, W, 1) in [0, 1] by name, below one another, with N labels of the columns."""
    figure, columns, _ = _columns(len(labels), tuple(sets), title, note)
    for i, column in enumerate(columns):
        for axes, images in zip(column, sets.values(), strict=True):
            _image(axes, images[i], title=labels[i] if axes is column[0] else "")
    _save(figure, path)


def invented_detail(
    path: Path, originals: np.ndarray, drawn: np.ndarray, labels: Sequence[str], note: str = ""
) -> None:
    """Draw images that were decoded from the same codes with different noise, and the standard deviation of each pixel.

    Args:
        originals: (N, H, W, 1) in [0, 1].
        drawn: (N, M, H, W, 1) in [0, 1].
        labels: N labels of the rows.
    """
    rows, count = drawn.shape[:2]
    figure = _figure(1.5 * (count + 2), 1.65 * rows + 0.7, "What codes leave open: the same codes, new noise", note)
    spread = drawn.std(axis=1)
    brightest = max(0.05, float(spread.max()))
    for i, line in enumerate(figure.subplots(rows, count + 2, squeeze=False)):
        _image(line[0], originals[i], title="" if i else "original")
        line[0].set_ylabel(labels[i])
        for j in range(count):
            _image(line[j + 1], drawn[i, j], title="" if i else f"noise {j + 1}")
        line[-1].imshow(spread[i, ..., 0], cmap="magma", vmin=0, vmax=brightest)
        line[-1].set_title("" if i else f"deviation, 0 to {brightest:.2f}", fontsize=8)
        _remove_frame(line[-1])
    _save(figure, path)


def samples(path: Path, images: np.ndarray, positions: np.ndarray, note: str = "") -> None:
    """Draw generated slices in a grid; images (N, H, W, 1) in [0, 1], positions (N,)."""
    columns = min(10, max(5, int(np.ceil(np.sqrt(len(images) * 2)))), len(images))
    labels = [f"slice {position}" for position in positions]
    size = max(1.35 * columns, 4) + 0.2, 1.5
    _draw_grid(path, images, labels, columns, size, f"{len(images)} generated slices", note)


def numbered(path: Path, images: np.ndarray, title: str, note: str = "") -> None:
    """Draw images (N, H, W, 1) in [0, 1] in a grid, numbered from 1."""
    columns, labels = min(8, len(images)), [str(number) for number in range(1, len(images) + 1)]
    _draw_grid(path, images, labels, columns, (1.5 * columns, 1.65), title, note)


def _draw_grid(
    path: Path,
    images: np.ndarray,
    labels: Sequence[str],
    columns: int,
    size: tuple[float, float],
    title: str,
    note: str,
) -> None:
    """Draw labelled images in a grid. `size` is the width of the figure and the height of a row, in inches."""
    rows = -(-len(images) // columns)
    figure = _figure(size[0], size[1] * rows + 0.5, title, note)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, image, label in zip(grid, images, labels, strict=False):
        _image(axes, image, title=label)
    for axes in grid[len(images) :]:
        axes.set_axis_off()
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


# ---------------------------------------------------------------------------------------------- helpers


def _figure(width: float, height: float, title: str, note: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{title}\n{note}" if note else title, fontsize=11)
    return figure


def _columns(count: int, rows: Sequence[str], title: str, note: str) -> tuple[Figure, list[list[Axes]], np.ndarray]:
    """Make axes for `count` columns of images, five columns beside one another, then a new band below.

    Returns:
        The figure, the axes of each column from the top, and all axes as one array.
    """
    across = min(count, 5)
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
    figure.savefig(path, dpi=DPI)


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
