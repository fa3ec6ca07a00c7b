"""A run folder as training leaves it, written by hand: for tests of what reads runs."""

from pathlib import Path

from PIL import Image

from unmask.run import Run

PROBE = {
    "kind": "linear", "shots": None, "data": "birds", "test": "birds-test", "step": 40, "train_images": 1000,
    "test_images": 200, "classes": ["a", "b"], "chance": 0.5, "shared": 0, "verdict": "Pre-training helps.",
    "rows": [
        {"features": "raw pixels", "pool": "pixels", "accuracy": 0.6, "low": 0.53, "high": 0.67, "correct": 120,
         "total": 200, "c": 0.1},
        {"features": "pre-trained", "pool": "mean", "accuracy": 0.8, "low": 0.74, "high": 0.85, "correct": 160,
         "total": 200, "c": 0.1},
    ],
}  # fmt: skip
BASELINES = {
    "images": 64, "losses": [[0, 2.1], [20, 0.9], [40, 0.4]],
    "guesses": {"nearest_visible": 1.5, "visible_mean": 0.3},
}  # fmt: skip
PLAN = {
    "steps": 40, "images": {"size": [16, 24], "channels": 3, "dtype": "uint8"}, "num_images": 30, "batch_size": 8,
    "encoder_parameters": 1_200_000, "epochs": 10.7, "precision": "bf16", "device": "cpu",
    "reasons": ["40 steps: asked for"],
}  # fmt: skip


def make_run(path: Path, *, trained: bool = True) -> Run:
    run = Run.create(path)
    run.write(
        "config.json", {"recipe": "mae_nano", "method": {"name": "mae"}, "data": {"source": "a <b>bold</b> folder"}}
    )
    if not trained:
        return run
    run.write("plan.json", PLAN)
    run.write("provenance.json", {"command": "unmask pretrain birds", "versions": {"torch": "2.13.0"}})
    run.set_status("finished", 40, total=40)
    for step in range(1, 41):
        run.log({"step": step, "loss": 2 / step, "lr": 1e-3, "images_per_second": 100.0, "data_wait": 0.1})
    run.write("evals/baselines.json", BASELINES)
    run.write("evals/probe-linear-birds.json", PROBE)
    for step in (0, 1, 10, 20, 40):
        Image.new("RGB", (20, 10), (step, 0, 0)).save(run.pictures / f"step-{step:08d}.png")
    return run
