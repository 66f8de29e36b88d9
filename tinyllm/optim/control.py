"""What stands between a gradient and the weights: is it finite, is it too long, is it an outlier, and which loss scale comes next."""
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tinyllm.optim.clip import clip_factor
from tinyllm.optim.outliers import OutlierDetector
from tinyllm.optim.scaler import LossScaler


@dataclass(frozen=True)
class Verdict:
    """What became of a step.

    loss : its mean loss.     norm : of its gradient, the loss scale taken out.     scale : that loss scale.
    skipped : why no weight moved: "overflow" (of fp16: the next scale is smaller), "outlier" or "divergence"; None where they moved.
    later : how many steps were taken after it, in vain: after a divergence nothing changes any more.
    """

    loss: float
    norm: float
    scale: float
    skipped: str | None = None
    later: int = 0


class Control:
    """Takes each step's gradient, decides about it, and has the optimizer update the weights. Go through it alone: it counts.

        norm = √(Σ g²)/scale          g: the gradient of scale·loss
        finite loss and norm          weights ← optimizer(g·min(1, clip/norm)/scale), unless one of them is an outlier
        otherwise                     no weight moves, and the scale is halved; where it cannot be, the run has diverged: from there on no
                                      step does anything, so the weights stay those from which the bad gradient came

    scaler : says the scale, and how it goes on.     clip : longest norm, 0 for no limit.
    detectors : {"loss": …, "norm": …}, or fewer; an outlier of any is left out.

    `scale` is what the next loss is to be multiplied by. This one decides on the host, so a step waits until its gradient is there. On a
    GPU `Optimizer.control` may give one that decides there (see kernels/cuda/adamw.py): then `scale` is a 0-d array, and nothing waits
    but `read`, which also brings `scaler` and `optimizer.steps` up to date.
    """

    def __init__(self, optimizer, scaler: LossScaler, clip: float = 0.0, detectors: Mapping[str, OutlierDetector] | None = None):
        self.optimizer, self.scaler, self.clip, self.detectors = optimizer, scaler, clip, detectors or {}
        self.verdict: Verdict | None = None

    @property
    def scale(self):
        return self.scaler.scale

    def step(self, loss, square, lr: float) -> None:
        """One update with the gradient in the optimizer's `flat.grad`, unless there is a reason against it.

        loss : the step's mean loss.     square : Σ g² (see `Optimizer.square`).     Both numbers or 0-d arrays.
        """
        if self.verdict is not None and self.verdict.skipped == "divergence":
            self.verdict = replace(self.verdict, later=self.verdict.later + 1)
            return
        scale = self.scaler.scale
        loss, norm = float(loss), math.sqrt(float(square)) / scale
        skipped = self._reason_against(loss, norm)
        if skipped is None:
            self.optimizer.step(lr, (clip_factor(norm, self.clip) if self.clip else 1.0) / scale)
        self.verdict = Verdict(loss, norm, scale, skipped)

    def _reason_against(self, loss: float, norm: float) -> str | None:
        finite = math.isfinite(loss) and math.isfinite(norm)
        try:
            self.scaler.update(finite)
        except FloatingPointError:
            return "divergence"
        if not finite:
            return "overflow"
        values = dict(loss=loss, norm=norm)
        outliers = [detector.update(values[name]) is not None for name, detector in self.detectors.items()]  # a list: all must see it
        return "outlier" if any(outliers) else None

    def read(self) -> Verdict | None:
        """What became of the newest step, or of the one that diverged; None before the first."""
        return self.verdict
