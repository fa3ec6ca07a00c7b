"""Report how the scanned files are read, as sentences and as a table, for `check` and the plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from unmask.data.decode.layout import Layout
from unmask.data.scan.scan import Scan

USE_OF_PAGES = {
    "": "the image",
    "first": "first page",
    "largest": "full resolution",
    "channels": "pages as channels",
    "samples": "each page",
}


def findings(found: Scan) -> tuple[str, ...]:
    """Return a sentence, with the number of files, for each kind of file that is not read unchanged."""
    return (*found.decisions, *_alpha(found), *_pages(found), *_axes(found), *_tolerated(found), *_absent(found))


@dataclass(frozen=True)
class FileKind:
    """One kind of file in a data set: number of files, their contents, and how they are read."""

    files: int
    format: str
    bands: int
    alpha: str
    pages: int
    read: str
    axes: str
    channels: int


def file_kinds(found: Scan) -> list[FileKind]:
    """Return the kinds of files in the data set, most frequent first."""
    return [
        FileKind(
            files=count,
            format=kind,
            bands=layout.bands,
            alpha=layout.alpha or "none",
            pages=layout.pages,
            read=USE_OF_PAGES[layout.page_use],
            axes=layout.axes or "-",
            channels=channels,
        )
        for (kind, channels, layout), count in _without_faults(found).most_common()
    ]


def is_plain(found: Scan) -> bool:
    """Return whether all files are read unchanged, so that no table is needed."""
    return all(not (layout.alpha or layout.page_use or layout.axes == "CHW") for _, _, layout in found.layouts)


def _without_faults(found: Scan) -> Counter[tuple[str, int, Layout]]:
    counts: Counter[tuple[str, int, Layout]] = Counter()
    for (kind, channels, layout), count in found.layouts.items():
        plain = Layout(
            bands=layout.bands, alpha=layout.alpha, pages=layout.pages, page_use=layout.page_use, axes=layout.axes
        )
        counts[kind, channels, plain] += count
    return counts


def _counted(found: Scan, what: str) -> dict[tuple[str, str], int]:
    """Return the number of files by (format, value) for one field of `Layout`, if it is set."""
    counts: Counter[tuple[str, str]] = Counter()
    for (kind, _, layout), count in found.layouts.items():
        if value := getattr(layout, what):
            counts[kind, value] += count
    return dict(counts.most_common())


def _files(count: int, kind: str) -> str:
    return f"{count} {kind} file{'s' * (count != 1)}"


def _alpha(found: Scan) -> list[str]:
    words = {
        "composited": "alpha is composited on white",
        "dropped": "alpha is dropped",
        "band": "alpha is kept as a band",
        "opaque": "alpha is 0 everywhere and ignored",
    }
    return [
        f"{_files(count, kind)}: {words[use]} (data.alpha)" for (kind, use), count in _counted(found, "alpha").items()
    ]


def _pages(found: Scan) -> list[str]:
    sentences = []
    for (kind, use), count in _counted(found, "page_use").items():
        numbers = [layout.pages for (_, _, layout) in found.layouts if layout.page_use == use]
        most = f"up to {max(numbers)} pages" if len(set(numbers)) > 1 else f"{numbers[0]} pages each"
        if use == "first":
            sentences.append(
                f"{_files(count, kind)} with {most}: only the first page is read; to read all of them, --set "
                "data.pages=channels (channels of one image) or data.pages=samples (separate images)"
            )
        elif use == "channels":
            sentences.append(
                f"{_files(count, kind)} with {most}: pages are read as channels (data.pages)" + _skipped(found)
            )
        elif use == "samples":
            sentences.append(f"{count} TIFF pages, each read as a separate image (data.pages)")
        elif use == "largest":
            sentences.append(f"{_files(count, kind)}: pyramids, read at full resolution (data.pages)")
    return sentences


def _skipped(found: Scan) -> str:
    """Return a note with the number of pages that are skipped in files whose pages are read as channels."""
    left = sum(
        count * (layout.pages - channels // max(1, layout.bands))
        for (_, channels, layout), count in found.layouts.items()
        if layout.page_use == "channels" and layout.alpha in ("", "band")
    )
    return f"; {left} pages of other depths, times or kinds are skipped" if left > 0 else ""


def _axes(found: Scan) -> list[str]:
    if any("data.axes" in sentence for sentence in found.decisions):
        return []
    turned = sum(count for (kind, use), count in _counted(found, "axes").items() if use == "CHW")
    return [f"{_files(turned, 'NPY')}: read as (channels, H, W) (data.axes)"] if turned else []


def _tolerated(found: Scan) -> list[str]:
    return [
        f"accepted with a warning: {count} JPEG{'s' * (count != 1)} with {fault}; no pixel is lost"
        for fault, count in found.tolerated.most_common()
    ]


def _absent(found: Scan) -> list[str]:
    if not found.absent_files:
        return []
    share = f"{found.absent_share:.1%}" if found.absent_share >= 0.001 else "less than 0.1%"
    sentences = [
        f"absent pixels (declared no-data value, NaN): {share} of all pixels, in {found.absent_files} of {found.good} "
        "files; excluded from mean, standard deviation and loss, and replaced by the mean in images (data.nodata, "
        "data.min_valid)"
    ]
    if found.empty_files:
        s = "s" * (found.empty_files != 1)
        sentences.append(f"{found.empty_files} file{s} without any valid pixel, which the loss ignores")
    return sentences
