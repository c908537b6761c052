"""Kernels for GPUs and TPUs, written in Pallas. Import them only where they run: Pallas is slow to import."""
