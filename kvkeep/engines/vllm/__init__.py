"""vLLM: `--kv-transfer-config '{"kv_connector":"KVKeepConnector",
"kv_connector_module_path":"kvkeep.engines.vllm","kv_role":"kv_both"}'`."""

from kvkeep.engines.vllm.connector import KVKeepConnector

__all__ = ["KVKeepConnector"]
