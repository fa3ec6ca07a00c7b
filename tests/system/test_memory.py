"""Free memory of the machine, within the limits of its container."""

from types import SimpleNamespace

import psutil
import pytest

from unmask.engine.device import free_memory
from unmask.system import memory


def test_smallest_control_group_limit_applies(tmp_path):
    groups, inner = tmp_path / "cgroup", tmp_path / "cgroup" / "outer" / "inner"
    inner.mkdir(parents=True)
    membership = tmp_path / "self"
    membership.write_text("4:memory:/elsewhere\n0::/outer/inner\n")
    assert memory.container_bytes(groups, membership) is None, "no group has a limit"
    for folder, limit, used in ((inner, "max", 10), (inner.parent, "1000", 700), (groups, "5000", 100)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    assert memory.container_bytes(groups, membership) == 300
    (inner.parent / "memory.stat").write_text("anon 5\ninactive_file 50\n")
    assert memory.container_bytes(groups, membership) == 350, "the page cache can be reclaimed"
    membership.write_text("0::/\n")
    assert memory.container_bytes(groups, membership) == 4900


@pytest.mark.parametrize(("machine", "container", "free"), [(7, 5, 5), (5, 7, 5), (7, None, 7)])
def test_smaller_limit_of_machine_and_container_applies(monkeypatch, machine, container, free):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=machine))
    monkeypatch.setattr(memory, "container_bytes", lambda: container)
    assert free_memory("cpu") == free


def test_available_memory_of_this_machine_is_positive():
    assert 2**20 < free_memory("cpu") <= psutil.virtual_memory().total
