"""What cannot be found by looking at a model, as data: the few facts that differ between families."""

# Norms whose gain is 1 + weight (the class name starts with one of these).
OFFSET_NORMS = ("Gemma",)

# Linears that choose experts: small, decisive, never quantized or pruned (last part of the module's name).
ROUTERS = ("gate", "router", "shared_expert_gate")


def is_router(name: str) -> bool:
    """Whether a linear's name says that it routes tokens to experts."""
    return name.rsplit(".", 1)[-1] in ROUTERS


def gain_offset(norm: object) -> float:
    """What a norm adds to its weight before it multiplies: 1 for Gemma's, else 0."""
    return 1.0 if type(norm).__name__.startswith(OFFSET_NORMS) else 0.0
