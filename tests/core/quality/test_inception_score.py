import pytest
import torch

from errata.errors import ReportError
from errata.quality.inception_score import (
    inception_score,
    resampled_inception_scores,
    streamed_inception_score,
    weighted_inception_score,
)
from errata.quality.resampling import resample_counts


def test_sure_and_even_is_the_number_of_classes_and_unsure_is_one() -> None:
    sure = 1000 * torch.eye(5).repeat(4, 1)  # probabilities underflow to exactly 0 and 1
    assert inception_score(sure) == pytest.approx(5.0, rel=1e-12)
    assert inception_score(torch.zeros(20, 5)) == pytest.approx(1.0, rel=1e-12)
    assert inception_score(sure[:1].repeat(20, 1)) == pytest.approx(1.0, rel=1e-12)


def test_it_is_the_mean_divergence_from_the_mean() -> None:
    logits = torch.randn(30, 4).double()
    p = logits.softmax(dim=1)
    divergences = [float((row * (row / p.mean(dim=0)).log()).sum()) for row in p]
    expected = torch.tensor(divergences, dtype=torch.float64).mean().exp()
    assert inception_score(logits) == pytest.approx(float(expected), rel=1e-12)
    assert inception_score(p.log()) == pytest.approx(float(expected), rel=1e-12)


def test_splits_are_contiguous_and_in_order() -> None:
    logits = 3 * torch.randn(31, 4)
    parts = [logits[:10], logits[10:20], logits[20:]]
    expected = sum(inception_score(part) for part in parts) / 3
    assert inception_score(logits, splits=3) == pytest.approx(expected, rel=1e-12)
    assert abs(inception_score(logits) - expected) > 1e-3


def test_weights_are_repetitions() -> None:
    logits = torch.randn(5, 4)
    weights = torch.tensor([[2, 0, 1, 3, 0], [1, 1, 1, 1, 1]])
    repeated = logits.repeat_interleave(weights[0], dim=0)
    scores = weighted_inception_score(logits, weights)
    assert scores.tolist() == pytest.approx([inception_score(repeated), inception_score(logits)], rel=1e-12)
    assert float(weighted_inception_score(logits, weights[0])) == pytest.approx(float(scores[0]), rel=1e-12)


def test_streamed_resamples_are_those_of_a_direct_loop() -> None:
    logits = torch.randn(23, 4)
    streamed = resampled_inception_scores(lambda: logits.split([5, 1, 17]), 23, resamples=6, seed=2)
    (counts,) = resample_counts(23, 6, seed=2)
    direct = [inception_score(logits.repeat_interleave(row.long(), dim=0)) for row in counts]
    assert streamed.tolist() == pytest.approx(direct, rel=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    logits = torch.randn(5, 4)
    with pytest.raises(ReportError, match="splits=6 for 5 images; give 1 to 5"):
        inception_score(logits, splits=6)
    with pytest.raises(ReportError, match="splits=0"):
        inception_score(logits, splits=0)
    with pytest.raises(ValueError, match=r"weights have shape \(4,\) for 5 images"):
        weighted_inception_score(logits, torch.ones(4))
    for count in (4, 6):
        with pytest.raises(ValueError, match=f"the logits hold 5 images or more; {count} were announced"):
            resampled_inception_scores(lambda: [logits], count, resamples=2, seed=0)


def test_pieces_score_as_the_whole() -> None:
    logits = 3 * torch.randn(50, 7)
    assert streamed_inception_score(logits.split(8)) == pytest.approx(inception_score(logits), rel=1e-12)
    with pytest.raises(ValueError, match="no logits"):
        streamed_inception_score([])
