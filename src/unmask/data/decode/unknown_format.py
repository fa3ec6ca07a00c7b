"""Name the format of a file that cannot be decoded, from its first bytes."""

from __future__ import annotations

from unmask.data.decode.tiff_pages import TIFF_STARTS

FOREIGN = {
    b"%!PS": "PostScript",
    b"%PDF": "PDF",
    b"8BPS": "Photoshop",
    b"\0\0\1\0": "an icon",
    b"icns": "an icon",
    b"\0\0\0\x0cjP": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL": "JPEG XL",
    b"\x76\x2f\x31\x01": "OpenEXR",
    b"SIMPLE  =": "FITS",
    b"\x89HDF": "HDF5",
}


def unknown_format(data: bytes) -> tuple[str, str]:
    """Return the code and detail of the BadImage for a file that no decoder accepts."""
    for start, name in FOREIGN.items():
        if data.startswith(start):
            return "FORMAT_NOT_ALLOWED", f"{name}; convert it to PNG"
    if data[4:8] == b"ftyp":
        return "FORMAT_NOT_ALLOWED", "HEIC or AVIF; convert it to JPEG or PNG"
    if data[128:132] == b"DICM":
        return "FORMAT_NOT_ALLOWED", "DICOM; convert it to 16-bit PNG or to .npy"
    text = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<svg", b"<?xml")) and b"<svg" in text:
        return "FORMAT_NOT_ALLOWED", "SVG; render it to PNG"
    if text.startswith((b"<!doctype html", b"<html")):
        return "NOT_IMAGE", "the file contains a web page, perhaps from a failed download; download it again"
    if text.startswith(b"version https://git-lfs"):
        return "NOT_IMAGE", "the file is a Git LFS pointer; fetch the files with git lfs pull"
    for start, name in {b"GIF8": "GIF", b"BM": "BMP", b"RIFF": "WebP", **dict.fromkeys(TIFF_STARTS, "TIFF")}.items():
        if data.startswith(start) and (start != b"RIFF" or data[8:12] == b"WEBP"):
            return "HEADER_BAD", f"a {name} with a damaged header, or of an unsupported kind"
    return "NOT_IMAGE", f"the file is not an image of a known format (first bytes {data[:8]!r})"
