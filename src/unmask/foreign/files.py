"""Files of weights that others made, opened without ever running what lies in them.

A file is safetensors or a pickle of plain tensors (opened weights-only); a folder is transformers' or timm's
(config.json, weights, preprocessor_config.json), or holds the two halves of DALL-E's dVAE.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from unmask.foreign.state_dicts import IMPRINT, ForeignError, unwrap

WHOLE = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SAFE, PICKLES = (".safetensors",), (".pth", ".pt", ".bin", ".pkl", ".tar", ".ckpt")


@dataclass
class Read:
    """What lay in a file or folder: tensors, what describes them, and which files were read, with their SHA-256.

    imprint: of `unmask export`, what the format has no place for; see `exportable.imprint`.
    """

    state: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)
    look: dict[str, Any] = field(default_factory=dict)
    files: list[dict[str, str]] = field(default_factory=list)
    imprint: dict[str, Any] = field(default_factory=dict)


def read_source(path: Path) -> Read:
    """Raises ForeignError for what is no checkpoint, is damaged, or would have to run code to be opened."""
    if path.is_file():
        state, files, imprint = _read_files([path])
        return Read(state, files=files, imprint=imprint)
    if not path.is_dir():
        raise ForeignError(
            f"{path} does not exist; a file of weights (.safetensors, .pth, .pt, .bin) or a folder that transformers "
            "saved was expected"
        )
    if (path / "status.json").exists() and (path / "plan.json").exists():
        raise ForeignError(f"{path} is a run already; use it as it is, there is nothing to import")
    about, look = _json(path / "config.json"), _json(path / "preprocessor_config.json")
    if isinstance(about.get("pretrained_cfg"), dict):  # timm
        known = about["pretrained_cfg"]
        look = {f"image_{key}": known[key] for key in ("mean", "std") if key in known}
        look |= {"crop_pct": known["crop_pct"]} if "crop_pct" in known else {}
        about = {"label_names": about["label_names"]} if "label_names" in about else {}
    if (halves := _halves(path)) is not None:
        content, digests = {}, []
        for side, file in halves.items():
            part, digest, _ = _read_files([file])
            content |= {f"{side}.{name.removeprefix(side + '.')}": value for name, value in part.items()}
            digests += digest
        return Read(content, files=digests)
    state, files, imprint = _read_files(_weights_of(path))
    return Read(state, about, look, files, imprint)


def _json(path: Path) -> dict[str, Any]:
    """A small file of settings beside the weights; {} where there is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ForeignError(f"{path} cannot be read ({type(error).__name__}); a JSON object was expected") from None
    if not isinstance(found, dict):
        raise ForeignError(f"{path} holds a {type(found).__name__}, a JSON object was expected")
    return found


def _halves(folder: Path) -> dict[str, Path] | None:
    """encoder.* and decoder.* of a folder that holds DALL-E's dVAE."""
    found = {
        side: [file for file in sorted(folder.glob(f"{side}.*")) if file.suffix in (*SAFE, *PICKLES)]
        for side in ("encoder", "decoder")
    }
    if not all(found.values()):
        return None
    return {side: files[0] for side, files in found.items()}


def _weights_of(folder: Path) -> list[Path]:
    """The files of weights in a folder: one, or all shards that an index names."""
    for name in WHOLE:
        if (folder / name).is_file():
            return [folder / name]
    for name in INDEX:
        if (folder / name).is_file():
            shards = _json(folder / name).get("weight_map", {})
            return [folder / Path(shard).name for shard in sorted(set(shards.values()))]
    others = sorted(file for file in folder.iterdir() if file.suffix in (*SAFE, *PICKLES))
    if len(others) == 1:
        return others
    what = f"{len(others)} files of weights: {', '.join(file.name for file in others[:5])}" if others else "no weights"
    raise ForeignError(
        f"{folder} holds {what}; expected were {' or '.join(WHOLE)}, one file of weights, or encoder.pth and "
        "decoder.pth of a dVAE; name the file itself"
    )


def _read_files(files: list[Path]) -> tuple[dict[str, Tensor], list[dict[str, str]], dict[str, Any]]:
    """(tensors, names and digests of the files, the imprint of our own export)."""
    content: dict[str, Tensor] = {}
    digests, imprint = [], {}
    for file in files:
        try:
            if file.suffix == ".onnx":
                raise ForeignError(
                    "a graph of ONNX came, which is for running and has lost the names of its weights; import what it "
                    "was exported from"
                )
            loaded = _read_safetensors(file) if file.suffix in SAFE else _read_pickle(file)
            imprint |= _imprint(file, loaded)
            # What all names begin with shows in all shards together, so several are joined first.
            content |= loaded if len(files) > 1 and isinstance(loaded, dict) else unwrap(loaded)
            digests.append(fingerprint(file))
        except ForeignError as error:
            raise ForeignError(f"{file}: {error}") from None
        except OSError as error:
            raise ForeignError(
                f"{file} cannot be read: {error.strerror or error}; is it there, and yours to read?"
            ) from None
    return unwrap(content) if len(files) > 1 else content, digests, imprint


def _imprint(file: Path, loaded: Any) -> dict[str, Any]:
    """What our own export left in a corner of the file; {} for the files of others."""
    if file.suffix in SAFE:
        with safetensors.safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(IMPRINT)
    else:
        text = loaded.get(IMPRINT) if isinstance(loaded, dict) else None
    return json.loads(text) if isinstance(text, str) else {}


def fingerprint(file: Path) -> dict[str, str]:
    """What a Run keeps of a file that it came from."""
    with file.open("rb") as opened:
        return {"name": file.name, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ForeignError(
            f"no safetensors file, or a part of one ({error}); get it again and compare its size"
        ) from None


def _read_pickle(file: Path) -> Any:
    """What torch.save wrote, as long as it is tensors and plain values (and the arguments of official MAE's training).

    Raises ForeignError for anything else, which is not opened: a pickle with code in it runs that code.
    """
    if not file.stat().st_size:
        raise ForeignError("the file is empty; get it again")
    with file.open("rb") as opened:
        start_of_file = opened.read(4)
    ours = start_of_file[:2] in (b"PK", b"\x80\x02")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about protocols: what matters is an error
            return torch.load(file, map_location="cpu", weights_only=True) if ours else _not_torch(start_of_file)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {culprit[1]} beside tensors" if culprit else "holds more than tensors"
        raise ForeignError(
            f"it {what}, and opening that could run code, so it was not opened. If you trust where it comes from, save "
            "the tensors alone in the environment that made it: torch.save(model.state_dict(), FILE)"
        ) from None
    except ForeignError:
        raise
    except (RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__
        raise ForeignError(
            f"it is damaged, cut, or no file of weights ({reason}); get it again and compare its size or checksum with "
            "what is published"
        ) from None


def _not_torch(start_of_file: bytes) -> Any:
    if start_of_file[:1] == b"\x80":
        raise ForeignError(
            "a pickle that torch.save did not write; it was not opened, because a pickle can run code: save the "
            "tensors with torch.save(model.state_dict(), FILE)"
        )
    raise ForeignError(
        "no file of weights: it begins like neither a pickle of torch.save nor a zip; .safetensors, .pth, .pt or .bin "
        "was expected"
    )
