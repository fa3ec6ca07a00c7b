"""The feature cache: tables are restored unchanged, and only for the same encoder, images and settings."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from torch import nn

from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.evals import feature_cache as module
from unmask.evals.encoder_views import View
from unmask.evals.feature_cache import find, key_of, store
from unmask.evals.frozen_features import FeatureTable, Tokens

ABOUT = {"precision": "bf16", "device": "cpu", "crop": "{}"}
ROWS = np.arange(10)


@pytest.fixture
def source(tmp_path) -> Source:
    return open_source(write_images(tmp_path / "images", 10, classes=2))


def table(source: Source, rows=ROWS, *, cls=True, seed=0) -> FeatureTable:
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(len(rows), 6)).astype(np.float32)
    labels = None if source.labels is None else source.labels[rows]
    digest = rng.integers(0, 2**63, len(rows)).astype(np.uint64)
    return FeatureTable(rows, labels, mean + 1 if cls else None, mean, digest)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def same(one: FeatureTable | None, other: FeatureTable) -> bool:
    assert one is not None
    return all(np.array_equal(vars(one)[name], vars(other)[name]) for name in vars(other) if name != "tokens")


@pytest.mark.parametrize("cls", [True, False])
def test_a_stored_table_is_read_back_unchanged(source, tmp_path, cls):
    key = key_of(encoder(), source, ROWS, about=ABOUT)
    assert key is not None
    assert find(tmp_path / "features", key, source, ROWS) is None
    made = table(source, cls=cls)
    size = store(tmp_path / "features", key, made, ROWS)
    assert size == sum(file.stat().st_size for file in (tmp_path / "features").iterdir()) > 0
    assert same(find(tmp_path / "features", key, source, ROWS), made)
    source.labels = None
    found = find(tmp_path / "features", key, source, ROWS)
    assert found is not None
    assert found.labels is None, "labels are read from the source, not from the cached table"


def test_the_key_changes_with_everything_that_features_depend_on(source, tmp_path):
    net = encoder()
    keys = [key_of(net, source, ROWS, about=ABOUT)]
    assert keys[0] == key_of(copy.deepcopy(net), open_source(source.location), ROWS, about=ABOUT)
    keys.append(key_of(net, source, ROWS[:-1], about=ABOUT))
    keys.append(key_of(net, source, ROWS[::-1], about=ABOUT))
    keys.append(key_of(net, source, ROWS, about={**ABOUT, "precision": "fp32"}))
    keys += [key_of(View(net, layer), source, ROWS, about=ABOUT) for layer in (None, 0, 1)]
    keys += [key_of(View(net, 0, lambda _: torch.zeros(1), mask), source, ROWS, about=ABOUT) for mask in (0, 1)]
    net[0].weight.data[0, 0] += 1e-6
    keys.append(key_of(net, source, ROWS, about=ABOUT))
    net[1].running_mean += 1
    keys.append(key_of(net, source, ROWS, about=ABOUT))
    path = Path(source.location, source.names[3])
    data, before = path.read_bytes(), path.stat()
    path.write_bytes(data[:-1] + b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    keys.append(key_of(net, open_source(source.location), ROWS, about=ABOUT))
    assert len(set(keys)) == len(keys)
    assert None not in keys


def test_features_of_images_without_files_are_not_cached():
    assert key_of(encoder(), open_source("shapes:10"), ROWS, about=ABOUT) is None


def test_incomplete_tables_are_not_stored(source, tmp_path):
    some = table(source, ROWS[:-1])
    assert store(tmp_path / "features", "a", some, ROWS) == 0, "a table without an unreadable image is not stored"
    whole = table(source)
    tokens = Tokens(torch.zeros(10, 1, 6), torch.zeros(6), torch.ones(6))
    with_tokens = FeatureTable(whole.index, whole.labels, whole.cls, whole.mean, whole.digest, tokens)
    assert store(tmp_path / "features", "a", with_tokens, ROWS) == 0
    (tmp_path / "file").write_bytes(b"")
    assert store(tmp_path / "file", "a", whole, ROWS) == 0, "nowhere to write"
    assert not (tmp_path / "features").exists()


def test_a_damaged_table_is_treated_as_missing(source, tmp_path):
    made = table(source)
    store(tmp_path, "a", made, ROWS)
    file = tmp_path / "a.arrays"
    content, rng, useless = file.read_bytes(), np.random.default_rng(0), 0
    for place in rng.integers(0, len(content), 200).tolist():
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        for damaged in (bytes(flipped), content[:place]):
            file.write_bytes(damaged)
            found = find(tmp_path, "a", source, ROWS)
            useless += found is None
    assert useless == 400
    file.write_bytes(content)
    assert same(find(tmp_path, "a", source, ROWS), made)


def test_the_least_recently_used_tables_are_removed(source, tmp_path, monkeypatch):
    size = store(tmp_path, "a", table(source), ROWS)
    monkeypatch.setattr(module, "MAX_BYTES", 2 * size + 100)
    store(tmp_path, "b", table(source), ROWS)
    for number, name in enumerate("ab"):
        os.utime(tmp_path / f"{name}.arrays", (number, number))
    assert find(tmp_path, "a", source, ROWS) is not None  # used just now
    store(tmp_path, "c", table(source), ROWS)
    assert sorted(file.name for file in tmp_path.glob("*.arrays")) == ["a.arrays", "c.arrays"]
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    assert store(tmp_path, "d", table(source), ROWS) == 0
    assert not (tmp_path / "d.arrays").exists()
