"""The findings in words, and the page that shows them."""

import copy
import html
import json
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import comparison
import controls
import metrics
import pictures
import report
import two_sample
from run import without_nan
from tests import test_comparison, test_controls

CONSTANTS = {
    "image_size": 96,
    "coding_size": None,
    "grids": [12],
    "num_embeddings": 512,
    "prior": "gated",
    "selector_epochs": 0,
    "num_candidates": 1,
    "decoder_epochs": 0,
    "sharp_samples": True,
    "data_dir": "/data/<oasis>",
}
HISTORY = [{"stage": stage, "epoch": 1, "loss": 1.0, "val_loss": 1.0} for stage in ("vqvae", "prior", "critic")]
UNDEFINED = {"accuracy": None, "accuracy_interval": [None, None]}


def accuracy(value: float) -> dict:
    return {"accuracy": value, "accuracy_interval": [value - 0.05, value + 0.05]}


SPACES = ("codes", "pixels", "features", "images")
SET = {
    "c2st_real": accuracy(0.55),
    "c2st_half_size": accuracy(0.52),
    "critic_auc": 0.5,
    "critic_auc_interval": [0.45, 0.55],
    "precision": 0.8,
    "recall": 0.7,
    "density": 0.9,
    "coverage": 0.9,
    "mmd2": 0.01,
    "mmd2_error": 0.02,
    "ms_ssim_of_pairs": 0.85,
    "power_low": 1.0,
    "power_middle": 1.0,
    "power_high": 1.0,
    "code_hamming": 0.6,
    **{f"nn_distance_ratio_{space}": 1.0 for space in SPACES},
    **{f"near_duplicate_rate_{space}": 0.01 for space in SPACES},
}
SPREAD = {name: SET[name] for name in ("precision", "recall", "density", "coverage", "mmd2", "mmd2_error")}
SPREAD |= {"ms_ssim_of_pairs": 0.85, **{f"{name}_spread": 0.03 for name in (*SPREAD, "ms_ssim_of_pairs")}}
ROW = {"ssim": 0.9, "ssim_brain": 0.8, "ms_ssim": 0.95, "psnr_db": 25.0, "mae": 0.02}
MEASURES = tuple(controls.failed_controls(test_controls.GOOD_CONTROLS, test_controls.RECONSTRUCTIONS))
NUMBERS = {
    "test_slices": 24,
    "test_subjects": 6,
    "compared_slices": {"train": 2880, "validate": 24, "test": 24},
    "crop": 192,
    "frame_size": 128,
    **ROW,
    **{f"{name}_interval": [value - 0.01, value + 0.01] for name, value in ROW.items()},
    "worst_slices": [{"index": 3, "subject": "case_<b>", "position": 7, **ROW}],
    "half_power_frequency": 0.25,
    "power_low": 1.0,
    "power_middle": 0.9,
    "power_high": 0.8,
    "codes_used": 1.0,
    "perplexity": 300.0,
    "marginal_entropy_bits_per_image": 1200.0,
    "prior_nats_per_code": 3.5,
    "prior_nats_per_code_train": 3.45,
    "prior_nats_per_code_validate": 3.5,
    "prior_bits_per_code": 5.0,
    "prior_bits_per_image": 720.0,
    "bits_per_dimension": 2.0,
    "position_bits_per_dimension": 0.001,
    "prior_bits_per_dimension": 0.1,
    "decoder_bits_per_dimension": 1.9,
    "png_bits_per_dimension": 3.0,
    "webp_bits_per_dimension": 2.5,
    "samples": {"count": 24, **SET, "c2st_reconstructions": accuracy(0.5), "c2st_codes": accuracy(0.52)},
    "references": {"reconstructions": SET, "other_subjects": SPREAD, "real_ms_ssim_of_pairs": 0.85},
    "controls": {name: {**SET, "c2st": accuracy(0.9), "c2st_codes": UNDEFINED} for name in controls.DESCRIPTIONS},
    "failed_controls": dict.fromkeys(MEASURES, []),
}
BY_LEVEL = ("codes_used", "perplexity", "prior_bits_per_code", "prior_nats_per_code", "prior_nats_per_code_train")


def findings_by_title(numbers=NUMBERS, **samples) -> dict[str, report.Finding]:
    numbers = {**numbers, "samples": {**numbers["samples"], **samples}}
    return {finding.title: finding for finding in report.findings(CONSTANTS, numbers)}


def mentioned(sentences: list[str], words: str) -> bool:
    return any(words in sentence for sentence in sentences)


def test_good_samples_have_good_findings():
    findings = findings_by_title()
    for finding in findings.values():
        assert not finding.open
        assert not finding.bad or finding.title == "Reconstruction"  # It always names the worst slice.
    assert "as varied as" in findings["Samples: variety"].summary
    assert "0.900 (0.890 to 0.910)" in findings["Reconstruction"].summary
    assert "720 bits per image" in findings["Reconstruction"].summary


def test_variety_is_compared_with_reconstructions_by_the_decoder_of_the_samples():
    references = NUMBERS["references"] | {"sharp_reconstructions": {**SET, "ms_ssim_of_pairs": 0.7}}
    finding = findings_by_title({**NUMBERS, "references": references})["Samples: variety"]
    assert "less varied than" in finding.summary
    assert mentioned(finding.bad, "0.700")


@pytest.mark.parametrize(
    ("samples", "title", "words"),
    [
        ({"c2st_real": accuracy(0.97)}, "Samples: quality", "samples from real slices"),
        ({"c2st_reconstructions": accuracy(0.9)}, "Samples: quality", "due to the codes"),
        ({"c2st_codes": accuracy(0.9)}, "Samples: quality", "their codes"),
        ({"critic_auc": 0.7}, "Samples: quality", "critic"),
        ({"critic_auc": 0.3}, "Samples: quality", "critic"),
        ({"precision": 0.5}, "Samples: quality", "precision 0.50"),
        ({"mmd2": 0.5}, "Samples: quality", "0.500 ± 0.020"),
        ({"ms_ssim_of_pairs": 0.9}, "Samples: variety", "0.900"),
        ({"coverage": 0.4}, "Samples: variety", "coverage 0.40"),
        ({"recall": 0.4}, "Samples: variety", "recall 0.40"),
        ({"near_duplicate_rate_codes": 0.3}, "Samples: memorisation", "In codes, 30.0\u00a0%"),
        ({"near_duplicate_rate_features": 0.3}, "Samples: memorisation", "In features, 30.0\u00a0%"),
    ],
)
def test_weaknesses_are_listed_as_bad(samples, title, words):
    finding = findings_by_title(**samples)[title]
    assert mentioned(finding.bad, words)
    assert not mentioned(finding.good, words)


@pytest.mark.parametrize(
    ("measure", "title", "words"),
    [
        ("c2st", "Reconstruction", "classifier"),
        ("c2st", "Samples: quality", "samples from re"),
        ("c2st_codes", "Samples: quality", "their codes"),
        ("critic_auc", "Samples: quality", "critic"),
        ("precision", "Samples: quality", "precision"),
        ("coverage", "Samples: variety", "coverage"),
        ("recall", "Samples: variety", "recall"),
        ("near_duplicate_rate_codes", "Samples: memorisation", "In codes"),
        ("near_duplicate_rate_pixels", "Samples: memorisation", "In pixels"),
        ("near_duplicate_rate_features", "Samples: memorisation", "In features"),
        ("near_duplicate_rate_images", "Samples: memorisation", "As they are shown"),
    ],
)
@pytest.mark.parametrize("is_good", [True, False])
def test_nothing_follows_from_a_measure_that_fails_its_controls(measure, title, words, is_good):
    bad = {**dict.fromkeys(("critic_auc", "precision", "coverage", "recall"), 0.1), "c2st_real": accuracy(0.97)}
    bad |= {"c2st_codes": accuracy(0.97), "c2st_reconstructions": accuracy(0.97)}
    bad |= {f"near_duplicate_rate_{space}": 0.5 for space in SPACES}
    samples = {} if is_good else bad
    passed = findings_by_title(**samples)[title]
    assert mentioned([*passed.good, *passed.bad], words)
    phrase = "halves (0.51 instead of at least 0.7)"
    failed = findings_by_title(
        {**NUMBERS, "failed_controls": {**NUMBERS["failed_controls"], measure: [phrase]}}, **samples
    )[title]
    assert mentioned(failed.open, phrase)
    assert not mentioned([*failed.good, *failed.bad], words)
    if measure == "c2st" and title != "Reconstruction":
        assert "%" not in failed.summary


def test_blur_is_listed_as_bad():
    blurred = findings_by_title({**NUMBERS, "power_high": 0.3})["Reconstruction"]
    assert mentioned(blurred.bad, "30\u00a0% above")
    assert mentioned(findings_by_title()["Reconstruction"].good, "80\u00a0% above")


def test_a_selector_should_save_bits():
    constants = {**CONSTANTS, "num_candidates": 8}
    for saved, kind in ((1.5, "good"), (-0.5, "bad")):
        prior = report.findings(constants, {**NUMBERS, "selector_bits_saved": saved})[1]
        assert mentioned(getattr(prior, kind), f"at least {saved:.1f} bits per image less")
    assert not mentioned(report.findings(constants, NUMBERS)[1].good, "selector")


def test_memorisation_by_the_prior_is_judged_by_the_training_subjects():
    assert mentioned(findings_by_title()["Prior"].good, "generalises")
    prior = findings_by_title({**NUMBERS, "prior_nats_per_code_train": 2.0})["Prior"]
    assert mentioned(prior.bad, "2.00 nats per code")
    assert mentioned(prior.bad, "memorised")


def test_a_likelihood_worse_than_lossless_files_is_bad():
    finding = findings_by_title({**NUMBERS, "png_bits_per_dimension": 1.5, "webp_bits_per_dimension": None})[
        "Likelihood"
    ]
    assert mentioned(finding.bad, "PNG")
    assert not mentioned([*finding.good, *finding.bad], "WebP")
    assert mentioned(findings_by_title()["Likelihood"].good, "WebP")


def test_findings_of_two_levels_name_the_level():
    both = {name: {"top": NUMBERS[name], "bottom": 0.5} for name in BY_LEVEL}
    prior = report.findings(CONSTANTS, {**NUMBERS, **both})[1]
    assert "5.00 bits per top code and 0.50 bits per bottom code" in prior.summary
    assert "720 bits per image" in prior.summary
    assert mentioned(prior.good, "100\u00a0% of the top codes")
    assert mentioned(prior.bad, "50\u00a0% of the bottom codes")


BLIND_TEST_KEY = [{"number": 1, "kind": "generated", "position": 12, "subject": ""}]


def draw_blank_pictures(folder, num_levels, networks=()):
    (folder / "images").mkdir()
    for picture in pictures.of_run(num_levels, networks):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "images" / f"{picture.name}.png")


@pytest.fixture
def run_folder(tmp_path):
    draw_blank_pictures(tmp_path, num_levels=1)
    return tmp_path


def write(folder, numbers=NUMBERS, note="", constants=CONSTANTS, history=HISTORY, networks=()) -> str:
    results = SimpleNamespace(numbers=numbers, history=history, note=note, generator=SimpleNamespace(networks=networks))
    with mock.patch.object(pictures, "blind_test", return_value=(None, BLIND_TEST_KEY)):
        report.write(folder / "report.html", folder.name, constants, results)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_report_is_self_contained(run_folder):
    page = write(run_folder)
    assert page.startswith("<!doctype html>")
    assert page.count('src="data:image/png;base64,') == len(pictures.of_run(1, ()))
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "http" not in page


def test_report_shows_the_captions_in_order_samples_first(run_folder):
    page = write(run_folder)
    escaped = [picture.caption.replace("'", "&#39;") for picture in pictures.of_run(1, ())]
    places = [page.index(caption) for caption in escaped]
    assert places == sorted(places)
    names = [picture.name for picture in pictures.PICTURES[: report.LEADING_PICTURES]]
    assert names == ["samples_by_position", "samples", "reconstructions"]
    first_finding = page.index("Samples: quality")
    assert places[report.LEADING_PICTURES - 1] < first_finding < places[report.LEADING_PICTURES]


def test_report_of_two_levels_has_all_pictures(tmp_path):
    networks = ["selector", "decoder"]
    draw_blank_pictures(tmp_path, 2, networks)
    references = {**NUMBERS["references"], "sharp_reconstructions": SET, "faithful_samples": SET}
    numbers = {**NUMBERS, "sharp": {"ssim": 0.5, "power_high": 1.0}, "references": references}
    numbers |= {name: {"top": 1.0, "bottom": 1.0} for name in BY_LEVEL}
    history = [{**HISTORY[0], "stage": stage} for stage in ("vqvae", "top_prior", "bottom_prior")]
    page = write(tmp_path, numbers, constants={**CONSTANTS, "grids": [16, 32]}, history=history, networks=networks)
    assert page.count('src="data:image/png;base64,') == len(pictures.PICTURES)
    assert "16\u00a0×\u00a016 and 32\u00a0×\u00a032" in page
    assert "(top prior)" in page
    assert "<th>sharp reconstructions</th>" in page
    assert "plausible, not true" in page


def test_names_are_escaped(run_folder):
    page = write(run_folder)
    assert "case_&lt;b&gt;" in page
    assert "<oasis>" not in page


def test_the_key_of_the_blind_test_is_folded_away_below_its_picture(run_folder):
    page = write(run_folder)
    (key,) = re.findall(r'<details class="key">.*?</details>', page, re.DOTALL)
    assert "<td>1</td><td>generated</td><td>12</td><td></td>" in key
    assert page.index("A test for people") < page.index(key) < page.index("lowest SSIM over the brain, worst first")


def test_note_is_shown(run_folder):
    assert "SYNTHETIC slices" in write(run_folder, note="SYNTHETIC slices, not real brains")
    assert "SYNTHETIC" not in write(run_folder)


def rows_of_table(page: str, heading: str) -> list[list[str]]:
    """The cells of each row of the table below a heading, without tags."""
    table = page.split(f"<h2>{heading}</h2>")[1].split("</table>")[0].split("<tbody>")[1]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in table.split("</tr>")]
    return [[" ".join(re.sub(r"<[^>]+>", "", cell).split()) for cell in row] for row in rows if row]


def test_controls_table_shows_every_control(run_folder):
    rows = rows_of_table(write(run_folder), "Controls")
    assert [row[0].replace(" ", "_") for row in rows] == list(controls.DESCRIPTIONS)
    for row in rows:
        assert len(row) == len(report.CONTROL_COLUMNS) + 2
        assert row[1] == "0.90 (0.85 to 0.95)"
        assert row[2] == "–"  # The classifier of codes is undefined.
        assert row[3] == "0.50 (0.45 to 0.55)"
        assert row[-1]


def test_comparison_table_shows_every_measure_with_its_error(run_folder):
    rows = {html.unescape(row[0]): row for row in rows_of_table(write(run_folder), "Samples compared with real slices")}
    assert len(rows) == len(report.SAMPLE_ROWS)
    assert rows["precision"][1:4] == ["0.800", "0.800", "0.800 ± 0.030"]
    assert rows["squared MMD"][1:4] == ["0.010 ± 0.020", "0.010 ± 0.020", "0.010 ± 0.030"]
    assert rows["AUC of the critic's surprise"][1:4] == ["0.500 (0.450 to 0.550)"] * 2 + [""]


def test_failed_controls_are_named_beside_the_measure(run_folder):
    rows = rows_of_table(write(run_folder), "Samples compared with real slices")
    assert not [row for row in rows if "fails its controls" in row[-1]]
    phrase = "halves (0.51 instead of at least 0.7)"
    page = write(run_folder, {**NUMBERS, "failed_controls": {**NUMBERS["failed_controls"], "precision": [phrase]}})
    assert phrase in page.split("<h2>Controls</h2>")[1]
    rows = rows_of_table(page, "Samples compared with real slices")
    assert [row[0] for row in rows if "fails its controls" in row[-1]] == ["precision"]


def test_undefined_numbers_become_dashes(run_folder):
    numbers = copy.deepcopy(NUMBERS)
    references = numbers["references"]
    sets = [
        numbers["samples"],
        references["reconstructions"],
        references["other_subjects"],
        *numbers["controls"].values(),
    ]
    for measured in sets:
        for key, value in measured.items():
            measured[key] = {dict: UNDEFINED, list: [None, None], int: value}.get(type(value))
    references["real_ms_ssim_of_pairs"] = None
    numbers["ssim_brain"] = numbers["worst_slices"][0]["ssim_brain"] = numbers["webp_bits_per_dimension"] = None
    numbers["ssim_brain_interval"] = [None, None]
    page = write(run_folder, numbers)
    for heading in ("Samples compared with real slices", "Controls"):
        for row in rows_of_table(page, heading):
            assert set(row[1:4]) <= {"–", "– ± –", ""}, row
    assert "None" not in page.split("<summary>Configuration")[0]
    assert "too few test subjects" in page


@pytest.mark.parametrize("name", ["precision", "mmd2", "coverage", "recall"])
def test_undefined_numbers_of_other_subjects_leave_a_finding_out(name):
    """With a single training subject, samples can be compared with the test slices, but other subjects cannot."""
    references = {**NUMBERS["references"], "other_subjects": {**SPREAD, name: None, f"{name}_spread": None}}
    numbers = {**NUMBERS, "references": references}
    numbers["controls"] = {**NUMBERS["controls"], "real": {**NUMBERS["controls"]["real"], "c2st": UNDEFINED}}
    findings = findings_by_title(numbers)
    words = {"mmd2": "MMD"}.get(name, f"have {name}")
    for finding in findings.values():
        assert not mentioned([*finding.good, *finding.bad], words)


def test_three_slices_pass_through_everything(run_folder, monkeypatch):
    """One subject with one slice in each split: most comparisons are undefined."""
    monkeypatch.setattr(two_sample, "CLASSIFIER_MAX_EPOCHS", 1)
    results = test_comparison.make_results((1, 1, 1), (5,))
    numbers = without_nan({**metrics.measure(results)[0], **comparison.compare(results, seed=0)})
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert numbers["ssim_interval"] == [None, None]
    assert numbers["samples"]["mmd2"] is None
    page = write(run_folder, numbers, constants={**CONSTANTS, "image_size": 32, "grids": [4]})
    assert "None" not in page.split("<summary>Configuration")[0]
