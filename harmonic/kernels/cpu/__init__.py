"""Kernels for CPUs as machine code, generated with LLVM and called by XLA."""
