"""16-bit colour PNG: this Pillow still heeds the raw modes that the decoder sets; without them there is a fall-back."""

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
    """A Pillow that ignores the mode and raw mode that it is given."""
    monkeypatch.setattr(pillow_raw_mode, "set_raw_mode", lambda image, mode, raw_mode: image)
    pillow_raw_mode.works.cache_clear()
    yield
    pillow_raw_mode.works.cache_clear()


def test_this_pillow_unpacks_both_bytes_of_a_sample():
    assert pillow_raw_mode.works(), f"Pillow {Image.__version__} no longer does: use imagecodecs, or pin Pillow"
    assert (decode(png16(PIXELS)) == PIXELS).all()


def test_another_pillow_is_noticed_and_imagecodecs_takes_over(changed, monkeypatch):
    assert not pillow_raw_mode.works()
    monkeypatch.setitem(sys.modules, "imagecodecs", SimpleNamespace(png_decode=lambda data: PIXELS))
    assert (decode(png16(PIXELS)) == PIXELS).all()


def test_without_either_the_file_is_refused_with_the_remedy(changed, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(BadImage, match=r"cuts to 8 bits; pip install 'unmask\[tiff\]'"):
        decode(png16(PIXELS))
