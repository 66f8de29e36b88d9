"""What follows from a gradient, decided and done on the device: its norm, the clip factor, the loss scale, AdamW, the 16-bit copies.

The host only says that it is to be done. What came of it lies in one small array on the device, which the host reads where it wants to
know (`Control.read`), typically once in ten steps; until then it can be far ahead with launching.
"""
import numpy as np

from tinyllm.backend import array_module
from tinyllm.kernels import attach_module
from tinyllm.kernels.cuda import halves
from tinyllm.kernels.cuda.launch import FORMATS, launch
from tinyllm.kernels.cuda.storage import dtype_of
from tinyllm.optim import AdamW, Control, LossScaler, Optimizer, Verdict

BLOCK = 256  # threads; the kernels count on it
PARTS = 1024  # partial sums of squares, at most
STATE = (
    "scale", "good_steps", "updates", "diverged", "later", "loss", "norm", "used_scale", "moved",
    "keep", "mean_factor", "square_factor", "rate", "epsilon",
)  # fmt: skip  # as adamw.cu numbers them


@attach_module(Optimizer, "square", "cuda")
def square(optimizer):
    """`Optimizer.square` as a 0-d array on the device: nothing waits for it."""
    grad = optimizer.flat.grad
    if not _is_ours(grad):
        return NotImplemented
    return sum_of_squares(grad)


def sum_of_squares(x):
    """Σ x² in double, as a 0-d array, the same bits every time.     (n,) fp32, contiguous"""
    xp = array_module(x)
    parts = min(PARTS, -(-x.size // (4 * BLOCK)))
    partial, result = xp.empty(parts, dtype=xp.float64), xp.empty((), dtype=xp.float64)
    launch(xp, "adamw", "squares", (parts,), BLOCK, x, np.int64(x.size), partial)
    launch(xp, "adamw", "total", (1,), BLOCK, partial, parts, result)
    return result


@attach_module(AdamW, "control", "cuda")
def control(optimizer, scaler, *, clip=0.0, detectors=None, precision="fp32"):
    """`Optimizer.control` on the device. Outliers are found on the host, so with detectors every step is decided there."""
    if detectors or not _is_ours(optimizer.flat.data):
        return NotImplemented
    return DeviceControl(optimizer, scaler, clip, precision)


class DeviceControl(Control):
    """`Control` whose steps are decided on the device by the kernel `decide`. `verdict` is as of the last `read`.

    In bf16 and fp16 an update also writes the copies of the weights that products read (see halves.py).
    """

    def __init__(self, optimizer: AdamW, scaler: LossScaler, clip: float, precision: str):
        super().__init__(optimizer, scaler, clip)
        self.xp, self.dtype = array_module(optimizer.flat.data), dtype_of(precision)
        start = dict.fromkeys(STATE, 0.0) | dict(scale=scaler.scale, good_steps=scaler.good_steps, updates=optimizer.steps)
        self.state = self.xp.asarray(np.array([float(start[name]) for name in STATE]))
        self.copy = self.xp.empty(optimizer.flat.data.shape, dtype=self.dtype) if precision != "fp32" else None
        self.copies = [] if self.copy is None else list(optimizer.flat.views(self.copy).values())

    @property
    def scale(self):
        return self.scaler.scale if self.scaler.growth_interval is None else self.state[STATE.index("scale")]

    def step(self, loss, square, lr: float) -> None:
        opt, xp = self.optimizer, self.xp
        flat = opt.flat
        flat.check_attached()
        numbers = (lr, self.clip, self.scaler.growth_interval or 0, self.scaler.minimum, opt.beta1, opt.beta2, opt.eps, opt.weight_decay)
        loss, square = xp.asarray(loss, dtype=xp.float64), xp.asarray(square, dtype=xp.float64)
        launch(xp, "adamw", "decide", (1,), 1, self.state, loss, square, *map(np.float64, numbers))
        launch(
            xp, "adamw", "adamw", (-(-flat.data.size // (4 * BLOCK)),), BLOCK, flat.data, opt.state["exp_avg"], opt.state["exp_avg_sq"],
            flat.grad, self.copy, np.int64(flat.data.size), np.int64(flat.decayed), opt.beta1, opt.beta2, self.state,
            FORMAT=FORMATS[self.dtype.name],
        )  # fmt: skip
        flat.mark_changed()
        if self.copies:
            halves.written(flat.tensors.values(), self.copies)

    def read(self) -> Verdict | None:
        now = dict(zip(STATE, self.state.get().tolist(), strict=True))
        self.scaler.scale, self.scaler.good_steps = now["scale"], int(now["good_steps"])
        self.optimizer.steps = int(now["updates"])
        if now["used_scale"]:  # 0 before the first step
            skipped = "divergence" if now["diverged"] else None if now["moved"] else "overflow"
            self.verdict = Verdict(now["loss"], now["norm"], now["used_scale"], skipped, int(now["later"]))
        return self.verdict


def _is_ours(x) -> bool:
    return array_module(x) is not np and x.dtype == np.float32
