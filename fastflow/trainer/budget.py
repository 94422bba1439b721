"""The time limit of a run."""

import math
import time

from fastflow.trainer.config import RunConfig

# Estimates fluctuate. In the first half of a run, fewer steps are planned only if the estimate is 5% below
# the plan; in the second half the plan has to hold, so any lower estimate counts. More steps are planned
# above 5%.
TOLERANCE = 0.05
# Default time limit for the photographs, in minutes: the example run ends within three minutes.
PHOTOS_MINUTES = 2.9
# An estimate is made after every this many steps, and at the first step after this many seconds.
STEPS_BETWEEN_ESTIMATES, SECONDS_BETWEEN_ESTIMATES = 50, 10
# Seconds allowed for pictures, codecs and writing at the end of a run.
SECONDS_FOR_PICTURES = 8


class TimeBudget:
    """The clock of a run, and the number of steps that fit into its time limit.

    Args:
        config: the run's settings; ``minutes`` is the limit.
        step: steps done when this process started.
        target_steps: steps planned so far.
        seconds: time used by earlier processes of the run.
        test_images: number of test images.
        eval_images: number of images that evaluations during training can use; None: the test images.
        began: time.monotonic() when this process began its setup.
    """

    def __init__(
        self,
        config: RunConfig,
        step: int,
        target_steps: int,
        seconds: float,
        test_images: int,
        began: float,
        eval_images: int | None = None,
    ) -> None:
        self.config, self.images = config, (test_images, eval_images)
        self.limit = 60 * (config.minutes or (PHOTOS_MINUTES if config.data == "photos" else math.inf))
        self.target_steps = target_steps
        self._seconds, self._began = seconds, began
        self._first_step, self._step_seconds = step, 0.0
        self._last_estimate_at = began

    def elapsed(self) -> float:
        """Seconds since the run began, over all its processes."""
        return self._seconds + time.monotonic() - self._began

    def start_step(self) -> None:
        self._step_began = time.monotonic()

    def end_step(self, step: int, target_steps: int) -> bool:
        """Record the time of a step; True if a new estimate changed ``self.target_steps``."""
        timed = step - self._first_step - 1  # the first step is not timed: it may have compiled code
        if not timed:
            return False
        now = time.monotonic()
        self._step_seconds += now - self._step_began
        due = (step - self._first_step) % STEPS_BETWEEN_ESTIMATES == 0
        due = due or now - self._last_estimate_at > SECONDS_BETWEEN_ESTIMATES
        if self.limit == math.inf or not due:
            return False
        self._last_estimate_at = now
        left = self.limit - self.elapsed()
        fitting = step + steps_that_fit(self.config, left, self._step_seconds / timed, *self.images)
        fitting = min(max(fitting, step + 1), self.config.steps)
        least = (1 - TOLERANCE) * target_steps if step < target_steps / 2 else target_steps
        if least <= fitting <= (1 + TOLERANCE) * target_steps:
            return False
        self.target_steps = fitting
        return True


def steps_that_fit(
    config: RunConfig,
    seconds: float,
    seconds_per_step: float,
    test_images: int,
    eval_images: int | None = None,
) -> int:
    """How many steps fit into ``seconds``, with their evaluations and the final one."""
    eval_images = test_images if eval_images is None else eval_images
    forward = (
        seconds_per_step / config.batch_size / 2
    )  # per image, on the safe side: a step takes three forwards
    end = SECONDS_FOR_PICTURES + forward * (test_images * config.final_samples + config.samples)
    evaluation = forward * min(config.eval_images, eval_images) * config.eval_samples
    per_step = seconds_per_step + evaluation / config.eval_every
    return max(0, int((seconds - end - evaluation) / per_step))
