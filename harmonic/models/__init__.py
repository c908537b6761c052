"""Models: each behind the same calls (`apply`, `step`, `init`, `init_state`), so that one can stand for another."""

from harmonic.models.harmonic_rnn.model import Dropout, HarmonicRNN, State

__all__ = ["Dropout", "HarmonicRNN", "State"]
