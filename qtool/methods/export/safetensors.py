"""A dense checkpoint: quantized weights decoded, sparse ones with their zeros, for whatever loads transformers models.

W^ [out, in] = decode(codes), rounded once to the model's dtype, just as the compressed model computes with them. A low-rank
part is added before rounding; the compressed model keeps it apart, so the sum loses some of it and is not lossless.
Layout and names are those that transformers' save_pretrained writes; no trace of qtool is left.
Source: the safetensors format, https://github.com/huggingface/safetensors#format.
For: anything that loads transformers checkpoints; as large as the original.
Costs: writing the file.
"""

from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.model.handle import ModelHandle
from qtool.model.writer import DENSE, Storage, written_by
from qtool.options import ExportOptions
from qtool.registry import Method


class SafetensorsOptions(ExportOptions):
    """The format leaves nothing else to choose."""


def storage(model: ModelHandle, schemes: dict[str, Scheme], options: SafetensorsOptions) -> Storage:
    """What the checkpoint is made of."""
    return DENSE


def check_schemes(model: ModelHandle, schemes: dict[str, Scheme], options: SafetensorsOptions) -> None:
    """Raise QtoolError where more than weights is quantized."""
    for name, scheme in schemes.items():
        if scheme.activations is not None or scheme.kv is not None:
            raise QtoolError(
                f"export/safetensors: {name} is quantized to {scheme}, but a dense checkpoint holds weights alone; "
                "quantize weights only (such as w8a16), or use export/compressed_tensors"
            )


METHOD = Method(
    run=written_by(storage),
    options=SafetensorsOptions,
    scope="model",
    holds=check_schemes,
    storage=storage,
    holds_additions=True,
)
