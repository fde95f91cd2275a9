"""An engine's events as fast as they are taken: it stores so many blocks, loses a message, and begins again.

python -m benchmarks.event_storm --blocks 200000     # prints its address, goes on until it is ended
"""

from __future__ import annotations

import argparse
import time

from benchmarks.publisher import Publisher
from kvroute.events import Stored

SIZE, PER_MESSAGE = 16, 64
RATE = 1000  # messages a second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=200_000)
    args = parser.parse_args()
    publisher, name = Publisher(buffer=1), 0
    print(publisher.events, flush=True)
    due = time.monotonic()
    while True:
        for _ in range(args.blocks // PER_MESSAGE):
            names = list(range(name, name + PER_MESSAGE))
            ids = [number & 0xFFFF for one in names for number in range(one, one + SIZE)]
            publisher.publish(Stored([*names], None, ids, SIZE))
            name += PER_MESSAGE
            due += 1 / RATE
            time.sleep(max(0.0, due - time.monotonic()))
        publisher.publish(lost=True)  # so it is not known any more what is held


if __name__ == "__main__":
    main()
