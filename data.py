"""From the files of a data set to batches: volumes in HU, one manifest for every data set, a cache, the training items.

    files --manifest--> manifest.csv --check--> what is wrong with it --prepare--> cached volumes --ReportVolumes--> batches

    python data.py manifest --dataset ct-rate --root CT-RATE --split valid --out manifest.csv
    python data.py check manifest.csv
    python data.py prepare manifest.csv --out cache

A volume in memory is [X, Y, Z] with axes that point to the patient's Left, Posterior, Superior (LPS), its values are HU, its
spacing (x, y, z) is in mm. A manifest written by hand with the columns name,path,report is enough to train on one's own scans.
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

CT_RATE = ["Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
           "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis", "Lung nodule",
           "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern",
           "Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening"]
CT_RATE_LT = ["Pneumonia", "Pneumothorax", "Empyema", "Tuberculosis", "Pulmonary fibrosis", "Lung cyst", "Bronchial thickening",
              "Lung mass", "Osteophyte", "Rib fracture", "Atherosclerosis", "Pericardial calcification", "Spondylosis",
              "Pleural calcification", "Pneumomediastinum"]
RAD_CHESTCT = {  # its findings -> the class that they are scored as; both calcification classes of CT-RATE are one here
    **dict.fromkeys(["catheter_or_port", "tracheal_tube", "chest_tube", "breast_implant", "pacemaker_or_defib", "stent", "clip",
                     "staple", "gi_tube", "hardware", "suture"], "Medical material"),
    "calcification": "Calcification", "hernia": "Hiatal hernia", "nodule": "Lung nodule", "nodulegr1cm": "Lung nodule",
    "opacity": "Lung opacity", "scarring": "Pulmonary fibrotic sequela", "bronchial_wall_thickening": "Peribronchial thickening",
    "septal_thickening": "Interlobular septal thickening", "cardiomegaly": "Cardiomegaly",
    "pericardial_effusion": "Pericardial effusion", "pleural_effusion": "Pleural effusion", "lymphadenopathy": "Lymphadenopathy",
    "emphysema": "Emphysema", "atelectasis": "Atelectasis", "consolidation": "Consolidation", "bronchiectasis": "Bronchiectasis"}
BENCHMARKS = {"ct-rate": CT_RATE, "ct-rate-lt": CT_RATE_LT, "rad-chestct": list(dict.fromkeys(RAD_CHESTCT.values()))}


# ---------------------------------------------------------------------------------------------------------------- volumes

@dataclass
class Volume:
    hu: numpy.ndarray      # (X, Y, Z), axes to the patient's Left, Posterior, Superior
    spacing: tuple         # (x, y, z) in mm
    affine: numpy.ndarray  # (4, 4), voxel of `hu` -> mm in NIfTI's world (Right to Left negative, as nibabel has it)


def read_volume(path, slope=None, intercept=None, spacing=None):
    """Read .nii, .nii.gz or RAD-ChestCT's .npz as a Volume in HU, turned to LPS by the file's affine.

    slope, intercept (HU = stored value * slope + intercept) replace the file's own scaling, so that neither is ever applied on
    top of the other. spacing (x, y, z) in mm replaces the file's own; an entry of None keeps it. Raises ValueError, naming the
    file, where it is missing, damaged, not 3D, constant or holds NaN.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            stored, affine, header_scaling = *_read_npz(path), (1.0, 0.0)
        elif path.name.endswith((".nii", ".nii.gz")):
            stored, affine, header_scaling = _read_nifti(path)
        else:
            raise ValueError("not a .nii, .nii.gz or .npz file")
        if stored.ndim > 3 and stored[..., 0].ndim == 3 and stored.shape[3] == 1:
            stored = stored[..., 0]
        if stored.ndim != 3:
            raise ValueError(f"a 3D volume is needed, this one has shape {stored.shape}")
        hu, affine = _to_lps(stored, affine)
        if slope is None and intercept is None:
            slope, intercept = header_scaling
        hu = _rescale(hu, 1.0 if slope is None else slope, 0.0 if intercept is None else intercept)
        if hu.dtype.kind == "f" and not numpy.isfinite(hu).all():
            raise ValueError("holds NaN or infinite values")
        if hu.min() == hu.max():
            raise ValueError(f"every voxel is {hu.flat[0]}; the volume is empty")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (EOFError, OSError, zlib.error, KeyError, ValueError, nibabel.filebasedimages.ImageFileError,
            nibabel.spatialimages.HeaderDataError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from None
    zooms = nibabel.affines.voxel_sizes(affine)
    if spacing is not None:
        wanted = numpy.array([own if given is None else given for given, own in zip(spacing, zooms)])
        affine = affine @ numpy.diag([*(wanted / zooms), 1.0])
        zooms = wanted
    return Volume(hu, tuple(float(zoom) for zoom in zooms), affine)


def _read_nifti(path):
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)  # one call that frees the GIL, so that threads decompress side by side
    if len(content) < 348:
        raise ValueError("too short for a NIfTI header")
    kind = nibabel.Nifti2Image if content[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nibabel.Nifti1Image
    image = kind.from_bytes(content)
    if not numpy.isfinite(image.affine).all() or abs(numpy.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise ValueError("its affine is singular, so the orientation is unknown")
    stored = image.dataobj.get_unscaled()
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    return stored, image.affine, (image.dataobj.slope, image.dataobj.inter)


def _read_npz(path):
    """RAD-ChestCT: `ct` is (Z, Y, X), axis 0 from head to feet, 0.8 mm isotropic."""
    with numpy.load(path, allow_pickle=False) as archive:
        volume = archive["ct"].T[:, :, ::-1]
    return volume, numpy.diag([-0.8, -0.8, 0.8, 1.0])


def _to_lps(array, affine):
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt("LPS"))
    return (nibabel.orientations.apply_orientation(array, turn),
            affine @ nibabel.orientations.inv_ornt_aff(turn, array.shape))


def _rescale(stored, slope, intercept):
    if stored.dtype.kind not in "iuf":
        raise ValueError(f"voxels of type {stored.dtype} are not numbers")
    if slope == 1 and intercept == 0:
        return stored
    return stored.astype(numpy.float32) * numpy.float32(slope) + numpy.float32(intercept)


SLAB = 4  # slices that are resampled at a time


def preprocess(hu, spacing, spacing_out=(1.5, 1.5, 3.0), shape_out=(256, 256, 128), hu_range=(-1000, 1000)):
    """Resample linearly, crop and pad about the centre with -1024, clip to hu_range: HU (X, Y, Z) -> int16 shape_out.

    Resampling follows SimpleITK: the new size is round(size * spacing / spacing_out), the first voxels' centres coincide; beyond
    the last centre the edge's value is kept, where SimpleITK fills in a foreign zero. Settings of REFERENCE: 1.5 x 1.5 x 3.0 mm.
    """
    volume = torch.from_numpy(numpy.ascontiguousarray(hu.transpose(2, 1, 0)))  # (Z, Y, X), as the file lies: slices stay whole
    if volume.dtype not in (torch.int16, torch.float32):
        volume = volume.float()
    (x_low, x_weight, x_at), (y_low, y_weight, y_at), (z_low, z_weight, z_at) = map(_resample_plan, hu.shape, spacing, spacing_out, shape_out)
    out = torch.full([int(size) for size in shape_out[::-1]], -1024, dtype=torch.int16).clamp_(*hu_range)
    inside = out[z_at:z_at + len(z_low), y_at:y_at + len(y_low), x_at:x_at + len(x_low)]
    for z in range(0, len(z_low), SLAB):  # a few slices at a time through all three axes, which stay in the cache
        slab = _interpolate(volume, 0, z_low[z:z + SLAB], z_weight[z:z + SLAB])
        slab = _interpolate(_interpolate(slab, 1, y_low, y_weight), 2, x_low, x_weight)
        inside[z:z + SLAB] = slab.clamp_(*hu_range).round_()
    return out.permute(2, 1, 0).contiguous().numpy()


def _resample_plan(size, spacing, spacing_out, shape_out):
    """For one axis: the lower neighbour and the upper one's weight for each output voxel, and the padding before them."""
    resampled = max(1, round(size * spacing / spacing_out))
    kept = min(resampled, shape_out)
    before = (shape_out - kept) // 2
    position = (torch.arange(kept, dtype=torch.float64) + (resampled - kept) // 2) * (spacing_out / spacing)
    position = position.clamp_(0, size - 1)
    low = position.floor().long().clamp_(max=max(size - 2, 0))
    return low, (position - low).float(), before


def _interpolate(volume, axis, low, weight):
    size = volume.shape[axis]
    high = (low + 1).clamp_(max=size - 1)
    if axis == 2:  # neighbours along the contiguous axis: a product with the two-banded matrix beats gathering
        bands = torch.zeros(size, len(low))
        columns = torch.arange(len(low))
        bands[low, columns] += 1 - weight
        bands[high, columns] += weight
        return volume.float() @ bands
    weight = weight.view(-1, *[1] * (2 - axis))
    return torch.lerp(volume.index_select(axis, low).float(), volume.index_select(axis, high).float(), weight)


# --------------------------------------------------------------------------------------------------------------- manifest

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


COLUMNS = ["name", "path", "split", "patient", "scan", "report", "slope", "intercept", "spacing_x", "spacing_y", "spacing_z"]
NAME = re.compile(r"[^/\\\0\n\r]{1,200}")


def read_csv(path, *needed):
    """Read a CSV with a header as a list of dicts; ValueError where it is no UTF-8 or lacks a needed column."""
    csv.field_size_limit(1 << 24)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in needed if column not in (reader.fieldnames or [])]
            if missing:
                raise ValueError(f"{path}: has no column {', '.join(missing)}; its header reads: {','.join(reader.fieldnames or [])[:200]}")
            return list(reader)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from None


def read_manifest(path, split=None):
    """Read manifest.csv as a list of Rows, of one split if given; ValueError names the row and the column that is wrong."""
    path = Path(path)
    lines = read_csv(path, "name", "path")
    if not lines:
        raise ValueError(f"{path}: has a header and no rows")
    splits = sorted({line.get("split") or "" for line in lines})
    if split is not None and split not in splits:
        raise ValueError(f"{path}: no row has the split '{split}'; there are: {', '.join(repr(s) for s in splits)}")
    rows, names = [], set()
    for number, line in enumerate(lines, 2):
        where, name = f"{path}, row {number}", line["name"]
        if not NAME.fullmatch(name or "") or name in (".", ".."):
            raise ValueError(f"{where}: '{name}' can't be a name; it becomes a file's name, so 1 to 200 characters without / or \\")
        if name in names:
            raise ValueError(f"{where}: the name '{name}' stands twice; names must be unique")
        if not line["path"]:
            raise ValueError(f"{where}: the path is empty")
        names.add(name)
        if split is None or (line.get("split") or "") == split:
            numbers = {column: _number(line.get(column), where, column) for column in COLUMNS[6:]}
            labels = {column[6:]: _label(value, where, column) for column, value in line.items()
                      if column is not None and column.startswith("label:")}
            rows.append(Row(name, path.parent / line["path"], line.get("split") or "", line.get("patient") or name,
                            line.get("scan") or name, line.get("report") or "", numbers["slope"], numbers["intercept"],
                            tuple(numbers[f"spacing_{axis}"] for axis in "xyz"), labels))
    return rows


def _number(text, where, column):
    if not (text or "").strip():
        return None
    try:
        value = float(text)
        if not numpy.isfinite(value) or (column != "intercept" and value <= 0):
            raise ValueError
        return value
    except ValueError:
        raise ValueError(f"{where}: {column} is '{text}'; a {'' if column == 'intercept' else 'positive '}number or nothing is needed") from None


def _label(text, where, column):
    try:
        return {"": numpy.nan, "0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}[(text or "").strip()]
    except KeyError:
        raise ValueError(f"{where}: {column} is '{text}'; 0, 1 or nothing is needed") from None


def write_manifest(rows, path):
    """Write Rows as manifest.csv, atomically; paths below the manifest's folder become relative to it."""
    path = Path(path)
    classes = list(dict.fromkeys(name for row in rows for name in row.labels))
    folder = path.resolve().parent
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS + [f"label:{name}" for name in classes])
    for row in rows:
        file = row.path.resolve()
        labels = [row.labels.get(name, numpy.nan) for name in classes]
        writer.writerow([row.name, file.relative_to(folder) if file.is_relative_to(folder) else file, row.split, row.patient,
                         row.scan, row.report, *("" if value is None else repr(value) for value in (row.slope, row.intercept, *row.spacing)),
                         *("" if numpy.isnan(label) else int(label) for label in labels)])
    write_atomically(path, text.getvalue().encode())


def write_atomically(path, content):
    """Write bytes to a temporary name beside path, sync, rename: a killed run leaves the old file or the new one, whole."""
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


# ------------------------------------------------------------------------------------------------ data sets -> manifest

def ct_rate_manifest(root, split, release=None):
    """Rows of CT-RATE's `split` (train or valid) below root, labels of CT-RATE-LT included where its CSV is there.

    Release 2 (`train_fixed`, `valid_fixed`: already HU, true spacing) is taken where its folder is there, else release 1
    (`train`, `valid`), whose rows carry slope, intercept and spacing from the metadata. CSVs may carry prefixes.
    """
    if split not in ("train", "valid"):
        raise ValueError(f"CT-RATE has the splits train and valid, not '{split}'")
    root = Path(root) / "dataset" if (Path(root) / "dataset").is_dir() else Path(root)
    release = release or (2 if (root / f"{split}_fixed").is_dir() else 1)
    volumes = root / (f"{split}_fixed" if release == 2 else split)
    if not volumes.is_dir():
        raise ValueError(f"{volumes}: no such folder; --root is the folder that holds CT-RATE's train and valid folders")
    long_split = "validation" if split == "valid" else "train"
    reports = _index(_find(root, f"{long_split}_reports.csv"), "Findings_EN", "Impressions_EN")
    metadata = _index(_find(root, f"{long_split}_metadata.csv"), "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing") if release == 1 else {}
    labels = _index(_find(root, f"{split}_predicted_labels.csv"), *CT_RATE)
    rare = _find_by_header(root, CT_RATE_LT)
    rare = _index(rare, *CT_RATE_LT) if rare else {}
    excluded = root / f"no_chest_{split}.txt"
    excluded = {Path(line.strip()).name for folder in (root, root / "metadata") for line in
                ((folder / excluded.name).read_text().split() if (folder / excluded.name).is_file() else [])}
    rows = []
    for volume, report in reports.items():
        if volume in excluded or volume.removesuffix(".nii.gz") in excluded:
            continue
        match = re.fullmatch(r"((\w+?_\d+)_[a-z]+)_\d+\.nii\.gz", volume)
        if not match:
            raise ValueError(f"{root}: the reports name a volume '{volume}'; CT-RATE's are named like valid_1_a_1.nii.gz")
        scan, patient = match.groups()
        about = metadata.get(volume, {})
        if release == 1 and not about:
            raise ValueError(f"{root}: the metadata has no row for {volume}, without which its HU are unknown")
        known = {name: _label(table[volume].get(name), volume, name) for table, names in ((labels, CT_RATE), (rare, CT_RATE_LT))
                 if volume in table for name in names}
        rows.append(Row(volume.removesuffix(".nii.gz"), volumes / patient / scan / volume, split, patient, scan, _report_text(report),
                        _number(about.get("RescaleSlope"), volume, "slope"), _number(about.get("RescaleIntercept"), volume, "intercept"),
                        (*_xy_spacing(about.get("XYSpacing"), volume), _number(about.get("ZSpacing"), volume, "ZSpacing")), known))
    return rows


def rad_chestct_manifest(root, split):
    """Rows of RAD-ChestCT's `split` (train, valid or test): location columns folded to findings (OR), findings to classes.

    Labels are the 16 classes of the benchmark (RAD_CHESTCT) and every other finding under its own name.
    """
    if split not in ("train", "valid", "test"):
        raise ValueError(f"RAD-ChestCT has the splits train, valid and test, not '{split}'")
    root, rows = Path(root), []
    table = _index(_find(root, f"img{split}_Abnormality_and_Location_Labels.csv"), key="NoteAcc_DEID")
    for name, line in table.items():
        labels = {}
        for column, value in line.items():
            finding, star, _ = (column or "").partition("*")
            if star and finding:
                key = RAD_CHESTCT.get(finding, finding.replace("_", " ").capitalize())
                labels[key] = max(labels.get(key, 0.0), _label(value, name, column))
        rows.append(Row(name, root / f"{name}.npz", split, name, name, labels=labels))
    return rows


def _find(root, ending):
    files = sorted((file for folder in (root, *(entry for entry in root.iterdir() if entry.is_dir())) for file in folder.glob(f"*{ending}")),
                   key=lambda file: (len(file.name), file))
    if not files:
        raise ValueError(f"{root}: holds no file named *{ending}, neither itself nor in a folder of it")
    return files[0]


def _find_by_header(root, columns):
    for file in sorted([*root.glob("*.csv"), *root.glob("multi_abnormality_labels/*.csv")]):
        with open(file, encoding="utf-8-sig", newline="", errors="replace") as lines:
            if set(columns) <= set(next(csv.reader(lines), [])):
                return file
    return None


def _index(path, *columns, key="VolumeName"):
    return {line[key]: line for line in read_csv(path, key, *columns)}


def _report_text(report):
    parts = [" ".join((report.get(column) or "").split()) for column in ("Findings_EN", "Impressions_EN")]
    return " ".join(part for part in parts if part.lower() not in ("", "not given.", "not given", "nan"))


def _xy_spacing(text, volume):
    """XYSpacing is the text "[0.74, 0.74]"."""
    if not (text or "").strip():
        return None, None
    try:
        x, y = (float(value) for value in ast.literal_eval(text))
        return x, y
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(f"{volume}: XYSpacing is '{text}'; two numbers in brackets are needed") from None


# ---------------------------------------------------------------------------------------------------- check, prepare, cache

def problems(row):
    """What is wrong with a row's volume, as a list of short texts; empty where nothing is."""
    try:
        volume = row.read()
    except ValueError as error:
        return [str(error).removeprefix(f"{row.path}: ")]
    hu, found = volume.hu[::2, ::2, ::2], []
    for axis, size, spacing in zip("xyz", volume.hu.shape, volume.spacing):
        if not 0.2 <= spacing <= 10 or not 60 <= size * spacing <= 1200:
            found.append(f"{axis}: {size} voxels of {spacing:.2f} mm make {size * spacing:.0f} mm; spacing missing or wrong?")
    air, tissue = float((hu < -500).mean()), float(((hu > -200) & (hu < 200)).mean())
    if air < 0.02:
        found.append(f"{air:.0%} of it is air (below -500 HU), values {hu.min():.0f} to {hu.max():.0f}; slope and intercept not applied?")
    elif tissue < 0.05:
        found.append(f"{tissue:.0%} of it is soft tissue (within 200 HU of water), values {hu.min():.0f} to {hu.max():.0f}; intercept applied twice?")
    return found


def _map(function, items, workers, what):
    """function over items in threads (decompression, numpy and torch free the GIL), in order, with progress."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            try:
                yield from tqdm(pool.map(function, items), total=len(items), desc=what, unit="volume", smoothing=0.05)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)


class Cache:
    """Preprocessed volumes in a folder, one .npy each: int16 HU (X, Y, Z), read by memory map.

    All share the settings that stand in its cache.json; ValueError where they aren't those asked for.
    """

    def __init__(self, folder, spacing=(1.5, 1.5, 3.0), shape=(256, 256, 128), hu_range=(-1000, 1000)):
        self.folder = Path(folder)
        self.settings = {"spacing_out": list(spacing), "shape_out": list(shape), "hu_range": list(hu_range)}
        record = self.folder / "cache.json"
        if not record.exists():
            write_atomically(record, json.dumps(self.settings).encode())
        elif json.loads(record.read_text()) != self.settings:
            raise ValueError(f"{record}: was prepared with {record.read_text()}, now {json.dumps(self.settings)} is asked for; name another folder")

    @classmethod
    def for_config(cls, folder, config):
        """The cache in a folder of volumes as a model's config (model.Config) wants them."""
        return cls(folder, config.spacing, config.shape, config.hu_range)

    def path(self, row):
        """Where a row's volume lies; what turns its voxels into HU is part of the name, so a corrected slope is never missed."""
        reading = zlib.crc32(repr((row.slope, row.intercept, row.spacing)).encode())
        return self.folder / f"{row.name}.{reading:08x}.npy"

    def holds(self, row):
        """Whether the row's volume is here and not older than its source (where the source is at hand)."""
        try:
            made = self.path(row).stat().st_mtime
            return not row.path.exists() or made >= row.path.stat().st_mtime
        except FileNotFoundError:
            return False

    def add(self, row):
        """Preprocess and write a row's volume; returns None, or why it can't be."""
        try:
            volume = row.read()
            content = io.BytesIO()
            numpy.save(content, preprocess(volume.hu, volume.spacing, **self.settings), allow_pickle=False)
            write_atomically(self.path(row), content.getbuffer())
        except ValueError as error:
            return str(error)

    def read(self, row):
        """A row's volume as a read-only int16 memory map (X, Y, Z)."""
        return numpy.load(self.path(row), mmap_mode="r", allow_pickle=False)


def prepare(rows, cache, workers=None):
    """Bring every row's volume into the cache; returns (the rows that are there, the skipped as (name, reason)).

    Resumable: what is there stays. The skipped are listed in the cache's skipped.csv and are never replaced by others.
    """
    todo = [row for row in rows if not cache.holds(row)]
    if todo:
        size = len(todo) * int(numpy.prod(cache.settings["shape_out"])) * 2
        free = shutil.disk_usage(cache.folder).free
        print(f"{len(todo)} of {len(rows)} volumes to prepare: {size / 2**30:.2f} GiB, {free / 2**30:.0f} GiB free in {cache.folder}", file=sys.stderr)
        if size > free:
            raise ValueError(f"{cache.folder}: {size / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free")
    skipped = [(row.name, reason) for row, reason in zip(todo, _map(cache.add, todo, workers, "prepare")) if reason]
    lost = {name for name, _ in skipped}
    if skipped:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("name", "reason"), *skipped])
        write_atomically(cache.folder / "skipped.csv", text.getvalue().encode())
        print(f"{len(skipped)} volumes skipped, the first: {skipped[0][1]}; all in {cache.folder / 'skipped.csv'}", file=sys.stderr)
    return [row for row in rows if row.name not in lost], skipped


# -------------------------------------------------------------------------------------------------------- training items

def read_summaries(path):
    """summaries.jsonl -> {sha256 of the report: summary}; reports whose summary failed are left out."""
    summaries = {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if record.get("summary"):
                    summaries[record["report_sha256"]] = record["summary"]
            except (json.JSONDecodeError, KeyError, AttributeError):
                raise ValueError(f"{path}, line {number}: not a summary; was its run cut off? Run summarize.py again, it resumes") from None
    return summaries


def text_of(row, summaries):
    """What a row's volume is paired with: its report's summary where there is one, else the report itself."""
    return summaries.get(report_sha256(row.report), row.report)


def labels_matrix(rows, classes):
    """Labels (N, C) of the rows for the classes: 0, 1, or NaN where unknown."""
    labels = numpy.full((len(rows), len(classes)), numpy.nan)
    for row, line in zip(rows, labels):
        line[:] = [row.labels.get(name, numpy.nan) for name in classes]
    return labels


def sentences(text):
    """Split a report or a summary into its sentences."""
    return [sentence for sentence in re.split(r"(?<=[.!?;])\s+|\n+", text.strip()) if re.search(r"\w", sentence)]


class ReportVolumes(torch.utils.data.Dataset):
    """Training pairs, one item per distinct report: (int16 HU (1, x, y, z), text), drawn anew for each key (epoch, item).

    A draw takes one of the report's volumes, 1 to 5 sentences of its text without replacement in random order, and a random
    crop (paper, implementation details). Every second text or so has all that it may have, which tells most; the others have a random
    number: were it always 5 where there are as many, a text's length would tell how ill the patient is, and the prompt, one
    sentence, would look like the healthy. The text is the report's summary where there is one, else the report. The same
    (seed, epoch, item) gives the same draw, so a resumed run goes on exactly.
    """

    def __init__(self, rows, cache, summaries=None, crop=None, n_sentences=5, seed=0):
        groups = {}
        for row in rows:
            if sentences(row.report):
                groups.setdefault(row.report, []).append(row)
        if not groups:
            raise ValueError("no row has a report, so there is nothing to train on")
        summaries = summaries or {}
        self.items = [(group, sentences(summaries.get(report_sha256(report), report))) for report, group in groups.items()]
        self.cache, self.crop, self.n_sentences, self.seed = cache, crop, n_sentences, seed

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        epoch, item = key
        random = numpy.random.default_rng((self.seed, epoch, item))
        rows, text = self.items[item]
        volume = self.cache.read(rows[random.integers(len(rows))])
        crop = self.crop or volume.shape
        start = [random.integers(full - size + 1) for full, size in zip(volume.shape, crop)]
        volume = volume[tuple(slice(first, first + size) for first, size in zip(start, crop))]
        most = min(self.n_sentences, len(text))
        count = most if random.random() < 0.5 else random.integers(1, most + 1)
        text = " ".join(text[i] for i in random.permutation(len(text))[:count])
        return torch.from_numpy(numpy.array(volume))[None], text


class Volumes(torch.utils.data.Dataset):
    """Evaluation: each row's whole cached volume as int16 HU (1, X, Y, Z)."""

    def __init__(self, rows, cache):
        self.rows, self.cache = rows, cache

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return torch.from_numpy(numpy.array(self.cache.read(self.rows[i])))[None]


def report_sha256(report):
    """The key of a report in summaries.jsonl."""
    return hashlib.sha256(report.encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------- command line

def run_command(main):
    """Run a command line's main(); its exit status: 2, with one line on standard error, where the input is wrong."""
    try:
        return main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2


def _manifest_command(arguments):
    rows = (ct_rate_manifest(arguments.root, arguments.split, arguments.release) if arguments.dataset == "ct-rate"
            else rad_chestct_manifest(arguments.root, arguments.split))
    write_manifest(rows, arguments.out)
    absent = sum(not row.path.exists() for row in rows)
    print(f"{arguments.out}: {len(rows)} volumes of {len({row.scan for row in rows})} scans of {len({row.patient for row in rows})} patients"
          + (f"; {absent} volumes are not on this disk" if absent else ""))


def _check_command(arguments):
    rows = read_manifest(arguments.manifest)
    bad = [(row.name, text) for row, texts in zip(rows, _map(problems, rows, arguments.workers, "check")) for text in texts]
    width = max((len(name) for name, _ in bad), default=0)
    for name, text in bad:
        print(f"{name:{width}}  {text}")
    print(f"{len(rows)} volumes, {len({name for name, _ in bad})} with a problem")
    return 1 if bad else 0


def _prepare_command(arguments):
    rows = read_manifest(arguments.manifest)
    shard, shards = arguments.shard
    ready, skipped = prepare(rows[shard - 1::shards], Cache(arguments.out, arguments.spacing, arguments.shape, arguments.hu_range), arguments.workers)
    print(f"{arguments.out}: {len(ready)} volumes ready, {len(skipped)} skipped")


def _shard(text):
    try:
        i, n = (int(part) for part in text.split("/"))
        if 1 <= i <= n:
            return i, n
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is no shard; 2/8 is the second of eight")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("manifest", help="write manifest.csv from a data set's own files",
                                  epilog="example: python data.py manifest --dataset ct-rate --root CT-RATE --split valid --out manifest.csv")
    command.add_argument("--dataset", choices=["ct-rate", "rad-chestct"], required=True)
    command.add_argument("--root", type=Path, required=True, help="the folder that the data set was downloaded to")
    command.add_argument("--split", required=True, help="ct-rate: train, valid; rad-chestct: train, valid, test")
    command.add_argument("--release", type=int, choices=[1, 2], help="CT-RATE's; default: 2 (the _fixed folders) where it is there")
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(run=_manifest_command)
    command = commands.add_parser("check", help="read every volume and list what is wrong", epilog="example: python data.py check manifest.csv")
    command.add_argument("manifest", type=Path)
    command.add_argument("--workers", type=int)
    command.set_defaults(run=_check_command)
    command = commands.add_parser("prepare", help="preprocess every volume into a cache; resumable",
                                  epilog="example: python data.py prepare manifest.csv --out cache --shard 1/4")
    command.add_argument("manifest", type=Path)
    command.add_argument("--out", type=Path, required=True, help="the cache's folder")
    command.add_argument("--spacing", type=float, nargs=3, default=(1.5, 1.5, 3.0), metavar="MM", help="x y z; default 1.5 1.5 3.0")
    command.add_argument("--shape", type=int, nargs=3, default=(256, 256, 128), metavar="N", help="x y z; default 256 256 128")
    command.add_argument("--hu-range", type=int, nargs=2, default=(-1000, 1000), metavar="HU")
    command.add_argument("--workers", type=int, help="threads; default: one per core")
    command.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="the I-th of N parts, for N machines")
    command.set_defaults(run=_prepare_command)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
