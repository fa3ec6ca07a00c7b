"""16-bit colour PNG: the installed Pillow supports the raw modes of the decoder, and there is a fall-back."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from corpus import noisy, png16
from PIL import Image

from unmask.data.decode import pillow_raw_mode
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.decode import decode

PIXELS = noisy(9, 7).astype(np.uint16) * 251 + 3  # every low byte differs from its high byte


@pytest.fixture
def changed(monkeypatch):
    """Simulate a Pillow that ignores the mode and raw mode."""
    monkeypatch.setattr(pillow_raw_mode, "set_raw_mode", lambda image, mode, raw_mode: image)
    pillow_raw_mode.works.cache_clear()
    yield
    pillow_raw_mode.works.cache_clear()


def test_installed_pillow_unpacks_both_bytes_of_a_sample():
    assert pillow_raw_mode.works(), (
        f"Pillow {Image.__version__} does not support the raw modes: use imagecodecs, or pin Pillow"
    )
    assert (decode(png16(PIXELS)) == PIXELS).all()


def test_imagecodecs_is_used_if_pillow_ignores_the_raw_modes(changed, monkeypatch):
    assert not pillow_raw_mode.works()
    monkeypatch.setitem(sys.modules, "imagecodecs", SimpleNamespace(png_decode=lambda data: PIXELS))
    assert (decode(png16(PIXELS)) == PIXELS).all()


def test_file_is_rejected_with_the_fix_without_raw_modes_and_imagecodecs(changed, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(BadImage, match=r"Pillow cuts to 8 bits; pip install 'unmask\[tiff\]'"):
        decode(png16(PIXELS))
