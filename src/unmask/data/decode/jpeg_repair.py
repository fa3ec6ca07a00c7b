"""Accept JPEGs that violate the format without loss: extra bytes between segments, or no end marker.

Some cameras and scanners write such files. A strict decoder rejects them; a lenient one accepts damaged files too.
`repaired` removes the extra bytes, so that the strict decoder can check the rest: the pixels are those of the same file
without them.

Leftover bytes before the end marker are also what damage within the image leaves: after a few wrong bits the decoder
often falls into step again, some blocks too early, and the last blocks of the image remain unread. Such a leftover is
Huffman-coded data up to its last bit, which junk hardly ever is. So leftover bytes are only accepted as junk if they
are padding (one value repeated), or do not parse as further blocks that end exactly where the data ends.
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
READ_AHEAD = 8  # bytes that libjpeg's bit buffer holds, which its count of extraneous bytes does not include
MOST_LEFTOVER = 1 << 16  # bytes that are parsed; a longer leftover must be padding

Decode = Callable[[bytes], object]
"""Decodes strictly, and raises ValueError with libjpeg's message."""


@dataclass
class _Parts:
    """A JPEG taken apart. `head`: all up to the last scan's header; `scan`: that scan's entropy-coded data."""

    head: bytes
    scan: bytes
    junk: int  # bytes between segments that belong to none
    ended: bool  # whether an end marker was found


def repaired(data: bytes, decode: Decode) -> tuple[bytes, tuple[str, ...]] | None:
    """(the JPEG without its junk, which of `layout.TOLERATED` it had), or None where damage cannot be ruled out.

    What is returned has been decoded strictly by `decode`.
    """
    parts = _taken_apart(data)
    if parts is None:
        return None
    between, before_end, no_end = TOLERATED
    faults = (between,) * bool(parts.junk)
    at_end = before_end if parts.ended else no_end
    scan = _without_padding(parts.scan)
    if len(scan) < len(parts.scan) and not _complaint(candidate := parts.head + scan + END, decode):
        return candidate, (*faults, at_end)
    if not parts.ended:  # nothing stands where the end marker should be: cut short, be it by two bytes
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


def _taken_apart(data: bytes) -> _Parts | None:
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
    """Entropy-coded data without one value repeated at its end; a byte 0 that belongs to a stuffed 0xFF is kept."""
    if len(scan) < 2 or scan[-1] != scan[-2]:
        return scan
    shorter = scan.rstrip(scan[-1:])
    return shorter + b"\0" if shorter.endswith(b"\xff") and scan[-1] == 0 else shorter


def _complaint(data: bytes, decode: Decode) -> str:
    """What the strict decoder says of these bytes; "" when it accepts them."""
    try:
        decode(data)
    except ValueError as error:
        return str(error) or "unknown"
    return ""


def _end_of_image(parts: _Parts, at_most: int, decode: Decode) -> int | None:
    """The smallest number of bytes of the last scan that hold the whole image, decoded strictly; None for damage."""

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
    """What is needed to parse sequential Huffman-coded blocks: (length, code) -> symbol of each table, and the tables
    (direct current, alternating current) of each block of a minimum coded unit."""

    codes: dict[int, dict[tuple[int, int], int]] = field(default_factory=dict)
    blocks: list[tuple[int, int]] = field(default_factory=list)


def _is_coded(head: bytes, leftover: bytes) -> bool:
    """Whether bytes after the end of an image are more of it: Huffman-coded blocks up to the last bit.

    leftover: from the last byte of the image on, within which the next block would begin.
    """
    if len(set(leftover[1:])) <= 1:
        return False
    tables = _tables(head)
    if tables is None or len(leftover) > MOST_LEFTOVER:
        return True  # cannot be told from damage
    plain = leftover.replace(b"\xff\x00", b"\xff")
    bits = "".join(f"{byte:08b}" for byte in plain)
    seen: set[int] = set()
    return any(_parses_to_the_end(bits, start, tables, seen) for start in range(1, 9))


def _parses_to_the_end(bits: str, place: int, tables: _Tables, seen: set[int]) -> bool:
    """Whether whole units follow from `place` on and leave at most seven bits, all of them 1 (ITU T.81, F.1.2.3)."""
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
    """Where the block ends that begins at `place`; None where it is none, or goes beyond the end."""
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
    """Of a sequential JPEG of one scan; None for any other, of which blocks cannot be parsed on their own."""
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
    """The tables of one DHT segment; those of alternating current are numbered from 16 on, as the segment does."""
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
