"""RawModule of the fake device: kernels on its arrays, run by the emulator, or noted while a stream captures."""
import cuda_on_cpu
import fake_cuda as cuda
import numpy as np
from fake_ndarray import ndarray


class Function(cuda_on_cpu.Function):
    """A kernel whose arguments are the fake device's arrays and NumPy scalars."""

    def __call__(self, grid, block, args, *, shared_mem=0) -> None:
        host = next((x for x in args if isinstance(x, np.ndarray)), None)
        if host is not None:
            raise TypeError(f"{self.name}: an argument is a NumPy array: the device cannot read the host's memory")
        cuda.launches.append(self.name)
        cuda.submit(lambda: super(Function, self).__call__(grid, block, args, shared_mem=shared_mem))

    @staticmethod
    def values(x):
        return x._values if isinstance(x, ndarray) else x

    @staticmethod
    def owner(x) -> np.ndarray:
        return (x if x.base is None else x.base)._values


class RawModule(cuda_on_cpu.RawModule):
    function = Function
