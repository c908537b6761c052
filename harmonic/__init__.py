"""HarmonicRNN: a deep linear RNN that generates audio sample by sample, in JAX.

Importing this package loads nothing: a data worker needs `harmonic.audio` and `harmonic.records` (NumPy only), and must
not pay for JAX.
"""

__version__ = "0.1.0"
