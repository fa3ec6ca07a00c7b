"""Limits for one file, so that a damaged or malicious file cannot exhaust memory or time."""

from __future__ import annotations

MAX_PIXELS = 100_000_000
MAX_VALUES = 4 * MAX_PIXELS  # pixels times channels
MAX_FILE_BYTES = 200_000_000
MAX_ASPECT = 1000  # Limit on the longer side divided by the shorter side.
MAX_DECODE_BYTES = 512 << 20  # Limit on the memory for a file's bytes and for decoding it piece by piece.
PIECE_BYTES = 24 << 20  # Bytes of memory for converting one piece.
MAX_SCANNED_PIXELS = 2_000_000_000  # Limit on pixels times scans of a progressive JPEG: about ten seconds of decoding.
PIECE_PIXELS = 1 << 18  # Pixels converted at a time, few enough for the cache of a core.
FLOAT64_PIXELS = 1 << 16  # Pixels converted to float64 at a time.
MAX_UNPACKED_BYTES = 2 << 30  # Limit on uncompressed bytes of a tar, or of parquet row groups, in memory.
