"""Run the training loop, and record in the run whether training finished, was stopped or failed."""

from __future__ import annotations

from dataclasses import replace

from unmask.console import Console, duration
from unmask.engine import checkpoint
from unmask.engine.job import TrainingInputs
from unmask.engine.samples import read_baselines
from unmask.engine.supervision import Supervise
from unmask.engine.time_budget import now
from unmask.engine.train import train
from unmask.engine.world import current, on_failure
from unmask.errors import UserError
from unmask.recipes import catalogue
from unmask.run import STATUS, Run


def train_and_record(inputs: TrainingInputs, supervise: Supervise | None = None) -> None:
    """Run the training loop, write the result of a supervised run, and record whether it finished, was stopped or
    failed.

    The status "finished" is recorded last. A run that is interrupted outside the loop is recorded as "stopped", not
    "failed". Errors of the loop are raised again.
    """
    run, plan, images, console, began = inputs.run, inputs.plan, inputs.images, inputs.console, now()
    on_failure(
        lambda error: record_state(run, "failed" if error else "stopped", console, total=plan.steps, error=error)
    )
    try:
        evaluator = write_result = None
        if supervise is not None:
            annotations, evaluator, write_result = supervise(run, inputs.config, plan, images.source)
            images = images.with_annotations(annotations)
        state = train(replace(inputs, images=images, evaluator=evaluator, began=began))
        if state == "finished" and write_result is not None:
            current().on_writer(lambda: write_result(run))
    except KeyboardInterrupt:
        record_state(run, "stopped", console, total=plan.steps)
        raise
    except BaseException as error:
        record_state(run, "failed", console, total=plan.steps, error=f"{type(error).__name__}: {error}")
        raise
    status = run.status()
    elapsed = now() - began
    total = max(elapsed, status.seconds)
    record_state(run, state, console, total=status.steps or plan.steps, seconds=total)
    on_failure(lambda error: None)  # what fails from now on is not this training
    time = duration(total) + (f" ({duration(elapsed)} since it was resumed)" if total > elapsed + 1 else "")
    if state == "stopped":
        console.print(f"stopped after {time}")
    else:
        console.print(f"finished {status.step} steps in {time}: {run.path}")
        if supervise is None:
            warn_above_baseline(run, console)


def warn_above_baseline(run: Run, console: Console) -> None:
    """Warn if the last loss on the images of the pictures is no better than the best baseline."""
    try:
        found = read_baselines(run)
    except (OSError, UserError):  # no picture was drawn
        return
    step = run.status().step
    fair = {name: value for name, value in found.guesses.items() if not name.startswith("true_")}
    measured, loss = found.losses[-1] if found.losses else (None, 0.0)
    if measured != step or not fair or loss < min(fair.values()):
        return
    name = min(fair, key=lambda name: fair[name])
    console.warn(
        f"the loss on the images of the pictures is {loss:.4f}, and that of an untrained baseline "
        f"({name.replace('_', ' ')}) is {fair[name]:.4f}: the features are hardly better than random. Train longer: "
        f"unmask set {run.path} train.steps={max(catalogue.FEWEST_STEPS, 2 * step)}; then: unmask resume {run.path}"
    )


def record_state(
    run: Run, state: str, console: Console, *, total: int, seconds: float | None = None, error: str | None = None
) -> None:
    """Write the status.

    If the status cannot be written, for example because a full disk ended the training, this is printed, not raised.
    """
    for _ in range(2):  # torch's signal handler may raise once more for the same dead loader worker
        try:
            step, so_far = checkpoint.newest_step(run) or 0, run.status().seconds or None
            run.set_status(state, step, total=total, seconds=seconds or so_far, error=error)
            return
        except OSError as fault:
            console.warn_once(f"cannot write {run.path / STATUS}: {fault.strerror}")
            return
        except (ValueError, RuntimeError):
            continue
