"""One update of the weights, and everything that must be saved to make the next one exactly as if nothing had happened."""
import math
from collections.abc import Callable, Sequence

import numpy as np

from tinyllm.anomaly import detect_anomaly
from tinyllm.backend import deterministic, random_stream
from tinyllm.nn import Module
from tinyllm.optim import AdamW, Control, LossScaler, OutlierDetector, global_norm, learning_rate
from tinyllm.tensor import Tensor
from tinyllm.train.config import TrainConfig
from tinyllm.train.parallel import Team

LOG_EVERY = 10  # updates between log lines on a GPU, where each costs the time in which it waits for the next launch
LossFunction = Callable[..., Tensor]  # loss_fn(model, batch, rng) -> mean loss over the batch's `weight` targets
silent = np.errstate(all="ignore")  # what overflows is found in the loss and the gradient's norm: no warning per array before it


class Diverged(FloatingPointError):
    """The loss or a gradient became NaN or infinite; the message says where, and what to try."""


def unread(loss: Tensor):
    """A loss as a number, or, where it lives on a device, as a 0-d array (in float64 too): reading it would wait for the device."""
    return loss.item() if isinstance(loss.data, np.ndarray) else loss.data.astype(np.float64)


class Trainer:
    """A model with its optimizer, loss scale and outlier statistics.

        for each micro-batch i:   gradient += scale·(wᵢ/Σw)·∇lossᵢ            wᵢ: targets that count, so that a mean over micro-batches
        norm = ‖gradient‖/scale   factor = min(1, clip/norm)/scale            is the mean over their tokens, as in one big batch
        weights ← AdamW(gradient·factor)                              (see optim.Control)

    config : with `steps` fixed (`TrainConfig.planned`).

    On a GPU `update` only says what is to be done, and returns while it is being done: nothing in it reads a number from the device. What
    came of it is read by `look`, which waits.
    """

    def __init__(self, model: Module, loss_fn: LossFunction, config: TrainConfig, precision: str = "fp32"):
        self.model, self.loss_fn, self.config = model, loss_fn, config
        deterministic(config.deterministic)
        self.optimizer = AdamW(model.named_parameters(), beta1=config.beta1, beta2=config.beta2, weight_decay=config.weight_decay)
        self.team = Team(self.optimizer)
        self.scaler = LossScaler.for_precision(precision)
        self.precision = precision
        self.outliers = {name: OutlierDetector(z=config.skip_outliers) for name in ("loss", "norm")} if config.skip_outliers else {}
        self.log_every = config.log_every or (1 if isinstance(self.optimizer.flat.data, np.ndarray) else LOG_EVERY)
        self.step = 0
        self.control = self._control()

    def _control(self) -> Control:
        return self.optimizer.control(self.scaler, clip=self.config.clip, detectors=self.outliers, precision=self.precision)

    @silent
    def update(self, batches: Sequence) -> int:
        """One update from the step's micro-batches. Returns how many targets it was made from."""
        loss, square = self.gradients(batches)
        self.control.step(loss, square, self._rate(self.step))
        self.team.group.sum()  # all blocks are updated
        self.step += 1
        return sum(batch.weight for batch in batches)

    def _rate(self, step: int) -> float:
        c = self.config
        return learning_rate(step, steps=c.steps, lr=c.lr, min_lr=c.min_lr, warmup=c.warmup, schedule=c.schedule)

    @silent
    def look(self, batches: Callable[[int], Sequence]) -> dict:
        """What there is to log of the newest update.

        batches(n) : the micro-batches of step n, should one have to be repeated.
        Raises Diverged where an update since the last look found a loss or gradient that is not finite; `step` and the weights are then as
        before that update.
        """
        verdict = self.control.read()
        if verdict.skipped == "divergence":
            self.step -= verdict.later + 1
            raise Diverged(self._diagnosis(verdict.loss, verdict.norm, batches(self.step)))
        record = dict(event="step", step=self.step, loss=verdict.loss, lr=self._rate(self.step - 1), grad_norm=verdict.norm)
        if self.precision == "fp16":
            record["loss_scale"] = verdict.scale
        if verdict.skipped:
            record["skipped"] = verdict.skipped
        return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in record.items()}  # JSON has no infinity

    def gradients(self, batches: Sequence) -> tuple:
        """Leave the (scaled) gradient g of the step's mean loss in the parameters (in a team each member has that of its blocks).

        Returns that loss, and Σ g²: numbers, or 0-d arrays where reading them would have to wait for a device.
        """
        (loss,) = self.team.sum(self._backward(batches, self.team.group.rank))
        return loss, self.team.square()

    def _backward(self, batches, rank: int):
        """The gradient and the loss of a member's rows."""
        self.optimizer.zero_grad()
        weights = [batch.weight for batch in batches]
        total, mean = max(sum(weights), 1), 0.0
        for i, batch in enumerate(batches):
            rows = self.team.part(batch, rank)
            if rows.weight or self.team.alone:
                share = rows.weight / total
                purpose = f"dropout {i}" if self.team.alone else f"dropout {i}, rank {rank}"
                loss = self.loss_fn(self.model, rows, random_stream(self.config.seed, purpose, self.step))
                loss.backward(self.control.scale * share)
                mean += unread(loss) * share
        return mean

    def _diagnosis(self, loss, norm, batches) -> str:
        """Repeat the step with every op watched, to name the first one that went wrong."""
        return (
            f"training diverged at step {self.step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}: {self._culprit(batches)}. "
            "Try a lower --lr, a longer --warmup, --clip 1, --qk-norm, or --precision fp32"
        )

    def _culprit(self, batches) -> str:
        for name, parameter in self.model.named_parameters():
            if not math.isfinite(global_norm(parameter.data)):
                return f"the weights {name!r} hold NaN or infinity"
        try:
            with detect_anomaly():
                for rank in range(self.team.group.size):  # the fault may lie in anybody's rows
                    self._backward(batches, rank)
        except FloatingPointError as error:
            return str(error)
        return "every op was finite when the step was repeated"

    def state(self) -> dict:
        """What a checkpoint must hold besides the arrays of model and optimizer. Random streams depend on seed and step alone.

        Waits for a device, and brings `optimizer.steps` up to date: so ask before `optimizer.state_dict()`.
        """
        self.control.read()
        outliers = {name: detector.state_dict() for name, detector in self.outliers.items()}
        return dict(step=self.step, precision=self.precision, scaler=self.scaler.state_dict(), outliers=outliers)

    def restore(self, model_arrays: dict, optimizer_arrays: dict, state: dict) -> None:
        """Continue where `state` was taken. A loss scale that belongs to another precision is not taken over."""
        self.model.load_state_dict(model_arrays)
        self.optimizer.load_state_dict(optimizer_arrays)
        if state.get("precision", self.precision) == self.precision:
            self.scaler.load_state_dict(state["scaler"])
        for name, detector in self.outliers.items():
            detector.load_state_dict(state["outliers"][name])
        self.step = state["step"]
        self.control = self._control()
