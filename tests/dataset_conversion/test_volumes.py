"""Reading volumes: files that are cut off are told from whole ones, and messages are short and name a remedy."""

from __future__ import annotations

import gzip
import sys
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.dataset_conversion import volumes
from lgssl_nnunet.dataset_conversion.volumes import (
    count_not_finite_if_whole,
    last_line,
    read_h5,
    read_volume,
    require_whole,
    require_whole_nifti,
)
from lgssl_nnunet.errors import DatasetError, MissingDependencyError

LENGTH = 352 + 20**3


@pytest.fixture
def whole(tmp_path):
    """Write a segmentation of noise, which hardly shrinks when it is compressed, and return its content."""

    def write(name: str, compressed: bool = False) -> bytes:
        noise = np.random.default_rng(0).integers(0, 255, (20, 20, 20)).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(noise), str(tmp_path / name), compressed)
        return (tmp_path / name).read_bytes()

    return write


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd"])
def test_whole_files_pass(whole, tmp_path, name):
    whole(name)
    require_whole_nifti(tmp_path / name)


@pytest.mark.parametrize("lost", [1, 4, 8, 9])
def test_a_compressed_file_that_lacks_its_last_bytes_is_refused(whole, tmp_path, lost):
    file = tmp_path / "a.nii.gz"
    file.write_bytes(whole("a.nii.gz")[:-lost])
    with pytest.raises(OSError, match="truncated"):
        require_whole_nifti(file)


def test_what_is_left_of_a_file_is_counted_in_uncompressed_bytes(whole, tmp_path):
    content = whole("a.nii.gz")
    (tmp_path / "a.nii.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=rf"truncated: \d+ of {LENGTH} uncompressed bytes are there") as refusal:
        require_whole_nifti(tmp_path / "a.nii.gz")
    assert 0.3 * LENGTH < int(str(refusal.value).split()[1]) < 0.7 * LENGTH
    (tmp_path / "a.nii").write_bytes(whole("a.nii")[:5000])
    with pytest.raises(OSError, match=f"truncated: 5000 of {LENGTH} bytes are there"):
        require_whole_nifti(tmp_path / "a.nii")


@pytest.mark.parametrize(
    "content",
    [b"", b"nothing", gzip.compress(b"nothing"), gzip.compress(bytes(9999))[:200]],
    ids=["empty", "no gzip", "gzip of no image", "gzip that is cut off"],  # gzip writes the time into its header
)
def test_files_without_a_header_are_refused(tmp_path, content):
    for name in ("a.nii", "a.nii.gz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError, match=name):
            require_whole_nifti(tmp_path / name)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ('Exception thrown: /src/x.cxx:99:\nsitk::ERROR: Unable to read "a b.nii"', 'Unable to read "a b.nii"'),
        ("x.cxx:9:\nITK ERROR: MetaImageIO(0x5f): Cannot read: a.mha\nReason: No such file", "Cannot read: a.mha"),
        ("/src/x.cxx:9:\n[nrrd] nrrdRead: trouble\n[nrrd] _read: got 5 bytes\n", "got 5 bytes"),
        ("Expected 9 bytes, got 5 bytes\n - could the file be damaged?", "Expected 9 bytes, got 5 bytes"),
        (f"This is it: {'/long-name' * 30}", "This is it: ..."),
        ("", "OSError"),
    ],
)
def test_of_a_long_message_the_telling_line_is_kept(message, line):
    assert last_line(OSError(message)) == line


def test_without_h5py_the_extra_is_named_as_the_readme_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingDependencyError, match=r'pip install -c constraints.txt -e "\.\[h5\]"'):
        read_h5(tmp_path / "a.h5")


def test_a_changed_byte_is_found_by_the_checksum(whole, tmp_path):
    content = bytearray(whole("a.nii.gz"))
    content[-5] ^= 1  # in the checksum: the voxels unpack, and the length is right
    file = tmp_path / "a.nii.gz"
    file.write_bytes(content)
    require_whole_nifti(file)
    with pytest.raises(OSError, match="CRC check failed"):
        require_whole(file)


@pytest.mark.parametrize("check", [require_whole, count_not_finite_if_whole])
@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_a_changed_bit_in_compressed_voxels_is_found_in_every_format_with_a_checksum(whole, tmp_path, name, check):
    content, file = whole(name, compressed=True), tmp_path / name
    check(file)
    for place in range(len(content) // 3, len(content), 500):
        damaged = bytearray(content)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        with pytest.raises((OSError, EOFError, zlib.error)):
            check(file)


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_compressed_voxels_that_end_too_early_are_found(whole, tmp_path, name):
    (tmp_path / name).write_bytes(whole(name, compressed=True)[:-9])
    with pytest.raises(EOFError):
        require_whole(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "compressed", "old", "new"),
    [
        ("a.mha", False, b"", b""),
        ("a.nrrd", False, b"", b""),
        ("a.mha", True, b"= LOCAL", b"= a.zraw"),
        ("a.nrrd", True, b"encoding: gzip", b"encoding: gzip\ndata file: a.raw.gz"),
    ],
)
def test_voxels_without_a_checksum_or_in_another_file_are_left_to_the_reader(
    whole, tmp_path, name, compressed, old, new
):
    content = bytearray(whole(name, compressed).replace(old, new, 1))
    content[-2000] ^= 4
    (tmp_path / name).write_bytes(content)
    require_whole(tmp_path / name)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("type_", [np.float32, np.float64])
def test_nan_and_infinite_voxels_are_counted_as_stored(tmp_path, name, type_, monkeypatch):
    monkeypatch.setattr(volumes, "_GZIP_CHUNK", 4096)
    array = np.random.default_rng(0).normal(size=(20, 30, 25)).astype(type_)
    array[0, 0, 0], array[10, 10, :3], array[-1, -1, -1] = np.nan, np.inf, -np.inf
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / name))
    assert count_not_finite_if_whole(tmp_path / name) == 5


def test_damage_is_found_while_voxels_are_counted(tmp_path):
    file = tmp_path / "a.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((20, 30, 25), np.float32)), str(file))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match="CRC check failed"):
        count_not_finite_if_whole(file)


def test_a_small_file_does_not_pass_for_one_that_is_4_gb_larger(tmp_path):
    # the length at the end of a gzip file is the same
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((1024, 2048, 2048))
    header["vox_offset"] = 352
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(header.binaryblock.replace(b"ni1", b"n+1") + bytes(4)))
    with pytest.raises(OSError, match="truncated: 352 of 4294967648 uncompressed bytes are there"):
        require_whole_nifti(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("offset", [np.nan, np.inf])
def test_voxels_that_begin_nowhere_are_a_fault_of_the_file(offset, whole, tmp_path):
    content = bytearray(whole("a.nii"))
    content[108:112] = np.float32(offset).tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(DatasetError, match="cannot be read"):
        read_volume(tmp_path / "a.nii")


def test_damage_inside_a_compressed_volume_is_a_sentence(whole, tmp_path):
    whole("a.nii.gz")
    data = bytearray((tmp_path / "a.nii.gz").read_bytes())
    data[2000:2100] = b"\xff" * 100
    (tmp_path / "a.nii.gz").write_bytes(data)
    with pytest.raises(DatasetError, match="cannot be read"):
        read_volume(tmp_path / "a.nii.gz")


def test_a_volume_whose_axes_are_no_numbers_is_refused(whole, tmp_path):
    content = bytearray(whole("a.nii"))
    content[300:304] = np.float32(np.nan).tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(DatasetError, match=r"has direction \[.*nan.*correct its header"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize("length", [0, -20])
def test_an_axis_without_voxels_is_a_fault_of_the_file(length, whole, tmp_path):
    content = bytearray(whole("a.nii"))
    content[44:46] = np.int16(length).tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(DatasetError, match=r"cannot be read \(the header gives \[20, .*, 20\] voxels along the axes"):
        read_volume(tmp_path / "a.nii")
