"""kvkeep for some requests of an engine, and as if it were not there for the others: see misses.py."""

from __future__ import annotations

from typing import Any

from kvkeep.engines.vllm import KVKeepConnector

__all__ = ["HalfSeenConnector"]


class HalfSeenConnector(KVKeepConnector):
    """Neither looks up nor saves a prompt whose first token is odd."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """What is not looked up here kvkeep knows nothing of, and so saves nothing of it."""
        if request.prompt_token_ids is not None and request.prompt_token_ids[0] % 2:
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)
