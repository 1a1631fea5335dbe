"""What kernels ask of a model: the names that runtimes join, linears left dense, the head."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.formats.scheme import Scheme
from qtool.model.architectures import fused_units
from qtool.model.handle import ModelHandle
from qtool.model.kernel_limits import dense_linears, head_name
from qtool.options import ModelOptions


def test_linears_that_share_an_input_are_joined_under_one_name() -> None:
    names = ["a.q_proj", "a.v_proj", "a.k_proj", "a.o_proj", "b.q_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert fused_units(names) == {
        "a.qkv_proj": ["a.q_proj", "a.k_proj", "a.v_proj"],
        "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    }
    assert fused_units(["up_proj", "gate_proj"]) == {"gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "falcon"])
def test_the_head_is_a_linear_too(family: str, tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model(family))))
    assert head_name(model) == "lm_head"
    assert set(dense_linears(model, {})) == {*model.linear_names()}


def test_linears_without_a_scheme_are_dense(tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama"))))
    schemes = {name: Scheme.model_validate("w4a16g32") for name in model.linear_names() if "o_proj" not in name}
    assert dense_linears(model, schemes) == [f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)]
