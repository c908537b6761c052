"""SaShiMi (Goel et al., arXiv 2202.09729): a U of S4 layers, each with an MLP behind it.

    model = make(ModelConfig())            # the authors' U-Net, 6,820,512 parameters
    model = make(MUSIC)                    # the paper's model for music, 4,059,360

Architecture and initial values are those of github state-spaces/s4; the state space layers are computed in chunks
(`kernels.state_space`) instead of by FFT, so that a segment starts from any state, training goes through sequences of
any length exactly, and `step` is the same function. C is the matrix that reads the state; the authors learn C (I -
A^L) for one length L instead, which differs by what is left of the state after L samples (`released` converts).
"""

from __future__ import annotations

from typing import Any

import jax

from harmonic.models.base import ParamGroup, Params
from harmonic.models.sashimi.config import ModelConfig
from harmonic.models.sashimi.layers import S4, FeedForward
from harmonic.models.u_net import Layer, UNet

_SLOW = ("A_re", "A_im", "B_re", "B_im", "P_re", "P_im", "dt")


class SaShiMi(UNet):
    """The methods are those of `base.Model`."""

    config: ModelConfig

    @property
    def pool_weight_norm(self) -> bool:  # type: ignore[override]
        """As the config says."""
        return self.config.pool_weight_norm

    def layers(self, width: int, level: int) -> dict[str, Layer]:
        """S4 and the MLP."""
        return {"s4": S4(self.config, width), "ff": FeedForward(self.config, width)}

    def param_groups(self, params: Params) -> tuple[Any, dict[str, ParamGroup]]:
        """The state space's own parameters but C: rate 0.001, no decay; the layers' norms: no decay (S4's configs)."""

        def group(path: Any, _: Any) -> str:
            names = [str(getattr(key, "key", key)) for key in path]
            if names[-1] in _SLOW:
                return "ssm"
            return "norms" if "norm" in names[:-1] and len(names) > 2 else "others"

        groups = {
            "ssm": ParamGroup(learning_rate=0.001, weight_decay=0.0),
            "norms": ParamGroup(weight_decay=0.0),
            "others": ParamGroup(),
        }
        return jax.tree_util.tree_map_with_path(group, params), groups

    def kept_in_a_block(self, width: int) -> float:
        """Of S4: the sums and states of chunks, and some dozen arrays of the width; of the MLP: its inner width."""
        return (10 + 4 * self.config.state_width / 64 * 2 + 6 * self.config.ff) * width


make = SaShiMi
