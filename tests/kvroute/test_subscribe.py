"""Over real sockets: what is lost is asked for again, and what cannot be had is not claimed."""

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import zmq

from benchmarks.publisher import Publisher, publisher
from kvkeep.errors import ConfigError
from kvroute.events import Removed, Stored
from kvroute.index import Held, Index
from kvroute.subscribe import Source, Subscriber

BLOCK = 4


def blocks(number: int, count: int = 1) -> Stored:
    """A prompt of `count` blocks of its own."""
    names = list(range(100 * number, 100 * number + count))
    return Stored(names, None, tokens(number, count), BLOCK)


def tokens(number: int, count: int = 1) -> list[int]:
    return [1000 * number + at for at in range(BLOCK * count)]


class Scene:
    """A subscriber on an event loop, beside publishers that only move when they are told to."""

    def __init__(self) -> None:
        self.index = Index()
        self.subscriber = Subscriber(self.index, replay_wait=0.3)
        self.counters = self.subscriber.counters

    async def until(self, holds: Callable[[], object], *serving: Publisher) -> None:
        for _ in range(1000):
            for one in serving:
                one.serve()
            if holds():
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"never came about; {self.counters}, {self.index.lookup(tokens(0))}")

    async def connected(self, one: Publisher, *, replay: bool = True) -> None:
        """Follow, until messages arrive. The first that do are not of what a test looks at."""
        self.subscriber.follow("a", Source(one.events, one.replay if replay else None, one.topic))
        before = self.counters.messages
        for number in range(1000):
            one.publish(blocks(900 + number))
            one.serve()
            await asyncio.sleep(0.01)
            if self.counters.messages > before:
                break
        else:
            raise AssertionError("no message arrived")
        await self.until(lambda: self.holds(900 + number), one)

    def holds(self, number: int) -> bool:
        return self.index.lookup(tokens(number)) == {"a": Held(BLOCK, 0, 0)}


def played(play: Callable[[Scene], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        scene = Scene()
        try:
            await play(scene)
        finally:
            await scene.subscriber.close()

    asyncio.run(whole())


def test_what_was_published_before_is_asked_for() -> None:
    async def play(scene: Scene) -> None:
        with publisher() as one:
            for number in range(50):
                one.publish(blocks(number))
            scene.subscriber.follow("a", Source(one.events, one.replay))
            await scene.until(lambda: scene.index.blocks("a") == 50, one)
            assert scene.counters.messages == 0
            scene.subscriber.leave("a")
            assert scene.index.engines() == []

    played(play)


def test_a_lost_message_is_asked_for() -> None:
    async def play(scene: Scene) -> None:
        with publisher() as one:
            await scene.connected(one)
            one.publish(blocks(1))
            one.publish(Removed([100]), blocks(2), lost=True)
            one.publish(blocks(3))
            await scene.until(lambda: scene.holds(3), one)
            assert [scene.holds(number) for number in (1, 2, 3)] == [False, True, True]
            assert (scene.counters.gaps, scene.counters.resets, scene.counters.restarts) == (1, 0, 0)

    played(play)


def test_a_replay_that_loses_messages_is_asked_for_again() -> None:
    async def play(scene: Scene) -> None:
        with publisher() as one:
            await scene.connected(one)
            asked, first = one.asked, one.sequence
            for number in range(1, 9):
                one.publish(blocks(number), lost=number < 8)
            one.skip = {first + 2, first + 5}
            await scene.until(lambda: scene.holds(8), one)
            assert all(scene.holds(number) for number in range(1, 9))
            assert (scene.counters.resets, one.asked - asked) == (0, 2)

    played(play)


@pytest.mark.parametrize("replay", [True, False])
def test_a_hole_clears_the_engine(replay: bool) -> None:
    async def play(scene: Scene) -> None:
        with publisher(buffer=2) as one:
            await scene.connected(one, replay=replay)
            one.publish(blocks(1))
            await scene.until(lambda: scene.holds(1), one)
            for number in range(2, 6):
                one.publish(blocks(number), lost=True)
            one.publish(blocks(6))
            await scene.until(lambda: scene.holds(6), one)
            found = [scene.holds(number) for number in range(1, 7)]
            assert found == [False] * 4 + [replay, True]  # the buffer still had the last two
            assert (scene.counters.gaps, scene.counters.resets, scene.counters.restarts) == (1, 1, 0)

    played(play)


def test_a_replay_that_does_not_answer_is_a_hole() -> None:
    async def play(scene: Scene) -> None:
        with publisher() as one:
            await scene.connected(one)
            one.publish(blocks(1), lost=True)
            one.publish(blocks(2))
            await scene.until(lambda: scene.holds(2))  # nobody serves
            assert not scene.holds(1)
            assert scene.counters.resets == 1

    played(play)


@pytest.mark.parametrize("messages", [1, 40])
def test_an_engine_that_was_started_anew_holds_only_what_it_says_since(messages: int) -> None:
    """Whether its count is below or above the old one's where we find out."""

    async def play(scene: Scene) -> None:
        with publisher() as one:
            await scene.connected(one)
            one.publish(blocks(1))
            await scene.until(lambda: scene.holds(1), one)
            ports = [int(address.rpartition(":")[2]) for address in (one.events, one.replay)]
            assert one.sequence < 40
        with publisher(port=ports[0], replay_port=ports[1]) as two:
            for number in range(2, 2 + messages):
                two.publish(blocks(number))
            await scene.until(lambda: scene.index.blocks("a") == messages and scene.holds(2), two)
            assert not scene.holds(1)
            assert (scene.counters.restarts, scene.counters.resets) == (1, 0)

    played(play)


def test_a_connection_that_was_lost_for_a_while_costs_nothing() -> None:
    async def play(scene: Scene) -> None:
        with publisher() as one:
            await scene.connected(one)
            address, asked = one.events, one.asked
            one.drop_connections()
            one.publish(blocks(1), lost=True)
            one.accept_connections(address)
            await scene.until(lambda: scene.holds(1), one)
            assert one.asked == asked + 1
            assert (scene.counters.resets, scene.counters.restarts) == (0, 0)

    played(play)


def test_other_topics_and_noise_do_not_disturb() -> None:
    async def play(scene: Scene) -> None:
        with publisher(topic="kv@a@m") as one:
            await scene.connected(one)
            for frames in ([b"other"], [b"kv@a@m", b"x" * 8, b"\xc1"], [b"kv@a@m"], [b"kv@a@m"] * 9):
                one.pub.send_multipart(frames)
            one.publish(blocks(1))
            await scene.until(lambda: scene.holds(1), one)
            assert scene.subscriber.decoder.bad_messages == 3
            assert scene.counters.gaps == 0

    played(play)


def test_engines_that_connect_to_us() -> None:
    async def play(scene: Scene) -> None:
        names = {"kv@10.0.0.1@m": "a", "kv@10.0.0.2@m": "b"}
        address = scene.subscriber.listen("tcp://127.0.0.1:0", names.get, "kv@")
        context = zmq.Context()
        try:
            pubs = {}
            for topic in (*names, "kv@10.0.0.3@m"):
                pub = context.socket(zmq.PUB)
                pub.connect(address)
                pubs[topic] = Publisher(topic=topic)
                pubs[topic].pub.close(0)
                pubs[topic].pub = pub
            a, b, stranger = pubs.values()
            for _ in range(300):
                a.publish(blocks(1))
                b.publish(blocks(1))
                stranger.publish(blocks(1))
                await asyncio.sleep(0.01)
                if scene.index.lookup(tokens(1)).keys() == {"a", "b"}:
                    break
            a.publish(lost=True)
            a.publish(blocks(2))
            await scene.until(lambda: scene.holds(2))
            assert list(scene.index.lookup(tokens(1))) == ["b"]
            assert sorted(scene.index.engines()) == ["a", "b"]
        finally:
            for one in pubs.values():
                one.close()
            context.destroy(linger=0)

    played(play)


def test_ranks_that_connect_to_us_by_one_topic_are_told_apart() -> None:
    async def play(scene: Scene) -> None:
        address = scene.subscriber.listen("tcp://127.0.0.1:0", {"kv@a@m": "a"}.get, "kv@")
        with publisher(topic="kv@a@m") as first, publisher(topic="kv@a@m", rank=1) as second:
            for one in (first, second):
                one.pub.close(0)
                one.pub = one._context.socket(zmq.PUB)
                one.pub.connect(address)
            for _ in range(300):
                first.publish(blocks(1))
                second.publish(blocks(2))
                await asyncio.sleep(0.01)
                if scene.holds(1) and scene.holds(2):
                    break
            first.publish(blocks(3))
            second.publish(blocks(4))
            await scene.until(lambda: scene.holds(3) and scene.holds(4))
            assert scene.holds(1)
            assert scene.holds(2)
            assert (scene.counters.resets, scene.counters.restarts) == (0, 0)
            second.publish(lost=True)
            second.publish(blocks(5))
            await scene.until(lambda: scene.holds(5))
            assert [scene.holds(number) for number in (1, 2, 3, 4)] == [True, False, True, False]

    played(play)


def test_ranks_are_followed_at_ports_above_the_first_ones() -> None:
    async def play(scene: Scene) -> None:
        with publisher() as first, free_above(first) as second:
            for number in range(20):
                first.publish(blocks(number))
                second.publish(blocks(100 + number))
            scene.subscriber.follow("a", Source(first.events, first.replay, ranks=2))
            await scene.until(lambda: scene.index.blocks("a") == 40, first, second)
            assert scene.holds(1)
            assert scene.holds(101)
            scene.subscriber.leave("a")
            assert scene.index.engines() == []

    played(play)


@contextlib.contextmanager
def free_above(first: Publisher) -> Iterator[Publisher]:
    """The second rank of an engine; where its ports are taken, both move on."""
    for _ in range(100):
        ports = [int(address.rpartition(":")[2]) for address in (first.events, first.replay)]
        try:
            second = Publisher(port=ports[0] + 1, replay_port=ports[1] + 1, rank=1)
        except (AssertionError, zmq.ZMQError):
            for name, kind in (("pub", zmq.PUB), ("router", zmq.ROUTER)):
                getattr(first, name).close(0)
                setattr(first, name, first._bound(kind, "tcp://127.0.0.1:0"))
            continue
        try:
            yield second
        finally:
            second.close()
        return
    raise AssertionError("no ports side by side")


def test_a_task_that_ends_by_an_error_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def play(scene: Scene) -> None:
        def nobody(topic: str) -> str:
            raise RuntimeError("no such topic")

        address = scene.subscriber.listen("tcp://127.0.0.1:0", nobody)
        with publisher() as one:
            one.pub.close(0)
            one.pub = one._context.socket(zmq.PUB)
            one.pub.connect(address)
            for _ in range(300):
                one.publish(blocks(1))
                await asyncio.sleep(0.01)
                if "no such topic" in caplog.text:
                    break
        assert "no such topic" in caplog.text

    played(play)


@pytest.mark.parametrize("source", [Source("host:1"), Source("tcp://x"), Source("tcp://127.0.0.1:1", "y")])
def test_a_wrong_address(source: Source) -> None:
    async def play(scene: Scene) -> None:
        with pytest.raises(ConfigError, match="tcp://HOST:PORT"):
            scene.subscriber.follow("a", source)
        with pytest.raises(ConfigError, match="cannot listen"):
            scene.subscriber.listen("nowhere", str)

    played(play)


def test_what_is_claimed_after_losses_is_what_is_held() -> None:
    """Blocks of shared and own prompts come and go; one message of twenty is lost."""

    async def play(scene: Scene) -> None:
        draw, held = random.Random(7), set[int]()
        with publisher() as one:
            await scene.connected(one)
            for _ in range(400):
                events: list[Any] = []
                for _ in range(5):
                    number = draw.randrange(1, 200)
                    events.append(Removed([100 * number]) if number in held else blocks(number))
                    held ^= {number}
                one.publish(*events, lost=draw.random() < 0.05)
                one.serve()
                await asyncio.sleep(0)
            one.publish(blocks(300))
            await scene.until(lambda: scene.holds(300), one)
            assert {number for number in range(1, 200) if scene.holds(number)} == held
            assert scene.counters.gaps
            assert scene.counters.resets == 0

    played(play)
