"""Patch mask files: every kind of file gives the same patch mask, and invalid files are rejected."""

import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from unmask.data.files.patch_mask_file import hidden_share, read_masks
from unmask.errors import UserError

HIDDEN = np.array([[1, 1, 0], [0, 1, 0]], bool)
PATTERN = ("##.", ".#.")


def test_text_npy_and_png_give_the_same_patch_mask(tmp_path):
    (tmp_path / "a.txt").write_text("##.\n.#.\n")
    np.save(tmp_path / "a.npy", HIDDEN)
    Image.fromarray(np.where(HIDDEN, 0, 255).astype(np.uint8)).save(tmp_path / "a.png")
    for name in ("a.txt", "a.npy", "a.png"):
        assert read_masks(tmp_path / name) == (PATTERN,)
    assert hidden_share((PATTERN,)) == 0.5


def test_several_patch_masks_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("##.\r\n.#.\r\n\r\n...\r\n###\r\n")
    np.save(tmp_path / "a.npy", np.stack([HIDDEN, [[0, 0, 0], [1, 1, 1]]]).astype(float))
    assert read_masks(tmp_path / "a.txt") == read_masks(tmp_path / "a.npy") == (PATTERN, ("...", "###"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"##.\n\n.#x\n", r"has 'x' in line 3; expected rows of '#'"),
        ("a.txt", b"#.\r\n.\t#", r"has '\\t' in line 2; expected rows"),
        ("a.txt", b" \n", "is empty; expected rows of '#'"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.npy", b"not an array", "cannot be read"),
        ("a.npy", b"\x93NUMPY\x01\x00\x14\x00{'descr': '|u1', ((((\n", "cannot be read"),
        ("a.png", b"not a picture", "cannot be read"),
    ],
)
def test_invalid_patch_mask_file_is_rejected(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_masks(tmp_path / name)


def test_arrays_of_wrong_shape_or_dtype_and_missing_files_are_rejected(tmp_path):
    for array in (np.zeros(3), np.zeros((1, 1, 1, 1)), np.zeros((0, 2, 2)), np.array([["a"]])):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(UserError, match="of shape"):
            read_masks(tmp_path / "a.npy")
    with pytest.raises(UserError, match="does not exist"):
        read_masks(tmp_path / "none.txt")


def array_header(shape: str, dtype: str = "'<f4'") -> bytes:
    """Return the header of a .npy file without values."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def png_header(width: int, height: int) -> bytes:
    """Return a PNG with only a few rows of its declared size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("huge.npy", array_header("(100000, 100000)")), ("endless.npy", array_header("(1000000000000,)")),
        ("code.npy", array_header("(3,)", "'|O'")), ("negative.npy", array_header("(-3, 4)")),
        ("zip.npy", b"PK\x03\x04abc"), ("pickle.npy", b"\x80\x04K\x01."), ("cut.png", png_header(100, 100)),
        ("bomb.png", png_header(60_000, 60_000)), ("wide.png", png_header(2**31 - 1, 1)), ("text.txt", b"\xff\xfe"),
        ("long.txt", b"#" * ((1 << 24) + 1)),
    ],
)  # fmt: skip
def test_damaged_patch_mask_file_is_rejected(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about the large image
        with pytest.raises(UserError, match=re.escape(name)):
            read_masks(tmp_path / name)
