"""Loss scaling keeps the small gradients of half precision from vanishing.

The smallest number that fp16 holds is 2⁻²⁴ ≈ 6·10⁻⁸; smaller gradients become 0. Gradients are linear in the loss, so backward() from
S·loss makes each of them S times as large on its whole way, and dividing by S in float32 undoes it, exactly so when S is a power of
two. The best S lies just below the one where the largest gradient passes 65504 and becomes infinite. Nobody knows it beforehand, and it
moves during training, so it is searched for: doubled after a while without overflow, halved at an overflow, whose update is left out.

    (loss * scaler.scale).backward()
    norm = global_norm(optimizer.flat.grad) / scaler.scale
    if math.isfinite(norm):
        optimizer.step(lr, grad_scale=clip_factor(norm, maximum) / scaler.scale)
    scaler.update(math.isfinite(norm))

Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2.
"""
from tinyllm.backend import PRECISIONS


class LossScaler:
    """`scale` is what to multiply the next loss by.

    initial : the first scale, a power of two.     growth_interval : how many good steps in a row double it; None: it never grows.
    minimum : no scale below this is tried.
    """

    def __init__(self, initial: float = 2.0**16, growth_interval: int | None = 2000, minimum: float = 1.0):
        if not initial >= minimum > 0 or (growth_interval is not None and growth_interval < 1):
            raise ValueError(
                "LossScaler takes initial ≥ minimum > 0 and growth_interval ≥ 1 (or None), "
                f"got initial {initial}, minimum {minimum}, growth_interval {growth_interval}"
            )
        self.scale, self.growth_interval, self.minimum = float(initial), growth_interval, float(minimum)
        self.good_steps = 0

    @classmethod
    def for_precision(cls, precision: str) -> "LossScaler":
        """The dynamic scale for fp16; the constant 1 for fp32 and bf16, whose exponent reaches down to 10⁻³⁸."""
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is unknown: use one of {', '.join(PRECISIONS)}")
        return cls() if precision == "fp16" else cls(initial=1.0, growth_interval=None)

    def update(self, finite: bool) -> None:
        """Take note of whether the gradients of this step were finite, and set the next scale.

        Raises FloatingPointError for an overflow at the smallest scale (so, in fp32 and bf16, for the first one): smaller gradients
        would not help, the model itself diverges.
        """
        if finite:
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.scale, self.good_steps = self.scale * 2, 0
        elif self.scale / 2 < self.minimum:
            raise FloatingPointError(
                f"the gradients are not finite, and the loss scale cannot fall below {self.minimum:g}: the model itself diverges; "
                "lower the learning rate or clip harder"
            )
        else:
            self.scale, self.good_steps = self.scale / 2, 0

    def state_dict(self) -> dict:
        """What changes from step to step, fit for JSON."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken."""
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
