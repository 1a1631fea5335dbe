"""k-means: centres of clusters, each point with its nearest, so that the squared distances add up to little.

    a(x) = argmin over k of ‖x - c_k‖²        c_k = mean of the x with a(x) = k        in turn, until no a(x) changes
    first centres: a point at random, then each next one with probability ~ its squared distance from the nearest before it
A cluster that no point is nearest to keeps its centre.
Source: Lloyd 1982, doi:10.1109/TIT.1982.1056489; first centres: Arthur and Vassilvitskii 2007, "k-means++".
"""

import torch
from torch import Tensor

ROUNDS = 100  # at most; Lloyd's iteration ends by itself, far sooner on some thousand points


def k_means(points: Tensor, n_clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """The cluster of each point [n] and the centres [clusters, features] of points [n, features]."""
    centres = first_centres(points, n_clusters, torch.Generator().manual_seed(seed))  # [clusters, features]
    cluster = nearest_centre(points, centres)  # [n]
    for _ in range(ROUNDS):
        for k in cluster.unique().tolist():
            centres[k] = points[cluster == k].mean(0)
        before, cluster = cluster, nearest_centre(points, centres)
        if torch.equal(before, cluster):
            break
    return cluster, centres


def first_centres(points: Tensor, n_clusters: int, random: torch.Generator) -> Tensor:
    """[clusters, features]; once every point is a centre, more of them are points again."""
    chosen = [int(torch.randint(len(points), (1,), generator=random))]
    while len(chosen) < n_clusters:
        gaps = squared_distances(points, points[chosen]).amin(1)  # [n]
        gaps[chosen] = 0  # where rounding leaves a rest
        weights = gaps if bool(gaps.any()) else torch.ones_like(gaps)
        chosen.append(int(torch.multinomial(weights, 1, generator=random)))
    return points[chosen]


def nearest_centre(points: Tensor, centres: Tensor) -> Tensor:
    """[n] of points [n, features]; of equally near ones the first."""
    return squared_distances(points, centres).argmin(1)


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """[n, clusters]."""
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
