"""Shared ground of the tests: no network, few threads, and tiny models of every family, built from a config in code."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "QTOOL_CACHE": "off",  # a result that another test kept would hide what this one computes
}

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import qtool  # noqa: E402
from qtool import registry  # noqa: E402
from qtool.artifact import Artifact  # noqa: E402
from qtool.formats.low_rank import LowRank  # noqa: E402
from qtool.formats.outliers import Outliers  # noqa: E402
from qtool.formats.scheme import Scheme  # noqa: E402
from qtool.formats.tensor import QuantizedTensor, Salient, quantize  # noqa: E402
from qtool.model.handle import ModelHandle  # noqa: E402
from qtool.model.linear import weight_of  # noqa: E402
from qtool.model.store import LOW_RANK, Changes, load_changes, save_changes  # noqa: E402
from qtool.options import ModelOptions, matches  # noqa: E402

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C, which tests press
transformers.logging.disable_progress_bar()

DEMO = Path(qtool.__file__).parent / "assets" / "demo" / "model"
TOKENS = {
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LLAMA_LIKE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
# Family: its configuration class and the sizes that make it tiny (hidden 64, ffn 128, 2 blocks, 4 heads of 16).
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", LLAMA_LIKE),
    "mistral": ("MistralConfig", LLAMA_LIKE | {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", LLAMA_LIKE),
    "qwen3": ("Qwen3Config", LLAMA_LIKE | {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", LLAMA_LIKE | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}),
    "phi3": ("Phi3Config", LLAMA_LIKE),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "init_std": 0.1,
            "dropout": 0.0,
        },
    ),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}),
    "gpt_neox": (
        "GPTNeoXConfig",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "initializer_range": 0.1,
        },
    ),
    "falcon": (
        "FalconConfig",
        {
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "initializer_range": 0.1,
        },
    ),
    "mixtral": ("MixtralConfig", LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family in turn: a test that takes this runs once for each."""
    return str(request.param)


@pytest.fixture
def tiny_model(tmp_path: Path) -> Callable[..., Path]:
    """`tiny_model("llama", dtype="bfloat16", num_hidden_layers=3)`: a folder under tmp_path with a random checkpoint.

    Any field of the family's configuration may be given. Weights are seeded; gains and biases are drawn too, so that a
    transform that forgets one of them is caught. The tokenizer is the demo model's, the vocabulary its 4096 entries.
    """

    def build(family: str, *, dtype: str = "float32", seed: int = 0, name: str = "", **fields: object) -> Path:
        config_class, sizes = FAMILIES[family]
        config = getattr(transformers, config_class)(**TOKENS | sizes | fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter += 0.2 * torch.randn_like(parameter)
        folder = tmp_path / (name or f"tiny-{family}")
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DEMO / file, folder / file)
        return folder

    return build


@pytest.fixture
def quantized(tmp_path: Path) -> Callable[..., ModelHandle]:
    """`quantized(folder, "w4a16g32")`: the model with the linears of its blocks rounded to a scheme.

    A dict {pattern: scheme} rounds only what a pattern fits, `lm_head` too; the first pattern that fits wins.
    """

    def build(folder: Path, schemes: object) -> ModelHandle:
        patterns = schemes if isinstance(schemes, dict) and "weights" not in schemes else {"*": schemes}
        chosen = {pattern: Scheme.model_validate(scheme) for pattern, scheme in patterns.items()}
        model = ModelHandle(ModelOptions(path=str(folder)))
        changes = tmp_path / f"changes-{folder.name}"

        def round_linears(linears: dict[str, torch.nn.Module], unit: str) -> None:
            found = {}
            for name, linear in linears.items():
                scheme = next((scheme for pattern, scheme in chosen.items() if matches(name, pattern)), None)
                if scheme is not None:
                    found[f"{name}.weight"] = (quantize(weight_of(linear), scheme.weights), scheme)
            save_changes(changes / f"{unit}.safetensors", found)

        for block in model.blocks():
            round_linears(block.linears(), f"block_{block.index:03d}")
        if "lm_head" in chosen:
            with model.outer():
                round_linears({"lm_head": model.model.get_submodule("lm_head")}, "outer")
        return ModelHandle(ModelOptions(path=str(folder)), changes=(changes,))

    return build


EVERY_SCHEME = {
    "lm_head": "w6a16g16",
    "layers.0.self_attn.q_proj": "w4a16g32-asym",
    "layers.0.self_attn.k_proj": "w4a16g32-asymf16",
    "layers.0.self_attn.v_proj": "nf4g64-dq",
    "layers.0.self_attn.o_proj": "w4a16g32-ic",
    "layers.0.mlp.gate_proj": "nvfp4",
    "layers.0.mlp.up_proj": "mxfp4",
    "layers.0.mlp.down_proj": "power4g32",
    "layers.1.self_attn.q_proj": "e8pg64",
    "layers.1.self_attn.k_proj": "ternaryg64",
    "layers.1.self_attn.v_proj": "w4a8kv4g32",
    "layers.1.self_attn.o_proj": {"weights": {"bits": 8}, "activations": {"bits": 8, "symmetric": False}},
    "layers.1.mlp.gate_proj": "binary",
    "layers.1.mlp.up_proj": "w2starg64-asymf16",
}  # layers.1.mlp.down_proj stays dense


@pytest.fixture
def featured(tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle], tmp_path: Path) -> ModelHandle:
    """A tiny Llama in bfloat16 with all that methods make of linears: a scheme for each, and what may stand beside codes."""
    plain = quantized(tiny_model("llama", dtype="bfloat16"), EVERY_SCHEME)
    random = torch.Generator().manual_seed(0)

    def outliers(qt: QuantizedTensor) -> QuantizedTensor:
        added, chosen = torch.randn(qt.shape, generator=random), torch.rand(qt.shape, generator=random) < 0.02
        return replace(qt, outliers=Outliers.of(added, chosen))

    def salient(qt: QuantizedTensor) -> QuantizedTensor:
        columns, rest = torch.tensor([3, 17, 40, 41]), torch.randn(qt.shape[0], 4, generator=random)
        inner = quantize(rest, Scheme.model_validate("w4a16-asym").weights)
        kept = [column for column in range(qt.shape[1]) if column not in columns]
        column_scale = torch.rand(qt.shape[1], generator=random) + 0.5
        return replace(qt, codes=qt.codes[:, kept], salient=Salient(columns.to(torch.int16), inner), column_scale=column_scale)

    def factors(rows: int, columns: int, dtype: str) -> LowRank:
        left, right = torch.randn(rows, 5, generator=random), torch.randn(5, columns, generator=random)
        return LowRank(left / 50, right).stored_in(dtype)

    of_block: dict[int, Changes] = {
        index: load_changes(plain.changes[0] / f"block_{index:03d}.safetensors") for index in range(2)
    }
    beside = ((0, "self_attn.q_proj", outliers), (0, "self_attn.v_proj", outliers), (1, "mlp.gate_proj", salient))
    for index, last, change in beside:
        name = f"model.layers.{index}.{last}"
        value = of_block[index][f"{name}.weight"]
        assert isinstance(value, tuple)
        of_block[index][f"{name}.weight"] = (change(value[0]), value[1])
    of_block[0][f"model.layers.0.mlp.gate_proj{LOW_RANK}"] = factors(128, 64, "int8")
    of_block[1][f"model.layers.1.self_attn.v_proj{LOW_RANK}"] = factors(32, 64, "bfloat16")
    for index, changes in of_block.items():
        save_changes(tmp_path / "featured" / f"block_{index:03d}.safetensors", changes)
    return ModelHandle(plain.options, (*plain.changes, tmp_path / "featured"))


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Artifact]:
    """`export("gptq", model, checkpoint_format="gptq", out="other")`: into a folder of tmp_path, which is made."""

    def run(name: str, model: ModelHandle, out: str = "out", **options: object) -> Artifact:
        method = registry.load(f"export/{name}")
        (tmp_path / out).mkdir()
        return method.export(model, tmp_path / out, method.options.model_validate(options))

    return run


@pytest.fixture
def windows() -> torch.Tensor:
    """Tokens of four windows [4, 24]."""
    return torch.randint(2, 4096, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def logits_of(windows: torch.Tensor) -> Callable[[ModelHandle], torch.Tensor]:
    """`logits_of(model)`: those of the model in memory for four windows of tokens."""

    def run(model: ModelHandle) -> torch.Tensor:
        with model.materialized() as module, torch.no_grad():
            logits: torch.Tensor = module(windows).logits
            return logits

    return run
