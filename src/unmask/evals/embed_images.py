"""`unmask embed`: write the features of every image to a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unmask.console import Console
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.engine.device import choose_device
from unmask.engine.divided_scan import read_as
from unmask.engine.load import load
from unmask.engine.world import current, together
from unmask.errors import UserError, name_in_errors
from unmask.evals.frozen_features import FeatureTable
from unmask.evals.images import FeatureOptions, features
from unmask.results import EmbedResult
from unmask.run import Run

FEATURES = "features"  # sub-folder of a run with cached features


@together
def embed_images(
    run: Path,
    data: str | Sequence[str],
    out: Path,
    *,
    exclude: Sequence[str] = (),
    step: int | None,
    device: str,
    console: Console,
) -> EmbedResult:
    """Compute the features of every image without masking, and write them to a .parquet or .npz file.

    The table has one row per image, in the order of the source. Its columns are `name` (path relative to DATA,
    '/'-separated), `label` (class name, if DATA has classes), `cls` (class token, if the encoder has one) and `mean`
    (mean over patch tokens). `cls` and `mean` are float32 vectors of the encoder's width. In an .npz file, every column
    is an array with the column's name. The same images and weights give the same bytes. Raises UserError when no image
    can be read, or `out` cannot be written.
    """
    if out.suffix not in (".parquet", ".npz"):
        raise UserError(f"got output file {out}; expected a name that ends in .parquet or .npz")
    if not out.resolve().parent.is_dir():
        raise UserError(f"the folder {out.resolve().parent} does not exist; create it first, or choose another --out")
    loaded = load(run, device=choose_device(device), step=step)
    source = read_as(open_source(data, exclude), loaded.plan.reading)
    rows = np.arange(len(source))
    encoders = {"encoder": loaded.method.encoder}
    # Features are always computed in fp32, so that those from different machines differ by rounding only.
    options = FeatureOptions(title="embedding", precision="fp32", cache=Run.open(run).path / FEATURES)
    tables = features(loaded, encoders, source, rows, options, console)
    return current().from_writer(lambda: _stored(tables["encoder"], source, out, loaded.step, run, console))


def _stored(table: FeatureTable, source: Source, out: Path, step: int, run: Path, console: Console) -> EmbedResult:
    names = [source.names[row] for row in table.index.tolist()]
    labels = None if table.labels is None else [source.classes[label] for label in table.labels.tolist()]
    _write_features(out, names, labels=labels, cls=table.cls, mean=table.mean)
    console.print(f"{out}: {len(names)} images, width {table.mean.shape[1]}, from step {step} of {run}")
    return EmbedResult(
        out=str(out),
        images=len(names),
        left_out=len(source) - len(names),
        columns=("name", *["label"] * (labels is not None), *["cls"] * (table.cls is not None), "mean"),
        width=int(table.mean.shape[1]),
        step=step,
    )


def _write_features(
    out: Path, names: list[str], labels: list[str] | None, cls: np.ndarray | None, mean: np.ndarray
) -> None:
    texts = {"name": names} | ({"label": labels} if labels is not None else {})
    vectors = {name: value for name, value in (("cls", cls), ("mean", mean)) if value is not None}
    partial = out.with_name(f".{out.name}.partial")  # renamed when complete
    with name_in_errors(out):
        try:
            if out.suffix == ".npz":
                with partial.open("wb") as file:  # np.savez sets all dates to 1980-01-01, so bytes are reproducible
                    np.savez(file, **{name: np.array(text) for name, text in texts.items()}, **vectors)  # type: ignore[arg-type]
            else:
                import pyarrow as pa
                import pyarrow.parquet as pq

                columns: dict[str, Any] = dict(texts)
                for name, value in vectors.items():
                    columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(value.reshape(-1)), value.shape[1])
                pq.write_table(pa.table(columns), partial, compression="zstd")
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
