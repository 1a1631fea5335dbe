"""What GGUF calls each tensor, and how it stands there: llama.cpp's names and orders of rows, as data by family.

Three things differ from transformers' checkpoints besides names.
- llama.cpp turns neighbouring channels of a head by one angle where transformers turns the two halves of the head. Of families
  whose code in llama.cpp does so, the rows of queries and keys change places: row 2 j + h of a head is transformers' row
  j + h head / 2, h = 0 or 1.
- GPT-NeoX's fused queries, keys and values stand head by head in transformers, all queries first in llama.cpp.
- GPT-2's linears are stored [in, out] by transformers, [out, in] here.
Rows are encoded one by one, so their bytes change places as the rows do.
Source: llama.cpp, https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py; names of the package gguf 0.19, constants.py.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.model.gguf import Header, read_header, read_tensor

GATED = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GATED_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class Family:
    """What llama.cpp's architecture of this name has; names without .weight and .bias."""

    architecture: str
    blocks: str  # transformers' list of decoder blocks
    outer: dict[str, str]
    inner: dict[str, str]  # inside a block
    halved: tuple[str, ...] = ()  # whose heads' halves are interleaved
    fused: tuple[str, ...] = ()  # queries, keys and values of each head in turn
    transposed: tuple[str, ...] = ()  # stored [in, out] by transformers
    biased: bool = True  # whether linears may have biases


LLAMA = Family("llama", "model.layers", GATED_OUTER, GATED, halved=("attn_q", "attn_k"))
QWEN2 = Family("qwen2", "model.layers", GATED_OUTER, GATED)
QWEN3_INNER = GATED | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
QWEN3 = Family("qwen3", "model.layers", GATED_OUTER, QWEN3_INNER, biased=False)
GPT2 = Family(
    "gpt2",
    "transformer.h",
    {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
)
GPT_NEOX = Family(
    "gptneox",
    "gpt_neox.layers",
    {"gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "lm_head": "output"},
    {
        "input_layernorm": "attn_norm",
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    fused=("attn_qkv",),
)
# transformers' model_type: the family it is written as.
FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "gpt2": GPT2, "gpt_neox": GPT_NEOX}
BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES.values()}


def stored_name(family: Family, name: str) -> str | None:
    """GGUF's name of transformers' tensor `name`; None where the architecture has no such tensor."""
    module, _, last = name.rpartition(".")
    if module in family.outer:
        return f"{family.outer[module]}.{last}"
    match = re.fullmatch(rf"{re.escape(family.blocks)}\.(\d+)\.(.+)", module)
    if match is None or match[2] not in family.inner:
        return None
    is_norm = family.inner[match[2]].endswith("norm")
    if last == "bias" and not (family.biased or is_norm):
        return None
    return f"blk.{match[1]}.{family.inner[match[2]]}.{last}"


def original_name(family: Family, name: str) -> str | None:
    """transformers' name of GGUF's tensor `name`; None where it has none, as tables of angles."""
    module, _, last = name.rpartition(".")
    outer = {there: here for here, there in family.outer.items()}
    if module in outer:
        return f"{outer[module]}.{last}"
    inner = {there: here for here, there in family.inner.items()}
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", module)
    return f"{family.blocks}.{match[1]}.{inner[match[2]]}.{last}" if match is not None and match[2] in inner else None


def row_order(family: Family, name: str, n_out: int, n_heads: int, n_kv_heads: int) -> Tensor | None:
    """Which of transformers' rows stands at each place of GGUF's tensor `name`, [out]; None where all stay."""
    part = name.split(".")[-2]
    rows = torch.arange(n_out)
    if part in family.halved:
        heads = n_kv_heads if part == "attn_k" else n_heads
        return rows.view(heads, 2, -1).transpose(1, 2).flatten()
    if part in family.fused:
        return rows.view(n_heads, 3, -1).transpose(0, 1).flatten()
    return None


def is_transposed(family: Family, name: str) -> bool:
    """Whether transformers stores the weight that GGUF calls `name` as [in, out]."""
    return name.endswith(".weight") and name.split(".")[-2] in family.transposed


class GgufFile:
    """A GGUF file as the tensors of a transformers checkpoint; opened as safetensors files are."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._header: Header = read_header(path)
        architecture = str(self._header.metadata.get("general.architecture"))
        if architecture not in BY_ARCHITECTURE:
            known = ", ".join(BY_ARCHITECTURE)
            raise QtoolError(f"model: {path}: llama.cpp's architecture {architecture} cannot be read; {known} can")
        self._family = BY_ARCHITECTURE[architecture]
        names = {original_name(self._family, name): name for name in self._header.places}
        self._names = {original: name for original, name in names.items() if original is not None}

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *error: object) -> None: ...

    def keys(self) -> list[str]:
        """Names of a transformers checkpoint."""
        return list(self._names)

    def get_tensor(self, key: str) -> Tensor:
        """The tensor decoded to float32, its rows where transformers has them."""
        name, family = self._names[key], self._family
        tensor = read_tensor(self._path, name)
        heads = self._number("attention.head_count")
        order = row_order(family, name, len(tensor), heads, self._number("attention.head_count_kv", heads))
        if order is not None:
            tensor = tensor[order.argsort()]
        return tensor.T.contiguous() if is_transposed(family, name) else tensor

    def _number(self, key: str, default: int = 0) -> int:
        return int(self._header.metadata.get(f"{self._family.architecture}.{key}", default))
