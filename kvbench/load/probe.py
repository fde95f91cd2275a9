"""What a run asks a server before it starts: whether it can be measured, and how long its tokens are."""

from __future__ import annotations

from collections.abc import Sequence

from kvbench.load.client import Answer, Server
from kvbench.load.schedule import openings
from kvbench.workloads import Passage, Prose, Request
from kvkeep.errors import ConfigError

__all__ = ["probe", "warm_up"]

_SAMPLES, _SAMPLE_TOKENS = 8, 400
_PROBE_TOKENS = (60, 300)


async def probe(server: Server, prose: Prose) -> str:
    """Check that the server streams and reports usage, and set `prose.chars_per_token` by its tokenizer.

    Returns how the tokens were counted: by the server's POST /tokenize, or by its usage of two prompts.
    Raises ConfigError if the server cannot be measured.
    """
    await server.connect()
    texts = [prose.passage(Passage(f"probe {tokens}", tokens)) for tokens in _PROBE_TOKENS]
    short, long = [await _ask(server, text) for text in texts]
    sample = " ".join(prose.passage(Passage(f"sample {i}", _SAMPLE_TOKENS)) for i in range(_SAMPLES))
    if counted := await server.count(sample):
        prose.calibrate(len(sample) / counted)
        return "tokenize"
    # The difference of two prompts is free of what a chat template adds.
    if (more := long.prompt_tokens - short.prompt_tokens) <= 0:
        raise ConfigError("the server's usage does not grow with the prompt: lengths cannot be made")
    prose.calibrate((len(texts[1]) - len(texts[0])) / more)
    return "usage"


async def warm_up(server: Server, prose: Prose, requests: Sequence[Request], how: str) -> int:
    """Before the run, and counted nowhere, one after the other: `how` is a number of prompts that the
    workload does not have, or "pass" for each of its openings once. Returns how many were sent."""
    if how == "pass":
        conversations = [
            [(role, prose.text(parts)) for role, parts in opening] for opening in openings(requests)
        ]
    else:
        size = _PROBE_TOKENS[1]
        texts = [prose.passage(Passage(f"warm-up {i}", size)) for i in range(int(how))]
        conversations = [[("user", text)] for text in texts]
    for messages in conversations:
        if messages[-1][0] != "user":  # chat templates want a question at the end
            messages.append(("user", "."))
        _checked(await server.send(server.body(messages, 1)))
    return len(conversations)


async def _ask(server: Server, text: str) -> Answer:
    return _checked(await server.send(server.body([("user", text)], 2)))


def _checked(answer: Answer) -> Answer:
    if answer.error:
        raise ConfigError(f"this server cannot be measured: a first request failed: {answer.error}")
    return answer
