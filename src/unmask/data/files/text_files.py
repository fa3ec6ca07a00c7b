"""Decode text files: UTF-8 or UTF-16, with or without a byte-order mark, and XML.

Other encodings raise a `TextError` that names the line and the fix, because a wrong guess would silently put wrong
characters into class names.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import NamedTuple

from unmask.errors import SourceError

MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
# Files that declare the encoding on the left nearly always use its superset on the right.
SUPERSETS = {
    "gb2312": "gb18030", "gbk": "gb18030", "euc_kr": "cp949", "ks_c_5601-1987": "cp949", "shift_jis": "cp932",
    "big5": "big5hkscs", "iso8859-1": "cp1252", "ascii": "utf-8",
}  # fmt: skip
DECLARATION = re.compile(r"""^\s*<\?xml\b[^>]*?\bencoding\s*=\s*["']([A-Za-z0-9._:-]+)["'][^>]*\?>""")
LONGEST_SHOWN = 40


class TextError(SourceError):
    """Raised for a text file that cannot be decoded; the message names the line, the encoding and the fix."""


class Line(NamedTuple):
    """One decoded line and its number, from 1. raw: whether it has surrogates in place of bytes that are not UTF-8."""

    number: int
    text: str
    raw: bool


def read_lines(file: str | Path) -> list[Line]:
    """Return the lines of a text file in UTF-8 or UTF-16; bytes that are not UTF-8 become surrogates.

    Raises TextError for NUL characters and damaged UTF-16, and OSError if the file cannot be read.
    """
    content = Path(file).read_bytes()
    encoding, mark = _encoding(content)
    try:
        text = content[mark:].decode(encoding, "surrogateescape" if encoding == "utf-8" else "strict")
    except UnicodeDecodeError as error:
        before = content[mark : mark + error.start].decode(encoding, "replace").count("\n")
        raise TextError(
            f"line {before + 1} of {file} is not valid {encoding.upper()}, unlike the lines before it; save the file "
            "as UTF-8"
        ) from None
    lines = [Line(number, line, False) for number, line in enumerate(re.split("\r\n|\r|\n", text), 1)]
    if found := next((line for line in lines if "\0" in line.text), None):
        raise TextError(
            f"line {found.number} of {file} contains a NUL character: the file is not text, or its encoding is "
            "unknown; save it as UTF-8"
        )
    if encoding != "utf-8":
        return lines
    return [line._replace(raw=_has_raw_bytes(line.text)) for line in lines]


def read_text(file: str | Path) -> str:
    """Return the content of a text file in UTF-8 or UTF-16. Raises OSError, and TextError for other encodings."""
    lines = read_lines(file)
    for line in lines:
        require_text(line, file)
    return "\n".join(line.text for line in lines)


def require_text(line: Line, file: str | Path) -> None:
    """Raise TextError if the line contains bytes that are not UTF-8."""
    if not line.raw:
        return
    content = line.text.encode("utf-8", "surrogateescape")
    shown = content.decode("ascii", "backslashreplace")[:LONGEST_SHOWN]
    guess = "cp1252"
    raise TextError(
        f"line {line.number} of {file} is not UTF-8: {shown}; save the file as UTF-8, for example with "
        f"`iconv -f {guess} -t utf-8` for a file from Western European Windows (or -f GBK, -f Shift-JIS, ...)"
    )


def _encoding(content: bytes) -> tuple[str, int]:
    """Return (encoding, length of the byte-order mark); UTF-16 without a mark is recognised by its NUL bytes."""
    for mark, name in MARKS:
        if content.startswith(mark):
            return name, len(mark)
    start = content[:4096]
    half = len(start) // 2
    if half and len(content) % 2 == 0:
        even, odd = start[::2].count(0), start[1::2].count(0)
        if odd > 0.4 * half and even < 0.1 * half:
            return "utf-16-le", 0
        if even > 0.4 * half and odd < 0.1 * half:
            return "utf-16-be", 0
    return "utf-8", 0


def _has_raw_bytes(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text)


def decode_xml(content: bytes, file: str | Path) -> str:
    """Decode an XML file by its byte-order mark or the encoding it declares, otherwise as UTF-8. Raises TextError.

    Python's XML parsers (Expat) do not support multi-byte encodings other than UTF-8 and UTF-16.
    """
    encoding, mark = _encoding(content)
    if not mark and encoding == "utf-8":
        declared = DECLARATION.match(content[:256].decode("latin-1"))
        encoding = declared[1] if declared else encoding
    try:
        known = codecs.lookup(encoding).name
    except LookupError:
        raise TextError(f"{file} declares the unknown encoding {encoding!r}; save it as UTF-8") from None
    tries = [SUPERSETS.get(known, known), known]
    for name in dict.fromkeys(tries):
        try:
            text = content[mark:].decode(name)
        except (UnicodeDecodeError, LookupError):  # LookupError: a codec that does not decode bytes to text
            continue
        return re.sub(r"^(\s*<\?xml\b[^>]*?)\s+encoding\s*=\s*[\"'][^\"']*[\"']", r"\1", text, count=1)
    raise TextError(f"{file} is not valid {encoding}, the encoding it declares; save it as UTF-8 and declare UTF-8")
