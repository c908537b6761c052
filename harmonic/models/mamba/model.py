"""Mamba's model of audio (Gu and Dao, arXiv 2312.00752, section 4.4 and appendix E.4).

    model = make(ModelConfig())            # on YouTubeMix, 3,557,248 parameters

SaShiMi's U-Net with a Mamba block in the place of each pair of S4 and MLP. The authors' code for audio was never
published; the block is that of github state-spaces/mamba, with its defaults. Where a paper leaves something open this
is
what the project takes: the complex A of their experiment on YouTubeMix has half as many modes, B and C are complex too,
and y is twice the real part, as in their `selective_scan`; "Mamba-S4" (`selective` false) has S4D, by zero-order hold,
with 32 modes a channel. The paper prints 6.1M parameters for SC09 where this counts 6,255,104.
"""

from __future__ import annotations

from typing import Any

import jax

from harmonic.models.base import ParamGroup, Params
from harmonic.models.mamba.config import ModelConfig
from harmonic.models.mamba.layers import Mamba
from harmonic.models.u_net import Layer, UNet

_NO_DECAY = ("A_log", "A_im", "D")


class MambaNet(UNet):
    """The methods are those of `base.Model`."""

    config: ModelConfig

    def layers(self, width: int, level: int) -> dict[str, Layer]:
        """One Mamba block."""
        return {"mamba": Mamba(self.config, width, is_selective=self.config.level_selective[level])}

    def param_groups(self, params: Params) -> tuple[Any, dict[str, ParamGroup]]:
        """No weight decay of A, D and the step's bias, as in the authors' code."""

        def group(path: Any, _: Any) -> str:
            names = [str(getattr(key, "key", key)) for key in path]
            return "no_decay" if names[-1] in _NO_DECAY or names[-2:] == ["dt", "bias"] else "others"

        groups = {"no_decay": ParamGroup(weight_decay=0.0), "others": ParamGroup()}
        return jax.tree_util.tree_map_with_path(group, params), groups

    def kept_in_a_block(self, width: int) -> float:
        """Arrays of the inner width and their gradients, read from compiled programs; the states of a chunk are few."""
        return (2 + 56 * self.config.inner) * width + 4 * self.config.state_width


make = MambaNet
