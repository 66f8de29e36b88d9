"""Kernels for the CPU: NumPy over blocks of rows that stay in the cache, on all cores (`tinyllm.threads`). Importing attaches them.

linear        products split over the cores by rows         activations   GELU, SwiGLU
norms         LayerNorm, RMSNorm                            attention     head by head, without the hidden half
cross_entropy output head, softmax and loss in one          blocks        going through rows, with temporaries that stay

Measured on two cores of an AMD EPYC (Zen 4), NumPy 2.4.6, 2026-11-22; a training step of GPT-2's kind, fp32, against PyTorch 2.13 with
its fused AdamW in the same minutes (the machine was not quiet: compare the columns of a row, not their last digits):

    layers, width, context, batch     by the ops    with kernels    PyTorch     what bounds it
    6, 384, 256, 8                    1440 ms       1090-1320 ms    905-980     the products: 131 GFLOP at 100 GFLOP/s a core
    4, 128, 64, 12                    88-110 ms     72-96 ms        39-48       waking a thread costs 50 µs, as much as many an op

Arrays at the peak of a step (tracemalloc): 691 -> 493 MB for the first, 56 -> 41 MB for the second. Tried without gain: sharing out every op of the small model (two Python threads that take
turns at calls of 50 µs mostly wait for each other), and leaving BLAS its threads between our own (its idle ones spin).
"""
from tinyllm.kernels.cpu import activations, attention, cross_entropy, linear, norms
