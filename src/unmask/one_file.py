"""Alias of `unmask.open_safetensors` for model cards that were written by earlier versions."""

from unmask.interop.safetensors_file import open_safetensors as open_safetensors
