"""What the kernels for GPTQ's and AWQ's layouts ask of a model's linears; raises before any work.

Numbers of inputs and outputs are multiples of 32, so that words of every width end with them; groups have the sizes that
kernels are built for. vLLM and SGLang keep linears that share an input as one, under a name of its own, and look their
scheme up by it: those must be stored alike. Experts and GPT-2's Conv1D are stored otherwise by every runtime.
Source: GPTQModel 7.7, SUPPORTS_* of nn_modules/qlinear and FUSED_PROJECTION_UNITS of utils/model.py.
"""

from torch import nn

from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme, WeightScheme
from qtool.model.architectures import fused_units
from qtool.model.checkpoint import EXPERT
from qtool.model.handle import ModelHandle
from qtool.model.linear import is_linear

PLAIN_ALONE = "this export holds plain scales along `in`; use export/safetensors"
MULTIPLE = 32  # of inputs, and of outputs


def head_name(model: ModelHandle) -> str | None:
    """The output head's full name; None where the model has none."""
    head = model.model.get_output_embeddings()
    return next((name for name, module in model.model.named_modules() if module is head), None)


def dense_linears(model: ModelHandle, schemes: dict[str, Scheme]) -> list[str]:
    """Full names of all linears that stay as they are, routers and the head among them."""
    linears = [name for name, module in model.model.named_modules() if is_linear(module)]
    return [name for name in linears if name not in schemes]


def check_no_experts(where: str, model: ModelHandle) -> None:
    """Raise QtoolError for a mixture of experts."""
    experts = next((name for name in model.linear_names() if EXPERT.fullmatch(name)), None)
    if experts is not None:
        raise QtoolError(f"{where}: {experts}: a mixture's experts cannot be held; use export/compressed_tensors")


def check_weights_alone(where: str, model: ModelHandle, schemes: dict[str, Scheme]) -> None:
    """Raise QtoolError where nothing is quantized, or more than plain scales along `in` of an nn.Linear's weights."""
    check_some(where, schemes)
    for name, scheme in schemes.items():
        weights = scheme.weights
        if scheme.activations is not None or scheme.kv is not None:
            raise QtoolError(f"{where}: {name}: {scheme}: {_weights_alone(weights)}")
        if weights.double_quant or weights.group_along != "out_channel":
            raise QtoolError(f"{where}: {name}: {scheme}: {PLAIN_ALONE}")
        _check_kind(where, model, name)


def check_some(where: str, schemes: dict[str, Scheme]) -> None:
    """Raise QtoolError where nothing is quantized."""
    if not schemes:
        raise QtoolError(f"{where}: no linear is quantized; put a quantize step before it, or use export/safetensors")


def check_linears(
    where: str, model: ModelHandle, schemes: dict[str, Scheme], bits: tuple[int, ...], groups: tuple[int, ...]
) -> None:
    """Raise QtoolError where nothing is quantized, or a linear to what no kernel takes."""
    check_some(where, schemes)
    for name, scheme in schemes.items():
        if scheme.weights.scale_dtype.startswith("float8"):
            raise QtoolError(f"{where}: {name}: {scheme}: {PLAIN_ALONE}")
        check_whole_numbers(f"{where}: {name}: {scheme}", scheme, bits, groups)
        _check_kind(where, model, name)
        for count, side in zip(model.linear_shape(name), ("outputs", "inputs"), strict=True):
            if count % MULTIPLE:
                raise QtoolError(
                    f"{where}: {name}: {count} {side} are no multiple of {MULTIPLE}, which kernels ask for; add it to ignore, "
                    "or use export/compressed_tensors"
                )
    for unit, members in fused_units(model.linear_names()).items():
        if len({_stored_form(schemes.get(name)) for name in members}) > 1:
            parent, _, joined = unit.rpartition(".")
            words = ", ".join(f"{name.rsplit('.', 1)[-1]} {schemes.get(name, 'dense')}" for name in members)
            raise QtoolError(
                f"{where}: {parent}: {words}; runtimes join them as {joined}, which has one scheme: give them one, or use "
                "export/compressed_tensors"
            )


def check_whole_numbers(where: str, scheme: Scheme, bits: tuple[int, ...], groups: tuple[int, ...]) -> None:
    """Raise QtoolError for all but weights alone, in whole numbers of such bits and groups or rows, zero points as codes."""
    weights = scheme.weights
    if weights.format != "int":
        raise QtoolError(f"{where}: this export holds whole numbers; quantize to w4a16g32, or use export/safetensors")
    if weights.double_quant or weights.group_along != "out_channel":
        raise QtoolError(f"{where}: {PLAIN_ALONE}")
    if weights.zero_dtype != "int":
        raise QtoolError(f"{where}: zero points must be codes, as in w4a16g128-asym; quantize so, or use export/safetensors")
    if scheme.activations is not None or scheme.kv is not None:
        raise QtoolError(f"{where}: {_weights_alone(weights)}")
    if weights.bits not in bits:
        words = " or ".join(map(str, bits))
        raise QtoolError(f"{where}: kernels take {words} bits; quantize so, or use export/compressed_tensors")
    if weights.group not in (None, *groups):
        words = ", ".join(map(str, groups))
        raise QtoolError(
            f"{where}: kernels take groups of {words} or a whole row; quantize so, or use export/compressed_tensors"
        )


def _check_kind(where: str, model: ModelHandle, name: str) -> None:
    kind = type(model.model.get_submodule(name))
    if not issubclass(kind, nn.Linear):
        raise QtoolError(f"{where}: {name}: {kind.__name__} cannot be held, nn.Linear can; use export/safetensors")


def _weights_alone(weights: WeightScheme) -> str:
    return f"this export holds weights alone; quantize to {weights}, or use export/compressed_tensors"


def _stored_form(scheme: Scheme | None) -> tuple[object, ...] | None:
    return None if scheme is None else (scheme.weights.bits, scheme.weights.group, scheme.weights.symmetric)
