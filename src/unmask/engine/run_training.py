"""Run the training loop and record in the Run how it ended."""

from __future__ import annotations

from dataclasses import replace

from unmask.console import Console, duration
from unmask.engine import checkpoint
from unmask.engine.job import TrainingInputs
from unmask.engine.samples import BASELINES
from unmask.engine.supervision import Supervise
from unmask.engine.time_budget import now
from unmask.engine.train import train
from unmask.errors import UserError
from unmask.recipes import catalogue
from unmask.run import STATUS, Run


def train_and_record(inputs: TrainingInputs, supervise: Supervise | None = None) -> None:
    """Run the loop, write the result of a supervised run, and record in the Run how that ended.

    "finished" is recorded after all of the work; a run that is interrupted outside the loop is stopped, not failed.
    Raises what the loop raises.
    """
    run, plan, images, console, began = inputs.run, inputs.plan, inputs.images, inputs.console, now()
    try:
        evaluator = write_result = None
        if supervise is not None:
            images.annotations, evaluator, write_result = supervise(run, inputs.config, plan, images.source)
        state = train(replace(inputs, evaluator=evaluator, began=began))
        if state == "finished" and write_result is not None:
            write_result(run)
    except KeyboardInterrupt:
        record_state(run, "stopped", console, total=plan.steps)
        raise
    except BaseException as error:
        record_state(run, "failed", console, total=plan.steps, error=f"{type(error).__name__}: {error}")
        raise
    status = run.status()
    now_took = now() - began
    took = max(now_took, status.seconds)
    record_state(run, state, console, total=status.steps or plan.steps, seconds=took)
    said = duration(took) + (f" ({duration(now_took)} of it since it was resumed)" if took > now_took + 1 else "")
    if state == "stopped":
        console.print(f"stopped after {said}")
    else:
        console.print(f"finished {status.step} steps in {said}: {run.path}")
        if supervise is None:
            warn_above_baseline(run, console)


def warn_above_baseline(run: Run, console: Console) -> None:
    """Warn when the last loss on the images of the pictures is no better than the best baseline; name what to do."""
    try:
        found, step = run.read(BASELINES), run.status().step
        fair = {name: value for name, value in found["guesses"].items() if not name.startswith("true_")}
        measured, loss = found["losses"][-1]
    except (OSError, UserError, KeyError, IndexError):  # no picture was drawn
        return
    if measured != step or not fair or loss < min(fair.values()):
        return
    name = min(fair, key=lambda name: fair[name])
    console.warn(
        f"the loss on the images of the pictures is {loss:.4f}; the baseline ({name.replace('_', ' ')}), which needs "
        f"no training, scores {fair[name]:.4f}: the features are hardly better than random ones yet. Train longer: "
        f"unmask set {run.path} train.steps={max(catalogue.FEWEST_STEPS, 2 * step)}; then: unmask resume {run.path}"
    )


def record_state(
    run: Run, state: str, console: Console, *, total: int, seconds: float | None = None, error: str | None = None
) -> None:
    """Write the status; a failure is reported, not raised, because the disk may be what ended the training."""
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
