"""Read files of weights from other libraries without running any code in them.

Supported files are safetensors and pickles of plain tensors (loaded with weights_only=True). Supported folders are
those of transformers and timm (config.json, weights, preprocessor_config.json), and a folder with encoder and decoder
of DALL-E's dVAE.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from unmask.errors import ForeignError
from unmask.interop.foreign.metadata import (
    ExportMetadata,
    NetworkConfig,
    Preprocessor,
    ShardIndex,
    SourceMetadata,
    TimmConfig,
    TrainingArguments,
    training_arguments,
)
from unmask.interop.foreign.state_dicts import EXPORT_METADATA, unwrap
from unmask.system.json_input import checked, read_json, read_object

WHOLE = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SAFE, PICKLES = (".safetensors",), (".pth", ".pt", ".bin", ".pkl", ".tar", ".ckpt")
MOST_TENSORS = 100_000
MOST_SHARED = 8  # largest accepted ratio of tensor bytes to file bytes, above 1 because tied weights share storage


class Opaque:
    """Stand-in for the path classes of pickled training arguments; it discards the paths."""

    def __init__(self, *_: Any) -> None: ...


PLAIN_CLASSES: list[Any] = [
    argparse.Namespace,
    (OrderedDict, "yacs.config.CfgNode"),  # the class of SimMIM's settings; torch loads no other dict class
    *((Opaque, f"pathlib.{name}") for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *((Opaque, f"pathlib._local.{name}") for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
]
"""Further classes that a pickle may contain; paths are loaded as `Opaque`, and CfgNode as OrderedDict."""


@dataclass(frozen=True)
class SourceFile:
    """The name and checksum of a file of imported weights, which the run records."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file or folder of weights.

    state: tensors by their names in the file. unclear: names of training arguments with invalid values.
    """

    state: dict[str, Tensor]
    metadata: SourceMetadata = field(default_factory=SourceMetadata)
    files: tuple[SourceFile, ...] = ()
    unclear: tuple[str, ...] = ()


def read_source(path: Path) -> Checkpoint:
    """Read weights and metadata from a file or folder.

    Raises ForeignError if the path is not a checkpoint, is damaged, or cannot be loaded without running code in it.
    """
    if path.is_file():
        return _read_files([path])
    if not path.is_dir():
        raise ForeignError(
            f"{path} does not exist; expected a file of weights (.safetensors, .pth, .pt, .bin) or a folder that "
            "transformers saved"
        )
    if (path / "status.json").exists() and (path / "plan.json").exists():
        raise ForeignError(f"{path} is already a run; use it directly, no import is needed")
    network, preprocessor = _described(path)
    if (halves := _halves(path)) is not None:
        content, digests = {}, []
        for side, file in halves.items():
            part = _read_files([file])
            content |= {f"{side}.{name.removeprefix(side + '.')}": value for name, value in part.state.items()}
            digests += part.files
        return Checkpoint(content, files=tuple(digests))
    read = _read_files(_weights_of(path))
    return replace(read, metadata=replace(read.metadata, network=network, preprocessor=preprocessor))


def _described(folder: Path) -> tuple[NetworkConfig, Preprocessor]:
    """Read config.json (of transformers or timm) and preprocessor_config.json; a missing file gives an empty record."""
    file, other = folder / "config.json", folder / "preprocessor_config.json"
    content, preprocessor = read_json(file), checked(Preprocessor, read_json(other), str(other))
    if not isinstance(content.get("pretrained_cfg"), dict):
        return checked(NetworkConfig, content, str(file)), preprocessor
    timm = checked(TimmConfig, content, str(file))
    data = timm.pretrained_cfg
    known = {"image_mean": data.mean, "image_std": data.std, "crop_pct": data.crop_pct}
    stated = {key: value for key, value in known.items() if value is not None}
    return NetworkConfig(label_names=timm.label_names), preprocessor.model_copy(update=stated)


def _halves(folder: Path) -> dict[str, Path] | None:
    """Return the files encoder.* and decoder.* of a folder with DALL-E's dVAE, or None for any other folder."""
    candidates = {
        side: [file for file in sorted(folder.glob(f"{side}.*")) if file.suffix in (*SAFE, *PICKLES)]
        for side in ("encoder", "decoder")
    }
    if not all(candidates.values()):
        return None
    return {side: files[0] for side, files in candidates.items()}


def _weights_of(folder: Path) -> list[Path]:
    """Return the files of weights in a folder: a single file, or all shards in an index."""
    for name in WHOLE:
        if (folder / name).is_file():
            return [folder / name]
    for name in INDEX:
        if (folder / name).is_file():
            index = checked(ShardIndex, read_json(folder / name), str(folder / name))
            return [folder / Path(shard).name for shard in sorted(set(index.weight_map.values()))]
    others = sorted(file for file in folder.iterdir() if file.suffix in (*SAFE, *PICKLES))
    if len(others) == 1:
        return others
    what = f"{len(others)} files of weights: {', '.join(file.name for file in others[:5])}" if others else "no weights"
    raise ForeignError(
        f"{folder} has {what}; expected {' or '.join(WHOLE)}, one file of weights, or encoder.pth and decoder.pth of a "
        "dVAE; give the file itself"
    )


def _read_files(files: list[Path]) -> Checkpoint:
    """Read one file, or the shards of one model."""
    content: dict[str, Tensor] = {}
    digests, exported, training, unclear = [], None, TrainingArguments(), ()
    for file in files:
        try:
            if file.suffix == ".onnx":
                raise ForeignError(
                    "got an ONNX graph, which does not contain the names of its weights; import the original checkpoint"
                )
            loaded = _read_safetensors(file) if file.suffix in SAFE else _read_pickle(file)
            exported = _export_metadata(file, loaded) or exported
            if file.suffix not in SAFE:
                training, unclear = training_arguments(loaded)
            # The prefix that all names share can be removed only after all shards are joined.
            tensors = loaded if len(files) > 1 and isinstance(loaded, dict) else unwrap(loaded)
            _require_plain(tensors, file)
            content |= tensors
            digests.append(fingerprint(file))
        except ForeignError as error:
            raise ForeignError(f"{file}: {error}") from None
        except OSError as error:
            raise ForeignError(
                f"cannot read {file}: {error.strerror or error}; check that it exists and is readable"
            ) from None
    state = unwrap(content) if len(files) > 1 else content
    metadata = SourceMetadata(training=training, exported=exported)
    return Checkpoint(state, metadata, tuple(digests), unclear)


def _require_plain(tensors: dict[str, Any], file: Path) -> None:
    """Raise ForeignError for tensors that are not dense, or whose bytes far exceed the size of the file.

    A few bytes in a pickle can describe a tensor of any size, so the size is checked before any computation.
    """
    if len(tensors) > MOST_TENSORS:
        raise ForeignError(
            f"got {len(tensors)} tensors; expected at most {MOST_TENSORS}: this network is not supported"
        )
    file_bytes, total = file.stat().st_size, 0
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            continue
        if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
            raise ForeignError(f"{name} is a sparse, quantised or meta tensor; expected a dense one; convert it first")
        if not value.numel():
            raise ForeignError(f"{name} has the shape {tuple(value.shape)}, which is empty; the file is damaged")
        total += value.numel() * value.element_size()
        if total > MOST_SHARED * file_bytes + (1 << 20):
            raise ForeignError(
                f"its tensors up to {name} have {total} bytes, but the file has only {file_bytes}; they are views of a "
                "smaller storage: save them with .contiguous(), or download the file again"
            )


def _export_metadata(file: Path, loaded: Any) -> ExportMetadata | None:
    """Read the metadata that `unmask export` stored in the file, or return None for other files."""
    if file.suffix in SAFE:
        with safetensors.safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(EXPORT_METADATA)
    else:
        text = loaded.get(EXPORT_METADATA) if isinstance(loaded, dict) else None
    if not isinstance(text, str):
        return None
    where = f"the metadata {EXPORT_METADATA!r} in its header"
    return checked(ExportMetadata, read_object(text, where), where)


def fingerprint(file: Path) -> SourceFile:
    """Return the name and SHA-256 of a file."""
    with file.open("rb") as opened:
        return SourceFile(file.name, hashlib.file_digest(opened, "sha256").hexdigest())


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ForeignError(f"not a valid safetensors file ({error}); download it again and compare its size") from None


def _read_pickle(file: Path) -> Any:
    """Load a torch.save file that contains only tensors, plain values and training arguments.

    Raises ForeignError for other content without loading it, because a pickle can run code.
    """
    if not file.stat().st_size:
        raise ForeignError("the file is empty; download it again")
    with file.open("rb") as opened:
        start_of_file = opened.read(4)
    ours = start_of_file[:2] in (b"PK", b"\x80\x02")
    try:
        if start_of_file[:2] == b"PK":
            _require_not_inflated(file)
        with warnings.catch_warnings(), torch.serialization.safe_globals(PLAIN_CLASSES):
            warnings.simplefilter("ignore")  # torch warns about pickle protocols
            return torch.load(file, map_location="cpu", weights_only=True) if ours else _not_torch(start_of_file)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = f"contains {culprit[1]} besides tensors" if culprit else "contains more than tensors"
        raise ForeignError(
            f"it {what}, so loading it could run code, and it was not loaded. If you trust its origin, save only the "
            "tensors in the original environment: torch.save(model.state_dict(), FILE)"
        ) from None
    except ForeignError:
        raise
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, IndexError, AttributeError, AssertionError,
            MemoryError, OverflowError, NotImplementedError, zipfile.BadZipFile) as error:  # fmt: skip
        reason = str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__
        raise ForeignError(
            f"it is damaged, truncated, or not a weights file ({reason}); download it again and compare its size or "
            f"checksum with the published one"
        ) from None


def _require_not_inflated(file: Path) -> None:
    """Raise ForeignError for a zip file that unpacks to many times its size; torch.save never compresses."""
    with zipfile.ZipFile(file) as opened:
        unpacked = sum(entry.file_size for entry in opened.infolist())
    if unpacked > MOST_SHARED * file.stat().st_size + (1 << 20):
        raise ForeignError(
            f"it has {file.stat().st_size} bytes and unpacks to {unpacked}; torch.save does not compress, so this is "
            f"not a weights file: download it again"
        )


def _not_torch(start_of_file: bytes) -> Any:
    if start_of_file[:1] == b"\x80":
        raise ForeignError(
            "got a pickle that torch.save did not write; it was not loaded, because a pickle can run code: save the "
            "tensors with torch.save(model.state_dict(), FILE)"
        )
    raise ForeignError(
        "not a weights file: it is neither a pickle of torch.save nor a zip; expected .safetensors, .pth, .pt or .bin"
    )
