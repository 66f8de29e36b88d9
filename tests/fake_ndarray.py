"""The fake device's array: NumPy's memory behind CuPy's manners. See fake_cupy.py, which is the module that tests use."""
import ctypes
import operator

import fake_cuda as cuda
import numpy as np
from fake_cuda import synchronise

NUMBERS = (bool, int, float, complex, np.generic)


class MemoryPointer:
    """Where an array's elements are."""

    __slots__ = ("ptr", "mem", "device_id")

    def __init__(self, ptr, mem):
        self.ptr, self.mem, self.device_id = ptr, mem, 0

    def __int__(self):
        return self.ptr


class Flags:
    """c_contiguous and f_contiguous of an array, and whether its memory is its own."""

    def __init__(self, values, owndata):
        self.c_contiguous, self.f_contiguous, self.owndata = values.flags.c_contiguous, values.flags.f_contiguous, owndata

    def __getitem__(self, name):
        return {"C_CONTIGUOUS": self.c_contiguous, "F_CONTIGUOUS": self.f_contiguous, "OWNDATA": self.owndata}[name]


class ndarray:
    """An array of the fake device. Not a np.ndarray, and none can be made of it but by get()."""

    __slots__ = ("_values", "base", "_block", "__weakref__")
    __module__ = "fake_cupy"  # which array_module() finds
    __array_ufunc__ = None  # np.exp(x), np.float32(1) + x where NumPy would decide: the first fails, the second comes to __radd__
    __hash__ = None

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
        _own(self, np.empty(shape, dtype, order))
        fill_with_noise(self._values)

    def __array__(self, *arguments, **options):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array explicitly.")

    def __array_function__(self, function, types, arguments, options):
        raise TypeError(f"np.{function.__name__} of an array on the device: ask array_module(x)")

    shape = property(lambda self: self._values.shape)
    dtype = property(lambda self: self._values.dtype)
    ndim = property(lambda self: self._values.ndim)
    size = property(lambda self: self._values.size)
    nbytes = property(lambda self: self._values.nbytes)
    itemsize = property(lambda self: self._values.itemsize)
    strides = property(lambda self: self._values.strides)
    flags = property(lambda self: Flags(self._values, self.base is None))
    device = property(lambda self: cuda.Device())
    data = property(lambda self: MemoryPointer(self._values.ctypes.data if self.size else 0, (self if self.base is None else self.base)._block))
    T = property(lambda self: run("T", np.transpose, (self,)) if self.ndim > 1 else self)

    def __len__(self):
        return len(self._values)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        if _mask(index):
            synchronise("x[mask]")
        return run("x[…]", _getitem, (self, index_of(index)))

    def __setitem__(self, index, value):
        if _mask(index):
            synchronise("x[mask] = …")
        elif isinstance(value, np.ndarray) and value.ndim and not _advanced(index):
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        elif isinstance(value, np.ndarray):
            value = asarray(value)
        elif isinstance(value, list | tuple):
            raise TypeError(f"x[…] = a {type(value).__name__}: make it an array first")
        index, value = plain(index_of(index)), operand("x[…] = …", value)
        cuda.submit(lambda: operator.setitem(self._values, around(self._values, index), value))

    # to the host
    def get(self, stream=None, order="C", out=None, blocking=True):
        synchronise(".get()")
        if out is None:
            return np.array(self._values, order=order)
        np.copyto(out, self._values)
        return out

    def item(self):
        if self.size != 1:
            raise ValueError("can only convert an array of size 1 to a Python scalar")
        synchronise(".item()")
        return self._values.item()

    def tolist(self):
        synchronise(".tolist()")
        return self._values.tolist()

    def tobytes(self, order="C"):
        synchronise(".tobytes()")
        return self._values.tobytes(order)

    def set(self, values, stream=None):
        if type(values) is not np.ndarray or (values.shape, values.dtype) != (self.shape, self.dtype):
            raise TypeError("set() takes a NumPy array of the same shape and dtype")
        _from_host()
        self._values[...] = values

    def _number(self, kind):
        synchronise(f"{kind.__name__}(x)")
        return kind(self._values)

    __bool__ = lambda self: self._number(bool)  # noqa: E731
    __int__ = lambda self: self._number(int)  # noqa: E731
    __float__ = lambda self: self._number(float)  # noqa: E731
    __complex__ = lambda self: self._number(complex)  # noqa: E731

    def __repr__(self):
        synchronise("repr(x)")
        return repr(self._values)

    def __format__(self, specification):
        synchronise("format(x)")
        return format(self._values, specification)

    # new arrays
    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        if not copy and self.dtype == np.dtype(dtype):
            return self
        return run("astype", np.ndarray.astype, (self, np.dtype(dtype)), {"order": order})

    def view(self, dtype=None):
        return run("view", lambda x: x.view() if dtype is None else x.view(dtype), (self,))

    def copy(self, order="C"):
        return run("copy", lambda x: x.copy(order), (self,))

    def fill(self, value):
        self[...] = value

    def sort(self, axis=-1, kind=None):
        cuda.submit(lambda: self._values.sort(axis))

    def nonzero(self):
        synchronise("nonzero")
        return run("nonzero", np.ndarray.nonzero, (self,))


def _own(x, values):
    """Make x the owner of these values, whose memory the pool counts."""
    x._values, x.base, x._block = _aligned(values), None, cuda.alloc(values.nbytes)
    return x


def _aligned(values):
    """The same values at an address that 512 divides, as every address from CuPy's pool is, in memory that begins and ends with them."""
    memory = np.empty(values.nbytes + 512, np.uint8)
    start = -memory.__array_interface__["data"][0] % 512
    exactly = (ctypes.c_char * values.nbytes).from_buffer(memory, start)  # so that the emulator finds no room around it
    place = np.ndarray(values.shape, values.dtype, exactly, 0, values.strides if values.flags.forc else None)
    place[...] = values
    return place


def new(values):
    """An array of the device with these values."""
    return _own(ndarray.__new__(ndarray), np.asarray(values))


def _wrapped(result, sources):
    """A NumPy result as arrays of the device: a view where it shares the memory of a source, an array of its own otherwise."""
    if isinstance(result, tuple | list):
        return type(result)(_wrapped(r, sources) for r in result)
    if not isinstance(result, np.ndarray | np.generic):
        return result
    for source in sources:
        if result is source._values:
            return source
        if result.base is not None and np.may_share_memory(result, source._values):
            view = ndarray.__new__(ndarray)
            view._values, view.base, view._block = result, source if source.base is None else source.base, None
            return view
    return new(result)


def operand(name, x):
    """What NumPy shall work on: an array's values, or a number. TypeError for anything else."""
    if type(x) is ndarray:
        return x._values
    if isinstance(x, NUMBERS):
        return x
    raise TypeError(f"{name}: Unsupported type {type(x)}; move it to the device with asarray, or keep it away")


def plain(x, name="x"):
    """Arguments of any nesting, with the values in the place of arrays. NumPy arrays are refused."""
    if isinstance(x, np.ndarray):
        raise TypeError(f"{name}: Unsupported type {type(x)}: a NumPy array met an array of the device")
    if isinstance(x, tuple | list):
        return type(x)(plain(a, name) for a in x)
    return x._values if type(x) is ndarray else x


def sources(x):
    """The arrays of the device among arguments of any nesting."""
    if type(x) is ndarray:
        yield x
    elif isinstance(x, tuple | list):
        for a in x:
            yield from sources(a)


def run(name, function, arguments, options=None):
    """function of the values, as an array of the device; while a stream captures, that holds noise until the graph runs."""
    options = options or {}
    if refused := options.keys() & {"where", "initial"}:
        raise TypeError(f"{name}() got an unexpected keyword argument {min(refused)!r}")
    values, settings = [plain(a, name) for a in arguments], {k: plain(v, name) for k, v in options.items()}
    out = options.get("out")
    if out is not None:
        cuda.submit(lambda: function(*values, **settings))
        return out
    with np.errstate(all="ignore"):  # a GPU does not warn
        result = function(*values, **settings)
    wrapped = _wrapped(result, list(sources(arguments)))
    if cuda.capturing():
        _capture(wrapped, lambda: function(*values, **settings))
    return wrapped


def _capture(results, function):
    """Note that the new ones of these arrays are to be computed by the graph."""
    many = isinstance(results, tuple | list)
    fresh = [(i, x) for i, x in enumerate(results if many else [results]) if type(x) is ndarray and x.base is None]
    if not fresh:
        return
    for _, x in fresh:
        fill_with_noise(x._values)

    def work():
        again = function()
        for i, x in fresh:
            x._values[...] = again[i] if many else again

    cuda.submit(work)


def fill_with_noise(values):
    """What memory holds that nobody has written: NaN, or integers that are no index. Whoever reads it shall notice."""
    values.fill(np.iinfo(values.dtype).max // 3 if values.dtype.kind in "iu" else values.dtype.kind == "b" or np.nan)


def _from_host():
    if cuda.capturing():
        raise RuntimeError("a copy from the host's memory cannot be captured")


def asarray(x, dtype=None, order=None, *, copy=None, blocking=False):
    """x on the device. From the host it is copied through pinned memory, which does not wait."""
    if type(x) is ndarray:
        return x if dtype is None or x.dtype == np.dtype(dtype) else x.astype(dtype)
    if isinstance(x, list | tuple) and next(sources(x), None) is not None:
        x = run("array", np.stack, ([asarray(a) for a in x],))
        return x if dtype is None else x.astype(dtype)
    _from_host()
    return new(np.array(x, dtype=dtype, order=order or "K"))


# ---- indices ----


def _parts(index):
    return index if isinstance(index, tuple) else (index,)


def _advanced(index):
    return any(hasattr(i, "dtype") and i.ndim or isinstance(i, list) for i in _parts(index))


def _mask(index):
    return any((hasattr(i, "dtype") and i.dtype == bool) or isinstance(i, bool) for i in _parts(index))


def index_of(index):
    """The index with the host's arrays and lists moved to the device."""
    parts = [asarray(np.array(i, dtype=None if i else int)) if isinstance(i, list) else asarray(i) if isinstance(i, np.ndarray) else i
             for i in _parts(index)]  # fmt: skip
    return tuple(parts) if isinstance(index, tuple) else parts[0]


def around(values, index):
    """The index with integers of arrays that are out of range wrapped around, which is what CuPy makes of them."""
    parts = list(_parts(index))
    axis, whole = 0, sum(_axes(i) for i in parts)
    for number, i in enumerate(parts):
        if i is Ellipsis:
            axis += values.ndim - whole
        elif isinstance(i, np.ndarray) and i.dtype != bool:
            parts[number] = i % max(values.shape[axis], 1)
        axis += _axes(i)
    return tuple(parts)


def _getitem(values, index):
    found = values[around(values, index)]
    return np.array(found) if any(isinstance(i, np.ndarray) for i in _parts(index)) else found  # NumPy gives a view for an array of no axes


def _axes(i):
    """How many axes of the array one part of an index takes."""
    return 0 if i is None or i is Ellipsis else i.ndim if hasattr(i, "dtype") and i.dtype == bool else 1


# ---- operators, methods, functions ----


def matrix_product(a, b, **options):
    """np.matmul, with what CuPy does for bf16: sums in fp32, and no batches."""
    if "bfloat16" in (str(a.dtype), str(b.dtype)):
        if a.ndim > 2 or b.ndim > 2:
            raise TypeError("CuPy 14.2 has no batched product of bfloat16 arrays")
        return np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(np.result_type(a, b))
    return np.matmul(a, b, **options)


def _attach_operators():
    def binary(name, function):
        def forward(self, other):
            return NotImplemented if _foreign(other) else run(name, function, (self, checked(name, other)))

        def backward(self, other):
            return run(name, function, (checked(name, other), self))

        def in_place(self, other):
            value = operand(name, checked(name, other))
            if name == "pow":
                cuda.submit(lambda: np.power(self._values, value, out=self._values, casting="same_kind"))
            else:
                cuda.submit(lambda: getattr(operator, f"i{name}")(self._values, value))
            return self

        setattr(ndarray, f"__{name}__", forward)
        setattr(ndarray, f"__r{name}__", backward)
        setattr(ndarray, f"__i{name}__", in_place)

    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift"):
        binary(name, getattr(operator, name))
    for name in ("and", "or", "xor"):
        binary(name, getattr(operator, "xor" if name == "xor" else f"{name}_"))
    for name in ("lt", "le", "eq", "ne", "gt", "ge"):
        function = getattr(operator, name)
        setattr(ndarray, f"__{name}__", lambda self, other, name=name, function=function: run(name, function, (self, checked(name, other))))
    for name in ("neg", "pos", "abs", "invert"):
        function = getattr(operator, name)
        setattr(ndarray, f"__{name}__", lambda self, name=name, function=function: run(name, function, (self,)))
    ndarray.__matmul__ = lambda a, b: NotImplemented if _foreign(b) else run("matmul", matrix_product, (a, checked("matmul", b)))
    ndarray.__rmatmul__ = lambda a, b: run("matmul", matrix_product, (checked("matmul", b), a))


def _foreign(x):
    """Whether x has a say in what comes of an operator (a Tensor has)."""
    return type(x) is not ndarray and getattr(x, "__array_ufunc__", 0) is None


def checked(name, x):
    """x, if it may stand beside an array of the device."""
    operand(name, x)
    return x


def _attach_methods():
    names = "all any argmax argmin argsort clip cumsum dot max mean min prod ravel repeat reshape squeeze std sum swapaxes take transpose var flatten"
    for name in names.split():
        method = getattr(np.ndarray, name)
        setattr(ndarray, name, lambda self, *a, name=name, method=method, **k: run(name, method, (self, *a), k))


_attach_operators()
_attach_methods()
