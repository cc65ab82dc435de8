import pytest

import naming


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("keras_png_slices_train", "train"),
        ("keras_png_slices_validate", "validate"),
        ("Training", "train"),
        ("val", "validate"),
        ("valid", "validate"),
        ("validation", "validate"),
        ("testing", "test"),
        ("keras_png_slices_seg_train", None),
        ("data", None),
    ],
)
def test_split_of_folder(name, split):
    assert naming.split_of_folder(name) == split


def test_split_folders_are_recognised():
    assert [naming.split_of_folder(naming.split_folder(split)) for split in naming.SPLITS] == list(naming.SPLITS)


@pytest.mark.parametrize(
    "name", ["seg_001_slice_0.nii.png", "brain-MASK.png", "labels", "x.segmentation.nii.gz", "seg4.nii"]
)
def test_mask_names(name):
    assert naming.is_mask(name)


@pytest.mark.parametrize("name", ["case_001_slice_0.nii.png", "segment.png", "unmasked.nii"])
def test_names_that_are_not_masks(name):
    assert not naming.is_mask(name)


def test_volumes_and_archives():
    assert all(naming.is_volume(f"brain{suffix}") for suffix in (".nii", ".NII.GZ", ".hdr", ".img.gz", ".mgz"))
    assert not any(map(naming.is_volume, ("brain.png", "brain.tar.gz", "nii")))
    assert all(naming.is_archive(f"disc{suffix}") for suffix in (".tar", ".tgz", ".TAR.GZ"))
    assert not any(map(naming.is_archive, ("disc.zip", "disc.nii.gz")))


def test_atlas_names():
    assert naming.is_in_atlas("a/OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc.hdr")
    assert naming.is_in_atlas("aligned_norm.nii.gz")
    assert not naming.is_in_atlas("t88/norm.nii.gz")  # Only the file's own name counts.


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("disc1/OAS1_0001_MR1/x_t88_masked_gfc.hdr", ("OAS1_0001", "MR1")),
        ("disc1.tar.gz!disc1/OAS1_0002_MR2/x.hdr", ("OAS1_0002", "MR2")),
        ("sub-01/ses-02/anat/x.nii.gz", ("sub-01", "ses-02")),
        ("sub-01_ses-02_T1w.nii.gz", ("sub-01", "ses-02")),
        ("sub-01_T1w.nii.gz", ("sub-01", "ses-1")),
        ("a/brain.nii.gz", ("a/brain", "1")),
        ("a/BRAIN.NII.GZ", ("a/BRAIN", "1")),
        ("OAS1_0003_MR1_slice_4.png", ("OAS1_0003", "MR1")),
        ("train/OAS1_0003_MR2_slice_4.nii.png", ("OAS1_0003", "MR2")),
        ("OAS1_0003_MR2/slice_4.png", ("OAS1_0003", "MR2")),
        ("OAS30001_MR_d0129_slice_4.png", ("OAS30001", "MR_d0129")),
        ("OAS1_0003_slice_4.png", ("OAS1_0003", "1")),
        ("sub-01_ses-02_T1w_slice_4.png", ("sub-01", "ses-02")),
        ("sub-01_slice_4.png", ("sub-01", "ses-1")),
        ("train/case_001_slice_0.nii.png", ("case_001", "1")),
        ("test/case_001_slice_0_session_2.nii.png", ("case_001", "2")),
        ("case_001-Slice7.png", ("case_001", "1")),
        ("archive.tar!case_001_slice_0.nii", ("case_001", "1")),
        ("train/slice_3.png", ("train/slice_3.png", "1")),
    ],
)
def test_subject_and_session(path, expected):
    assert naming.subject_and_session(path) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("case_001_slice_0.nii.png", 0),
        ("OAS1_0001_MR1_slice_12.png", 12),
        ("sub-01_ses-02_slice_4.png", 4),
        ("case_001-Slice7.png", 7),
        ("case_001_slice_3_session_2.nii.png", 3),
        ("slice_3.png", 3),
        ("brain.png", None),
        ("backslice_3.png", None),
        ("case_001_slice_1234567.png", None),
    ],
)
def test_slice_position(name, expected):
    assert naming.slice_position(name) == expected


@pytest.mark.parametrize("suffix", [*naming.VOLUME_SUFFIXES, ".NII.GZ", ".Img", ".MGZ"])
def test_the_stem_of_a_volume_has_no_suffix(suffix):
    assert naming.volume_stem(f"a/Brain.1{suffix}") == "a/Brain.1"


def test_names_of_slice_files_can_be_read_back():
    assert naming.slice_file("case_001", 0) == "case_001_slice_0.nii.png"
    assert naming.slice_file("case_001", 5, session=2) == "case_001_slice_5_session_2.nii.png"
    for session in (1, 2):
        name = naming.slice_file("case_012", 31, session)
        assert naming.subject_and_session(name) == ("case_012", str(session))
        assert naming.slice_position(name) == 31


def test_one_volume_per_session_is_selected_of_oasis():
    names = [
        "d/OAS1_0001_MR1/PROCESSED/x_111_t88_masked_gfc.img",
        "d/OAS1_0001_MR1/PROCESSED/x_111_t88_masked_gfc.hdr",
        "d/OAS1_0001_MR1/PROCESSED/x_111_t88_gfc.hdr",
        "d/OAS1_0001_MR1/FSL_SEG/x_111_t88_masked_gfc_fseg.hdr",
        "d/OAS1_0001_MR2/norm.nii.gz",
        "d/OAS1_0002_MR1/norm.nii.gz",
        "d/OAS1_0002_MR1/aligned_norm.nii.gz",
        "d/OAS1_0003_MR1/slice_norm.nii.gz",
        "d/readme.txt",
    ]
    assert naming.select_volumes(names) == [
        "d/OAS1_0001_MR1/PROCESSED/x_111_t88_masked_gfc.hdr",
        "d/OAS1_0001_MR2/norm.nii.gz",
        "d/OAS1_0002_MR1/aligned_norm.nii.gz",
        "d/OAS1_0003_MR1/slice_norm.nii.gz",
    ]


def test_all_volumes_except_masks_are_selected_elsewhere():
    names = ["a/b.nii", "a/b_mask.nii", "a/.hidden.nii", "c.img", "c.hdr", "D.IMG", "D.HDR", "d.mgz", "e.png"]
    assert naming.select_volumes(names) == ["D.HDR", "a/b.nii", "c.hdr", "d.mgz"]
