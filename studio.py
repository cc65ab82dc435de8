"""What the page of app.py can do with a finished run."""

import base64
import csv
import io
import secrets
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import nibabel as nib
import numpy as np
from PIL import Image

import console
import dataset
import editing
import naming
import oasis
import pngs
from generator import Generator

MAX_IMAGES = 48  # per request
FIRST_COUNT = 8  # brains that app.html draws at first
NUM_SEEDS = 2**32
MAX_VOLUMES = 4  # that are kept in memory
MAX_BITS = 12  # per code, of the brightest colour of a map
FRAME_MS = 120  # of a film


class BadRequest(Exception):
    """A request that cannot be answered; the message says why."""


class Studio:
    """What the page can do with a run. Each tool takes the JSON of a request and returns that of the answer.

    A brain is a dictionary: `codes`, code indices (h, w) per level; `noise`, the seed of the sharp decoder's noise;
    `position`, its slice position; and `image`, a PNG as a data URL, which only answers have.

    Args:
        generator: The trained networks.
        name: Name of the run.
        unseen_bits: (N,) bits of the codes of slices of unseen subjects, to compare others with; may be empty.
    """

    def __init__(self, generator: Generator, name: str, unseen_bits: np.ndarray) -> None:
        self.generator, self.name, self.unseen_bits = generator.compiled(), name, np.sort(unseen_bits)
        self.volumes: dict[str, oasis.Volume] = {}
        self.opening = threading.Lock()
        self.tools: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "draw": self.draw,
            "redraw": self.redraw,
            "vary": self.vary,
            "complete": self.complete,
            "walk": self.walk,
            "positions": self.positions,
            "slice": self.slice,
        }

    @classmethod
    def load(cls, run_dir: Path) -> "Studio":
        """Load a finished run. Raises `UserError` if it cannot be used."""
        bits, table = [], run_dir / "test_slices.csv"
        if table.is_file():
            with table.open(encoding="utf-8", newline="") as file:
                bits = [sum(float(v) for k, v in row.items() if k.endswith("nats")) for row in csv.DictReader(file)]
        return cls(Generator.load(run_dir), run_dir.resolve().name, np.array(bits) / np.log(2))

    def info(self) -> dict[str, Any]:
        """What the page needs to know about the run."""
        vqvae = self.generator.vqvae
        counts, edges = np.histogram(self.unseen_bits, bins=24) if len(self.unseen_bits) else ([], [])
        return {
            "name": self.name,
            "size": vqvae.image_size,
            "grids": list(vqvae.grids),
            "codes": self.generator.num_embeddings,
            "positions": self.generator.positions.tolist(),
            "sharp": self.generator.decoder is not None,
            "levels": list(self.generator.level_names),
            "max_bits": MAX_BITS,
            "unseen": {"counts": np.asarray(counts).tolist(), "edges": np.asarray(edges).tolist()},
        }

    def prepare(self) -> None:
        """Draw what the page draws at first. This compiles the networks, so that the first request does not wait."""
        position = int(self.generator.positions[0])
        self.draw({"position": position, "seed": 0, "temperature": 1.0, "top_p": 1.0, "count": FIRST_COUNT})
        self.generator.sample_codes([position] * FIRST_COUNT, top_p=0.9)

    def draw(self, request: dict[str, Any]) -> dict[str, Any]:
        """Draw new brains at a position."""
        position, count, seed = self._position(request), _integer(request, "count", 1, MAX_IMAGES), _seed(request)
        codes = self.generator.sample_codes([position] * count, seed, **_limits(request))
        seeds = _consecutive(seed, count)
        return {"brains": _describe(codes, position, seeds, self._images(codes, seeds))}

    def redraw(self, request: dict[str, Any]) -> dict[str, Any]:
        """Draw the codes of a brain with other noise. Also returns the standard deviation of each pixel as a map."""
        brain, count, seed = self._brain(request, "brain"), _integer(request, "count", 1, MAX_IMAGES), _seed(request)
        codes = [np.repeat(level, count, axis=0) for level in brain["codes"]]
        images = self._images(codes, seeds := _consecutive(seed, count))
        return {
            "brains": _describe(codes, brain["position"], seeds, images),
            "deviation": _map_url(images.std(axis=0)[..., 0], 0.1),
        }

    def vary(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sample the codes of a region of a brain again."""
        brain, kept, seed = self._brain(request, "brain"), self._kept(request), _seed(request)
        count = _integer(request, "count", 1, MAX_IMAGES)
        limits = _limits(request)
        codes = editing.complete_codes(self.generator, brain["codes"], kept, brain["position"], count, seed, **limits)
        seeds = [brain["noise"]] * count
        return {
            "brains": _describe(codes, brain["position"], seeds, self._images(codes, seeds)),
            "exact": editing.is_exact(self.generator, kept),
        }

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """Draw a region of an image again, given the rest."""
        image, kept, position = self._image(request), self._kept(request), self._position(request)
        count, seed = _integer(request, "count", 1, MAX_IMAGES), _seed(request)
        images = editing.complete(self.generator, image, kept, position, count, seed, **_limits(request))
        exact = editing.is_exact(self.generator, kept) or editing.is_exact(self.generator, kept[:, ::-1])
        return {"images": [_image_url(drawn) for drawn in images], "exact": exact}

    def walk(self, request: dict[str, Any]) -> dict[str, Any]:
        """Draw the way from one brain to another."""
        first, second = self._brain(request, "first"), self._brain(request, "second")
        steps = _integer(request, "steps", 2, MAX_IMAGES)
        images = self.generator.walk(first["codes"], second["codes"], steps, first["noise"])
        return {"images": [_image_url(image) for image in images], "film": _film_url(images)}

    def positions(self, request: dict[str, Any]) -> dict[str, Any]:
        """Draw a brain at every slice position with the same random numbers."""
        positions, seed = self.generator.positions, _seed(request)
        codes = self.generator.sample_codes(positions, seed, **_limits(request), is_common=True)
        images = self.generator.draw(codes, seed, is_common=True)
        urls = [_image_url(image) for image in images]
        return {"images": urls, "positions": positions.tolist(), "film": _film_url(images)}

    def slice(self, request: dict[str, Any]) -> dict[str, Any]:
        """Reconstruct an image, and say where its codes are improbable.

        If the request has no position, the one is used at which the codes are most probable.
        """
        image = self._image(request)
        if image.max() <= pngs.BRAIN_THRESHOLD:
            raise BadRequest("the slice shows no brain: choose another height or another file")
        codes, positions = self.generator.encode(image[None]), self.generator.positions
        if request.get("position") is not None:
            positions = np.array([self._position(request)])
        repeated = [np.repeat(level, len(positions), axis=0) for level in codes]
        nats = self.generator.nats_of_codes(repeated, positions)  # (positions, h, w) per level
        totals = sum(level.sum(axis=(1, 2)) for level in nats) / np.log(2)
        best = int(np.argmin(totals))
        decoded = self.generator.decode(codes)[0]
        below = np.searchsorted(self.unseen_bits, totals[best]) / max(len(self.unseen_bits), 1)
        return {
            "brain": _describe(codes, int(positions[best]), [0], self._images(codes, [0]))[0],
            "original": _image_url(image),
            "faithful": _image_url(decoded),
            "error": _map_url(np.abs(decoded - image)[..., 0], 0.3),
            "bits_maps": [_map_url(self._enlarged(level[best]) / np.log(2), MAX_BITS) for level in nats],
            "bits": float(totals[best]),
            "mean_error": float(np.abs(decoded - image).mean()),
            "fraction_below": float(below) if len(self.unseen_bits) else None,
            "unseen": len(self.unseen_bits),
        }

    # ------------------------------------------------------------------------------------------- files

    def open_file(self, name: str, content: bytes, orientation: str = "") -> dict[str, Any]:
        """Read a PNG, or a volume of which the page then asks for slices.

        Args:
            name: Name of the file.
            content: Its bytes.
            orientation: Where the axes of a volume point, such as "LIA". Empty if its affine says so.

        Returns:
            `image`, a PNG as a data URL, with its slice position if the file's name says it; or `volume`, a key for the
            requests that follow, and whether its header says where its axes point.
        """
        if orientation and not oasis.is_orientation(orientation.upper()):
            raise BadRequest(f"orientation is {orientation}: must be three letters such as LIA, one for each axis")
        with tempfile.TemporaryDirectory() as folder:
            suffix = next((s for s in (*naming.VOLUME_SUFFIXES, ".png") if name.lower().endswith(s)), None)
            if suffix is None:
                raise BadRequest(f"{name}: is neither a PNG nor a NIfTI or MGH volume; choose another file")
            if suffix.startswith((".img", ".hdr")):
                raise BadRequest(f"{name}: Analyze volumes consist of two files; convert them to NIfTI first")
            path = Path(folder) / f"file{suffix}"
            path.write_bytes(content)
            size, crop = self.generator.vqvae.image_size, self.generator.crop
            try:
                if suffix == ".png":
                    grey = pngs.decode(path, size, crop).grey
                    return {"image": _url(Image.fromarray(grey)), "position": self._position_of(name)}
                volume = oasis.read_volume(path, name, orientation.upper() or None)
                is_oriented = bool(orientation) or _is_oriented(path)
            except console.UserError as error:
                raise BadRequest(str(error).replace(str(path), name)) from error
        key = secrets.token_urlsafe(12)
        with self.opening:
            while len(self.volumes) >= MAX_VOLUMES:
                del self.volumes[next(iter(self.volumes))]
            self.volumes[key] = volume
        return {"volume": key, "is_oriented": is_oriented}

    def _position_of(self, name: str) -> int | None:
        position = naming.slice_position(name)
        return position if position in self.generator.positions.tolist() else None

    # ---------------------------------------------------------------------------------------- requests

    def _position(self, request: dict[str, Any]) -> int:
        positions = self.generator.positions
        position = _integer(request, "position", int(positions.min()), int(positions.max()))
        if position not in positions:
            raise BadRequest(f"position is {position}: no training slice has this position")
        return position

    def _brain(self, request: dict[str, Any], key: str) -> dict[str, Any]:
        brain = request.get(key)
        if not isinstance(brain, dict) or not isinstance(brain.get("codes"), list):
            raise BadRequest(f"{key} is missing: draw or open a brain first")
        codes, grids = brain["codes"], self.generator.vqvae.grids
        try:
            arrays = [np.array(level) for level in codes]
        except ValueError as error:
            raise BadRequest(f"{key} has codes of another shape than {self.name} uses") from error
        if any(array.dtype.kind not in "iu" for array in arrays):
            raise BadRequest(f"{key} has codes that are not whole numbers")
        if [array.shape for array in arrays] != [(grid, grid) for grid in grids]:
            raise BadRequest(f"{key} has codes of another shape than {self.name} uses")
        if any(array.min() < 0 or array.max() >= self.generator.num_embeddings for array in arrays):
            raise BadRequest(f"{key} has codes outside of 0 to {self.generator.num_embeddings - 1}")
        return {
            "codes": [array.astype(np.int32)[None] for array in arrays],
            "noise": _integer(brain, "noise", 0, NUM_SEEDS - 1),
            "position": self._position(brain),
        }

    def _kept(self, request: dict[str, Any]) -> np.ndarray:
        """Which pixels are kept, (H, W) bool, from `drawn`: which cells of the finest grid are drawn again."""
        grid, size = self.generator.vqvae.grids[-1], self.generator.vqvae.image_size
        drawn = request.get("drawn")
        if (
            not isinstance(drawn, list)
            or len(drawn) != grid * grid
            or any(v not in (0, 1) for v in drawn)
            or not any(drawn)
        ):
            raise BadRequest(f"drawn must be {grid * grid} numbers, 0 or 1, and not all 0: mark a region first")
        cells = np.array(drawn, bool).reshape(grid, grid)
        return ~np.kron(cells, np.ones((size // grid,) * 2, bool))

    def _image(self, request: dict[str, Any]) -> np.ndarray:
        """The image (H, W, 1) in [0, 1] of a request: `image`, a data URL, or the slice of a volume."""
        if "volume" in request:
            return self._volume_slice(request)
        url, size = request.get("image"), self.generator.vqvae.image_size
        if not isinstance(url, str) or not url.startswith("data:image/png;base64,"):
            raise BadRequest("image is missing: choose a slice first")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "image.png"
            try:
                path.write_bytes(base64.b64decode(url.partition(",")[2]))
                decoded = pngs.decode(path, size)
            except console.UserError as error:
                raise BadRequest(str(error).replace(str(path), "image")) from error
            except ValueError as error:
                raise BadRequest("image: is not base64") from error
        if decoded.size != (size, size):
            width, height = decoded.size
            raise BadRequest(f"image: has {width} × {height} pixels, must have {size} × {size}")
        return dataset.to_float(decoded.grey)[..., None]

    def _volume_slice(self, request: dict[str, Any]) -> np.ndarray:
        volume = self.volumes.get(str(request["volume"]))
        if volume is None:
            raise BadRequest("the volume is no longer in memory: open it again")
        height = _number(request, "height", 0, 100) / 100
        grey = oasis.cut_slice(volume, height * (volume.data.shape[2] - 1))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "slice.png"
            Image.fromarray(grey).save(path)
            decoded = pngs.decode(path, self.generator.vqvae.image_size, self.generator.crop)
        return dataset.to_float(decoded.grey)[..., None]

    def _images(self, codes: Sequence[np.ndarray], seeds: Sequence[int]) -> np.ndarray:
        """Draw codes (N, h, w) per level as images (N, H, W, 1), each with the noise that its seed alone gives."""
        return np.concatenate(
            [self.generator.draw([level[i : i + 1] for level in codes], seed) for i, seed in enumerate(seeds)]
        )

    def _enlarged(self, cells: np.ndarray) -> np.ndarray:
        """Repeat the cells of a grid (h, w) to the size of an image (H, W)."""
        side = self.generator.vqvae.image_size // len(cells)
        return cells.repeat(side, axis=0).repeat(side, axis=1)


def _consecutive(seed: int, count: int) -> list[int]:
    """`count` seeds, the first one being `seed`."""
    return [(seed + i) % NUM_SEEDS for i in range(count)]


def _describe(
    codes: Sequence[np.ndarray], position: int, seeds: Sequence[int], images: np.ndarray
) -> list[dict[str, Any]]:
    """Brains, as the page gets them, of codes (N, h, w) per level, N seeds and images (N, H, W, 1)."""
    return [
        {"codes": [c[i].tolist() for c in codes], "position": position, "noise": seed, "image": _image_url(images[i])}
        for i, seed in enumerate(seeds)
    ]


def _is_oriented(path: Path) -> bool:
    """Whether the header of a volume says where its axes point."""
    image: Any = nib.load(path)
    is_nifti = isinstance(image.header, nib.Nifti1Header)
    says_nothing = is_nifti and image.header["sform_code"] == image.header["qform_code"] == 0
    return not (says_nothing or np.array_equal(image.affine, np.eye(4)))


def _integer(request: dict[str, Any], name: str, lowest: int, highest: int) -> int:
    value = request.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise BadRequest(f"{name} is {value!r}: must be a whole number from {lowest} to {highest}")
    return value


def _number(request: dict[str, Any], name: str, lowest: float, highest: float) -> float:
    value = request.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not lowest <= value <= highest:
        raise BadRequest(f"{name} is {value!r}: must be a number from {lowest:g} to {highest:g}")
    return float(value)


def _seed(request: dict[str, Any]) -> int:
    return _integer(request, "seed", 0, NUM_SEEDS - 1)


def _limits(request: dict[str, Any]) -> dict[str, Any]:
    return {
        "temperature": _number(request, "temperature", 0.05, 5),
        "top_p": _number(request, "top_p", 0.01, 1),
    }


def _image_url(image: np.ndarray) -> str:
    """A grey image (H, W, 1) in [0, 1] as a PNG in a data URL."""
    return _url(_grey(image))


def _film_url(images: np.ndarray) -> str:
    """Grey images (N, H, W, 1) in [0, 1] as an animated PNG in a data URL: there, and back again."""
    frames = [_grey(image) for image in [*images, *images[-2:0:-1]]]
    return _url(frames[0], save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)


def _grey(image: np.ndarray) -> Image.Image:
    return Image.fromarray(dataset.to_uint8(image[..., 0]))


def _map_url(values: np.ndarray, brightest: float) -> str:
    """Numbers (H, W) from 0 to `brightest` in colours, as a PNG in a data URL."""
    colours = matplotlib.colormaps["inferno"](np.clip(values / brightest, 0, 1), bytes=True)
    return _url(Image.fromarray(colours[..., :3]))


def _url(image: Image.Image, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
