"""Test `unmask demo`."""

import json

import pytest

from unmask.commands.demo import demo
from unmask.results import PRETRAINED, RANDOM_INIT, RAW_PIXELS, FeatureScore, ImageSet, ProbeResult, TestIdentity
from unmask.run_status import RunStatus


@pytest.mark.slow
def test_demo_trains_probes_and_reports(unmask, tmp_path):
    """Runs only 40 steps. docs/LOG.md records what the demo learns in four minutes."""
    code, out, err = unmask("demo", "--steps", "40", "--out", "demo", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert set(summary["probes"]) == {"linear", "knn"}
    for probed in summary["probes"].values():
        assert probed["rows"][0]["features"] == "raw pixels"
        assert probed["shared"] == 0
    html = (tmp_path / "demo" / "report.html").read_text()
    assert html.count("<section>") == 1
    assert html.count("95% interval</th>") == 2
    assert "before training" in html
    done, result, picture, following = err.strip().splitlines()[-4:]
    assert done.startswith("done in ")
    best = {
        name: max(row["value"] for row in summary["probes"]["linear"]["rows"] if row["features"] == name)
        for name in ("pre-trained", "random init", "raw pixels")
    }
    assert result == (
        f"result: a linear probe classifies {best['pre-trained']:.1%} of shapes-test with the pre-trained features, "
        f"{best['random init']:.1%} with the same encoder untrained, and {best['raw pixels']:.1%} with raw pixels"
    )
    assert picture == "picture: demo/pictures/step-00000040.png; all results: demo/report.html"
    assert (tmp_path / summary["picture"]).is_file()
    assert following == "next, on a folder of your own images: unmask pretrain PHOTOS --budget 30m"


@pytest.mark.parametrize(("steps", "weak"), [(387, True), (3200, False)])
def test_demo_with_few_steps_warns_of_weak_results(monkeypatch, capsys, tmp_path, steps, weak):
    class Trained:
        path = pictures = tmp_path

        def status(self):
            return RunStatus(state="finished", step=steps)

    monkeypatch.setattr("unmask.engine.pretraining.pretrain", lambda *_, **__: Trained())
    rows = tuple(FeatureScore(features=name, pool="cls", value=0.5) for name in (PRETRAINED, RANDOM_INIT, RAW_PIXELS))
    images = ImageSet(name="shapes")
    probe = ProbeResult(kind="linear", data=images, test=TestIdentity(images=images), rows=rows)
    monkeypatch.setattr("unmask.evals.run_probe.run_probes", lambda *_: {"linear": probe})
    monkeypatch.setattr("unmask.report.run_page.write_report", lambda out: out / "report.html")
    demo(out=tmp_path)
    err = capsys.readouterr().err
    assert "50.0%" in err
    assert (f"only {steps} steps fitted" in err) == weak
    assert (f"unmask set {tmp_path} train.steps=" in err.replace("\n", " ")) == weak
