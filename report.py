"""report.html: one self-contained file with the pictures, the main findings and the numbers of a run."""

import base64
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

import plots
from generator import Results

TEMPLATE = Path(__file__).with_name("report.html.jinja")
LEADING_PICTURES = 3  # The first pictures of `plots.PICTURES` stand above the findings, the others at the end.

# Key in metrics.json, name, and how to read it.
SAMPLE_ROWS = (
    ("c2st_real", "classifier accuracy against real slices", "0.50 (chance) is best"),
    (
        "c2st_reconstructions",
        "classifier accuracy against reconstructions",
        "0.50 is best; a higher value is due to the prior, not to the decoder",
    ),
    ("precision", "precision", "fraction of these slices that resemble real ones; higher is better"),
    ("density", "density", "like precision, but robust to outliers"),
    ("recall", "recall", "fraction of real slices that resemble these; higher is more varied"),
    ("coverage", "coverage", "like recall, but robust to outliers"),
    ("mmd2", "squared MMD", "0 is best; ± standard error"),
    ("ms_ssim_of_pairs", "MS-SSIM of pairs", "best if equal to that of pairs of real slices; higher is less varied"),
    (
        "nn_distance_ratio_pixels",
        "distance to the nearest training slice, in pixels",
        "relative to unseen real slices; blur lowers it",
    ),
    ("nn_distance_ratio_features", "the same, in features", "relative to unseen real slices"),
    (
        "near_duplicate_rate_pixels",
        "near-duplicates of training slices, in pixels",
        "fraction nearer to a training slice than the nearest 1\u00a0% of unseen real slices; 0.01 is expected",
    ),
    ("near_duplicate_rate_features", "the same, in features", "0.01 is expected"),
)


@dataclass
class Finding:
    """One conclusion about a run.

    Attributes:
        title: What it is about.
        summary: The conclusion in one or two sentences.
        good: Sentences that speak for the model.
        bad: Sentences that speak against it.
    """

    title: str
    summary: str
    good: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def add(self, is_good: bool, sentence: str) -> None:
        """Add a sentence to `good` or `bad`."""
        (self.good if is_good else self.bad).append(sentence)


def write(path: Path, name: str, constants: dict[str, Any], results: Results) -> None:
    """Write the report of a run.

    Args:
        path: Where to write it. The pictures are read from `images/` in the same folder.
        name: Name of the run.
        constants: The configuration, as in config.json.
        results: The results, with `numbers` as in metrics.json.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=_number, interval=_interval)
    images = path.parent / "images"
    pictures = [
        {
            "title": picture.name.replace("_", " "),
            "caption": picture.caption,
            "data": base64.b64encode((images / f"{picture.name}.png").read_bytes()).decode(),
        }
        for picture in plots.pictures(len(constants["grids"]))
    ]
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name,
        constants=constants,
        numbers=results.numbers,
        findings=findings(constants, results.numbers, results.history),
        sample_rows=SAMPLE_ROWS,
        leading_pictures=pictures[:LEADING_PICTURES],
        other_pictures=pictures[LEADING_PICTURES:],
        grids=" and ".join(f"{grid}\u00a0×\u00a0{grid}" for grid in constants["grids"]),
        epochs=Counter(row["stage"].replace("vqvae", "VQ-VAE").replace("_", " ") for row in results.history),
        note=results.note,
    )
    path.write_text(page, encoding="utf-8", newline="")


def findings(constants: dict[str, Any], numbers: dict[str, Any], history: list[dict[str, Any]]) -> list[Finding]:
    """Describe the main numbers in words.

    Args:
        constants: The configuration, as in config.json.
        numbers: The content of metrics.json.
        history: The rows of history.csv.
    """
    return [
        _reconstruction(constants, numbers),
        _prior(constants, numbers, history),
        _likelihood(numbers),
        _quality(numbers),
        _variety(numbers),
        _memorisation(numbers),
    ]


def _reconstruction(constants: dict[str, Any], numbers: dict[str, Any]) -> Finding:
    size, bits = constants["image_size"], numbers["prior_bits_per_image"]
    finding = Finding(
        "Reconstruction",
        f"Slices of unseen subjects are reconstructed with SSIM {_number(numbers['ssim'])}"
        f"{_interval(numbers['ssim_interval'])}, over the brain alone {_number(numbers['ssim_brain'])}"
        f"{_interval(numbers['ssim_brain_interval'])}, and PSNR {numbers['psnr_db']:.1f} dB, from {bits:,.0f} bits per "
        "image.",
    )
    ratio = size * size * 8 / bits
    finding.add(True, f"An uncompressed 8-bit image of {size} × {size} pixels has {ratio:,.0f} times as many bits.")
    worst = numbers["worst_slices"][0]
    finding.add(
        False,
        f"The worst slice ({worst['subject']}, position {worst['position']}) has an SSIM of "
        f"{_number(worst['ssim_brain'])} over the brain.",
    )
    if numbers["half_power_frequency"] >= 0.5:
        finding.add(
            True, "At the highest spatial frequency, reconstructions have half of the real slices' power or more."
        )
    else:
        finest = 1 / (2 * max(numbers["half_power_frequency"], 1e-9))
        finding.add(False, f"Blur: details smaller than {finest:.1f} pixels keep less than half of their power.")
    accuracy = numbers["references"]["reconstructions"]["c2st_real"]["accuracy"]
    if accuracy is not None:
        finding.add(
            accuracy < 0.6,
            f"A classifier distinguishes reconstructions from real slices with {_percent(accuracy)} accuracy "
            f"({_percent(0.5)} is chance).",
        )
    return finding


def _prior(constants: dict[str, Any], numbers: dict[str, Any], history: list[dict[str, Any]]) -> Finding:
    bits, entropy = numbers["prior_bits_per_image"], numbers["marginal_entropy_bits_per_image"]
    levels = _by_level(numbers["prior_bits_per_code"])
    each = " and ".join(f"{value:.2f} bits per {level}code" for level, value in levels.items())
    finding = Finding("Prior", f"The prior needs {each} for unseen subjects: {bits:,.0f} bits per image.")
    saved = 1 - bits / max(entropy, 1e-9)
    finding.add(
        saved > 0.1,
        f"Without the prior, coding each code independently takes {entropy:,.0f} bits per image (the entropy of "
        f"single codes). The prior saves {_percent(saved)}.",
    )
    perplexity = _by_level(numbers["perplexity"])
    for level, used in _by_level(numbers["codes_used"]).items():
        usage = f"{_percent(used)} of the {constants['num_embeddings']} {level}codes are used"
        finding.add(used > 0.9, f"{usage}, with a perplexity of {perplexity[level]:.0f}.")
    for level in levels:
        stage = f"{level}prior".replace(" ", "_")
        best = min((row for row in history if row["stage"] == stage), key=lambda row: row["val_loss"])
        losses = (
            f"In its best epoch ({best['epoch']}), the loss of the {level}prior is {best['loss']:.2f} nats per code on "
            f"training subjects and {best['val_loss']:.2f} on validation subjects"
        )
        if best["val_loss"] > 1.05 * best["loss"]:
            finding.add(False, f"{losses}: it has begun to overfit.")
        else:
            finding.add(True, f"{losses}: it generalises to unseen subjects.")
    return finding


def _by_level(value: float | dict[str, float]) -> dict[str, float]:
    """Return {"top ": …, "bottom ": …}, or {"": …} if there is a single level."""
    return {f"{level} ": number for level, number in value.items()} if isinstance(value, dict) else {"": value}


def _likelihood(numbers: dict[str, Any]) -> Finding:
    total, histogram = numbers["bits_per_dimension"], numbers["histogram_bits_per_dimension"]
    finding = Finding(
        "Likelihood",
        f"An unseen slice takes at most {total:.2f} bits per pixel: {numbers['prior_bits_per_dimension']:.2f} for the "
        f"codes and {numbers['decoder_bits_per_dimension']:.2f} for the pixels given the codes.",
    )
    finding.add(
        total < histogram,
        f"For comparison, coding each pixel independently takes {histogram:.2f} bits per pixel (the entropy of the "
        "grey level histogram).",
    )
    return finding


def _quality(numbers: dict[str, Any]) -> Finding:
    samples, others = numbers["samples"], numbers["references"]["other_subjects"]
    accuracy, against_decoded = samples["c2st_real"]["accuracy"], samples["c2st_reconstructions"]["accuracy"]
    finding = Finding("Samples: quality", "There are too few test subjects to compare samples with real slices.")
    if accuracy is not None:
        finding.summary = (
            f"A classifier distinguishes samples from real slices with {_percent(accuracy)} accuracy "
            f"({_percent(0.5)} is chance), and real slices of other subjects with "
            f"{_percent(others['c2st_real']['accuracy'])}."
        )
        if accuracy < 0.6:
            finding.add(True, "A small classifier can hardly distinguish samples from real slices.")
        else:
            finding.add(False, "Even a small classifier distinguishes samples from real slices.")
        start = f"It distinguishes samples from reconstructions with {_percent(against_decoded)} accuracy: "
        if against_decoded < 0.65:
            finding.add(True, start + "most of the difference is due to the decoder and also affects reconstructions.")
        else:
            finding.add(False, start + "the prior arranges codes differently from real slices.")
    if samples["mmd2"] is not None:
        finding.add(
            samples["mmd2"] <= others["mmd2"] + 2 * samples["mmd2_error"],
            f"The squared maximum mean discrepancy (MMD) from real slices is {_mmd2(samples)}; for real slices of "
            f"other subjects it is {_mmd2(others)}.",
        )
    return finding


def _variety(numbers: dict[str, Any]) -> Finding:
    samples, others = numbers["samples"], numbers["references"]["other_subjects"]
    own, real = samples["ms_ssim_of_pairs"], numbers["references"]["real_ms_ssim_of_pairs"]
    finding = Finding("Samples: variety", "There are too few test subjects to compare pairs of slices.")
    if own is not None:
        equal = abs(own - real) <= 0.01
        comparison = "as varied as" if equal else "less varied than" if own > real else "more varied than"
        finding.summary = f"Samples are {comparison} real slices."
        finding.add(
            equal,
            f"Pairs of samples at the same position have a mean MS-SSIM of {own:.3f}, pairs of real slices {real:.3f}.",
        )
    if samples["coverage"] is not None:
        finding.add(
            samples["coverage"] >= 0.9 * others["coverage"],
            f"Samples have coverage {samples['coverage']:.2f} and recall {samples['recall']:.2f}; real slices of other "
            f"subjects have {others['coverage']:.2f} and {others['recall']:.2f}.",
        )
    return finding


def _memorisation(numbers: dict[str, Any]) -> Finding:
    samples, decoded = numbers["samples"], numbers["references"]["reconstructions"]
    finding = Finding(
        "Samples: memorisation",
        f"Samples are {samples['nn_distance_ratio_pixels']:.2f} times as far from their nearest training slice as "
        f"unseen real slices are; reconstructions, which are similarly blurred, "
        f"{decoded['nn_distance_ratio_pixels']:.2f} times.",
    )
    for space in ("pixels", "features"):
        rate, expected = samples[f"near_duplicate_rate_{space}"], decoded[f"near_duplicate_rate_{space}"]
        finding.add(
            rate <= max(0.03, 1.5 * expected),
            f"In {space}, {_percent(rate, 1)} of the samples and {_percent(expected, 1)} of the reconstructions are "
            f"near-duplicates: nearer to a training slice than the nearest {_percent(0.01)} of unseen real slices.",
        )
    return finding


def _mmd2(numbers: dict[str, Any]) -> str:
    return f"{numbers['mmd2']:.3f} ± {numbers['mmd2_error']:.3f}"


def _percent(fraction: float, digits: int = 0) -> str:
    return f"{100 * fraction:.{digits}f}\u00a0%"  # A no-break space keeps number and sign on one line.


def _number(value: float | dict[str, Any] | None, digits: int = 3) -> str:
    """Format a number, or the accuracy of a classifier with its interval; None becomes a dash."""
    if isinstance(value, dict):
        return _number(value["accuracy"], 2) + _interval(value["accuracy_interval"], 2)
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(interval: list[float | None], digits: int = 3) -> str:
    """Format a 95 % interval as " (lower to upper)"; an undefined one becomes an empty string."""
    lower, upper = interval
    return "" if lower is None else f" ({lower:.{digits}f} to {upper:.{digits}f})"
