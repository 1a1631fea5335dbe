"""qtool's own checkpoint: all that a method can make of a linear, to the bit, for qtool.load and further runs.

    NAME.weight::codes [out, words] int32, packed    NAME.weight::scale    NAME.weight::zero    NAME.weight::second ...
    NAME.low_rank::left [out, rank]    NAME.low_rank::right [rank, in]    NAME.low_rank::scale [rank]
    NAME.inputs::scale [1]    NAME.inputs::zero [1], of inputs with static scales
    NAME.rotation::signs [in] int8, where the linear, a dense one too, rotates its input
    NAME.weight::facts [bytes] uint8, JSON: schemes, numbers of the tensor, and dtype and shape of each of its parts
The tensors are those that a run keeps of its steps (qtool/model/store.py), so that nothing is rounded: second-level scales,
column scales, salient columns, outliers, lattice codes, low-rank factors, schemes of activations and of the cache. Experts of a
mixture stand one by one, gate and up together; a Conv1D's codes are [out, in] as any linear's. Dense tensors are as everywhere.
config.json's quantization_config has quant_method, version, how a quantized cache is kept (static scales are the attentions'
tensors k_scale and v_scale; KIVI has none) and what attentions round; a version newer than the one that reads it is refused.
Why facts are a tensor beside the codes, as in bitsandbytes' files: what is known only when a linear is encoded cannot stand in
config.json, which is settled before, and the files' metadata would have to be carried from file to file. So any shard can be
read alone, streamed ones too, and the index says where facts lie.
Source: the safetensors format, https://github.com/huggingface/safetensors#format.
For: qtool.load, which makes a transformers model of it, and what no other format holds. No other runtime reads it.
Costs: writing the file.
"""

from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import ModelHandle
from qtool.model.own_layout import VERSION, pack_linear
from qtool.model.writer import Encode, Storage, written_by
from qtool.options import ExportOptions
from qtool.registry import Method


class QtoolOptions(ExportOptions):
    """The format leaves nothing else to choose."""


def storage(model: ModelHandle, schemes: dict[str, Scheme], options: QtoolOptions) -> Storage:
    """What the checkpoint is made of."""
    cache = model.cache()
    rounding = model.rounding()
    held = {name: one.model_dump() for name, one in (("cache", cache), ("attention", rounding)) if one is not None}
    is_static = any(scheme.activations is not None and scheme.activations.static for scheme in schemes.values())
    is_rotated = "rotation of the input" in model.additions().values()
    version = VERSION if is_static or is_rotated else 2 if held else 1  # the least that holds it
    return Storage(encoder(schemes), {"quant_method": "qtool", "version": version, **held}, holds_rotations=True)


def encoder(schemes: dict[str, Scheme]) -> Encode:
    """Of a linear to all its tensors; nothing is lost."""

    def encode(name: str, layer: QuantLinear) -> tuple[dict[str, Tensor], bool]:
        return pack_linear(name, layer.qt, schemes[name], layer.low_rank, layer.inputs), True

    return encode


def check_schemes(model: ModelHandle, schemes: dict[str, Scheme], options: QtoolOptions) -> None:
    """Raise QtoolError where nothing is quantized, neither linears nor attention."""
    if not schemes and model.cache() is None and model.rounding() is None:
        raise QtoolError("export/qtool: no linear is quantized; put a quantize step before it, or use export/safetensors")


METHOD = Method(
    run=written_by(storage),
    options=QtoolOptions,
    scope="model",
    holds=check_schemes,
    storage=storage,
    holds_additions=True,
    holds_cache=True,
    holds_kivi=True,
    holds_attention=True,
)
