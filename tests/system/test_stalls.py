"""The stacks of a stalled process are written to a file of its own."""

from unmask.system.stalls import write_stacks


def test_each_of_several_processes_writes_its_stacks_to_its_own_file(tmp_path, monkeypatch):
    assert write_stacks(tmp_path).name == "stalled.txt"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, name in (("0", "stalled.txt"), ("2", "stalled-rank-2.txt")):
        monkeypatch.setenv("RANK", rank)
        assert write_stacks(tmp_path, f"rank {rank}").name == name
    assert (tmp_path / "stalled.txt").read_text().endswith("rank 0")
    assert (tmp_path / "stalled-rank-2.txt").read_text().endswith("rank 2")
