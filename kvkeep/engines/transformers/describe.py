"""Who this model is, from what is in memory: its namespace, and what its cache holds per layer.

Every field that can change the KV for equal token ids is here. A program that embeds a model may have
trained it, merged an adapter or never loaded a file: so the weights are sampled where they lie.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
import transformers
from blake3 import blake3
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvkeep.errors import LayoutError
from kvkeep.identity import encode_extra
from kvkeep.layout import chunk_blocks

__all__ = [
    "Group",
    "LayerShape",
    "ModelState",
    "describe",
    "group_layers",
    "model_state",
    "probe",
    "weights_digest",
]

_UNIT = 16  # tokens; chunks are a multiple, as they are of an engine's block elsewhere
_STRIPE, _SAMPLE, _SMALL = 1 << 20, 4096, 1 << 16
_ROPE_BY_LENGTH = ("dynamic", "longrope")


class LayerShape(NamedTuple):
    """What one layer's cache holds for one token of one row."""

    keys: tuple[int, int]
    """KV heads, and the size of each."""
    values: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    window: int | None
    """Tokens that a sliding layer sees, its own included; None for full attention."""

    @property
    def token_bytes(self) -> int:
        """Bytes per token."""
        return (self.keys[0] * self.keys[1] + self.values[0] * self.values[1]) * self.dtype.itemsize


class Group(NamedTuple):
    """Layers with one window: a KV-cache group. In a slot, layer after layer: K, then V, each
    [heads, tokens of a chunk, head size]."""

    window: int | None
    layers: tuple[int, ...]


def probe(model: Any) -> list[LayerShape]:
    """Run two rows of two tokens to see what each layer caches, and that what comes later does not change
    it. Raises LayoutError for what we cannot serve."""
    config = model.config.get_text_config(decoder=True)
    rope = json.dumps(getattr(config, "rope_parameters", None) or {}, default=str)
    if any(kind in rope for kind in _ROPE_BY_LENGTH):
        raise LayoutError("this model's position scheme makes KV depend on the text's length")
    if model.config.is_encoder_decoder or "mrope_section" in rope:
        raise LayoutError("only decoders of text with one position per token are supported")
    cache = DynamicCache(config=config)
    decoder = model.get_decoder()
    with torch.no_grad():
        ids = torch.tensor([[1, 2], [1, 3]], device=decoder.get_input_embeddings().weight.device)
        decoder(ids, past_key_values=cache, use_cache=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not cache.layers or kinds - {"full_attention", "sliding_attention"}:
        raise LayoutError(f"layers of kinds {sorted(kinds)} are not supported")
    shapes = [_shape(layer) for layer in cache.layers]
    one, other = (cache.layers[-1].keys[row, :, 0].float() for row in (0, 1))
    apart = float((one - other).abs().max())  # of a causal model by bfloat16's rounding at most
    if getattr(config, "use_bidirectional_attention", None) is True or apart > 0.1 * float(one.abs().max()):
        raise LayoutError("this model attends to later tokens too")
    return shapes


def _shape(layer: Any) -> LayerShape:
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
        raise LayoutError(f"a cache layer of kind {type(layer).__name__} is not supported")
    (_, k_heads, _, k_size), (_, v_heads, _, v_size) = layer.keys.shape, layer.values.shape
    if layer.keys.dtype != layer.values.dtype:
        raise LayoutError("keys and values of different types are not supported")
    window = int(layer.sliding_window) if layer.is_sliding else None
    return LayerShape((k_heads, k_size), (v_heads, v_size), layer.keys.dtype, layer.keys.device, window)


def group_layers(shapes: list[LayerShape]) -> list[Group]:
    """Layers by window, in the order in which the windows appear."""
    windows = dict.fromkeys(shape.window for shape in shapes)
    members = {w: tuple(i for i, shape in enumerate(shapes) if shape.window == w) for w in windows}
    return [Group(window, layers) for window, layers in members.items()]


def describe(model: Any, shapes: list[LayerShape], chunk_tokens: int | None, weights: str) -> dict[str, Any]:
    """The namespace. `chunk_tokens` None: the fewest 16 tokens that reach about 1 MiB.

    How attention is computed, and on which device, is not in it: it changes KV by rounding only, as the
    batch's shape does.
    """
    config = model.config.get_text_config(decoder=True)
    unit = _UNIT * sum(shape.token_bytes for shape in shapes)
    return {
        "engine": f"transformers-{transformers.__version__}",
        "weights": weights,
        "modes": list(model_state(model).modes),
        "config": json.dumps(_stable(config.to_dict()), sort_keys=True, default=str),
        "chunk_tokens": chunk_tokens or _UNIT * chunk_blocks(unit),
        "layers": [[*s.keys, *s.values, str(s.dtype), s.window] for s in shapes],
        "groups": [[group.window, list(group.layers)] for group in group_layers(shapes)],
    }


def _stable(config: dict[str, Any]) -> dict[str, Any]:
    """Without what says only where it came from, or how attention is computed."""
    skipped = ("_name_or_path", "transformers_version", "_attn_implementation", "attn_implementation")
    return {name: value for name, value in config.items() if name not in skipped}


def _tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def weights_digest(model: Any) -> str:
    """Identity of the weights by content, in memory: 4 KiB of every MiB of each tensor, and its end."""
    hasher = blake3()
    for name, tensor in sorted(_tensors(model), key=lambda item: item[0]):
        if tensor.is_meta:
            raise LayoutError(f"{name} is not in memory (offloaded): give the model a model_id")
        hasher.update(encode_extra([name, list(tensor.shape), str(tensor.dtype)]))
        raw = tensor.detach().reshape(-1).view(torch.uint8)
        whole = len(raw) // _STRIPE * _STRIPE
        for part in (raw[:whole].view(-1, _STRIPE)[:, :_SAMPLE], raw[whole:][:_SMALL]):
            hasher.update(part.contiguous().cpu().numpy().tobytes())
    return "live:" + str(hasher.hexdigest())


class ModelState(NamedTuple):
    """What tells that a model is no longer what it was; cheap."""

    tensors: tuple[tuple[int, int], ...]
    """Changes when a weight is replaced or written to."""
    modes: tuple[str, ...]
    """What else changes KV with equal weights: autocast, and which adapters (PEFT) act on each module."""


def model_state(model: Any) -> ModelState:
    """As it is now, for the thread that asks."""
    marks = tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for _, t in _tensors(model))
    kind = model.device.type
    modes = [str(torch.get_autocast_dtype(kind))] if torch.is_autocast_enabled(kind) else []
    for name, module in model.named_modules():
        merged = getattr(module, "merged_adapters", None)
        if isinstance(merged, list):
            state = [getattr(module, what, None) for what in ("active_adapters", "disable_adapters")]
            modes.append(f"{name} {state} {merged}")
    return ModelState(marks, tuple(modes))
