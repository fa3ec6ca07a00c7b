"""`unmask doctor DATA`: the reported limit is the slowest part, and the advice depends on it."""

import time

import pytest
from conftest import write_images

from unmask.console import Console
from unmask.data.decode import decode
from unmask.data.sources.image_files import FilesSource
from unmask.engine import bottleneck
from unmask.engine.bottleneck import DECODING, STEP, STORAGE, TRANSFORM, Pace, find_bottleneck
from unmask.errors import UserError


def pace(read=0.001, decode=0.002, transform=0.0005, step=0.001, *, workers=1, cores=16, cached=False, **more) -> Pace:
    load = transform if cached else read + decode + transform
    return Pace(read, decode, transform, step, workers, cores, cached, loaded=max(1, workers) / load, **more)


def test_slow_step_is_the_limit_and_needs_no_advice():
    found = pace(step=0.01)
    assert (found.limit, found.wait, found.advice("d")) == (STEP, 0.0, [])
    assert found.enough_workers == 1


def test_more_workers_are_advised_if_cores_are_idle():
    found = pace()
    assert found.limit == DECODING
    assert found.wait == pytest.approx(1 - 1 / 3.5)
    assert found.enough_workers == 5, "loading is 3.5 times as slow as the step, and a fifth is added as reserve"
    assert found.advice("d")[0] == "--set data.workers=5"
    assert "unmask pack d" not in " ".join(found.advice("d")), "the images are small already"
    assert "unmask pack d" in pace(large=True).advice("d")[1]
    assert pace(workers=5).advice("d") == []
    assert pace(workers=5).limit == STEP


def test_slowest_part_of_loading_is_the_limit():
    assert pace(read=0.01).limit == STORAGE
    assert "disk" in " ".join(pace(read=0.01).advice("d"))
    assert pace(transform=0.01).limit == TRANSFORM
    assert "data.size" in " ".join(pace(transform=0.01).advice("d"))
    assert "jitter" not in " ".join(pace(transform=0.01).advice("d"))
    assert "jitter" in " ".join(pace(transform=0.01, jitter=True).advice("d"))
    assert "unmask pack d" in " ".join(pace(transform=0.01, cached=True, large=True).advice("d"))


def test_more_workers_than_cores_are_not_advised():
    advice = " ".join(pace(cores=2).advice("d"))
    assert "data.workers" not in advice
    assert "2 cores" in advice


def test_cached_images_only_take_the_time_of_the_transform():
    found = pace(read=1.0, decode=1.0, workers=0, cached=True)
    assert found.load == 0.0005
    assert found.limit == STEP
    assert found.wait == pytest.approx(1 / 3), "without workers, loading and the step alternate"
    assert pace(transform=0.002, workers=0, cached=True).limit == TRANSFORM


@pytest.mark.parametrize("slow", [STORAGE, DECODING])
def test_slow_part_is_measured(tmp_path, monkeypatch, slow):
    monkeypatch.setattr(bottleneck, "measure_step_seconds", lambda *_, **__: 0.0001)
    monkeypatch.setattr(bottleneck, "PATIENCE", 0.3)
    place = (FilesSource, "read") if slow == STORAGE else (decode, "decode")
    usual = getattr(*place)

    def late(*given, **named):
        time.sleep(0.03)
        return usual(*given, **named)

    monkeypatch.setattr(*place, late)
    data = str(write_images(tmp_path / "images", 12))
    settings = ["data.size=[16,16]", "train.device=cpu", "data.cache=false", "data.workers=0", "train.batch_size=8"]
    found = find_bottleneck(data, Console(quiet=True), recipe="mae_nano", settings=settings)
    assert found["limit"] == slow
    assert found["read" if slow == STORAGE else "decode"] >= 0.03
    assert found["wait"] > 0.9
    assert found["enough_workers"] >= 1.2 * 0.03 / (0.0001 / 8)


def test_fast_loader_with_a_slow_step_is_not_the_limit(images, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(Console, "print", lambda _, text="": said.append(text))
    monkeypatch.setattr(bottleneck, "measure_step_seconds", lambda *_, **__: 60.0)
    monkeypatch.setattr(bottleneck, "PATIENCE", 0.2)
    (images / "bad.png").write_bytes(b"no image")
    settings = ["train.device=cpu", "data.workers=1", "data.cache=false", "data.max_bad_fraction=0.2"]
    found = find_bottleneck(str(images), Console(), settings=settings)
    assert (found["limit"], found["advice"], found["workers"]) == (STEP, [], 1)
    assert [line.split()[0] for line in said[1:5]] == ["read", "decode", "transform", "step"]
    assert said[-1] == "the limit is the step, and data.workers=1 would suffice"


@pytest.mark.parametrize("cache", ["true", "false"])
def test_repeated_samples_are_timed(images, monkeypatch, cache):
    monkeypatch.setattr(bottleneck, "measure_step_seconds", lambda *_, **__: 0.01)
    monkeypatch.setattr(bottleneck, "PATIENCE", 0.3)
    settings = ["data.size=[16,16]", "train.device=cpu", f"data.cache={cache}", "data.workers=0", "train.batch_size=8"]
    found = find_bottleneck(str(images), Console(quiet=True), recipe="mae_nano", settings=[*settings, "data.repeats=2"])
    assert found["transform"] > 0


def test_decoding_is_shared_between_repeated_samples(images, monkeypatch):
    monkeypatch.setattr(bottleneck, "measure_step_seconds", lambda *_, **__: 0.01)
    monkeypatch.setattr(bottleneck, "PATIENCE", 0.3)
    usual = decode.decode
    monkeypatch.setattr(decode, "decode", lambda *a, **more: time.sleep(0.04) or usual(*a, **more))
    settings = ["data.size=[16,16]", "train.device=cpu", "data.cache=false", "data.workers=0", "train.batch_size=8"]
    found = find_bottleneck(str(images), Console(quiet=True), recipe="mae_nano", settings=[*settings, "data.repeats=4"])
    assert 0.01 <= found["decode"] < 0.02
    assert found["loaded"] < 100


def test_unusable_images_are_rejected(tmp_path, images):
    with pytest.raises(UserError, match="learns from labels"):
        find_bottleneck(str(images), Console(quiet=True), recipe="finetune_nano")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 1 files"):
        find_bottleneck(str(bad), Console(quiet=True))
