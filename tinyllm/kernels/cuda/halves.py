"""16-bit copies of parameters: what products read, while the fp32 master weights are what the optimizer changes.

A copy counts as long as its parameter's version says that the values are the same, and costs nothing to use: AdamW writes all of them in
the launch that updates the weights. For weights that no optimizer has written (a model just loaded, one that only decodes), it is made
at first use. Who writes into `p.data` without telling the engine (`p[...] = values` tells it, and so does everything in this package)
gets the old copy: the same rule that backward() goes by.
"""
from collections.abc import Iterable
from weakref import WeakKeyDictionary

from tinyllm.tensor import Tensor

_copies: WeakKeyDictionary[Tensor, tuple] = WeakKeyDictionary()  # parameter -> (its array, its version's count, the copy)


def of(parameter: Tensor, dtype):
    """The parameter's values in this dtype: its own array where that is of this dtype already."""
    if parameter.dtype == dtype:
        return parameter.data
    source, count, copy = _copies.get(parameter, (None, 0, None))
    if source is not parameter.data or count != parameter.version.count or copy.dtype != dtype:
        copy = parameter.data.astype(dtype)
        written([parameter], [copy])
    return copy


def written(parameters: Iterable[Tensor], copies: Iterable) -> None:
    """Take note that these arrays hold the parameters' values as they are now."""
    for parameter, copy in zip(parameters, copies, strict=True):
        _copies[parameter] = (parameter.data, parameter.version.count, copy)
