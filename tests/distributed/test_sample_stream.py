"""The images, crops and masks of each step do not depend on the number of processes, of loader workers, or of stops."""

import pytest
from compare_streams import Streams


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """Runs with 1, 2 and 4 processes and 0 and 2 workers, one that continues with others, and one with a fault."""
    made = Streams(tmp_path_factory.mktemp("stream"), steps=8)
    same = made.command("same", 0, same_stream=True)
    made.run(2, made.command("2-0", 0), made.command("2-2", 2), same, made.command("moved", 0, stop_after=3))
    made.run(4, made.command("4-0", 0), made.command("4-2", 2), made.command("moved", 2, stop_after=6))
    made.run(1, made.command("1-0", 0), made.command("1-2", 2), made.command("moved", 0))
    return made


@pytest.mark.parametrize("name", ["1-0", "1-2", "2-0", "2-2", "4-0", "4-2", "moved"])
def test_all_processes_together_train_on_the_same_stream(streams, name):
    assert streams.digests(name) == streams.digests("1-0")
    streams.require_once(name)
    assert len(set(streams.digests(name))) == streams.steps


def test_a_run_in_which_all_processes_get_the_same_images_is_found(streams):
    """Negative control: the fault of a published trainer."""
    assert streams.digests("same") != streams.digests("2-0")
    with pytest.raises(AssertionError, match="images of epoch 0"):
        streams.require_once("same")
