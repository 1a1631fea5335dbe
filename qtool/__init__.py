"""qtool compresses language models from one YAML recipe: calibrate, transform, quantize, prune, distill, evaluate, export."""

import os
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__version__ = "0.1.0"


def load(
    path: str | os.PathLike[str], device: str = "auto", runtime: Literal["reference", "fast"] = "reference"
) -> "PreTrainedModel":
    """A checkpoint as a transformers model in memory: its quantized linears as codes, decoded whenever they are called.

        model = qtool.load("runs/w3-lorc/exports/qtool")
        logits = model(tokens).logits                              # [samples, length, vocab] of tokens [samples, length]
        written = model.generate(tokens, max_new_tokens=20)        # [samples, length + 20], with a cache

    path: a folder or a hub id: qtool's own exports, dense checkpoints, and whatever other format qtool reads (gptq, awq,
    compressed-tensors, bitsandbytes, GGUF, ...). device: auto (a GPU where there is one), cpu, cuda, cuda:1.
    The model is in eval mode, in the checkpoint's dtype, with config and generation_config of its folder and head and embedding
    tied where the config says so; its parameters ask for no gradients. A quantized linear is a
    qtool.layers.quant_linear.QuantLinear, a mixture's experts are linears one by one. It computes what qtool measures, to the
    bit; it saves memory, not time. It cannot be saved by save_pretrained: the folder that it came from holds it.
    runtime="fast": linears multiply by their codes (qtool.layers.fast_linear.FastLinear) with the kernels of the device, equal
    to the rounding of 16-bit arithmetic; a UserWarning says which linears have no such product, and why: those decode.
    Raises qtool.errors.QtoolError where the path is no model, a file is missing or damaged, the layout cannot be read, the
    device does not exist, or a fast runtime is asked for where no linear has a product.
    """
    from qtool.model.handle import ModelHandle
    from qtool.options import ModelOptions

    options = ModelOptions(path=os.fspath(path), device=device)
    if runtime == "reference":
        return ModelHandle(options).take()

    import warnings

    from qtool.model.acceleration import Acceleration

    acceleration = Acceleration()
    model = ModelHandle(options, acceleration=acceleration).take()
    acceleration.require(f"{path} on {model.device}")
    if acceleration.decoded:
        warnings.warn("\n".join(acceleration.lines()), stacklevel=2)
    return model
