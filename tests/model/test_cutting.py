"""A model cut to smaller sizes is an ordinary one that computes what the large one does without the units that go."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qtool.errors import QtoolError
from qtool.model.cutting import Cut, Cutter
from qtool.model.handle import ModelHandle
from qtool.model.shape import Shape, config_of, find_sides, n_parameters, shape_of_model, smaller
from qtool.model.writer import write_checkpoint
from qtool.options import ModelOptions
from qtool.pipeline.shaping import write_cut

# A sum of fewer products, in another order, of float32: their sixth digit.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
GATED = ["llama", "mistral", "qwen2", "qwen3", "gemma3"]  # gate, up and down projections, grouped heads


@pytest.fixture
def handle(tiny_model: Callable[..., Path]) -> Callable[..., ModelHandle]:
    def build(family: str, **fields: object) -> ModelHandle:
        return ModelHandle(ModelOptions(path=str(tiny_model(family, **fields))))

    return build


@pytest.fixture
def written(tmp_path: Path) -> Callable[[ModelHandle, Cut], PreTrainedModel]:
    """The smaller model, exported, as plain transformers loads it."""

    def run(model: ModelHandle, cut: Cut) -> PreTrainedModel:
        write_cut(Cutter(model, cut), tmp_path / "cut")
        small = ModelHandle(model.options, (*model.changes, tmp_path / "cut"))
        (tmp_path / "out").mkdir()
        write_checkpoint(small, tmp_path / "out")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert plain.num_parameters() == small.n_parameters()
        return plain.eval()

    return run


def cut_of(model: ModelHandle, blocks: list[int] | None = None, **kept: dict[str, list[int]] | list[int]) -> Cut:
    """`heads={"": [0, 2]}` keeps these of every block."""
    shape, found = shape_of_model(model), {}
    blocks = list(range(shape.blocks)) if blocks is None else blocks
    sizes = shape.__dict__ | {"blocks": len(blocks)}
    for axis, units in kept.items():
        sizes[axis] = len(units)
        for index in range(shape.blocks):
            place = {"hidden": "", "neurons": f"{model.blocks_name}.{index}.mlp"}.get(axis, f"{model.blocks_name}.{index}")
            found[f"{axis}:{place}"] = torch.tensor(units)
    return Cut(Shape(**sizes), tuple(blocks), found)


def dense(model: ModelHandle) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model.folder).eval()


def without(weight: Tensor, gone: list[int], dim: int) -> None:
    weight.data.index_fill_(dim, torch.tensor(gone), 0)


def like(output: Tensor | tuple[Tensor, ...], hidden: Tensor) -> Tensor | tuple[Tensor, ...]:
    """hidden in the form that a block gives."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@torch.no_grad()
def logits(model: PreTrainedModel, windows: Tensor) -> Tensor:
    return model(windows).logits


@pytest.mark.parametrize("family", GATED)
def test_neurons_and_heads_that_go_are_those_set_to_zero(
    family: str, handle: Callable[..., ModelHandle], written: Callable[..., PreTrainedModel], windows: Tensor
) -> None:
    model, reference = handle(family), None
    neurons = [n for n in range(128) if n % 3]
    small = written(model, cut_of(model, neurons=neurons, heads=[0, 3], kv_heads=[0, 1]))
    reference = dense(model)
    for layer in reference.model.layers:
        without(layer.mlp.down_proj.weight, [n for n in range(128) if n % 3 == 0], 1)
        without(layer.self_attn.o_proj.weight, list(range(16, 48)), 1)  # heads 1 and 2 of 16 channels
    assert small.config.intermediate_size == len(neurons) and small.config.num_attention_heads == 2
    torch.testing.assert_close(logits(small, windows), logits(reference, windows), **CLOSE)


def test_a_key_value_head_goes_with_the_heads_that_share_it(
    handle: Callable[..., ModelHandle], written: Callable[..., PreTrainedModel], windows: Tensor
) -> None:
    model = handle("qwen2")
    small, reference = written(model, cut_of(model, heads=[2, 3], kv_heads=[1])), dense(model)
    for layer in reference.model.layers:
        without(layer.self_attn.o_proj.weight, list(range(32)), 1)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 1)
    torch.testing.assert_close(logits(small, windows), logits(reference, windows), **CLOSE)


def test_fused_projections_are_cut_part_by_part(
    handle: Callable[..., ModelHandle], written: Callable[..., PreTrainedModel], windows: Tensor
) -> None:
    model = handle("phi3")
    small, reference = (
        written(model, cut_of(model, heads=[1, 2], kv_heads=[0, 1], neurons=list(range(0, 128, 2)))),
        dense(model),
    )
    for layer in reference.model.layers:
        without(layer.self_attn.o_proj.weight, [*range(16), *range(48, 64)], 1)
        without(layer.mlp.down_proj.weight, list(range(1, 128, 2)), 1)
    torch.testing.assert_close(logits(small, windows), logits(reference, windows), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_hidden_channels_that_go_leave_the_norms_of_those_that_stay(
    family: str, handle: Callable[..., ModelHandle], written: Callable[..., PreTrainedModel], windows: Tensor
) -> None:
    model = handle(family)
    kept = [channel for channel in range(64) if channel % 4 != 1]
    small, reference = written(model, cut_of(model, hidden=kept)), dense(model)
    mask = torch.zeros(64)
    mask[kept] = 1

    class MaskedNorm(torch.nn.Module):
        """x · gain / sqrt(mean of x² over the channels that stay + eps)"""

        def __init__(self, norm: torch.nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            mean = (x * mask).square().sum(-1, keepdim=True) / mask.sum()
            return x * mask * self.norm.weight / torch.sqrt(mean + self.norm.variance_epsilon)

    reference.model.embed_tokens.weight.data *= mask
    reference.model.norm = MaskedNorm(reference.model.norm)
    for layer in reference.model.layers:
        layer.input_layernorm = MaskedNorm(layer.input_layernorm)
        layer.post_attention_layernorm = MaskedNorm(layer.post_attention_layernorm)
        layer.self_attn.o_proj.weight.data *= mask[:, None]
        if family == "mixtral":
            layer.mlp.experts.down_proj.data *= mask[:, None]
        else:
            layer.mlp.down_proj.weight.data *= mask[:, None]
    torch.testing.assert_close(logits(small, windows), logits(reference, windows), **CLOSE)


def test_blocks_go_from_every_family(
    family: str, handle: Callable[..., ModelHandle], written: Callable[..., PreTrainedModel], windows: Tensor
) -> None:
    model = handle(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 3})
    small, reference = written(model, cut_of(model, blocks=[0, 2])), dense(model)
    layers = reference.get_submodule(model.blocks_name)
    kept = type(layers[1]).forward
    layers[1].forward = lambda hidden, *args, **kwargs: like(kept(layers[1], hidden, *args, **kwargs), hidden)
    with torch.no_grad():
        generated = small.generate(windows[:1, :8], max_new_tokens=4, do_sample=False)  # a cache of two layers
        again = small.generate(windows[:1, :8], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(generated, again)
    torch.testing.assert_close(logits(small, windows), logits(reference, windows), **CLOSE)


def test_blocks_of_several_kinds_keep_their_kinds(
    handle: Callable[..., ModelHandle], written: Callable[..., PreTrainedModel], windows: Tensor
) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = handle("gemma3", num_hidden_layers=4, layer_types=kinds)
    small = written(model, cut_of(model, blocks=[1, 2]))
    assert small.config.layer_types == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "falcon"])
def test_neurons_go_from_families_whose_heads_cannot(
    family: str, handle: Callable[..., ModelHandle], written: Callable[..., PreTrainedModel], windows: Tensor
) -> None:
    model, reference = handle(family), None
    kept = list(range(40, 128))
    cut = cut_of(model, neurons=kept)
    if family == "opt":  # its two linears stand in the block itself
        cut = Cut(cut.shape, cut.blocks, {name.removesuffix(".mlp"): units for name, units in cut.kept.items()})
    small, reference = written(model, cut), dense(model)
    for layer in reference.get_submodule(model.blocks_name):
        down = {"opt": "fc2", "gpt2": "mlp.c_proj"}.get(family, "mlp.dense_4h_to_h")
        without(layer.get_submodule(down).weight, list(range(40)), 0 if family == "gpt2" else 1)
    torch.testing.assert_close(logits(small, windows), logits(reference, windows), **CLOSE)


@pytest.mark.parametrize(
    ("family", "cut", "message"),
    [
        ("gpt2", {"hidden": list(range(32))}, "both of its sides are as wide as the hidden channels of GPT2LMHeadModel"),
        ("gpt_neox", {"heads": [0, 1], "kv_heads": [0, 1]}, "no tensor is as wide as its heads alone"),
        ("gemma3", {"hidden": list(range(32))}, "the embedding: cut, it would not compute"),  # it multiplies by sqrt(hidden)
        ("llama", {"heads": [0, 1, 2], "kv_heads": [0, 1]}, "3 heads cannot share 2 key/value heads evenly; keep 2, 4"),
        ("llama", {"heads": [0, 1, 2], "kv_heads": [0]}, "not a multiple of the number of attention heads"),
        ("llama", {"experts": [0]}, "LlamaForCausalLM has no experts"),
        ("mixtral", {"experts": [0]}, "1 experts are less than the 2 that each token goes to"),
    ],
)
def test_what_a_model_does_not_allow_is_refused_by_name(
    family: str, cut: dict[str, list[int]], message: str, handle: Callable[..., ModelHandle], tmp_path: Path
) -> None:
    model = handle(family)
    with pytest.raises(QtoolError, match=message):
        write_cut(Cutter(model, cut_of(model, **cut)), tmp_path / "cut")
    assert not (tmp_path / "cut" / "config.json").exists()


def test_a_wrong_wiring_is_refused_not_applied(handle: Callable[..., ModelHandle], tmp_path: Path) -> None:
    """Queries of a wrong group: the trial sees that the smaller block computes something else."""
    model = handle("llama")
    cut = cut_of(model, heads=[0, 1], kv_heads=[0, 1])  # both of the first group, so head 1 would read the second's keys
    with pytest.raises(QtoolError, match=r"model.layers.0: cut, it would not compute"):
        write_cut(Cutter(model, cut), tmp_path / "cut")


def test_experts_that_go_are_those_that_the_router_cannot_choose(
    handle: Callable[..., ModelHandle], written: Callable[..., PreTrainedModel], windows: Tensor
) -> None:
    model = handle("mixtral")
    small, reference = written(model, cut_of(model, experts=[0, 1, 3])), dense(model)

    def forbid(module: torch.nn.Module, args: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        chosen = out[0].clone()
        chosen[:, 2] = -torch.inf
        weights, index = chosen.float().softmax(-1).topk(2)
        return out[0], weights / weights.sum(-1, keepdim=True), index

    for layer in reference.model.layers:
        layer.mlp.gate.register_forward_hook(forbid)
    assert small.config.num_local_experts == 3
    torch.testing.assert_close(logits(small, windows), logits(reference, windows), **CLOSE)


def test_cuts_follow_one_another_and_earlier_changes(
    handle: Callable[..., ModelHandle], tmp_path: Path, logits_of: Callable[[ModelHandle], Tensor]
) -> None:
    """A cut of a cut is the cut of both; the handle between holds no trace of the first checkpoint."""
    model = handle("llama", num_hidden_layers=3)
    write_cut(Cutter(model, cut_of(model, blocks=[0, 2])), tmp_path / "first")
    between = ModelHandle(model.options, (tmp_path / "first",))
    write_cut(Cutter(between, cut_of(between, neurons=list(range(64)))), tmp_path / "second")
    after = ModelHandle(model.options, (tmp_path / "first", tmp_path / "second"))
    channels = list(range(0, 64, 2))
    write_cut(Cutter(after, cut_of(after, hidden=channels)), tmp_path / "third")
    after = ModelHandle(model.options, (tmp_path / "first", tmp_path / "second", tmp_path / "third"))
    both = cut_of(model, blocks=[0, 2], neurons=list(range(64)), hidden=channels)
    write_cut(Cutter(model, both), tmp_path / "both")
    torch.testing.assert_close(logits_of(after), logits_of(ModelHandle(model.options, (tmp_path / "both",))), rtol=0, atol=0)


def test_parameters_are_counted_before_any_cut(family: str, handle: Callable[..., ModelHandle]) -> None:
    model = handle(family)
    shape = shape_of_model(model)
    for changes in ({"blocks": 1}, {"neurons": 48}, {"blocks": 1, "neurons": 100}):
        small = Shape(**shape.__dict__ | changes)
        sides = find_sides(model, list(changes))
        assert n_parameters(model, sides, small) == smaller(model, small).n_parameters()


def test_a_quantized_model_is_cut_before_it_is_quantized(
    tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle]
) -> None:
    model = quantized(tiny_model("llama"), "w4a16g32")
    with pytest.raises(QtoolError, match="q_proj is quantized already; make the model smaller first"):
        smaller(model, Shape(**shape_of_model(model).__dict__ | {"neurons": 64}))


def test_a_head_that_stays_takes_on_the_difference_from_its_partner(handle: Callable[..., ModelHandle]) -> None:
    model = handle("llama", num_key_value_heads=4)
    kept = {axis: [0, 3] for axis in ("heads", "kv_heads")}
    cut = cut_of(model, **kept)
    partners = {name: torch.tensor([-1, 1]) for name in cut.kept}
    cutter, block = Cutter(model, Cut(cut.shape, cut.blocks, cut.kept, partners)), model.block(0)
    found = cutter.block_tensors(block, 0)
    for name in ("q_proj", "v_proj"):
        W = block.get(f"model.layers.0.self_attn.{name}").weight.view(4, 16, 64)
        expected = torch.cat([W[0], 2 * W[3] - W[1]])
        torch.testing.assert_close(found[f"model.layers.0.self_attn.{name}.weight"], expected)
    o_proj = block.get("model.layers.0.self_attn.o_proj").weight.unflatten(1, (4, 16))
    assert torch.equal(found["model.layers.0.self_attn.o_proj.weight"], o_proj[:, [0, 3]].flatten(1))


def test_config_of_states_the_width_of_a_head_where_it_was_a_quotient(handle: Callable[..., ModelHandle]) -> None:
    model = handle("qwen2")
    assert model.stated_config.get("head_dim") is None
    shape = Shape(**shape_of_model(model).__dict__ | {"heads": 2})
    assert config_of(model, shape, range(2))["head_dim"] == 16
