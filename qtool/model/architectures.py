"""What cannot be found by looking at a model, as data: the few facts that differ between families."""

from collections.abc import Iterable

# Norms whose gain is 1 + weight (the class name starts with one of these).
OFFSET_NORMS = ("Gemma",)

# Linears that choose experts: small, decisive, never quantized or pruned (last part of the module's name).
ROUTERS = ("gate", "router", "shared_expert_gate")

# Linears that share an input, by the name that runtimes give to what they join them as.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

# Sizes that a config states: transformers' names for each, the first that a config has counts.
SIZES = {
    "blocks": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "neurons": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}
EXPERT_NEURONS = "moe_intermediate_size"  # what a mixture calls its experts' neurons where other MLPs have a size of their own

# Fields of a config that hold one entry a block.
PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")


def is_router(name: str) -> bool:
    """Whether a linear's name says that it routes tokens to experts."""
    return name.rsplit(".", 1)[-1] in ROUTERS


def gain_offset(norm: object) -> float:
    """What a norm adds to its weight before it multiplies: 1 for Gemma's, else 0."""
    return 1.0 if type(norm).__name__.startswith(OFFSET_NORMS) else 0.0


def fused_units(names: Iterable[str]) -> dict[str, list[str]]:
    """The full name that runtimes give to linears they join: those of `names` that it joins, two or more."""
    known = set(names)
    units: dict[str, list[str]] = {}
    for name in sorted(known):
        parent, dot, last = name.rpartition(".")
        for fused, parts in FUSED.items():
            if last in parts:
                units[f"{parent}{dot}{fused}"] = [part for end in parts if (part := f"{parent}{dot}{end}") in known]
    return {unit: members for unit, members in units.items() if len(members) > 1}
