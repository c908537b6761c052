"""Bounds on memory, and on how much may come out of an archive."""

from __future__ import annotations

from harmonic.errors import UserError
from harmonic.sound.bombs import MAX_RATIO, is_bomb

SPOOL_BYTES = 8 << 20  # held in memory; anything larger goes to a temporary file


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
