"""JPEGs with harmless junk are read as if it were not there; damage that looks like junk is rejected."""

import io

import numpy as np
import pytest
from corpus import damaged, file_of, noisy, smooth
from PIL import Image

from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.decode import decode, header
from unmask.data.decode.layout import TOLERATED
from unmask.data.scan.scan import scan
from unmask.data.sources.open_source import open_source

BETWEEN, BEFORE_END, NO_END = TOLERATED


def photo(**options):
    """Return a JPEG with coarse and fine structure, like a photograph."""
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).resize((240, 160), Image.Resampling.BICUBIC)
    fine = np.clip(np.asarray(coarse).astype(int) + rng.integers(-20, 20, (160, 240, 3)), 0, 255).astype(np.uint8)
    return file_of(fine, "JPEG", quality=85, **options)


def segment_end(data):
    """Return the end of the first segment, a position between two segments."""
    return 4 + int.from_bytes(data[4:6], "big")


def with_junk(data, where, junk):
    if where == "before end":
        return data[:-2] + junk + data[-2:]
    if where == "for end":
        return data[:-2] + junk
    return data[: segment_end(data)] + junk + data[segment_end(data) :]


CASES = [
    ("before end", b"\0" * 16, (BEFORE_END,)),
    ("before end", b"\0" * 5000, (BEFORE_END,)),
    ("before end", b"\x55" * 40, (BEFORE_END,)),
    ("before end", b"made by camera 7", (BEFORE_END,)),
    ("before end", bytes(range(17, 217)), (BEFORE_END,)),
    ("for end", b"\0\0", (NO_END,)),
    ("for end", b"\0" * 400, (NO_END,)),
    ("between", b"\0\0\0", (BETWEEN,)),
    ("between", b"junk of 17 bytes.", (BETWEEN,)),
]


@pytest.mark.parametrize("kind", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}, {"gray": True}])
@pytest.mark.parametrize(("where", "junk", "expected"), CASES)
def test_harmless_junk_is_accepted_and_reported(where, junk, expected, kind):
    sound = photo(**kind) if "gray" not in kind else file_of(smooth(channels=1), "JPEG")
    if kind.get("progressive") and where == "before end" and len(set(junk)) > 1:
        pytest.skip("in a progressive JPEG, only padding can be distinguished from damage")
    data, tolerated = with_junk(sound, where, junk), []
    pixels = decode(data, tolerated=tolerated)
    assert tuple(tolerated) == expected
    assert header(data) == header(sound)
    assert (pixels == decode(sound)).all()
    if where != "for end":
        pillow = np.asarray(Image.open(io.BytesIO(data)))
        assert np.abs(pixels.reshape(pillow.shape).astype(int) - pillow).max() <= 2
    assert (decode(data, at_least=(20, 30)) == decode(sound, at_least=(20, 30))).all()


def test_several_harmless_faults_are_accepted_in_a_rotated_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    sound, tolerated = photo(exif=exif), []
    data = with_junk(with_junk(sound, "between", b"\x01\x02\x03"), "before end", b"\0" * 20)
    assert (decode(data, tolerated=tolerated) == decode(sound)).all()
    assert tolerated == [BETWEEN, BEFORE_END]


def test_intact_file_has_no_tolerated_faults():
    tolerated = []
    decode(photo(), tolerated=tolerated)
    assert tolerated == []


def test_missing_bytes_are_rejected():
    data = photo()
    for cut in (data[:-2], data[:-40], data[: len(data) // 2]):
        for tail in (b"", b"\0\0", b"\0" * 500, b"\xff\xd9", b"\0\0\xff\xd9"):
            if cut == data[:-2] and tail:
                continue
            with pytest.raises(BadImage):
                decode(cut + tail)


def test_damage_is_not_accepted_as_junk():
    """For most of these files, the strict decoder reports extraneous bytes: image blocks that were left unread."""
    refused_for_leftover = 0
    for seed in range(4):
        for data in (file_of(noisy(160, 240, seed=seed), "JPEG"), photo()):
            for share in np.linspace(0.3, 0.97, 12):
                try:
                    decode(damaged(data, float(share), 40))
                except BadImage as error:
                    refused_for_leftover += "extraneous bytes before marker 0xd9" in error.detail
                    continue
                tolerated = []
                decode(damaged(data, float(share), 40), tolerated=tolerated)
                assert not tolerated, f"damage at {share:.0%} was accepted as junk"
    assert refused_for_leftover > 10


def test_scan_counts_and_caches_tolerated_faults(tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("unmask.data.scan.scan_cache.WORTH_KEEPING", 0.0)
    monkeypatch.setattr("unmask.data.scan.scan_cache.COARSEST_CLOCK", -(10**18))
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        data = file_of(noisy(seed=number), "JPEG")
        (folder / f"{number}.jpg").write_bytes(with_junk(data, "before end", b"\0" * 16) if number < 4 else data)
    found = scan(open_source(folder))
    assert (found.good, found.tolerated) == (6, {BEFORE_END: 4})
    again = scan(open_source(folder))
    assert (again.known, again.tolerated) == (6, {BEFORE_END: 4})
