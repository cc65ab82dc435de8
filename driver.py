"""Learn brain MRI slices and generate new ones: VQ-VAE, PixelCNN prior, samples, metrics and pictures.

    python driver.py                             a few minutes on synthetic slices, to try it out
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
    name: str = "oasis96"  # of the run; a preset sets its own
    synthetic_subjects: int = 64  # number of subjects of the synthetic slices, 16 slices each
    run_dir: Path | None = None  # folder for everything that the run writes; None: runs/ and the name
    skip_broken_slices: bool = False  # leave out files that cannot be read, and list them, instead of stopping
    seed: int = 0  # determines initial weights, shuffling, dropout, samples and the synthetic slices

    image_size: int = 96  # height and width in pixels; slices are resized to it
    grids: tuple[int, ...] = (12,)  # side of each level's code grid, one or two, the coarsest first, as in 32 64
    channels: int = 64  # of the encoder's first convolution; coarser resolutions have twice as many
    residual_blocks: int = 2  # at each code grid, in encoder and decoder; half as many at twice its resolution
    num_embeddings: int = 512  # K: number of codes in each codebook
    embedding_dim: int = 32  # D: length of a code's vector
    codebook: Literal["ema", "gradient"] = "ema"  # codes follow moving averages, or the codebook loss
    ema_decay: float = 0.98  # γ of the moving averages
    commitment_weight: float = 0.25  # β of the commitment loss
    dead_code_threshold: float = 0.1  # fraction of the mean usage below which a code is restarted; 0 never restarts
    bottom_dropout: float = 0.25  # with two levels: fraction of training slices decoded from the top level alone
    mse_weight: float = 1.0  # of the mean squared error, divided by the data's variance, in the reconstruction loss
    l1_weight: float = 1.0  # of the mean absolute error
    ssim_weight: float = 1.0  # of 1 − SSIM

    augment: bool = True  # flip, rotate and scale the slices that the VQ-VAE trains on, and change their intensity
    batch_size: int = 16  # slices per training step, in all stages
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"  # mixed precision is for GPUs and TPUs
    devices: int = 1  # number of GPUs per process that share each training step's batch; CPUs if there are no GPUs
    coordinator: str | None = None  # of several processes (JAX): HOST:PORT of the first one, or "cluster" for SLURM
    num_processes: int = 1  # number of processes that share each batch, if coordinator is HOST:PORT
    process_index: int = 0  # of this process, from 0; only the first one writes files
    vqvae_epochs: int = 50  # the epoch with the best validation loss is kept
    vqvae_learning_rate: float = 1e-3  # peak; it rises over the first steps, then falls to 0 along a cosine

    prior: Literal["gated", "plain"] = "gated"  # gated PixelCNN with two stacks, or plain masked convolutions
    prior_filters: int = 128  # channels; with two levels, of the top level's prior
    bottom_prior_filters: int = 64  # channels of the bottom level's prior, which has several times as many codes
    prior_blocks: int = 6  # residual blocks
    prior_kernel_size: int = 3  # of the masked convolutions in the blocks, odd; the first convolution is 7 x 7
    prior_dropout: float = 0.2  # dropout rate in the blocks
    prior_uses_position: bool = True  # condition the prior on the slice position
    prior_epochs: int = 8  # the epoch with the best validation loss is kept
    prior_learning_rate: float = 1e-3  # peak, as above

    num_samples: int = 20  # number of generated slices in samples/
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
import json
import sys

import keras
import numpy as np

import dataset
import devices
import metrics
import model
import options
import plots
import report
import seeds
import training
from generator import Generator, Results, Samples, load_samples, save_codes
from run import Run, atomic_path, remove, versions, write_text
from training import Stage

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
        if devices.broadcast_from_main(run is not None and run.is_complete(all_files(config))):
            print(f"{options.run_folder(config)} is complete; choose another run_dir or seed for another run")
            return summarize(config, run) if run else {}
        slices = load_slices(config)
        fingerprint, positions = dataset.fingerprint(slices), np.unique(slices["train"].positions)
        options.check_same_in_all_processes(config, fingerprint)
        with run.start(fingerprint, slice_positions=positions.tolist()) if run else contextlib.nullcontext():
            generator, codes = train_generator(config, run, slices)
            devices.shutdown()
            return evaluate(config, run, generator, codes, slices) if run else {}


def load_slices(config: Config) -> dict[str, dataset.Slices]:
    """Load the slices and print what they are."""
    print(f"data: {config.data_dir}" if config.data_dir else "data: SYNTHETIC slices, because data_dir is not set")
    slices = dataset.load(
        config.data_dir, config.image_size, config.seed, config.skip_broken_slices, config.synthetic_subjects
    )
    for split, split_slices in slices.items():
        print(f"  {split}: {len(split_slices)} slices of {len(set(split_slices.subjects))} subjects")
    print(devices.describe(config.devices))
    options.check_slices(config, slices)
    return slices


def train_generator(
    config: Config, run: Run | None, slices: dict[str, dataset.Slices]
) -> tuple[Generator, dict[str, list[np.ndarray]]]:
    """Train all stages. Returns the networks, and the code indices of the slices by split, (N, h, w) per level."""
    settings: Any = {"seed": config.seed, "precision": config.precision, "num_devices": config.devices}
    vqvae = training.train(vqvae_stage(config, slices), run, **settings)
    positions = np.unique(slices["train"].positions)
    encoder = Generator(vqvae, [], positions, config.batch_size)
    codes = {split: encoder.encode(split_slices.images) for split, split_slices in slices.items()}
    stages = [prior_stage(config, slices, codes, level) for level in range(len(config.grids))]
    priors = [training.train(stage, run, **settings) for stage in stages]
    return Generator(vqvae, priors, positions, config.batch_size), codes


def evaluate(
    config: Config,
    run: Run,
    generator: Generator,
    codes: dict[str, list[np.ndarray]],
    slices: dict[str, dataset.Slices],
) -> dict[str, Any]:
    """Do all steps after training: samples, metrics, pictures and the report. Returns the metrics."""
    save_samples(config, run, generator, slices)
    results = Results(
        generator=generator,
        slices=slices,
        codes=codes,
        reconstructions={split: generator.decode(codes[split]) for split in ("validate", "test")},
        samples=load_samples(run, "codes", generator, sample_positions(config, slices)),
        test_samples=load_samples(run, "measured_codes", generator, slices["test"].positions),
        sampling=sampling_arguments(config),
        history=run.history,
        numbers={},
        note=data_note(config),
    )
    if not (run.folder / "metrics.json").exists():
        numbers = metrics.measure(results, config.seed)
        write_text(run.folder / "metrics.json", json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    results = replace(results, numbers=run.read_metrics())
    plots.draw_missing(run.folder / "images", results)
    with atomic_path(run.folder / "report.html") as unfinished:
        report.write(unfinished, run.folder.name, options.to_json(config), results)
    return summarize(config, run)


def summarize(config: Config, run: Run) -> dict[str, Any]:
    """Print the main findings and where the results are. Returns the metrics."""
    remove(run.folder / "checkpoint")
    numbers, history = run.read_metrics(), run.read_history()
    kind = data_note(config) or "real slices"
    print(f"\n{kind}; measured on {numbers['test_slices']} test slices of {numbers['test_subjects']} subjects")
    for finding in report.findings(options.to_json(config), numbers, history):
        print(f"  {finding.title}: {finding.summary}")
    print(f"  Training took {sum(row['seconds'] for row in history) / 60:.1f} minutes.")
    print(f"open {run.folder / 'report.html'}; pictures are in images/, samples in samples/ next to it")
    return numbers


# ----------------------------------------------------------------------------------------------- the stages


def vqvae_stage(config: Config, slices: dict[str, dataset.Slices]) -> Stage:
    """How the VQ-VAE is trained."""
    train, shard = slices["train"], devices.process_index_and_count()
    variance = dataset.pixel_variance(train)
    return Stage(
        name="vqvae",
        make=lambda: make_vqvae(config, variance),
        batches=lambda epoch: dataset.image_batches(
            train, config.batch_size, config.seed, epoch, config.augment, shard
        ),
        validation=dataset.image_batches(slices["validate"], config.batch_size, shard=shard),
        steps=dataset.steps_per_epoch(len(train), config.batch_size),
        monitor="val_reconstruction",
        epochs=config.vqvae_epochs,
        learning_rate=config.vqvae_learning_rate,
        shown=("reconstruction", "ssim"),
        learning_rate_option="vqvae_learning_rate",
    )


def prior_stage(
    config: Config, slices: dict[str, dataset.Slices], codes: dict[str, list[np.ndarray]], level: int
) -> Stage:
    """How the prior of one level is trained on code indices; level 0 is the coarsest."""
    shard = devices.process_index_and_count()

    def batches(split: str, seed: int | None = None, epoch: int = 0) -> Any:
        coarse, positions = codes[split][level - 1] if level else None, slices[split].positions
        return dataset.code_batches(codes[split][level], positions, config.batch_size, seed, epoch, coarse, shard)

    return Stage(
        name=model.prior_names(len(config.grids))[level],
        make=lambda: make_prior(config, level),
        batches=lambda epoch: batches("train", config.seed, epoch),
        validation=batches("validate"),
        steps=dataset.steps_per_epoch(len(slices["train"]), config.batch_size),
        monitor="val_loss",
        epochs=config.prior_epochs,
        learning_rate=config.prior_learning_rate,
        shown=("bits_per_code",),
        learning_rate_option="prior_learning_rate",
    )


def make_vqvae(config: Config, data_variance: float) -> model.VQVAE:
    """The untrained VQ-VAE for slices with this variance over all pixels."""
    keras.utils.set_random_seed(seeds.number(config.seed, "weights of the VQ-VAE"))
    return model.VQVAE(
        image_size=config.image_size,
        grids=config.grids,
        channels=config.channels,
        residual_blocks=config.residual_blocks,
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embedding_dim,
        commitment_weight=config.commitment_weight,
        codebook=config.codebook,
        ema_decay=config.ema_decay,
        dead_code_threshold=config.dead_code_threshold,
        mse_weight=config.mse_weight,
        l1_weight=config.l1_weight,
        ssim_weight=config.ssim_weight,
        data_variance=data_variance,
        bottom_dropout=config.bottom_dropout,
        seed=config.seed,
    )


def make_prior(config: Config, level: int = 0) -> model.PixelCNN:
    """The untrained prior of a level; level 0 is the coarsest."""
    keras.utils.set_random_seed(seeds.number(config.seed, "weights of the prior", level))
    return model.PixelCNN(
        num_embeddings=config.num_embeddings,
        grid_size=(config.grids[level],) * 2,
        filters=config.bottom_prior_filters if level else config.prior_filters,
        num_blocks=config.prior_blocks,
        kernel_size=config.prior_kernel_size,
        dropout=config.prior_dropout,
        gated=config.prior == "gated",
        use_position=config.prior_uses_position,
        coarse_grid_size=(config.grids[level - 1],) * 2 if level else None,
    )


# ------------------------------------------------------------------------------------------------- samples


def save_samples(config: Config, run: Run, generator: Generator, slices: dict[str, dataset.Slices]) -> None:
    """Write samples/ unless it exists: codes and one PNG per sample, and codes of one sample per test slice."""
    folder = run.folder / "samples"
    if folder.exists():
        return
    print("\nsampling")
    positions, arguments = sample_positions(config, slices), sampling_arguments(config)
    codes = generator.sample_codes(positions, **arguments)
    samples = Samples(generator.decode(codes), codes, positions)
    measured_codes = generator.sample_codes(slices["test"].positions, **arguments)
    with atomic_path(folder) as unfinished:
        samples.save(unfinished)
        save_codes(unfinished, "measured_codes", measured_codes)


def sample_positions(config: Config, slices: dict[str, dataset.Slices]) -> np.ndarray:
    """(num_samples,) int32 slice positions: the chosen ones in turn, or drawn from those of the training slices."""
    if config.sample_positions:
        return np.resize(np.array(config.sample_positions, np.int32), config.num_samples)
    random = seeds.generator(config.seed, "positions of the samples")
    return random.choice(slices["train"].positions, config.num_samples).astype(np.int32)


def sampling_arguments(config: Config) -> dict[str, Any]:
    """Keyword arguments of `Generator.sample`, other than the positions."""
    return {name: getattr(config, name) for name in ("seed", "temperature", "top_k", "top_p")}


# ------------------------------------------------------------------------------------------ the run folder


def open_run(config: Config) -> Run:
    """The run folder. Raises RunError if it contains anything but this configuration's run."""
    sample_files = ["samples", "metrics.json", *(f"images/{p.name}.png" for p in plots.PICTURES if p.from_samples)]
    made_with = versions(backend=keras.backend.backend(), devices=str(devices.total_devices(config.devices)))
    constants = options.to_json(config)
    return Run(options.run_folder(config), constants, made_with, options.SAMPLING_FIELDS, sample_files)


def all_files(config: Config) -> list[str]:
    """Names of all files of a complete run, except the networks: the history names these."""
    pictures = [f"images/{picture.name}.png" for picture in plots.pictures(len(config.grids))]
    return ["config.json", "history.csv", "metrics.json", "samples", "report.html", *pictures]


def data_note(config: Config) -> str:
    """What every picture says about the slices if they are not real."""
    return "" if config.data_dir else "SYNTHETIC slices, not real brains"


def command_line() -> int:
    """Run the driver with the options of the command line. Returns the exit status; see `console.run_command`."""
    return console.run_command(
        lambda: main(options.parse(Config, sys.argv[1:], __doc__)),
        on_stop="the same command continues after the last finished epoch or step",
    )


if __name__ == "__main__":
    devices.exit_process(command_line())
