"""The learning rate of each step: a pure function of the step number, so that a resumed run needs no saved schedule."""
import math

from tinyllm.config import suggestion

WSD_DECAY = 0.2  # the last part of all steps in which "wsd" decays

# How much of lr - min_lr is left at progress x in [0, 1] of the decay.
_SHAPES = {
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "linear": lambda x: 1 - x,
    "constant": lambda x: 1.0,
    "wsd": lambda x: 1 - x,
}
SCHEDULES = tuple(_SHAPES)


def learning_rate(step: float, *, steps: float, lr: float, min_lr: float, warmup: float, schedule: str) -> float:
    """The learning rate of a step, counted from 0, in a run of `steps`.

    Warm-up, step < warmup:      lr·(step + 1)/(warmup + 1)               from lr/(warmup + 1), never 0, up to lr at step = warmup
    After it, with the progress  x = (step - start)/(steps - start), kept within [0, 1]:

        cosine     min_lr + (lr - min_lr)·(1 + cos πx)/2                  start = warmup
        linear     min_lr + (lr - min_lr)·(1 - x)                         start = warmup
        constant   lr
        wsd        as linear, lr before start                             start = steps·(1 - WSD_DECAY), or warmup where that is later

    From step = steps on it is min_lr (lr if constant). "wsd" is warm-up, stable, decay: a run can be prolonged from before its decay.

    Raises ValueError for an unknown schedule.
    Source: Loshchilov & Hutter 2017 (cosine); Hu et al. 2024, "MiniCPM", section 4 (wsd).
    """
    if schedule not in _SHAPES:
        raise ValueError(f"schedule {schedule!r} is unknown: use one of {', '.join(SCHEDULES)}{suggestion(schedule, SCHEDULES)}")
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    start = max(warmup, steps * (1 - WSD_DECAY)) if schedule == "wsd" else warmup
    x = 1.0 if step >= steps else max(0.0, (step - start) / (steps - start))
    return min_lr + (lr - min_lr) * _SHAPES[schedule](x)
