"""AdamW: each weight moves by about lr a step, whatever the scale of its gradient, and shrinks towards 0 on the side."""
import math
from collections.abc import Iterable

from tinyllm.backend import array_module
from tinyllm.optim.optimizer import Optimizer
from tinyllm.tensor import Tensor


def adamw(p, g, m, v, *, step, lr, beta1, beta2, eps, weight_decay):
    """One step of AdamW for one array, by definition.     arrays of one shape -> new (p, m, v)

        m ← β₁·m + (1-β₁)·g          running mean of the gradient
        v ← β₂·v + (1-β₂)·g²         running mean of its square
        m̂ = m/(1-β₁ᵗ)   v̂ = v/(1-β₂ᵗ)                              t = step, counted from 1
        p ← p - lr·λ·p - lr·m̂/(√v̂ + ε)                              λ = weight_decay

    Bias correction.  From m = v = 0, after t steps m = (1-β₁)·Σᵢ β₁^(t-i)·gᵢ. For gradients of constant mean E[g] that has the mean
    E[g]·(1-β₁)·Σᵢ β₁^(t-i) = E[g]·(1-β₁ᵗ), too small by the factor that m̂ divides out; likewise v̂. In the first step m̂ = g and
    v̂ = g², so every weight moves by lr·sign(g).

    Decoupled decay.  An L2 term λ·p added to g would be divided by √v̂ too: weights with large gradients would hardly decay. Taken
    straight from p, all weights shrink at the same rate lr·λ.
    Source: Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2, with lr in the place of its η.
    """
    xp = array_module(p)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    return p - lr * weight_decay * p - lr * m_hat / (xp.sqrt(v_hat) + eps), m, v


class AdamW(Optimizer):
    """`adamw` for a whole model, over its flat buffers.

    Matrices decay, vectors do not (see `flat`). The update goes through the buffers block by block, so that its temporaries stay in
    the cache. Measured for 10 million float32 parameters (one core of an AMD EPYC with 1 MB of L2 per core): `adamw` on whole
    arrays 85 ms, in place on whole arrays 49 ms, in place by blocks 20 ms. Reusing the temporaries with out= gave 18 ms, which does
    not pay for three times the lines.

    beta1, beta2 : how much of the running means stays at each step, in [0, 1).     eps : added to √v̂, > 0.     weight_decay : λ ≥ 0.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, Tensor]], *, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8,
        weight_decay: float = 0.1,
    ):  # fmt: skip
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and eps > 0 and weight_decay >= 0):
            raise ValueError(
                "AdamW takes beta1 and beta2 in [0, 1), eps > 0 and weight_decay ≥ 0, got "
                f"beta1 {beta1}, beta2 {beta2}, eps {eps}, weight_decay {weight_decay}"
            )
        super().__init__(named_parameters, ("exp_avg", "exp_avg_sq"))
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay

    def _update(self, block: slice, g, decays: bool, lr: float, grad_scale: float) -> None:
        """`adamw` in place. Constants are multiplied together before they meet an array, and with c = √(1-β₂ᵗ)

            (1-β₂)·g² = (√(1-β₂)·g)²          lr·m̂/(√v̂ + ε) = (lr·c/(1-β₁ᵗ)) · m/(√v + ε·c)

        which needs neither m̂ nor v̂, and does not overflow where g² alone would.
        """
        p, m, v = self.flat.data[block], self.state["exp_avg"][block], self.state["exp_avg_sq"][block]
        c = math.sqrt(1 - self.beta2**self.steps)
        m *= self.beta1
        m += ((1 - self.beta1) * grad_scale) * g
        v *= self.beta2
        v += ((math.sqrt(1 - self.beta2) * grad_scale) * g) ** 2
        if decays:
            p *= 1 - lr * self.weight_decay
        p -= (lr * c / (1 - self.beta1**self.steps)) * m / (array_module(v).sqrt(v) + self.eps * c)
