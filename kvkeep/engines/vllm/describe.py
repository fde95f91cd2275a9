"""Who this engine is: its namespace, from vLLM's own configuration.

Every field that can change the KV bytes for equal token ids is here. When in doubt a field is in:
a namespace too many costs a miss, one too few serves wrong bytes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.config.utils import get_hash_factors
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvkeep.errors import ConfigError, LayoutError
from kvkeep.identity import file_digest
from kvkeep.layout import LayerTensor

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "attends_to_all",
    "check_engine",
    "describe_backends",
    "describe_model",
    "describe_scales",
    "describe_tensors",
    "group_window",
    "preferred_layout",
    "weights_identity",
]

log = logging.getLogger("kvkeep.vllm")

_OLDEST = (0, 32)
_TESTED = "0.32"
_PLAIN_SPECS = (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec)
_LARGEST_UNSPLIT = 64  # tokens of a block that every attention kernel takes whole
_SCALES = ("_k_scale", "_v_scale", "_k_scale_float", "_v_scale_float")
# Options that change no KV, or whose effect is described otherwise. All others of a configuration are part of
# the namespace, those of a later vLLM too.
_NOT_OF_MODELS = """
model model_weights revision seed hf_config hf_text_config hf_config_path hf_overrides hf_token config_format
model_impl tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init max_model_len
spec_target_max_model_len allowed_local_media_path allowed_media_domains allow_deprecated_quantization
enforce_eager return_sampling_mask max_logprobs logprobs_mode use_fp64_gumbel enable_trace_replay
disable_cascade_attn enable_prompt_embeds served_model_name generation_config override_generation_config
enable_sleep_mode sleep_preserve_parameter_names sleep_mode_backend sleep_mode_offload_cudagraph
enable_nccl_comm_suspend enable_cumem_allocator logits_processors io_processor_plugin renderer_num_workers
pooler_config multimodal_config"""
_NOT_OF_MEDIA = """
limit_per_prompt enable_mm_embeds mm_processor_cache_gb mm_processor_cache_type skip_mm_profiling
mm_shm_cache_max_object_size_mb mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin
mm_tensor_ipc mm_ipc_gpu_memory_gb"""
_NOT_OF_ATTENTION = "backend backend_per_kind"  # `describe_backends` has what was chosen
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")


def check_engine(config: VllmConfig, kv_config: KVCacheConfig) -> None:
    """Raise for what this version cannot serve: ConfigError (fix it) or LayoutError (cache off)."""
    version = tuple(vllm.__version_tuple__[:2])
    if version < _OLDEST:
        raise ConfigError(f"vLLM {vllm.__version__} is too old for kvkeep: install vllm>={_TESTED}")
    if not vllm.__version__.startswith(_TESTED + "."):
        log.warning(
            "kvkeep is tested with vLLM %s; this is %s: run `kvkeep doctor`", _TESTED, vllm.__version__
        )
    parallel = config.parallel_config
    if parallel.nnodes_within_dp > 1:
        raise LayoutError("its ranks are on several hosts, and a keeper serves one: not supported yet")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise LayoutError("context parallelism spreads a block over ranks: not supported yet")
    speculative = config.speculative_config
    if speculative is not None and (speculative.use_eagle() or speculative.uses_draft_model()):
        raise LayoutError("speculative decoding with a draft model's own KV is not supported yet; use ngram")
    for group in kv_config.kv_cache_groups:
        group_window(group.kv_cache_spec)


def preferred_layout(config: VllmConfig) -> str | None:
    """The KV layout to ask vLLM for, which takes it where all its backends have it; None: no wish.

    Only for attention whose kernels take the engine's blocks as they are: blocks that are split for a
    kernel cannot be in one piece with other layers', and vLLM then refuses to start.
    """
    if config.device_config.device_type != "cuda" or config.model_config is None:
        return None
    plain = not config.model_config.use_mla and not config.model_config.is_hybrid
    return "BLHNC" if plain and (config.cache_config.block_size or 16) <= _LARGEST_UNSPLIT else None


def group_window(spec: KVCacheSpec) -> int | None:
    """Tokens that a sliding window needs before the end of a hit; None where all are needed.

    Raises LayoutError for KV that is not attention over past tokens (state space models).
    """
    if isinstance(spec, UniformTypeKVCacheSpecs):
        windows = {group_window(inner) for inner in spec.kv_cache_specs.values()}
        return windows.pop() if len(windows) == 1 else None
    if type(spec) not in _PLAIN_SPECS:
        raise LayoutError(f"KV of kind {type(spec).__name__} is not supported yet")
    if isinstance(spec, SlidingWindowSpec):
        return max(1, int(spec.sliding_window) - 1 + int(spec.extra_retained_tokens))
    return None


def attends_to_all(specs: Sequence[KVCacheSpec]) -> bool:
    """Whether all layers keep all tokens, so that the engine can compute the last one of a prompt that was
    loaded whole: of a window it may have given up what that one still looks back on."""
    return all(type(spec) in (FullAttentionSpec, MLAAttentionSpec) for spec in specs)


def describe_model(
    config: VllmConfig, kv_config: KVCacheConfig, chunk_tokens: int, model_id: str | None
) -> dict[str, Any]:
    """The scheduler's half of the namespace: model, numerics, groups, split over ranks."""
    model = config.model_config
    configuration = json.dumps(_stable(model.hf_config.to_dict()), sort_keys=True, default=str)
    # An engine that fits its limit to its memory has built the model for the longest one before.
    longest = "auto" if model.original_max_model_len == -1 else model.max_model_len
    tuned = None
    if "llama4" in configuration:  # by its limit, unless the generation's configuration says otherwise
        generation = model.try_get_generation_config() | model.override_generation_config
        tuned = generation.get("attn_temperature_tuning")
    return {
        "engine": "vllm",
        "weights": model_id or weights_identity(config),
        "config": configuration,
        "architecture": model.architecture,
        "options": [
            _options(model, _NOT_OF_MODELS),
            _options(model.multimodal_config, _NOT_OF_MEDIA),
            _options(config.attention_config, _NOT_OF_ATTENTION),
        ],
        "longest": [longest, tuned],
        "kv_dtype": str(config.cache_config.cache_dtype),
        "tensor_parallel": config.parallel_config.tensor_parallel_size,
        "pipeline_parallel": config.parallel_config.pipeline_parallel_size,
        "chunk_tokens": chunk_tokens,
        "groups": [
            {
                "layers": list(group.layer_names),
                "block_tokens": group.kv_cache_spec.block_size,
                "window": group_window(group.kv_cache_spec),
            }
            for group in kv_config.kv_cache_groups
        ],
    }


def _options(config: Any, without: str) -> str:
    """All fields of a part of vLLM's configuration but those named, in vLLM's own canonical form."""
    return json.dumps(config and get_hash_factors(config, set(without.split())), sort_keys=True)


def _stable(config: Any) -> Any:
    """A model's configuration without what says only where it was loaded from, and by what."""
    if isinstance(config, dict):
        skipped = ("_name_or_path", "transformers_version")
        return {name: _stable(value) for name, value in config.items() if name not in skipped}
    return config


def describe_tensors(layers: Sequence[LayerTensor], dtypes: Sequence[torch.dtype], device: str) -> str:
    """One group's bytes on one rank: shapes without the block count, order in memory, packing.

    vLLM packs the inside of a block by instruction set and release, so both are part of it.
    """
    rows = []
    for layer, dtype in zip(layers, dtypes, strict=True):
        order = sorted(range(len(layer.shape)), key=lambda dim, layer=layer: -layer.strides[dim])  # type: ignore[misc]
        inner = [size for dim, size in enumerate(layer.shape) if dim != (1 if layer.shape[0] == 2 else 0)]
        rows.append([layer.name, inner, order, str(dtype)])
    return json.dumps([rows, _packing(device)])


def describe_scales(names: Sequence[str], modules: Mapping[str, object]) -> str:
    """By what one group's layers divide K and V before they store them quantised, on one rank.

    As the layers run: vLLM takes them from the checkpoint, or 1 where that has none or its quantisation
    does not say so. Those that are computed per token and head lie in the cache itself. `modules`:
    vLLM's own table of attention layers.
    """
    rows = []
    for name in names:
        values = [getattr(modules.get(name), scale, None) for scale in _SCALES]
        rows.append([value.tolist() if isinstance(value, torch.Tensor) else value for value in values])
    return json.dumps(rows)


def describe_backends(names: Sequence[str], modules: Mapping[str, object], device: str) -> str:
    """What computes one group's layers on a GPU: the inside of a block is each attention backend's own.

    On a CPU there is one, and `describe_tensors` names its packing.
    """
    if device == "cpu":
        return ""
    rows = []
    for name in names:
        module = modules.get(name)
        backend = getattr(module, "attn_backend", None)
        rows.append([type(module).__name__, backend.get_name() if backend is not None else None])
    return json.dumps(rows)


def _packing(device: str) -> str:
    if device == "cpu":
        amx = torch.cpu._is_amx_tile_supported()
        return f"vllm-{vllm.__version__}-cpu-{torch.backends.cpu.get_cpu_capability()}-amx{int(amx)}"
    return f"vllm-{vllm.__version__}-{device}"


def weights_identity(config: VllmConfig) -> str:
    """The weights by content where their files are at hand, otherwise by name and revision."""
    model = config.model_config
    folder = _weights_folder(model.model, model.revision)
    files = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)) if folder else []
    if folder is not None and folder.is_file():
        files = [folder]
    load = config.load_config.load_format
    if files and str(load) != "dummy":
        return "content:" + file_digest(files)
    return f"name:{model.model}@{model.revision}:{load}:seed{model.seed}"


def _weights_folder(name: str, revision: str | None) -> Path | None:
    if Path(name).exists():
        return Path(name)
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None
