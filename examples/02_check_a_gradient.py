"""Write an operation with its derivative, and let tinyllm.gradcheck tell whether the derivative is right.

A wrong derivative rarely crashes: the model just learns a little worse. So every derivative is compared with what the formula does
when its inputs move a little. You will see

    1. an op of our own: value, derivation, backward
    2. gradcheck accept it, and reject three typical mistakes, naming the worst element of each
    3. a mistake that goes unnoticed if the upstream gradient is all ones
    4. how small a step should be, and why single precision is refused
    5. a whole transformer, checked along random directions

    python examples/02_check_a_gradient.py
"""
import numpy as np

from tinyllm import gradcheck, op, ops
from tinyllm.nn import Transformer, TransformerConfig


@op
def squared_distances(x, w):
    """From each of N points to each of M centres.     (N, K), (M, K) -> (N, M)

        y_ij = Σ_k (x_ik - w_jk)² = |x_i|² - 2·x_i·w_j + |w_j|²

    Backward.  x_i is in row i of y alone: dL/dx_i = Σ_j dy_ij · 2(x_i - w_j). The sum over j, split at the minus sign:
        dx = 2·(x·Σ_j dy - dy·w)          and, with the roles exchanged,      dw = 2·(w·Σ_i dy - dyᵀ·x)
    """
    y = (x * x).sum(1)[:, None] - 2 * x @ w.T + (w * w).sum(1)

    def backward(dy):
        dx = 2 * (x * dy.sum(1)[:, None] - dy @ w)
        dw = 2 * (w * dy.sum(0)[:, None] - dy.T @ x)
        return dx, dw

    return y, backward


# The same op with a mistake in dw, three times. `.array` is the plain function behind an op: it returns the value and the backward.


@op
def wrong_sign(x, w):
    y, right = squared_distances.array(x, w)
    return y, lambda dy: (right(dy)[0], 2 * (w * dy.sum(0)[:, None] + dy.T @ x))


@op
def missing_term(x, w):
    y, right = squared_distances.array(x, w)
    return y, lambda dy: (right(dy)[0], -2 * dy.T @ x)  # as if |w|² were constant


@op
def wrong_transpose(x, w):
    y, right = squared_distances.array(x, w)
    return y, lambda dy: (right(dy)[0], 2 * (w * dy.sum(1)[:, None] - dy @ x))  # fits only because N = M here


def points_and_centres(dtype=np.float64):
    rng = np.random.default_rng(0)
    return rng.standard_normal((4, 3)).astype(dtype), rng.standard_normal((4, 3)).astype(dtype)


def errors_of_differences(dtype, steps):
    """Relative errors of three estimates of d(eˣ)/dx at x = 1, where it is e, for each step h: forward, central, complex."""
    x, rows = dtype(1), []
    for h in steps:
        forward = (np.exp(x + dtype(h)) - np.exp(x)) / dtype(h)
        central = (np.exp(x + dtype(h)) - np.exp(x - dtype(h))) / dtype(2 * h)
        complex_step = np.exp(x + 1j * h).imag / h
        rows.append([float(abs(estimate / np.e - 1)) for estimate in (forward, central, complex_step)])
    return rows


def refusal():
    """What gradcheck says to float32."""
    try:
        return str(gradcheck(squared_distances, *points_and_centres(np.float32)))
    except ValueError as error:
        return str(error)


def whole_model():
    """The loss of a small Llama as a function of all its parameters, in float64, along ten random directions for each."""
    config = TransformerConfig(vocab_size=11, layers=2, heads=2, width=8, context=6)
    model = Transformer(config, np.random.default_rng(0), np.float64)
    ids = np.random.default_rng(1).integers(11, size=(2, 7))

    def loss():
        return ops.cross_entropy(model(ids[:, :-1]), ids[:, 1:])

    return gradcheck(loss, parameters=dict(model.named_parameters()), method="projection")


def main():
    x, w = points_and_centres()
    print("1. The value, against the definition: largest difference", end=" ")
    definition = [[((point - centre) ** 2).sum() for centre in w] for point in x]
    print(f"{np.abs(squared_distances(x, w).numpy() - definition).max():.0e}\n")

    print("2. Each derivative against central differences. Inputs are numbered: 0 is x, 1 is w, where the mistakes are.")
    for function in (squared_distances, wrong_sign, missing_term, wrong_transpose):
        print(f"   {function.__name__}\n      {gradcheck(function, x, w)}")
    print("   In your own tests:  report = gradcheck(f, x, w);  assert report, report\n")

    print("3. gradcheck turns y into one number with random weights dy. If it just summed y up, dy would be all ones, dyᵀ the same,")
    print(f"   and the wrong transpose would pass:\n      {gradcheck(lambda x, w: wrong_transpose(x, w).sum(), x, w)}\n")

    print("4. How large a step? Relative error of the derivative of eˣ at 1:")
    print("        h       forward   central   complex  |  forward   central in float32")
    steps = [10.0**-n for n in range(1, 14, 2)]
    for h, double, single in zip(steps, errors_of_differences(np.float64, steps), errors_of_differences(np.float32, steps), strict=True):
        print(f"   {h:8.0e}   {'  '.join(f'{e:8.0e}' for e in double)}  |  {'  '.join(f'{e:8.0e}' for e in single[:2])}")
    print("   The formula's own error falls with h (forward) or h² (central), but rounding, divided by h, grows. gradcheck takes four points,")
    print("   whose error falls with h⁴, so that h can stay large. The complex step subtracts nothing and has no such limit, but it needs")
    print("   every operation to be analytic (no |x|, no max):")
    print(f"      {gradcheck(squared_distances, x, w, method='complex')}")
    print(f"   In float32 rounding has won before the formula is good. Therefore:\n      {refusal()}\n")

    print("5. A whole model: 10 random directions in each parameter, four forwards a direction instead of four an element")
    print(f"      {whole_model()}")
    print("   The worst are queries or keys: attention starts out even, so their gradients are tiny, and rounding shows.")


if __name__ == "__main__":
    main()
