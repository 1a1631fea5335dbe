"""Layerwise densities: how a budget of weights is shared out among matrices of different shapes.

    uniform   d_l = d            erk   d_l = min(1, eps (out + in) / (out in)),  eps so that  sum_l d_l out in = d sum_l out in
    d in (0, 1] the share of all weights that stay
Source: Mocanu et al. 2018, arXiv:1707.04780 (SET), section "Methods"; Evci et al. 2020, arXiv:1911.11134 (RigL), section 3,
whose kernel terms are of convolutions.
"""


def erk_densities(shapes: dict[str, tuple[int, int]], density: float) -> dict[str, float]:
    """Density of each matrix by name; those that would get more than all their weights are dense, the rest share the rest."""
    dense: set[str] = set()
    while True:
        rest = {name: shape for name, shape in shapes.items() if name not in dense}
        if not rest:
            return dict.fromkeys(shapes, 1.0)
        budget = density * sum(a * b for a, b in shapes.values()) - sum(a * b for a, b in (shapes[name] for name in dense))
        eps = budget / sum(a + b for a, b in rest.values())
        found = {name: eps * (a + b) / (a * b) for name, (a, b) in rest.items()}
        full = {name for name, share in found.items() if share > 1}
        if not full:
            return {name: found.get(name, 1.0) for name in shapes}
        dense |= full
