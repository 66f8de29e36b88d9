"""How many numbers a thread may move at once: 16 bytes, the widest access that a GPU has, where shapes and addresses allow it."""
BYTES = 16


def widest(width: int, *arrays) -> int:
    """The length to give to the prelude's Vec: a power of two that divides the width, and at whose multiples every array's rows start.

    arrays : as they will be read and written, None left aside; the first is the one whose numbers are counted. Others may have wider
    numbers: what is longer than 16 bytes moves in several accesses, each of which needs no more than 16 bytes' alignment.
    """
    numbers = power_of_two_in(width | BYTES // arrays[0].itemsize)
    for x in arrays:
        if x is None:
            continue
        places = BYTES | x.data.ptr
        for stride, length in zip(x.strides[:-1], x.shape, strict=False):
            places |= stride if length > 1 else 0
        aligned = power_of_two_in(places)
        if aligned < BYTES:
            numbers = min(numbers, max(aligned // x.itemsize, 1))
    return numbers


def power_of_two_in(n: int) -> int:
    """The largest power of two that divides n, which is not 0."""
    return n & -n
