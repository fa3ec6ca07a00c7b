"""Accept JPEGs that violate the format without loss of pixels: extra bytes between segments, or no end marker.

Some cameras and scanners write such JPEGs. A strict decoder rejects such JPEGs, and a lenient decoder also accepts
damaged ones. `repaired` removes the extra bytes and lets the strict decoder check the rest.

Leftover bytes before the end marker may also be a sign of damage: after a few wrong bits, the decoder often
resynchronises some blocks too early and leaves the last blocks of the image unread. Unread blocks are Huffman-coded up
to the last bit, which junk hardly ever is. Leftover bytes are therefore accepted as junk only if they are padding (one
value repeated), or if they do not parse as further blocks that end exactly where the data ends.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from unmask.data.decode.layout import TOLERATED

STANDALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
END = b"\xff\xd9"
EXTRANEOUS = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")
READ_AHEAD = 8  # Bytes in libjpeg's bit buffer, which its message does not count as extraneous.
MOST_LEFTOVER = 1 << 16  # Maximum number of leftover bytes to parse; a longer leftover must be padding.

Decode = Callable[[bytes], object]
"""A strict decoder that raises ValueError with libjpeg's message."""


@dataclass
class _Parts:
    """The parts of a JPEG.

    head: everything up to and including the header of the last scan.
    scan: entropy-coded data of the last scan.
    junk: number of bytes between segments that do not belong to a segment.
    ended: whether an end marker was found.
    """

    head: bytes
    scan: bytes
    junk: int
    ended: bool


def repaired(data: bytes, decode: Decode) -> tuple[bytes, tuple[str, ...]] | None:
    """Return the JPEG without junk and its faults from `layout.TOLERATED`, or None if damage cannot be ruled out.

    The returned JPEG has passed the strict decoder `decode`.
    """
    parts = _split(data)
    if parts is None:
        return None
    between, before_end, no_end = TOLERATED
    faults = (between,) * bool(parts.junk)
    at_end = before_end if parts.ended else no_end
    scan = _without_padding(parts.scan)
    if len(scan) < len(parts.scan) and not _complaint(candidate := parts.head + scan + END, decode):
        return candidate, (*faults, at_end)
    if not parts.ended:  # no padding in place of the end marker: the file is truncated
        return None
    complaint = _complaint(candidate := parts.head + parts.scan + END, decode)
    if not complaint:
        return (candidate, faults) if faults else None
    if (found := EXTRANEOUS.fullmatch(complaint)) is None:
        return None
    end = _end_of_image(parts, len(parts.scan) - int(found[1]), decode)
    if end is None or _is_coded(parts.head, parts.scan[end - 1 :]):
        return None
    return parts.head + parts.scan[:end] + END, (*faults, before_end)


def _split(data: bytes) -> _Parts | None:
    kept, junk, place = [data[:2]], 0, 2
    scan: bytes | None = None
    while True:
        start = place
        while place + 1 < len(data) and not (data[place] == 0xFF and data[place + 1] not in (0x00, 0xFF)):
            place += 1
        if place + 1 >= len(data) or data[place + 1] == 0xD9:
            if scan is None:
                return None
            junk += len(data[start:place].strip(b"\xff")) if place + 1 < len(data) else 0
            return _Parts(b"".join(kept), scan, junk, ended=place + 1 < len(data))
        junk += len(data[start:place].strip(b"\xff"))
        marker = data[place + 1]
        if marker in STANDALONE:
            place += 2
            continue
        if place + 4 > len(data) or marker == 0xD8:
            return None
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if end > len(data):
            return None
        if scan is not None:
            kept.append(scan)
            scan = None
        kept.append(data[place:end])
        place = end
        if marker == 0xDA:
            place = _end_of_scan(data, end)
            scan = data[end:place]


NEXT_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)


def _end_of_scan(data: bytes, start: int) -> int:
    found = NEXT_MARKER.search(data, start)
    return len(data) if found is None else found.start()


def _without_padding(scan: bytes) -> bytes:
    """Remove a repeated value from the end of entropy-coded data, but not a 0 that belongs to a stuffed 0xFF."""
    if len(scan) < 2 or scan[-1] != scan[-2]:
        return scan
    shorter = scan.rstrip(scan[-1:])
    return shorter + b"\0" if shorter.endswith(b"\xff") and scan[-1] == 0 else shorter


def _complaint(data: bytes, decode: Decode) -> str:
    """Return the error message of the strict decoder for these bytes, or "" if it accepts them."""
    try:
        decode(data)
    except ValueError as error:
        return str(error) or "unknown"
    return ""


def _end_of_image(parts: _Parts, at_most: int, decode: Decode) -> int | None:
    """Return the smallest number of bytes of the last scan that decode strictly to the whole image, or None."""

    def whole(end: int) -> bool:
        return _complaint(parts.head + parts.scan[:end] + END, decode) == ""

    low, high = max(0, at_most - READ_AHEAD), at_most
    if not whole(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if whole(middle) else (middle + 1, high)
    return high


@dataclass
class _Tables:
    """Huffman tables for parsing the blocks of a sequential JPEG.

    codes: for each table, (length, code) -> symbol.
    blocks: for each block of a minimum coded unit, the numbers of its DC and AC tables.
    """

    codes: dict[int, dict[tuple[int, int], int]] = field(default_factory=dict)
    blocks: list[tuple[int, int]] = field(default_factory=list)


def _is_coded(head: bytes, leftover: bytes) -> bool:
    """Return whether bytes after the end of an image are further Huffman-coded blocks up to the last bit.

    leftover: includes the last byte of the image, because the next block would begin inside it.
    """
    if len(set(leftover[1:])) <= 1:
        return False
    tables = _tables(head)
    if tables is None or len(leftover) > MOST_LEFTOVER:
        return True  # may be damage
    plain = leftover.replace(b"\xff\x00", b"\xff")
    bits = "".join(f"{byte:08b}" for byte in plain)
    seen: set[int] = set()
    return any(_parses_to_the_end(bits, start, tables, seen) for start in range(1, 9))


def _parses_to_the_end(bits: str, place: int, tables: _Tables, seen: set[int]) -> bool:
    """Return whether the bits from `place` on are complete units plus at most seven 1 bits (ITU T.81, F.1.2.3)."""
    while place not in seen:
        if len(bits) - place < 8 and "0" not in bits[place:]:
            return True
        seen.add(place)
        for direct, alternating in tables.blocks:
            after = _block(bits, place, tables.codes[direct], tables.codes[alternating])
            if after is None:
                return False
            place = after
    return False


def _block(
    bits: str, place: int, direct: dict[tuple[int, int], int], alternating: dict[tuple[int, int], int]
) -> int | None:
    """Return the end of the block that begins at `place`, or None if it is invalid or extends past the last bit."""
    coefficient = 0
    while coefficient < 64:
        table = alternating if coefficient else direct
        for length in range(1, 17):
            symbol = table.get((length, int(bits[place : place + length] or "0", 2)))
            if symbol is not None:
                break
        else:
            return None
        place += length + (symbol & 15)
        if place > len(bits):
            return None
        if coefficient == 0:
            coefficient = 1
        elif symbol == 0:
            return place
        else:
            coefficient += (symbol >> 4) + 1
    return place


def _tables(head: bytes) -> _Tables | None:
    """Return the tables of a sequential JPEG with one scan, or None for other JPEGs, which cannot be parsed."""
    found, sampling = _Tables(), {}
    scans = 0
    for marker, body in _segments(head):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker > 0xC1:
                return None
            sampling = {body[6 + 3 * i]: (body[7 + 3 * i] >> 4) * (body[7 + 3 * i] & 15) for i in range(body[5])}
        elif marker == 0xC4:
            _read_huffman_tables(body, found)
        elif marker == 0xDA:
            scans += 1
            for i in range(body[0]):
                component, table = body[1 + 2 * i], body[2 + 2 * i]
                blocks = sampling.get(component, 1) if body[0] > 1 else 1
                found.blocks += [(table >> 4, 16 + (table & 15))] * blocks
    known = all(table in found.codes for pair in found.blocks for table in pair)
    return found if scans == 1 and found.blocks and known else None


def _segments(head: bytes) -> Iterator[tuple[int, bytes]]:
    place = 2
    while place + 4 <= len(head):
        (length,) = struct.unpack_from(">H", head, place + 2)
        yield head[place + 1], head[place + 4 : place + 2 + length]
        place += 2 + length


def _read_huffman_tables(body: bytes, found: _Tables) -> None:
    """Add the Huffman tables of one DHT segment to `found`. AC tables are numbered from 16 on, as in DHT."""
    place = 0
    while place + 17 <= len(body):
        counts, table = body[place + 1 : place + 17], {}
        code, at = 0, place + 17
        for length, count in enumerate(counts, 1):
            for symbol in body[at : at + count]:
                table[length, code] = symbol
                code += 1
            at += count
            code <<= 1
        found.codes[body[place]] = table
        place = at
