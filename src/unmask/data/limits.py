"""Limits of one file, so that a damaged or hostile one cannot take the memory or the time of a machine."""

from __future__ import annotations

MAX_PIXELS = 100_000_000
MAX_VALUES = 4 * MAX_PIXELS  # pixels times channels
MAX_FILE_BYTES = 200_000_000
MAX_ASPECT = 1000  # the longer side divided by the shorter
MAX_DECODE_BYTES = 512 << 20  # for a file's own bytes and for decoding it piece by piece
PIECE_BYTES = 24 << 20  # that converting one piece takes
MAX_SCANNED_PIXELS = 2_000_000_000  # pixels times scans of a progressive JPEG: about ten seconds
PIECE_PIXELS = 1 << 18  # converted at a time: few enough to stay in the cache of a core
FLOAT64_PIXELS = 1 << 16  # computed on in float64 at a time
MAX_UNPACKED_BYTES = 2 << 30  # of a compressed tar, or of row groups of parquet files, held in memory
