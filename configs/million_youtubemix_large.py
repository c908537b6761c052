"""The latent Transformer on YouTubeMix: in HarmonicRNN's budget, a context of a whole minute, 960,512 samples.

    python -m workflows.full_run --config=million_youtubemix_large --source=youtube_mix.zip
    python -m workflows.evaluate --workdir=runs/million_youtubemix_large --context=1,8,33,60

Windows are whole minutes; attention runs once over their 3,752 latents, the layers on samples over segments.
`--set=model.context=16384` limits the past. The recipe is this project's: the paper (arXiv 2206.08297) names none. Its
claim is a lower likelihood than SaShiMi's with about as many parameters; SaShiMi's published figure is 1.294 bits per
sample. Not run at this size.
"""

import dataclasses

from configs import million_youtubemix
from harmonic.config import Config
from harmonic.models.latent_transformer.config import LARGE


def get_config() -> Config:
    """The config."""
    return dataclasses.replace(million_youtubemix.get_config(), name="million_youtubemix_large", model=LARGE)
