"""What the names of files and folders say: splits, subjects, sessions, slice positions, volumes and masks.

dataset.py, phantom.py and oasis.py share these rules. This module needs the standard library only.
"""

import re

SPLITS = ("train", "validate", "test")
VOLUME_SUFFIXES = (".nii.gz", ".nii", ".img.gz", ".img", ".hdr.gz", ".hdr", ".mgz", ".mgh")
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")

_SPLIT_PREFIX = "keras_png_slices_"
_SPLIT_ALIASES = {
    "train": "train",
    "training": "train",
    "validate": "validate",
    "validation": "validate",
    "val": "validate",
    "valid": "validate",
    "test": "test",
    "testing": "test",
}
_ATLAS_WORDS = ("t88", "aligned")
_OASIS_PATTERNS = (r"_t88_masked_gfc\.", r"/aligned_norm\.", r"/norm\.", r"/slice_norm\.")  # Best volumes first.
_MASK_WORDS = {"seg", "segmentation", "mask", "masks", "label", "labels"}

_OASIS_SESSION = re.compile(r"(OAS\d_?\d{4})_(MR(?:\d+|_d\d+))", re.IGNORECASE)  # OAS1_0001_MR1, OAS30001_MR_d0129.
_BIDS_SESSION = re.compile(r"(?<![A-Za-z0-9])(sub-[A-Za-z0-9]+)(?:[/_](ses-[A-Za-z0-9]+))?")
_SLICE = re.compile(r"(.+?)[_-]slice[_-]?\d+(?:_session_(\d+))?", re.IGNORECASE | re.DOTALL)
_SLICE_POSITION = re.compile(r"(?:^|[_-])slice[_-]?(\d{1,6})(?!\d)", re.IGNORECASE)


def split_folder(split: str) -> str:
    """Return the name of the folder that holds the slices of a split, such as `keras_png_slices_train`."""
    return _SPLIT_PREFIX + split


def split_of_folder(name: str) -> str | None:
    """Return the split that a folder is named after, or None for any other name."""
    return _SPLIT_ALIASES.get(name.lower().removeprefix(_SPLIT_PREFIX))


def is_mask(name: str) -> bool:
    """Whether a file or folder is named as a mask: one of the words in its name is `seg`, `mask` or `label`."""
    return not _MASK_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def is_volume(name: str) -> bool:
    """Whether a file is named as a NIfTI, Analyze or MGH volume."""
    return name.lower().endswith(VOLUME_SUFFIXES)


def is_archive(name: str) -> bool:
    """Whether a file is named as a tar archive."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def is_in_atlas(path: str) -> bool:
    """Whether the file name of a volume says that it is in an atlas space: it contains `t88` or `aligned`."""
    return any(word in _file_name(path).lower() for word in _ATLAS_WORDS)


def volume_stem(name: str) -> str:
    """Return the name of a volume without its suffix. The two files of an Analyze pair have the same stem."""
    return next((name[: -len(suffix)] for suffix in VOLUME_SUFFIXES if name.lower().endswith(suffix)), name)


def subject_and_session(path: str) -> tuple[str, str]:
    """Read the subject (person) and the session from the path of a volume or of a slice.

    Args:
        path: The path, with slashes.

    Returns:
        - `("OAS1_0001", "MR1")` for OASIS names, such as `OAS1_0001_MR1_slice_4.png`;
        - `("sub-01", "ses-02")` for BIDS names, such as `sub-01/ses-02/anat/x.nii.gz`, or `("sub-01", "ses-1")` if the
          session is missing;
        - `("case_001", "2")` for names like those of `slice_file`, such as `case_001_slice_0_session_2.nii.png`, and
          `("case_001", "1")` if the session is missing;
        - the path without the suffix of a volume, and `"1"`, for any other path.
    """
    if match := _OASIS_SESSION.search(path):
        return match[1], match[2]
    if match := _BIDS_SESSION.search(path):
        return match[1], match[2] or "ses-1"
    if match := _SLICE.match(_file_name(path)):
        return match[1], match[2] or "1"
    return volume_stem(path), "1"


def select_volumes(names: list[str]) -> list[str]:
    """Select the volumes to convert from a list of all paths.

    Of OASIS-1 and Neurite-OASIS it is one volume per session: the skull-stripped, bias-corrected one in atlas space,
    otherwise the one in the subject's own space, otherwise the single slice. Elsewhere it is every volume that is not
    named as a mask.
    """
    volumes = [name for name in names if is_volume(name) and not _file_name(name).startswith(".")]
    by_stem = {volume_stem(name): name for name in sorted(volumes, reverse=True)}  # The .hdr of a pair.
    volumes = sorted(by_stem.values())
    best: dict[tuple[str, str], tuple[int, str]] = {}
    for name in volumes:
        rank = next((i for i, pattern in enumerate(_OASIS_PATTERNS) if re.search(pattern, name)), None)
        if rank is not None:
            session = subject_and_session(name)
            best[session] = min(best.get(session, (rank, name)), (rank, name))
    if best:
        return sorted(name for _, name in best.values())
    return [name for name in volumes if not is_mask(_file_name(name))]


def _file_name(path: str) -> str:
    return re.split(r"[/!]", path)[-1]  # oasis.py puts "!" between an archive and the path of its member.


def slice_file(subject: str, position: int, session: int = 1) -> str:
    """Return the name of a slice's PNG file, such as `case_001_slice_0.nii.png`.

    Args:
        subject: Name of the subject, such as `case_001`.
        position: Slice position, counted from below.
        session: Which of the subject's sessions it is, counted from 1. Later ones add `_session_2` and so on.
    """
    return f"{subject}_slice_{position}{f'_session_{session}' if session > 1 else ''}.nii.png"


def slice_position(name: str) -> int | None:
    """Read the slice position from the name of a slice's PNG file: 0 from `case_001_slice_0.nii.png`.

    Returns:
        The position, or None if the name does not state one of at most six digits.
    """
    match = _SLICE_POSITION.search(name)
    return int(match[1]) if match else None
