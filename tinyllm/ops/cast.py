"""The named places where mixed precision rounds."""
from tinyllm.backend import round_to_grid
from tinyllm.tensor import op


@op
def cast(x, *, precision):
    """x rounded to the grid of fp16 or bf16; "fp32" leaves it.     (...) -> (...)

    Where a value would be stored in 16 bits, so would its gradient: dx = dy rounded to the same grid. (The derivative of a staircase
    is 0 almost everywhere; as everywhere in mixed precision, rounding is taken for the line that it follows.)
    Source: Micikevicius et al. 2018.
    """
    return round_to_grid(x, precision), lambda dy: round_to_grid(dy, precision)
