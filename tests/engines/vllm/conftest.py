"""A tiny Llama with random weights: starts fast, splits over two ranks, answers deterministically."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MAKE_MODEL = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models, pre_tokenizers
torch.manual_seed(7)
config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=64, vocab_size=4200, max_position_embeddings=8192,
                     bos_token_id=1, eos_token_id=2)
LlamaForCausalLM(config).float().save_pretrained(sys.argv[1])
words = {f"w{i}": i for i in range(4200)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(sys.argv[1])
"""

MAKE_LORA = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
folder = Path(sys.argv[1]); folder.mkdir(exist_ok=True); torch.manual_seed(int(sys.argv[2]))
tensors = {}
for layer in range(4):
    name = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
    tensors[name + ".lora_A.weight"] = torch.randn(8, 256)
    tensors[name + ".lora_B.weight"] = torch.randn(128, 8)
save_file(tensors, folder / "adapter_model.safetensors")
(folder / "adapter_config.json").write_text(json.dumps(dict(
    peft_type="LORA", r=8, lora_alpha=16, target_modules=["v_proj"], task_type="CAUSAL_LM", bias="none",
    base_model_name_or_path="tiny")))
"""


def run_script(script: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    run_script(MAKE_MODEL, str(folder))
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 4
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA adapter; `run_script(MAKE_LORA, path, "2")` writes another under the same path."""
    run_script(MAKE_LORA, str(tmp_path / "lora"), "1")
    return tmp_path / "lora"
