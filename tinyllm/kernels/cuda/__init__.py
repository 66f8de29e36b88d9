"""Kernels for CUDA GPUs, CUDA C beside the Python that launches it. Importing attaches them; it needs neither CuPy nor a GPU.

storage       16-bit arrays for every op: computed in fp32, stored in 16 bits; asked last
launch        compiles a .cu file when it is first needed
cublaslt      NVIDIA's library of matrix products, by ctypes
linear        products of matrices, as the ops and the other kernels ask for them
vectors       how many numbers a thread may move at once
sums          sums over rows, in a fixed order
norms, activations, rope, embedding     each one pass over memory
attention     softmax(q·kᵀ)·v, forward and backward, without storing a score
halves        16-bit copies of the weights
block         a whole transformer block, forward and backward in one
cross_entropy the output head and the loss in one
adamw         what follows from a gradient: its norm, the loss scale, the update
decode        one more token, as a captured graph
"""
from tinyllm.kernels.cuda import storage  # isort: split

from tinyllm.kernels.cuda import activations, adamw, attention, block, cross_entropy, decode, embedding, linear, norms, rope
