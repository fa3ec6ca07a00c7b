"""Time budgets: adapt the number of steps so that a command takes a given time.

`Budget` counts from the start of the command. `Replan` records a change of the number of steps, and `place` maps a step
to the original schedule, so that the learning rate only depends on the step and the recorded changes. `Pacer` decides
when to change the number of steps. Only this module reads the clock; tests replace `clock`.
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

FEWEST_STEPS = 5  # A budget that allows fewer steps is rejected.
USEFUL_STEPS = 100  # If a budget allows fewer steps, a warning states the time that these would take.
AIM = 0.96  # Share of the budget that the command should take.
LATE, EARLY = (
    0.015,
    0.03,
)  # The number of steps changes if the forecast is late or early by more than this share of the budget.
LOOK = 0.01  # Time between two decisions, as a share of the budget.
WINDOW = 0.15  # Time over which speed is measured, as a share of the budget; at most half of the time left.
ASIDE_SHARE = 0.2  # Maximum share of the budget for evaluations and pictures.


clock = time.monotonic


def now() -> float:
    """Return the seconds of a clock that never goes back."""
    return clock()


@dataclass(frozen=True)
class Budget:
    """Seconds that a whole command may take. began: start of the command, on the clock of `now`."""

    seconds: float
    began: float = field(default_factory=now)

    def used(self) -> float:
        """Seconds since the command started."""
        return now() - self.began


def seconds_of(text: str) -> float:
    """Parse a time such as '30m', '2h', '90s' or '1.5h' to seconds. Raises UserError if the text is not such a time."""
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
    """Convert seconds, or a time such as '30m', to a Budget that begins now. A Budget or None is returned unchanged."""
    if budget is None or isinstance(budget, Budget):
        return budget
    return Budget(seconds_of(budget) if isinstance(budget, str) else budget)


class Replan(Settings):
    """A change of the number of steps from `before` to `steps` at optimiser step `step` (0-based)."""

    step: int = Field(ge=0)
    before: int = Field(gt=0)
    steps: int = Field(gt=0)


def require_order(replans: Sequence[Replan], steps: int) -> None:
    """Raise ValueError unless `replans` are in order, each continues the one before, and the last sets `steps`."""
    last, total = -1, replans[0].before if replans else steps
    for replan in replans:
        if not (last < replan.step < min(replan.before, replan.steps) and replan.before == total):
            raise ValueError(f"replans[step={replan.step}] does not continue the previous replan")
        last, total = replan.step, replan.steps
    if total != steps:
        raise ValueError(f"got steps={steps} after replans that lead to {total}")


def place(step: int, replans: Sequence[Replan]) -> float:
    """Map `step` to the corresponding (fractional) step of the original schedule.

    Each replan keeps the position in the schedule that was reached before, and spreads the rest of the schedule over
    the remaining steps.
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
    """Decides how many steps fit into the rest of a budget of `budget` seconds, of which `used` have passed.

    Time spent in `aside` (evaluations, pictures, checkpoints) is excluded from the time per step. The number of steps
    does not change before step `fixed`, because a resumed run repeats those steps.
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
        """Return the seconds since the start of the budget."""
        return now() - self._began

    def due(self) -> bool:
        """Return whether it is time to decide again about the number of steps."""
        return self.used() - self._looked >= LOOK * self.budget

    def expect(self, kind: str, seconds: float) -> None:
        """Set the seconds that interruptions of this `kind` are expected to take, until one has been measured."""
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
        """Return the seconds that the last interruption of this kind took, or the expected time."""
        return self._costs.get(kind, 0.0)

    def affords(self, kind: str, closing: float) -> bool:
        """Return whether most of the budget is left for training if there is one more interruption of this `kind`.

        closing: seconds needed after the last step.
        """
        most = ASIDE_SHARE * (self.budget - self._at_start)
        return self._spent + self.cost(kind) + closing <= most

    def restart(self, step: int) -> None:
        """Start measuring the time per step now, when `step` steps are done."""
        self._marks.clear()
        self._marks.append((self.used() - self._spent, step))

    def seconds_a_step(self) -> float | None:
        """Return the recent seconds per step, or None before the first measurement."""
        if len(self._marks) < 2:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (end - start) / (last - first)

    def steps(self, step: int, total: int, rest: float) -> int:
        """Return how many steps the run should have in all, or `total` if that still fits the budget.

        step, total: number of steps done and planned. rest: seconds of the remaining interruptions and of the work
        after the last step.
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
