"""Choose the device and the precision, and measure free memory."""

from __future__ import annotations

import torch

from unmask.config import ConfigError
from unmask.system.memory import available_bytes


def choose_device(wanted: str) -> str:
    """Return the device to train on: cuda, mps or cpu for "auto". Raises ConfigError if the device is not available."""
    have = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if wanted == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if name in have)
    kind, colon, number = wanted.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in have or (colon and not (number.isdecimal() and int(number) < count)):
        if "cuda" in have:
            have[1:2] = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise ConfigError(f"got device {wanted!r}; expected one of this machine: {', '.join(have)}")
    return wanted


def choose_precision(wanted: str, device: str) -> tuple[str, str]:
    """Return ("bf16" or "fp32", reason).

    "auto" becomes bf16 only if the hardware supports it natively, because emulation is far slower.
    """
    if wanted != "auto":
        return wanted, f"{wanted}: the setting train.precision"
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "bf16: this GPU supports it natively"
        return "fp32", "fp32: this GPU does not support bf16 natively"
    if device != "cpu":
        return "fp32", f"fp32: the default on {device}"
    has = torch.cpu.get_capabilities()
    unit = next((name for name in ("amx_bf16", "avx512_bf16") if has.get(name)), None)
    if unit or (has.get("architecture") == "aarch64" and has.get("bf16")):
        return "bf16", f"bf16: this processor supports it natively ({unit or 'bf16'})"
    return "fp32", "fp32: this processor does not support bf16 natively, and emulation is many times slower"


def free_memory(device: str) -> int:
    """Return how many bytes of memory of the device could be allocated now; main memory for "cpu"."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else available_bytes()


def autocast(precision: str, device: str) -> torch.autocast:
    """Context manager for a forward pass in `precision`. Losses and patch statistics are still computed in float32."""
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=precision == "bf16")


def wait_for(value: torch.Tensor) -> None:
    """Wait until the device has computed `value` (0-d) and everything launched before it."""
    value.item()
