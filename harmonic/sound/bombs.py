"""The bound on how much may come out of a compressed file."""

from __future__ import annotations

# Deflate and FLAC shrink silence by up to 1,000 to 1, but hours of nothing else are no recording.
MAX_RATIO = 100
RATIO_SLACK = 256 << 20  # bytes that may come out before the ratio counts


def is_bomb(unpacked: int, packed: int) -> bool:
    """Whether `packed` bytes give so many bytes that they are a decompression bomb."""
    return unpacked > MAX_RATIO * packed + RATIO_SLACK
