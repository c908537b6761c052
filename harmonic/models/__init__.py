"""Models: each behind the same calls (`apply`, `step`, `init`, `init_state`), so that one can stand for another."""

import dataclasses

from harmonic.models.harmonic_rnn.model import Dropout, HarmonicRNN, State

__all__ = ["DEFAULT_KIND", "About", "Dropout", "HarmonicRNN", "State", "about", "kinds"]

DEFAULT_KIND = "harmonic_rnn"


@dataclasses.dataclass(frozen=True)
class About:
    """What a kind is called, and where it is published."""

    name: str
    summary: str
    arxiv: str = ""


def kinds() -> tuple[str, ...]:
    """The kinds that there are."""
    return (DEFAULT_KIND,)


def about(kind: str) -> About:
    """What a kind is called, and where it is published."""
    return {
        DEFAULT_KIND: About("HarmonicRNN", "a deep linear RNN that generates raw audio sample by sample", "2510.02401")
    }[kind]
