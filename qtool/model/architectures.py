"""What cannot be found by looking at a model, as data: the few facts that differ between families."""

# Norms whose gain is 1 + weight (the class name starts with one of these).
OFFSET_NORMS = ("Gemma",)

# Linears that choose experts: small, decisive, never quantized or pruned (last part of the module's name).
ROUTERS = ("gate", "router", "shared_expert_gate")

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
