"""From a data set's files to batches: one manifest for every data set, a cache, training pairs.

    files --manifest--> manifest.csv --check--> what is wrong --prepare--> cached volumes -> batches

    python data.py manifest --dataset ct-rate --root CT-RATE --split valid --out manifest.csv
    python data.py check manifest.csv
    python data.py prepare manifest.csv --out cache

A volume in memory is [X, Y, Z] with axes that point to the patient's Left, Posterior, Superior
(LPS), its values are HU, its spacing (x, y, z) in mm. A manifest written by hand with the columns
name,path,report is enough to train on one's own scans. This file needs nothing of the project.

Example:

    import nibabel, numpy, data
    stored = numpy.random.default_rng(0).integers(-1000, 400, (60, 60, 40)).astype("int16")
    nibabel.save(nibabel.Nifti1Image(stored, numpy.diag([4., 4., 6., 1.])), "scan.nii.gz")
    volume = data.read_volume("scan.nii.gz")
    hu = data.preprocess(volume.hu, volume.spacing, shape_out=(128, 128, 64))
    open("manifest.csv", "w").write("name,path,report\\nfirst,scan.nii.gz,No nodule.\\n")
    rows, skipped = data.prepare(data.read_manifest("manifest.csv"), data.Cache("cache"))
    assert hu.shape == (128, 128, 64) and len(rows) == 1 and not skipped
"""
import argparse
import ast
import csv
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy
import torch
from tqdm import tqdm

CT_RATE = [
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
    "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema",
    "Atelectasis", "Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion",
    "Mosaic attenuation pattern", "Peribronchial thickening", "Consolidation", "Bronchiectasis",
    "Interlobular septal thickening",
]
CT_RATE_LT = [
    "Pneumonia", "Pneumothorax", "Empyema", "Tuberculosis", "Pulmonary fibrosis", "Lung cyst",
    "Bronchial thickening", "Lung mass", "Osteophyte", "Rib fracture", "Atherosclerosis",
    "Pericardial calcification", "Spondylosis", "Pleural calcification", "Pneumomediastinum",
]
# RAD-ChestCT's findings -> the class that they are scored as; both calcifications are one there.
RAD_MATERIALS = [
    "catheter_or_port", "tracheal_tube", "chest_tube", "breast_implant", "pacemaker_or_defib",
    "stent", "clip", "staple", "gi_tube", "hardware", "suture",
]
RAD_CHESTCT = dict.fromkeys(RAD_MATERIALS, "Medical material") | {
    "calcification": "Calcification",
    "hernia": "Hiatal hernia",
    "nodule": "Lung nodule",
    "nodulegr1cm": "Lung nodule",
    "opacity": "Lung opacity",
    "scarring": "Pulmonary fibrotic sequela",
    "bronchial_wall_thickening": "Peribronchial thickening",
    "septal_thickening": "Interlobular septal thickening",
    "cardiomegaly": "Cardiomegaly",
    "pericardial_effusion": "Pericardial effusion",
    "pleural_effusion": "Pleural effusion",
    "lymphadenopathy": "Lymphadenopathy",
    "emphysema": "Emphysema",
    "atelectasis": "Atelectasis",
    "consolidation": "Consolidation",
    "bronchiectasis": "Bronchiectasis",
}
BENCHMARKS = {
    "ct-rate": CT_RATE,
    "ct-rate-lt": CT_RATE_LT,
    "rad-chestct": list(dict.fromkeys(RAD_CHESTCT.values())),
}


# ---- 1. Volumes ----------------------------------------------------------------------------------

@dataclass
class Volume:
    """A scan in HU: (X, Y, Z), axes to the patient's Left, Posterior, Superior."""
    hu: numpy.ndarray
    spacing: tuple         # (x, y, z) in mm
    affine: numpy.ndarray  # (4, 4), voxel of `hu` -> mm in NIfTI's world, as nibabel has it


def read_volume(path, slope=None, intercept=None, spacing=None):
    """Read .nii, .nii.gz or RAD-ChestCT's .npz as a Volume, turned to LPS by the file's affine.

    slope, intercept (HU = stored value * slope + intercept) replace the file's own scaling, so that
    neither is ever applied on top of the other. spacing (x, y, z) in mm replaces the file's own; an
    entry of None keeps it. Raises ValueError, naming the file, where it is missing, damaged, not
    3D, constant or holds NaN.
    """
    path = Path(path)
    try:
        stored, affine, scaling = _read_stored(path)
        hu, affine = _to_lps(_three_axes(stored), affine)
        if slope is None and intercept is None:
            slope, intercept = scaling
        hu = _rescaled(hu, 1.0 if slope is None else slope, 0.0 if intercept is None else intercept)
        if hu.dtype.kind == "f" and not numpy.isfinite(hu).all():
            raise ValueError("holds NaN or infinite values")
        if hu.min() == hu.max():
            raise ValueError(f"every voxel is {hu.flat[0]}; the volume is empty")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (EOFError, OSError, zlib.error, KeyError, ValueError,
            nibabel.filebasedimages.ImageFileError,
            nibabel.spatialimages.HeaderDataError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: {reason}") from None
    zooms = nibabel.affines.voxel_sizes(affine)
    if spacing is not None:
        given = [own if value is None else value for value, own in zip(spacing, zooms)]
        affine = affine @ numpy.diag([*(numpy.array(given) / zooms), 1.0])
        zooms = given
    return Volume(hu, tuple(map(float, zooms)), affine)


def _read_stored(path):
    """(stored values, affine, (slope, intercept)) of a file."""
    if path.suffix == ".npz":  # RAD-ChestCT: (Z, Y, X), axis 0 from head to feet, 0.8 mm isotropic
        with numpy.load(path, allow_pickle=False) as archive:
            volume = archive["ct"].T[:, :, ::-1]
        return volume, numpy.diag([-0.8, -0.8, 0.8, 1.0]), (1.0, 0.0)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError("not a .nii, .nii.gz or .npz file")
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)  # frees the GIL: threads decompress side by side
    if len(content) < 348:
        raise ValueError("too short for a NIfTI header")
    is_second = content[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # a header of 540 bytes
    image = (nibabel.Nifti2Image if is_second else nibabel.Nifti1Image).from_bytes(content)
    axes = image.affine[:3, :3]
    if not numpy.isfinite(image.affine).all() or abs(numpy.linalg.det(axes)) < 1e-9:
        raise ValueError("its affine is singular, so the orientation is unknown")
    stored = image.dataobj.get_unscaled()
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    return stored, image.affine, (image.dataobj.slope, image.dataobj.inter)


def _three_axes(stored):
    if stored.ndim == 4 and stored.shape[3] == 1:
        stored = stored[..., 0]
    if stored.ndim != 3:
        raise ValueError(f"a 3D volume is needed, this one has shape {stored.shape}")
    return stored


def _to_lps(array, affine):
    orientations = nibabel.orientations
    lps = orientations.axcodes2ornt("LPS")
    turn = orientations.ornt_transform(orientations.io_orientation(affine), lps)
    turned = orientations.apply_orientation(array, turn)
    return turned, affine @ orientations.inv_ornt_aff(turn, array.shape)


def _rescaled(stored, slope, intercept):
    if stored.dtype.kind not in "iuf":
        raise ValueError(f"voxels of type {stored.dtype} are not numbers")
    if slope == 1 and intercept == 0:
        return stored
    return stored.astype(numpy.float32) * numpy.float32(slope) + numpy.float32(intercept)


def preprocess(
    hu, spacing, spacing_out=(1.5, 1.5, 3.0), shape_out=(256, 256, 128), hu_range=(-1000, 1000)
):
    """Resample linearly, crop and pad about the centre, clip: HU (X, Y, Z) -> int16 shape_out.

        resampled = interpolate(hu, at=i * spacing_out / spacing)       # the first centres coincide
        cropped = the central shape_out of resampled, where it is larger
        padded = -1024 around cropped, where it is smaller

    As SimpleITK's: the new size is round(size * spacing / spacing_out). Beyond the last centre the
    edge's value is kept, where SimpleITK fills in a foreign 0. At last all is clipped to hu_range.
    """
    # What makes it fast: only what the crop keeps is computed, a few slices at a time through all
    # three axes, which so stay in the cache. (Z, Y, X), as the file lies, keeps slices whole.
    volume = torch.from_numpy(numpy.ascontiguousarray(hu.transpose(2, 1, 0)))
    if volume.dtype not in (torch.int16, torch.float32):
        volume = volume.float()
    x, y, z = map(_axis_plan, hu.shape, spacing, spacing_out, shape_out)
    size = [int(n) for n in shape_out[::-1]]
    out = torch.full(size, -1024, dtype=torch.int16).clamp_(*hu_range)
    inside = out[z.place, y.place, x.place]
    for first in range(0, len(z.low), SLAB):
        part = slice(first, first + SLAB)
        slab = _interpolate(volume, 0, z.low[part], z.weight[part])
        slab = _interpolate(slab, 1, y.low, y.weight)
        slab = _interpolate(slab, 2, x.low, x.weight)
        inside[part] = slab.clamp_(*hu_range).round_()
    return out.permute(2, 1, 0).contiguous().numpy()


SLAB = 4  # slices that are resampled at a time


@dataclass
class _AxisPlan:
    """Of one axis: each output voxel's lower neighbour, the upper one's weight, and their place."""
    low: torch.Tensor
    weight: torch.Tensor
    place: slice


def _axis_plan(size, spacing, spacing_out, shape_out):
    resampled = max(1, round(size * spacing / spacing_out))
    cropped = min(resampled, shape_out)
    padding, cut = (shape_out - cropped) // 2, (resampled - cropped) // 2
    position = torch.arange(cropped, dtype=torch.float64) + cut
    position = (position * (spacing_out / spacing)).clamp_(0, size - 1)
    low = position.floor().long().clamp_(max=max(size - 2, 0))
    return _AxisPlan(low, (position - low).float(), slice(padding, padding + cropped))


def _interpolate(volume, axis, low, weight):
    size = volume.shape[axis]
    high = (low + 1).clamp_(max=size - 1)
    if axis == 2:  # along the contiguous axis, a product with a two-banded matrix beats gathering
        bands, columns = torch.zeros(size, len(low)), torch.arange(len(low))
        bands[low, columns] += 1 - weight
        bands[high, columns] += weight
        return volume.float() @ bands
    weight = weight.view(-1, *[1] * (2 - axis))
    lower, upper = volume.index_select(axis, low), volume.index_select(axis, high)
    return torch.lerp(lower.float(), upper.float(), weight)


# ---- 2. The manifest -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    """One volume of a manifest; labels are 0.0, 1.0 or NaN (unknown)."""
    name: str
    path: Path
    split: str = ""
    patient: str = ""
    scan: str = ""
    report: str = ""
    slope: float | None = None
    intercept: float | None = None
    spacing: tuple = (None, None, None)
    labels: dict = field(default_factory=dict)

    def read(self):
        """The row's Volume; raises as read_volume does."""
        return read_volume(self.path, self.slope, self.intercept, self.spacing)


TEXT_COLUMNS = ["name", "path", "split", "patient", "scan", "report"]
NUMBER_COLUMNS = ["slope", "intercept", "spacing_x", "spacing_y", "spacing_z"]
NAME = re.compile(r"[^/\\\0\n\r]{1,200}")


def read_csv(path, *needed):
    """A CSV with a header as a list of dicts; ValueError unless it is UTF-8 with these columns."""
    csv.field_size_limit(1 << 24)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            missing = [column for column in needed if column not in header]
            if missing:
                reads = f"its header reads: {','.join(header)[:200]}"
                raise ValueError(f"{path}: has no column {', '.join(missing)}; {reads}")
            return list(reader)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from None


def read_manifest(path, split=None):
    """manifest.csv as a list of Rows, of one split if given; ValueError names row and column."""
    path = Path(path)
    lines = read_csv(path, "name", "path")
    if not lines:
        raise ValueError(f"{path}: has a header and no rows")
    splits = sorted({line.get("split") or "" for line in lines})
    if split is not None and split not in splits:
        there_are = ", ".join(map(repr, splits))
        raise ValueError(f"{path}: no row has the split '{split}'; there are: {there_are}")
    rows, names = [], set()
    for number, line in enumerate(lines, 2):
        where, name = f"{path}, row {number}", line["name"]
        _check_name(name, names, where)
        if not line["path"]:
            raise ValueError(f"{where}: the path is empty")
        names.add(name)
        if split is None or (line.get("split") or "") == split:
            rows.append(_row(line, path.parent, where))
    return rows


def _check_name(name, taken, where):
    if not NAME.fullmatch(name or "") or name in (".", ".."):
        form = "it becomes a file's name, so 1 to 200 characters without / or \\"
        raise ValueError(f"{where}: '{name}' can't be a name; {form}")
    if name in taken:
        raise ValueError(f"{where}: the name '{name}' stands twice; names must be unique")


def _row(line, folder, where):
    """A line of a manifest as a Row."""
    text = {column: line.get(column) or "" for column in TEXT_COLUMNS}
    slope, intercept, *spacing = (
        _number(line.get(column), where, column) for column in NUMBER_COLUMNS
    )
    labels = {}
    for column, value in line.items():
        if column is not None and column.startswith("label:"):
            labels[column.removeprefix("label:")] = _label(value, where, column)
    return Row(
        name=text["name"],
        path=folder / text["path"],
        split=text["split"],
        patient=text["patient"] or text["name"],
        scan=text["scan"] or text["name"],
        report=text["report"],
        slope=slope,
        intercept=intercept,
        spacing=tuple(spacing),
        labels=labels,
    )


def _number(text, where, column):
    """A number, positive but for an intercept, or None for nothing."""
    if not (text or "").strip():
        return None
    kind = "number" if column == "intercept" else "positive number"
    try:
        value = float(text)
    except ValueError:
        value = numpy.nan
    if not numpy.isfinite(value) or (column != "intercept" and value <= 0):
        raise ValueError(f"{where}: {column} is '{text}'; a {kind} or nothing is needed")
    return value


LABELS = {"": numpy.nan, "0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}


def _label(text, where, column):
    try:
        return LABELS[(text or "").strip()]
    except KeyError:
        raise ValueError(f"{where}: {column} is '{text}'; 0, 1 or nothing is needed") from None


def write_manifest(rows, path):
    """Write Rows as manifest.csv; paths below the manifest's folder become relative to it."""
    path = Path(path)
    classes = classes_of(rows)
    lines = [[*TEXT_COLUMNS, *NUMBER_COLUMNS, *(f"label:{name}" for name in classes)]]
    for row, labels in zip(rows, labels_matrix(rows, classes)):
        file, folder = row.path.resolve(), path.resolve().parent
        file = file.relative_to(folder) if file.is_relative_to(folder) else file
        numbers = (row.slope, row.intercept, *row.spacing)
        line = [row.name, file, row.split, row.patient, row.scan, row.report]
        line += ["" if value is None else repr(value) for value in numbers]
        line += ["" if numpy.isnan(label) else int(label) for label in labels]
        lines.append(line)
    write_csv(path, lines)


def write_csv(path, lines):
    """Write lines of cells as a CSV, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_atomically(path, text.getvalue().encode())


def write_atomically(path, content):
    """Write bytes to a temporary name beside path, sync, rename: a killed run leaves old or new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def classes_of(rows):
    """The names of the rows' labels, in the order in which they first come."""
    return list(dict.fromkeys(name for row in rows for name in row.labels))


def labels_matrix(rows, classes):
    """Labels (N, C) of the rows for the classes: 0, 1, or NaN where unknown."""
    labels = numpy.full((len(rows), len(classes)), numpy.nan)
    for row, line in zip(rows, labels):
        line[:] = [row.labels.get(name, numpy.nan) for name in classes]
    return labels


# ---- 3. Data sets -> manifest --------------------------------------------------------------------

def ct_rate_manifest(root, split, release=None):
    """Rows of CT-RATE's `split` (train or valid) below root, with labels of CT-RATE-LT if there.

    Release 2 (`train_fixed`, `valid_fixed`: already HU, true spacing) is taken where its folder is
    there, else release 1 (`train`, `valid`), whose rows carry slope, intercept and spacing from the
    metadata. CSVs may carry prefixes. Raises ValueError, saying which file is missing or wrong.
    """
    if split not in ("train", "valid"):
        raise ValueError(f"CT-RATE has the splits train and valid, not '{split}'")
    root = Path(root)
    root = root / "dataset" if (root / "dataset").is_dir() else root
    release = release or (2 if (root / f"{split}_fixed").is_dir() else 1)
    volumes = root / (f"{split}_fixed" if release == 2 else split)
    if not volumes.is_dir():
        mend = "--root is the folder that holds CT-RATE's train and valid folders"
        raise ValueError(f"{volumes}: no such folder; {mend}")

    long_split, metadata = {"train": "train", "valid": "validation"}[split], None
    reports = _index(_find(root, f"{long_split}_reports.csv"), "Findings_EN", "Impressions_EN")
    if release == 1:
        columns = ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
        metadata = _index(_find(root, f"{long_split}_metadata.csv"), *columns)
    labels = _ct_rate_labels(root, split)
    excluded = _without_chest(root, split)

    rows = []
    for volume, report in reports.items():
        if volume in excluded or volume.removesuffix(".nii.gz") in excluded:
            continue
        text, known = _report_text(report), labels.get(volume, {})
        rows.append(_ct_rate_row(volume, volumes, split, text, metadata, known))
    return rows


def _ct_rate_labels(root, split):
    """{volume: labels} of CT-RATE's classes, and of CT-RATE-LT's where its file is there."""
    common, rare = _find(root, f"{split}_predicted_labels.csv"), _find_by_header(root, CT_RATE_LT)
    labels = {}
    for file, names in ((common, CT_RATE), (rare, CT_RATE_LT)):
        for volume, line in _index(file, *names).items() if file else ():
            known = {name: _label(line[name], volume, name) for name in names}
            labels.setdefault(volume, {}).update(known)
    return labels


def _ct_rate_row(volume, folder, split, report, metadata, labels):
    """The Row of a volume such as valid_1_a_1.nii.gz; metadata: lines by volume, or None."""
    match = re.fullmatch(r"((\w+?_\d+)_[a-z]+)_\d+\.nii\.gz", volume)
    if not match:
        form = "CT-RATE's are named like valid_1_a_1.nii.gz"
        raise ValueError(f"{folder.parent}: the reports name a volume '{volume}'; {form}")
    scan, patient = match.groups()
    about = {} if metadata is None else metadata.get(volume)
    if about is None:
        lack = f"has no row for {volume}, without which its HU are unknown"
        raise ValueError(f"{folder.parent}: the metadata {lack}")
    slope = _number(about.get("RescaleSlope"), volume, "slope")
    intercept = _number(about.get("RescaleIntercept"), volume, "intercept")
    z = _number(about.get("ZSpacing"), volume, "ZSpacing")
    spacing = (*_xy_spacing(about.get("XYSpacing"), volume), z)
    name, path = volume.removesuffix(".nii.gz"), folder / patient / scan / volume
    return Row(name, path, split, patient, scan, report, slope, intercept, spacing, labels)


def rad_chestct_manifest(root, split):
    """Rows of RAD-ChestCT's `split` (train, valid or test).

    Location columns are folded to findings (OR), findings to classes: the 16 of the benchmark
    (RAD_CHESTCT), and every other finding under its own name.
    """
    if split not in ("train", "valid", "test"):
        raise ValueError(f"RAD-ChestCT has the splits train, valid and test, not '{split}'")
    root, rows = Path(root), []
    file = _find(root, f"img{split}_Abnormality_and_Location_Labels.csv")
    for name, line in _index(file, key="NoteAcc_DEID").items():
        labels = {}
        for column, value in line.items():
            finding, star, _ = (column or "").partition("*")
            if star and finding:
                label = RAD_CHESTCT.get(finding, finding.replace("_", " ").capitalize())
                labels[label] = max(labels.get(label, 0.0), _label(value, name, column))
        rows.append(Row(name, root / f"{name}.npz", split, name, name, labels=labels))
    return rows


def _find(root, ending):
    """The file with the shortest name that ends so, in root or a folder of it."""
    folders = [root, *(entry for entry in root.iterdir() if entry.is_dir())]
    files = []
    for folder in folders:
        files += folder.glob(f"*{ending}")
    if not files:
        where = "neither itself nor in a folder of it"
        raise ValueError(f"{root}: holds no file named *{ending}, {where}")
    return min(files, key=lambda file: (len(file.name), file))


def _find_by_header(root, columns):
    """The first CSV with these columns, or None."""
    files = [*root.glob("*.csv"), *root.glob("multi_abnormality_labels/*.csv")]
    for file in sorted(files):
        with open(file, encoding="utf-8-sig", newline="", errors="replace") as lines:
            if set(columns) <= set(next(csv.reader(lines), [])):
                return file
    return None


def _index(path, *columns, key="VolumeName"):
    return {line[key]: line for line in read_csv(path, key, *columns)}


def _without_chest(root, split):
    """Names of the volumes that don't show a chest."""
    names = set()
    for folder in (root, root / "metadata"):
        file = folder / f"no_chest_{split}.txt"
        if file.is_file():
            names.update(Path(word).name for word in file.read_text().split())
    return names


def _report_text(report):
    texts = []
    for column in ("Findings_EN", "Impressions_EN"):
        text = " ".join((report.get(column) or "").split())
        if text.lower() not in ("", "not given.", "not given", "nan"):
            texts.append(text)
    return " ".join(texts)


def _xy_spacing(text, volume):
    """XYSpacing is the text "[0.74, 0.74]"."""
    if not (text or "").strip():
        return None, None
    try:
        x, y = (float(value) for value in ast.literal_eval(text))
        return x, y
    except (ValueError, SyntaxError, TypeError):
        needed = "two numbers in brackets are needed"
        raise ValueError(f"{volume}: XYSpacing is '{text}'; {needed}") from None


# ---- 4. Check, prepare, cache --------------------------------------------------------------------

def problems(row):
    """What is wrong with a row's volume, as a list of short texts; empty where nothing is."""
    try:
        volume = row.read()
    except ValueError as error:
        return [str(error).removeprefix(f"{row.path}: ")]
    out = []
    for axis, size, spacing in zip("xyz", volume.hu.shape, volume.spacing):
        extent = size * spacing
        if not 0.2 <= spacing <= 10 or not 60 <= extent <= 1200:
            voxels = f"{size} voxels of {spacing:.2f} mm make {extent:.0f} mm"
            out.append(f"{axis}: {voxels}; spacing missing or wrong?")
    hu = volume.hu[::2, ::2, ::2]
    values = f"values {hu.min():.0f} to {hu.max():.0f}"
    air, tissue = float((hu < -500).mean()), float(((hu > -200) & (hu < 200)).mean())
    if air < 0.02:
        share = f"{air:.0%} of it is air (below -500 HU)"
        out.append(f"{share}, {values}; slope and intercept not applied?")
    elif tissue < 0.05:
        share = f"{tissue:.0%} of it is soft tissue (within 200 HU of water)"
        out.append(f"{share}, {values}; intercept applied twice?")
    return out


def _in_threads(function, items, workers, what):
    """function over items, in order, with progress; decompression, numpy and torch free the GIL."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            results = pool.map(function, items)
            try:
                yield from tqdm(results, what, len(items), unit="volume", smoothing=0.05)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)


class Cache:
    """Preprocessed volumes in a folder, one .npy each: int16 HU (X, Y, Z), read by memory map.

    All share the settings in its cache.json; ValueError where they aren't those asked for.
    """

    def __init__(
        self, folder, spacing=(1.5, 1.5, 3.0), shape=(256, 256, 128), hu_range=(-1000, 1000)
    ):
        self.folder, record = Path(folder), Path(folder) / "cache.json"
        self.settings = {
            "spacing_out": list(spacing), "shape_out": list(shape), "hu_range": list(hu_range),
        }
        if not record.exists():
            write_atomically(record, json.dumps(self.settings).encode())
        elif json.loads(record.read_text()) != self.settings:
            asked = f"now {json.dumps(self.settings)} is asked for; name another folder"
            raise ValueError(f"{record}: was prepared with {record.read_text()}, {asked}")

    @classmethod
    def for_config(cls, folder, config):
        """The cache in a folder of volumes as a model's config (model.Config) wants them."""
        return cls(folder, config.spacing, config.shape, config.hu_range)

    def path(self, row):
        """Where a row's volume lies; slope, intercept and spacing are part of the name, so that a
        corrected one is never missed."""
        reading = zlib.crc32(repr((row.slope, row.intercept, row.spacing)).encode())
        return self.folder / f"{row.name}.{reading:08x}.npy"

    def holds(self, row):
        """Whether the row's volume is here and not older than its source, where that is at hand."""
        try:
            made = self.path(row).stat().st_mtime
            return not row.path.exists() or made >= row.path.stat().st_mtime
        except FileNotFoundError:
            return False

    def add(self, row):
        """Preprocess and write a row's volume; returns None, or why it can't be."""
        try:
            volume, content = row.read(), io.BytesIO()
            hu = preprocess(volume.hu, volume.spacing, **self.settings)
            numpy.save(content, hu, allow_pickle=False)
            write_atomically(self.path(row), content.getbuffer())
        except ValueError as error:
            return str(error)

    def read(self, row):
        """A row's volume as a read-only int16 memory map (X, Y, Z)."""
        return numpy.load(self.path(row), mmap_mode="r", allow_pickle=False)


def prepare(rows, cache, workers=None):
    """Bring every row's volume into the cache -> (the rows that are there, skipped (name, reason)).

    Resumable: what is there stays. The skipped are listed in the cache's skipped.csv and are never
    replaced by others.
    """
    todo = [row for row in rows if not cache.holds(row)]
    if todo:
        size = len(todo) * int(numpy.prod(cache.settings["shape_out"])) * 2 / 2**30
        free = shutil.disk_usage(cache.folder).free / 2**30
        room = f"{size:.2f} GiB, {free:.0f} GiB free in {cache.folder}"
        print(f"{len(todo)} of {len(rows)} volumes to prepare: {room}", file=sys.stderr)
        if size > free:
            room = f"{size:.1f} GiB are needed and {free:.1f} GiB are free"
            raise ValueError(f"{cache.folder}: {room}")
    # The threads' results come first in zip, so that they are used up and their bar ends.
    reasons = zip(_in_threads(cache.add, todo, workers, "prepare"), todo)
    skipped = [(row.name, reason) for reason, row in reasons if reason]
    if skipped:
        listed = cache.folder / "skipped.csv"
        write_csv(listed, [("name", "reason"), *skipped])
        first = f"{len(skipped)} volumes skipped, the first: {skipped[0][1]}"
        print(f"{first}; all in {listed}", file=sys.stderr)
    lost = {name for name, _ in skipped}
    return [row for row in rows if row.name not in lost], skipped


# ---- 5. Texts and training pairs -----------------------------------------------------------------

def report_sha256(report):
    """The key of a report in summaries.jsonl."""
    return hashlib.sha256(report.encode()).hexdigest()


def read_records(path):
    """summaries.jsonl -> {sha256 of the report: its record}; ValueError names a bad line."""
    records = {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                records[record["report_sha256"]] = record
            except (ValueError, KeyError, TypeError):
                mend = "delete it and run summarize.py again, which does that report anew"
                raise ValueError(f"{path}: line {number} is not a summary; {mend}") from None
    return records


def read_summaries(path):
    """summaries.jsonl -> {sha256 of the report: summary}; failed summaries are left out."""
    records = read_records(path)
    return {sha: record["summary"] for sha, record in records.items() if record.get("summary")}


def text_of(row, summaries):
    """What a row's volume is paired with: its report's summary if there is one, else the report."""
    return summaries.get(report_sha256(row.report), row.report)


def sentences(text):
    """Split a report or a summary into its sentences; what has no letter or digit is left out."""
    parts = re.split(r"(?<=[.!?;])\s+|\n+", text.strip())
    return [part for part in parts if re.search(r"\w", part)]


class ReportVolumes(torch.utils.data.Dataset):
    """Training pairs, an item per distinct report: (int16 HU (1, x, y, z), text).

    Each key (epoch, item) is a new draw: one of the report's volumes, a random crop, and 1 to 5
    sentences of its text in random order (paper, implementation details). Every second text or so
    has all that it may have, which tells most; the others have a random number: were it always 5
    where there are as many, a text's length would tell how ill the patient is, and the prompt, one
    sentence, would look like the healthy. The text is the report's summary where there is one, else
    the report. The same (seed, epoch, item) gives the same draw, so a resumed run goes on exactly.
    """

    def __init__(self, rows, cache, summaries=None, crop=None, n_sentences=5, seed=0):
        by_report = {}
        for row in rows:
            if sentences(row.report):
                by_report.setdefault(row.report, []).append(row)
        if not by_report:
            raise ValueError("no row has a report, so there is nothing to train on")
        self.items = []
        for group in by_report.values():
            self.items.append((group, sentences(text_of(group[0], summaries or {}))))
        self.cache, self.crop, self.n_sentences, self.seed = cache, crop, n_sentences, seed

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        epoch, item = key
        random = numpy.random.default_rng((self.seed, epoch, item))
        rows, text = self.items[item]
        volume = self.cache.read(rows[random.integers(len(rows))])
        crop = []
        for full, size in zip(volume.shape, self.crop or volume.shape):
            start = random.integers(full - size + 1)
            crop.append(slice(start, start + size))
        most = min(self.n_sentences, len(text))
        count = most if random.random() < 0.5 else random.integers(1, most + 1)
        order = random.permutation(len(text))[:count]
        text = " ".join(text[i] for i in order)
        return torch.from_numpy(numpy.array(volume[tuple(crop)]))[None], text


class Volumes(torch.utils.data.Dataset):
    """Evaluation: each row's whole cached volume as int16 HU (1, X, Y, Z)."""

    def __init__(self, rows, cache):
        self.rows, self.cache = rows, cache

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return torch.from_numpy(numpy.array(self.cache.read(self.rows[i])))[None]


# ---- 6. Command line -----------------------------------------------------------------------------

def run_command(main):
    """Run a command line's main() -> exit status; bad input is 2 and one line on standard error."""
    try:
        return main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2


def _manifest_command(a):
    if a.dataset == "ct-rate":
        rows = ct_rate_manifest(a.root, a.split, a.release)
    else:
        rows = rad_chestct_manifest(a.root, a.split)
    write_manifest(rows, a.out)
    scans = len({row.scan for row in rows})
    patients = len({row.patient for row in rows})
    absent = sum(not row.path.exists() for row in rows)
    lacking = f"; {absent} volumes are not on this disk" if absent else ""
    print(f"{a.out}: {len(rows)} volumes of {scans} scans of {patients} patients{lacking}")


def _check_command(a):
    rows, bad = read_manifest(a.manifest), []
    for texts, row in zip(_in_threads(problems, rows, a.workers, "check"), rows):
        bad += [(row.name, text) for text in texts]
    width = max((len(name) for name, _ in bad), default=0)
    for name, text in bad:
        print(f"{name:{width}}  {text}")
    print(f"{len(rows)} volumes, {len({name for name, _ in bad})} with a problem")
    return 1 if bad else 0


def _prepare_command(a):
    shard, shards = a.shard
    rows = read_manifest(a.manifest)[shard - 1::shards]
    cache = Cache(a.out, a.spacing, a.shape, a.hu_range)
    ready, skipped = prepare(rows, cache, a.workers)
    print(f"{a.out}: {len(ready)} volumes ready, {len(skipped)} skipped")


def _shard(text):
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match and 1 <= int(match[1]) <= int(match[2]):
        return int(match[1]), int(match[2])
    raise argparse.ArgumentTypeError(f"'{text}' is no shard; 2/8 is the second of eight")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser(
        "manifest", help="write manifest.csv from a data set's own files",
        epilog="example: python data.py manifest --dataset ct-rate --root CT-RATE --split valid "
        "--out manifest.csv",
    )
    add = command.add_argument
    add("--dataset", choices=["ct-rate", "rad-chestct"], required=True)
    add("--root", type=Path, required=True, help="the folder that the data set was downloaded to")
    add("--split", required=True, help="ct-rate: train, valid; rad-chestct: train, valid, test")
    add("--release", type=int, choices=[1, 2],
        help="CT-RATE's; default: 2 (the _fixed folders) where it is there")
    add("--out", type=Path, required=True)
    command.set_defaults(run=_manifest_command)

    command = commands.add_parser(
        "check", help="read every volume and list what is wrong",
        epilog="example: python data.py check manifest.csv",
    )
    command.add_argument("manifest", type=Path)
    command.add_argument("--workers", type=int)
    command.set_defaults(run=_check_command)

    command = commands.add_parser(
        "prepare", help="preprocess every volume into a cache; resumable",
        epilog="example: python data.py prepare manifest.csv --out cache --shard 1/4",
    )
    add = command.add_argument
    add("manifest", type=Path)
    add("--out", type=Path, required=True, help="the cache's folder")
    add("--spacing", type=float, nargs=3, default=(1.5, 1.5, 3.0), metavar="MM",
        help="x y z; default 1.5 1.5 3.0")
    add("--shape", type=int, nargs=3, default=(256, 256, 128), metavar="N",
        help="x y z; default 256 256 128")
    add("--hu-range", type=int, nargs=2, default=(-1000, 1000), metavar="HU")
    add("--workers", type=int, help="threads; default: one per core")
    add("--shard", type=_shard, default=(1, 1), metavar="I/N",
        help="the I-th of N parts, for N machines")
    command.set_defaults(run=_prepare_command)

    a = parser.parse_args(argv)
    return a.run(a)


if __name__ == "__main__":
    sys.exit(run_command(main))
