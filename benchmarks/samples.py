"""How good are the slices that finished networks draw?

    python -m benchmarks.samples --run-dir runs/oasis96 --data-dir /path/to/slices [--precision mixed_bfloat16]

Measures reconstructions, likelihood and samples of a finished run, or of networks that were passed on, on slices: the
same numbers as in metrics.json of a run, except for those of faithful reconstructions, of the critic and of the
controls. The classifiers are trained on the training split, and asked about the test split. With 2,880 training slices
of 192 × 192 pixels and mixed_bfloat16 it took 50 minutes of processor time in one thread, and 89 in two, while other
jobs were running (AMD EPYC, Zen 4).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import comparison
import driver
import metrics
import options as configuration
import stages
from benchmarks import common
from dataset import to_uint8
from generator import Generator, Results, Samples
from run import without_nan

SHOWN: tuple[str, ...] = ("c2st_real", "precision", "recall", "density", "coverage", "mmd2", "ms_ssim_of_pairs")
SHOWN += ("power_low", "power_middle", "power_high")
SETS = {
    "samples": "samples",
    "faithful_samples": "samples, faithful",
    "sharp_reconstructions": "reconstructions, sharp",
}
BATCH_SIZE = 32  # Slices that pass through a network at a time.


@dataclass(frozen=True)
class Options:
    """Which networks to measure, and on which slices."""

    run_dir: Path  # folder of a finished run, or of its networks
    data_dir: Path  # folder of OASIS PNG slices with the same splits
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"  # of the sharp decoder's network


def main(options: Options) -> dict[str, Any]:
    """Measure the networks and return the numbers."""
    machine = common.report_machine()
    saved_config, saved = common.load_config(options.run_dir)
    config = dataclasses.replace(saved_config, data_dir=options.data_dir, crop=saved["crop"])
    generator = Generator.load(options.run_dir, BATCH_SIZE)
    if generator.decoder:
        generator = generator.replace(decoder=stages.with_precision(generator.decoder, options.precision))
    results = make_results(config, generator.compiled())
    numbers = without_nan(metrics.measure(results)[0] | measure_samples(results, config.seed))
    for name in ("ssim", "ssim_brain", "psnr_db", "prior_nats_per_code", "prior_bits_per_image"):
        print(f"{name:24} {numbers[name]:8.4g}")
    if "sharp" in numbers:
        print(f"{'ssim, sharp decoder':24} {numbers['sharp']['ssim']:8.4g}")
    print("\n" + " " * 24 + " ".join(f"{name:>16}" for name in SHOWN))
    for name, title in SETS.items():
        if name in numbers:
            values = {**numbers[name], "c2st_real": numbers[name].get("c2st_real", {}).get("accuracy")}
            print(
                f"{title:24}" + " ".join(f"{'–' if values[n] is None else format(values[n], '.3f'):>16}" for n in SHOWN)
            )
    return {**machine, **numbers}


def make_results(config: driver.Config, generator: Generator) -> Results:
    """Encode, decode and draw everything that is measured. The prior takes the place of the critic."""
    slices = driver.load_slices(config)
    compared = comparison.choose_slices(slices, config.measured_slices, config.seed)
    codes = {split: generator.encode(some.images) for split, some in slices.items()}
    samples, arguments = {}, configuration.sampling_arguments(config)
    for split, index in compared.items():
        positions, purpose = slices[split].positions[index], f"{split}_samples"
        drawn = generator.sample_codes(positions, **arguments, purpose=purpose)
        samples[split] = Samples(to_uint8(generator.draw(drawn, config.seed, purpose)), drawn, positions)
    sharp_reconstructions = (
        generator.draw(codes["test"], config.seed, "reconstructions of test") if generator.decoder else None
    )
    return Results(
        generator=generator,
        slices=slices,
        codes=codes,
        reconstructions={split: generator.decode(codes[split]) for split in ("validate", "test")},
        critic=generator,
        samples=samples["test"],
        compared=compared,
        compared_samples=samples,
        sampling=arguments,
        history=[],
        numbers={},
        sharp_reconstructions=sharp_reconstructions,
    )


def measure_samples(results: Results, seed: int) -> dict[str, Any]:
    """Compare samples and sharp reconstructions with real slices; see `comparison.compare` for the numbers."""
    print("comparing samples with the test split")
    compared = comparison.Comparison(results, seed)
    samples, numbers = compared.samples(), {}
    sets = {"samples": samples, "faithful_samples": compared.redecode(samples)}
    if results.generator.decoder:
        sets["sharp_reconstructions"] = compared.draw_reconstructions()
    for name, images in sets.items():
        numbers[name] = {n: value for n, value in compared.measure(images["test"]).items() if "critic" not in n}
        if name != "faithful_samples":
            numbers[name] |= compared.classify_against_real(images)
            for key, size in (("c2st_real", ""), ("c2st_half_size", ", at half the size")):
                found = numbers[name][key]
                each = ", ".join(f"{accuracy:.3f}" for accuracy in found["accuracies"])
                print(f"c2st of {SETS[name]} against real slices{size}: {found['accuracy']:.3f} ({each})", flush=True)
    if results.generator.decoder:
        numbers["samples"] |= compared.measure_copies(samples["test"], sets["sharp_reconstructions"]["test"])
    pairs = comparison.ms_ssim_of_pairs(compared.real["test"].images, compared.pairs)
    return {
        "compared_slices": {split: len(index) for split, index in results.compared.items()},
        **numbers,
        "c2st_codes": compared.classify_codes(compared.reconstructions, samples),
        "other_subjects": compared.measure_other_subjects(),
        "real_ms_ssim_of_pairs": pairs,
    }


if __name__ == "__main__":
    common.run_benchmark(main, Options, __doc__)
