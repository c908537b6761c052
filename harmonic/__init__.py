"""HarmonicRNN: a deep linear RNN that generates audio sample by sample, in JAX.

Importing this package loads nothing: a data worker needs `harmonic.audio` and `harmonic.records` (NumPy only), and must
not pay for JAX.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harmonic.pretrained import Pretrained

__version__ = "0.1.0"


def load(path_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> Pretrained:
    """A trained model that generates.

        model = harmonic.load("USER/NAME")
        audio = model.generate(seconds=4)  # float32 [streams, samples] at model.sample_rate

    Args:
      path_or_hub_id: an export's folder, a run's folder (its best averaged weights), the name of a model in the box
        (a folder of that name comes first), or USER/NAME of a model on the Hugging Face hub.
      revision: branch, tag or commit on the hub.

    Raises:
      harmonic.errors.UserError: there is no such model, no permission to read it, or its files are damaged.
    """
    from harmonic import pretrained

    return pretrained.load(path_or_hub_id, revision)
