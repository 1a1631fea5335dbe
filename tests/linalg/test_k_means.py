"""k-means: Lloyd's iteration as slow loops have it, clear clusters found, and more clusters than different points."""

import torch

from qtool.linalg.k_means import first_centres, k_means


def slow_k_means(points: list[list[float]], centres: list[list[float]]) -> list[int]:
    """Lloyd's iteration, point by point, until nothing changes."""

    def nearest(x: list[float]) -> int:
        gaps = [sum((a - b) ** 2 for a, b in zip(x, c, strict=True)) for c in centres]
        return gaps.index(min(gaps))

    cluster: list[int] = []
    while (found := [nearest(x) for x in points]) != cluster:
        cluster = found
        for k in set(cluster):
            own = [x for x, of in zip(points, cluster, strict=True) if of == k]
            centres[k] = [sum(column) / len(own) for column in zip(*own, strict=True)]
    return cluster


def test_clusters_are_those_of_the_plain_loops() -> None:
    points = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    begun = first_centres(points, 4, torch.Generator().manual_seed(0))
    assert k_means(points, 4, 0)[0].tolist() == slow_k_means(points.tolist(), begun.tolist())


def test_clear_clusters_are_found_and_their_centres_are_means() -> None:
    random = torch.Generator().manual_seed(0)
    middles = torch.tensor([[0.0, 0], [100, 0], [0, 100]])
    points = (middles[:, None] + torch.randn(3, 7, 2, generator=random)).flatten(0, 1)
    cluster, centres = k_means(points, 3, 5)
    assert [len(set(part)) for part in cluster.view(3, 7).tolist()] == [1, 1, 1] and len(set(cluster.tolist())) == 3
    assert torch.allclose(centres[cluster[0]], points[:7].mean(0))


def test_first_centres_are_drawn_by_squared_distance() -> None:
    points = torch.tensor([[0.0], [1.0], [3.0]])
    counts = {1.0: 0, 3.0: 0}
    for seed in range(600):
        first, second = first_centres(points, 2, torch.Generator().manual_seed(seed)).flatten().tolist()
        if first == 0:
            counts[second] += 1
    assert sum(counts.values()) > 150 and 0.83 < counts[3.0] / sum(counts.values()) < 0.97  # 0.9, deviation 0.02


def test_equal_points_make_one_cluster_and_the_others_stay_empty() -> None:
    cluster, centres = k_means(torch.ones(5, 2), 3, 0)
    assert cluster.tolist() == [0] * 5 and torch.equal(centres, torch.ones(3, 2))
