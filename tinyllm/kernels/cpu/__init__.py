"""Kernels for the CPU: NumPy over blocks of rows that stay in the cache, on all cores (`tinyllm.threads`). Importing attaches them.

linear        products split over the cores by rows         activations   GELU, SwiGLU
norms         LayerNorm, RMSNorm                            attention     block by block, without the hidden half
cross_entropy output head, softmax and loss in one          embedding     the table's gradient, added in place
block         all of these as one function a layer          blocks        going through rows, with temporaries that stay
decode        a whole block for a few new tokens            few_rows      products of a few rows, weights read where they lie
folded        all blocks of a small model for the same, with weights rewritten so that fewer calls do

What was tried for a training step, on two cores of an AMD EPYC (Zen 4), NumPy 2.4.6, 2026-11-22; ms a step at 0.8 and at 10 million
parameters (4 layers of width 128, 12 × 64 tokens; 6 of 384, 8 × 256), the same minutes' PyTorch 2.13 with fused AdamW 34-38 and 870-915.
Single runs, which repeat within 3 %:

    the ops as they are defined                                                       88     1440
    kernels, their work shared out over threads                                       67     1050-1100
    the same, a process a core with half of the rows each (train/parallel.py)         45      960
    freed memory kept for the next array (memory.py)                                  40      930
    scores in attention transposed; gradients written where they belong               39      915
    one function for a block                                                          37      900
    fewer and cheaper calls: vecdot for sums of squares, no np.prod, …                36      890
    each process on a core of its own (processes.py)                                  34      840
    products alone, were they all there is                                            18      620

No gain, or loss: threads on every op of the small model (two that take turns at calls of 50 µs mostly wait for each other's lock, and
waking one costs 50 µs); BLAS's threads between our own (its idle ones spin); huge pages; Python's garbage collector off; blocks half
or twice as large (within 1-3 %); q, k and v as separate products (the same within noise, but fewer calls won). `tinyllm bench
train` finds the time of the small and the larger model in: products 64 and 80 %, attention 12 and 11, activations 7 and 3, norms 6 and 2,
optimizer 3 and 2, Python 4 and 1.
"""
from tinyllm.kernels.cpu import activations, attention, block, cross_entropy, decode, embedding, folded, linear, norms
