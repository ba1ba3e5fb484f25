"""From a data set's files to training pairs: one manifest for every data set, a cache of volumes.

    files --manifest--> manifest.csv --check--> what is wrong --prepare--> cached volumes -> batches

    python data.py manifest --dataset ct-rate --root CT-RATE --split valid --out manifest.csv
    python data.py check manifest.csv
    python data.py prepare manifest.csv --out cache

A volume in memory is [X, Y, Z], with axes that point to the patient's Left, Posterior, Superior
(LPS). Its values are HU, its spacing (x, y, z) is in mm. A manifest written by hand with the
columns name,path,report is enough to train on your own scans. No other file of the project is
needed.

Example:

    import nibabel, numpy, data
    stored = numpy.random.default_rng(0).integers(-1000, 400, (60, 60, 40)).astype("int16")
    nibabel.save(nibabel.Nifti1Image(stored, numpy.diag([4., 4., 6., 1.])), "scan.nii.gz")
    data.write_csv("manifest.csv", [["name", "path", "report"], ["a", "scan.nii.gz", "A nodule."]])
    rows = data.read_manifest("manifest.csv")
    cache = data.Cache("cache", spacing=(3, 3, 6), shape=(64, 64, 32))
    rows, skipped = data.prepare(rows, cache)
    volume, text = data.ReportVolumes(rows, cache)[0, 0]  # in epoch 0 the first pair
    assert volume.shape == (1, 64, 64, 32) and text == "A nodule." and not skipped
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import nibabel
import numpy
from isal import isal_zlib
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
MATERIALS = [
    "catheter_or_port", "tracheal_tube", "chest_tube", "breast_implant", "pacemaker_or_defib",
    "stent", "clip", "staple", "gi_tube", "hardware", "suture",
]
RAD_CHESTCT = {  # RAD-ChestCT's finding -> the class that it is scored as
    **dict.fromkeys(MATERIALS, "Medical material"),
    "calcification": "Calcification",  # CT-RATE's two calcification classes are one here
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
# What the paper's models see: voxels of so many mm (x, y, z), so many of them, this range of HU.
SPACING = (1.5, 1.5, 3.0)
SHAPE = (256, 256, 128)
HU_RANGE = (-1000, 1000)


# ---- 1. A file -> a volume in HU -----------------------------------------------------------------

@dataclass
class Volume:
    """A scan in HU."""
    hu: numpy.ndarray      # (X, Y, Z), axes to the patient's Left, Posterior, Superior
    spacing: tuple         # (x, y, z) in mm
    affine: numpy.ndarray  # (4, 4), voxel of `hu` -> mm in NIfTI's world, where x points Right
    oriented: bool = True  # False: the file doesn't say where its axes point, which is a guess then


MOST_BYTES = 2**31  # of a file, and of its voxels
PIECE = 2**18       # bytes of a gzip stream that are unpacked at a time
GZIP = b"\x1f\x8b"


def read_volume(path, slope=None, intercept=None, spacing=None):
    """Read .nii, .nii.gz or RAD-ChestCT's .npz as a Volume, turned to LPS by its affine.

    The content tells which of them it is, not the name. HU = stored value * slope + intercept. If
    either is given, the scaling in the file's header is ignored, so that a volume is never rescaled
    twice. spacing (x, y, z) in mm replaces the file's; an entry of None leaves the file's.

    Raises ValueError, one line that names the file, for every file that isn't such a volume:
    missing, damaged, shorter or larger than its header says, over 2 GiB, not 3D, sheared, constant,
    with NaN. No more memory is taken than the file's own bytes can fill.
    """
    path = Path(path)
    try:
        with numpy.errstate(all="ignore"):
            return _read_volume(path, slope, intercept, spacing)
    except Exception as error:  # whatever a library makes of a foreign file, MemoryError too
        reason = str(error) if isinstance(error, ValueError) else f"damaged? {error!r}"
        raise ValueError(f"{path}: {' '.join(reason.split())[:300]}") from None


def _read_volume(path, slope, intercept, spacing):
    if not path.is_file():
        raise ValueError("no such file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError("a file of more than 2 GiB")
    content = path.read_bytes()
    read = _read_npz if content[:2] == b"PK" else _read_nifti
    stored, affine, oriented, header_scaling = read(content)
    stored, affine = _to_lps(stored, affine)
    if slope is None and intercept is None:
        slope, intercept = header_scaling
    hu = _to_hu(stored, slope, intercept)
    spacing, affine = _replace_spacing(spacing, affine)
    return Volume(hu, spacing, affine, oriented)


def _read_npz(content):
    """RAD-ChestCT's array (Z, Y, X) in HU, axis 0 from head to feet, 0.8 mm."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = archive.getinfo("ct.npy")
        if member.compress_type not in (0, 8):  # stored, deflated; others unpack without bound
            raise ValueError("its compression is none that numpy writes")
        with archive.open(member) as file:
            numpy.lib.format.read_magic(file)
            shape, fortran, dtype = numpy.lib.format.read_array_header_1_0(file)
            stored = _voxels(file.read, 0, shape, dtype, "F" if fortran else "C")
    return stored.T[:, :, ::-1], numpy.diag([-0.8, -0.8, 0.8, 1.0]), True, (1.0, 0.0)


def _read_nifti(content):
    """The array (X, Y, Z) as it is stored, its affine, whether this is known, slope, intercept."""
    head = _unpack(content, 544)
    kind = nibabel.Nifti2Header if head[4:7] == b"n+2" else nibabel.Nifti1Header
    size = kind.sizeof_hdr
    header = kind(bytes(head[:size]).ljust(size), check=False)  # its checks would log and mend
    if header["magic"] != kind.single_magic:
        raise ValueError("not a .nii, .nii.gz or .npz file, or its header is cut; a pair of .hdr "
                         "and .img must be joined to a .nii")
    start = header["vox_offset"].item() or kind.single_vox_offset  # 0: right after the header
    if not start >= kind.single_vox_offset:
        raise ValueError(f"its vox_offset {start} lies in the header")
    shape = header["dim"][1:1 + header["dim"][0]].tolist()
    dtype = header.get_data_dtype()
    stored = _voxels(partial(_unpack, content), int(start), shape, dtype, "F")
    return stored, *_affine(header), header.get_slope_inter()


def _unpack(content, size):
    """At least the first `size` bytes of a file's content, where there are so many.

    Of gzip no more is unpacked; like gzip itself it takes several members and leaves out what
    follows the last one.
    """
    if content[:2] != GZIP:
        return content
    out, at, member = bytearray(), 0, isal_zlib.decompressobj(31)  # twice as fast as zlib
    while len(out) < size:
        packed = content[at:at + PIECE]
        piece = member.decompress(packed, size - len(out))  # frees the GIL: threads run on
        at += len(packed) - len(member.unconsumed_tail) - len(member.unused_data)
        out += piece
        if member.eof and content[at:at + 2] == GZIP:
            member = isal_zlib.decompressobj(31)
        elif member.eof or not packed and not piece:
            break
    return out


def _voxels(read, start, shape, dtype, order):
    """The array (X, Y, Z) that starts at a byte of read(size), which gives the first bytes."""
    if set(shape[3:]) == {1}:  # a time axis with one entry
        shape = shape[:3]
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"a 3D volume is needed, this one has shape {tuple(shape)}")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ValueError(f"voxels of type {dtype} are not numbers")
    end = start + math.prod(shape) * dtype.itemsize
    if end > MOST_BYTES:
        raise ValueError(f"shape {tuple(shape)} from byte {start} on makes over 2 GiB")
    content = read(end + 1)  # 1 more, so that the checksum behind the voxels is read, too
    if len(content) < end:
        raise ValueError(f"cut short: {len(content)} of {end} bytes are there")
    stored = numpy.frombuffer(memoryview(content)[start:end], dtype).reshape(shape, order=order)
    return stored.astype(dtype.newbyteorder("="), copy=False)


def _affine(header):
    """A NIfTI header's affine in mm, and whether it is more than a guess."""
    header["pixdim"][0] = math.copysign(1, header["pixdim"][0])
    header["pixdim"][1:4] = abs(header["pixdim"][1:4])
    length = math.hypot(header["quatern_b"], header["quatern_c"], header["quatern_d"])
    for axis in "bcd":
        header[f"quatern_{axis}"] /= max(length, 1)  # over 1 by rounding
    said = {"sform_code": header.get_sform(), "qform_code": header.get_qform()}
    said = [affine for code, affine in said.items() if header[code] > 0]
    for affine in said or [header.get_base_affine()]:
        sizes = nibabel.affines.voxel_sizes(affine)
        if abs(numpy.linalg.det(affine)) > 1e-6 * math.prod(sizes):  # never of NaN
            break
    else:
        raise ValueError("its affine is singular, so the orientation is unknown; "
                         "neither sform nor qform is valid")
    axes = affine[:3, :3] / sizes
    if abs(axes.T @ axes - numpy.eye(3)).max() > 0.002:  # sheared by a mm or more in a chest
        raise ValueError("its axes are not at right angles: gantry tilt? dcm2niix writes a "
                         "straightened copy (_Tilt)")
    affine[:3] *= {1: 1000, 3: 0.001}.get(header["xyzt_units"] & 7, 1)  # metres, microns
    return affine, bool(said)


def _to_lps(array, affine):
    orientations = nibabel.orientations
    lps = orientations.axcodes2ornt("LPS")
    turn = orientations.ornt_transform(orientations.io_orientation(affine), lps)
    affine = affine @ orientations.inv_ornt_aff(turn, array.shape)
    return orientations.apply_orientation(array, turn), affine


def _to_hu(stored, slope, intercept):
    slope, intercept = slope or 1.0, intercept or 0.0
    hu = stored
    if slope != 1 or intercept != 0:
        hu = stored.astype(numpy.float32) * numpy.float32(slope) + numpy.float32(intercept)
    if hu.dtype.kind == "f" and not numpy.isfinite(hu).all():
        raise ValueError("holds NaN or infinite values")
    if hu.min() == hu.max():
        raise ValueError(f"every voxel is {hu.flat[0]}; the volume is empty")
    return hu


def _replace_spacing(spacing, affine):
    """The spacing, with the affine's own where it is None, and the affine for it."""
    own = nibabel.affines.voxel_sizes(affine)
    given = own if spacing is None else spacing
    spacing = tuple(float(size or old) for size, old in zip(given, own))
    if not all(0.01 <= size <= 100 for size in spacing):
        raise ValueError(f"its voxels measure {spacing} mm, 0.01 to 100 are possible; "
                         "spacing missing, or its unit wrong?")
    affine[:, :3] *= spacing / own
    return spacing, affine


# ---- 2. Resample, crop, pad ----------------------------------------------------------------------

def preprocess(hu, spacing, spacing_out=SPACING, shape_out=SHAPE, hu_range=HU_RANGE):
    """Resample linearly, crop and pad about the centre, clip: HU (X, Y, Z) -> int16 shape_out.

    In plain lines, which a test holds this function to:

        size_out = round(size * spacing / spacing_out)                  # along each axis
        hu = clip(hu, -1024, 32767)
        volume = interpolate(hu, arange(size_out) * spacing_out / spacing)
        volume = pad(crop(volume, shape_out), shape_out, -1024)         # both about the centre
        volume = round(clip(volume, *hu_range))

    Spacings are (x, y, z) in mm. The interpolation is SimpleITK's: the centres of the first voxels
    coincide. But beyond the centre of the last voxel its value goes on, where SimpleITK fills in 0;
    and what scanners put outside their field of view, -2000 or -3024, is air before anything is
    interpolated, or else the border of a body would be darker than air makes it.
    """
    import torch  # here and twice below: it takes a second, which --help can do without
    # What the crop leaves out is never computed. The rest goes through all three axes a few slices
    # at a time, so that it stays in the processor's cache; (Z, Y, X) keeps a slice in one piece.
    volume = torch.from_numpy(numpy.array(hu.T, order="C"))
    if volume.dtype not in (torch.int16, torch.float32):
        volume = volume.float()
    volume.clamp_(AIR, 32767)
    axes = map(_sample_axis, hu.shape, spacing, spacing_out, shape_out)
    positions, inside = zip(*axes)
    x, y, z = map(torch.from_numpy, positions)
    out = torch.full(tuple(shape_out[::-1]), AIR, dtype=torch.int16).clamp_(*hu_range)
    inside = out[inside[::-1]]
    for positions, target in zip(z.split(SLAB), inside.split(SLAB)):
        slab = _interpolate(volume, 0, positions)
        slab = _interpolate(slab, 1, y)
        slab = _interpolate(slab, 2, x)
        target[:] = slab.clamp_(*hu_range).round_()
    return out.permute(2, 1, 0).contiguous().numpy()


AIR = -1024  # HU
SLAB = 4     # slices that are resampled at a time


def _sample_axis(size, spacing, spacing_out, size_out):
    """Of one axis: where the voxels lie in the input that the crop leaves, and in the output."""
    resampled = max(1, round(size * spacing / spacing_out))
    cropped = min(resampled, size_out)
    first = (resampled - cropped) // 2
    positions = numpy.arange(first, first + cropped) * (spacing_out / spacing)
    positions = positions.clip(0, size - 1)
    padding = (size_out - cropped) // 2
    return positions, slice(padding, padding + cropped)


def _interpolate(volume, axis, positions):
    """Linear interpolation of a volume (Z, Y, X) along one axis, in float32."""
    size = volume.shape[axis]
    low = positions.long()
    high = (low + 1).clamp_(max=size - 1)
    weight = (positions - low).float()
    if axis == 2:  # along the contiguous axis, a product with a two-banded matrix beats gathering
        bands = weight.new_zeros(size, len(low))
        bands.scatter_add_(0, low[None], 1 - weight[None])
        bands.scatter_add_(0, high[None], weight[None])
        return volume.float() @ bands
    below = volume.index_select(axis, low).float()
    above = volume.index_select(axis, high).float()
    return below.lerp(above, weight.view(-1, *[1] * (2 - axis)))


# ---- 3. The manifest -----------------------------------------------------------------------------

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


TEXTS = ["name", "path", "split", "patient", "scan", "report"]
NUMBERS = ["slope", "intercept", "spacing_x", "spacing_y", "spacing_z"]


def read_manifest(path, split=None):
    """Read manifest.csv as Rows, of one split if given; ValueError names a wrong row and column."""
    path = Path(path)
    lines = read_csv(path, "name", "path")
    rows, names = [], set()
    for number, line in enumerate(lines, 2):
        where = f"{path}, row {number}"
        _check_name(line["name"], names, where)
        names.add(line["name"])
        if not re.fullmatch(r"[^\x00-\x20]+|[^\x00-\x1f]+\.[A-Za-z]\w{0,4}", line["path"]):
            raise ValueError(f"{where}: the path is empty, or a text without a suffix")
        if split in (None, line.get("split", "")):
            rows.append(_row(line, path.parent, where))
    if not rows:
        raise ValueError(f"{path}: has no rows (split: {split or 'any'})")
    return rows


def _check_name(name, taken, where):
    # No message quotes a cell: it may hold a report where the columns are shifted.
    if not re.fullmatch(r"(?!\.{1,2}$)[^/\\\x00-\x1f]+", name) or len(name.encode()) > 200:
        raise ValueError(f"{where}: the name can't be a file's name; 1 to 200 bytes on one line "
                         "without / and \\ are needed")
    if name in taken:
        raise ValueError(f"{where}: the name stands in an earlier row, too; names must be unique")


def _row(line, folder, where):
    name, path, split, patient, scan, report = (line.get(column, "") for column in TEXTS)
    numbers = [_number(line.get(column, ""), where, column) for column in NUMBERS]
    slope, intercept, *spacing = numbers
    labels = {}
    for column, text in line.items():
        if column.startswith("label:"):
            labels[column.removeprefix("label:")] = _label(text, where, column)
    return Row(name, folder / path, split, patient or name, scan or name, report,
               slope, intercept, tuple(spacing), labels)


def _number(text, where, column):
    """The number in a cell, None where it is empty; the intercept alone may be 0 or negative."""
    if not text.strip():
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isfinite(number) and (number > 0 or column == "intercept"):
        return number
    raise ValueError(f"{where}: {column} is no number that it can be; leave unknown ones empty")


def _label(text, where, column):
    label = {"": math.nan, "0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}.get(text.strip())
    if label is None:
        raise ValueError(f"{where}: {column} is none of 0, 1 and nothing")
    return label


def write_manifest(rows, path):
    """Write Rows as manifest.csv; paths below the manifest's folder become relative to it."""
    folder = Path(path).absolute().parent  # links stay, their targets may have no suffix
    classes = classes_of(rows)
    lines = [TEXTS + NUMBERS + [f"label:{name}" for name in classes]]
    for row, labels in zip(rows, labels_matrix(rows, classes)):
        file = row.path.absolute()
        if file.is_relative_to(folder):
            file = file.relative_to(folder)
        lines.append([row.name, file, row.split, row.patient, row.scan, row.report,
                      row.slope, row.intercept, *row.spacing,
                      *("" if math.isnan(label) else int(label) for label in labels)])
    write_csv(path, lines)


def classes_of(rows):
    """The names of the rows' labels, in the order in which they first come."""
    return list(dict.fromkeys(name for row in rows for name in row.labels))


def labels_matrix(rows, classes):
    """Labels (N, C) of the rows for the classes: 0, 1, or NaN where unknown."""
    labels = numpy.full((len(rows), len(classes)), numpy.nan)
    for i, row in enumerate(rows):
        labels[i] = [row.labels.get(name, numpy.nan) for name in classes]
    return labels


# ---- 4. Data sets -> manifest --------------------------------------------------------------------

def ct_rate_manifest(root, split, release=None):
    """Rows of CT-RATE's `split` (train or valid) below root, with CT-RATE-LT's labels if there.

    Release 2 (folders `train_fixed`, `valid_fixed`: HU and true spacing) is taken where it is
    there, else release 1 (`train`, `valid`), whose rows get slope, intercept and spacing from the
    metadata. CSVs may carry prefixes. ValueError says which file is missing or wrong.
    """
    folder, release = _ct_rate_folder(Path(root), split, release)
    root = folder.parent
    long_split = "validation" if split == "valid" else "train"
    reports = _table(_find(root, f"{long_split}_reports.csv"), "Findings_EN", "Impressions_EN")
    metadata = {}
    if release == 1:
        metadata = _table(_find(root, f"{long_split}_metadata.csv"),
                          "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
    common = _table(_find(root, f"{split}_predicted_labels.csv"), *CT_RATE)
    rare = _find_by_header(root, ["VolumeName", *CT_RATE_LT])
    rare = _table(rare) if rare else {}
    no_chest = _no_chest(root, split)

    rows = []
    for number, (volume, report) in enumerate(reports.items(), 2):
        name = volume.removesuffix(".nii.gz")
        if name in no_chest:
            continue
        scan, patient = _ct_rate_scan(volume, f"{root}: row {number} of the reports")
        if release == 1 and volume not in metadata:
            raise ValueError(f"{root}: the metadata has no row for {volume}, "
                             "without which its HU are unknown")
        cells = rare.get(volume, {}) | common.get(volume, {})  # {column: text}
        classes = [kind for kind in CT_RATE + CT_RATE_LT if kind in cells]
        where = f"{root}: {volume}"
        labels = {kind: _label(cells[kind], where, kind) for kind in classes}
        path = folder / patient / scan / volume
        scaling = _scaling(metadata.get(volume, {}), where)
        text = _report_text(report)
        rows.append(Row(name, path, split, patient, scan, text, *scaling, labels))
    return rows


def _ct_rate_folder(root, split, release):
    """The folder of a split's volumes, and which release it is."""
    if split not in ("train", "valid"):
        raise ValueError(f"CT-RATE has the splits train and valid, not '{split}'")
    if (root / "dataset").is_dir():
        root = root / "dataset"
    fixed = root / f"{split}_fixed"
    release = release or (2 if fixed.is_dir() else 1)
    folder = fixed if release == 2 else root / split
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; --root is the folder that holds CT-RATE's "
                         "train and valid folders")
    return folder, release


def _ct_rate_scan(volume, where):
    """valid_1_a_1.nii.gz (split, patient, scan, reconstruction) -> valid_1_a, valid_1."""
    match = re.fullmatch(r"((\w+?_\d+)_[a-z]+)_\d+\.nii\.gz", volume)
    if not match:
        raise ValueError(f"{where}: CT-RATE's volumes are named like valid_1_a_1.nii.gz")
    return match.groups()


def _report_text(report):
    parts = []
    for column in ("Findings_EN", "Impressions_EN"):
        text = " ".join(report[column].split())
        if text.lower() not in ("", "not given.", "not given", "nan"):
            parts.append(text)
    return " ".join(parts)


def _scaling(about, volume):
    """Slope, intercept and spacing from a volume's metadata; None where they say nothing."""
    slope = _number(about.get("RescaleSlope", ""), volume, "slope")
    intercept = _number(about.get("RescaleIntercept", ""), volume, "intercept")
    xy = _xy_spacing(about.get("XYSpacing", ""), volume)
    z = _number(about.get("ZSpacing", ""), volume, "ZSpacing")
    return slope, intercept, (*xy, z)


def _xy_spacing(text, volume):
    """XYSpacing is the text "[0.74, 0.74]"."""
    if not text.strip():
        return None, None
    numbers = [_number(part, volume, "XYSpacing") for part in text.strip(" []").split(",")]
    if len(numbers) != 2 or None in numbers:
        raise ValueError(f"{volume}: XYSpacing is not two numbers in brackets")
    return numbers


def _no_chest(root, split):
    """Names of the volumes that CT-RATE lists as showing no chest."""
    files = [root / f"no_chest_{split}.txt", root / "metadata" / f"no_chest_{split}.txt"]
    text = " ".join(file.read_text(errors="replace") for file in files if file.is_file())
    return {Path(word).name.removesuffix(".nii.gz") for word in text.split()}


def rad_chestct_manifest(root, split):
    """Rows of RAD-ChestCT's `split` (train, valid, test, or all, on which the authors evaluate).

    Its columns are finding*location. A class is present if any of its findings (RAD_CHESTCT) is, at
    any location. A finding that belongs to none of the 16 classes is one under its own name.
    """
    splits = ("train", "valid", "test")
    if split == "all":
        return [row for part in splits for row in rad_chestct_manifest(root, part)]
    if split not in splits:
        raise ValueError(f"RAD-ChestCT has the splits train, valid, test and all, not '{split}'")
    root = Path(root)
    rows = []
    file = _find(root, f"img{split}_Abnormality_and_Location_Labels.csv")
    for number, (name, line) in enumerate(_table(file, key="NoteAcc_DEID").items(), 2):
        labels, where = {}, f"{file}, row {number}"
        for column, text in line.items():
            finding, star, _ = column.partition("*")
            if finding and star:
                kind = RAD_CHESTCT.get(finding, finding.replace("_", " ").capitalize())
                labels[kind] = max(labels.get(kind, 0.0), _label(text, where, column))
        rows.append(Row(name, root / f"{name}.npz", split, name, name, labels=labels))
    return rows


def _find(root, ending):
    """The file with the shortest name that ends so, in root or a folder of it."""
    files = [*root.glob(f"*{ending}"), *root.glob(f"*/*{ending}")]
    if not files:
        raise ValueError(f"{root}: holds no file named *{ending}, "
                         "neither itself nor in a folder of it")
    return min(files, key=lambda file: (len(file.name), file))


def _find_by_header(root, columns):
    """The first CSV with these columns, or None."""
    files = [*root.glob("*.csv"), *root.glob("multi_abnormality_labels/*.csv")]
    for file in sorted(files):
        with open(file, encoding="utf-8-sig", errors="replace") as lines:
            header = lines.readline(1 << 16)
        if all(column in header for column in columns):
            return file
    return None


def _table(path, *columns, key="VolumeName"):
    return {line[key]: line for line in read_csv(path, key, *columns)}


# ---- 5. Check, prepare, cache --------------------------------------------------------------------

def problems(row):
    """What is wrong with a row's volume, as a list of short texts; empty where nothing is."""
    try:
        return volume_problems(row.read())
    except ValueError as error:
        return [str(error).removeprefix(f"{row.path}: ")]


def volume_problems(volume):
    """What looks wrong in a Volume that could be read, as a list of short texts."""
    texts = []
    if not volume.oriented:
        texts.append("neither qform nor sform is set, so the orientation is a guess: "
                     "left and right may be swapped")
    for axis, size, spacing in zip("xyz", volume.hu.shape, volume.spacing):
        extent = size * spacing
        if not 0.2 <= spacing <= 10 or not 60 <= extent <= 1200:
            texts.append(f"{axis}: {size} voxels of {spacing:.2f} mm make {extent:.0f} mm; "
                         "spacing missing or wrong?")
    hu = volume.hu[::2, ::2, ::2]
    values = f"values {hu.min():g} to {hu.max():g}"
    lung = float(((hu > -950) & (hu < -500)).mean())
    tissue = float(((hu > -200) & (hu < 200)).mean())
    if lung < 0.01:
        texts.append(f"{lung:.1%} of it is lung (-950 to -500 HU), {values}; slope and intercept "
                     "not applied, negative values stored as unsigned, or no lung in view?")
    elif tissue < 0.05:
        texts.append(f"{tissue:.0%} of it is soft tissue (within 200 HU of water), {values}; "
                     "intercept applied twice?")
    return texts


def _map_in_threads(function, items, workers, title):
    """[function(item) for item in items] with progress; workers None: one a core.

    Threads are enough, since decompression, numpy and torch free the GIL; torch gets one core each.
    """
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        results = pool.map(function, items)
        return list(tqdm(results, title, len(items), unit="volume", smoothing=0.05))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


class Cache:
    """Preprocessed volumes in a folder, one .npy each: int16 HU (X, Y, Z), read by memory map.

    All have the settings in the folder's cache.json; ValueError where these aren't the given ones.
    """

    def __init__(self, folder, spacing=SPACING, shape=SHAPE, hu_range=HU_RANGE):
        low, high = hu_range
        possible = [0.01 <= size <= 100 for size in spacing]
        possible += [min(shape) >= 1, math.prod(shape) <= 2**30, -32768 <= low < high <= 32767]
        if not all(possible):
            raise ValueError(f"spacing {spacing}, shape {shape}, HU range {hu_range}: 0.01 to 100 "
                             "mm, 1 to 2^30 voxels, an ascending range in int16 are possible")
        self.folder = Path(folder)
        self.settings = {"spacing_out": list(map(float, spacing)), "shape_out": list(shape),
                         "hu_range": list(hu_range)}
        record = self.folder / "cache.json"
        settings = json.dumps(self.settings)
        if not record.exists():
            write_atomically(record, settings.encode())
        elif record.read_bytes() != settings.encode():
            raise ValueError(f"{record}: was prepared with other settings than {settings}; "
                             "name another folder")

    @classmethod
    def for_config(cls, folder, config):
        """The cache in a folder of volumes as a model's config (model.Config) wants them."""
        return cls(folder, config.spacing, config.shape, config.hu_range)

    def path(self, row):
        """Where a row's volume lies.

        The scan's path is part of the name, so that manifests that name different scans alike can
        share a cache; so is what turns its voxels into HU, so that a correction of the manifest's
        slope, intercept or spacing is never missed. The path is taken as it leads from the cache to
        the scan, links not followed: both can be moved together, or the cache used without scans.
        """
        source = os.path.relpath(row.path, self.folder)
        source = repr((source, row.slope, row.intercept, row.spacing))
        return self.folder / f"{row.name}.{report_sha256(source)[:16]}.npy"

    def holds(self, row):
        """Whether the row's volume is here and not older than its source, where that is at hand."""
        try:
            made = self.path(row).stat().st_mtime
            return not row.path.exists() or made >= row.path.stat().st_mtime
        except OSError:
            return False

    def add(self, row):
        """Preprocess and write a row's volume; returns None, or why it can't be."""
        try:
            volume = row.read()
            content = io.BytesIO()
            hu = preprocess(volume.hu, volume.spacing, **self.settings)
            numpy.save(content, hu, allow_pickle=False)
            write_atomically(self.path(row), content.getbuffer())
        except ValueError as error:
            return str(error)
        except (MemoryError, RuntimeError):  # what numpy and torch raise
            return f"{row.path}: too large for the memory of this machine"

    def read(self, row):
        """A row's volume as a read-only int16 memory map (X, Y, Z)."""
        return numpy.load(self.path(row), mmap_mode="r", allow_pickle=False)


def prepare(rows, cache, workers=None, listing="skipped.csv"):
    """Bring every row's volume into the cache -> (the rows that are there, skipped (name, reason)).

    What is there stays, so that a killed run goes on. The skipped are never replaced by others; the
    listing, a file in the cache, names them, and those of other rows stay in it. ValueError where
    the disk is too small.
    """
    todo = [row for row in rows if not cache.holds(row)]
    if not todo:
        return rows, []
    size = len(todo) * math.prod(cache.settings["shape_out"]) * 2
    free = shutil.disk_usage(cache.folder).free
    print(f"{len(todo)} of {len(rows)} volumes to prepare: {size / 2**30:.2f} GiB, "
          f"{free / 2**30:.0f} GiB free in {cache.folder}", file=sys.stderr)
    if size > free:
        raise ValueError(f"{cache.folder}: {size / 2**30:.1f} GiB are needed "
                         f"and {free / 2**30:.1f} GiB are free")
    reasons = _map_in_threads(cache.add, todo, workers, "prepare")
    reasons = {row.name: reason for row, reason in zip(todo, reasons)}
    skipped = [item for item in reasons.items() if item[1]]
    listing = cache.folder / listing
    _update_listing(listing, reasons, skipped)
    if skipped:
        print(f"{len(skipped)} volumes skipped, the first: {skipped[0][1]}; all in {listing}",
              file=sys.stderr)
    return [row for row in rows if not reasons.get(row.name)], skipped


def _update_listing(listing, tried, skipped):
    lines = read_csv(listing, "name", "reason") if listing.exists() else []
    if lines or skipped:
        others = [line.values() for line in lines if line["name"] not in tried]
        write_csv(listing, [("name", "reason"), *others, *skipped])


# ---- 6. Texts and training pairs -----------------------------------------------------------------

def report_sha256(report):
    """The key of a report in summaries.jsonl."""
    return hashlib.sha256(report.encode()).hexdigest()


def read_records(path):
    """summaries.jsonl -> {sha256 of the report: its record}; ValueError names a bad line."""
    records = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            records[record["report_sha256"]] = record
        except (ValueError, KeyError, TypeError, RecursionError):
            mend = "delete it and run summarize.py again, which does that report anew"
            raise ValueError(f"{path}: line {number} is not a summary; {mend}") from None
    return records


def read_summaries(path):
    """summaries.jsonl -> {sha256 of the report: summary}; failed summaries are left out."""
    summaries = {sha: record.get("summary") for sha, record in read_records(path).items()}
    if not all(isinstance(summary or "", str) for summary in summaries.values()):
        raise ValueError(f"{path}: a summary is no text; run summarize.py again, into a new file")
    return {sha: summary for sha, summary in summaries.items() if summary}


def text_of(row, summaries):
    """What a row's volume is paired with: its report's summary if there is one, else the report."""
    return summaries.get(report_sha256(row.report), row.report)


def sentences(text):
    """Split a report or a summary into its sentences; what has no letter or digit is left out."""
    parts = re.split(r"(?<=[.!?;])\s+|\n+", text.strip())
    return [part for part in parts if re.search(r"\w", part)]


def sentences_as_authors(text):
    """The authors' sentences, which end at "." or at a number such as "3.", of two or more words.
    """
    parts = re.split(r"\d+\.|\.", text)
    return [f"{part.strip()}." for part in parts if len(re.findall(r"\w+", part)) > 1]


class ReportVolumes:
    """Training pairs for a DataLoader, an item per distinct report: (int16 HU (1, x, y, z), text).

    Each key (epoch, item) is a new draw: one of the report's volumes, a random crop of it, and the
    sentences of the text in random order: as the authors up to n_sentences of them (paper,
    implementation details), with drawing "all" each. The text is the report's summary where there
    is one, else the report. The same seed and key give the same draw, so that a resumed run goes on
    exactly. A report without a sentence is left out.
    """

    def __init__(
        self, rows, cache, summaries=None, crop=None, n_sentences=5, seed=0, drawing="all"
    ):
        split = sentences_as_authors if drawing == "authors" else sentences
        by_report = {}  # (the rows of one report, the sentences of its text)
        for row in rows:
            if row.report not in by_report:
                by_report[row.report] = [], split(text_of(row, summaries or {}))
            by_report[row.report][0].append(row)
        self.items = [(group, parts) for group, parts in by_report.values() if parts]
        if not self.items:
            raise ValueError("no row has a report, so there is nothing to train on")
        self.cache = cache
        self.crop = crop
        self.n_sentences = n_sentences if drawing == "authors" else None
        self.seed = seed

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
        order = random.permutation(len(text))[:self.n_sentences]
        text = " ".join(text[i] for i in order)
        return _tensor(volume[tuple(crop)]), text


class Volumes:
    """Evaluation: each row's whole cached volume as int16 HU (1, X, Y, Z)."""

    def __init__(self, rows, cache):
        self.rows = rows
        self.cache = cache

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return _tensor(self.cache.read(self.rows[i]))


def _tensor(volume):
    import torch
    return torch.from_numpy(numpy.array(volume))[None]


# ---- 7. Files ------------------------------------------------------------------------------------

def read_csv(path, *needed):
    """A CSV with a header as a list of dicts; ValueError unless it is UTF-8 with these columns.

    A cell that a line lacks is ""; a line with more cells than the header is an error, since a text
    with a comma that nobody quoted would lose its end. No message quotes the file.
    """
    csv.field_size_limit(1 << 24)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
        columns = reader.fieldnames or []
        missing = set(needed) - set(columns)
        if "\0" in text:
            raise csv.Error("a NUL byte")
        if len(set(columns)) < len(columns):
            raise csv.Error("a column stands twice")
        if missing:
            raise ValueError(f"{path}: has no column {', '.join(sorted(missing))}; its first line "
                             "must be a header, with commas")
        lines = list(reader)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from None
    for number, line in enumerate(lines, 2):
        if any(line.pop(None, [])):
            raise ValueError(f"{path}, row {number}: has more cells than the header; "
                             "a text with a comma needs quotes")
    return lines


def write_csv(path, lines):
    """Write lines of cells as a CSV, atomically; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_atomically(path, text.getvalue().encode())


def sha256_of(path):
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


# ---- 8. Command line -----------------------------------------------------------------------------

def option(default, help, low=None, high=math.inf, **keywords):
    """A field of a dataclass of settings, for add_options and check_options.

    A number is to be from low to high; keywords are argparse's.
    """
    about = {"help": help, "bounds": (low, high), **keywords}
    return field(default=default, metadata=about)


def add_options(parser, settings):
    """Give a parser an option for each field of a dataclass; what isn't typed isn't in its result.
    """
    for item in fields(settings):
        about = {key: value for key, value in item.metadata.items() if key != "bounds"}
        if item.default not in ("", None, False, ()):
            about["help"] += f" (default {item.default})"
        if item.type is bool:
            about["action"] = "store_true"
        elif item.type is not list:
            about["type"] = item.type
        name = item.name.replace("_", "-")
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, **about)


def check_options(settings):
    """ValueError where a number of settings is out of its bounds, or a choice isn't one.

    A dataclass of options has it as its __post_init__.
    """
    for item in fields(settings):
        value, (low, high) = getattr(settings, item.name), item.metadata["bounds"]
        choices = item.metadata.get("choices")
        name = item.name.replace("_", "-")
        if low is not None and not low <= value <= high:
            raise ValueError(f"--{name} is {value}; a number from {low} to {high} is needed")
        if choices and item.type is str and value not in (item.default, *choices):
            raise ValueError(f"--{name} is '{value}'; it is one of {', '.join(choices)}")


def run_command(main):
    """Run a command line's main() -> exit status; bad input is 2 and one line on standard error."""
    try:
        return main()
    except (ValueError, OSError) as error:
        status, line = 2, f"error: {' '.join(str(error).split())}"
    except KeyboardInterrupt:
        status, line = 130, "stopped"
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    return status


def _manifest_command(options):
    if options.dataset == "ct-rate":
        rows = ct_rate_manifest(options.root, options.split, options.release)
    else:
        rows = rad_chestct_manifest(options.root, options.split)
    write_manifest(rows, options.out)
    scans = len({row.scan for row in rows})
    patients = len({row.patient for row in rows})
    absent = sum(not row.path.exists() for row in rows)
    note = f"; {absent} volumes are not on this disk" if absent else ""
    print(f"{options.out}: {len(rows)} volumes of {scans} scans of {patients} patients{note}")


def _check_command(options):
    rows = read_manifest(options.manifest)
    bad = []
    for row, texts in zip(rows, _map_in_threads(problems, rows, options.workers, "check")):
        bad += [(row.name, text) for text in texts]
    width = max((len(name) for name, _ in bad), default=0)
    for name, text in bad:
        print(f"{name:{width}}  {text}")
    print(f"{len(rows)} volumes, {len(dict(bad))} with a problem")
    return 1 if bad else 0


def _prepare_command(options):
    part, parts = options.shard
    rows = read_manifest(options.manifest)[part - 1::parts]
    cache = Cache(options.out, options.spacing, options.shape, options.hu_range)
    listing = f"skipped.{part}of{parts}.csv"
    if parts == 1:  # no other machine is writing now
        listing = "skipped.csv"
        sweep(cache.folder)
    ready, skipped = prepare(rows, cache, options.workers, listing)
    print(f"{options.out}: {len(ready)} volumes ready, {len(skipped)} skipped")


def sweep(folder):
    """Remove what processes that are gone have left half written."""
    for file in folder.glob(".*.tmp"):
        try:
            os.kill(int(file.name.split(".")[-2]), 0)  # 0: only asks whether it runs
        except ProcessLookupError:
            file.unlink(missing_ok=True)
        except (OSError, ValueError, OverflowError):  # another user's, another name
            pass


def _workers(text):
    if 1 <= int(text) <= 1024:
        return int(text)
    raise argparse.ArgumentTypeError("1 to 1024 threads are possible")


def _shard(text):
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match and 1 <= int(match[1]) <= int(match[2]):
        return int(match[1]), int(match[2])
    raise argparse.ArgumentTypeError(f"'{text}' is no shard; 2/8 is the second of eight")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser(
        "manifest", help="write manifest.csv from a data set's own files",
        epilog="example: python data.py manifest --dataset ct-rate --root CT-RATE --split valid "
               "--out manifest.csv")
    command.set_defaults(run=_manifest_command)
    add = command.add_argument
    add("--dataset", choices=["ct-rate", "rad-chestct"], required=True)
    add("--root", type=Path, required=True, help="the folder that the data set was downloaded to")
    add("--split", required=True,
        help="ct-rate: train, valid; rad-chestct: train, valid, test, all")
    add("--release", type=int, choices=[1, 2],
        help="CT-RATE's; default: 2 (the _fixed folders) where it is there")
    add("--out", type=Path, required=True)

    command = commands.add_parser(
        "check", help="read every volume and list what is wrong",
        epilog="example: python data.py check manifest.csv")
    command.set_defaults(run=_check_command)
    command.add_argument("manifest", type=Path)
    command.add_argument("--workers", type=_workers)

    command = commands.add_parser(
        "prepare", help="preprocess every volume into a cache; resumable",
        epilog="example: python data.py prepare manifest.csv --out cache --shard 1/4")
    command.set_defaults(run=_prepare_command)
    add = command.add_argument
    add("manifest", type=Path)
    add("--out", type=Path, required=True, help="the cache's folder")
    add("--spacing", type=float, nargs=3, default=SPACING, metavar="MM",
        help="x y z; default 1.5 1.5 3.0")
    add("--shape", type=int, nargs=3, default=SHAPE, metavar="N",
        help="x y z; default 256 256 128")
    add("--hu-range", type=int, nargs=2, default=HU_RANGE, metavar="HU")
    add("--workers", type=_workers, help="threads; default: one per core")
    add("--shard", type=_shard, default=(1, 1), metavar="I/N",
        help="the I-th of N parts, for N machines")

    options = parser.parse_args(argv)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(run_command(main))
