"""Tiny models with random weights, which start fast and answer deterministically, and their stories."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cores import engine_cores

ROOT = Path(__file__).parents[3]
SCENARIO = Path(__file__).with_name("scenario.py")

MAKE_MODEL = """
import sys, torch, transformers
from transformers import PreTrainedTokenizerFast
from tokenizers import Tokenizer, models, pre_tokenizers
torch.manual_seed(7)
sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=64, vocab_size=4200, max_position_embeddings=8192,
             bos_token_id=1, eos_token_id=2)
if sys.argv[2] == "hybrid":  # two KV-cache groups
    config = transformers.Gemma3TextConfig(**sizes, sliding_window=128, query_pre_attn_scalar=64,
                                           layer_types=["sliding_attention", "full_attention"] * 2)
    model = transformers.Gemma3ForCausalLM(config)
else:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
model.float().save_pretrained(sys.argv[1])
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
    run_script(MAKE_MODEL, str(folder), "llama")
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 4
    return folder


@pytest.fixture(scope="session")
def hybrid_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    run_script(MAKE_MODEL, str(folder), "hybrid")
    return folder


@pytest.fixture
def live(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run one story of scenario.py in a process of its own; returns its phases, and its log."""

    def run(
        model: Path, story: str, connector: dict[str, Any] | None, *flags: str, **options: Any
    ) -> dict[str, Any]:
        out = tmp_path / "phases.json"
        options = {"model": str(model), "max_model_len": 2048, "block_size": 32, **options}
        command = [sys.executable, str(SCENARIO), str(out), "--story", story, *flags]
        command += ["--options", json.dumps(options)]
        if connector is not None:
            command += ["--connector", json.dumps(connector)]
        paths = [str(ROOT), str(SCENARIO.parent)]  # of the latter a connector of ours may come
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        environ["VLLM_CPU_OMP_THREADS_BIND"] = engine_cores()
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environ)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        phases: dict[str, Any] = json.loads(out.read_text())
        phases["log"] = done.stdout + done.stderr
        return phases

    return run


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA adapter; `run_script(MAKE_LORA, path, "2")` writes another under the same path."""
    run_script(MAKE_LORA, str(tmp_path / "lora"), "1")
    return tmp_path / "lora"
