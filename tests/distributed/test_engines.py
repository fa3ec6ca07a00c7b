"""DDP, FSDP2 and HSDP have the losses of a single process, for every method and task."""

import json
import math
from pathlib import Path

import pytest
from group import run_script

SCRIPT = Path(__file__).with_name("train_all.py")
ENGINES = {"ddp": 2, "fsdp": 2, "hsdp": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function of an engine ("none" for a single process) that trains with it once; {case: curve}."""
    folder, found = tmp_path_factory.mktemp("engines"), {}

    def curves(kind: str) -> dict:
        if kind not in found:
            result = folder / f"{kind}.json"
            run_script(ENGINES.get(kind, 1), SCRIPT, folder / kind, str(result), kind)
            found[kind] = json.loads(result.read_text())
        return found[kind]

    return curves


@pytest.mark.parametrize("kind", ENGINES)
def test_losses_equal_those_of_one_process(trained, kind):
    alone, together = trained("none"), trained(kind)
    assert len(together) > 15
    for case, curve in together.items():
        if "not finite" not in case:
            assert curve["losses"] == pytest.approx(alone[case]["losses"], rel=1e-5), case
            assert curve["norms"] == pytest.approx(alone[case]["norms"], rel=1e-4), case


@pytest.mark.parametrize("kind", ENGINES)
def test_weights_at_step_0_are_the_same_bits(trained, kind):
    alone, together = trained("none"), trained(kind)
    assert {case: curve["start"] for case, curve in together.items()} == {
        case: alone[case]["start"] for case in together
    }


@pytest.mark.parametrize("kind", ENGINES)
def test_repeated_training_gives_the_same_bits(trained, kind):
    curves = trained(kind)
    assert curves["mae_nano, again"] == curves["mae_nano, whole"]


@pytest.mark.parametrize("kind", ENGINES)
def test_all_processes_skip_a_step_that_is_not_finite_in_one(trained, kind):
    """The loss of the step after it is that of weights that the step has not changed."""
    losses = trained(kind)["mae_nano, not finite"]["losses"]
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, True, True]
    assert losses[:2] == trained(kind)["mae_nano, whole"]["losses"][:2]


def test_hsdp_is_rejected_on_hosts_with_different_numbers_of_processes(tmp_path):
    run_script(3, SCRIPT.with_name("uneven_group.py"), tmp_path, seconds=60)
