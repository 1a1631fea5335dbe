"""Outliers: each definition against loops over single values, planted ones, and what has no spread."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from qtool.linalg import outliers


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_planted_value_is_the_only_massive_activation_and_outlier() -> None:
    x = 0.1 * normal(20, 300)
    assert not outliers.massive_activations(x).any() and not outliers.activation_outliers(x).any()
    x[7, 123] = -1e4
    for found in (outliers.massive_activations(x), outliers.activation_outliers(x)):
        assert found.nonzero().tolist() == [[7, 123]]


def test_thresholds_are_of_the_mean_and_of_the_median_and_strict() -> None:
    x = torch.full((10, 1000), 0.01)
    x[0, 0] = 100.0  # 10000 times the median, and not above 100; the mean is 0.02, so 5000 times that
    assert not outliers.massive_activations(x).any() and outliers.activation_outliers(x).sum() == 1
    x[0, 0] = 100.1
    assert outliers.massive_activations(x).sum() == 1
    x[:, :20] = 100.1  # so many are no outliers by the mean, but are massive by the median
    assert outliers.massive_activations(x).sum() == 200 and not outliers.activation_outliers(x).any()


def test_emergent_features_need_both_many_layers_and_many_tokens() -> None:
    share = torch.zeros(8, 5)  # [layers, channels]
    share[:2, 1] = 0.24  # a quarter of the layers, 6 % of all tokens
    share[:2, 2] = 0.23  # too few tokens
    share[0, 3] = 1.0  # too few layers
    assert outliers.emergent_features(share).tolist() == [False, True, False, False, False]


def test_reaches_and_peaks_are_those_of_every_row_and_column_by_itself() -> None:
    W = normal(7, 11)
    w = W.abs().numpy()
    rows, columns = [max(row) for row in w], [max(column) for column in w.T]
    found = [part.numpy() for part in (*outliers.reaches(W), *outliers.peaks(W))]
    np.testing.assert_allclose(found[0], np.array(rows) / np.sort(rows)[3], rtol=1e-6)
    np.testing.assert_allclose(found[1], np.array(columns) / np.sort(columns)[5], rtol=1e-6)
    np.testing.assert_allclose(found[2], [max(row) / np.mean(row) for row in w], rtol=1e-6)
    np.testing.assert_allclose(found[3], [max(column) / np.mean(column) for column in w.T], rtol=1e-6)


def test_a_large_column_has_reach_and_no_peak_and_a_large_weight_has_both() -> None:
    W = normal(64, 48)
    W[:, 5] *= 100
    W[9, 30] = 90
    reach, peak = outliers.reaches(W)[1], outliers.peaks(W)[1]
    assert (reach > outliers.TIMES_MEDIAN_REACH).nonzero().flatten().tolist() == [5, 30]
    assert peak.argmax() == 30 and peak[5] < 10


def test_weights_of_zero_have_no_outliers() -> None:
    zero = torch.zeros(4, 6)
    assert all(not part.any() for part in (*outliers.reaches(zero), *outliers.peaks(zero)))
    zero[1, 2] = 3.0  # the only row that is not zero
    assert [part.max() for part in outliers.reaches(zero)] == [1, 1]


def test_attention_is_summed_over_queries_and_averaged_over_heads() -> None:
    n_heads, length = 2, 6
    logits = normal(n_heads, length, length).masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    A = logits.softmax(-1)
    received, times_uniform = outliers.received_attention(A)
    for k in range(length):
        total = sum(float(A[h, q, k]) for h in range(n_heads) for q in range(k, length)) / n_heads
        uniform = sum(1 / (q + 1) for q in range(k, length))
        assert float(received[k]) == pytest.approx(total / length, rel=1e-5)
        assert float(times_uniform[k]) == pytest.approx(total / uniform, rel=1e-5)
    assert float(received.sum()) == pytest.approx(1, rel=1e-5)


def test_uniform_attention_has_no_sink_and_a_planted_sink_is_found() -> None:
    length = 200
    A = torch.ones(3, length, length).tril()
    A /= A.sum(-1, keepdim=True)
    received, times_uniform = outliers.received_attention(A)
    assert not outliers.attention_outliers(received).any()
    assert torch.allclose(times_uniform, torch.ones(length), atol=1e-5)
    A[:, 40:] *= 0.5
    A[:, 40:, 40] += 0.5
    assert outliers.attention_outliers(outliers.received_attention(A)[0]).nonzero().tolist() == [[40]]


def test_keys_outside_a_sliding_window_are_no_queries_that_saw_them() -> None:
    A = torch.ones(1, 8, 8).tril().triu(-2)
    A /= A.sum(-1, keepdim=True)
    assert torch.allclose(outliers.received_attention(A)[1], torch.ones(8))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_kurtosis_is_pearsons_in_one_piece_and_in_batches(offset: float) -> None:
    x = torch.cat([normal(700, 5), 30 * normal(20, 5, seed=1)]).double() + offset
    expected = scipy.stats.kurtosis(x.numpy(), axis=None, fisher=False)
    assert outliers.kurtosis(x) == pytest.approx(expected, rel=1e-9)  # rows come 512 at a time
    moments = outliers.Moments()
    for batch in x.split([1, 600, 0, 119]):
        moments.update(batch)
    assert moments.kurtosis() == pytest.approx(expected, rel=1e-9)


def test_what_does_not_vary_has_no_kurtosis() -> None:
    moments = outliers.Moments()
    assert moments.kurtosis() is None
    for value in (0.0, 0.1):
        constant = torch.full((300, 7), value)
        moments = outliers.Moments()
        for batch in constant.split(100):
            moments.update(batch)
        assert outliers.kurtosis(constant) is None and moments.kurtosis() is None


def test_the_kurtosis_of_channels_is_1_where_alike_and_their_number_where_one_rules() -> None:
    mean_square = torch.tensor([1.0, 4.0, 0.25])
    expected = np.mean([1, 16, 0.0625]) / np.mean([1, 4, 0.25]) ** 2
    assert outliers.channel_kurtosis(mean_square) == pytest.approx(expected)
    assert outliers.channel_kurtosis(torch.full((9,), 3.0)) == pytest.approx(1)
    assert outliers.channel_kurtosis(torch.tensor([0.0, 0.0, 5.0, 0.0])) == pytest.approx(4)
    assert outliers.channel_kurtosis(torch.zeros(4)) is None


def test_the_ratio_of_channels_is_none_where_most_are_dead() -> None:
    assert outliers.channel_ratio(torch.tensor([1.0, 2.0, 10.0])) == 5
    assert outliers.channel_ratio(torch.tensor([0.0, 0.0, 1.0])) is None
