"""report.html: one self-contained file with the pictures, the main findings and the numbers of a run."""

import base64
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

import console
import controls
import pictures
from generator import Results

TEMPLATE = Path(__file__).with_name("report.html.jinja")
LEADING_PICTURES = 3  # The first pictures of `pictures.PICTURES` stand above the findings, the others at the end.

# Key in metrics.json, name, how to read it, and the key in `controls.failed_controls`, if it has controls.
SAMPLE_ROWS = (
    ("c2st_real", "classifier accuracy against real slices", "0.50 (chance) is best", "c2st"),
    ("c2st_half_size", "the same at half the size", "if it is lower, the finest details differ most", "c2st"),
    (
        "c2st_reconstructions",
        "classifier accuracy against reconstructions",
        "0.50 is best; a higher value is due to the codes, not to the decoder",
        "c2st",
    ),
    ("c2st_codes", "classifier accuracy, on codes", "0.50 is best; does not depend on the decoder", "c2st_codes"),
    (
        "critic_auc",
        "AUC of the critic's surprise",
        "0.50 is best; above, codes do not fit together; below, they are typical of the training subjects",
        "critic_auc",
    ),
    ("precision", "precision", "fraction of these slices that resemble real ones; higher is better", "precision"),
    ("density", "density", "like precision, but robust to outliers", "density"),
    (
        "recall",
        "recall",
        "fraction of real slices that resemble these; also rises if these slices scatter widely",
        "recall",
    ),
    ("coverage", "coverage", "like recall, but robust to outliers", "coverage"),
    ("mmd2", "squared MMD", "0 is best; ± standard error", ""),
    (
        "ms_ssim_of_pairs",
        "MS-SSIM of pairs",
        "best if equal to that of real pairs; higher is less varied, but blur raises it, too",
        "",
    ),
    ("power_low", "power below 0.125 cycles per pixel", "relative to real slices; 1 is best", ""),
    ("power_middle", "power from 0.125 to 0.25", "1 is best; less is blur, more is noise", ""),
    ("power_high", "power above 0.25", "1 is best; less is blur, more is noise", ""),
    (
        "code_hamming",
        "fraction of codes unlike the nearest training slice's",
        "a low value means copies; compare with the reconstructions, whose codes are those of unseen subjects",
        "",
    ),
    *(
        (
            f"near_duplicate_rate_{space}",
            f"near-duplicates of training slices, in {space}",
            f"fraction as near to a training slice as the nearest 1\u00a0% of unseen slices; {expected}",
            f"near_duplicate_rate_{space}",
        )
        for space, expected in (
            ("codes", "many distances are equal, so compare it with that of the reconstructions"),
            ("pixels", "0.01 is expected"),
            ("features", "0.01 is expected"),
            ("images", "0.01 is expected"),
        )
    ),
)
# Key and name of the columns of the table of controls.
CONTROL_COLUMNS = (
    ("c2st", "classifier, on images"),
    ("c2st_codes", "classifier, on codes"),
    ("critic_auc", "AUC of the critic"),
    ("precision", "precision"),
    ("density", "density"),
    ("recall", "recall"),
    ("coverage", "coverage"),
    *(
        (f"near_duplicate_rate_{space}", f"near-duplicates in {space}")
        for space in ("codes", "pixels", "features", "images")
    ),
)


@dataclass
class Finding:
    """One conclusion about a run.

    Attributes:
        title: What it is about.
        summary: The conclusion in one or two sentences.
        good: Sentences that speak for the model.
        bad: Sentences that speak against it.
        open: Sentences about measures that fail their controls, from which nothing follows.
    """

    title: str
    summary: str
    good: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def add(self, is_good: bool, sentence: str) -> None:
        """Add a sentence to `good` or `bad`."""
        (self.good if is_good else self.bad).append(sentence)

    def add_if_reliable(self, numbers: dict[str, Any], measure: str, name: str, is_good: bool, sentence: str) -> None:
        """Add a sentence unless the measure that it rests on fails its controls."""
        failed = numbers["failed_controls"].get(measure, [])  # Older runs lack controls.
        reason = f"Nothing follows from {name}. Failed controls: {', '.join(failed)}."
        if failed:
            self.open += [reason] if reason not in self.open else []
        else:
            self.add(is_good, sentence)


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
    shown = [
        {
            "title": picture.name.replace("_", " "),
            "caption": picture.caption,
            "data": base64.b64encode((images / f"{picture.name}.png").read_bytes()).decode(),
        }
        for picture in pictures.of_run(len(constants["grids"]), results.generator.networks)
    ]
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name,
        constants=constants,
        numbers=results.numbers,
        findings=findings(constants, results.numbers),
        sample_rows=SAMPLE_ROWS,
        sets=_sets(results.numbers),
        control_columns=CONTROL_COLUMNS,
        control_descriptions=controls.DESCRIPTIONS,
        leading_pictures=shown[:LEADING_PICTURES],
        other_pictures=shown[LEADING_PICTURES:],
        blind_test_key=pictures.blind_test(results)[1],
        grids=" and ".join(f"{grid}\u00a0×\u00a0{grid}" for grid in constants["grids"]),
        epochs=Counter(row["stage"].replace("vqvae", "VQ-VAE").replace("_", " ") for row in results.history),
        note=results.note,
    )
    path.write_text(console.as_unicode(page), encoding="utf-8", newline="")


def _sets(numbers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the numbers of each column of the table of samples, by name."""
    references = numbers["references"]
    names = {
        "faithful_samples": "samples, faithful decoder",
        "reconstructions": "reconstructions",
        "sharp_reconstructions": "sharp reconstructions",
        "other_subjects": "other subjects",
    }
    return {"samples": numbers["samples"]} | {names[key]: references[key] for key in names if key in references}


def findings(constants: dict[str, Any], numbers: dict[str, Any]) -> list[Finding]:
    """Describe the main numbers in words.

    Args:
        constants: The configuration, as in config.json.
        numbers: The content of metrics.json.
    """
    return [
        _reconstruction(constants, numbers),
        _prior(constants, numbers),
        _likelihood(numbers),
        _quality(numbers),
        _variety(numbers),
        _memorisation(numbers),
    ]


def _reconstruction(constants: dict[str, Any], numbers: dict[str, Any]) -> Finding:
    size, bits = numbers["frame_size"], numbers["prior_bits_per_image"]
    finding = Finding(
        "Reconstruction",
        f"Slices of unseen subjects are reconstructed with SSIM {_number(numbers['ssim'])}"
        f"{_interval(numbers['ssim_interval'])}, over the brain alone {_number(numbers['ssim_brain'])}"
        f"{_interval(numbers['ssim_brain_interval'])}, and PSNR {numbers['psnr_db']:.1f} dB, from {bits:,.0f} bits per "
        "image.",
    )
    ratio = size * size * 8 / bits
    finding.add(True, f"An uncompressed 8-bit slice of {size} × {size} pixels has {ratio:,.0f} times as many bits.")
    worst = numbers["worst_slices"][0]
    finding.add(
        False,
        f"The worst slice ({worst['subject']}, position {worst['position']}) has an SSIM of "
        f"{_number(worst['ssim_brain'])} over the brain.",
    )
    finding.add(
        numbers["power_high"] > 0.7,
        f"Reconstructions have {_percent(numbers['power_middle'])} of the real slices' power between 0.125 and 0.25 "
        f"cycles per pixel, and {_percent(numbers['power_high'])} above: the less, the blurrier.",
    )
    if "sharp" in numbers:
        finding.add(
            0.7 < numbers["sharp"]["power_high"] < 1.3,
            f"Those of the sharp decoder have {_percent(numbers['sharp']['power_high'])} of the power above 0.25 "
            f"cycles per pixel, and SSIM {_number(numbers['sharp']['ssim'])}. Its fine folds are plausible, not true: "
            "the codes do not say where each of them lies.",
        )
    accuracy = numbers["references"]["reconstructions"]["c2st_real"]["accuracy"]
    if accuracy is not None:
        finding.add_if_reliable(
            numbers,
            "c2st",
            "the classifier",
            accuracy < 0.6,
            f"A classifier distinguishes reconstructions from real slices with {_percent(accuracy)} accuracy "
            f"({_percent(0.5)} is chance).",
        )
    return finding


def _prior(constants: dict[str, Any], numbers: dict[str, Any]) -> Finding:
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
    if "selector_bits_saved" in numbers:
        bits_saved = numbers["selector_bits_saved"]
        finding.add(
            bits_saved > 0,
            f"The selector chooses each sample among {constants['num_candidates']} proposals of the prior. Codes of "
            f"unseen subjects take at least {bits_saved:.1f} bits per image less if this choice is counted.",
        )
    perplexity = _by_level(numbers["perplexity"])
    for level, used in _by_level(numbers["codes_used"]).items():
        usage = f"{_percent(used)} of the {level}codes are used"
        finding.add(used > 0.9, f"{usage}, with a perplexity of {perplexity[level]:.0f}.")
    unseen, seen = (_by_level(numbers[f"prior_nats_per_code{split}"]) for split in ("", "_train"))
    for level in levels:
        ratio = unseen[level] / max(seen[level], 1e-9)
        finding.add(
            ratio < 1.05,
            f"The {level}codes of training subjects take {seen[level]:.2f} nats per code and those of test subjects "
            f"{unseen[level]:.2f}: the prior "
            + ("generalises to unseen subjects." if ratio < 1.05 else "has memorised some of its training subjects."),
        )
    return finding


def _by_level(value: float | dict[str, float]) -> dict[str, float]:
    """Return {"top ": …, "bottom ": …}, or {"": …} if there is a single level."""
    return {f"{level} ": number for level, number in value.items()} if isinstance(value, dict) else {"": value}


def _likelihood(numbers: dict[str, Any]) -> Finding:
    total = numbers["bits_per_dimension"]
    finding = Finding(
        "Likelihood",
        f"An unseen slice takes at most {total:.2f} bits per pixel: {numbers['prior_bits_per_dimension']:.2f} for the "
        f"codes and {numbers['decoder_bits_per_dimension']:.2f} for the pixels given the codes.",
    )
    for name in ("PNG", "WebP"):
        size = numbers[f"{name.lower()}_bits_per_dimension"]
        if size is not None:
            finding.add(total < size, f"As a lossless {name} file, it takes {size:.2f} bits per pixel.")
    return finding


def _quality(numbers: dict[str, Any]) -> Finding:
    samples, others = numbers["samples"], numbers["references"]["other_subjects"]
    accuracy, against_decoded = samples["c2st_real"]["accuracy"], samples["c2st_reconstructions"]["accuracy"]
    finding = Finding("Samples: quality", "There are too few subjects to compare samples with real slices.")
    if accuracy is not None:
        real = numbers["controls"]["real"]["c2st"]["accuracy"]
        finding.summary = (
            f"A classifier distinguishes samples from real slices with {_percent(accuracy)} accuracy, and from "
            f"reconstructions with {_percent(against_decoded)} ({_percent(0.5)} is chance; for real slices of other "
            f"subjects it is {_percent(real)})."
        )
        if numbers["failed_controls"]["c2st"]:
            finding.summary = "The classifier fails its controls."
        for value, means in (
            (accuracy, "samples from real slices"),
            (against_decoded, "samples from reconstructions, which is due to the codes and not to the decoder"),
        ):
            sentence = f"A classifier {'can hardly distinguish' if value < 0.6 else 'distinguishes'} {means}."
            finding.add_if_reliable(numbers, "c2st", "the classifier of images", value < 0.6, sentence)
        on_codes = samples["c2st_codes"]["accuracy"]
        finding.add_if_reliable(
            numbers,
            "c2st_codes",
            "the classifier of codes",
            on_codes < 0.6,
            f"A classifier distinguishes their codes from those of real slices with {_percent(on_codes)} accuracy.",
        )
    if samples["critic_auc"] is not None:
        finding.add_if_reliable(
            numbers,
            "critic_auc",
            "the critic",
            0.4 <= samples["critic_auc"] <= 0.6,
            f"An independently trained prior, the critic, ranks samples as more surprising than slices of unseen "
            f"subjects in {_percent(samples['critic_auc'])} of all pairs ({_percent(0.5)} is best; halves of two "
            f"subjects reach {_percent(numbers['controls']['halves']['critic_auc'])}).",
        )
    if samples["precision"] is not None and others["precision"] is not None:
        finding.add_if_reliable(
            numbers,
            "precision",
            "precision",
            samples["precision"] >= 0.9 * others["precision"],
            f"Samples have precision {samples['precision']:.2f}; real slices of other subjects have "
            f"{others['precision']:.2f} ± {others['precision_spread']:.2f}.",
        )
    if samples["mmd2"] is not None and others["mmd2"] is not None:
        finding.add(
            samples["mmd2"] <= others["mmd2"] + 2 * samples["mmd2_error"],
            f"The squared maximum mean discrepancy (MMD) from real slices is {_mmd2(samples)}; for real slices of "
            f"other subjects it is {others['mmd2']:.3f} ± {others['mmd2_spread']:.3f}.",
        )
    return finding


def _variety(numbers: dict[str, Any]) -> Finding:
    samples, references = numbers["samples"], numbers["references"]
    decoded_alike = references.get("sharp_reconstructions", references["reconstructions"])
    own, decoded = samples["ms_ssim_of_pairs"], decoded_alike["ms_ssim_of_pairs"]
    finding = Finding("Samples: variety", "There are too few test subjects to compare pairs of slices.")
    if own is not None:
        equal = abs(own - decoded) <= 0.01
        how = "as varied as" if equal else "less varied than" if own > decoded else "more varied than"
        finding.summary = f"Samples are {how} reconstructions of real slices."
        finding.add(
            equal,
            f"Pairs of samples at the same position have a mean MS-SSIM of {own:.3f}, pairs of reconstructions "
            f"{decoded:.3f}. Real slices have {references['real_ms_ssim_of_pairs']:.3f}.",
        )
    others = references["other_subjects"]
    for name in ("coverage", "recall"):
        if samples[name] is not None and others[name] is not None:
            finding.add_if_reliable(
                numbers,
                name,
                name,
                samples[name] >= 0.9 * others[name],
                f"Samples have {name} {samples[name]:.2f}; real slices of other subjects have {others[name]:.2f} ± "
                f"{others[f'{name}_spread']:.2f}.",
            )
    return finding


def _memorisation(numbers: dict[str, Any]) -> Finding:
    samples, decoded = numbers["samples"], numbers["references"]["reconstructions"]
    finding = Finding("Samples: memorisation", "There are too few subjects to search for copies.")
    if samples["code_hamming"] is not None and decoded["code_hamming"] is not None:
        finding.summary = (
            f"Of a sample's codes, {_percent(samples['code_hamming'])} differ from those of the nearest training "
            f"slice; for slices of unseen subjects it is {_percent(decoded['code_hamming'])}."
        )
    if samples["near_duplicate_rate_images"] is not None:
        finding.add_if_reliable(
            numbers,
            "near_duplicate_rate_images",
            "near-duplicates in images",
            samples["near_duplicate_rate_images"] <= 0.03,
            f"As they are shown, {_percent(samples['near_duplicate_rate_images'], 1)} of the samples are nearer to a "
            f"real training slice than the nearest {_percent(0.01)} of unseen subjects' slices.",
        )
    for space in ("codes", "pixels", "features"):
        name = f"near_duplicate_rate_{space}"
        if samples[name] is not None:
            finding.add_if_reliable(
                numbers,
                name,
                f"near-duplicates in {space}",
                samples[name] <= 0.03,
                f"In {space}, {_percent(samples[name], 1)} of the samples are near-duplicates: nearer to a training "
                f"slice than the nearest {_percent(0.01)} of unseen subjects' slices.",
            )
    return finding


def _mmd2(numbers: dict[str, Any]) -> str:
    return f"{numbers['mmd2']:.3f} ± {numbers['mmd2_error']:.3f}"


def _percent(fraction: float | None, digits: int = 0) -> str:
    """Format a fraction in percent; None becomes a dash."""
    # A no-break space keeps number and sign on one line.
    return "–" if fraction is None else f"{100 * fraction:.{digits}f}\u00a0%"


def _number(value: float | dict[str, Any] | None, digits: int = 3) -> str:
    """Format a number, or the accuracy of a classifier with its interval; None becomes a dash."""
    if isinstance(value, dict):
        return _number(value["accuracy"], 2) + _interval(value["accuracy_interval"], 2)
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(interval: list[float | None], digits: int = 3) -> str:
    """Format a 95 % interval as " (lower to upper)"; an undefined one becomes an empty string."""
    lower, upper = interval
    return "" if lower is None else f" ({lower:.{digits}f} to {upper:.{digits}f})"
