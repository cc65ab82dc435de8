"""report.html: one self-contained file that says what a run did, what is good about it and what is not."""

import base64
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

TEMPLATE = Path(__file__).with_name("report.html.jinja")

CAPTIONS = {
    "reconstructions.png": "Slices of unseen people, what the codes keep of them, and the difference (red: too bright, "
    "blue: too dark).",
    "worst.png": "The ten test slices with the lowest brain SSIM, the worst first.",
    "by_position.png": "How good reconstructions are from the lowest slice to the highest.",
    "power_spectrum.png": "Fine detail lies to the right. Where a curve falls below that of the real slices, its "
    "images are blurred; where it lies above, they are noisy.",
    "samples_by_position.png": "New brains, four at each slice position, under a real slice of an unseen person.",
    "samples.png": "The new brains of the folder samples/.",
    "copies.png": "The ten new brains that lie nearest to a training slice, above that slice, with their root mean "
    "square difference: copies would be the same picture twice.",
    "codebook.png": "The pixels under a code and half as many around, averaged over the places where it stands in the "
    "test split, the most used code first. Codes of the black background can carry detail for other places.",
    "codes.png": "Test slices and the codes that stand for them; like codes have like colours.",
    "levels.png": "What each level of codes holds: the other one's codes are replaced by the mean of their vectors.",
    "code_usage.png": "Share of the codes used and their perplexity, by epoch.",
    "ssim.png": "SSIM of reconstructions by epoch.",
    "vqvae_loss.png": "The VQ-VAE's loss by part and epoch.",
    "prior_loss.png": "The prior's loss by epoch. Where validation rises while training falls, it learns people by "
    "heart; the epoch with the best validation is kept.",
}

# measure in metrics.json, its name, and how to read it
SAMPLE_ROWS = (
    ("told_from_real", "told from real slices by a classifier", "0.50 is perfect"),
    ("told_from_reconstructions", "told from reconstructions by a classifier", "0.50 is perfect: the prior's own part"),
    ("precision", "precision", "share that lies among real slices; higher is better"),
    ("density", "density", "the same, robust to outliers"),
    ("recall", "recall", "share of real slices that lie among these; higher is more varied"),
    ("coverage", "coverage", "the same, robust to outliers"),
    ("kernel_distance", "kernel distance", "0 is perfect; ± standard error"),
    ("ms_ssim_of_pairs", "MS-SSIM of pairs", "as that of real pairs; higher is less varied"),
    (
        "nearest_train_pixels",
        "distance to the nearest training slice, pixels",
        "of that of unseen slices; blur lowers it",
    ),
    ("nearest_train_features", "the same in features", "of that of unseen slices"),
    ("copies_pixels", "nearer than the nearest 1\u00a0% of unseen slices, pixels", "0.01 is par"),
    ("copies_features", "the same in features", "0.01 is par"),
)


@dataclass
class Finding:
    """One thing that a run shows: a sentence, what is good about it, and what is not."""

    title: str
    says: str
    good: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def add(self, is_good: bool, says: str) -> None:
        """Add a sentence on the side it belongs to."""
        (self.good if is_good else self.bad).append(says)


def write(path: Path, name: str, constants: dict, numbers: dict, history: list[dict], note: str) -> None:
    """Write the report of a run.

    Args:
        path: where to; the pictures are taken from `images/` beside it.
        name: of the run. constants, numbers: what stands in config.json and metrics.json.
        history: rows of history.csv. note: what the data are, if not real slices.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=_number, between=_between)
    images = path.parent / "images"
    pictures = [
        {"caption": caption, "data": base64.b64encode((images / name).read_bytes()).decode()}
        for name, caption in CAPTIONS.items()
        if (images / name).exists()  # a single level has no levels.png
    ]
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name,
        constants=constants,
        numbers=numbers,
        findings=findings(constants, numbers, history),
        sample_rows=SAMPLE_ROWS,
        pictures=pictures,
        grids=" and ".join(f"{grid} × {grid}" for grid in constants["grids"]),
        epochs=" + ".join(str(epochs) for epochs in Counter(row["stage"] for row in history).values()),
        note=note,
    )
    path.write_text(page, encoding="utf-8", newline="")


def findings(constants: dict, numbers: dict, history: list[dict]) -> list[Finding]:
    """The main numbers in words."""
    return [
        _reconstruction(constants, numbers),
        _prior(numbers, history, constants),
        _likelihood(numbers),
        _quality(numbers),
        _variety(numbers),
        _copying(numbers),
    ]


def _reconstruction(constants: dict, n: dict) -> Finding:
    size, bits = constants["image_size"], n["prior_bits_per_image"]
    finding = Finding(
        "Reconstruction",
        f"Reconstructs unseen people at SSIM {_number(n['ssim'])}{_between(n['ssim_interval'])}, the brain alone at "
        f"{_number(n['ssim_brain'])}{_between(n['ssim_brain_interval'])}, PSNR {n['psnr_db']:.1f} dB, from "
        f"{bits:,.0f} bits an image.",
    )
    finding.add(True, f"An 8-bit slice of {size} × {size} pixels is {size * size * 8 / bits:,.0f} times as many bits.")
    worst = n["worst_slices"][0]
    at = f"{worst['case']} at position {worst['position']}"
    finding.add(False, f"The worst slice, {at}, has a brain SSIM of {_number(worst['ssim_brain'])}.")
    if n["half_power_frequency"] >= 0.5:
        finding.add(True, "Reconstructions hold half of the real slices' power or more at every frequency.")
    else:
        finest = 1 / (2 * max(n["half_power_frequency"], 1e-9))
        finding.add(False, f"Blur: of details below {finest:.1f} pixels, less than half of the power is left.")
    told = n["samples"]["reconstructions"]["told_from_real"]["accuracy"]
    if told is not None:
        finding.add(told < 0.6, f"A classifier tells reconstructions from real slices {_percent(told)} of the time.")
    return finding


def _prior(n: dict, history: list[dict], constants: dict) -> Finding:
    bits, independent = n["prior_bits_per_image"], n["independent_bits_per_image"]
    levels = _by_level(n["prior_bits_per_code"])
    each = " and ".join(f"{value:.2f} bits a {level}code" for level, value in levels.items())
    finding = Finding("Prior", f"Expects the codes of unseen people at {each}, {bits:,.0f} bits an image.")
    saved = 1 - bits / max(independent, 1e-9)
    cost = f"Each code sent on its own would cost {independent:,.0f} bits an image"
    finding.add(saved > 0.1, f"{cost}: the prior saves {_percent(saved)}.")
    perplexity = _by_level(n["perplexity"])
    for level, used in _by_level(n["codes_used"]).items():
        words = f"{_percent(used)} of {constants['num_embeddings']} {level}codes are in use"
        finding.add(used > 0.9, f"{words}, perplexity {perplexity[level]:.0f}.")
    for level in levels:
        stage = f"{level}prior".replace(" ", "_")
        best = min((row for row in history if row["stage"] == stage), key=lambda row: row["val_loss"])
        epoch = f"In the best epoch of the {level}prior, {best['epoch']}, its loss"
        losses = f"is {best['loss']:.2f} nats a code on the people it learned from, {best['val_loss']:.2f} on others"
        if best["val_loss"] > 1.05 * best["loss"]:
            finding.add(False, f"{epoch} {losses}: it has begun to learn people by heart.")
        else:
            finding.add(True, f"{epoch} {losses}: it holds for people it has not seen.")
    return finding


def _by_level(value: float | dict[str, float]) -> dict[str, float]:
    """{"top ": …, "bottom ": …}, or {"": …} of a single level."""
    return {f"{level} ": number for level, number in value.items()} if isinstance(value, dict) else {"": value}


def _likelihood(n: dict) -> Finding:
    total, histogram = n["bits_per_dimension"], n["histogram_bits_per_dimension"]
    finding = Finding(
        "Likelihood",
        f"An unseen 8-bit slice costs at most {total:.2f} bits a pixel: {n['prior_bits_per_dimension']:.2f} for the "
        f"codes and, given these, {n['decoder_bits_per_dimension']:.2f} for the pixels.",
    )
    finding.add(total < histogram, f"Each pixel by its grey level's frequency alone costs {histogram:.2f}.")
    return finding


def _quality(n: dict) -> Finding:
    drawn, real = n["samples"]["drawn"], n["samples"]["train"]
    told, among = drawn["told_from_real"]["accuracy"], drawn["told_from_reconstructions"]["accuracy"]
    finding = Finding("New brains: quality", "Too few people to say whether new brains can be told from real ones.")
    if told is not None:
        finding.says = (
            f"New brains are told from real slices {_percent(told)} of the time; {_percent(0.5)} is perfect, and real "
            f"slices of other people are told apart {_percent(real['told_from_real']['accuracy'])} of the time."
        )
        if told < 0.6:
            finding.add(True, "A small classifier can hardly tell them from real slices.")
        else:
            finding.add(False, "A small classifier finds them out: they do not pass for real.")
        words = f"They are told from reconstructions of real slices {_percent(among)} of the time: "
        if among < 0.65:
            finding.add(True, words + "what gives them away is mostly what the decoder does to real ones too.")
        else:
            finding.add(False, words + "the prior arranges codes in ways that real slices do not.")
    if drawn["kernel_distance"] is not None:
        near = drawn["kernel_distance"] <= real["kernel_distance"] + 2 * drawn["kernel_distance_error"]
        values = f"{_distance(drawn)}, where real slices of other people have {_distance(real)}"
        finding.add(near, f"Kernel distance {values}.")
    return finding


def _variety(n: dict) -> Finding:
    drawn, real, pairs = n["samples"]["drawn"], n["samples"]["train"], n["samples"]["real_ms_ssim_of_pairs"]
    finding = Finding("New brains: variety", "Too few people in the test split to compare pairs of slices.")
    if drawn["ms_ssim_of_pairs"] is not None:
        own = drawn["ms_ssim_of_pairs"]
        how = "as varied as" if abs(own - pairs) <= 0.01 else "less varied than" if own > pairs else "more varied than"
        finding.says = f"New brains are {how} real ones."
        finding.add(
            abs(own - pairs) <= 0.01,
            f"Two of them at the same position have an MS-SSIM of {own:.3f} on average, two real slices {pairs:.3f}.",
        )
    if drawn["coverage"] is not None:
        finding.add(
            drawn["coverage"] >= 0.9 * real["coverage"],
            f"Coverage {drawn['coverage']:.2f} and recall {drawn['recall']:.2f}, where real slices of other people "
            f"have {real['coverage']:.2f} and {real['recall']:.2f}.",
        )
    return finding


def _copying(n: dict) -> Finding:
    drawn, decoded = n["samples"]["drawn"], n["samples"]["reconstructions"]
    finding = Finding(
        "New brains: copies",
        f"New brains lie at {drawn['nearest_train_pixels']:.2f} of the distance that unseen people have to their "
        "nearest training slice; reconstructions of those people, blurred alike, at "
        f"{decoded['nearest_train_pixels']:.2f}.",
    )
    for space in ("pixels", "features"):
        share, allowed = drawn[f"copies_{space}"], decoded[f"copies_{space}"]
        finding.add(
            share <= max(0.03, 1.5 * allowed),
            f"In {space}, {_percent(share, 1)} of new brains are nearer to a training slice than the nearest "
            f"{_percent(0.01)} of unseen people's slices are; of reconstructions of these, {_percent(allowed, 1)}.",
        )
    return finding


def _distance(measured: dict) -> str:
    return f"{measured['kernel_distance']:.3f} ± {measured['kernel_distance_error']:.3f}"


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}\u00a0%"  # no line break before the sign


def _number(value: float | dict | None, digits: int = 3) -> str:
    """A number, or the accuracy of a two-sample test, for people; a dash where there is none."""
    if isinstance(value, dict):
        return _number(value["accuracy"], 2) + _between(value["accuracy_interval"], 2)
    return "–" if value is None else f"{value:.{digits}f}"


def _between(interval: list, digits: int = 3) -> str:
    """A 95 % interval in brackets after a space, nothing where there is none."""
    lower, upper = interval
    return "" if lower is None else f" ({lower:.{digits}f} to {upper:.{digits}f})"
