"""data.py: volumes as SimpleITK reads and resamples them, every bad file said in one line, a cache
that survives kills."""
import csv
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy
import pytest
import torch

import data

CT = Path(__file__).parents[2] / "shared" / "ct"
real_scans = pytest.mark.skipif(not CT.exists(), reason="the real scans are not here")


def save_nifti(path, array, affine=None):
    affine = numpy.diag([-1.5, -1.5, 2.0, 1]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def hu_volume(shape=(20, 18, 16), seed=0):
    return numpy.random.default_rng(seed).integers(-1000, 1000, shape).astype(numpy.int16)


def write_manifest(folder, lines, header="name,path"):
    path = folder / "manifest.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def manifest_of(folder, names):
    return write_manifest(folder, [f"{name},{name}.nii.gz" for name in names])


def cached(folder):
    return sorted(folder.glob("cache/*.npy"))


# ---- reading

def test_any_axis_order_gives_the_same_array_to_the_voxel(tmp_path):
    hu, lps = hu_volume(), numpy.diag([-1.5, -1.4, 2.0, 1])
    image = nibabel.Nifti1Image(hu, lps)
    orientations = nibabel.orientations
    for code in ("LPS", "RAS", "LAS", "SPL", "AIR", "PSR"):
        wanted = orientations.axcodes2ornt(code)
        turn = orientations.ornt_transform(nibabel.io_orientation(lps), wanted)
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
    assert numpy.allclose(data.read_volume(raw, slope=2, intercept=5).hu, (hu + 1024.0) * 2 + 5)

    stored = (hu.astype(numpy.int32) + 1024).astype(numpy.uint16)
    image = nibabel.Nifti1Image(stored, numpy.diag([-1, -1, 1, 1]))
    content = bytearray(image.to_bytes())  # nibabel won't write slope and intercept; by hand:
    content[112:120] = numpy.array([1, -1024], "<f4").tobytes()
    scaled = tmp_path / "scaled.nii"
    scaled.write_bytes(content)
    assert numpy.array_equal(data.read_volume(scaled).hu, hu)
    assert numpy.array_equal(data.read_volume(scaled, slope=1, intercept=-1024).hu, hu)


def test_spacing_from_the_metadata_replaces_the_headers_axis_by_axis(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", hu_volume())
    volume = data.read_volume(path, spacing=(0.7, 0.7, None))
    assert volume.spacing == pytest.approx((0.7, 0.7, 2.0))
    assert nibabel.affines.voxel_sizes(volume.affine) == pytest.approx((0.7, 0.7, 2.0))


def test_rad_chestct_arrays_turn_from_head_first_slices_to_lps(tmp_path):
    ct = hu_volume((6, 5, 4))
    numpy.savez(tmp_path / "trn00001.npz", ct=ct)
    volume = data.read_volume(tmp_path / "trn00001.npz")
    assert volume.spacing == pytest.approx((0.8, 0.8, 0.8))
    assert volume.hu[3, 1, 5] == ct[0, 1, 3]  # the head's slice comes first there, last in LPS


def test_big_endian_and_singleton_axes_are_read(tmp_path):
    hu = hu_volume()
    header = nibabel.Nifti1Header(endianness=">")
    image = nibabel.Nifti1Image(hu[..., None].astype(">i2"), numpy.diag([-1, -1, 1, 1]), header)
    nibabel.save(image, tmp_path / "big.nii.gz")
    volume = data.read_volume(tmp_path / "big.nii.gz")
    assert numpy.array_equal(volume.hu, hu) and volume.hu.dtype.isnative
    data.preprocess(volume.hu, volume.spacing, shape_out=(8, 8, 8))


@pytest.mark.parametrize("endianness", "<>")
def test_nifti_2_is_read(tmp_path, endianness):
    hu = hu_volume()
    header = nibabel.Nifti2Header(endianness=endianness)
    image = nibabel.Nifti2Image(hu, numpy.diag([-1, -1, 1, 1]), header)
    nibabel.save(image, tmp_path / "second.nii")
    assert numpy.array_equal(data.read_volume(tmp_path / "second.nii").hu, hu)


def bad_files(folder):
    """Files that can't be read: {stem: what the message says}; and good.nii.gz, which can."""
    good = save_nifti(folder / "good.nii.gz", hu_volume()).read_bytes()
    (folder / "truncated.nii.gz").write_bytes(good[:-2000])
    (folder / "short.nii").write_bytes(gzip.decompress(good)[:-100])
    (folder / "text.nii.gz").write_text("not an image")
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "text.npz").write_text("not an archive")
    numpy.savez(folder / "pickled.npz", ct=numpy.full((2, 2, 2), {"a": 1}, dtype=object))
    numpy.savez(folder / "other.npz", volume=hu_volume())
    save_nifti(folder / "flat.nii.gz", hu_volume((20, 18)))
    save_nifti(folder / "time.nii.gz", hu_volume((8, 8, 8, 3)))
    save_nifti(folder / "constant.nii.gz", numpy.full((8, 8, 8), -1024, numpy.int16))
    nan = hu_volume().astype(numpy.float32)
    nan[3, 3, 3] = numpy.nan
    save_nifti(folder / "nan.nii.gz", nan)
    rgb = numpy.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    save_nifti(folder / "rgb.nii.gz", rgb)
    singular = nibabel.Nifti1Image(hu_volume(), None)
    singular.header["sform_code"] = 1
    singular.header["srow_x"] = 0
    nibabel.save(singular, folder / "singular.nii.gz")
    (folder / "volume.dcm").write_bytes(b"DICM")
    return {
        "absent": "no such file", "truncated": "", "short": "", "text": "", "empty": "not a .nii",
        "pickled": "not numbers", "other": "ct", "flat": "3D", "time": "3D", "constant": "empty",
        "nan": "NaN", "rgb": "not numbers", "singular": "singular", "volume": "not a .nii",
    }


def test_each_bad_file_is_one_line_that_names_it(tmp_path):
    for stem, reason in bad_files(tmp_path).items():
        files = list(tmp_path.glob(f"{stem}.*")) or [tmp_path / f"{stem}.nii.gz"]
        for file in files:
            with pytest.raises(ValueError) as caught:
                data.read_volume(file)
            message = str(caught.value)
            assert message.startswith(f"{file}: ")
            assert reason in message
            assert "\n" not in message


def nifti_bytes(array, affine=None, kind=nibabel.Nifti1Image, **fields):
    """A .nii in mm whose header has these fields, unchecked."""
    affine = numpy.diag([-1.5, -1.5, 2.0, 1]) if affine is None else affine
    image = kind(array, affine, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    content = bytearray(image.to_bytes())
    size = kind.header_class.sizeof_hdr
    header = numpy.frombuffer(content[:size], kind.header_class.template_dtype).copy()
    for name, value in fields.items():
        header[name] = value
    content[:size] = header.tobytes()
    return bytes(content)


def write(path, content):
    path.write_bytes(content)
    return path


def line_about(path):
    """The one line that says why a file can't be read."""
    with pytest.raises(ValueError) as caught:
        data.read_volume(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable()
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def peak():
    """The most memory that was taken since the last call, in bytes."""
    def since_last():
        most = tracemalloc.get_traced_memory()[1] - since_last.start
        tracemalloc.reset_peak()
        since_last.start = tracemalloc.get_traced_memory()[0]
        return most

    since_last.start = 0
    tracemalloc.start()
    yield since_last
    tracemalloc.stop()


LIBRARIES_RAISE = [
    MemoryError(), OverflowError("too large"), RecursionError("too deep"), EOFError(), KeyError(9),
    TypeError("a\nline"), zipfile.BadZipFile("no zip"), UnicodeDecodeError("utf-8", b"", 0, 1, ""),
    PermissionError(13, "Permission denied"), nibabel.spatialimages.HeaderDataError("odd"),
]


@pytest.mark.parametrize("error", LIBRARIES_RAISE, ids=lambda error: type(error).__name__)
def test_whatever_a_library_raises_is_one_line_with_the_files_name(tmp_path, monkeypatch, error):
    def fail(content):
        raise error

    monkeypatch.setattr(data, "_read_nifti", fail)
    assert line_about(save_nifti(tmp_path / "a.nii", hu_volume()))


def archive(shape, content=bytes(1000), descr="<i2"):
    """An .npz whose array has a header by hand."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        header = b"\x93NUMPY\x01\x00" + numpy.uint16(118).tobytes() + text.encode()
        file.writestr("ct.npy", header + content)
    return out.getvalue()


def promising_files():
    """Contents whose header promises more than they hold: {name: (content, what is said)}."""
    small, second = numpy.zeros((1, 1, 1), numpy.int16), nibabel.Nifti2Image
    large = {"dim": [3, 1000, 1000, 950, 1, 1, 1, 1]}
    return {
        "cube.nii": (nifti_bytes(small, dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]), "2 GiB"),
        "large.nii": (nifti_bytes(small, **large)[:352], "cut short: 352 of 1900000352 bytes"),
        "large.nii.gz": (gzip.compress(nifti_bytes(small, **large)), "cut short"),
        "second.nii": (nifti_bytes(small, kind=second, **large)[:400], "cut short: 400 of"),
        "second.nii.gz": (gzip.compress(nifti_bytes(small, kind=second, **large)), "cut short"),
        "offset.nii": (nifti_bytes(small, vox_offset=1e9), "cut short"),
        "infinite.nii": (nifti_bytes(small, vox_offset=numpy.inf), "infinity"),
        "negative.nii": (nifti_bytes(small, dim=[3, -9, 9, 9, 1, 1, 1, 1]), "3D"),
        "zero.nii": (nifti_bytes(small, dim=[3, 9, 9, 0, 1, 1, 1, 1]), "3D"),
        "none.nii": (nifti_bytes(small, dim=[0, 9, 9, 9, 1, 1, 1, 1]), "3D"),
        "large.npz": (archive((1000, 1000, 950)), "cut short: 1000 of 1900000000 bytes"),
        "cube.npz": (archive((30000, 30000, 30000)), "2 GiB"),
        "negative.npz": (archive((-1, 20, 20)), "3D"),
    }


@pytest.mark.parametrize("name", promising_files())
def test_a_header_that_promises_more_than_the_file_holds_takes_no_memory(tmp_path, peak, name):
    content, said = promising_files()[name]
    path = write(tmp_path / name, content)
    peak()
    assert said in line_about(path)
    assert peak() < 2**20


def test_a_bomb_is_unpacked_only_as_far_as_its_header_needs(tmp_path, peak):
    hu, zeros = hu_volume(), bytes(2**27)
    ct = hu.transpose(2, 1, 0)[::-1]
    contents = {"a.nii.gz": gzip.compress(nifti_bytes(hu) + zeros, 1),
                "a.npz": archive(ct.shape, ct.tobytes() + zeros)}
    for name, content in contents.items():
        path = write(tmp_path / name, content)
        peak()
        assert numpy.array_equal(data.read_volume(path).hu, hu)
        assert peak() < 2**22


def test_a_file_over_the_limit_is_not_read(tmp_path):
    path = tmp_path / "sparse.nii"
    with open(path, "wb") as file:
        file.truncate(2**31 + 1)
    assert "more than 2 GiB" in line_about(path)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 500, 0.001])
def test_voxels_of_impossible_size_are_refused_unless_the_spacing_is_given(tmp_path, scale):
    content = nifti_bytes(hu_volume(), numpy.diag([scale, scale, scale, 1]), nibabel.Nifti2Image)
    path = write(tmp_path / "a.nii", content)
    assert "0.01 to 100 are possible" in line_about(path)
    if 1e-3 <= scale <= 1e3:
        assert data.read_volume(path, spacing=(1, 2, 3)).spacing == (1, 2, 3)


@pytest.mark.parametrize("array", [
    numpy.full((3, 3, 3), {"a": 1}, object), numpy.zeros((3, 3, 3), [("a", "i2"), ("b", "i2")]),
    numpy.ones((3, 3, 3), complex), numpy.ones((3, 3, 3), numpy.longdouble),
    numpy.full((3, 3, 3), "a"), numpy.ones((3, 3, 3), bool), numpy.ones((3, 3, 3), "m8[s]"),
], ids=lambda array: array.dtype.kind)
def test_an_archive_of_anything_but_numbers_is_refused(tmp_path, array):
    numpy.savez(tmp_path / "a.npz", ct=array)
    assert "not numbers" in line_about(tmp_path / "a.npz")


def test_archives_of_any_byte_order_and_layout_are_read_and_a_damaged_one_is_refused(tmp_path):
    ct = hu_volume((6, 5, 4))
    path = tmp_path / "a.npz"
    for array in (ct, ct.astype(">i2"), numpy.asfortranarray(ct), ct.astype(">f8"), ct[..., None]):
        for save in (numpy.savez, numpy.savez_compressed):
            save(path, ct=array)
            hu = data.read_volume(path).hu
            assert numpy.array_equal(hu, ct.T[:, :, ::-1]) and hu.dtype.isnative
    content = bytearray(path.read_bytes())
    assert line_about(write(path, content[:-50]))
    content[len(content) // 3] ^= 1
    assert line_about(write(path, content))


# ---- geometry

@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_voxels_without_an_offset_begin_right_after_the_header(tmp_path, kind):
    hu = hu_volume()
    path = write(tmp_path / "a.nii", nifti_bytes(hu, kind=kind, vox_offset=0))
    assert numpy.array_equal(data.read_volume(path).hu, hu)
    for offset in (-16, 100, *[numpy.nan] * (kind is nibabel.Nifti1Image)):
        write(path, nifti_bytes(hu, kind=kind, vox_offset=offset))
        assert "lies in the header" in line_about(path)


@pytest.mark.parametrize("magic", [b"ni1", b"xyz", b""])
def test_the_header_of_a_pair_of_files_is_refused(tmp_path, magic):
    path = write(tmp_path / "a.nii", nifti_bytes(hu_volume(), magic=magic))
    assert "a pair of .hdr and .img" in line_about(path)


def sheared(degrees):
    affine = numpy.diag([-1.5, -1.5, 2.0, 1])
    affine[1, 2] = 2 * numpy.tan(numpy.radians(degrees))
    return affine


@pytest.mark.parametrize("degrees", [0.5, 1, 15, -30])
def test_gantry_tilt_is_refused_by_its_name(tmp_path, degrees):
    path = write(tmp_path / "a.nii", nifti_bytes(hu_volume(), sheared(degrees), qform_code=0))
    assert "gantry tilt?" in line_about(path)
    # a qform can't say a shear, so it is no way out
    write(path, nifti_bytes(hu_volume(), sheared(degrees), qform_code=1))
    assert "gantry tilt?" in line_about(path)


def test_oblique_axes_and_a_shear_of_rounding_size_are_accepted(tmp_path):
    hu = hu_volume()
    c, s = numpy.cos(0.3), numpy.sin(0.3)
    turn = numpy.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]])
    for affine in (sheared(0.01), turn @ numpy.diag([-1.5, -1.5, 2.0, 1])):
        volume = data.read_volume(write(tmp_path / "a.nii", nifti_bytes(hu, affine)))
        assert numpy.array_equal(volume.hu, hu)
        assert volume.spacing == pytest.approx((1.5, 1.5, 2))


@pytest.mark.parametrize("unit, size", [(0, 1), (1, 1000), (2, 1), (3, 0.001), (10, 1), (9, 1000)])
def test_metres_and_microns_become_mm(tmp_path, unit, size):
    affine = numpy.diag([-1.5 / size, -1.5 / size, 2 / size, 1])
    affine[:3, 3] = 30 / size
    path = write(tmp_path / "a.nii", nifti_bytes(hu_volume(), affine, xyzt_units=unit))
    volume = data.read_volume(path)
    assert volume.spacing == pytest.approx((1.5, 1.5, 2))
    assert volume.affine[:3, 3] == pytest.approx([30, 30, 30])


def test_a_file_that_does_not_tell_its_orientation_is_read_as_nibabel_does_and_said(tmp_path):
    hu, affine = chest()
    path = write(tmp_path / "a.nii", nifti_bytes(hu, affine, qform_code=0, sform_code=0))
    volume = data.read_volume(path)
    assert numpy.array_equal(volume.hu, hu[:, ::-1]) and volume.spacing == (6, 6, 6)
    (text,) = data.volume_problems(volume)
    assert "orientation is a guess" in text
    assert not data.volume_problems(data.read_volume(write(path, nifti_bytes(hu, affine))))


HALF_TURN = {"quatern_b": 0, "quatern_c": 0, "quatern_d": 1}  # about z: x and y change their signs


@pytest.mark.parametrize("fields", [
    {"srow_x": 0, "srow_y": 0, "srow_z": 0},
    {"srow_x": numpy.nan},
    {"sform_code": 0},
    {"sform_code": 0, "quatern_d": 1.000001},
    {"sform_code": 0, "pixdim": [0, 1.5, 1.5, 2, 0, 0, 0, 0]},
    {"sform_code": 0, "pixdim": [1, -1.5, -1.5, 2, 0, 0, 0, 0]},
    {"qform_code": 0, "quatern_b": 9},
])
def test_of_qform_and_sform_the_valid_one_is_used(tmp_path, fields):
    fields = {"qform_code": 1, **HALF_TURN} | fields
    volume = data.read_volume(write(tmp_path / "a.nii", nifti_bytes(hu_volume(), **fields)))
    assert numpy.array_equal(volume.hu, hu_volume()) and volume.oriented
    assert volume.spacing == pytest.approx((1.5, 1.5, 2))


@pytest.mark.parametrize("fields", [
    {"pixdim": [1, 1.5, 1.5, 0, 0, 0, 0, 0], "sform_code": 0},
    {"srow_x": 0, "qform_code": 0},
    {"srow_x": numpy.inf, "qform_code": 0},
    {"srow_x": [-1.5, 0, 0, numpy.nan], "qform_code": 0},
    {"quatern_b": numpy.nan, "sform_code": 0},
])
def test_without_a_valid_affine_a_file_is_refused(tmp_path, fields):
    fields = {"qform_code": 1} | fields
    assert "singular" in line_about(write(tmp_path / "a.nii", nifti_bytes(hu_volume(), **fields)))


# ---- good input

def test_what_follows_a_gzip_stream_is_left_out_and_members_are_joined(tmp_path):
    hu = hu_volume()
    content = nifti_bytes(hu)
    blocks = [gzip.compress(content[i:i + 99]) for i in range(0, len(content), 99)]  # as bgzip does
    tails = [bytes(512), b"-- signature --", b"\x1f", gzip.compress(b"more"), gzip.compress(b"")]
    streams = [b"".join(blocks), *(gzip.compress(content) + tail for tail in tails)]
    for stream in streams:
        path = write(tmp_path / "a.nii.gz", stream)
        assert numpy.array_equal(data.read_volume(path).hu, hu)
    damaged = bytearray(gzip.compress(content))
    damaged[-6] ^= 1  # the checksum
    assert "damaged?" in line_about(write(path, damaged))


@pytest.mark.parametrize("more", [1, 2, 4])
def test_trailing_axes_of_one_are_dropped_and_no_others(tmp_path, more):
    hu = hu_volume()
    path = write(tmp_path / "a.nii", nifti_bytes(hu.reshape(*hu.shape, *[1] * more)))
    assert numpy.array_equal(data.read_volume(path).hu, hu)
    assert "3D" in line_about(write(path, nifti_bytes(hu[None])))
    assert "3D" in line_about(write(path, nifti_bytes(hu[..., None].repeat(2, 3))))


def test_the_content_tells_what_a_file_is_not_its_name(tmp_path):
    hu = hu_volume()
    plain, zipped = nifti_bytes(hu), gzip.compress(nifti_bytes(hu))
    archived = archive(hu.T.shape, hu.T[::-1].tobytes())
    names = ["a.nii", "a.nii.gz", "A.NII.GZ", "a.npz", "0f3a9c", "a.b.c"]
    for content in (plain, zipped, archived):
        for name in names:
            assert numpy.array_equal(data.read_volume(write(tmp_path / name, content)).hu, hu)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "u4", "i4", "i8", "u8", "f4", "f8", ">f8"])
def test_every_type_of_number_is_read_and_preprocessed(tmp_path, dtype):
    hu = (hu_volume() % 100).astype(dtype)
    path = write(tmp_path / "a.nii", nifti_bytes(hu))
    volume = data.read_volume(path)
    assert numpy.array_equal(volume.hu, hu)
    data.volume_problems(volume)
    out = data.preprocess(volume.hu, (1, 1, 1), (1, 1, 1), hu.shape)
    assert numpy.array_equal(out, hu)


@pytest.mark.parametrize("slope, intercept", [(0, 0), (0, -1024), (numpy.nan, numpy.nan), (1, 0)])
def test_a_slope_of_zero_or_nan_means_no_scaling(tmp_path, slope, intercept):
    content = nifti_bytes(hu_volume(), scl_slope=slope, scl_inter=intercept)
    assert numpy.array_equal(data.read_volume(write(tmp_path / "a.nii", content)).hu, hu_volume())


def test_the_links_of_a_hub_download_stay_in_its_manifest(tmp_path):
    ct_rate_files(tmp_path / "hub", 2)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted((tmp_path / "hub").rglob("*.*"))):
        file.rename(blobs / str(i))
        file.symlink_to(blobs / str(i))
    path = tmp_path / "m.csv"
    data.write_manifest(data.ct_rate_manifest(tmp_path / "hub", "valid"), path)
    first, _ = data.read_manifest(path)
    assert first.path.name == "valid_1_a_1.nii.gz" and str(tmp_path) not in path.read_text()
    assert numpy.array_equal(first.read().hu, hu_volume(seed=1))


# ---- quiet

def test_nothing_but_the_line_is_said(tmp_path, capfd):
    huge = numpy.full((4, 4, 4), 1e300)
    huge[0] = 1
    contents = {
        "slope": nifti_bytes(hu_volume(), scl_slope=1e38, scl_inter=0),
        "overflow": nifti_bytes(huge, scl_slope=2, scl_inter=0),
        "sform": nifti_bytes(hu_volume(), srow_x=1e38, sform_code=9, qform_code=-3),
        "header": nifti_bytes(hu_volume(), sizeof_hdr=1, bitpix=3, pixdim=-1, magic=b"?"),
    }
    bad_files(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for name, content in contents.items():
            line_about(write(tmp_path / f"{name}.nii", content))
        for path in tmp_path.iterdir():
            data.problems(data.Row("a", path))
    assert not said and capfd.readouterr() == ("", "")


def test_starting_is_quick_since_torch_is_not_imported():
    code = "import sys, data; sys.exit('torch' in sys.modules)"
    folder = Path(data.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


# ---- preprocessing

def central_slices(sizes, shape_out):
    """The slices that crop and pad about the centre: of the input, of the output."""
    source, target = [], []
    for size, size_out in zip(sizes, shape_out):
        common = min(size, size_out)
        cut, padding = (size - common) // 2, (size_out - common) // 2
        source.append(slice(cut, cut + common))
        target.append(slice(padding, padding + common))
    return tuple(source), tuple(target)


def crop_pad_clip(volume, shape_out, hu_range=(-1000, 1000)):
    source, target = central_slices(volume.shape, shape_out)
    out = numpy.full(shape_out, -1024.0)
    out[target] = volume[source]
    return out.clip(*hu_range)


def naive_preprocess(hu, spacing, spacing_out, shape_out):
    """The lines of preprocess's docstring, on the whole volume in float64; not rounded."""
    volume = hu.astype(numpy.float64).clip(-1024, 32767)
    for axis, size in enumerate(hu.shape):
        size_out = max(1, round(size * spacing[axis] / spacing_out[axis]))
        at = numpy.arange(size_out) * spacing_out[axis] / spacing[axis]

        def interpolate(line):
            return numpy.interp(at, numpy.arange(len(line)), line)

        volume = numpy.apply_along_axis(interpolate, axis, volume)
    return crop_pad_clip(volume, shape_out)


@pytest.mark.parametrize("shape", [(31, 17, 9), (8, 40, 23), (1, 5, 50), (64, 3, 4), (9, 11, 1)])
@pytest.mark.parametrize("shape_out", [(20, 24, 21), (7, 40, 5), (33, 1, 50)])
def test_slab_by_slab_equals_resampling_cropping_and_padding_the_whole(shape, shape_out):
    hu = hu_volume(shape) * 2
    spacing, spacing_out = (1.3, 0.7, 2.9), (1.1, 1.9, 1.7)
    out = data.preprocess(hu, spacing, spacing_out, shape_out)
    naive = naive_preprocess(hu, spacing, spacing_out, shape_out)
    assert out.shape == shape_out and out.dtype == numpy.int16
    assert numpy.abs(out - naive).max() <= 0.501  # what rounding to whole HU takes


def simpleitk_preprocess(hu, spacing, spacing_out, shape_out):
    """SimpleITK's resampling of the whole volume, then crop or pad; NaN where it is undefined."""
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(hu.clip(-1024).transpose(2, 1, 0).astype(numpy.float32))
    image.SetSpacing([float(s) for s in spacing])
    size = [max(1, round(n * s / t)) for n, s, t in zip(hu.shape, spacing, spacing_out)]
    step = [float(s) for s in spacing_out]
    resampled = sitk.Resample(image, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(),
                              step, image.GetDirection(), 1e9)
    volume = sitk.GetArrayFromImage(resampled).transpose(2, 1, 0)
    return crop_pad_clip(numpy.where(volume > 1e8, numpy.nan, volume), shape_out)


def assert_agrees_with_simpleitk(hu, spacing, spacing_out, shape_out):
    out = data.preprocess(hu, spacing, spacing_out, shape_out)
    oracle = simpleitk_preprocess(hu, spacing, spacing_out, shape_out)
    defined = ~numpy.isnan(oracle)
    assert out.dtype == numpy.int16 and out.shape == tuple(shape_out) and defined.mean() > 0.5
    assert numpy.abs(out - oracle)[defined].max() <= 1


def test_preprocess_agrees_with_simpleitk_on_random_anisotropic_volumes():
    random = numpy.random.default_rng(0)
    for trial in range(12):
        hu = hu_volume(random.integers(5, 60, 3), trial)
        spacing, spacing_out = random.uniform(0.5, 4, 3), random.uniform(0.8, 4, 3)
        assert_agrees_with_simpleitk(hu, spacing, spacing_out, random.integers(8, 50, 3))


@real_scans
def test_preprocess_agrees_with_simpleitk_on_real_scans():
    for name in ("chest_ct", "abdomen_ct"):
        volume = data.read_volume(CT / f"{name}.nii.gz")
        hu, spacing = volume.hu, volume.spacing
        assert_agrees_with_simpleitk(hu, spacing, (1.5, 1.5, 3.0), (256, 256, 128))
        assert_agrees_with_simpleitk(hu, spacing, (2.2, 1.9, 4.1), (60, 70, 40))


def test_beyond_the_last_voxel_the_edge_goes_on():
    hu = numpy.full((2, 2, 2), 700, numpy.int16)
    hu[0, 0, 0] = 699
    out = data.preprocess(hu, (3, 3, 3), (1, 1, 1), (6, 6, 6))
    assert (out[3:, 3:, 3:] == 700).all()


def test_preprocess_takes_one_slice_and_leaves_its_input_alone():
    hu = hu_volume((9, 9, 1))
    before = hu.copy()
    assert data.preprocess(hu, (1, 1, 5), (1, 1, 1), (9, 9, 5)).std(axis=2).max() == 0
    assert numpy.array_equal(hu, before)


@pytest.mark.parametrize("padding", [-1025, -2000, -3024, -32768])
def test_padding_outside_the_field_of_view_is_air_before_it_is_interpolated(padding):
    hu = hu_volume()
    hu[:7] = -1024
    padded = hu.copy()
    padded[:7] = padding
    outs = [data.preprocess(each, (3, 3, 5), (2, 2, 5), (30, 30, 16)) for each in (hu, padded)]
    assert numpy.array_equal(*outs)


@pytest.mark.parametrize("value", [1e30, -1e30, 3e38, -3e38, 1e300, 70000, 2**40])
def test_a_voxel_beyond_int16_changes_its_neighbours_alone(value):
    hu = hu_volume().astype(numpy.float64)
    spike = hu.copy()
    spike[9, 9, 9] = value
    outs = [data.preprocess(each, (1, 1, 1), (0.8, 0.8, 0.8), (25, 22, 20)) for each in (hu, spike)]
    (x, y, z) = numpy.nonzero(outs[0] != outs[1])
    assert 0 < len(x) < 64
    assert max(abs(axis * 0.8 - 9).max() for axis in (x, y, z)) < 1
    assert (outs[1][11, 11, 11] == 1000) == (value > 0)


# ---- manifest

def test_a_hand_written_manifest_needs_name_and_path_alone(tmp_path):
    save_nifti(tmp_path / "a.nii.gz", hu_volume())
    lines = ["a,a.nii.gz,There is a nodule.", 'b,b.nii.gz,"Normal, all of it."']
    a, b = data.read_manifest(write_manifest(tmp_path, lines, "name,path,report"))
    assert (a.name, a.patient, a.scan, a.report) == ("a", "a", "a", "There is a nodule.")
    assert (b.name, b.patient, b.scan, b.report) == ("b", "b", "b", "Normal, all of it.")
    assert a.read().hu.shape == (20, 18, 16)


def test_a_manifest_survives_being_written_and_read(tmp_path):
    labels = {"Emphysema": 1.0, "Lung nodule": 0.0}
    first = data.Row("a", tmp_path / "v" / "a.nii.gz", "train", "p1", "s1", 'Lines,\n"quotes".',
                     1.0, -1024.0, (0.7, 0.7, None), labels)
    second = data.Row("b", Path("/elsewhere/b.nii.gz"), "valid", "p2", "s2",
                      labels={"Emphysema": numpy.nan})
    path = tmp_path / "manifest.csv"
    data.write_manifest([first, second], path)
    assert "v/a.nii.gz" in path.read_text() and str(tmp_path) not in path.read_text()
    a, b = data.read_manifest(path)
    assert a == first
    assert (b.name, b.path, b.split) == ("b", Path("/elsewhere/b.nii.gz"), "valid")
    assert numpy.isnan(b.labels["Emphysema"]) and numpy.isnan(b.labels["Lung nodule"])
    assert data.read_manifest(path, "valid")[0].name == "b"


@pytest.mark.parametrize("header, lines, said", [
    ("name,file", ["a,b"], "no column path"),
    ("name,path", [], "no rows"),
    ("name,path", ["a,a.nii", "a,b.nii"], "row 3: the name stands in an earlier row"),
    ("name,path", ["../a,a.nii"], "row 2: the name can't be a file's name"),
    ("name,path", ["a,"], "the path is empty"),
    ("name,path", ["a"], "the path is empty"),
    ("name,path,slope", ["a,a.nii,one"], "row 2: slope is no number"),
    ("name,path,spacing_z", ["a,a.nii,0"], "row 2: spacing_z is no number"),
    ("name,path,label:Emphysema", ["a,a.nii,yes"], "row 2: label:Emphysema is none of 0, 1"),
])
def test_what_is_wrong_in_a_manifest_is_named(tmp_path, header, lines, said):
    with pytest.raises(ValueError, match=said):
        data.read_manifest(write_manifest(tmp_path, lines, header))


SECRET = "Mass in the left lobe"


@pytest.mark.parametrize("header, line", [
    ("name,path,report", f"a,a.nii,Nodule, {SECRET}."),
    ("name,path", f"a,a.nii,{SECRET}"),
    ("name,path,report", f'a,a.nii,"{SECRET}'),
    ("name,path,report", f'a,a.nii,"{SECRET}" and more'),
    ("name,path,report", f"a\0,a.nii,{SECRET}"),
    ("name,path,report", f"a,a\0.nii,{SECRET}"),
    ("name,path", f"{SECRET}/{SECRET},a.nii"),
    ("name,path", f"{SECRET * 20},a.nii"),
    ("name,path", f'a,"{SECRET}\n{SECRET}"'),
    ("name,path,report", f"a,{SECRET}.,a.nii"),
    ("name,path", f"{SECRET},a.nii\n{SECRET},b.nii"),
    ("name,path,slope", f"a,a.nii,{SECRET}"),
    ("name,path,intercept", f"a,a.nii,{SECRET}"),
    ("name,path,spacing_x", f"a,a.nii,{SECRET}"),
    ("name,path,label:Cyst", f"a,a.nii,{SECRET}"),
    (f"a,a.nii,{SECRET}", f"b,b.nii,{SECRET}"),
    ("name;path;report", f"a;a.nii;{SECRET}"),
])
def test_a_wrong_line_is_named_and_no_cell_of_a_manifest_is_quoted(tmp_path, header, line):
    with pytest.raises(ValueError) as caught:
        data.read_manifest(write_manifest(tmp_path, [line], header))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "manifest.csv"))
    assert "Mass" not in message and message.isprintable()
    with pytest.raises(ValueError) as caught:
        path = write_manifest(tmp_path, [f"a,a.nii,{SECRET}"], "name,path,split")
        data.read_manifest(path, "valid")
    assert "Mass" not in str(caught.value)


def test_no_row_of_a_manifest_is_lost(tmp_path):
    path = write_manifest(tmp_path, ['b,b.nii,"Mass of 2" in size."', "c,c.nii,Cyst."], HEADER)
    with pytest.raises(ValueError, match="not a CSV file"):
        data.read_manifest(path)
    path = write_manifest(tmp_path, ['a,a.nii,"Nodule', "b,b.nii,None.", "c,c.nii,Cyst."], HEADER)
    with pytest.raises(ValueError, match="not a CSV file"):
        data.read_manifest(path)
    path = write_manifest(tmp_path, ["a,a.nii,None.", "b,b.nii,Nodule, small."], HEADER)
    with pytest.raises(ValueError, match="manifest.csv, row 3: has more cells than the header"):
        data.read_manifest(path)


HEADER = "name,path,report"


def test_a_manifest_of_a_spreadsheet_is_read(tmp_path):
    text = 'name,path,report,\r\na,a.nii,"Nodule, 5"" wide.\r\nCyst.",\r\nb,b.nii\r\n'
    path = write(tmp_path / "m.csv", text.encode("utf-8-sig"))
    a, b = data.read_manifest(path)
    assert (a.name, a.report) == ("a", 'Nodule, 5" wide.\r\nCyst.')
    assert (b.name, b.path, b.report) == ("b", tmp_path / "b.nii", "")


@pytest.mark.parametrize("name", [
    "", ".", "..", "../x", "/x", "a/b", "a\\b", "a" * 201, "\u00e4" * 101, "a\x1bb", "a\tb",
])
def test_a_name_that_can_not_be_a_files_is_refused(tmp_path, name):
    path = tmp_path / "m.csv"
    data.write_csv(path, [["name", "path"], [name, "a.nii"]])
    with pytest.raises(ValueError, match="m.csv, row 2: the name can't be a file's"):
        data.read_manifest(path)


def test_the_longest_name_has_a_file_in_the_cache(tmp_path):
    save_nifti(tmp_path / "a.nii", hu_volume())
    rows = data.read_manifest(write_manifest(tmp_path, ["\u00e4" * 100 + ",a.nii"]))
    ready, _ = data.prepare(rows, data.Cache(tmp_path / "cache", (2, 2, 2), (8, 8, 8)))
    assert ready == rows


def test_an_unknown_split_and_a_foreign_encoding_are_named(tmp_path):
    path = write_manifest(tmp_path, ["a,a.nii,train"], "name,path,split")
    with pytest.raises(ValueError, match=r"has no rows \(split: test\)"):
        data.read_manifest(path, "test")
    (tmp_path / "latin.csv").write_bytes("name,path\nä,b".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.csv: not a CSV file in UTF-8"):
        data.read_manifest(tmp_path / "latin.csv")


def test_the_labels_matrix_has_a_column_a_class_and_nan_where_a_row_says_nothing():
    a = data.Row("a", Path("a.nii"), labels={"Emphysema": 1.0, "Lung nodule": 0.0})
    b = data.Row("b", Path("b.nii"), labels={"Empyema": 1.0})
    assert data.classes_of([a, b]) == ["Emphysema", "Lung nodule", "Empyema"]
    labels = data.labels_matrix([a, b], ["Lung nodule", "Emphysema"])
    numpy.testing.assert_array_equal(labels, [[0, 1], [numpy.nan, numpy.nan]])
    assert data.labels_matrix([], ["Emphysema"]).shape == (0, 1)


# ---- data sets

def ct_rate_files(root, release, prefix=""):
    """Two small volumes in CT-RATE's layout; a row of release 1's metadata lacks ZSpacing."""
    hu = {f"valid_{i}_a_1.nii.gz": hu_volume(seed=i) for i in (1, 2)}
    for volume, array in hu.items():
        scan = volume.removesuffix("_1.nii.gz")
        patient = scan.removesuffix("_a")
        folder = root / ("valid_fixed" if release == 2 else "valid") / patient / scan
        folder.mkdir(parents=True)
        if release == 2:
            save_nifti(folder / volume, array)
        else:
            stored = (array + 1024).astype(numpy.int16)
            save_nifti(folder / volume, stored, numpy.diag([-1.0, -1, 1, 1]))
    first, second = hu
    third = "valid_3_a_1.nii.gz"  # shows no chest
    texts = ["Not given.", "CT", "Findings\nof it.", "Not given."]
    raw = ["1", "-1024", "[1.5, 1.5]"]
    data.write_csv(root / f"radiology_text_reports/{prefix}validation_reports.csv", [
        ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"],
        [first, *texts], [second, *texts], [third, *texts],
    ])
    data.write_csv(root / f"metadata/{prefix}validation_metadata.csv", [
        ["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"],
        [first, *raw, "2.0"], [second, *raw, ""], [third, *raw, "2"],
    ])
    data.write_csv(root / f"multi_abnormality_labels/{prefix}valid_predicted_labels.csv", [
        ["VolumeName", *data.CT_RATE], [first, *[0, 1] * 9], [second, *[0, 1] * 9],
    ])
    data.write_csv(root / "multi_abnormality_labels/under_represented.csv", [
        ["VolumeName", *data.CT_RATE_LT], [first, *[1.0] * 15], [second, *[1.0] * 15],
    ])
    (root / "metadata" / "no_chest_valid.txt").write_text(f"{third}\n")
    return hu


@pytest.mark.parametrize("release, prefix", [
    (1, ""), (2, ""), (1, "dataset_metadata_"), (2, "dataset_"),
])
def test_either_release_of_ct_rate_gives_the_same_hu_and_labels(tmp_path, release, prefix):
    hu = ct_rate_files(tmp_path / "dataset", release, prefix)
    path = tmp_path / "dataset" / "manifest.csv"
    command = f"manifest --dataset ct-rate --root {path.parent} --split valid --out {path}"
    for _ in range(2):  # an earlier manifest in the root isn't taken for a table of labels
        assert data.main(command.split()) is None
    first, second = data.read_manifest(path)  # the third shows no chest
    assert (first.name, second.name) == ("valid_1_a_1", "valid_2_a_1")
    assert (first.patient, first.scan) == ("valid_1", "valid_1_a")
    assert first.report == "Findings of it."
    assert [first.labels[name] for name in data.CT_RATE] == [0, 1] * 9
    assert [second.labels[name] for name in data.CT_RATE_LT] == [1] * 15
    # release 1's second row has no ZSpacing, so the file's own is taken
    for row, z in ((first, 2.0), (second, 1.0 if release == 1 else 2.0)):
        volume = row.read()
        assert numpy.array_equal(volume.hu, hu[f"{row.name}.nii.gz"])
        assert volume.spacing == pytest.approx((1.5, 1.5, z))


def test_ct_rate_without_its_files_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        data.ct_rate_manifest(tmp_path, "valid")
    ct_rate_files(tmp_path, 1)
    with pytest.raises(ValueError, match="not 'test'"):
        data.ct_rate_manifest(tmp_path, "test")
    (tmp_path / "metadata" / "validation_metadata.csv").unlink()
    with pytest.raises(ValueError, match="validation_metadata.csv"):
        data.ct_rate_manifest(tmp_path, "valid")


REPORTS = "radiology_text_reports/validation_reports.csv"
METADATA = "metadata/validation_metadata.csv"
LABELS = "multi_abnormality_labels/valid_predicted_labels.csv"


@pytest.mark.parametrize("table, old, new, said", [
    (REPORTS, "valid_1_a_1", "scan", "row 2 of the reports: CT-RATE's volumes are named"),
    (METADATA, "valid_1_a_1", "valid_9_a_1", "the metadata has no row for valid_1_a_1.nii.gz"),
    (METADATA, "[1.5, 1.5]", "[1.5]", "valid_1_a_1.nii.gz: XYSpacing is not two numbers"),
    (METADATA, "[1.5, 1.5]", "[1.5, ]", "valid_1_a_1.nii.gz: XYSpacing is not two numbers"),
    (METADATA, "[1.5, 1.5]", "[1.5, 1, 1]", "valid_1_a_1.nii.gz: XYSpacing is not two numbers"),
    (METADATA, "[1.5, 1.5]", "[nan, 1]", "valid_1_a_1.nii.gz: XYSpacing is no number"),
    (METADATA, "[1.5, 1.5]", "[-1, 1]", "valid_1_a_1.nii.gz: XYSpacing is no number"),
    (METADATA, "[1.5, 1.5]", "[" * 10**5, "valid_1_a_1.nii.gz: XYSpacing is not two numbers"),
    (METADATA, "[1.5, 1.5]", "9**9**9,1", "valid_1_a_1.nii.gz: XYSpacing is no number"),
    (METADATA, "1,-1024", "inf,-1024", "valid_1_a_1.nii.gz: slope is no number"),
    (METADATA, "-1024", "none", "valid_1_a_1.nii.gz: intercept is no number"),
    (LABELS, "1,0", "2,0", "valid_1_a_1.nii.gz: Arterial wall calcification is none"),
])
def test_what_is_wrong_in_the_tables_of_ct_rate_is_named(tmp_path, table, old, new, said):
    ct_rate_files(tmp_path, 1)
    path = tmp_path / table
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=said):
        data.ct_rate_manifest(tmp_path, "valid")


def test_what_is_wrong_in_the_tables_of_rad_chestct_is_named_by_its_row(tmp_path):
    path = tmp_path / "imgtest_Abnormality_and_Location_Labels.csv"
    data.write_csv(path, [["NoteAcc_DEID", "nodule*lung"], ["a", 1], [SECRET, "yes"]])
    with pytest.raises(ValueError, match="Labels.csv, row 3: nodule.lung is none of") as caught:
        data.rad_chestct_manifest(tmp_path, "test")
    assert SECRET not in str(caught.value)


def test_rad_chestct_locations_fold_to_findings_and_findings_to_classes(tmp_path):
    numpy.savez(tmp_path / "tst00001.npz", ct=hu_volume())
    columns = {
        "nodule*right_upper": 0, "nodulegr1cm*lung": 1, "catheter_or_port*heart": 0,
        "stent*heart": 1, "calcification*aorta": 0, "hernia*other_location": 1,
        "bandlike_or_linear*lung": 1, "fracture*rib": 0,
    }
    path = tmp_path / "imgtest_Abnormality_and_Location_Labels.csv"
    data.write_csv(path, [["NoteAcc_DEID", *columns], ["tst00001", *columns.values()]])
    (row,) = data.rad_chestct_manifest(tmp_path, "test")
    assert row.labels == {
        "Lung nodule": 1, "Medical material": 1, "Calcification": 0, "Hiatal hernia": 1,
        "Bandlike or linear": 1, "Fracture": 0,
    }
    assert row.read().spacing == pytest.approx((0.8, 0.8, 0.8))
    assert len(data.BENCHMARKS["rad-chestct"]) == 16


def test_csv_cells_that_a_line_lacks_are_empty_and_surplus_empty_ones_do_no_harm(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1\n1,2,,\n")
    short, long = data.read_csv(path, "a")
    assert short == {"a": "1", "b": ""}
    assert long == {"a": "1", "b": "2"}
    data.write_csv(path, [["a", "b"], [None, 0.1]])
    with open(path, newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["", "0.1"]]


# ---- check, prepare, cache

def chest(shape=(60, 50, 50), spacing=(6.0, 6.0, 6.0)):
    """A block of soft tissue with air in it, and its affine."""
    hu = numpy.full(shape, 40, numpy.int16)
    hu[10:30, 10:40] = -850
    x, y, z = spacing
    return hu + numpy.arange(shape[2], dtype=numpy.int16), numpy.diag([-x, -y, z, 1])


def test_check_lists_every_kind_of_problem_and_passes_a_good_scan(tmp_path, capsys):
    hu, affine = chest()
    save_nifti(tmp_path / "good.nii.gz", hu, affine)
    save_nifti(tmp_path / "raw.nii.gz", (hu + 1024).astype(numpy.int16), affine)
    save_nifti(tmp_path / "twice.nii.gz", (hu - 1024).astype(numpy.int16), affine)
    save_nifti(tmp_path / "small.nii.gz", hu, numpy.diag([-0.1, -1, 1, 1]))
    path = manifest_of(tmp_path, ["good", "raw", "twice", "small", "absent"])
    assert data.main(["check", str(path)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    said = {line.split()[0]: line for line in lines}
    assert set(said) == {"raw", "twice", "small", "absent"}
    assert last == "5 volumes, 4 with a problem"
    assert "not applied" in said["raw"]
    assert "applied twice" in said["twice"]
    assert "spacing" in said["small"]
    assert "no such file" in said["absent"]


def test_what_looks_wrong_in_a_volume_is_said_of_a_single_scan_too(tmp_path):
    hu, affine = chest()
    volume = data.read_volume(save_nifti(tmp_path / "a.nii", hu, affine))
    assert data.volume_problems(volume) == []
    wrapped = hu.astype(numpy.uint16)
    (text,) = data.volume_problems(data.Volume(wrapped, volume.spacing, volume.affine))
    assert "stored as unsigned" in text and "40 to 65535" not in text
    head = numpy.where(hu < -500, 40, hu)
    head[:5] = -1000
    (text,) = data.volume_problems(data.Volume(head, volume.spacing, volume.affine))
    assert "no lung in view?" in text
    (text, *_) = data.volume_problems(data.Volume(hu, (0.6, 6, 6), volume.affine))
    assert "spacing missing or wrong?" in text


def test_check_and_prepare_go_on_after_any_bad_file(tmp_path, capsys):
    save_nifti(tmp_path / "good.nii", *chest())
    names = ["good.nii"]
    for name, (content, _) in promising_files().items():
        names.append(write(tmp_path / name, content).name)
    names += ["a" * 300, ".", "absent.npz", "a scan.dcm"]
    path = write_manifest(tmp_path, [f"n{i},{name}" for i, name in enumerate(names)])
    assert data.main(["check", str(path)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{len(names)} volumes, {len(names) - 1} with a problem"
    data.main(f"prepare {path} --out {tmp_path}/cache --shape 8 8 8".split())
    skipped = data.read_csv(tmp_path / "cache" / "skipped.csv", "name", "reason")
    assert [line["name"] for line in skipped] == [f"n{i}" for i in range(1, len(names))]


def test_prepare_skips_lists_and_counts_bad_volumes_and_replaces_none(tmp_path, capsys):
    bad_files(tmp_path)
    names = ["good", "truncated", "text", "flat", "time", "constant", "nan", "absent"]
    rows = data.read_manifest(manifest_of(tmp_path, names))
    cache = data.Cache(tmp_path / "cache", (2, 2, 2), (8, 8, 8))
    ready, skipped = data.prepare(rows, cache)
    assert [row.name for row in ready] == ["good"]
    assert [name for name, _ in skipped] == names[1:]
    listed = data.read_csv(tmp_path / "cache" / "skipped.csv", "name", "reason")
    assert [line["name"] for line in listed] == names[1:]
    assert all(line["reason"] for line in listed)
    assert len(cached(tmp_path)) == 1
    last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert last.startswith("7 volumes skipped, the first: ")  # below the progress, which has ended


def test_prepare_redoes_what_changed_and_nothing_else(tmp_path):
    for name in "ab":
        save_nifti(tmp_path / f"{name}.nii.gz", hu_volume())
    a, b = data.read_manifest(manifest_of(tmp_path, "ab"))
    cache = data.Cache(tmp_path / "cache", (2, 2, 2), (8, 8, 8))
    data.prepare([a, b], cache)
    made_a, made_b = cache.path(a).stat().st_mtime_ns, cache.path(b).stat().st_mtime_ns
    save_nifti(tmp_path / "b.nii.gz", hu_volume(seed=1))
    later = time.time() + 9
    os.utime(tmp_path / "b.nii.gz", (later, later))
    data.prepare([a, b], cache)
    assert cache.path(a).stat().st_mtime_ns == made_a
    assert cache.path(b).stat().st_mtime_ns != made_b
    corrected = data.Row("a", a.path, slope=1.0, intercept=-24.0)
    assert not cache.holds(corrected)


def test_a_cache_with_other_settings_is_refused(tmp_path):
    data.Cache(tmp_path / "cache", (2, 2, 2), (8, 8, 8))
    config = SimpleNamespace(spacing=(2, 2, 2), shape=(8, 8, 8), hu_range=(-1000, 1000))
    assert data.Cache.for_config(tmp_path / "cache", config).settings["shape_out"] == [8, 8, 8]
    with pytest.raises(ValueError, match="name another folder"):
        data.Cache(tmp_path / "cache", (3, 3, 3), (8, 8, 8))


def test_shards_share_the_work_without_overlap_and_each_lists_what_it_skipped(tmp_path):
    names = [f"v{i}" for i in range(5)]
    for name in names[:3]:
        save_nifti(tmp_path / f"{name}.nii.gz", hu_volume())
    path = manifest_of(tmp_path, names)
    for shard, count in (("1/2", 2), ("2/2", 3)):
        command = f"prepare {path} --out {tmp_path}/cache --shape 8 8 8 --shard {shard}"
        data.main(command.split())
        assert len(cached(tmp_path)) == count
    for shard, name in (("1of2", "v4"), ("2of2", "v3")):
        (line,) = data.read_csv(tmp_path / "cache" / f"skipped.{shard}.csv", "name", "reason")
        assert line["name"] == name and "no such file" in line["reason"]


def test_the_list_of_the_skipped_holds_what_still_is_skipped_and_nothing_else(tmp_path):
    a, b = data.read_manifest(manifest_of(tmp_path, "ab"))
    cache = data.Cache(tmp_path / "cache", (2, 2, 2), (8, 8, 8))

    def listed():
        return [line["name"] for line in data.read_csv(cache.folder / "skipped.csv")]

    data.prepare([a], cache)
    data.prepare([b], cache)
    assert listed() == ["a", "b"]
    save_nifti(a.path, hu_volume())
    assert data.prepare([a, b], cache)[0] == [a]
    assert listed() == ["b"]


def test_manifests_that_name_different_scans_alike_can_share_a_cache(tmp_path):
    caches, volumes = data.Cache(tmp_path / "cache", (1, 1, 1), (8, 8, 8)), []
    for seed, folder in enumerate([tmp_path / "one", tmp_path / "two"]):
        folder.mkdir()
        save_nifti(folder / "case1.nii.gz", hu_volume((8, 8, 8), seed), numpy.diag([-1, -1, 1, 1]))
        ready, _ = data.prepare(data.read_manifest(manifest_of(folder, ["case1"])), caches)
        volumes.append(caches.read(ready[0]))
    assert numpy.array_equal(volumes[0], hu_volume((8, 8, 8), 0))
    assert numpy.array_equal(volumes[1], hu_volume((8, 8, 8), 1))


def test_a_volume_for_which_the_memory_is_too_small_is_skipped(tmp_path, monkeypatch):
    def fail(*arguments, **settings):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    save_nifti(tmp_path / "a.nii.gz", hu_volume())
    monkeypatch.setattr(data, "preprocess", fail)
    (row,) = data.read_manifest(manifest_of(tmp_path, "a"))
    assert "too large for the memory" in data.Cache(tmp_path / "cache").add(row)


def test_names_that_differ_after_their_dots_have_files_of_their_own(tmp_path):
    rows = [data.Row(f"1.2.3.{i}", tmp_path / "a.nii") for i in range(9)]
    cache = data.Cache(tmp_path / "cache")
    assert len({cache.path(row) for row in rows}) == 9
    assert all(cache.path(row).name.startswith(f"{row.name}.") for row in rows)


def test_a_cache_can_be_moved_with_its_manifest_and_used_without_the_scans(tmp_path, monkeypatch):
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    save_nifti(before / "a.nii.gz", hu_volume())
    rows = data.read_manifest(manifest_of(before, "a"))
    data.prepare(rows, data.Cache(before / "cache", (2, 2, 2), (8, 8, 8)))
    before.rename(after)
    (after / "a.nii.gz").unlink()
    monkeypatch.chdir(after)
    for manifest, cache in ((after / "manifest.csv", after / "cache"), ("manifest.csv", "cache")):
        cache = data.Cache(cache, (2, 2, 2), (8, 8, 8))
        assert all(map(cache.holds, data.read_manifest(manifest)))


def test_prepare_sweeps_what_killed_runs_left_and_nothing_else(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder = tmp_path / "cache"
    folder.mkdir()
    left = [folder / f".a.npy.{gone.pid}.tmp", folder / f".skipped.csv.{gone.pid}.tmp"]
    stay = [folder / f".a.npy.{os.getpid()}.tmp", folder / ".a.npy.tmp", folder / "a.1.tmp",
            folder / f".a.{10**30}.tmp"]
    for file in left + stay:
        file.touch()
    save_nifti(tmp_path / "a.nii.gz", hu_volume())
    prepare = f"prepare {manifest_of(tmp_path, 'a')} --out {folder} --shape 8 8 8".split()
    data.main([*prepare, "--shard", "1/2"])  # the others may be written on another machine now
    assert all(file.exists() for file in left)
    data.main(prepare)
    assert not any(file.exists() for file in left) and all(file.exists() for file in stay)


@pytest.mark.parametrize("option", [
    "--shape 0 0 0", "--shape 8 8 -8", "--shape 99999 99999 9", "--shape 8 8 x",
    "--hu-range 1000 -1000", "--hu-range 0 0", "--hu-range -40000 0", "--hu-range 0 40000",
    "--spacing 0 1 1", "--spacing nan 1 1", "--spacing 1 nan 1", "--spacing inf 1 1",
    "--spacing 1 1 -1", "--spacing 1 1 1e-9", "--workers 0", "--workers -1", "--workers 99999",
    "--workers 1.5", "--shard 0/4",
])
def test_impossible_settings_are_refused_before_anything_is_written(tmp_path, capsys, option):
    save_nifti(tmp_path / "a.nii.gz", hu_volume())
    path = manifest_of(tmp_path, "a")
    command = ["prepare", str(path), "--out", str(tmp_path / "cache"), *option.split()]
    try:
        status = data.run_command(lambda: data.main(command))
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and not (tmp_path / "cache").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and len(last) < 300


@pytest.mark.parametrize("shard", ["0/2", "3/2", "x", "1/2/3"])
def test_an_impossible_shard_is_refused(shard, capsys):
    with pytest.raises(SystemExit):
        data.main(["prepare", "manifest.csv", "--out", "cache", "--shard", shard])
    assert f"'{shard}' is no shard; 2/8 is the second of eight" in capsys.readouterr().err


def test_a_killed_prepare_is_finished_by_the_same_command(tmp_path):
    for i in range(40):
        save_nifti(tmp_path / f"v{i}.nii", hu_volume((64, 64, 64), i))
    path = write_manifest(tmp_path, [f"v{i},v{i}.nii" for i in range(40)])
    options = f"prepare {path} --out {tmp_path}/cache --shape 96 96 96 --workers 1"
    command = [sys.executable, data.__file__, *options.split()]
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, stderr=null, stdout=null)
    while len(cached(tmp_path)) < 3:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(cached(tmp_path)) < 40
    for file in cached(tmp_path):
        assert numpy.load(file, allow_pickle=False).shape == (96, 96, 96)
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert len(cached(tmp_path)) == 40


# ---- mutations

def mutations(content, count, region, seed):
    """Mutants of a file: bytes changed, most of them in its first `region`, cut, doubled, moved."""
    random = numpy.random.default_rng(seed)
    for i in range(count):
        mutant = bytearray(content)
        where = random.integers(region if i % 4 else len(content), size=random.integers(1, 5))
        values = random.choice([0, 1, 0x7F, 0x80, 0xFF, *random.integers(0, 256, 5)], len(where))
        for at, value in zip(where, values):
            mutant[at] = value
        if i % 5 == 0:
            at = random.integers(len(content))
            mutant[at:] = random.choice([b"", content[:at], b"\0" * 99, content[at // 2:]])
        yield bytes(mutant)


@pytest.mark.parametrize("name", ["a.nii", "b.nii", "a.nii.gz", "a.npz", "b.npz"])
def test_a_damaged_volume_is_a_volume_or_one_line(tmp_path, capfd, peak, name):
    hu = hu_volume((8, 7, 6))
    content = {
        "a.nii": nifti_bytes(hu), "b.nii": nifti_bytes(hu, kind=nibabel.Nifti2Image),
        "a.nii.gz": gzip.compress(nifti_bytes(hu), 0), "a.npz": archive(hu.shape, hu.tobytes()),
    }.get(name)
    if content is None:
        numpy.savez(tmp_path / name, ct=hu)
        content = (tmp_path / name).read_bytes()
    path, refused = tmp_path / name, 0
    for mutant in mutations(content, 300, min(540, len(content)), seed=0):
        path.write_bytes(mutant)
        try:
            volume = data.read_volume(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and str(error).isprintable()
            continue
        assert volume.hu.ndim == 3 and numpy.isfinite(volume.hu).all()
        data.volume_problems(volume)
        data.preprocess(volume.hu, volume.spacing, (3, 3, 3), (8, 8, 8))
    assert refused > 30 and peak() < 2**26
    assert capfd.readouterr() == ("", "")


def test_a_damaged_manifest_is_a_manifest_or_one_line_that_quotes_nothing(tmp_path):
    header = "name,path,split,report,slope,spacing_x,label:Cyst\n"
    lines = [f'n{i},n{i}.nii,train,"{SECRET}, wide",1,0.7,{i % 2}\n' for i in range(6)]
    content, refused = (header + "".join(lines)).encode(), 0
    path = tmp_path / "m.csv"
    for mutant in mutations(content, 600, len(content), seed=0):
        path.write_bytes(mutant)
        try:
            data.read_manifest(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and str(error).isprintable()
            assert "left lobe" not in str(error)
    assert refused > 100


# ---- texts and training pairs

def test_a_cut_summaries_file_is_said_and_failed_summaries_are_left_out(tmp_path):
    path = tmp_path / "summaries.jsonl"
    good = json.dumps({"report_sha256": "a", "summary": "There is x."})
    failed = json.dumps({"report_sha256": "b", "summary": None})
    path.write_text(f"{good}\n{failed}\n")
    assert data.read_summaries(path) == {"a": "There is x."}
    assert list(data.read_records(path)) == ["a", "b"]
    path.write_text(f"{good}\n{failed}\n" + '{"report_sha')
    with pytest.raises(ValueError, match="line 3"):
        data.read_summaries(path)


def test_a_row_is_paired_with_its_reports_summary_or_else_with_the_report():
    row = data.Row("a", Path("a.nii"), report="A report.")
    assert data.text_of(row, {}) == "A report."
    assert data.text_of(row, {data.report_sha256("A report."): "A summary."}) == "A summary."


def training_pairs(tmp_path, reports, **options):
    rows = []
    for i, report in enumerate(reports):
        path = tmp_path / f"v{i}.nii.gz"
        save_nifti(path, hu_volume((12, 12, 12), i), numpy.diag([-1, -1, 1, 1]))
        rows.append(data.Row(f"v{i}", path, report=report))
    cache = data.Cache(tmp_path / "cache", (1, 1, 1), (12, 12, 12))
    data.prepare(rows, cache)
    return rows, cache, data.ReportVolumes(rows, cache, **options)


def test_one_item_per_distinct_report_draws_any_of_its_volumes(tmp_path):
    reports = ["Report one.", "Report two.", "Report one.", ""]
    rows, cache, pairs = training_pairs(tmp_path, reports)
    assert len(pairs) == 2
    drawn = {tuple(pairs[epoch, 0][0].flatten()[:5].tolist()) for epoch in range(20)}
    assert drawn == {tuple(cache.read(rows[i]).flatten()[:5].tolist()) for i in (0, 2)}


def test_a_text_is_every_sentence_of_the_report_in_random_order(tmp_path):
    report = " ".join(f"Sentence {i} of 1.{i} cm." for i in range(8))
    _, _, pairs = training_pairs(tmp_path, [report])
    texts = [pairs[epoch, 0][1] for epoch in range(60)]
    assert len(set(texts)) > 40
    for text in texts:
        assert sorted(data.sentences(text)) == data.sentences(report)


def test_the_authors_draw_as_many_sentences_as_there_are_up_to_five(tmp_path):
    report = "1. Heart is large. Stable. No 3.5 cm mass. A b. C d. E f. G h. There is fluid"
    rows, cache, pairs = training_pairs(tmp_path, [report, "One. Two words."], drawing="authors")
    parts = ["Heart is large.", "No.", "5 cm mass.", "A b.", "C d.", "E f.", "G h."]
    whole = {part for part in [*parts, "There is fluid."] if part != "No."}  # a word is none
    seen = set()
    for epoch in range(40):
        drawn = set(re.findall(r"[^.]+\.", pairs[epoch, 0][1]))
        drawn = {part.strip() for part in drawn}
        assert len(drawn) == 5 and drawn <= whole
        seen |= drawn
        assert pairs[epoch, 1][1] == "Two words."
    assert seen == whole


def test_texts_are_drawn_from_the_summary_where_there_is_one(tmp_path):
    summaries = {data.report_sha256("Short one."): "There is emphysema. There is lung nodule."}
    _, _, pairs = training_pairs(tmp_path, ["Short one."], summaries=summaries)
    assert {pairs[epoch, 0][1] for epoch in range(60)} == {
        "There is emphysema. There is lung nodule.",
        "There is lung nodule. There is emphysema.",
    }


def test_crops_vary_with_the_epoch_and_repeat_with_the_key(tmp_path):
    _, cache, pairs = training_pairs(tmp_path, ["A report."], crop=(8, 8, 8))
    (row,), _ = pairs.items[0]
    crops = [pairs[epoch, 0][0] for epoch in range(8)]
    assert all(crop.shape == (1, 8, 8, 8) and crop.dtype == torch.int16 for crop in crops)
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) > 4
    assert torch.equal(pairs[3, 0][0], crops[3])
    every_crop = torch.from_numpy(numpy.array(cache.read(row)))
    for axis in range(3):
        every_crop = every_crop.unfold(axis, 8, 1)
    same = (every_crop == crops[0][0]).flatten(3).all(3)  # (5, 5, 5) places to start at
    assert same.sum() == 1


def test_evaluation_volumes_are_whole(tmp_path):
    rows, cache, _ = training_pairs(tmp_path, ["A report."], crop=(8, 8, 8))
    assert data.Volumes(rows, cache)[0].shape == (1, 12, 12, 12)


def test_without_a_report_there_is_nothing_to_train_on(tmp_path):
    with pytest.raises(ValueError, match="no row has a report"):
        training_pairs(tmp_path, ["", " . "])


# ---- command line

@pytest.mark.parametrize("command", [
    "check absent.csv",
    "manifest --dataset ct-rate --root absent --split valid --out m.csv",
    "manifest --dataset rad-chestct --root absent --split valid --out m.csv",
    "prepare absent.csv --out cache",
])
def test_bad_input_is_one_line_and_status_2(tmp_path, command):
    arguments = [sys.executable, Path(data.__file__).resolve(), *command.split()]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("data.py: error: absent")
