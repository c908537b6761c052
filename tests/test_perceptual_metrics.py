"""FID, inception scores and AM score against closed forms and direct computation."""

import numpy as np
import pytest
import scipy.linalg
from scipy.stats import entropy

from harmonic.errors import UserError
from harmonic.perceptual.metrics import (
    PAIRS,
    am_score,
    fid,
    inception_score,
    inception_score_released,
    modified_inception_score,
)


def softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def confident(labels, classes=10):
    return 200.0 * np.eye(classes)[labels]


def test_fid_of_a_set_with_itself_is_zero(rng):
    features = rng.normal(size=(500, 40)) @ rng.normal(size=(40, 40))
    assert fid(features, features) == pytest.approx(0, abs=1e-9 * np.trace(np.cov(features.T)))
    few = rng.normal(size=(20, 40))
    assert fid(few, few, allow_rank_deficient=True) == pytest.approx(0, abs=1e-9)


def test_fid_of_gaussians_is_the_closed_form(rng):
    """Data whitened and coloured, so that its mean and covariance are exactly those of the formula."""
    noise = rng.normal(size=(300, 6))
    noise -= noise.mean(0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise.T))).T
    scales_a, scales_b, shift = np.arange(1.0, 7), np.array([2.0, 0.5, 3, 1, 0.1, 6]), np.linspace(-1, 2, 6)
    diagonal = (shift**2).sum() + ((scales_a - scales_b) ** 2).sum()  # covariances that commute
    assert fid(white * scales_a, white * scales_b + shift) == pytest.approx(diagonal, rel=1e-9)
    factor = rng.normal(size=(6, 6))
    a, b = np.diag(scales_a**2), factor @ factor.T
    root = scipy.linalg.sqrtm(a)
    general = (shift**2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(scipy.linalg.sqrtm(root @ b @ root)).real
    assert fid(white * scales_a, white @ factor.T + shift) == pytest.approx(general, rel=1e-8)


def test_inception_score_counts_the_classes_that_are_told_apart():
    assert inception_score(confident(np.repeat(np.arange(10), 30))) == pytest.approx(10)
    assert inception_score(confident(np.repeat([0, 5], 30))) == pytest.approx(2)
    assert inception_score(confident(np.zeros(30, int))) == pytest.approx(1)
    assert inception_score(np.zeros((30, 10))) == pytest.approx(1)


def test_scores_equal_their_definitions(rng):
    logits, reference = 3 * rng.normal(size=(400, 10)), rng.normal(size=(300, 10))
    p, q = softmax(logits), softmax(reference)
    divergences = entropy(p, np.broadcast_to(p.mean(0), p.shape), axis=1)
    assert inception_score(logits) == pytest.approx(np.exp(divergences.mean()))
    assert am_score(logits, reference) == pytest.approx(entropy(q.mean(0), p.mean(0)) + entropy(p, axis=1).mean())

    shuffled = p[np.random.RandomState(0).permutation(400)]
    theirs = entropy(shuffled[:200], np.repeat(shuffled[200:].mean(0)[None], 200, axis=0)).mean()
    assert inception_score_released(logits) == pytest.approx(np.exp(theirs))

    ordered = p[np.lexsort(p.T)]
    pairs = np.random.default_rng(7).integers(400, size=(2, PAIRS))
    divergences = entropy(ordered[pairs[0]], ordered[pairs[1]], axis=1)
    assert modified_inception_score(logits, 7) == pytest.approx(np.exp(np.mean(divergences)))
    # All pairs at once have a closed form, which random pairs come near.
    everything = -entropy(p, axis=1).mean() - p.mean(0) @ np.log(p).mean(0)
    assert np.log(modified_inception_score(logits, 7)) == pytest.approx(everything, rel=0.03)


def test_the_released_score_is_not_bounded_by_the_number_of_classes():
    skewed = confident(np.concatenate([np.zeros(2_000, int), np.repeat(np.arange(1, 10), 20)]))
    assert inception_score_released(skewed) > 10 > inception_score(skewed)


def test_scores_do_not_depend_on_the_order_of_clips(rng):
    features, logits, reference = rng.normal(size=(80, 12)), rng.normal(size=(80, 10)), rng.normal(size=(90, 10))
    order = rng.permutation(80)
    assert fid(features[order], features[:40]) == pytest.approx(fid(features, features[:40]), rel=1e-9)
    for score in (inception_score, modified_inception_score, lambda x: am_score(x, reference)):
        assert score(logits[order]) == pytest.approx(score(logits), rel=1e-12)
    assert am_score(logits, reference[::-1]) == pytest.approx(am_score(logits, reference), rel=1e-12)


def test_probabilities_that_float32_rounds_to_zero_leave_scores_finite():
    logits = np.float32(300) * np.eye(10, dtype=np.float32)
    assert np.isfinite([modified_inception_score(logits), am_score(logits, logits[:5]), inception_score(logits)]).all()


def test_bad_input_is_one_line(rng):
    features, logits = rng.normal(size=(30, 20)), rng.normal(size=(30, 10))
    with pytest.raises(
        UserError, match=r"20 clips are fewer than the 21 that a covariance needs.*allow_rank_deficient"
    ):
        fid(features, features[:20])
    assert fid(features, features[:20], allow_rank_deficient=True) > 0
    with pytest.raises(UserError, match="1 clips are fewer than the 2 that a covariance needs"):
        fid(features, features[:1], allow_rank_deficient=True)
    for bad in (np.nan, np.inf):
        broken = features.copy()
        broken[3, 4] = bad
        with pytest.raises(UserError, match="features of 1 of 30 clips are not finite"):
            fid(features, broken)
        broken = logits.copy()
        broken[5] = bad
        for score in (inception_score, inception_score_released, modified_inception_score):
            with pytest.raises(UserError, match="logits of 1 of 30 clips are not finite"):
                score(broken)
        with pytest.raises(UserError, match="logits of 1 of 30"):
            am_score(logits, broken)
    with pytest.raises(UserError, match="no logits"):
        inception_score(logits[:0])
