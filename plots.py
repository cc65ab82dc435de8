"""Every picture. Each function writes one PNG; `note` goes into its title, to say what data it shows."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

matplotlib.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3})


def vqvae_loss(path: Path, history: list[dict], note: str = "") -> None:
    """Loss of the VQ-VAE by part and epoch, train and validation, each part in its own panel."""
    figure = _figure(11, 3.2, "VQ-VAE loss", note)
    for axes, part in zip(figure.subplots(1, 3), ("reconstruction", "codebook", "commitment"), strict=True):
        _curves(axes, history, part)
        axes.set(title=part, xlabel="epoch", yscale="log")
    _save(figure, path)


def ssim(path: Path, history: list[dict], note: str = "") -> None:
    """SSIM of reconstructions by epoch, over whole slices."""
    figure = _figure(5.5, 3.6, "SSIM of reconstructions, whole slice", note)
    axes = figure.subplots()
    _curves(axes, history, "ssim")
    axes.set(xlabel="epoch", ylabel="SSIM")
    _save(figure, path)


def codebook(path: Path, history: list[dict], num_embeddings: int, note: str = "") -> None:
    """Share of the codes used and perplexity by epoch."""
    figure = _figure(9, 3.4, f"Use of the {num_embeddings} codes", note)
    used, perplexity = figure.subplots(1, 2)
    _curves(used, history, "codes_used")
    used.set(xlabel="epoch", ylabel="share of codes used", ylim=(0, 1.03))
    _curves(perplexity, history, "perplexity")
    perplexity.axhline(num_embeddings, color="grey", linestyle=":", label="all codes alike")
    perplexity.set(xlabel="epoch", ylabel="perplexity", ylim=(0, None))
    perplexity.legend()
    _save(figure, path)


def prior_loss(path: Path, history: list[dict], num_embeddings: int, note: str = "") -> None:
    """Cross-entropy of the prior by epoch, in nats (left axis) and bits (right axis) a code."""
    figure = _figure(5.5, 3.6, f"Prior: cross-entropy (all codes alike: {np.log(num_embeddings):.2f} nats)", note)
    axes = figure.subplots()
    _curves(axes, history, "loss")
    axes.set(xlabel="epoch", ylabel="nats a code")
    bits = axes.secondary_yaxis("right", functions=(lambda nats: nats / np.log(2), lambda bits: bits * np.log(2)))
    bits.set_ylabel("bits a code")
    _save(figure, path)


def reconstructions(path: Path, originals: np.ndarray, decoded: np.ndarray, positions, note: str = "") -> None:
    """Originals above reconstructions above the error; images (N, H, W, 1) in [0, 1], positions (N,)."""
    count = len(originals)
    figure = _figure(1.35 * count + 0.9, 4.6, "Test slices and their reconstructions", note)
    grid = figure.subplots(3, count, squeeze=False)
    error = (decoded - originals)[..., 0]
    limit = max(0.1, float(np.percentile(np.abs(error), 99.8)))
    for i in range(count):
        _image(grid[0, i], originals[i], title=f"slice {positions[i]}")
        _image(grid[1, i], decoded[i])
        shown = grid[2, i].imshow(error[i], cmap="RdBu_r", vmin=-limit, vmax=limit)
        _bare(grid[2, i])
    for axes, label in zip(grid[:, 0], ("original", "reconstruction", "error"), strict=True):
        axes.set_ylabel(label)
    figure.colorbar(shown, ax=list(grid[2]), fraction=0.02, pad=0.01)
    _save(figure, path)


def codes(path: Path, originals, indices, embeddings, positions, note: str = "") -> None:
    """Test slices above their code maps; a code's colour shows where its vector lies, so like codes look alike.

    originals (N, H, W, 1), indices (N, h, w), embeddings (K, D), positions (N,).
    """
    colours = _code_colours(embeddings)
    count, (height, width) = len(originals), indices.shape[1:]
    title = f"Code indices, {height} × {width} of {len(embeddings)} codes; colour: the first 3 principal components"
    figure = _figure(1.35 * count + 0.3, 3.3, title, note)
    grid = figure.subplots(2, count, squeeze=False)
    for i in range(count):
        _image(grid[0, i], originals[i], title=f"slice {positions[i]}")
        grid[1, i].imshow(colours[indices[i]], interpolation="nearest")
        _bare(grid[1, i])
    grid[0, 0].set_ylabel("original")
    grid[1, 0].set_ylabel("codes")
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


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp.png")
    figure.savefig(unfinished, dpi=130)
    unfinished.replace(path)


def _curves(axes, history: list[dict], name: str) -> None:
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) == 1 else None
    axes.plot(epochs, [row[name] for row in history], label="train", marker=marker)
    axes.plot(epochs, [row[f"val_{name}"] for row in history], label="validation", marker=marker)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


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
