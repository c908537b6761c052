"""Figures computed from the features and logits of sets of clips (SaShiMi's protocol, Goel et al. 2202.09729).

Everything is in float64 and starts from logits, so that no probability is rounded to zero before its logarithm. Except
for `inception_score_released`, no figure depends on the order of the clips.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.special

from harmonic.errors import UserError

PAIRS = 10_000
Gaussian = tuple[np.ndarray, np.ndarray]


def fid(a: np.ndarray, b: np.ndarray, *, allow_rank_deficient: bool = False) -> float:
    """Fréchet distance of two sets' features, as normal distributions (Heusel et al. 1706.08500).

    |mean_a - mean_b|² + tr(A) + tr(B) - 2 tr((A B)^(1/2)), with the covariances A, B over n - 1.

    Args:
      a, b: [n, features] and [m, features].
      allow_rank_deficient: accept sets with no more clips than features. Their covariance does not have full rank, and
        the distance comes out too large; figures from equally many clips can still be compared.

    Raises:
      UserError: features that are not finite, or fewer than features + 1 clips (2 with `allow_rank_deficient`).
    """
    a, b = (_finite(x, "features") for x in (a, b))
    needed = samples_needed(a.shape[1], allow_rank_deficient)
    for x in (a, b):
        if len(x) < needed:
            raise UserError(too_few(len(x), needed))
    return frechet((a.mean(0), np.cov(a, rowvar=False)), (b.mean(0), np.cov(b, rowvar=False)))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance of two normal distributions: (mean [features], covariance [features, features]) of each."""
    (mean_a, root_a), (mean_b, root_b) = ((mean, _factor(covariance, len(mean))) for mean, covariance in (a, b))
    # tr((A B)^(1/2)) is the sum of the singular values of A^(1/2) B^(1/2). Unlike the eigenvalues of A B, they stay
    # precise when the covariances are nearly singular.
    cross = scipy.linalg.svdvals(root_a.T @ root_b).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + (root_a**2).sum() + (root_b**2).sum() - 2 * cross
    return float(max(distance, 0.0))


def samples_needed(features: int, allow_rank_deficient: bool = False) -> int:
    """How many clips a covariance of `features` features needs."""
    return 2 if allow_rank_deficient else features + 1


def too_few(count: int, needed: int) -> str:
    """The error's text for too few clips."""
    way_out = "" if needed == 2 else ", or allow_rank_deficient (a distance that comes out too large)"
    return f"{count:,} clips are fewer than the {needed:,} that a covariance needs; give more clips{way_out}"


def _factor(covariance: np.ndarray, features: int) -> np.ndarray:
    """F, where F Fᵀ is the covariance."""
    values, vectors = scipy.linalg.eigh(covariance.reshape(features, features))
    return vectors * np.sqrt(np.clip(values, 0, None))


def inception_score(logits: np.ndarray) -> float:
    """exp of the mean KL(p(y | x) ‖ p(y)), p(y) being the mean over all clips (Salimans et al. 1606.03498).

    From 1 to the number of classes. `logits`: [n, classes].
    """
    logs = _log_probabilities(logits)
    return float(np.exp((np.exp(logs) * (logs - _log_mean(logs))).sum(1).mean()))


def inception_score_released(logits: np.ndarray) -> float:
    """The number that SaShiMi's released code prints as inception score, to compare with published figures.

    It takes entropies over clips instead of classes: exp of the mean, over classes, of the divergence of the class's
    probabilities over clips from the uniform distribution. Rare classes count as much as frequent ones, so that the
    score can exceed the number of classes. It uses one half of the clips, drawn with NumPy's old generator, seed 0.
    """
    logs = _log_probabilities(logits)
    order = np.random.RandomState(0).permutation(len(logs))
    half = logs[order[: len(logs) // 2]]
    if not len(half):
        raise UserError(too_few(len(logs), 2))
    columns = half - scipy.special.logsumexp(half, axis=0)
    return float(np.exp((np.exp(columns) * (columns + np.log(len(half)))).sum(0).mean()))


def modified_inception_score(logits: np.ndarray, seed: int = 0) -> float:
    """exp of the mean KL(p(y | x) ‖ p(y | x')) over 10,000 random pairs of clips (Gurumurthy et al. 1706.02071)."""
    logs = _log_probabilities(logits)
    logs = logs[np.lexsort(logs.T)]  # so that the pairs do not depend on the order of the clips
    first, second = np.random.default_rng(seed).integers(len(logs), size=(2, PAIRS))
    return float(np.exp((np.exp(logs[first]) * (logs[first] - logs[second])).sum(1).mean()))


def am_score(logits: np.ndarray, reference_logits: np.ndarray) -> float:
    """KL(mean p of the reference ‖ mean p) + mean entropy of p(y | x) (Zhou et al. 1703.02000); lower is better."""
    logs = _log_probabilities(logits)
    reference = _log_mean(_log_probabilities(reference_logits))
    entropy = -(np.exp(logs) * logs).sum(1).mean()
    return float((np.exp(reference) * (reference - _log_mean(logs))).sum() + entropy)


def _log_mean(logs: np.ndarray) -> np.ndarray:
    return scipy.special.logsumexp(logs, axis=0) - np.log(len(logs))


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    return scipy.special.log_softmax(_finite(logits, "logits"), axis=1)


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    bad = int((~np.isfinite(values)).any(axis=1).sum())
    if bad:
        raise UserError(
            f"the {name} of {bad:,} of {len(values):,} clips are not finite: the clips or the classifier are broken; "
            "train the classifier again, or look at the clips"
        )
    if not len(values):
        raise UserError(f"there are no {name} to compare: give at least 2 clips")
    return values
