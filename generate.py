"""Draw, complete and reconstruct slices with a finished run. The run folder is only read.

    python generate.py runs/oasis96 --num-samples 200 --positions 10 12 --temperature 0.9 --output drawn
    python generate.py runs/oasis96 --complete case_001_slice_12.png --keep left --num-samples 4 --output completed
    python generate.py runs/oasis96 --reconstruct slices --output reconstructed

    python generate.py runs/oasis96 --compact small
    python generate.py runs/oasis96 --export oasis96.onnx

Everything is written to a new folder. If the command is stopped, nothing is written. `--compact` writes a copy of the
networks with rounded weights, to pass on: a third as large, and read like the run. `--export` writes the encoder with
its quantizer, oasis96_encoder.onnx, and the decoder, oasis96_decoder.onnx; it needs `pip install tf2onnx`.
"""

import console

if __name__ == "__main__":
    console.start()
console.import_tensorflow()

import csv
import itertools
import json
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
import tyro
from PIL import Image

import dataset
import editing
import metrics
import model
import naming
import pngs
import saving
import seeds
from generator import Generator
from options import sampling_arguments
from run import atomic_path, write_json, write_table

ONNX_OPSET = 18
MANTISSA_BITS = 7  # Of the weights in a compact copy, as in bfloat16.


class GenerateError(console.UserError):
    """An option or a file that cannot be used."""


@dataclass(frozen=True)
class Options:
    """RUN_DIR is required, and --output unless --compact or --export is given."""

    run_dir: tyro.conf.Positional[Path]  # folder of a finished run
    output: Path | None = None  # new folder for the slices that are written
    complete: Path | None = None  # PNG of a slice of which a half is drawn again
    keep: Literal["left", "right", "top", "bottom"] = "left"  # half of the picture that is kept, with --complete
    reconstruct: Path | None = None  # PNG, or folder of PNGs, to encode and decode
    num_samples: int = 20  # number of slices, or of completions, to draw
    positions: tuple[int, ...] = ()  # slice positions, in turn; none: at random, or that of the PNG to complete
    seed: int = 0  # the same seed draws the same slices
    temperature: float = 1.0  # below 1 favours likely codes, above 1 varied ones
    top_k: int = 0  # sample among the k most likely codes only; 0: all
    top_p: float = 1.0  # sample among the most likely codes that together have this probability
    num_candidates: int | None = None  # number of grids that the selector chooses among; None: as in the run
    sharp: bool = True  # draw with the sharp decoder, if the run has one
    skip_broken_slices: bool = False  # leave out PNGs that cannot be read, with --reconstruct
    compact: Path | None = None  # new folder for a small copy of the networks
    export: Path | None = None  # export encoder and decoder to ONNX files with this name, and draw nothing


def main(options: Options) -> None:
    """Write what the options ask for.

    Raises:
        UserError: An option, a file, or the run folder cannot be used.
    """
    check(options)
    generator = Generator.load(options.run_dir)
    if not options.sharp:
        generator = generator.replace(decoder=None)
    if options.num_candidates:
        generator = generator.replace(num_candidates=options.num_candidates)
    if options.export:
        export(generator, options.export)
        return
    if options.compact:
        compact(generator, options.run_dir, options.compact)
        return
    assert options.output
    unknown = set(options.positions) - set(generator.positions.tolist())
    if unknown and not options.reconstruct:
        known = f"{generator.positions.min()} to {generator.positions.max()}"
        raise GenerateError(f"--positions {min(unknown)}: no training slice has this position; choose from {known}")
    with atomic_path(options.output) as folder:
        folder.mkdir()
        if options.complete:
            complete(generator, options, options.complete, folder)
        elif options.reconstruct:
            reconstruct(generator, options, options.reconstruct, folder)
        else:
            draw(generator, options, folder)
    print(f"written to {options.output}")


def check(options: Options) -> None:
    """Raise `GenerateError` for options that cannot work, before anything is loaded."""

    def require(name: str, holds: bool, requirement: str) -> None:
        if not holds:
            shown = getattr(options, name.replace("-", "_"))
            raise GenerateError(f"--{name} {shown}: must be {requirement}")

    require("num-samples", options.num_samples >= 1, "at least 1")
    require("num-candidates", options.num_candidates is None or options.num_candidates >= 1, "at least 1")
    require("seed", 0 <= options.seed < 2**32, "0 to 4294967295")
    require("temperature", 0 < options.temperature < float("inf"), "a positive number")
    require("top-k", options.top_k >= 0, "0 or more")
    require("top-p", 0 < options.top_p <= 1, "above 0 and at most 1")
    given = [f"--{name}" for name in ("complete", "reconstruct", "compact", "export") if getattr(options, name)]
    if len(given) > 1:
        raise GenerateError(f"{' and '.join(given)}: give one of them only")
    if options.complete and not options.complete.is_file():
        raise GenerateError(f"--complete {options.complete}: no such file; give a PNG of a slice")
    if options.complete and len(options.positions) > 1:
        require("positions", False, "a single one with --complete, that of the slice")
    for name in ("output", "compact", "export"):
        path = getattr(options, name)
        if path and options.run_dir.resolve() in (path.resolve(), *path.resolve().parents):
            raise GenerateError(f"--{name} {path}: is in the run folder, which is only read; choose another place")
    if options.export:
        if options.export.suffix != ".onnx":
            raise GenerateError(f"--export {options.export}: must end in .onnx")
        for path in exported_files(options.export):
            if path.exists():
                raise GenerateError(f"--export {options.export}: {path} exists already; choose another name")
        return
    name, folder = ("compact", options.compact) if options.compact else ("output", options.output)
    if folder is None:
        raise GenerateError("--output: missing; give a new folder for the slices")
    if folder.is_dir() and any(folder.iterdir()):
        raise GenerateError(f"--{name} {folder}: contains files already; choose a new folder")
    if folder.exists() and not folder.is_dir():
        raise GenerateError(f"--{name} {folder}: is a file; choose a new folder")


# ------------------------------------------------------------------------------------------------ drawing


def draw(generator: Generator, options: Options, folder: Path) -> None:
    """Write new slices, and a table of them with the bits that the prior needs for their codes."""
    if options.positions:
        positions = np.resize(np.array(options.positions, np.int32), options.num_samples)
    else:
        positions = seeds.generator(options.seed, "positions").choice(generator.positions, options.num_samples)
    codes = generator.sample_codes(positions, **sampling_arguments(options))
    images, bits = generator.draw(codes, options.seed), generator.bits_of_codes(codes, positions)
    names = [f"sample_{i:0{len(str(len(images) - 1))}}_slice_{position}.png" for i, position in enumerate(positions)]
    save(folder, dict(zip(names, images, strict=True)))
    rows = zip(names, positions, bits, strict=True)
    write_table(folder / "samples.csv", [{"file": f, "position": p, "bits": round(float(b), 1)} for f, p, b in rows])


def complete(generator: Generator, options: Options, path: Path, folder: Path) -> None:
    """Write the slice in a PNG, and slices that share one half with it."""
    position = options.positions[0] if options.positions else naming.slice_position(path.name)
    if position is None or position not in generator.positions:
        raise GenerateError(
            f"--complete {path}: the name does not say its slice position, or no training slice has it; give "
            f"--positions, from {generator.positions.min()} to {generator.positions.max()}"
        )
    image = dataset.to_float(pngs.decode(path, generator.vqvae.image_size, generator.crop).grey[..., None])
    kept = editing.half(options.keep, generator.vqvae.image_size)
    images = editing.complete(generator, image, kept, position, options.num_samples, **sampling_arguments(options))
    save(folder, {"original.png": image, **{f"completion_{i:03d}.png": drawn for i, drawn in enumerate(images)}})


def reconstruct(generator: Generator, options: Options, source: Path, folder: Path) -> None:
    """Write reconstructions of PNGs, and a table of their quality on cropped slices."""
    if not source.exists():
        raise GenerateError(f"--reconstruct {source}: no such file or folder; give a PNG or a folder of PNGs")
    paths = (
        [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.suffix.lower() == ".png")
    )
    if not paths:
        raise GenerateError(f"--reconstruct {source}: contains no PNGs; give a PNG or a folder of PNGs")
    size = generator.vqvae.image_size
    images, is_readable = pngs.decode_all(paths, size, options.skip_broken_slices, generator.crop)
    images, paths = images[is_readable], list(itertools.compress(paths, is_readable))
    if not paths:
        raise GenerateError(f"--reconstruct {source}: none of its PNGs can be read; replace them")
    codes = generator.encode(images)
    sets = {"faithful": generator.decode(codes)}
    if generator.decoder:
        sets["sharp"] = generator.draw(codes, options.seed)
    names = [path.relative_to(source).as_posix() if source.is_dir() else path.name for path in paths]
    rows: list[dict[str, Any]] = [{"file": name} for name in names]
    for kind, reconstructions in sets.items():
        save(folder, {f"{kind}/{name}": image for name, image in zip(names, reconstructions, strict=True)})
        for metric, values in metrics.metrics_by_slice(images, reconstructions).items():
            for row, value in zip(rows, values, strict=True):
                row[f"{kind}_{metric}"] = float(value)
    for row, bits in zip(rows, bits_of(generator, codes, names), strict=True):
        row["bits"] = float(bits)
    write_table(folder / "reconstructions.csv", rows)


def bits_of(generator: Generator, codes: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Bits of each slice's codes at the position in its file's name, averaged over all positions if there is none."""
    found = [naming.slice_position(Path(name).name) for name in names]
    positions = np.array([-1 if position is None else position for position in found], np.int32)
    known, bits = np.isin(positions, generator.positions), np.empty(len(names))
    for chosen, given in ((known, positions[known]), (~known, None)):
        if chosen.any():
            bits[chosen] = generator.bits_of_codes([level[chosen] for level in codes], given)
    return bits


def compact(generator: Generator, run_dir: Path, folder: Path) -> None:
    """Write the networks with rounded weights, and what else `Generator.load` and app.py read of a run.

    Weights are rounded to `MANTISSA_BITS`, so that compression halves their size or better. What the sharp decoder has
    in common with the VQ-VAE is stored once, in vqvae.keras. The folder of the slices and the names of the subjects are
    left out.
    """
    networks: dict[str, keras.Model] = {"vqvae": generator.vqvae}
    networks |= dict(zip(model.prior_names(len(generator.priors)), generator.priors, strict=True))
    networks |= {"selector": generator.selector} if generator.selector else {}
    networks |= {"decoder": generator.decoder} if generator.decoder else {}
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    config["constants"] |= {
        "data_dir": None,
        "start_from": None,
        "keep": [],
        "sharp_samples": generator.decoder is not None,
        "num_candidates": generator.num_candidates,
    }
    with atomic_path(folder) as unfinished:
        unfinished.mkdir()
        for name, network in networks.items():
            network.set_weights([rounded(weights) for weights in network.get_weights()])
            if network is generator.decoder:
                for part in (*generator.decoder.codebooks, *generator.decoder.decoders):
                    part.set_weights([np.zeros_like(weights) for weights in part.get_weights()])
            # A fifth smaller than deflate.
            saving.save_model(network, unfinished / f"{name}.keras", zipfile.ZIP_LZMA)
        write_json(unfinished / "config.json", config)
        table = run_dir / "test_slices.csv"
        if table.is_file():
            with table.open(encoding="utf-8", newline="") as file:
                rows = [{k: v for k, v in row.items() if k != "subject"} for row in csv.DictReader(file)]
            write_table(unfinished / "test_slices.csv", rows)
    print(f"written to {folder}")


def rounded(weights: np.ndarray) -> np.ndarray:
    """Round float32 numbers to `MANTISSA_BITS`; other arrays are returned as they are."""
    if weights.dtype != np.float32:
        return weights
    dropped = 23 - MANTISSA_BITS
    bits = weights.view(np.uint32).astype(np.uint64) + (1 << (dropped - 1))
    return (bits >> dropped << dropped).astype(np.uint32).view(np.float32)


def exported_files(path: Path) -> tuple[Path, Path]:
    """Return the names of the exported encoder and decoder."""
    return path.with_name(f"{path.stem}_encoder.onnx"), path.with_name(f"{path.stem}_decoder.onnx")


def export(generator: Generator, path: Path) -> None:
    """Write the encoder with its quantizer, and the decoder, as ONNX files.

    The encoder maps `images` (B, H, W, 1) float32 in [0, 1] to code indices (B, h, w) int32 per level, the coarsest
    level first. The decoder maps them, as `codes_0` and so on, to images. If the run has a sharp decoder, this one is
    exported; it also reads `noise` (B, H, W, 1) float32, normally distributed.

    Raises:
        GenerateError: tf2onnx is missing, or Keras does not use TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        raise GenerateError("--export: needs TensorFlow; unset KERAS_BACKEND")
    try:
        import tf2onnx
    except ImportError as error:
        raise GenerateError("--export: needs tf2onnx; run pip install tf2onnx") from error
    size, grids = generator.vqvae.image_size, generator.vqvae.grids
    images = tf.TensorSpec((None, size, size, 1), tf.float32, name="images")
    codes = [tf.TensorSpec((None, grid, grid), tf.int32, name=f"codes_{i}") for i, grid in enumerate(grids)]
    noise = tf.TensorSpec((None, size, size, 1), tf.float32, name="noise")

    def decode(*inputs: Any) -> Any:
        if not generator.decoder:
            return generator.vqvae.decode_code(inputs)
        return generator.decoder(dict(zip([*(f"codes_{i}" for i in range(len(grids))), "noise"], inputs, strict=True)))

    functions = (generator.vqvae.encode, [images]), (decode, [*codes, *([noise] if generator.decoder else [])])
    for file, (function, signature) in zip(exported_files(path), functions, strict=True):
        compiled = tf.function(function, input_signature=signature, autograph=False)
        converted = tf2onnx.convert.from_function(compiled, input_signature=signature, opset=ONNX_OPSET)[0]
        with atomic_path(file) as unfinished:
            unfinished.write_bytes(converted.SerializeToString())
        print(f"written to {file}")


def save(folder: Path, images: Mapping[str, np.ndarray]) -> None:
    """Write images (H, W, 1) in [0, 1] as 8-bit grey PNGs, by file name."""
    for name, image in images.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dataset.to_uint8(image[..., 0])).save(path, "PNG")


def command_line() -> int:
    """Run the command and return its exit status; see `console.run_command`."""
    return console.run_command(
        lambda: main(tyro.cli(Options, description=__doc__)), "nothing was written; run the same command again"
    )


if __name__ == "__main__":
    sys.exit(command_line())
