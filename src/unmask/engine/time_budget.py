"""A time budget: the seconds that a command may take, and how many steps fit into what is left of them.

`Budget` counts from the start of the command. `Replan` records a change of the number of steps, and `place` maps a step
onto the schedule that was planned first, so that the learning rate is a function of the step and the recorded changes
alone. `Pacer` decides when the number of steps has to change. The clock is read here and nowhere else; tests replace
`clock`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pydantic import Field

from unmask.errors import UserError
from unmask.settings import Settings

FEWEST_STEPS = 5  # a budget with fewer is refused
USEFUL_STEPS = 100  # with fewer, the time that these need is reported
AIM = 0.96  # share of a budget at which everything should be done
LATE, EARLY = 0.015, 0.03  # a forecast further from that, as a share of the budget, changes the number of steps
LOOK = 0.01  # of a budget between two decisions
WINDOW = 0.15  # of a budget: the pace is measured over its last part, and never over more than half of what is left
ASIDE_SHARE = 0.2  # of a budget, for tests and pictures


clock = time.monotonic


def now() -> float:
    """Return seconds on a clock that never goes back."""
    return clock()


@dataclass(frozen=True)
class Budget:
    """Seconds that a whole command may take; `began` is when it started, on the clock of `now`."""

    seconds: float
    began: float = field(default_factory=now)

    def used(self) -> float:
        """Seconds since the command started."""
        return now() - self.began


def seconds_of(text: str) -> float:
    """Return the seconds of a time such as '30m', '2h', '90s' or '1.5h'. Raises UserError for anything else."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        value = float(text[:-1]) * units[text[-1:].lower()]
    except (KeyError, ValueError):
        raise UserError(
            f"got a time budget of {text!r}; expected a number with s, m, h or d, for example 30m"
        ) from None
    if not 0 < value < float("inf"):
        raise UserError(f"got a time budget of {text!r}; expected a positive time, for example 30m")
    return value


def as_budget(budget: float | str | Budget | None) -> Budget | None:
    """Return a number of seconds, or a time such as '30m', as a budget that begins now; a Budget or None as it is."""
    if budget is None or isinstance(budget, Budget):
        return budget
    return Budget(seconds_of(budget) if isinstance(budget, str) else budget)


class Replan(Settings):
    """From optimiser step `step` (0-based) on, a run of `before` steps has `steps` steps in all."""

    step: int = Field(ge=0)
    before: int = Field(gt=0)
    steps: int = Field(gt=0)


def require_order(replans: Sequence[Replan], steps: int) -> None:
    """Raise ValueError unless `replans` follow one another and lead to `steps`."""
    last, total = -1, replans[0].before if replans else steps
    for replan in replans:
        if not (last < replan.step < min(replan.before, replan.steps) and replan.before == total):
            raise ValueError(f"replans[step={replan.step}] does not follow the one before it")
        last, total = replan.step, replan.steps
    if total != steps:
        raise ValueError(f"got steps={steps} after replans that lead to {total}")


def place(step: int, replans: Sequence[Replan]) -> float:
    """Return where `step` stands on the schedule that was planned first, counted in its steps.

    Each replan keeps the place that has been reached and spreads the rest of the schedule over the steps that are left.
    """
    first = replans[0].before
    reached, begins, total = 0.0, 0, first
    for replan in replans:
        if replan.step > step:
            break
        reached += (first - reached) * (replan.step - begins) / (total - begins)
        begins, total = replan.step, replan.steps
    return reached + (first - reached) * (step - begins) / (total - begins)


class Pacer:
    """Decides how many steps fit into what is left of `budget` seconds, of which `used` are gone.

    Time spent in `aside` (tests, pictures, checkpoints) does not count as the pace of training. `fixed` is the step up
    to which the number of steps must stay as it is, because these steps were taken before, by a leg that was killed.
    """

    def __init__(self, budget: float, used: float, *, fixed: int = 0) -> None:
        self.budget, self.fixed = budget, fixed
        self._began = now() - used
        self._looked = used
        self._spent = 0.0
        self._at_start = used
        self._costs: dict[str, float] = {}
        self._marks: deque[tuple[float, int]] = deque()

    def used(self) -> float:
        """Seconds of the budget that are gone."""
        return now() - self._began

    def due(self) -> bool:
        """Whether it is time for a decision."""
        return self.used() - self._looked >= LOOK * self.budget

    def expect(self, kind: str, seconds: float) -> None:
        """Set what one `kind` of interruption costs, before it has been measured."""
        self._costs[kind] = seconds

    @contextmanager
    def aside(self, kind: str) -> Iterator[None]:
        """Context manager that measures an interruption of the training."""
        began = now()
        yield
        took = now() - began
        self._spent += took
        self._costs[kind] = took

    def cost(self, kind: str) -> float:
        """Seconds that one `kind` of interruption took last, or is expected to take."""
        return self._costs.get(kind, 0.0)

    def affords(self, kind: str, closing: float) -> bool:
        """Whether one more optional interruption leaves most of the budget for training; `closing` is needed later."""
        most = ASIDE_SHARE * (self.budget - self._at_start)
        return self._spent + self.cost(kind) + closing <= most

    def restart(self, step: int) -> None:
        """Measure the pace from here on, with `step` steps done."""
        self._marks.clear()
        self._marks.append((self.used() - self._spent, step))

    def seconds_a_step(self) -> float | None:
        """Return the recent pace; None before there is any."""
        if len(self._marks) < 2:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (end - start) / (last - first)

    def steps(self, step: int, total: int, rest: float) -> int:
        """Return how many steps the run should have, with `step` of now `total` done; `total` while that fits.

        rest: seconds of the interruptions still to come, and of what follows the last step.
        """
        used = self.used()
        trained = used - self._spent
        if not self._marks or step <= self._marks[-1][1]:
            self.restart(step)
            return total
        left = max(0.0, self.budget - used)
        if used - self._looked < LOOK * self.budget and (total - step) * 20 > total:
            return total
        self._looked = used
        self._marks.append((trained, step))
        window = min(WINDOW * self.budget, 0.5 * left)
        while len(self._marks) > 2 and self._marks[1][0] < trained - window:
            self._marks.popleft()
        pace = self.seconds_a_step()
        if pace is None or pace <= 0 or step <= self.fixed:
            return total
        target = AIM * self.budget
        late = used + (total - step) * pace + rest - target
        if -EARLY * self.budget <= late <= LATE * self.budget:
            return total
        return max(step + 1, step + int((target - used - rest) / pace))
