"""Compiled blocks give the same results and are compiled once.

Memory that is kept during training is returned to the system.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from unmask.batch import Batch, ImageSpec
from unmask.console import Console
from unmask.engine import host_memory, train
from unmask.engine.compile import compile_blocks, why_not_compiled
from unmask.engine.host_memory import memory_kept
from unmask.engine.sharding import recompute_blocks
from unmask.method import Clock
from unmask.recipes.catalogue import find
from unmask.rng import Draws

COMPILED = """
import json, torch
from unmask.batch import Batch, ImageSpec
from unmask.method import Clock
from unmask.engine.compile import compile_blocks, uncompiled
from unmask.recipes.catalogue import find
from unmask.rng import Draws

def build(name):
    torch.manual_seed(0)
    return find(name).build(ImageSpec(3, (32, 32), "uint8", (120.0,) * 3, (60.0,) * 3))

def batch_of(count):
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(count), torch.zeros(count, dtype=torch.int64))

def step(method, number):
    batch = batch_of(4)
    method.zero_grad()
    loss = method(batch, Clock(0, 1, Draws(number, batch.epoch, batch.index))).value
    loss.backward()
    return loss.detach(), *(p.grad.clone() for p in method.encoder.parameters() if p.grad is not None)

def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward

found = {}
for name in ("mae_nano", "crossmae_nano", "simmim_nano", "igpt_nano"):
    torch.compiler.reset()
    graphs, written, compiled = [], build(name), build(name)
    blocks, differ = compile_blocks(compiled, backend), 0.0
    for number in range(3):
        for ours, theirs in zip(step(written, number), step(compiled, number), strict=True):
            differ = max(differ, float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-9)))
    after_steps, batch = len(graphs), batch_of(7)
    clock = Clock(0, 1, Draws(0, batch.epoch, batch.index))
    with torch.no_grad(), uncompiled():
        compiled.picture(batch, clock)
    after_picture = len(graphs)
    with torch.no_grad():
        compiled.picture(batch, clock)
    found[name] = [blocks, differ, after_steps, after_picture, len(graphs)]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_equal_blocks_are_compiled_once_for_all_masks_with_the_same_results():
    """Runs in a separate process, because the tests check types at run time and torch would compile the checks."""
    done = subprocess.run([sys.executable, "-c", COMPILED], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    for name, (_, differ, after_steps, after_picture, with_pictures_compiled) in found.items():
        assert differ < 1e-5, name
        assert after_steps == after_picture < with_pictures_compiled, name
    # MAE has three kinds of blocks: encoder, decoder, and the decoder's last one, which returns hidden patches only.
    assert {name: (blocks, graphs) for name, (blocks, _, graphs, *_) in found.items()} == {
        "mae_nano": (8, 3), "crossmae_nano": (10, 2), "simmim_nano": (6, 1), "igpt_nano": (6, 1)
    }  # fmt: skip


def test_method_without_blocks_compiles_nothing():
    assert compile_blocks(find("dvae_nano").build(ImageSpec(3, (32, 32), "uint8", (120.0,) * 3, (60.0,) * 3))) == 0


def test_reason_for_not_compiling_is_one_line(monkeypatch):
    def broken(*args, **settings):
        raise RuntimeError("\n  InvalidCxxCompiler: No working C++ compiler found\n  more of it")

    monkeypatch.setattr(torch, "compile", broken)
    assert why_not_compiled("cpu") == "InvalidCxxCompiler: No working C++ compiler found"


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")  # importing torch's own modules can raise this
def test_training_warns_why_it_continues_without_compiling(monkeypatch, capsys):
    def job(recipe: str):
        config = find(recipe)
        method = config.build(ImageSpec(3, (32, 32), "uint8", (120.0,) * 3, (60.0,) * 3))
        return SimpleNamespace(plan=SimpleNamespace(device="cpu"), console=Console(), method=method, config=config)

    monkeypatch.setattr(train, "why_not_compiled", lambda device: "no compiler")
    nano = job("mae_nano")
    train.compile_or_explain(nano.method, nano.config, nano.plan, nano.console)
    assert "torch.compile does not work here (no compiler)" in capsys.readouterr().err
    assert all(block._compiled_call_impl is None for block in nano.method.encoder.blocks)
    monkeypatch.setattr(train, "why_not_compiled", lambda device: None)
    dvae = job("dvae_nano")
    train.compile_or_explain(dvae.method, dvae.config, dvae.plan, dvae.console)
    assert "dvae has no transformer blocks" in capsys.readouterr().err
    train.compile_or_explain(nano.method, nano.config, nano.plan, nano.console)
    assert "compiling the transformer blocks" in capsys.readouterr().err
    assert all(block._compiled_call_impl is not None for block in nano.method.encoder.blocks)


class Libc:
    """A stand-in for libc that records its calls."""

    def __init__(self) -> None:
        self.told: list[tuple[int, ...]] = []

    def mallopt(self, number: int, value: int) -> None:
        self.told.append((number, value))

    def malloc_trim(self, pad: int) -> None:
        self.told.append((pad,))


@pytest.mark.parametrize(
    "environment", [{}, {"MALLOC_TRIM_THRESHOLD_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}]
)
def test_memory_is_returned_and_malloc_settings_of_the_user_are_kept(environment, monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    libc = Libc()
    monkeypatch.setattr(host_memory, "_glibc", lambda: libc)
    with memory_kept("cpu"):
        before = list(libc.told)
    assert before == ([] if environment else [(-1, -1), (-4, 0)])
    assert libc.told[len(before) :] == ([] if environment else [(-1, 131072), (-4, 65536), (0,)])


def test_malloc_is_not_configured_on_a_gpu(monkeypatch):
    monkeypatch.setattr(host_memory, "_glibc", lambda: pytest.fail("asked for"))
    with memory_kept("cuda"):
        pass


KEPT = """
import resource, sys, torch
from unmask.engine.host_memory import memory_kept
from unmask.engine.sharding import recompute_blocks
from unmask.method import Clock

def resident():
    return int(open("/proc/self/statm").read().split()[1])

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(12 << 20)  # 48 MiB, 12,288 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = resident()
with memory_kept(sys.argv[1]):
    faults()  # the allocator needs three to eight allocations until it reuses its memory
    print(faults(), resident() - before)
print(resident() - before)
"""


def kept(device: str) -> list[int]:
    """Return (page faults while twenty tensors are allocated and freed, pages held then, pages held afterwards)."""
    command = [sys.executable, "-c", KEPT, device]
    environment = {"OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux") or host_memory._glibc() is None, reason="this is glibc's")
def test_kept_memory_causes_no_page_faults_and_is_returned():
    (faults, held, afterwards), (usual, *_) = kept("cpu"), kept("cuda")
    assert usual > 20 * 12_000
    assert faults < 12_288, "not one of twenty allocations causes the page faults of its tensor"
    assert held > 12_000
    assert afterwards < held - 12_000


@pytest.mark.parametrize("recipe", ["mae_nano", "igpt_nano", "igpt_bert_nano"])
def test_recomputed_blocks_have_the_same_loss_and_gradients(recipe):
    images = ImageSpec(3, (16, 16), "uint8", (120.0,) * 3, (60.0,) * 3)

    def trained(recompute):
        torch.manual_seed(0)
        method = find(recipe).build(images)
        if hasattr(method, "head"):
            torch.nn.init.normal_(method.head.weight, std=0.3)  # its initial weights are zero
        if recompute:
            assert recompute_blocks(method) == sum(name.endswith(".mlp") for name, _ in method.named_modules())
        pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        batch = Batch(pixels, torch.arange(4), torch.zeros(4, dtype=torch.int64))
        if method.num_prepare:
            method.prepare(batch.images)
        loss = method(batch, Clock(0, 1, Draws(0, batch.epoch, batch.index))).value
        loss.backward()
        return [loss.detach(), *(p.grad for p in method.parameters() if p.grad is not None)]

    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))
