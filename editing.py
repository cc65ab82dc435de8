"""Change parts of slices with the trained networks: sample some codes again, given the others.

The priors sample codes in raster order: row by row, each row from left to right. Given codes that come before all
others, sampling the rest is exact. Given codes that come later, it is approximated by importance resampling (Rubin
1987): several completions are sampled without regard to the later codes, and one of them is chosen with a probability
proportional to that of the later codes given it, and to the weight of the selector, if there is one.

    images = complete(generator, image, half("left", 96), position=12, count=4)      # (4, 96, 96, 1)
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

import seeds
from generator import Generator
from selector import choose

NUM_CANDIDATES = 8  # Completions among which one is chosen.
HALVES: dict[str, Callable[[int], tuple[slice, slice]]] = {
    "left": lambda size: (slice(None), slice(size // 2)),
    "right": lambda size: (slice(None), slice(size // 2, None)),
    "top": lambda size: (slice(size // 2), slice(None)),
    "bottom": lambda size: (slice(size // 2, None), slice(None)),
}


def half(name: str, size: int) -> np.ndarray:
    """Return which pixels of an image are in a half, (size, size) bool. `name` is a key of `HALVES`."""
    kept = np.zeros((size, size), bool)
    kept[HALVES[name](size)] = True
    return kept


def kept_cells(generator: Generator, kept: np.ndarray) -> list[np.ndarray]:
    """Return which codes belong to pixels that are all kept: (H, W) bool -> (h, w) bool per level."""
    return [np.all(kept.reshape(grid, len(kept) // grid, grid, -1), axis=(1, 3)) for grid in generator.vqvae.grids]


def is_exact(generator: Generator, kept: np.ndarray) -> bool:
    """Whether the kept codes come before all others, so that completions need no approximation; (H, W) bool."""
    cells = np.concatenate([level.ravel() for level in kept_cells(generator, kept)])
    return not (cells[1:] & ~cells[:-1]).any()


def complete_codes(
    generator: Generator,
    codes: Sequence[np.ndarray],
    kept: np.ndarray,
    position: int,
    count: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[np.ndarray]:
    """Sample the codes of a region again, given the others; see the module.

    Args:
        generator: The trained networks.
        codes: Codes of one slice, (1, h, w) int32 per level.
        kept: (H, W) bool, pixels that are kept. A code is kept if all of its pixels are.
        position: Slice position.
        count: Number of completions.
        seed, temperature, top_k, top_p: See `Generator.sample_codes`.

    Returns:
        (count, h, w) int32 per level.
    """
    cells, exact = kept_cells(generator, kept), is_exact(generator, kept)
    candidates = max(generator.candidates, 1 if exact else NUM_CANDIDATES)
    known = [
        np.repeat(np.where(mask, indices, -1), count * candidates, axis=0)
        for mask, indices in zip(cells, codes, strict=True)
    ]
    positions = np.full(count * candidates, position, np.int32)
    sampled = generator.propose_codes(positions, seed, temperature, top_k, top_p, "completions", known)
    if candidates == 1:
        return sampled
    log_weights = generator.log_weights(sampled, positions).astype(np.float64)
    if not exact:
        for mask, nats in zip(cells, generator.nats_of_codes(sampled, positions), strict=True):
            log_weights -= (nats * mask).sum(axis=(1, 2))
    chosen = choose(log_weights.reshape(count, candidates), seeds.generator(seed, "choice of completions"))
    return [level[chosen] for level in sampled]


def complete(
    generator: Generator,
    image: np.ndarray,
    kept: np.ndarray,
    position: int,
    count: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> np.ndarray:
    """Draw a region of a slice again, given the rest.

    What the region shows is not used. Codes depend on more than their own pixels, so the region is filled before the
    slice is encoded: with the pixels on the other side of the midline, or, if those are hidden, too, with a draft,
    for which the slice is completed once already. If that brings the kept codes nearer to the beginning, image and
    mask are mirrored, and the result is mirrored back.

    Args:
        generator: The trained networks.
        image: (H, W, 1) float32 in [0, 1].
        kept, position, count, seed, temperature, top_k, top_p: See `complete_codes`.

    Returns:
        (count, H, W, 1) float32 in [0, 1]: the image itself where its codes are kept.
    """
    mirrored = _unknown_before_kept(generator, kept[:, ::-1]) < _unknown_before_kept(generator, kept)
    step = -1 if mirrored else 1
    mask, limits = kept[:, ::step], (temperature, top_k, top_p)
    filled, known = np.where(kept[..., None], image, image[:, ::-1]), kept | kept[:, ::-1]
    if not known.all():
        filled = _with_nearest(filled, known)
        codes, draft_seed = generator.encode(filled[None, :, ::step]), seeds.number(seed, "draft of completions")
        draft = generator.decode(complete_codes(generator, codes, mask, position, 1, draft_seed, *limits))
        filled = np.where(known[..., None], filled, draft[0, :, ::step])
    codes = generator.encode(filled[None, :, ::step])
    completed = complete_codes(generator, codes, mask, position, count, seed, *limits)
    drawn = generator.draw(completed, seed, "completions")[:, :, ::step]
    finest = kept_cells(generator, kept)[-1]
    side = len(kept) // len(finest)
    return np.where(np.kron(finest, np.ones((side, side), bool))[..., None], image, drawn)


def _with_nearest(image: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Replace the unknown pixels of an image (H, W, 1) by the nearest `known` ones, (H, W) bool; by 0 if none is."""
    if not known.any():
        return np.zeros_like(image)
    rows, columns = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    return image[rows, columns]


def _unknown_before_kept(generator: Generator, kept: np.ndarray) -> int:
    """Number of pairs of a code that is sampled and a later one that is kept."""
    cells = np.concatenate([level.ravel() for level in kept_cells(generator, kept)])
    return int((np.cumsum(~cells) * cells).sum())
