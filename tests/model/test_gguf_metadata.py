"""What a GGUF file says of a model: its sizes, its positions, its tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram

from qtool.errors import QtoolError
from qtool.model.gguf_metadata import general, hyperparameters, pattern_name, rope_factors, tokenizer_metadata
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

TinyModel = Callable[..., Path]
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 64}


def opened(folder: Path) -> ModelHandle:
    return ModelHandle(ModelOptions(path=str(folder)))


def change(folder: Path, edit: Callable[[dict], None], file: str = "tokenizer.json") -> ModelHandle:
    facts = json.loads((folder / file).read_text())
    edit(facts)
    (folder / file).write_text(json.dumps(facts))
    return opened(folder)


def test_llama_says_all_its_sizes(tiny_model: TinyModel) -> None:
    model = opened(tiny_model("llama", head_dim=32))
    assert hyperparameters(model.config) == {
        "llama.vocab_size": 4096,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
    }


def test_families_say_what_is_their_own(tiny_model: TinyModel) -> None:
    neox = hyperparameters(opened(tiny_model("gpt_neox")).config)
    assert neox["gptneox.rope.dimension_count"] == 4 and neox["gptneox.use_parallel_residual"] is True  # a quarter of 16
    gpt2 = hyperparameters(opened(tiny_model("gpt2")).config)
    assert gpt2["gpt2.feed_forward_length"] == 128 and gpt2["gpt2.attention.layer_norm_epsilon"] == 1e-5
    assert hyperparameters(opened(tiny_model("mistral")).config)["llama.context_length"] == 16  # its window
    assert hyperparameters(opened(tiny_model("qwen3")).config)["qwen3.attention.key_length"] == 16


def test_positions_that_are_stretched_say_so(tiny_model: TinyModel) -> None:
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    found = hyperparameters(opened(tiny_model("llama", rope_parameters=linear)).config)
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 4.0)


def test_llama3_divides_its_frequencies(tiny_model: TinyModel) -> None:
    factors = rope_factors(opened(tiny_model("llama", rope_parameters=LLAMA3_ROPE)))
    # Wavelengths below 64 / 4 stay, above 64 / 1 are stretched eightfold, between them it is smooth.
    lengths = 2 * torch.pi * 5e5 ** (torch.arange(8) / 8)
    assert factors is not None and torch.allclose(factors[lengths < 16], torch.ones(()))
    assert torch.allclose(factors[lengths > 64], torch.tensor(8.0))
    assert rope_factors(opened(tiny_model("qwen3"))) is None


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("opt", {}, "opt models cannot be written; llama, mistral,"),
        ("llama", {"hidden_act": "gelu"}, "llama with gelu cannot be written"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "positions of type dynamic cannot be written"),
    ],
)
def test_models_that_llama_cpp_would_compute_otherwise_are_refused(
    family: str, fields: dict, message: str, tiny_model: TinyModel
) -> None:
    model = opened(tiny_model(family, **fields))
    with pytest.raises(QtoolError, match=message):
        hyperparameters(model.config)


def test_the_file_says_its_name_and_licence(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama", name="tiny")
    assert "general.license" not in general(opened(folder), 2)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# tiny\n")
    found = general(opened(folder), 2)
    assert (found["general.name"], found["general.license"], found["general.file_type"]) == ("tiny", "apache-2.0", 2)


# ---- tokenizer ----


def test_the_demo_tokenizer_is_byte_level_bpe(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama", vocab_size=4100)
    found = tokenizer_metadata(opened(folder), None)
    facts = json.loads((folder / "tokenizer.json").read_text())
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert found["tokenizer.ggml.merges"] == [" ".join(merge) for merge in facts["model"]["merges"]]
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(kinds, list)
    assert [facts["model"]["vocab"].get(token) for token in tokens[:4096]] == list(range(4096))
    assert kinds == [3, 3, *[1] * 4094, *[5] * 4] and tokens[4096] == "[PAD4096]"
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert found["tokenizer.ggml.padding_token_id"] == 1 and "tokenizer.chat_template" not in found


def test_a_chat_template_is_kept(tiny_model: TinyModel) -> None:
    model = change(tiny_model("llama"), lambda c: c.update(chat_template="{{ messages }}"), "tokenizer_config.json")
    assert tokenizer_metadata(model, None)["tokenizer.chat_template"] == "{{ messages }}"


def split(pattern: str) -> dict:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }


@pytest.mark.parametrize(
    ("cutting", "name"),
    [
        (split(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "llama-bpe"),  # noqa: E501
        (split(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "qwen2"),  # noqa: E501
        (
            {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]},
            "smollm",
        ),
        ({"type": "ByteLevel", "add_prefix_space": False}, "gpt-2"),
    ],
)  # fmt: skip
def test_patterns_have_llama_cpps_names(cutting: dict, name: str) -> None:
    assert pattern_name({"pre_tokenizer": cutting}) == name


def test_an_unknown_pattern_must_be_named(tiny_model: TinyModel) -> None:
    model = change(tiny_model("llama"), lambda facts: facts.update(pre_tokenizer=split(r"\w+|\W+")))
    with pytest.raises(QtoolError, match="write `pre:` with the name that llama.cpp has for it"):
        tokenizer_metadata(model, None)
    assert tokenizer_metadata(model, "tekken")["tokenizer.ggml.pre"] == "tekken"


def sentencepiece_like(facts: dict) -> None:
    """A BPE with tokens for bytes, of two merges, as converted from SentencePiece."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    facts["model"] = {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": [["a", "b"], ["▁", "ab"]]}
    facts["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    facts["added_tokens"] = [{"id": i, "content": words[i], "special": True, **flags} for i in (0, 1)]
    facts["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    facts["pre_tokenizer"], facts["post_processor"] = None, None
    facts["decoder"] = None


def test_bpe_with_bytes_is_written_with_scores(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend", "unk_token": "<unk>"}))
    found = tokenizer_metadata(change(folder, sentencepiece_like), None)
    tokens, kinds, scores = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "scores"))
    assert isinstance(tokens, list) and isinstance(kinds, list) and isinstance(scores, list)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    assert kinds[:2] == [2, 3] and kinds[2:258] == [6] * 256 and kinds[258:263] == [1] * 5 and kinds[263:] == [5] * 3833
    assert scores[tokens.index("ab")] == 0 and scores[tokens.index("▁ab")] == -1 and scores[tokens.index("a")] == -2


def test_tokenizers_of_other_kinds_are_refused(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama", vocab_size=4000)
    model = opened(folder)
    with pytest.raises(QtoolError, match="the tokenizer has 4096 tokens, the embedding 4000 rows"):
        tokenizer_metadata(model, None)
    model.tokenizer = object()
    with pytest.raises(QtoolError, match="has no tokenizer.json"):
        tokenizer_metadata(model, None)
    Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)).save(str(folder / "tokenizer.json"))
    with pytest.raises(QtoolError, match="a tokenizer of type Unigram cannot be written; BPE can"):
        tokenizer_metadata(opened(folder), None)


def test_the_tokenizer_is_the_one_that_texts_are_cut_with(tiny_model: TinyModel) -> None:
    """transformers gives Qwen2 a pattern, and a padding token, of its own; the embedding here has no row for that."""
    found = tokenizer_metadata(opened(tiny_model("qwen2")), None)
    assert found["tokenizer.ggml.pre"] == "qwen2" and len(list(found["tokenizer.ggml.tokens"])) == 4096
