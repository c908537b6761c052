"""Bounds on memory, and on how much may come out of a compressed file."""

from __future__ import annotations

from harmonic.errors import UserError

SPOOL_BYTES = 8 << 20  # held in memory; anything larger goes to a temporary file
# Deflate and FLAC shrink silence by up to 1,000 to 1, but hours of nothing else are no recording.
MAX_RATIO = 100
RATIO_SLACK = 256 << 20  # bytes that may come out before the ratio counts


def is_bomb(unpacked: int, packed: int) -> bool:
    """Whether `packed` bytes give so many bytes that they are a decompression bomb."""
    return unpacked > MAX_RATIO * packed + RATIO_SLACK


def check_ratio(name: str, unpacked: int, packed: int) -> None:
    """Refuses a decompression bomb.

    Raises:
      UserError: `packed` bytes hold implausibly many bytes.
    """
    if is_bomb(unpacked, packed):
        raise UserError(
            f"{name} holds {unpacked:,} bytes in {packed:,}, more than {MAX_RATIO:,} to 1: that is a decompression "
            "bomb and no archive of recordings; give another --source"
        )
