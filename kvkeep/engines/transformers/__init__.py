"""HF transformers: `past_key_values=KVKeepCache.for_model(model).begin(input_ids, attention_mask)`."""

from kvkeep.engines.transformers.cache import KVKeepCache
from kvkeep.engines.transformers.past import PrefixCache

__all__ = ["KVKeepCache", "PrefixCache"]
