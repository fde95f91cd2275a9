"""The router's policies in virtual time: the same on every machine, whatever else it does.

    python -m benchmarks.router_model        # as `benchmarks.router policies`, without sockets

The policies, the index and the stand-ins' caches are the real ones; only time is made up. An engine computes
one prompt after the other, and answers any number at once.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from xxhash import xxh3_64_intdigest

from benchmarks.router import POLICIES, ROOM, Talk, best_possible
from benchmarks.stand_in import BLOCK, Cache, tokens_of
from kvbench.workloads import Request
from kvroute.backends import Backend, Engine, Visit
from kvroute.index import Index
from kvroute.policy import PLAIN, Ask, Expected, Kv, Policy

ITL = 0.002
HELD_FOR = 20.0  # seconds, as the router has it


class Model:
    """Engines, a policy, and a clock that jumps from event to event."""

    def __init__(self, talk: Talk, policy: str, rate: float, engines: int) -> None:
        self._talk, self._rate, self.now = talk, rate, 0.0
        self._index = Index()
        self._expected = Expected(lambda: self.now, HELD_FOR)
        kv = policy == "kv"
        self._policy = Kv(self._index, self._expected) if kv else Policy(PLAIN[policy])
        self._backends = [Backend(Engine(f"engine {number}", "")) for number in range(engines)]
        room = round(ROOM * talk.tokens / BLOCK)
        self._caches = {one.name: Cache(room, "GPU") for one in self._backends}
        self._waiting: dict[str, deque[Any]] = {one.name: deque() for one in self._backends}
        self._computing: set[str] = set()
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = itertools.count()
        self._said: dict[int, list[dict[str, str]]] = {}
        self._turns: dict[int, deque[Request]] = defaultdict(deque)
        self.held, self.ttft, self.prompts = 0, list[float](), list[list[int]]()

    def run(self) -> Model:
        """Play all requests."""
        for request, at in zip(self._talk.requests, self._talk.at, strict=True):
            self._later(at, self._due, request)
        while self._events:
            self.now, _, action, args = heapq.heappop(self._events)
            action(*args)
        return self

    def _later(self, at: float, action: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (at, next(self._count), action, args))

    def _due(self, request: Request) -> None:
        turns = self._turns[request.user]
        turns.append(request)
        if len(turns) == 1:  # else its user waits for an answer
            self._send(request)

    def _send(self, request: Request) -> None:
        messages = self._talk.messages(request, self._said.get(request.user, []))
        self._said[request.user] = messages
        text = " ".join(f"<{one['role']}> {one['content']}" for one in messages)
        tokens = tokens_of(text)
        self.prompts.append(tokens)
        known = np.array(tokens, np.uint32) if self._policy.wants_tokens else None
        ask = Ask(text.encode(), f"user {request.user}", known)
        choice = self._policy.rank(self._policy.look(ask), self._backends)[0]
        choice.backend.picked = len(self.prompts)
        self._expected.promise(ask, choice.backend.name)
        visit = Visit(choice.backend, choice.missing)
        self._waiting[choice.backend.name].append((self.now, request, visit, tokens))
        self._compute(choice.backend.name)

    def _compute(self, engine: str) -> None:
        if engine in self._computing or not self._waiting[engine]:
            return
        self._computing.add(engine)
        sent, request, visit, tokens = self._waiting[engine].popleft()
        chain = list(_chain(np.array(tokens, np.uint32)))
        held = BLOCK * sum(1 for _ in itertools.takewhile(self._caches[engine].holds, chain))
        held = min(held, len(tokens) - 1)
        self.held += held
        self._later(
            self.now + (len(tokens) - held) / self._rate,
            self._begin,
            engine,
            sent,
            request,
            visit,
            tokens,
            chain,
        )

    def _begin(
        self, engine: str, sent: float, request: Request, visit: Visit, tokens: list[int], chain: list[int]
    ) -> None:
        """The first token is there."""
        self.ttft.append(self.now - sent)
        visit.answered()
        self._index.apply(engine, self._caches[engine].store(chain, tokens, None, None))
        self._computing.discard(engine)
        self._compute(engine)
        self._later(self.now + request.answer_tokens * ITL, self._end, request, visit)

    def _end(self, request: Request, visit: Visit) -> None:
        visit.__exit__()
        answer = " ".join(f"w{number}" for number in range(request.answer_tokens))
        self._said[request.user] = [*self._said[request.user], {"role": "assistant", "content": answer}]
        turns = self._turns[request.user]
        turns.popleft()
        if turns:
            self._send(turns[0])


def _chain(tokens: np.ndarray[Any, Any]) -> Iterable[int]:
    key = 0
    for at in range(0, len(tokens) - BLOCK + 1, BLOCK):
        key = xxh3_64_intdigest(tokens[at : at + BLOCK].tobytes(), key)
        yield key


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the workloads")
    parser.add_argument("--rate", type=float, default=8000.0, help="prompt tokens per second and engine")
    parser.add_argument("--engines", type=int, default=3)
    args = parser.parse_args()
    console = Console()
    table = Table("workload", "policy", "hit ratio", "of best", "TTFT ms", "p50", "p90", "p99", "× kv's")
    for name in ("conversations", "long_documents"):
        talk, kv = Talk(name, args.scale * (0.25 if name == "long_documents" else 1), args.rate), 0.0
        for policy in POLICIES:
            one = Model(talk, policy, args.rate, args.engines).run()
            hit, best = one.held / sum(map(len, one.prompts)), best_possible(one.prompts)
            mean, cuts = statistics.mean(one.ttft), statistics.quantiles(one.ttft, n=100)
            kv = kv or mean
            milliseconds = [f"{1000 * value:.0f}" for value in (mean, cuts[49], cuts[89], cuts[98])]
            table.add_row(name, policy, f"{hit:.3f}", f"{hit / best:.2f}", *milliseconds, f"{mean / kv:.2f}")
        table.add_row(name, "best possible", f"{best:.3f}", "1.00")
        console.print(f"{name}: {len(talk.requests)} requests, {sum(map(len, one.prompts))} prompt tokens")
    console.print(table)


if __name__ == "__main__":
    main()
