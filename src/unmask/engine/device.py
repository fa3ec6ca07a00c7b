"""Where and how to compute: device, precision, free memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from unmask.config import ConfigError


def choose_device(wanted: str) -> str:
    """ "auto" -> cuda, mps or cpu. Raises ConfigError for a device this machine does not have."""
    have = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if wanted == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if name in have)
    kind, colon, number = wanted.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in have or (colon and not (number.isdecimal() and int(number) < count)):
        if "cuda" in have:
            have[1:2] = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise ConfigError(f"device {wanted!r} is not available here; this machine has {', '.join(have)}")
    return wanted


def choose_precision(wanted: str, device: str) -> tuple[str, str]:
    """("bf16" | "fp32", reason): bf16 where the device computes in it natively; emulated it is up to 100x slower."""
    if wanted != "auto":
        return wanted, f"{wanted}: asked for"
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "bf16: this GPU computes in it natively"
        return "fp32", "fp32: this GPU has no native bf16"
    if device != "cpu":
        return "fp32", f"fp32: the safe choice on {device}"
    has = torch.cpu.get_capabilities()
    unit = next((name for name in ("amx_bf16", "avx512_bf16") if has.get(name)), None)
    if unit or (has.get("architecture") == "aarch64" and has.get("bf16")):
        return "bf16", f"bf16: this processor computes in it natively ({unit or 'bf16'})"
    return "fp32", "fp32: this processor has no native bf16 and would emulate it many times slower"


def free_memory(device: str) -> int:
    """Bytes that could be allocated now: of the GPU, or of this machine or the container that it runs in."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    told = [room for room in (_machine_room(), _container_room()) if room is not None]
    if told:
        return min(told)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system tells
        return 4 << 30


def _machine_room(file: Path = Path("/proc/meminfo")) -> int | None:
    """Linux's own estimate, which counts the page cache as free where it can be given up."""
    return next((int(size.split()[0]) * 1024 for key, size in _table(file, ":") if key == "MemAvailable"), None)


def _container_room(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the narrowest control group (version 2) above this process leaves; its page cache can be given up too."""
    path = next((path for key, path in _table(membership, "::") if key == "0"), "/").strip().lstrip("/")
    rooms = []
    for group in (groups / path, *(groups / path).parents):
        if not group.is_relative_to(groups):
            break
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
        except (OSError, ValueError):
            continue
        if limit.isdecimal():
            cache = next((int(size) for key, size in _table(group / "memory.stat", " ") if key == "inactive_file"), 0)
            rooms.append(max(0, int(limit) - used + cache))
    return min(rooms, default=None)


def _table(file: Path, between: str) -> list[tuple[str, str]]:
    """The lines of a small system file in two parts; nothing where there is no such file."""
    try:
        parts = [line.partition(between) for line in file.read_text().splitlines()]
    except OSError:
        return []
    return [(key, value) for key, _, value in parts]


def autocast(precision: str, device: str) -> torch.autocast:
    """The context of a forward pass. Losses and patch statistics inside compute in float32 all the same."""
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=precision == "bf16")


def wait_for(value: torch.Tensor) -> None:
    """Returns when the device has computed `value` (0-d), and all that it was given before."""
    value.item()
