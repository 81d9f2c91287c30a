"""Kernels of our own for accelerators, in Triton; each agrees with the plain torch version beside this folder.

Without an accelerator they run in Triton's interpreter (TRITON_INTERPRET=1), slowly: that is how they are tested on a CPU.
Nothing here imports Triton before a kernel is needed.
"""
