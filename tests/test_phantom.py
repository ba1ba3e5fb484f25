"""The synthetic benchmark: what is written is what is drawn, said and labelled; the same seed gives
the same bytes."""

import csv
import hashlib
import json
import random
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import phantom
import phantom_reports

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Four scans written by one worker, with masks."""
    out = tmp_path_factory.mktemp("phantom") / "one"
    return phantom.write(out, 2, 2, seed=3, workers=1, masks=True)


def _hashes(out):
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_same_seed_same_bytes_for_one_and_two_workers_and_after_a_kill(written, tmp_path):
    out = tmp_path / "two"
    command = [
        sys.executable,
        "phantom.py",
        "--out",
        str(out),
        "--train",
        "2",
        "--valid",
        "2",
        "--seed",
        "3",
        "--workers",
        "2",
        "--masks",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(out.rglob("*.nii.gz")) and process.poll() is None:
        pass
    process.kill()
    process.wait()
    for path in out.rglob("*.nii.gz"):  # whatever is there is whole
        if not path.name.startswith("."):
            assert zlib.decompress(path.read_bytes(), 31)
    kept = {
        path: path.stat().st_mtime_ns
        for path in out.rglob("*.nii.gz")
        if not path.name.startswith(".")
    }
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert _hashes(out) == _hashes(written)


def test_a_larger_count_extends_a_smaller_one():
    for index in range(40):
        found = phantom_reports.findings(1, "train", index)
        assert found == phantom_reports.findings(1, "train", index) and list(found) == [
            name for name in phantom_reports.ABNORMALITIES if name in found
        ]
    names = [phantom.scan_name(1, "train", index) for index in range(220)]
    assert len(set(names)) == 220 and sum(name.endswith("_b") for name in names) == 20


def test_layout_names_labels_and_metadata_are_those_of_ct_rate(written):
    stamp = json.loads((written / "phantom.json").read_text())
    assert stamp["seed"] == 3 and stamp["train"] == stamp["valid"] == 2
    rare = {
        row["VolumeName"]: row
        for row in _rows(written / "multi_abnormality_labels/ct_rate_lt_labels.csv")
    }
    for split, long in (("train", "train"), ("valid", "validation")):
        reports, metadata = (
            _rows(written / f"radiology_text_reports/{long}_reports.csv"),
            _rows(written / f"metadata/{long}_metadata.csv"),
        )
        labels = _rows(written / f"multi_abnormality_labels/{split}_predicted_labels.csv")
        assert list(reports[0]) == [
            "VolumeName",
            "ClinicalInformation_EN",
            "Technique_EN",
            "Findings_EN",
            "Impressions_EN",
        ]
        assert (
            list(labels[0]) == ["VolumeName"] + phantom_reports.CT_RATE
            and list(rare[labels[0]["VolumeName"]]) == ["VolumeName"] + phantom_reports.CT_RATE_LT
        )
        names = [row["VolumeName"] for row in reports]
        assert (
            names
            == [row["VolumeName"] for row in metadata]
            == [row["VolumeName"] for row in labels]
        )
        assert sorted(names) == sorted(
            path.name for path in (written / f"{split}_fixed").rglob("*.nii.gz")
        )
        for row, label in zip(metadata, labels):
            name = row["VolumeName"]
            _, patient, scan, k = name[:-7].split("_")
            image = nib.load(
                written / f"{split}_fixed/{split}_{patient}/{split}_{patient}_{scan}/{name}"
            )
            assert image.get_data_dtype() == np.int16 and np.allclose(
                image.header.get_zooms(), json.loads(row["XYSpacing"]) + [float(row["ZSpacing"])]
            )
            index = next(
                i for i in range(2) if phantom.scan_name(3, split, i) == f"{split}_{patient}_{scan}"
            )
            hu, affine, _, found, masks = phantom.draw(3, split, index, int(k) - 1)
            assert np.array_equal(np.asarray(image.dataobj), hu) and np.allclose(
                image.affine, affine, atol=1e-4
            )
            given = {a for a in phantom_reports.ABNORMALITIES if (label | rare[name])[a] == "1"}
            assert given == set(found) == set(masks)
            if split == "valid":
                bits = np.asarray(nib.load(written / f"masks/{name}").dataobj)
                assert all(
                    np.array_equal(bits >> phantom_reports.ABNORMALITIES.index(a) & 1, masks[a])
                    for a in masks
                )


def test_both_releases_decode_to_the_same_hu(written, tmp_path):
    out = phantom.write(tmp_path / "raw", 1, 1, seed=3, release=1, workers=1)
    for split, long in (("train", "train"), ("valid", "validation")):
        for row in _rows(out / f"metadata/{long}_metadata.csv"):
            name = row["VolumeName"][:-7]
            raw, fixed = (
                nib.load(out / phantom.volume_path(name, 1)),
                nib.load(written / phantom.volume_path(name, 2)),
            )
            assert np.allclose(raw.header.get_zooms(), 1) and nib.aff2axcodes(
                raw.affine
            ) == nib.aff2axcodes(fixed.affine)
            hu = np.asarray(raw.dataobj) * float(row["RescaleSlope"]) + float(
                row["RescaleIntercept"]
            )
            assert (
                raw.dataobj.slope == 1
                and raw.dataobj.inter == 0
                and np.array_equal(hu, np.asarray(fixed.dataobj))
            )


# In its mask, against the same patient without it: how the mean HU changes, and what the mean is.
CHANGE = {
    "Medical material": (60, 4000, -1000, 3100),
    "Arterial wall calcification": (60, 900, 80, 1200),
    "Cardiomegaly": (1, 900, 20, 70),
    "Pericardial effusion": (-700, 700, -45, 40),
    "Coronary artery wall calcification": (60, 1200, 80, 1300),
    "Hiatal hernia": (-900, 900, -800, 80),
    "Lymphadenopathy": (20, 900, -20, 90),
    "Emphysema": (-300, -20, -1024, -900),
    "Atelectasis": (250, 1000, -350, 100),
    "Lung nodule": (350, 1300, -300, 450),
    "Lung opacity": (120, 400, -750, -250),
    "Pulmonary fibrotic sequela": (150, 1000, -600, 150),
    "Pleural effusion": (350, 1000, -120, 30),
    "Mosaic attenuation pattern": (40, 150, -850, -600),
    "Peribronchial thickening": (100, 900, -700, 0),
    "Consolidation": (350, 1000, -300, 60),
    "Bronchiectasis": (20, 600, -800, -150),
    "Interlobular septal thickening": (80, 500, -750, -250),
    "Pneumonia": (150, 800, -600, 0),
    "Pneumothorax": (-300, -60, -1024, -850),
    "Empyema": (150, 1000, -120, 80),
    "Tuberculosis": (80, 800, -700, 150),
    "Pulmonary fibrosis": (60, 600, -750, -250),
    "Lung cyst": (-150, 60, -1000, -720),
    "Bronchial thickening": (60, 700, -800, -50),
    "Lung mass": (400, 1000, -150, 80),
    "Osteophyte": (60, 900, 100, 800),
    "Rib fracture": (-400, 900, 40, 600),
    "Atherosclerosis": (-60, 900, 0, 500),
    "Pericardial calcification": (60, 1000, 80, 1000),
    "Spondylosis": (80, 700, 200, 900),
    "Pleural calcification": (60, 1200, 50, 900),
    "Pneumomediastinum": (-900, -60, -1000, -100),
}


@pytest.fixture(scope="module")
def plain_scans():
    """HU of two patients without findings."""
    return {
        index: phantom.draw(9, "train", index, lesions={}, masks=False)[0].astype(np.float32)
        for index in (0, 5)
    }


@pytest.mark.parametrize("name", phantom_reports.ABNORMALITIES)
def test_each_abnormality_changes_its_place_as_its_physics_says(name, plain_scans):
    for index in (0, 5):
        rng = random.Random(f"{name} {index}")
        found = {
            name: [
                lesion | {"place": (rng.random(), rng.random(), rng.random())}
                for lesion in phantom_reports.LESIONS[name](rng)
            ]
        }
        hu, affine, spacing, _, masks = phantom.draw(9, "train", index, lesions=found)
        plain = plain_scans[index]
        mask = masks[name]
        assert hu.shape == mask.shape == plain.shape and mask.sum() * np.prod(spacing) > 60  # mm3
        change, mean = float(hu[mask].mean() - plain[mask].mean()), float(hu[mask].mean())
        low, high, least, most = CHANGE[name]
        assert low <= change <= high and least <= mean <= most, (name, change, mean)
        assert abs(float((hu - plain)[~mask].mean())) < 60
        if name in (
            "Pleural effusion",
            "Pneumothorax",
        ):  # water sinks to the back, air rises to the front
            lps = mask if affine[1, 1] < 0 else mask[:, ::-1]
            lung = plain < -600
            lung = lung if affine[1, 1] < 0 else lung[:, ::-1]
            middle = np.average(
                np.arange(lps.shape[1]),
                weights=(lung & (np.abs(np.arange(lps.shape[1]) - 55) < 40)[None, :, None]).sum(
                    (0, 2)
                ),
            )
            place = np.average(np.arange(lps.shape[1]), weights=lps.sum((0, 2)))
            assert place > middle if name == "Pleural effusion" else place < middle
        if name == "Emphysema":
            assert np.median(hu[mask]) < -915 and np.median(hu[mask]) < np.median(plain[mask]) - 30


def test_world_coordinates_do_not_depend_on_the_stored_axes():
    """Every patient lies on the back, head up: the spine behind, the lungs' apices narrow."""
    codes = set()
    for index in range(4):
        hu, affine, spacing, _, _ = phantom.draw(2, "train", index, lesions={}, masks=False)
        codes.add("".join(nib.aff2axcodes(affine)))
        bone = np.argwhere(hu > 250) @ affine[:3, :3].T + affine[:3, 3]
        lung = np.argwhere((hu > -950) & (hu < -700)) @ affine[:3, :3].T + affine[:3, 3]
        assert bone[:, 1].mean() < lung[:, 1].mean() + 40 and np.allclose(
            np.abs(np.diag(affine)[:3]), spacing
        )
        low, high = np.quantile(lung[:, 2], (0.1, 0.9))
        spread = [lung[np.abs(lung[:, 2] - level) < 5, 0].std() for level in (low, high)]
        assert spread[0] > spread[1]
    assert len(codes) > 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--out", "x", "--train", "-1"],
        ["--out", "x", "--release", "3"],
        ["--out", "x", "--workers", "0"],
        ["--out", "x", "--train", "0", "--valid", "0"],
        ["--out", "x", "--train", "many"],
    ],
)
def test_bad_command_lines_exit_2_without_a_traceback(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "phantom.py"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error" in done.stderr


def test_a_folder_of_another_seed_is_refused(written):
    with pytest.raises(ValueError, match="another --out"):
        phantom.write(written, 2, 2, seed=4, workers=1)


def test_a_contact_sheet_is_a_png(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(phantom, "ABNORMALITIES", phantom_reports.ABNORMALITIES[:2])
    phantom.preview(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"
