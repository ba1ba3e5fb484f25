"""data.py: volumes as SimpleITK reads and resamples them, every bad file said in one line, a cache
that survives kills."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy
import pytest
import torch

import data

CT = Path(__file__).parents[2] / "shared" / "ct"
real_scans = pytest.mark.skipif(not CT.exists(), reason="the real scans are not here")


def save_nifti(path, array, affine=None, **header):
    image = nibabel.Nifti1Image(
        array, numpy.diag([-1.5, -1.5, 2.0, 1]) if affine is None else affine
    )
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path


def hu_volume(shape=(20, 18, 16), seed=0):
    return numpy.random.default_rng(seed).integers(-1000, 1000, shape).astype(numpy.int16)


def write_manifest(folder, lines, header="name,path"):
    path = folder / "manifest.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


# ---- reading


def test_any_axis_order_gives_the_same_array_to_the_voxel(tmp_path):
    hu, lps = hu_volume(), numpy.diag([-1.5, -1.4, 2.0, 1])
    image = nibabel.Nifti1Image(hu, lps)
    for code in ("LPS", "RAS", "LAS", "SPL", "AIR", "PSR"):
        turn = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(lps), nibabel.orientations.axcodes2ornt(code)
        )
        nibabel.save(image.as_reoriented(turn), tmp_path / f"{code}.nii.gz")
        volume = data.read_volume(tmp_path / f"{code}.nii.gz")
        assert numpy.array_equal(volume.hu, hu)
        assert volume.spacing == pytest.approx((1.5, 1.4, 2.0))
        assert numpy.allclose(volume.affine, lps, atol=1e-4)


@real_scans
def test_real_scans_read_as_simpleitk_orients_them():
    sitk = pytest.importorskip("SimpleITK")
    for name in ("chest_ct", "abdomen_ct"):
        volume = data.read_volume(CT / f"{name}.nii.gz")
        oracle = sitk.DICOMOrient(sitk.ReadImage(str(CT / f"{name}.nii.gz")), "LPS")
        assert numpy.array_equal(volume.hu, sitk.GetArrayFromImage(oracle).transpose(2, 1, 0))
        assert volume.spacing == pytest.approx(oracle.GetSpacing())


def test_slope_and_intercept_replace_the_headers_and_are_applied_once(tmp_path):
    hu = hu_volume()
    raw = save_nifti(tmp_path / "raw.nii.gz", (hu + 1024).astype(numpy.int16))
    assert numpy.array_equal(data.read_volume(raw, slope=1, intercept=-1024).hu, hu)
    image = nibabel.Nifti1Image(
        (hu.astype(numpy.int32) + 1024).astype(numpy.uint16), numpy.diag([-1, -1, 1, 1])
    )
    image.header.set_slope_inter(1, -1024)
    content = bytearray(
        image.to_bytes()
    )  # nibabel resets the scaling on saving, so the two header fields are set by hand
    content[112:120] = numpy.array([1, -1024], "<f4").tobytes()
    (tmp_path / "scaled.nii").write_bytes(content)
    assert numpy.array_equal(data.read_volume(tmp_path / "scaled.nii").hu, hu)
    assert numpy.array_equal(
        data.read_volume(tmp_path / "scaled.nii", slope=1, intercept=-1024).hu, hu
    )
    assert numpy.allclose(data.read_volume(raw, slope=2, intercept=5).hu, (hu + 1024.0) * 2 + 5)


def test_spacing_from_the_metadata_replaces_the_headers_axis_by_axis(tmp_path):
    volume = data.read_volume(
        save_nifti(tmp_path / "a.nii.gz", hu_volume()), spacing=(0.7, 0.7, None)
    )
    assert volume.spacing == pytest.approx((0.7, 0.7, 2.0))
    assert nibabel.affines.voxel_sizes(volume.affine) == pytest.approx((0.7, 0.7, 2.0))


def test_rad_chestct_arrays_turn_from_head_first_slices_to_lps(tmp_path):
    ct = hu_volume((6, 5, 4))
    numpy.savez(tmp_path / "trn00001.npz", ct=ct)
    volume = data.read_volume(tmp_path / "trn00001.npz")
    assert volume.spacing == pytest.approx((0.8, 0.8, 0.8))
    assert (
        volume.hu[3, 1, 5] == ct[0, 1, 3]
    )  # the first slice is the head's, so it is the last along Superior


def test_big_endian_and_singleton_axes_are_read(tmp_path):
    hu = hu_volume()
    image = nibabel.Nifti1Image(
        hu[..., None].astype(">i2"),
        numpy.diag([-1, -1, 1, 1]),
        nibabel.Nifti1Header(endianness=">"),
    )
    nibabel.save(image, tmp_path / "big.nii.gz")
    volume = data.read_volume(tmp_path / "big.nii.gz")
    assert numpy.array_equal(volume.hu, hu) and volume.hu.dtype.isnative
    data.preprocess(volume.hu, volume.spacing, shape_out=(8, 8, 8))


def bad_files(folder):
    good = save_nifti(folder / "good.nii.gz", hu_volume())
    (folder / "truncated.nii.gz").write_bytes(good.read_bytes()[:-2000])
    (folder / "short.nii").write_bytes(gzip.decompress(good.read_bytes())[:-100])
    (folder / "text.nii.gz").write_text("not an image")
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "text.npz").write_text("not an archive")
    numpy.savez(folder / "pickled.npz", ct=numpy.array([{"a": 1}], dtype=object))
    numpy.savez(folder / "other.npz", volume=hu_volume())
    save_nifti(folder / "flat.nii.gz", hu_volume((20, 18)))
    save_nifti(folder / "time.nii.gz", hu_volume((8, 8, 8, 3)))
    save_nifti(folder / "constant.nii.gz", numpy.full((8, 8, 8), -1024, numpy.int16))
    nan = hu_volume().astype(numpy.float32)
    nan[3, 3, 3] = numpy.nan
    save_nifti(folder / "nan.nii.gz", nan)
    rgb = numpy.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    save_nifti(folder / "rgb.nii.gz", rgb)
    image = nibabel.Nifti1Image(hu_volume(), None)
    image.header["sform_code"], image.header["srow_x"] = 1, 0
    nibabel.save(image, folder / "singular.nii.gz")
    (folder / "volume.dcm").write_bytes(b"DICM")
    return {
        "absent": "no such file",
        "truncated": "",
        "short": "",
        "text": "",
        "empty": "too short",
        "pickled": "pickle",
        "other": "ct",
        "flat": "3D",
        "time": "3D",
        "constant": "empty",
        "nan": "NaN",
        "rgb": "not numbers",
        "singular": "singular",
        "volume": "not a .nii",
    }


def test_each_bad_file_is_one_line_that_names_it(tmp_path):
    for stem, reason in bad_files(tmp_path).items():
        files = list(tmp_path.glob(f"{stem}.*")) or [tmp_path / f"{stem}.nii.gz"]
        for file in files:
            with pytest.raises(ValueError) as caught:
                data.read_volume(file)
            message = str(caught.value)
            assert message.startswith(f"{file}: ") and reason in message and "\n" not in message, (
                message
            )


# ---- preprocessing


def simpleitk_preprocess(hu, spacing, spacing_out, shape_out):
    """SimpleITK's resampling of the whole volume, then crop or pad; NaN where it is undefined."""
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(hu.transpose(2, 1, 0).astype(numpy.float32))
    image.SetSpacing([float(s) for s in spacing])
    size = [max(1, round(n * s / t)) for n, s, t in zip(hu.shape, spacing, spacing_out)]
    resampled = sitk.GetArrayFromImage(
        sitk.Resample(
            image,
            size,
            sitk.Transform(),
            sitk.sitkLinear,
            image.GetOrigin(),
            [float(s) for s in spacing_out],
            image.GetDirection(),
            1e9,
        )
    ).transpose(2, 1, 0)
    full = numpy.full(shape_out, -1024.0)
    inside, source = [], []
    for n, wanted in zip(size, shape_out):
        kept = min(n, wanted)
        inside.append(slice((wanted - kept) // 2, (wanted - kept) // 2 + kept))
        source.append(slice((n - kept) // 2, (n - kept) // 2 + kept))
    full[tuple(inside)] = resampled[tuple(source)]
    full[full > 1e8] = numpy.nan
    return full.clip(-1000, 1000)


def assert_agrees(hu, spacing, spacing_out, shape_out):
    ours = data.preprocess(hu, spacing, spacing_out, shape_out)
    oracle = simpleitk_preprocess(hu, spacing, spacing_out, shape_out)
    defined = ~numpy.isnan(oracle)
    assert ours.dtype == numpy.int16 and ours.shape == tuple(shape_out) and defined.mean() > 0.5
    assert numpy.abs(ours - oracle)[defined].max() <= 1


def test_preprocess_agrees_with_simpleitk_on_random_anisotropic_volumes():
    random = numpy.random.default_rng(0)
    for trial in range(12):
        shape = random.integers(5, 60, 3)
        assert_agrees(
            hu_volume(shape, trial),
            random.uniform(0.5, 4, 3),
            random.uniform(0.8, 4, 3),
            random.integers(8, 50, 3),
        )


@real_scans
def test_preprocess_agrees_with_simpleitk_on_real_scans():
    for name in ("chest_ct", "abdomen_ct"):
        volume = data.read_volume(CT / f"{name}.nii.gz")
        assert_agrees(volume.hu, volume.spacing, (1.5, 1.5, 3.0), (256, 256, 128))
        assert_agrees(volume.hu, volume.spacing, (2.2, 1.9, 4.1), (60, 70, 40))


def naive_preprocess(hu, spacing, spacing_out, shape_out):
    """Resample the whole volume, crop it, pad it: the three lines of preprocess's docstring."""
    whole = hu.astype(numpy.float64)
    for axis, (step, step_out) in enumerate(zip(spacing, spacing_out)):
        size = whole.shape[axis]
        resampled = max(1, round(size * step / step_out))
        at = numpy.clip(numpy.arange(resampled) * (step_out / step), 0, size - 1)
        whole = numpy.apply_along_axis(
            lambda line: numpy.interp(at, numpy.arange(size), line), axis, whole
        )
    out = numpy.full(shape_out, -1024.0)
    cut, place = [], []
    for size, wanted in zip(whole.shape, shape_out):
        kept = min(size, wanted)
        cut.append(slice((size - kept) // 2, (size - kept) // 2 + kept))
        place.append(slice((wanted - kept) // 2, (wanted - kept) // 2 + kept))
    out[tuple(place)] = whole[tuple(cut)]
    return numpy.clip(out, -1000, 1000)


@pytest.mark.parametrize("shape", [(31, 17, 9), (8, 40, 23), (1, 5, 50), (64, 3, 4)])
def test_slab_by_slab_equals_resampling_cropping_and_padding_the_whole(shape):
    hu = numpy.random.default_rng(0).integers(-2000, 2000, shape).astype(numpy.int16)
    arguments = (1.3, 0.7, 2.9), (1.1, 1.9, 1.7), (20, 24, 21)
    difference = data.preprocess(hu, *arguments) - naive_preprocess(hu, *arguments)
    assert numpy.abs(difference).max() <= 0.502  # rounding to whole HU


def test_beyond_the_last_voxel_the_edge_is_kept():
    hu = numpy.full((2, 2, 2), 700, numpy.int16)
    hu[0, 0, 0] = 699
    out = data.preprocess(hu, (3, 3, 3), (1, 1, 1), (6, 6, 6))
    assert (out[3:, 3:, 3:] == 700).all()


def test_preprocess_takes_one_slice_and_leaves_its_input_alone():
    hu = hu_volume((9, 9, 1))
    before = hu.copy()
    assert data.preprocess(hu, (1, 1, 5), (1, 1, 1), (9, 9, 5)).std(axis=2).max() == 0
    assert numpy.array_equal(hu, before)


# ---- manifest


def test_a_hand_written_manifest_needs_name_and_path_alone(tmp_path):
    save_nifti(tmp_path / "a.nii.gz", hu_volume())
    rows = data.read_manifest(
        write_manifest(
            tmp_path,
            ["a,a.nii.gz,There is a nodule.", 'b,b.nii.gz,"Normal, all of it."'],
            "name,path,report",
        )
    )
    assert [(row.name, row.patient, row.report) for row in rows] == [
        ("a", "a", "There is a nodule."),
        ("b", "b", "Normal, all of it."),
    ]
    assert rows[0].read().hu.shape == (20, 18, 16)


def test_a_manifest_survives_being_written_and_read(tmp_path):
    rows = [
        data.Row(
            "a",
            tmp_path / "v" / "a.nii.gz",
            "train",
            "p1",
            "s1",
            'Lines,\n"quotes".',
            1.0,
            -1024.0,
            (0.7, 0.7, None),
            {"Emphysema": 1.0, "Lung nodule": 0.0},
        ),
        data.Row(
            "b", Path("/elsewhere/b.nii.gz"), "valid", "p2", "s2", labels={"Emphysema": numpy.nan}
        ),
    ]
    data.write_manifest(rows, tmp_path / "manifest.csv")
    a, b = data.read_manifest(tmp_path / "manifest.csv")
    assert a == rows[0] and (b.name, b.path, b.split) == ("b", Path("/elsewhere/b.nii.gz"), "valid")
    assert numpy.isnan(b.labels["Emphysema"]) and numpy.isnan(b.labels["Lung nodule"])
    assert data.read_manifest(tmp_path / "manifest.csv", "valid")[0].name == "b"


@pytest.mark.parametrize(
    "header, lines, said",
    [
        ("name,file", ["a,b"], "no column path"),
        ("name,path", [], "no rows"),
        ("name,path", ["a,a.nii", "a,b.nii"], "row 3: the name 'a' stands twice"),
        ("name,path", ["../a,a.nii"], "row 2: '../a' can't be a name"),
        ("name,path", ["a,"], "the path is empty"),
        ("name,path,slope", ["a,a.nii,one"], "slope is 'one'"),
        ("name,path,spacing_z", ["a,a.nii,0"], "spacing_z is '0'"),
        ("name,path,label:Emphysema", ["a,a.nii,yes"], "label:Emphysema is 'yes'"),
    ],
)
def test_what_is_wrong_in_a_manifest_is_named(tmp_path, header, lines, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        data.read_manifest(write_manifest(tmp_path, lines, header))


def test_an_unknown_split_and_a_foreign_encoding_are_named(tmp_path):
    with pytest.raises(ValueError, match="split 'test'; there are: 'train'"):
        data.read_manifest(write_manifest(tmp_path, ["a,a.nii,train"], "name,path,split"), "test")
    (tmp_path / "latin.csv").write_bytes("name,path\nä,b".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.csv: not a CSV file in UTF-8"):
        data.read_manifest(tmp_path / "latin.csv")


def ct_rate_files(root, release, prefix=""):
    """Two small volumes in CT-RATE's layout; a row of release 1's metadata lacks ZSpacing."""
    hu = {f"valid_{i}_a_1.nii.gz": hu_volume(seed=i) for i in (1, 2)}
    for volume, array in hu.items():
        patient, scan = "_".join(volume.split("_")[:2]), "_".join(volume.split("_")[:3])
        folder = root / ("valid_fixed" if release == 2 else "valid") / patient / scan
        folder.mkdir(parents=True)
        if release == 2:
            save_nifti(folder / volume, array)
        else:
            save_nifti(
                folder / volume, (array + 1024).astype(numpy.int16), numpy.diag([-1.0, -1, 1, 1])
            )
    tables = {
        f"radiology_text_reports/{prefix}validation_reports.csv": (
            [
                "VolumeName",
                "ClinicalInformation_EN",
                "Technique_EN",
                "Findings_EN",
                "Impressions_EN",
            ],
            [
                [v, "Not given.", "CT", "Findings\nof it.", "Not given."]
                for v in [*hu, "valid_3_a_1.nii.gz"]
            ],
        ),
        f"metadata/{prefix}validation_metadata.csv": (
            ["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"],
            [
                [v, "1", "-1024", "[1.5, 1.5]", z]
                for v, z in zip([*hu, "valid_3_a_1.nii.gz"], ("2.0", "", "2"))
            ],
        ),
        f"multi_abnormality_labels/{prefix}valid_predicted_labels.csv": (
            ["VolumeName", *data.CT_RATE],
            [[v, *[i % 2 for i in range(18)]] for v in hu],
        ),
        "multi_abnormality_labels/under_represented.csv": (
            ["VolumeName", *data.CT_RATE_LT],
            [[v, *[1.0] * 15] for v in hu],
        ),
    }
    for name, (header, lines) in tables.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with open(root / name, "w", newline="") as file:
            csv.writer(file).writerows([header, *lines])
    (root / "metadata" / "no_chest_valid.txt").write_text("valid_3_a_1.nii.gz\n")
    return hu


@pytest.mark.parametrize(
    "release, prefix", [(1, ""), (2, ""), (1, "dataset_metadata_"), (2, "dataset_")]
)
def test_either_release_of_ct_rate_gives_the_same_hu_and_labels(tmp_path, release, prefix):
    hu = ct_rate_files(tmp_path / "dataset", release, prefix)
    assert (
        data.main(
            [
                "manifest",
                "--dataset",
                "ct-rate",
                "--root",
                str(tmp_path),
                "--split",
                "valid",
                "--out",
                str(tmp_path / "m.csv"),
            ]
        )
        is None
    )
    rows = data.read_manifest(tmp_path / "m.csv")
    assert [row.name for row in rows] == ["valid_1_a_1", "valid_2_a_1"]  # the third shows no chest
    assert rows[0].report == "Findings of it." and (rows[0].patient, rows[0].scan) == (
        "valid_1",
        "valid_1_a",
    )
    assert [rows[0].labels[name] for name in data.CT_RATE] == [i % 2 for i in range(18)] and rows[
        0
    ].labels["Empyema"] == 1
    for row in rows:
        volume = row.read()
        assert numpy.array_equal(volume.hu, hu[f"{row.name}.nii.gz"])
        assert volume.spacing == pytest.approx(
            (1.5, 1.5, 1.0 if release == 1 and row.name == "valid_2_a_1" else 2.0)
        )


def test_ct_rate_without_its_files_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        data.ct_rate_manifest(tmp_path, "valid")
    ct_rate_files(tmp_path, 1)
    with pytest.raises(ValueError, match="not 'test'"):
        data.ct_rate_manifest(tmp_path, "test")
    (tmp_path / "metadata" / "validation_metadata.csv").unlink()
    with pytest.raises(ValueError, match="validation_metadata.csv"):
        data.ct_rate_manifest(tmp_path, "valid")


def test_rad_chestct_locations_fold_to_findings_and_findings_to_classes(tmp_path):
    numpy.savez(tmp_path / "tst00001.npz", ct=hu_volume())
    columns = {
        "nodule*right_upper": 0,
        "nodulegr1cm*lung": 1,
        "catheter_or_port*heart": 0,
        "stent*heart": 1,
        "calcification*aorta": 0,
        "hernia*other_location": 1,
        "bandlike_or_linear*lung": 1,
        "fracture*rib": 0,
    }
    with open(tmp_path / "imgtest_Abnormality_and_Location_Labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["NoteAcc_DEID", *columns], ["tst00001", *columns.values()]])
    (row,) = data.rad_chestct_manifest(tmp_path, "test")
    assert row.labels == {
        "Lung nodule": 1,
        "Medical material": 1,
        "Calcification": 0,
        "Hiatal hernia": 1,
        "Bandlike or linear": 1,
        "Fracture": 0,
    }
    assert row.read().spacing == pytest.approx((0.8, 0.8, 0.8))
    assert len(data.BENCHMARKS["rad-chestct"]) == 16


# ---- check, prepare, cache


def chest(shape=(60, 50, 50), spacing=(6.0, 6.0, 6.0)):
    hu = numpy.full(shape, 40, numpy.int16)
    hu[10:30, 10:40] = -850
    return hu + numpy.arange(shape[2], dtype=numpy.int16), numpy.diag(
        [-spacing[0], -spacing[1], spacing[2], 1]
    )


def test_check_lists_every_kind_of_problem_and_passes_a_good_scan(tmp_path, capsys):
    hu, affine = chest()
    save_nifti(tmp_path / "good.nii.gz", hu, affine)
    save_nifti(tmp_path / "raw.nii.gz", (hu + 1024).astype(numpy.int16), affine)
    save_nifti(tmp_path / "twice.nii.gz", (hu - 1024).astype(numpy.int16), affine)
    save_nifti(tmp_path / "small.nii.gz", hu, numpy.diag([-0.1, -1, 1, 1]))
    path = write_manifest(
        tmp_path, [f"{name},{name}.nii.gz" for name in ("good", "raw", "twice", "small", "absent")]
    )
    assert data.main(["check", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    said = {line.split()[0]: line for line in lines[:-1]}
    assert (
        set(said) == {"raw", "twice", "small", "absent"}
        and "5 volumes, 4 with a problem" == lines[-1]
    )
    assert (
        "not applied" in said["raw"]
        and "applied twice" in said["twice"]
        and "spacing" in said["small"]
        and "no such file" in said["absent"]
    )


def test_prepare_skips_lists_and_counts_bad_volumes_and_replaces_none(tmp_path):
    bad_files(tmp_path)
    names = ["good", "truncated", "text", "flat", "time", "constant", "nan", "absent"]
    rows = data.read_manifest(write_manifest(tmp_path, [f"{name},{name}.nii.gz" for name in names]))
    cache = data.Cache(tmp_path / "cache", (2, 2, 2), (8, 8, 8))
    ready, skipped = data.prepare(rows, cache)
    assert [row.name for row in ready] == ["good"] and [name for name, _ in skipped] == names[1:]
    listed = data.read_csv(tmp_path / "cache" / "skipped.csv", "name", "reason")
    assert [line["name"] for line in listed] == names[1:] and all(line["reason"] for line in listed)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_prepare_redoes_what_changed_and_nothing_else(tmp_path):
    for name in "ab":
        save_nifti(tmp_path / f"{name}.nii.gz", hu_volume())
    rows = data.read_manifest(write_manifest(tmp_path, ["a,a.nii.gz", "b,b.nii.gz"]))
    cache = data.Cache(tmp_path / "cache", (2, 2, 2), (8, 8, 8))
    data.prepare(rows, cache)
    made = {row.name: cache.path(row).stat().st_mtime_ns for row in rows}
    save_nifti(tmp_path / "b.nii.gz", hu_volume(seed=1))
    os.utime(tmp_path / "b.nii.gz", (time.time() + 9, time.time() + 9))
    data.prepare(rows, cache)
    assert (
        cache.path(rows[0]).stat().st_mtime_ns == made["a"]
        and cache.path(rows[1]).stat().st_mtime_ns != made["b"]
    )
    corrected = data.Row("a", rows[0].path, slope=1.0, intercept=-24.0)
    assert not cache.holds(corrected)
    with pytest.raises(ValueError, match="name another folder"):
        data.Cache(tmp_path / "cache", (3, 3, 3), (8, 8, 8))


def test_shards_share_the_work_without_overlap(tmp_path):
    names = [f"v{i}" for i in range(5)]
    for name in names:
        save_nifti(tmp_path / f"{name}.nii.gz", hu_volume())
    path = write_manifest(tmp_path, [f"{name},{name}.nii.gz" for name in names])
    for shard, count in (("1/2", 3), ("2/2", 5)):
        data.main(
            [
                "prepare",
                str(path),
                "--out",
                str(tmp_path / "cache"),
                "--shape",
                "8",
                "8",
                "8",
                "--shard",
                shard,
            ]
        )
        assert len(list((tmp_path / "cache").glob("*.npy"))) == count


def test_a_killed_prepare_is_finished_by_the_same_command(tmp_path):
    for i in range(40):
        save_nifti(tmp_path / f"v{i}.nii", hu_volume((64, 64, 64), i))
    path = write_manifest(tmp_path, [f"v{i},v{i}.nii" for i in range(40)])
    command = [
        sys.executable,
        "data.py",
        "prepare",
        str(path),
        "--out",
        str(tmp_path / "cache"),
        "--shape",
        "96",
        "96",
        "96",
        "--workers",
        "1",
    ]
    process = subprocess.Popen(
        command,
        cwd=Path(data.__file__).parent,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while len(list(tmp_path.glob("cache/*.npy"))) < 3:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(tmp_path.glob("cache/*.npy"))) < 40
    for file in tmp_path.glob("cache/*.npy"):
        assert numpy.load(file, allow_pickle=False).shape == (96, 96, 96)
    assert (
        subprocess.run(command, cwd=Path(data.__file__).parent, capture_output=True).returncode == 0
    )
    assert len(list(tmp_path.glob("cache/*.npy"))) == 40


# ---- training items


def items(tmp_path, reports, **options):
    for i in range(len(reports)):
        save_nifti(
            tmp_path / f"v{i}.nii.gz", hu_volume((12, 12, 12), i), numpy.diag([-1, -1, 1, 1])
        )
    rows = [
        data.Row(f"v{i}", tmp_path / f"v{i}.nii.gz", report=report)
        for i, report in enumerate(reports)
    ]
    cache = data.Cache(tmp_path / "cache", (1, 1, 1), (12, 12, 12))
    data.prepare(rows, cache)
    return rows, cache, data.ReportVolumes(rows, cache, **options)


def test_one_item_per_distinct_report_draws_any_of_its_volumes(tmp_path):
    rows, cache, pairs = items(tmp_path, ["Report one.", "Report two.", "Report one.", ""])
    assert len(pairs) == 2
    drawn = {tuple(pairs[epoch, 0][0].flatten()[:5].tolist()) for epoch in range(20)}
    assert drawn == {tuple(cache.read(rows[i]).flatten()[:5].tolist()) for i in (0, 2)}


def test_texts_are_one_to_five_sentences_in_random_order_of_the_summary_where_there_is_one(
    tmp_path,
):
    report = " ".join(f"Sentence {i} of 1.{i} cm." for i in range(8))
    summaries = {data.report_sha256("Short one."): "There is emphysema. There is lung nodule."}
    _, _, pairs = items(tmp_path, [report, "Short one."], summaries=summaries)
    texts = [pairs[epoch, 0][1] for epoch in range(60)]
    assert len(set(texts)) > 40 and {len(data.sentences(text)) for text in texts} == {1, 2, 3, 4, 5}
    assert all(len(set(data.sentences(text))) == len(data.sentences(text)) for text in texts)
    assert {pairs[epoch, 1][1] for epoch in range(60)} == {
        "There is emphysema. There is lung nodule.",
        "There is lung nodule. There is emphysema.",
        "There is emphysema.",
        "There is lung nodule.",
    }


def test_crops_vary_with_the_epoch_and_repeat_with_the_key(tmp_path):
    _, cache, pairs = items(tmp_path, ["A report."], crop=(8, 8, 8))
    whole = torch.from_numpy(numpy.array(cache.read(pairs.items[0][0][0])))
    crops = [pairs[epoch, 0][0] for epoch in range(8)]
    assert all(crop.shape == (1, 8, 8, 8) and crop.dtype == torch.int16 for crop in crops)
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) > 4
    assert torch.equal(pairs[3, 0][0], crops[3])
    assert any(
        torch.equal(crops[0][0], whole[x : x + 8, y : y + 8, z : z + 8])
        for x in range(5)
        for y in range(5)
        for z in range(5)
    )


def test_evaluation_volumes_are_whole(tmp_path):
    rows, cache, _ = items(tmp_path, ["A report."], crop=(8, 8, 8))
    assert data.Volumes(rows, cache)[0].shape == (1, 12, 12, 12)


def test_a_cut_summaries_file_is_said_and_failed_summaries_are_left_out(tmp_path):
    path = tmp_path / "summaries.jsonl"
    path.write_text(
        json.dumps({"report_sha256": "a", "summary": "There is x."})
        + "\n"
        + json.dumps({"report_sha256": "b", "summary": None})
        + "\n"
    )
    assert data.read_summaries(path) == {"a": "There is x."}
    path.write_text(path.read_text() + '{"report_sha')
    with pytest.raises(ValueError, match="line 3"):
        data.read_summaries(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "absent.csv"],
        [
            "manifest",
            "--dataset",
            "ct-rate",
            "--root",
            "absent",
            "--split",
            "valid",
            "--out",
            "m.csv",
        ],
        ["prepare", "absent.csv", "--out", "cache"],
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, arguments):
    done = subprocess.run(
        [sys.executable, Path(data.__file__).resolve(), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and done.stderr.startswith("data.py: error: absent")
    )
