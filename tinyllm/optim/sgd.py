"""Stochastic gradient descent with momentum: the plain rule that the others are measured against."""
from collections.abc import Iterable

from tinyllm.optim.optimizer import Optimizer
from tinyllm.tensor import Tensor


def sgd(p, g, m, *, lr, momentum, nesterov, weight_decay):
    """One step of gradient descent for one array, by definition.     arrays of one shape -> new (p, m)

        g ← g + λ·p                          the gradient of λ/2·|p|², λ = weight_decay
        m ← μ·m + g                          μ = momentum: a gradient that persists is followed up to 1/(1-μ) times as fast
        p ← p - lr·m                         or, nesterov:  p ← p - lr·(g + μ·m), the gradient plus the next step's share of m

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning", with lr outside of m, so that
    a change of the learning rate takes effect at once.
    """
    g = g + weight_decay * p
    m = momentum * m + g
    return p - lr * (g + momentum * m if nesterov else m), m


class SGD(Optimizer):
    """`sgd` for a whole model, over its flat buffers. Matrices decay, vectors do not (see `flat`).

    momentum : μ in [0, 1).     nesterov : needs a momentum.     weight_decay : λ ≥ 0.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, Tensor]], *, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0
    ):
        if not (0 <= momentum < 1 and weight_decay >= 0):
            raise ValueError(f"SGD takes momentum in [0, 1) and weight_decay ≥ 0, got momentum {momentum}, weight_decay {weight_decay}")
        if nesterov and momentum == 0:
            raise ValueError("SGD with nesterov=True needs a momentum above 0")
        super().__init__(named_parameters, ("momentum",) if momentum else ())
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay

    def _update(self, block: slice, g, decays: bool, lr: float, grad_scale: float) -> None:
        """`sgd` in place."""
        p = self.flat.data[block]
        g = grad_scale * g
        if decays:
            g += self.weight_decay * p
        if not self.momentum:
            p -= lr * g
            return
        m = self.state["momentum"][block]
        m *= self.momentum
        m += g
        p -= lr * (g + self.momentum * m if self.nesterov else m)
