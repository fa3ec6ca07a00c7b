"""`unmask demo`: from nothing to a report."""

import json

import pytest

from unmask.commands.demo import demo


@pytest.mark.slow
def test_the_demo_from_nothing_to_a_report_with_both_sets(unmask, tmp_path):
    """Shortened to some steps: that it learns in its four minutes stands in docs/LOG.md, not in a test with a clock."""
    code, out, err = unmask("demo", "--steps", "40", "--out", "demo", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert set(summary["probes"]) == {"shapes-linear", "shapes-knn", "digits-linear", "digits-knn"}
    for probed in summary["probes"].values():
        assert probed["rows"][0]["features"] == "raw pixels"
        assert probed["shared"] == 0
    html = (tmp_path / "demo" / "report.html").read_text()
    assert html.count("<section>") == 2
    assert html.count("95 % interval</th>") == 4
    assert "before training" in html


@pytest.mark.parametrize(("steps", "weak"), [(387, True), (3200, False)])
def test_a_demo_that_had_time_for_few_steps_blames_the_steps(monkeypatch, capsys, tmp_path, steps, weak):
    class Trained:
        path = tmp_path

        def status(self):
            return {"state": "finished", "step": steps}

    monkeypatch.setattr("unmask.engine.pretrain.pretrain", lambda *_, **__: Trained())
    monkeypatch.setattr("unmask.evals.run_probe.run_probes", lambda *_: {})
    monkeypatch.setattr("unmask.report.run_page.write_report", lambda out: out / "report.html")
    demo(out=tmp_path)
    err = capsys.readouterr().err
    assert (f"only {steps} steps fitted" in err) == weak
    assert (f"unmask set {tmp_path} train.steps=" in err.replace("\n", " ")) == weak
