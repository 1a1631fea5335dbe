"""Write a Llama of any size with random weights, in bfloat16, to measure speed and memory with: what it writes means nothing.

    python scripts/random_model.py FOLDER [--hidden 2048 --intermediate 5632 --blocks 8 --heads 32 --kv-heads 8]
Its tokenizer and vocabulary are the demo model's.
"""

import argparse
import shutil
from pathlib import Path

import torch
import transformers

import qtool

DEMO = Path(qtool.__file__).parent / "assets" / "demo" / "model"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in (("hidden", 2048), ("intermediate", 5632), ("blocks", 8), ("heads", 32), ("kv-heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    size = parser.parse_args()
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # so that no float32 copy of a large model is made
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(size.folder)
    for name in TOKENIZER:
        shutil.copyfile(DEMO / name, size.folder / name)
    print(f"{size.folder}: {model.num_parameters() / 1e6:,.0f} M parameters")


if __name__ == "__main__":
    main()
