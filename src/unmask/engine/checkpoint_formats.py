"""The two formats of the tensors of a checkpoint. The store of checkpoints is `engine/checkpoint.py`.

    dense   model.safetensors, optim.safetensors     all tensors, written by one process
    dcp     dcp/shard-NNNNN-model-....safetensors    one file from each process, with the parts that it holds

torch.distributed.checkpoint (DCP) writes the parts, and its `HuggingFaceStorageWriter` stores the place of each part in
the header of its safetensors file. Hence no pickle is written or read; a `.metadata` file, which is a pickle in DCP's
own format, is ignored. Names have the prefix `model/` or `optim/`.

DCP detects neither flipped bits nor missing files: a missing shard gives smaller tensors or none, and an additional
file is read like the others. So each process computes the SHA-256 of what it writes, the manifest lists all files, and
nothing is read before these agree.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from unmask.engine.fault_points import fault_points
from unmask.errors import UserError

MODEL, OPTIM, SHARDS = "model.safetensors", "optim.safetensors", "dcp"
SHARD = re.compile(r"dcp/shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors")
IN_MODEL, IN_OPTIM = "model/", "optim/"

SAFETENSORS_TYPES = {  # in the order in which safetensors stores tensors
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Entry = dict[str, Any]  # {"size": bytes, "sha256": digest} of a file in the manifest


class CheckpointError(UserError):
    """Raised if there is no usable checkpoint, or if a checkpoint does not fit the method."""


class CheckpointFull(CheckpointError):
    """Raised if a checkpoint cannot be written; the older checkpoints are unchanged."""


class Damaged(CheckpointError):
    """Raised if a checkpoint does not match its manifest, or belongs to another run."""


def entry(content: bytes) -> Entry:
    """Return the size and SHA-256 of a file's content, for the manifest."""
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> list[Any]:
    """Return the content of a safetensors file as its header and a view of the memory of each tensor.

    The bytes are those of `safetensors.torch.save`, which copies all tensors and lets no other thread run meanwhile, so
    that training would wait.
    """
    held, order = on_cpu(tensors), list(SAFETENSORS_TYPES)
    if not {value.dtype for value in held.values()} <= SAFETENSORS_TYPES.keys():
        return [safetensors.torch.save(held)]
    ordered = sorted(held, key=lambda name: (order.index(held[name].dtype), name.encode()))
    header, views, end = dict[str, Any](), [], 0
    for name in ordered:
        array: Any = held[name].reshape(-1).view(torch.uint8).numpy()
        view = memoryview(array)
        start, end = end, end + len(view)
        shape = list(held[name].shape)
        header[name] = {"dtype": SAFETENSORS_TYPES[held[name].dtype], "shape": shape, "data_offsets": [start, end]}
        views.append(view)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *views]


def own_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: of a DTensor its local part, else all of it."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def write_shards(
    folder: Path, model: Mapping[str, Tensor], optim: Mapping[str, Tensor], group: Any
) -> dict[str, Entry]:
    """Write the parts of the tensors that this process holds; return the manifest's entries of the files it wrote.

    All processes of `group` must call this. Tensors that all of them hold are written by one. Raises OSError in the
    process that cannot write, and not in the others.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    tensors = {IN_MODEL + name: value for name, value in model.items()}
    tensors |= {IN_OPTIM + name: value for name, value in optim.items()}
    writer = _shard_writer(folder)
    _ignore_single_process_warning()
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # not an Exception; `writer` keeps errors of the disk for itself
        raise RuntimeError(f"torch could not plan the checkpoint: {error}") from None
    if writer.failure is not None:
        raise writer.failure
    return {f"{SHARDS}/{name}": made for name, made in writer.fs.written.items()}


def _ignore_single_process_warning() -> None:
    """Without a process group, DCP warns that it works in a single process, which is intended here."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def _shard_writer(folder: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystem
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.futures import Future

    class Files(FileSystem):
        """Computes the digest of each file while it is written, and flushes it to disk."""

        def __init__(self) -> None:
            self.written: dict[str, Entry] = {}

        @contextmanager
        def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
            assert mode == "wb", "only shards are written"
            fault_points().before_write(Path(path))
            with Path(path).open("wb") as file:
                stream = Digested(file)
                yield stream
                file.flush()
                os.fsync(file.fileno())
            self.written[Path(path).name] = stream.entry()

    class Writer(HuggingFaceStorageWriter):
        """Keeps an error of the disk, so that the other processes finish and all can agree on it."""

        failure: OSError | None = None

        def write_data(self, plan: Any, planner: Any) -> Any:
            try:
                return super().write_data(plan, planner)
            except OSError as error:
                self.failure = error
                nothing: Future[list[Any]] = Future()
                nothing.set_result([])
                return nothing

    writer = Writer(str(folder), save_distributed=True)
    writer.fs = Files()
    writer.sync_files = False  # torch flushes before Python's buffer is written; `Files` does it after that
    writer.per_thread_copy_ahead = 0  # the tensors are on the CPU, so no stream of the device is needed
    return writer


class Digested:
    """A file opened for writing that computes the SHA-256 of its content."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def entry(self) -> Entry:
        """Return the size and SHA-256 of what was written, for the manifest."""
        return {"size": self.size, "sha256": self.sha256.hexdigest()}

    def write(self, content: Any) -> int:
        self.sha256.update(content)
        self.size += len(content)
        return self.file.write(content)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None: ...

    def close(self) -> None: ...  # `Files` flushes the file before it closes it


class Tensors:
    """Collects the whole tensors of a checkpoint from the contents of its files, in either format.

    path: the checkpoint, for messages. with_optim: whether to return the optimiser's tensors too.
    """

    def __init__(self, path: Path, *, with_optim: bool) -> None:
        self.path, self.with_optim = path, with_optim
        self._parts: dict[str, list[tuple[list[int], Tensor]]] = {}

    def add(self, name: str, content: bytes) -> None:
        """Take the tensors of a file, whose digest has been verified. Raises Damaged."""
        if name.endswith(".safetensors"):
            try:
                self._take(name, content)
            except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
                raise Damaged(f"{self.path}: {name}: {error}") from None

    def _take(self, name: str, content: bytes) -> None:
        if name in (MODEL, OPTIM):
            prefix = IN_MODEL if name == MODEL else IN_OPTIM
            if self.with_optim or name == MODEL:
                found = {prefix + key: (None, value) for key, value in safetensors.torch.load(content).items()}
            else:
                found = {}
        else:
            places = _places(content)
            found = {
                key: (places[key]["saved_offsets"], value) for key, value in safetensors.torch.load(content).items()
            }
        for key, (place, value) in found.items():
            if self.with_optim or key.startswith(IN_MODEL):
                self._parts.setdefault(key, []).append((place or [0] * value.ndim, value))

    def model(self) -> dict[str, Tensor]:
        """Return the weights. Raises Damaged if a part of a tensor is missing."""
        return self._joined(IN_MODEL)

    def optim(self) -> dict[str, Tensor]:
        """Return the optimiser's tensors. Raises Damaged if a part of a tensor is missing."""
        return self._joined(IN_OPTIM)

    def _joined(self, prefix: str) -> dict[str, Tensor]:
        names = [key for key in self._parts if key.startswith(prefix)]
        return {key.removeprefix(prefix): self._join(key, self._parts.pop(key)) for key in names}

    def _join(self, name: str, parts: list[tuple[list[int], Tensor]]) -> Tensor:
        offsets, first = parts[0]
        if len(parts) == 1 and not any(offsets):
            return first
        shape = [max(place[axis] + part.shape[axis] for place, part in parts) for axis in range(first.ndim)]
        if sum(part.numel() for _, part in parts) != math.prod(shape):
            raise Damaged(f"{self.path}: a part of {name} is missing")
        joined = first.new_empty(shape)
        for place, part in parts:
            joined[tuple(slice(start, start + size) for start, size in zip(place, part.shape, strict=True))] = part
        return joined


def _places(content: bytes) -> dict[str, Any]:
    """Return {tensor: {"saved_offsets": its place in the whole tensor}} from the header of a shard."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["DCP_SHARDING_INFO"])


def read_shards(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Set tensors in place from shards whose digests have been verified; of a DTensor only its local part is read.

    targets: by name, with the prefixes `model/` and `optim/`. Raises CheckpointError. Each process reads for itself, so
    processes need not agree on anything here.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    _ignore_single_process_warning()
    try:
        dcp.load(dict(targets), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:  # not an Exception
        cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{folder} cannot be read: {type(cause).__name__}: {cause}") from None


def describe_shards(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of each tensor, from the headers of the shards. Raises CheckpointError."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {error}") from None
    return {name: (value.size, value.properties.dtype) for name, value in found.items()}  # type: ignore[union-attr]
