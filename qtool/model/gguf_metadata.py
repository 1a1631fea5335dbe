"""What a GGUF file says beside its tensors: hyperparameters and tokenizer, from a transformers model and its tokenizer.

Tokenizers are of two kinds. Byte-level BPE (`gpt2`) has merges, and a name for the pattern that cuts text before merging:
llama.cpp's code knows patterns by name, so the tokenizer's pattern must be one of PATTERNS or be named by the user.
BPE with tokens for single bytes, as SentencePiece makes it (`llama`), has scores; the merge that stands first makes the token
that scores highest. Whether a text begins or ends with a special token is asked of the tokenizer itself. A normal form of
Unicode, which some tokenizers bring texts into first, is not written: llama.cpp has none.
Why the loaded tokenizer and not tokenizer.json: transformers rebuilds that of some families (Qwen2), whatever the file says.
Source: llama.cpp, https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp (patterns) and gguf 0.19, constants.py (keys).
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from qtool.errors import QtoolError
from qtool.model.gguf import Value
from qtool.model.gguf_names import FAMILIES, Family
from qtool.model.handle import ModelHandle

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Pattern that cuts text: llama.cpp's name. The empty one is byte-level BPE's own.
PATTERNS = {"": "gpt-2", CONTRACTIONS + r"\p{N}{1,3}" + REST: "llama-bpe", CONTRACTIONS + r"\p{N}" + REST: "qwen2"}
DIGITS = "smollm"  # single digits first, then byte-level BPE's own
ROPES = ("default", "linear", "llama3")


def family_of(config: PretrainedConfig) -> Family:
    """The family that a model is written as; raises QtoolError where there is none or its code would compute otherwise."""
    kind = str(config.model_type)
    if kind not in FAMILIES:
        raise QtoolError(f"{kind} models cannot be written; {', '.join(FAMILIES)} can; use export/safetensors")
    family = FAMILIES[kind]
    is_gated = family.architecture in ("llama", "qwen2", "qwen3")
    act = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    wanted = ("silu", "swish") if is_gated else ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
    if act not in wanted:
        raise QtoolError(f"{kind} with {act} cannot be written, with {' or '.join(wanted)} it can; use export/safetensors")
    rope = rope_of(config)
    if rope.get("rope_type", "default") not in ROPES or (is_gated and rope.get("partial_rotary_factor", 1) != 1):
        raise QtoolError(f"rotary positions of type {rope.get('rope_type')} cannot be written; {', '.join(ROPES)} can")
    return family


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def hyperparameters(config: PretrainedConfig) -> dict[str, Value]:
    """The sizes of a model and what its norms and positions need, by GGUF's names."""
    family = family_of(config)
    heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    # Beyond its window a sliding attention would see less than llama.cpp's, which has no windows here.
    window = getattr(config, "sliding_window", None)
    length = int(config.max_position_embeddings)
    ffn = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    found: dict[str, Value] = {
        "vocab_size": int(config.vocab_size),
        "context_length": length if window is None else min(length, int(window)),
        "embedding_length": hidden,
        "block_count": int(config.num_hidden_layers),
        "feed_forward_length": int(ffn),
        "attention.head_count": heads,
        "attention.head_count_kv": int(getattr(config, "num_key_value_heads", None) or heads),
    }
    if family.architecture == "gpt2":
        found["attention.layer_norm_epsilon"] = float(config.layer_norm_epsilon)
        return _prefixed(family, found)
    rope = rope_of(config)
    found["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1))
    found["rope.freq_base"] = float(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if family.architecture == "gptneox":
        found["attention.layer_norm_epsilon"] = float(config.layer_norm_eps)
        found["use_parallel_residual"] = bool(config.use_parallel_residual)
        return _prefixed(family, found)
    found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    found["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    return _prefixed(family, found)


def _prefixed(family: Family, found: dict[str, Value]) -> dict[str, Value]:
    return {f"{family.architecture}.{key}": value for key, value in found.items()}


def rope_factors(model: ModelHandle) -> Tensor | None:
    """What divides each frequency of a llama3 rotation, [head / 2] float32; None of other rotations."""
    rope = rope_of(model.config)
    if rope.get("rope_type") != "llama3":
        return None
    (actual,) = (b.float().cpu() for name, b in model.model.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    plain = 1 / float(rope["rope_theta"]) ** (torch.arange(len(actual)) / len(actual))
    return plain / actual


def general(model: ModelHandle, file_type: int) -> dict[str, Value]:
    """What the file is: architecture, name, licence where the folder's README says one."""
    found: dict[str, Value] = {
        "general.architecture": family_of(model.config).architecture,
        "general.type": "model",
        "general.name": Path(model.options.path).name,
        "general.quantization_version": 2,
        "general.file_type": file_type,
    }
    readme = model.folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    licence = re.search(r"^license:\s*(\S+)", head[1], re.MULTILINE) if head else None
    return found | ({"general.license": licence[1]} if licence else {})


# ---- tokenizer ----


def tokenizer_metadata(model: ModelHandle, pre: str | None) -> dict[str, Value]:
    """The tokenizer by GGUF's names; `pre` names the pattern where it is stated. Raises QtoolError for what cannot be said."""
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise QtoolError(f"{model.folder} has no tokenizer.json, which the file's tokenizer is made from; save one there")
    facts = json.loads(backend.to_str())
    core = facts["model"]
    if core["type"] != "BPE":
        raise QtoolError(f"a tokenizer of type {core['type']} cannot be written; BPE can")
    is_bytes = bool(core.get("byte_fallback"))
    found: dict[str, Value] = {"tokenizer.ggml.model": "llama" if is_bytes else "gpt2"}
    found["tokenizer.ggml.pre"] = pre or ("default" if is_bytes else pattern_name(facts))
    n_rows = int(model.config.vocab_size)
    tokens, kinds = _tokens(facts, n_rows)
    found |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in core["merges"]]
    if is_bytes:
        ranks = {merge.replace(" ", "", 1): -rank for rank, merge in reversed(list(enumerate(merges)))}
        found["tokenizer.ggml.scores"] = [float(ranks.get(token, -len(merges))) for token in tokens]
        found["tokenizer.ggml.add_space_prefix"] = _begins_with_space(facts)
    else:
        found["tokenizer.ggml.merges"] = merges
    return found | _special(model, n_rows)


def pattern_name(facts: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer of byte-level BPE cuts text; raises QtoolError where it has none."""
    whole = facts.get("pre_tokenizer") or {}
    steps = whole.get("pretokenizers", [whole])
    kinds = [step.get("type") for step in steps]
    if kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space"):
        uses_own = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and uses_own:
            return PATTERNS[""]
        if kinds == ["Digits", "ByteLevel"] and uses_own and steps[0].get("individual_digits"):
            return DIGITS
        pattern = steps[0].get("pattern", {}).get("Regex")
        if kinds == ["Split", "ByteLevel"] and not uses_own and pattern in PATTERNS:
            return PATTERNS[pattern]
    raise QtoolError(
        "how the tokenizer cuts text before merging is none of the patterns that qtool knows llama.cpp's name of "
        f"({', '.join((*PATTERNS.values(), DIGITS))}); write `pre:` with the name that llama.cpp has for it"
    )


def _tokens(facts: dict[str, Any], n_rows: int) -> tuple[list[str], list[int]]:
    """Every row of the embedding as text and kind; rows that no token has are unused, added tokens without a row left out."""
    core, added = facts["model"], [token for token in facts.get("added_tokens") or [] if token["id"] < n_rows]
    vocab: dict[str, int] = core["vocab"] | {token["content"]: token["id"] for token in added}
    if max(vocab.values()) >= n_rows:
        raise QtoolError(
            f"the tokenizer has {max(vocab.values()) + 1} tokens, the embedding {n_rows} rows; it must have as many"
        )
    tokens, kinds = [f"[PAD{row}]" for row in range(n_rows)], [UNUSED] * n_rows
    for text, row in vocab.items():
        is_byte = core.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", text)
        tokens[row], kinds[row] = text, BYTE if is_byte else NORMAL
    for token in added:
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if core.get("unk_token") in vocab:
        kinds[vocab[core["unk_token"]]] = UNKNOWN
    return tokens, kinds


def _begins_with_space(facts: dict[str, Any]) -> bool:
    """Whether a space is put before the text."""
    steps = [facts.get(key) or {} for key in ("normalizer", "pre_tokenizer")]
    steps += [step for whole in steps for key in ("normalizers", "pretokenizers") for step in whole.get(key, [])]
    return any(step.get("type") == "Prepend" or step.get("prepend_scheme") in ("first", "always") for step in steps)


def _special(model: ModelHandle, n_rows: int) -> dict[str, Value]:
    """Numbers of special tokens, where texts have them, and the chat template."""
    tokenizer = model.tokenizer
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found: dict[str, Value] = {}
    for here, there in names.items():
        number = getattr(tokenizer, f"{here}_token_id", None)
        if number is not None and number < n_rows:
            found[f"tokenizer.ggml.{there}_token_id"] = int(number)
    ids = tokenizer("a").input_ids
    found["tokenizer.ggml.add_bos_token"] = len(ids) > 1 and ids[0] == tokenizer.bos_token_id
    found["tokenizer.ggml.add_eos_token"] = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return found | ({"tokenizer.chat_template": template} if template else {})
