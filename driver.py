"""Learn brain MRI slices and generate new ones: train all networks, draw samples, measure them and write a report.

    python driver.py                             a small model on synthetic slices, to try it out
    python driver.py --data-dir /path/to/slices  OASIS slices

Everything is written to the run folder. A run that was stopped or killed continues after its last finished epoch or
step if the same command is started again, and ends bitwise identical to one that was not interrupted.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Config:
    """Every constant. Change it here, or on the command line, as in --image-size 128."""

    data_dir: Path | None = None  # folder of OASIS PNG slices; None uses synthetic slices (and the preset "synthetic")
    name: str = "oasis96"  # name of the run; a preset sets its own
    synthetic_subjects: int = 64  # number of subjects of the synthetic slices, 16 slices each
    run_dir: Path | None = None  # folder for everything that the run writes; None: runs/NAME
    cache_dir: Path | None = None  # folder for decoded slices, shared by all runs; None: in the user's cache folder
    start_from: Path | None = None  # folder of a finished run whose networks training begins with; None: from scratch
    keep: tuple[str, ...] = ()  # networks that are kept as they are in start_from, as in vqvae prior
    skip_broken_slices: bool = False  # leave out files that cannot be read, and list them, instead of stopping
    seed: int = 0  # determines everything random: initial weights, shuffling, augmentation, dropout, samples

    crop: int | None = None  # side of the central square of each slice that is used; None: what the brains need; 0: all
    image_size: int = 96  # height and width in pixels; slices are cropped and then resized to it
    coding_size: int | None = None  # height and width of the images that the VQ-VAE encodes; None: image_size
    grids: tuple[int, ...] = (12,)  # side of each level's code grid, one or two, the coarsest first, as in 32 64
    channels: int = 64  # half the number of channels at the code grids; see VQVAE
    residual_blocks: int = 2  # blocks at each code grid, in encoder and decoder; half as many at twice its resolution
    num_embeddings: int = 512  # K: number of codes in each codebook
    embedding_dim: int = 32  # D: length of a code's vector
    codebook: Literal["ema", "gradient"] = "ema"  # codes follow moving averages, or the codebook loss
    ema_decay: float = 0.98  # γ of the moving averages
    commitment_weight: float = 0.25  # β of the commitment loss
    dead_code_threshold: float = 0.1  # fraction of the mean usage below which a code is restarted; 0 never restarts
    background_code: bool = True  # reserve code 0 for cells that show nothing but background
    bottom_dropout: float = 0.25  # with two levels: fraction of training slices decoded from the top level alone
    mse_weight: float = 1.0  # weight of the mean squared error divided by the variance of the data
    l1_weight: float = 1.0  # weight of the mean absolute error
    ssim_weight: float = 1.0  # weight of 1 − SSIM

    augment: bool = True  # flip, rotate, scale and bend the VQ-VAE's training slices, and change their intensity
    batch_size: int = 16  # slices per training step, except for the sharp decoder
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"  # in training and drawing
    devices: int = 1  # number of GPUs per process that share each training step's batch; CPUs if there are no GPUs
    coordinator: str | None = None  # of several processes (JAX): HOST:PORT of the first one, or "cluster" for SLURM
    num_processes: int = 1  # number of processes that share each batch, if coordinator is HOST:PORT
    process_index: int = 0  # of this process, from 0; only the first one writes files
    previews: int = 10  # sheets drawn in previews/ while VQ-VAE, prior and sharp decoder are trained; 0: none
    vqvae_epochs: int = 30  # the epoch with the best validation loss is kept
    vqvae_learning_rate: float = 1e-3  # peak; it rises over the first steps, then falls to 0 along a cosine

    prior: Literal["gated", "plain"] = "gated"  # gated PixelCNN with two stacks, or plain masked convolutions
    prior_filters: int = 128  # channels; with two levels, of the top level's prior
    bottom_prior_filters: int = 64  # channels of the bottom level's prior, which has several times as many codes
    prior_blocks: int = 6  # residual blocks
    prior_kernel_size: int = 3  # side of the masked convolutions in the blocks, odd; the first convolution is 7 x 7
    prior_dropout: float = 0.1  # dropout rate in the blocks
    prior_uses_position: bool = True  # condition the prior on the slice position
    prior_attention: int = 3  # attention layers of gated prior and critic; with two levels, of the top level's
    bottom_prior_attention: int = 1  # of the bottom level's prior; memory grows with the fourth power of its side
    prior_augment: bool = True  # train the prior on codes of freshly augmented slices, conditioned on the augmentation
    prior_epochs: int = 20  # the epoch with the best validation loss is kept; the critic gets half as many
    prior_learning_rate: float = 1e-3  # peak, as above; also of the critic and the selector

    selector_epochs: int = 27  # of the selector, which chooses among proposals of the prior; 0: it is not used
    num_candidates: int = 8  # number of proposals for each generated slice; 1: the selector chooses nothing

    decoder_epochs: int = 10  # of the sharp decoder, which draws samples; 0: the VQ-VAE decodes them
    decoder_batch_size: int = 2  # slices per training step of the sharp decoder
    decoder_learning_rate: float = 1e-3  # peak, as above
    decoder_channels: int = 32  # of the sharp decoder's finest resolution; coarser ones have up to four times as many

    num_samples: int = 20  # number of generated slices in samples/
    measured_slices: int = 1000  # maximum number of validation and test slices that are compared with samples
    sharp_samples: bool = True  # decode samples with the sharp decoder
    sample_positions: tuple[int, ...] = ()  # slice positions to generate, in turn; none: as in the training data
    temperature: float = 1.0  # below 1 favours likely codes, above 1 varied ones
    top_k: int = 0  # sample among the k most likely codes only; 0: all
    top_p: float = 1.0  # sample among the most likely codes that together have this probability

    def __post_init__(self) -> None:
        options.coerce(self)


import console

if __name__ == "__main__":
    console.start()
console.import_tensorflow()

import contextlib
import sys
from collections.abc import Sequence

import keras
import numpy as np

import comparison
import dataset
import devices
import metrics
import options
import pictures
import report
import seeds
import stages
import training
from generator import Generator, Results, code_files, make_samples
from run import LAST_RESULT, Run, remove, versions, without_nan, write_json, write_table
from stages import Codes, Slices

# ------------------------------------------------------------------------------------------------ the steps


def main(config: Config) -> dict[str, Any]:
    """Do all steps that are not done yet, in order.

    Returns:
        The content of metrics.json, in the main process; an empty dictionary in others.

    Raises:
        UserError: A constant cannot work, or the data or the run folder cannot be used.
        Stopped: Ctrl-C or SIGTERM, if `console.stop_on_signals` was called.
    """
    options.check(config)
    with devices.join_processes(config.coordinator, config.num_processes, config.process_index):
        options.check_devices(config)
        run = open_run(config) if devices.is_main_process() else None
        slices = load_slices(config)
        fingerprint, positions = dataset.fingerprint(slices), np.unique(slices["train"].positions)
        options.check_same_in_all_processes(config, fingerprint)
        found = training.initial_networks(config.start_from, stages.makers(config), run, config.keep) if run else {}
        facts = {"slice_positions": positions.tolist(), "crop": slices["train"].crop}
        with run.start(fingerprint, found, **facts) if run else contextlib.nullcontext():
            if devices.broadcast_from_main(run is not None and run.is_complete()):
                print(f"{options.run_folder(config)} is complete; choose another run_dir for another run")
                return finish(config, run) if run else {}
            encoder, codes = train_vqvae(config, run, slices)
            generator = train_priors(config, run, slices, codes, encoder)
            generator = train_selector(config, run, slices, codes, generator)
            generator = train_decoder(config, run, slices, codes, generator)
            critic = train_priors(config, run, slices, codes, encoder, critic=True)
            devices.shutdown()
            if not run:
                return {}
            results, made_from = make_results(config, run, generator, critic, codes, slices)
            return evaluate(config, run, results, made_from)


def load_slices(config: Config) -> Slices:
    """Load the slices and print what they are."""
    print(f"data: {config.data_dir}" if config.data_dir else "data: SYNTHETIC slices, because data_dir is not set")
    slices = dataset.load(
        config.data_dir,
        config.image_size,
        config.seed,
        skip_broken=config.skip_broken_slices,
        synthetic_subjects=config.synthetic_subjects,
        crop=config.crop,
        cache_dir=config.cache_dir,
    )
    if crop := slices["train"].crop:
        print(f"using the central {crop} × {crop} pixels of each slice")
    for split, split_slices in slices.items():
        print(f"  {split}: {len(split_slices)} slices of {len(set(split_slices.subjects))} subjects")
    print(devices.describe(config.devices))
    options.check_slices(config, slices)
    return slices


def train_vqvae(config: Config, run: Run | None, slices: Slices) -> tuple[Generator, Codes]:
    """Train the VQ-VAE. Returns it without priors, and the code indices of the slices."""
    vqvae = training.train(stages.vqvae_stage(config, slices), run, **options.training_settings(config))
    train = slices["train"]
    encoder = Generator(vqvae, [], np.unique(train.positions), config.batch_size, train.crop)
    return encoder, {split: encoder.encode(split_slices.images) for split, split_slices in slices.items()}


def train_priors(
    config: Config, run: Run | None, slices: Slices, codes: Codes, encoder: Generator, critic: bool = False
) -> Generator:
    """Train one prior, or critic, per level, the coarsest first. Returns them together with the VQ-VAE."""
    generator, settings = encoder, options.training_settings(config)
    for _ in config.grids:
        stage = stages.prior_stage(config, slices, codes, generator, critic)
        prior = training.train(stage, run, **settings | {"seed": seeds.number(config.seed, stage.name)})
        generator = generator.replace(priors=[*generator.priors, prior])
    return generator


def train_selector(config: Config, run: Run | None, slices: Slices, codes: Codes, generator: Generator) -> Generator:
    """Train the selector, if there is to be one. Returns the generator with it."""
    if not config.selector_epochs:
        return generator
    stage = stages.selector_stage(config, slices, codes, generator)
    selector = training.train(stage, run, **options.training_settings(config))
    return generator.replace(selector=selector, num_candidates=config.num_candidates)


def train_decoder(config: Config, run: Run | None, slices: Slices, codes: Codes, generator: Generator) -> Generator:
    """Train the sharp decoder, if there is to be one. Returns the generator that samples are drawn with."""
    if not config.decoder_epochs:
        return generator
    stage = stages.decoder_stage(config, slices, codes, generator)
    decoder = training.train(stage, run, **options.training_settings(config))
    if not config.sharp_samples:
        return generator
    return generator.replace(decoder=stages.with_precision(decoder, config.precision)).compiled()


def evaluate(config: Config, run: Run, results: Results, made_from: Sequence[str]) -> dict[str, Any]:
    """Measure the results, draw them, and write the report. Returns the metrics.

    Args:
        made_from: Names of what determines the results; see `Run.make`.
    """
    shown, inputs = pictures.of_run(len(config.grids), results.generator.networks), [*made_from]
    run.make(results.samples.files, inputs, results.samples.save)
    run.make(["metrics.json", "test_slices.csv"], inputs, lambda *paths: measure(config, run, results, inputs, *paths))
    run.make("blind_test_key.csv", inputs, lambda path: write_table(path, pictures.blind_test(results)[1]))
    results = replace(results, numbers=run.read_metrics())
    inputs += ["metrics.json"]
    for picture in shown:
        run.make(f"images/{picture.name}.png", inputs, lambda path, picture=picture: picture.draw(path, results))
    inputs += [*(f"images/{picture.name}.png" for picture in shown), "configuration"]
    constants = options.to_json(config)
    run.make(LAST_RESULT, inputs, lambda path: report.write(path, run.folder.resolve().name, constants, results))
    return finish(config, run)


def measure(
    config: Config, run: Run, results: Results, made_from: Sequence[str], numbers_path: Path, slices_path: Path
) -> None:
    """Compute and write the content of metrics.json and test_slices.csv."""
    print("measuring reconstructions, codes and likelihood on the test split")
    numbers, rows = metrics.measure(results)
    print("comparing samples with the test split")
    compared = comparison.compare(results, config.seed, lambda name, compute: run.remember(name, made_from, compute))
    write_json(numbers_path, without_nan(numbers | compared))
    write_table(slices_path, rows)


def finish(config: Config, run: Run) -> dict[str, Any]:
    """Remove the checkpoints, and print the main findings and where the results are. Returns the metrics."""
    remove(run.checkpoint_folder)
    numbers, history = run.read_metrics(), run.history
    kind = options.data_note(config) or "real slices"
    print(f"\n{kind}; measured on {numbers['test_slices']} test slices of {numbers['test_subjects']} subjects")
    for finding in report.findings(options.to_json(config), numbers):
        print(f"  {finding.title}: {finding.summary}")
    print(f"  Training took {sum(row['seconds'] for row in history) / 60:.1f} minutes.")
    print(f"open {run.folder / 'report.html'}; pictures are in images/, samples in samples/ next to it")
    return numbers


# ------------------------------------------------------------------------------------------------- samples


def make_results(
    config: Config, run: Run, generator: Generator, critic: Generator, codes: Codes, slices: Slices
) -> tuple[Results, list[str]]:
    """Draw all samples. Returns what the run has made so far, and what determines it, for `Run.make`."""
    compared = comparison.choose_slices(slices, config.measured_slices, config.seed)
    made_from = ["slices", "sampling", *(f"{name}.keras" for name in stages.names(config))]
    positions = {f"{split}_codes": slices[split].positions[index] for split, index in compared.items()}
    positions["codes"] = sample_positions(config, slices)
    arguments = options.sampling_arguments(config)
    samples = {
        name: make_samples(run, name, generator, wanted, arguments, made_from) for name, wanted in positions.items()
    }
    results = Results(
        generator=generator,
        critic=critic,
        slices=slices,
        codes=codes,
        reconstructions={split: generator.decode(codes[split]) for split in ("validate", "test")},
        samples=samples["codes"],
        compared=compared,
        compared_samples={split: samples[f"{split}_codes"] for split in compared},
        sampling=arguments,
        history=run.history,
        numbers={},
        sharp_reconstructions=(
            run.remember(
                "sharp reconstructions of the test split",
                made_from,
                lambda: generator.draw(codes["test"], config.seed, "reconstructions of test"),
            )
            if generator.decoder
            else None
        ),
        note=options.data_note(config),
    )
    return results, made_from + [file for name in positions for file in code_files(name, len(config.grids))]


def sample_positions(config: Config, slices: Slices) -> np.ndarray:
    """(num_samples,) int32 slice positions: the chosen ones in turn, or drawn from those of the training slices."""
    if config.sample_positions:
        return np.resize(np.array(config.sample_positions, np.int32), config.num_samples)
    random = seeds.generator(config.seed, "positions of the samples")
    return random.choice(slices["train"].positions, config.num_samples).astype(np.int32)


# ------------------------------------------------------------------------------------------ the run folder


def open_run(config: Config) -> Run:
    """The run folder. Raises RunError if it contains anything but this configuration's run."""
    made_with = versions(backend=keras.backend.backend(), devices=str(devices.total_devices(config.devices)))
    constants = options.to_json(config)
    return Run(options.run_folder(config), constants, made_with, options.SAMPLING_FIELDS, options.PATH_FIELDS)


def command_line() -> int:
    """Run the driver with the options of the command line. Returns the exit status; see `console.run_command`."""
    return console.run_command(
        lambda: main(options.parse(Config, sys.argv[1:], __doc__)),
        on_stop="the same command continues after the last finished epoch or step",
    )


if __name__ == "__main__":
    devices.exit_process(command_line())
