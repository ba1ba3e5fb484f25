"""The synthetic benchmark's scans: written is what is drawn, the same bytes for the same seed."""
import csv
import hashlib
import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import phantom
from phantom_reports import ABNORMALITIES, CT_RATE, CT_RATE_LT, LESIONS, findings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Four scans written by one worker, with masks."""
    out = tmp_path_factory.mktemp("phantom") / "one"
    return phantom.write(out, 2, 2, seed=3, workers=1, masks=True)


def volumes(out):
    """The paths of the volumes and masks below a folder that are complete."""
    return [path for path in out.rglob("*.nii.gz") if not path.name.startswith(".")]


def hashes(out):
    paths = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths}


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def lesions_of(name, seed):
    """Lesions of one abnormality, as `findings` has them."""
    rng = random.Random(seed)
    lesions = LESIONS[name](rng)
    for lesion in lesions:
        lesion["place"] = rng.random(), rng.random(), rng.random()
    return {name: lesions}


# ---------------------------------------------------------------- what is written

def test_same_seed_same_bytes_for_one_and_two_workers_and_after_a_kill(written, tmp_path):
    out = tmp_path / "two"
    command = [sys.executable, "phantom.py", "--out", str(out), "--train", "2", "--valid", "2",
               "--seed", "3", "--workers", "2", "--masks"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(out.rglob("*.nii.gz")) and process.poll() is None:
        pass
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in volumes(out)}
    for path in before:  # whatever is there is whole
        assert zlib.decompress(path.read_bytes(), 31)
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert hashes(out) == hashes(written)


def test_what_a_killed_run_left_half_written_goes_and_files_of_others_stay(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    volume = phantom.volume_path("train_7_a_1")
    own = [volume.with_name(f".{volume.name}.{gone.pid}.tmp"), f".phantom.json.{gone.pid}.tmp"]
    others = [f".manifest.csv.{os.getpid()}.tmp", "cache/.train_1_a_1.npy.tmp", "masks/notes.tmp"]
    for name in own + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    phantom.write(tmp_path, 1, 0, workers=1)
    assert not any((tmp_path / name).exists() for name in own)
    assert all((tmp_path / name).exists() for name in others)


def test_a_larger_count_extends_a_smaller_one():
    for index in range(40):
        lesions = findings(1, "train", index)
        assert lesions == findings(1, "train", index)
        assert list(lesions) == [name for name in ABNORMALITIES if name in lesions]
    names = [phantom.scan_name(1, "train", index) for index in range(220)]
    assert len(set(names)) == 220 and sum(name.endswith("_b") for name in names) == 20


@pytest.mark.parametrize("split, long", [("train", "train"), ("valid", "validation")])
def test_layout_and_names_are_those_of_ct_rate(written, split, long):
    stamp = json.loads((written / "phantom.json").read_text())
    assert stamp["seed"] == 3 and stamp["train"] == stamp["valid"] == 2
    reports = read_table(written / f"radiology_text_reports/{long}_reports.csv")
    metadata = read_table(written / f"metadata/{long}_metadata.csv")
    labels = read_table(written / f"multi_abnormality_labels/{split}_predicted_labels.csv")
    rare = read_table(written / "multi_abnormality_labels/ct_rate_lt_labels.csv")
    assert list(reports[0]) == ["VolumeName", "ClinicalInformation_EN", "Technique_EN",
                                "Findings_EN", "Impressions_EN"]
    assert list(labels[0]) == ["VolumeName", *CT_RATE]
    assert list(rare[0]) == ["VolumeName", *CT_RATE_LT]
    names = [row["VolumeName"] for row in reports]
    assert names == [row["VolumeName"] for row in metadata]
    assert names == [row["VolumeName"] for row in labels]
    assert set(names) <= {row["VolumeName"] for row in rare}
    assert sorted(names) == sorted(path.name for path in volumes(written / f"{split}_fixed"))


@pytest.mark.parametrize("split, long", [("train", "train"), ("valid", "validation")])
def test_volumes_spacing_labels_and_masks_are_those_drawn(written, split, long):
    labels = {}
    for table in (f"{split}_predicted_labels.csv", "ct_rate_lt_labels.csv"):
        for row in read_table(written / "multi_abnormality_labels" / table):
            labels.setdefault(row["VolumeName"], {}).update(row)
    for row in read_table(written / f"metadata/{long}_metadata.csv"):
        name = row["VolumeName"]
        _, patient, scan, k = name.removesuffix(".nii.gz").split("_")
        scan = f"{split}_{patient}_{scan}"
        image = nib.load(written / f"{split}_fixed/{split}_{patient}/{scan}/{name}")
        spacing = json.loads(row["XYSpacing"]) + [float(row["ZSpacing"])]
        assert image.get_data_dtype() == np.int16
        assert np.allclose(image.header.get_zooms(), spacing)
        index = next(i for i in range(2) if phantom.scan_name(3, split, i) == scan)
        hu, affine, _, lesions, masks = phantom.draw(3, split, index, int(k) - 1)
        assert np.array_equal(np.asarray(image.dataobj), hu)
        assert np.allclose(image.affine, affine, atol=1e-4)
        positive = {a for a in ABNORMALITIES if labels[name][a] == "1"}
        assert positive == set(lesions) == set(masks)
        if split == "valid":
            bits = np.asarray(nib.load(written / f"masks/{name}").dataobj)
            for a, mask in masks.items():
                assert np.array_equal(bits >> ABNORMALITIES.index(a) & 1, mask)


@pytest.mark.parametrize("split, long", [("train", "train"), ("valid", "validation")])
def test_both_releases_decode_to_the_same_hu(written, tmp_path, split, long):
    out = phantom.write(tmp_path / "raw", 1, 1, seed=3, release=1, workers=1)
    for row in read_table(out / f"metadata/{long}_metadata.csv"):
        name = row["VolumeName"].removesuffix(".nii.gz")
        raw = nib.load(out / phantom.volume_path(name, 1))
        fixed = nib.load(written / phantom.volume_path(name, 2))
        assert np.allclose(raw.header.get_zooms(), 1)
        assert nib.aff2axcodes(raw.affine) == nib.aff2axcodes(fixed.affine)
        hu = np.asarray(raw.dataobj) * float(row["RescaleSlope"]) + float(row["RescaleIntercept"])
        assert raw.dataobj.slope == 1 and raw.dataobj.inter == 0
        assert np.array_equal(hu, np.asarray(fixed.dataobj))


@pytest.mark.parametrize("arguments", [
    [],
    ["--out", "x", "--train", "-1"],
    ["--out", "x", "--release", "3"],
    ["--out", "x", "--workers", "0"],
    ["--out", "x", "--train", "0", "--valid", "0"],
    ["--out", "x", "--train", "many"],
])
def test_bad_command_lines_exit_2_without_a_traceback(arguments, tmp_path):
    command = [sys.executable, str(ROOT / "phantom.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error" in done.stderr


def test_a_folder_of_another_seed_is_refused(written):
    with pytest.raises(ValueError, match="another --out"):
        phantom.write(written, 2, 2, seed=4, workers=1)


# ---------------------------------------------------------------- what is drawn

# In its mask, against the same patient without it: how the mean HU changes (least, most), and what
# it is (least, most).
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
    scans = {}
    for index in (0, 5):
        hu, *_ = phantom.draw(9, "train", index, lesions={})
        scans[index] = hu.astype(np.float32)
    return scans


def test_every_abnormality_has_its_function():
    assert sorted(phantom.ABNORMAL) == sorted(ABNORMALITIES)


@pytest.mark.parametrize("index", [0, 5])
@pytest.mark.parametrize("name", ABNORMALITIES)
def test_each_abnormality_changes_its_place_as_its_physics_says(name, index, plain_scans):
    lesions = lesions_of(name, f"{name} {index}")
    hu, affine, spacing, _, masks = phantom.draw(9, "train", index, lesions=lesions)
    plain, mask = plain_scans[index], masks[name]
    assert hu.shape == mask.shape == plain.shape and mask.sum() * np.prod(spacing) > 60  # mm3
    mean = float(hu[mask].mean())
    change = mean - float(plain[mask].mean())
    low, high, least, most = CHANGE[name]
    assert low <= change <= high and least <= mean <= most
    assert abs(float((hu - plain)[~mask].mean())) < 60
    if name in ("Pleural effusion", "Pneumothorax"):  # water sinks to the back, air rises
        lung = plain < -600
        if affine[1, 1] > 0:  # stored from back to front
            mask, lung = mask[:, ::-1], lung[:, ::-1]
        depth = np.arange(mask.shape[1])
        chest = lung & (np.abs(depth - 55) < 40)[None, :, None]
        middle = np.average(depth, weights=chest.sum((0, 2)))
        place = np.average(depth, weights=mask.sum((0, 2)))
        assert place > middle if name == "Pleural effusion" else place < middle
    if name == "Emphysema":
        assert np.median(hu[mask]) < min(-915, np.median(plain[mask]) - 30)


def test_every_device_is_drawn():
    devices = {}
    for seed in range(60):
        for lesion in lesions_of("Medical material", seed)["Medical material"]:
            devices[lesion["what"]] = lesion
    assert len(devices) == 8
    for lesion in devices.values():
        *_, masks = phantom.draw(9, "train", 0, lesions={"Medical material": [lesion]})
        assert masks["Medical material"].sum() > 10, lesion["what"]


def test_the_scans_of_a_seed_belong_to_the_version():
    """Whoever changes them raises VERSION: sets of scans on disk tell by it that they are old."""
    means = [phantom.draw(1, "valid", index)[0].mean() for index in range(3)]
    assert phantom.VERSION == 5
    assert means == pytest.approx([-562.351, -601.873, -544.961], abs=.02)


def test_world_coordinates_do_not_depend_on_the_stored_axes():
    """Every patient lies on the back, head up: the spine is behind, the apices are narrow."""
    codes = set()
    for index in range(4):
        hu, affine, spacing, _, _ = phantom.draw(2, "train", index, lesions={})
        codes.add("".join(nib.aff2axcodes(affine)))
        bone = np.argwhere(hu > 250) @ affine[:3, :3].T + affine[:3, 3]
        lung = np.argwhere((hu > -950) & (hu < -700)) @ affine[:3, :3].T + affine[:3, 3]
        assert bone[:, 1].mean() < lung[:, 1].mean() + 40
        assert np.allclose(np.abs(np.diag(affine)[:3]), spacing)
        low, high = np.quantile(lung[:, 2], (.1, .9))
        base = lung[np.abs(lung[:, 2] - low) < 5, 0].std()
        apex = lung[np.abs(lung[:, 2] - high) < 5, 0].std()
        assert base > apex
    assert len(codes) > 1


def test_a_contact_sheet_is_a_png(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(phantom, "ABNORMALITIES", ABNORMALITIES[:2])
    phantom.preview(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"
