"""Read JPEG with simplejpeg, at a reduced scale if that is large enough."""

from __future__ import annotations

import struct

import numpy as np
import simplejpeg

from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.exif import exif_orientation
from unmask.data.decode.file_format import FileFormat
from unmask.data.decode.image_header import Header, original_size
from unmask.data.decode.jpeg_repair import NEXT_MARKER, repaired
from unmask.data.decode.reading import Reading


def read_header(data: bytes, reading: Reading) -> Header:
    """Parse the markers up to the frame header, which takes microseconds; opening a decoder takes a hundred."""
    place, orientation, end, note = 2, 1, len(data), b""
    while place + 4 <= end:
        if data[place] != 0xFF or data[place + 1] == 0:
            junk = NEXT_MARKER.search(data, place)
            if place == 2 or junk is None:
                raise BadImage("HEADER_BAD", f"no JPEG marker at byte {place}")
            place = junk.start()
            continue
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker == 0xD8 or marker == 0x01 or 0xD0 <= marker <= 0xD7:
            place += 2
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if place + 10 > end:
                break
            height, width = struct.unpack(">HH", data[place + 5 : place + 9])
            components = data[place + 9]
            if data[place + 4] != 8:
                raise BadImage(
                    "UNSUPPORTED_MODE", f"a JPEG with {data[place + 4]} bits per sample; convert it to PNG or TIFF"
                )
            if not height or not width or components not in (1, 3, 4):
                raise BadImage("HEADER_BAD", f"a JPEG of {height} x {width} pixels with {components} components")
            if orientation >= 5:
                height, width = width, height
            channels, original = 1 if components == 1 else 3, original_size(note, (height, width)) if note else None
            memory, scans = channels * height * width, 1
            if (
                marker == 0xC2 and place + 10 + 3 * components <= end
            ):  # progressive: the decoder stores all coefficients
                sampling = data[place + 11 : place + 10 + 3 * components : 3]
                factors = [(factor >> 4 or 1, factor & 15 or 1) for factor in sampling]
                most = max(across for across, _ in factors) * max(down for _, down in factors)
                memory += 2 * height * width * sum(across * down for across, down in factors) // most
                scans = data.count(b"\xff\xda", place)
            return Header(
                height=height,
                width=width,
                channels=channels,
                dtype="uint8",
                format="JPEG",
                orientation=orientation,
                packed_from=original,
                memory=memory,
                scans=scans,
            )
        if marker in (0xD9, 0xDA):
            raise BadImage("HEADER_BAD", "a JPEG without a frame header")
        if marker == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0":
            orientation = exif_orientation(data[place + 10 : place + 2 + length])
        elif marker == 0xFE and data[place + 4 : place + 11] == b"unmask\0":
            note = data[place + 4 : place + 2 + length]
        place += 2 + length
    raise BadImage("TRUNCATED", "the JPEG ends before its frame header")


def decode(data: bytes, found: Header, at_least: tuple[int, int] | None, tolerated: list[str] | None) -> np.ndarray:
    height, width = (found.height, found.width) if found.orientation < 5 else (found.width, found.height)
    if at_least is not None:
        wanted = at_least if found.orientation < 5 else at_least[::-1]
        # Restrict the scale to powers of two: the decoder would also use 3/8, 5/8 and 3/4, which take longer.
        for part in (8, 4, 2):
            if -(-height // part) >= wanted[0] and -(-width // part) >= wanted[1]:
                height, width = -(-height // part), -(-width // part)
                break
    colours = "GRAY" if found.channels == 1 else "RGB"
    try:
        return simplejpeg.decode_jpeg(data, colours, min_height=height, min_width=width, min_factor=1, strict=True)
    except ValueError as error:
        text = str(error)

    def decode_small(candidate: bytes) -> object:
        return simplejpeg.decode_jpeg(candidate, colours, min_height=1, min_width=1, min_factor=1, strict=True)

    repair = repaired(data, decode_small)
    if repair is None:
        code = "TRUNCATED" if "premature end of jpeg" in text.lower() else "CORRUPT"
        raise BadImage(code, f"JPEG: {text}")
    if tolerated is not None:
        tolerated += repair[1]
    return simplejpeg.decode_jpeg(repair[0], colours, min_height=height, min_width=width, min_factor=1, strict=True)


FORMAT = FileFormat(("JPEG",), (b"\xff\xd8",), read_header, decode=decode)
