"""Every picture. Each function writes one PNG; `note` goes into its title, to say what data it shows."""

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

matplotlib.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3})


def vqvae_loss(path: Path, history: list[dict], levels: tuple[str, ...] = ("",), note: str = "") -> None:
    """Loss of the VQ-VAE by part and epoch, train and validation, each part in its own panel."""
    figure = _figure(11, 3.2, "VQ-VAE loss", note)
    for axes, part in zip(figure.subplots(1, 3), ("reconstruction", "codebook", "commitment"), strict=True):
        _curves_by_level(axes, history, part, ("",) if part == "reconstruction" else levels)
        axes.set(title=part, xlabel="epoch", yscale="log")
    _save(figure, path)


def ssim(path: Path, history: list[dict], note: str = "") -> None:
    """SSIM of reconstructions by epoch, over whole slices."""
    figure = _figure(5.5, 3.6, "SSIM of reconstructions, whole slice", note)
    axes = figure.subplots()
    _curves(axes, history, "ssim")
    axes.set(xlabel="epoch", ylabel="SSIM")
    _save(figure, path)


def code_usage(path: Path, history: list[dict], levels: tuple[str, ...], num_embeddings: int, note: str = "") -> None:
    """Share of the codes used and perplexity by epoch."""
    figure = _figure(9, 3.4, f"Use of the {num_embeddings} codes", note)
    used, perplexity = figure.subplots(1, 2)
    _curves_by_level(used, history, "codes_used", levels)
    used.set(xlabel="epoch", ylabel="share of codes used", ylim=(0, 1.03))
    _curves_by_level(perplexity, history, "perplexity", levels)
    perplexity.axhline(num_embeddings, color="grey", linestyle=":", label="all codes alike")
    perplexity.set(xlabel="epoch", ylabel="perplexity", ylim=(0, None))
    perplexity.legend()
    _save(figure, path)


def codebook(
    path: Path,
    codes: list[np.ndarray],
    decoded: np.ndarray,
    num_embeddings: int,
    levels: tuple[str, ...] = ("",),
    note: str = "",
) -> None:
    """What each code decodes to: the mean of the decoded images around the places where it stands.

    A code means nothing alone: the decoder reads it among its neighbours. So each tile is the mean over up to 200
    places, the code's own pixels in the middle and half as many again on each side.

    codes: (N, h, w) code indices of each level; decoded (N, H, W, 1) in [0, 1], the images that the decoder made.
    """
    sheets = [_code_tiles(indices, decoded, num_embeddings) for indices in codes]
    height = sum(11 * sheet.shape[0] / sheet.shape[1] + 0.4 for sheet in sheets)
    figure = _figure(11, 0.5 + height, "What each code in use decodes to, most used first, row by row", note)
    ratios = [sheet.shape[0] / sheet.shape[1] for sheet in sheets]
    for axes, sheet, indices, level in zip(
        figure.subplots(len(sheets), 1, squeeze=False, height_ratios=ratios)[:, 0], sheets, codes, levels, strict=True
    ):
        cell = decoded.shape[1] // indices.shape[1]
        axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        title = f"{len(np.unique(indices))} codes of {cell} × {cell} pixels, and half as much around"
        axes.set_title(f"{level}: {title}" if level else title)
        _bare(axes)
    _save(figure, path)


def _code_tiles(indices: np.ndarray, decoded: np.ndarray, num_embeddings: int) -> np.ndarray:
    """One sheet with a tile for each code in use, white between them."""
    counts = np.bincount(indices.ravel(), minlength=num_embeddings)
    order = [code for code in np.argsort(-counts, kind="stable") if counts[code]]
    cell = decoded.shape[1] // indices.shape[1]
    margin = cell // 2
    padded = np.pad(decoded[..., 0], ((0, 0), (margin, margin), (margin, margin)))
    size, columns = cell + 2 * margin, int(np.ceil(np.sqrt(2 * len(order))))
    step = size + max(size // 8, 1)
    sheet = np.ones((-(-len(order) // columns) * step, columns * step))
    places = np.argsort(indices.ravel(), kind="stable")  # all places of a code lie together
    starts = np.concatenate([[0], np.cumsum(counts)])
    for i, code in enumerate(order):
        chosen = places[starts[code] : starts[code + 1]]
        chosen = chosen[:: -(-len(chosen) // 200)]
        n, row, column = np.unravel_index(chosen, indices.shape)
        tiles = [padded[k, r : r + size, c : c + size] for k, r, c in zip(n, row * cell, column * cell, strict=True)]
        top, left = i // columns * step, i % columns * step
        sheet[top : top + size, left : left + size] = np.mean(tiles, axis=0)
    return sheet


def prior_loss(path: Path, histories: dict[str, list[dict]], num_embeddings: int, note: str = "") -> None:
    """Cross-entropy of each prior by epoch, {name: history}, in nats (left axis) and bits (right axis) a code."""
    figure = _figure(
        5.5 * len(histories), 3.6, f"Prior: cross-entropy (all codes alike: {np.log(num_embeddings):.2f} nats)", note
    )
    for axes, (name, history) in zip(
        figure.subplots(1, len(histories), squeeze=False)[0], histories.items(), strict=True
    ):
        _curves(axes, history, "loss")
        axes.set(xlabel="epoch", ylabel="nats a code", title=name.replace("_", " ") if len(histories) > 1 else "")
        bits = axes.secondary_yaxis("right", functions=(lambda nats: nats / np.log(2), lambda bits: bits * np.log(2)))
        bits.set_ylabel("bits a code")
    _save(figure, path)


def reconstructions(
    path: Path,
    originals: np.ndarray,
    decoded: np.ndarray,
    labels: list[str],
    note: str = "",
    title: str = "Test slices and their reconstructions",
) -> None:
    """Originals above reconstructions above the error; images (N, H, W, 1) in [0, 1], a label for each."""
    error = (decoded - originals)[..., 0]
    limit = max(0.1, float(np.percentile(np.abs(error), 99.8)))
    figure, columns, grid = _columns(len(originals), ("original", "reconstruction", "error"), title, note)
    for i, (original, reconstruction, difference) in enumerate(columns):
        _image(original, originals[i], title=labels[i])
        _image(reconstruction, decoded[i])
        shown = difference.imshow(error[i], cmap="RdBu_r", vmin=-limit, vmax=limit)
        _bare(difference)
    figure.colorbar(shown, ax=grid, fraction=0.03, pad=0.01, shrink=0.5)
    _save(figure, path)


def by_position(path: Path, rows: list[dict], note: str = "") -> None:
    """Quality of reconstructions by slice position; rows as `by_position` of metrics.json."""
    figure = _figure(9, 3.4, "Reconstructions by slice position, means over test slices", note)
    similarity, psnr = figure.subplots(1, 2)
    positions = [row["position"] for row in rows]
    for name, label in (("ms_ssim", "MS-SSIM"), ("ssim", "SSIM"), ("ssim_brain", "SSIM, brain only")):
        values = [math.nan if row[name] is None else row[name] for row in rows]
        similarity.plot(positions, values, label=label, marker=".")
    similarity.set(xlabel="slice position", ylabel="similarity")
    similarity.legend()
    psnr.plot(positions, [row["psnr_db"] for row in rows], marker=".")
    psnr.set(xlabel="slice position", ylabel="PSNR, dB")
    for axes in (similarity, psnr):
        axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def power_spectrum(path: Path, spectra: dict[str, np.ndarray], half_power: float, note: str = "") -> None:
    """Radially averaged power of several sets of images, {name: (S // 2,)}; a line where half the power is lost."""
    figure = _figure(6.5, 4.2, "Sharpness: power by spatial frequency", note)
    axes = figure.subplots()
    for name, power in spectra.items():
        axes.plot(np.arange(1, len(power) + 1) / (2 * len(power)), power, label=name)
    axes.axvline(half_power, color="grey", linestyle=":", label=f"half the power up to {half_power:.2f}")
    axes.set(xlabel="cycles a pixel", ylabel="power", xscale="log", yscale="log")
    axes.legend()
    _save(figure, path)


def rate_distortion(path: Path, rows: list[dict], note: str = "") -> None:
    """What reconstructions are worth against what they cost: a line for each codebook size, a point for each grid.

    Each row has `grid`, `num_embeddings`, `prior_bits_per_image`, `ssim`, `ssim_brain` and `psnr_db`.
    """
    figure = _figure(11, 4, "Rate and distortion on the test split", note)
    measures = {"ssim": "SSIM", "ssim_brain": "SSIM, brain only", "psnr_db": "PSNR, dB"}
    for axes, (name, label) in zip(figure.subplots(1, 3), measures.items(), strict=True):
        for size in sorted({row["num_embeddings"] for row in rows}):
            line = sorted((r for r in rows if r["num_embeddings"] == size), key=lambda row: row["prior_bits_per_image"])
            bits, values = [row["prior_bits_per_image"] for row in line], [row[name] for row in line]
            axes.plot(bits, values, marker="o", label=f"{size} codes")
            for row, x, y in zip(line, bits, values, strict=True):
                axes.annotate(
                    f"{row['grid']} × {row['grid']}", (x, y), (4, -10), textcoords="offset points", fontsize=7
                )
        axes.set(xlabel="bits an image, by the prior", ylabel=label, xscale="log")
        axes.margins(x=0.2, y=0.1)
        axes.legend()
    _save(figure, path)


def copies(path: Path, drawn, nearest, labels: list[str], note: str = "") -> None:
    """New brains above the training slices nearest to them; both (N, H, W, 1) in [0, 1], a label for each."""
    title = "The new brains nearest to a training slice, and that slice"
    figure, columns, _ = _columns(len(drawn), ("new", "training slice"), title, note)
    for i, (above, below) in enumerate(columns):
        _image(above, drawn[i], title=labels[i])
        _image(below, nearest[i])
    _save(figure, path)


def codes(
    path: Path,
    originals: np.ndarray,
    codes: list[np.ndarray],
    embeddings: list[np.ndarray],
    levels: tuple[str, ...],
    labels: list[str],
    note: str = "",
) -> None:
    """Test slices above their code maps; a code's colour shows where its vector lies, so like codes look alike.

    originals (N, H, W, 1); for each level indices (N, h, w) and embeddings (K, D); a label for each slice.
    """
    grids = " and ".join(f"{indices.shape[1]} × {indices.shape[2]}" for indices in codes)
    title = f"Code indices, {grids} of {len(embeddings[0])} codes; colour: the first 3 principal components"
    figure, columns, _ = _columns(len(originals), ("original", *[f"{level} codes" for level in levels]), title, note)
    colours = [_code_colours(vectors) for vectors in embeddings]
    for i, (original, *maps) in enumerate(columns):
        _image(original, originals[i], title=labels[i])
        for axes, colour, indices in zip(maps, colours, codes, strict=True):
            axes.imshow(colour[indices[i]], interpolation="nearest")
            _bare(axes)
    _save(figure, path)


def levels(
    path: Path,
    originals: np.ndarray,
    decoded: np.ndarray,
    alone: list[np.ndarray],
    levels: tuple[str, ...],
    labels: list[str],
    note: str = "",
) -> None:
    """What each level holds: slices, their reconstructions, and images of one level's codes alone.

    originals, decoded and, for each level, alone: (N, H, W, 1) in [0, 1]; a label for each slice.
    """
    rows = ("original", "all codes", *[f"{level} codes alone" for level in levels])
    title = "What each level holds: the other level's codes replaced by their mean"
    figure, columns, _ = _columns(len(originals), rows, title, note)
    for i, column in enumerate(columns):
        for axes, images in zip(column, (originals, decoded, *alone), strict=True):
            _image(axes, images[i], title=labels[i] if axes is column[0] else "")
    _save(figure, path)


def samples(path: Path, images: np.ndarray, positions, note: str = "") -> None:
    """New brains as one grid; images (N, H, W, 1) in [0, 1], positions (N,)."""
    columns = min(10, max(5, int(np.ceil(np.sqrt(len(images) * 2)))), len(images))
    rows = -(-len(images) // columns)
    figure = _figure(max(1.35 * columns, 4) + 0.2, 1.5 * rows + 0.5, f"{len(images)} new brains", note)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, position in zip(grid.flat, images, positions, strict=False):
        axes.set_axis_on()
        _image(axes, image, title=f"slice {position}")
    _save(figure, path)


def samples_by_position(path: Path, originals: np.ndarray, drawn: np.ndarray, positions, note: str = "") -> None:
    """One column for each slice position: a test slice above samples drawn for that position.

    originals (P, H, W, 1), drawn (P, S, H, W, 1), positions (P,).
    """
    columns, rows = drawn.shape[:2]
    figure = _figure(1.35 * columns + 0.4, 1.4 * (rows + 1) + 0.7, "New brains by slice position", note)
    grid = figure.subplots(rows + 1, columns, squeeze=False)
    for column in range(columns):
        _image(grid[0, column], originals[column], title=f"slice {positions[column]}")
        for row in range(rows):
            _image(grid[row + 1, column], drawn[column, row])
    grid[0, 0].set_ylabel("test slice")
    for axes in grid[1:, 0]:
        axes.set_ylabel("new")
    _save(figure, path)


def _figure(width: float, height: float, title: str, note: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{title}\n{note}" if note else title, fontsize=11)
    return figure


def _columns(count: int, rows: tuple[str, ...], title: str, note: str, across: int = 5):
    """Axes for `count` columns of pictures, as many rows each; what does not fit beside goes below.

    Returns the figure, the axes of each column from above, and all axes as one array.
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


def _curves(axes, history: list[dict], name: str, label: str = "") -> None:
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) == 1 else None
    axes.plot(epochs, [row[name] for row in history], label=f"{label}train", marker=marker)
    axes.plot(epochs, [row[f"val_{name}"] for row in history], label=f"{label}validation", marker=marker)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def _curves_by_level(axes, history: list[dict], part: str, levels: tuple[str, ...]) -> None:
    for level in levels:
        _curves(axes, history, f"{level}_{part}".lstrip("_"), f"{level} " if level else "")


def _image(axes, image: np.ndarray, title: str = "") -> None:
    axes.imshow(image[..., 0], cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=8)
    _bare(axes)


def _bare(axes) -> None:
    """No ticks, no frame; the label of the row stays."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _code_colours(embeddings: np.ndarray) -> np.ndarray:
    """(K, D) codebook to (K, 3) colours in [0, 1]: ranks along its first three principal components."""
    centred = embeddings - embeddings.mean(axis=0)
    components = np.linalg.svd(centred, full_matrices=False)[2][:3]
    ranks = (centred @ components.T).argsort(axis=0).argsort(axis=0) / max(len(embeddings) - 1, 1)
    return np.pad(ranks, ((0, 0), (0, 3 - ranks.shape[1])), constant_values=0.5)
