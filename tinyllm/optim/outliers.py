"""Finding the updates that are better left out: a batch of garbage shows in its loss, or in its gradient norm, as a sudden jump."""
import math
import statistics
from collections import deque


class OutlierDetector:
    """Compares each value with the `window` values before it.

        z = (value - mean)/σ          mean and standard deviation of the window, σ² = Σ(x - mean)²/window

    window : how many values, ≥ 2.     z : how many σ above the mean makes an outlier, > 0.

    Only jumps upwards count. An outlier enters the window all the same, so that a loss that has come to stay on a higher level is
    soon the new normal and the run does not leave out updates for ever. A value that is not finite stays outside: it would spoil
    the mean. Use one detector for the loss and one for the gradient norm.
    Source: llm.c (Karpathy et al. 2024), which leaves out updates this way.
    """

    def __init__(self, window: int = 128, z: float = 6.0):
        if window < 2 or not z > 0:
            raise ValueError(f"OutlierDetector takes window ≥ 2 and z > 0, got window {window} and z {z}")
        self.z = z
        self.values = deque(maxlen=window)

    def update(self, value: float) -> float | None:
        """The z-score of an outlier, else None; None also until the window is full.

        NaN and infinity are outliers of infinite z, at any time; so is any rise above a window without spread.
        """
        if not math.isfinite(value):
            return math.inf
        z = self._score(value) if len(self.values) == self.values.maxlen else 0.0
        self.values.append(float(value))
        return z if z > self.z else None

    def _score(self, value: float) -> float:
        mean, deviation = statistics.mean(self.values), statistics.pstdev(self.values)  # in exact fractions: no huge value overflows
        if deviation == 0:
            return math.inf if value > mean else 0.0
        return (value - mean) / deviation

    def state_dict(self) -> dict:
        """The window, fit for JSON."""
        return {"values": list(self.values)}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken; of a longer window the last values count."""
        self.values = deque(state["values"], maxlen=self.values.maxlen)
