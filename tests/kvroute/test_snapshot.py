"""A router that starts again, or beside another, knows what was told before: and never what is not so."""

import asyncio
import random
import stat
from itertools import count
from pathlib import Path

import aiohttp
import msgspec
import pytest

from benchmarks.publisher import Publisher, publisher
from kvkeep.errors import ConfigError
from kvroute.events import Cleared, Removed, Stored
from kvroute.index import Index
from kvroute.options import Options, parse_place
from kvroute.server import Router
from kvroute.snapshot import Part, find, read, sealed, write
from kvroute.subscribe import Source
from tests.kvroute.scene import DOCUMENT, played, scene
from tests.kvroute.scene import Scene as Routed
from tests.kvroute.test_index import prompt, stored
from tests.kvroute.test_subscribe import BLOCK, Scene, blocks, free_above, tokens

KEY = "a-key-for-the-index"


async def ended(before: Scene) -> bytes:
    """What the router leaves at its end."""
    data = b"".join(sealed(before.index.seed, await before.subscriber.parts()))
    await before.subscriber.close()
    return data


def begun(data: bytes) -> Scene:
    """A router that starts with it."""
    after = Scene()
    after.index.seed, after.subscriber.saved = read(data)
    return after


async def told(one: Publisher, many: int = 30) -> Scene:
    """A subscriber that knows `many` blocks, 1 on: of which the publisher's buffer has few."""
    scene = Scene()
    await scene.connected(one)
    for number in range(1, many + 1):
        one.publish(blocks(number))
    await scene.until(lambda: scene.holds(many), one)
    return scene


@pytest.mark.parametrize("since", [0, 3])
def test_what_is_older_than_the_replay_is_known_again(since: int) -> None:
    async def play() -> None:
        with publisher(buffer=5) as one:
            data = await ended(await told(one))
            for number in range(since):
                one.publish(Removed([100 * (number + 1)]), blocks(50 + number))
            after = begun(data)
            after.subscriber.follow("a", Source(one.events, one.replay))
            assert not after.holds(30)  # not before the engine has answered
            await after.until(lambda: after.holds(30) and after.holds(50 + since - 1 if since else 1), one)
            found = [after.holds(number) for number in range(1, 31)]
            assert found == [False] * since + [True] * (30 - since)
            assert (after.counters.resets, after.counters.restarts) == (0, 0)
            assert after.counters.restored >= 30
            one.publish(blocks(60))
            await after.until(lambda: after.holds(60), one)
            # And it can be handed on.
            last = begun(await ended(after))
            last.subscriber.follow("a", Source(one.events, one.replay))
            await last.until(lambda: last.holds(30) and last.holds(60), one)
            await last.subscriber.close()

    played(play)


def test_what_is_claimed_after_many_starts_is_what_is_held() -> None:
    """Blocks come and go, messages are lost, and the router starts again and again, from what it left."""

    async def play() -> None:
        draw, held = random.Random(11), set[int]()
        with publisher(buffer=120) as one:
            scene = await told(one, 1)
            for start in range(20):
                for _ in range(30):
                    number = draw.randrange(1, 120)
                    one.publish(
                        Removed([100 * number]) if number in held else blocks(number, 1),
                        lost=draw.random() < 0.05,
                    )
                    held ^= {number}
                    one.serve()
                    await asyncio.sleep(0)
                scene, before = begun(await ended(scene)), scene
                assert before.counters.resets == before.counters.restarts == 0
                scene.subscriber.follow("a", Source(one.events, one.replay))
                if start % 3:
                    feed = scene.subscriber._feeds["a"][0]
                    await scene.until(lambda feed=feed: feed.next == one.sequence, one)
            one.publish(blocks(300))
            await scene.until(lambda: scene.holds(300), one)
            assert {number for number in range(2, 120) if scene.holds(number)} == held - {1}
            await scene.subscriber.close()

    played(play)


def test_a_gap_longer_than_the_buffer_drops_it() -> None:
    async def play() -> None:
        with publisher(buffer=5) as one:
            data = await ended(await told(one))
            for number in range(50, 60):
                one.publish(blocks(number))
            after = begun(data)
            after.subscriber.follow("a", Source(one.events, one.replay))
            await after.until(lambda: after.holds(59), one)
            assert [after.holds(number) for number in (1, 30, 54, 55)] == [False, False, False, True]
            assert (after.counters.resets, after.counters.restored) == (1, 0)
            await after.subscriber.close()

    played(play)


@pytest.mark.parametrize("messages", [1, 200])
def test_an_engine_started_anew_meanwhile_is_forgotten(messages: int) -> None:
    async def play() -> None:
        with publisher() as one:
            data = await ended(await told(one))
        with publisher() as two:
            for number in range(messages):
                two.publish(blocks(100 + number))
            after = begun(data)
            after.subscriber.follow("a", Source(two.events, two.replay))
            await after.until(lambda: after.index.blocks("a") == messages, two)
            assert after.holds(100)
            assert not after.holds(30)
            assert (after.counters.restarts, after.counters.restored) == (1, 0)
            await after.subscriber.close()

    played(play)


def test_without_an_answer_nothing_is_claimed() -> None:
    """No replay socket: not before, and not after the engine's next message. One that is silent: kept."""

    async def play() -> None:
        with publisher() as one:
            data = await ended(await told(one))
            after, silent = begun(data), begun(data)
            after.subscriber.follow("a", Source(one.events))
            silent.subscriber.follow("a", Source(one.events, one.replay))
            await after.until(lambda: "a" in after.subscriber.connected & silent.subscriber.connected)
            assert not after.holds(30)
            assert not silent.holds(30)
            kept = b"".join(sealed(silent.index.seed, await silent.subscriber.parts()))
            assert read(kept) == read(data)  # who starts next may have an answer
            one.publish(blocks(70))
            await after.until(lambda: after.holds(70) and silent.holds(70))  # nobody serves
            assert not after.holds(30)
            assert not silent.holds(30)
            assert silent.counters.restored == 0
            assert await after.subscriber.parts() == []
            for each in (after, silent):
                await each.subscriber.close()

    played(play)


def test_ranks_are_kept_each_by_itself_and_others_not_at_all() -> None:
    async def play() -> None:
        with publisher() as first, free_above(first) as second:
            before = Scene()
            for number in range(20):
                first.publish(blocks(number))
                second.publish(blocks(100 + number, 2))
            before.subscriber.follow("a", Source(first.events, first.replay, ranks=2))
            await before.until(lambda: before.index.blocks("a") == 60, first, second)
            data = await ended(before)
            after = begun(data)
            after.subscriber.follow("b", Source(first.events, first.replay))
            after.subscriber.follow("a", Source(first.events, first.replay, ranks=2))
            await after.until(lambda: after.index.blocks("a") == 60, first, second)
            assert after.counters.restored == 60
            assert after.index.lookup(tokens(101, 2))["a"].tokens == 2 * BLOCK
            await after.subscriber.close()

    played(play)


def test_events_that_come_while_it_is_taken_count_once_they_are_repeated() -> None:
    """Each change between two parts is repeated on what was restored: the end is the same as without."""
    text = prompt(5000)
    changes = [
        [Removed(list(range(4000, 5000)))],
        [stored(prompt(20, 9), 7000), Removed([0])],
        [stored(text[:BLOCK]), Stored([4000, 4001], None, [], BLOCK, medium="CPU")],
        [Removed([1]), Stored([1], 0, text[BLOCK : 2 * BLOCK], BLOCK, medium="STORAGE")],
    ]
    for end in ([], [Cleared(), stored(prompt(3, 5), 9000)]):
        index, after = Index(), Index()
        index.apply("a", [stored(text), stored(prompt(2000, 3), 5000, medium="CPU")])
        index.apply("b", [stored(prompt(10))])
        after.seed, parts, log = index.seed, [], []
        for number, part in enumerate(index.parts("a", 0, 1, b"")):
            parts.append(msgspec.msgpack.decode(msgspec.msgpack.encode(part), type=Part))
            events = changes[number] if number < len(changes) else end if number == 4 else []
            index.apply("a", events)
            index.apply("b", [stored(prompt(5 + number, number))])
            log += events
        assert len(parts) >= 5
        for part in parts:
            after.restore(part)
        after.apply("a", log)
        for wanted in (text, text[: 4000 * BLOCK], prompt(20, 9), prompt(2000, 3), prompt(3, 5)):
            assert after.lookup(wanted).get("a") == index.lookup(wanted).get("a")
        assert after.blocks("a") == index.blocks("a")


def test_a_restored_index_stays_within_its_bounds() -> None:
    index, after = Index(), Index(most_blocks=640)
    index.apply("a", [stored(prompt(3000), kv_cache_spec_kind="mla_attention"), Removed([2999])])
    after.seed = index.seed
    for part in index.parts("a", 0, 1, b""):
        after.restore(part)
    assert 0 < after.blocks("a") <= 640
    assert after.forgotten == 2999 - after.blocks("a")
    assert list(index.parts("nobody", 0, 1, b"")) == []


def file_of(*parts: Part, seed: int = 5) -> bytes:
    return b"".join(sealed(seed, [msgspec.msgpack.encode(part) for part in parts]))


PART = Part("a", 0, 1, b"x", None, [4], [1, b"two"], [10, 11], [None, 1], b"\x01\x06")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "another version"),
        (b"\x93not ours", "another version"),
        (file_of(PART).replace(b"index 1", b"index 9", 1), "another version"),
        (file_of(PART)[:-1], "not whole"),
        (file_of(PART)[:30], "not whole"),
        (file_of(PART).replace(b"two", b"ten"), "damaged"),
        (b"".join(sealed(5, [b"\x91\x01"])), "malformed"),
        (b"".join(sealed(5, [b"\x91" * 9000])), "malformed"),
        (b"".join(sealed(-5, [b"\xc1"])), "malformed"),
        (file_of(msgspec.structs.replace(PART, keys=[10])), "contradicts"),
        (file_of(msgspec.structs.replace(PART, next=0)), "contradicts"),
        (file_of(msgspec.structs.replace(PART, sizes=[4, 0])), "contradicts"),
        (
            file_of(Part("a", 0, 1, b"", None, [4], [7] * 5000, [8] * 5000, [9] * 5000, b"\1" * 5000)),
            "contra",
        ),
        (file_of(msgspec.structs.replace(PART, keys=["10", "11"])), "malformed"),
    ],
    ids=count(),  # a file has the time in it, and all workers must find the same tests
)
def test_what_is_no_index_is_refused_and_says_so(
    data: bytes, says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=says):
        read(data)
    path = tmp_path / "index"
    path.write_bytes(data)

    async def play() -> None:
        async with aiohttp.ClientSession() as session:
            assert await find(str(path), session, None) is None
            assert await find(str(tmp_path / "none"), session, None) is None
            assert await find(str(tmp_path), session, None) is None
            assert await find("http://127.0.0.1:9/kvkeep/index", session, KEY) is None

    played(play)
    assert says in caplog.text
    assert "nothing is known yet" in caplog.text


def test_the_file_is_its_owners_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "index"
    (tmp_path / "index.new").write_text("left by one that was killed")
    write(path, 5, [msgspec.msgpack.encode(PART)])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read(path.read_bytes()) == (5, {("a", 0): [msgspec.msgpack.encode(PART)]})
    assert [one.name for one in tmp_path.iterdir()] == ["index"]
    with pytest.raises(OSError, match="directory"):
        write(tmp_path / "none" / "index", 5, [])


def test_a_router_that_starts_again_and_one_beside_it(tmp_path: Path) -> None:
    client, reader = ({"Authorization": f"Bearer {key}"} for key in ("a-key-of-a-client", KEY))
    (tmp_path / "keys").write_text("a-key-of-a-client\n")
    (tmp_path / "index-key").write_text(KEY)
    key, path = str(tmp_path / "index-key"), tmp_path / "index"

    async def another(s: Routed, **more: str) -> None:
        """A router in front of the same engine."""
        one = next(iter(s.router.pool.backends.values())).engine
        place = parse_place(one.url, "any", s.engines[0].publisher.events, s.engines[0].publisher.replay)
        options = Options((place,), listen="127.0.0.1:0", log_interval=0.0, index_key=key, **more)
        router, held = Router(options), s.router.index.blocks(one.name)
        await router.start()
        try:
            await s.until(lambda: router.index.blocks(one.name) == held)
            assert router._subscriber.counters.restored == held
        finally:
            await router.close()

    async def play() -> None:
        async with scene(1, api_keys=str(tmp_path / "keys"), index=str(path), index_key=key) as s:
            await s.ask(DOCUMENT, headers=client)
            await s.told(0, 5)
            url = s.url + "/kvkeep/index"
            for headers in ({}, client, {"Authorization": "Bearer x"}):
                async with s.client.get(url, headers=headers) as answer:
                    assert answer.status == 401
            async with s.client.get(s.url + "/v1/models", headers=reader) as answer:
                assert answer.status == 401  # it is for nothing else
            async with s.client.get(url, headers=reader) as answer:
                assert answer.status == 200
                assert read(await answer.read())[0] == s.router.index.seed
            await another(s, index_from=url, index=str(tmp_path / "none"))
            await s.router.close()
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            await another(s, index=str(path), index_from=url)  # where nobody is any more

    played(play)


@pytest.mark.parametrize(
    "options",
    [
        {"index": "/no/such/folder/index"},
        {"index": "/tmp"},
        {"index_from": "http://h/kvkeep/index"},
        {"index_from": "ftp://h/kvkeep/index", "index_key": "x"},
    ],
)
def test_a_wrong_flag_is_an_error(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--index"):
        Router(Options((parse_place("http://h:1"),), **options))


def test_a_clients_key_does_not_open_the_index(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEY)
    keys = dict.fromkeys(("api_keys", "index_key"), str(tmp_path / "keys"))
    with pytest.raises(ConfigError, match="no client's"):
        Router(Options((parse_place("http://h:1"),), **keys))


def test_without_a_key_nobody_gets_the_index() -> None:
    async def play() -> None:
        async with scene(1) as s, s.client.get(s.url + "/kvkeep/index") as answer:
            assert answer.status == 401

    played(play)
