"""One update of the weights, and everything that must be saved to make the next one exactly as if nothing had happened."""
import math
from collections.abc import Callable, Sequence

import numpy as np

from tinyllm.anomaly import detect_anomaly
from tinyllm.backend import random_stream
from tinyllm.nn import Module
from tinyllm.optim import AdamW, LossScaler, OutlierDetector, clip_factor, global_norm, learning_rate
from tinyllm.tensor import Tensor
from tinyllm.train.config import TrainConfig
from tinyllm.train.parallel import Team

LossFunction = Callable[..., Tensor]  # loss_fn(model, batch, rng) -> mean loss over the batch's `weight` targets
silent = np.errstate(all="ignore")  # what overflows is found in the loss and the gradient's norm: no warning per array before it


class Diverged(FloatingPointError):
    """The loss or a gradient became NaN or infinite; the message says where, and what to try."""


class Trainer:
    """A model with its optimizer, loss scale and outlier statistics.

        for each micro-batch i:   gradient += scale·(wᵢ/Σw)·∇lossᵢ            wᵢ: targets that count, so that a mean over micro-batches
        norm = ‖gradient‖/scale   factor = min(1, clip/norm)/scale            is the mean over their tokens, as in one big batch
        weights ← AdamW(gradient·factor)

    config : with `steps` fixed (`TrainConfig.planned`).
    """

    def __init__(self, model: Module, loss_fn: LossFunction, config: TrainConfig, precision: str = "fp32"):
        self.model, self.loss_fn, self.config = model, loss_fn, config
        self.optimizer = AdamW(model.named_parameters(), beta1=config.beta1, beta2=config.beta2, weight_decay=config.weight_decay)
        self.team = Team(self.optimizer)
        self.scaler = LossScaler.for_precision(precision)
        self.precision = precision
        self.outliers = {name: OutlierDetector(z=config.skip_outliers) for name in ("loss", "norm")} if config.skip_outliers else {}
        self.step = 0

    @silent
    def update(self, batches: Sequence) -> dict:
        """One update from the step's micro-batches. Returns what there is to log. Raises Diverged; the weights are then as before."""
        config, scale = self.config, self.scaler.scale
        loss, norm = self.gradients(batches)
        lr = learning_rate(
            self.step, steps=config.steps, lr=config.lr, min_lr=config.min_lr, warmup=config.warmup, schedule=config.schedule
        )
        record = dict(event="step", step=self.step + 1, loss=loss, lr=lr, grad_norm=norm, tokens=sum(batch.weight for batch in batches))
        if self.precision == "fp16":
            record["loss_scale"] = scale
        finite = math.isfinite(loss) and math.isfinite(norm)
        try:
            self.scaler.update(finite)
        except FloatingPointError as error:
            raise Diverged(self._diagnosis(loss, norm, batches)) from error
        if not finite:
            record.update(skipped="overflow", loss=loss if math.isfinite(loss) else None, grad_norm=None)
        elif self._is_outlier(loss, norm):
            record.update(skipped="outlier")
        else:
            self.optimizer.step(lr, (clip_factor(norm, config.clip) if config.clip else 1.0) / scale)
            self.team.group.sum()  # all blocks are updated
        self.step += 1
        return record

    def gradients(self, batches: Sequence) -> tuple[float, float]:
        """Leave the (scaled) gradient of the step's mean loss in the parameters (in a team each member has that of its blocks).

        Returns that loss, and the unscaled gradient's norm.
        """
        (loss,) = self.team.group.sum(self._backward(batches, self.team.group.rank))
        return loss, self.team.norm() / self.scaler.scale

    def _backward(self, batches, rank: int) -> float:
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
                loss.backward(self.scaler.scale * share)
                mean += loss.item() * share
        return mean

    def _is_outlier(self, loss: float, norm: float) -> bool:
        values = dict(loss=loss, norm=norm)
        return any([detector.update(values[name]) is not None for name, detector in self.outliers.items()])  # a list: both must see it

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
        """What a checkpoint must hold besides the arrays of model and optimizer. Random streams depend on seed and step alone."""
        return dict(step=self.step, scaler=self.scaler.state_dict(), outliers={k: d.state_dict() for k, d in self.outliers.items()})

    def restore(self, model_arrays: dict, optimizer_arrays: dict, state: dict) -> None:
        """Continue where `state` was taken."""
        self.model.load_state_dict(model_arrays)
        self.optimizer.load_state_dict(optimizer_arrays)
        self.scaler.load_state_dict(state["scaler"])
        for name, detector in self.outliers.items():
            detector.load_state_dict(state["outliers"][name])
        self.step = state["step"]
