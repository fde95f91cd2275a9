"""What every tier must do, against its real store. A tier's test inherits this and gives `place`."""

from __future__ import annotations

import random
import threading
import time
from typing import ClassVar

import pytest

from kvkeep.errors import TierUnavailable
from kvkeep.tiers.base import Buffer, Got, Key, Listing, Put, Tier
from kvkeep.tiers.seal import Sealed
from tests.tiers.place import PAGE, Place, buffers_of, closing, keys_of

_DEADLINE = 0.5


class TierConformance:
    """Subclasses give a fixture `place`; `sizes` and `batches` are those that the issue names."""

    sizes: ClassVar[list[int]] = [PAGE << shift for shift in range(15)]  # 4 KiB … 64 MiB
    batches: ClassVar[list[int]] = [1, 2, 7, 64, 1000]
    timeout_options: ClassVar[dict[str, str]] = {"timeout": f"{_DEADLINE}s"}

    @pytest.fixture
    def tier(self, place: Place) -> Tier:
        with closing(place.open()) as tier:
            yield tier

    def test_every_size_comes_back_bit_for_bit(self, tier: Tier) -> None:
        limit = tier.capabilities.max_value_bytes
        for number, size in enumerate(self.sizes):
            if limit is not None and size > limit:
                continue
            keys, sent, back = keys_of(2, number), buffers_of([size] * 2, number), buffers_of([size] * 2)
            assert tier.put(keys, sent) == [Put.STORED] * 2
            assert tier.get(keys, back) == [Got.HIT] * 2
            assert all(a == b for a, b in zip(sent, back, strict=True))
            tier.delete(keys)

    @pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
    def test_batches(self, tier: Tier, count: int) -> None:
        keys, sent, back = keys_of(count), buffers_of([PAGE] * count, 1), buffers_of([PAGE] * count)
        assert tier.put(keys, sent) == [Put.STORED] * count
        assert tier.contains(keys) == [True] * count
        assert tier.get(keys, back) == [Got.HIT] * count
        assert b"".join(back) == b"".join(sent)
        tier.delete(keys)
        assert tier.contains(keys) == [False] * count

    def test_empty_batches(self, tier: Tier) -> None:
        assert tier.contains([]) == []
        assert tier.get([], []) == []
        assert tier.put([], []) == []
        tier.delete([])

    def test_missing_keys_among_held_ones(self, tier: Tier) -> None:
        keys, sent = keys_of(9), buffers_of([2 * PAGE] * 9, 2)
        tier.put(keys[::2], sent[::2])
        back = buffers_of([2 * PAGE] * 9)
        assert tier.contains(keys) == [True, False] * 4 + [True]
        assert tier.get(keys, back) == [Got.HIT, Got.MISS] * 4 + [Got.HIT]
        assert all(a == b for a, b in zip(sent[::2], back[::2], strict=True))

    def test_sizes_mixed_in_one_batch(self, tier: Tier) -> None:
        sizes = [PAGE, 64 * PAGE, 3 * PAGE, 300 * PAGE]
        keys, sent, back = keys_of(4), buffers_of(sizes, 3), buffers_of(sizes)
        assert tier.put(keys, sent) == [Put.STORED] * 4
        assert tier.get(keys, back) == [Got.HIT] * 4
        assert back == sent

    def test_overwrite(self, tier: Tier) -> None:
        (key,), (old,), (new,) = keys_of(1), buffers_of([4 * PAGE], 4), buffers_of([4 * PAGE], 5)
        (back,) = buffers_of([4 * PAGE])
        tier.put([key], [old])
        assert tier.put([key], [new]) == [Put.STORED]
        assert tier.get([key], [back]) == [Got.HIT]
        assert back == new

    def test_delete_is_idempotent(self, tier: Tier) -> None:
        keys, sent = keys_of(3), buffers_of([PAGE] * 3, 6)
        tier.put(keys, sent)
        tier.delete(keys[:2])
        tier.delete(keys)
        assert tier.contains(keys) == [False] * 3
        assert tier.get(keys, buffers_of([PAGE] * 3)) == [Got.MISS] * 3

    def test_unaligned_buffers_work(self, tier: Tier) -> None:
        (whole,), (back,) = buffers_of([3 * PAGE], 7), buffers_of([3 * PAGE])
        sent, into = whole[100 : 100 + PAGE + 77], back[333 : 333 + PAGE + 77]
        keys = keys_of(1)
        assert tier.put(keys, [sent]) == [Put.STORED]
        assert tier.get(keys, [into]) == [Got.HIT]
        assert sent == into
        assert not any(back[:333])
        assert not any(back[333 + PAGE + 77 :])

    def test_a_value_of_another_length_is_damaged_and_stays_inside_its_buffer(self, tier: Tier) -> None:
        for stored in (PAGE, 2 * PAGE, 4 * PAGE):
            (key,), (value,) = keys_of(1, stored), buffers_of([stored], 8)
            tier.put([key], [value])
            for asked in (PAGE, 3 * PAGE, 5 * PAGE):
                if asked == stored:
                    continue
                (back,) = buffers_of([8 * PAGE])
                assert tier.get([key], [back[PAGE : PAGE + asked]]) == [Got.DAMAGED]
                assert not any(back[:PAGE])
                assert not any(back[PAGE + asked :])
            # The connection is still in step with the store.
            (back,) = buffers_of([stored])
            assert tier.get([key], [back]) == [Got.HIT]
            assert back == value

    def test_concurrent_writers_of_one_key_leave_one_whole_value(self, tier: Tier, place: Place) -> None:
        (key,) = keys_of(1)
        values = [buffers_of([64 * PAGE], seed)[0] for seed in range(4)]
        with closing(place.open()) as other:

            def write(through: Tier, value: memoryview) -> None:
                for _ in range(10):
                    assert through.put([key], [value]) == [Put.STORED]

            writers = [
                threading.Thread(target=write, args=(through, value))
                for through, value in zip((tier, other, tier, other), values, strict=True)
            ]
            for writer in writers:
                writer.start()
            (back,) = buffers_of([64 * PAGE])
            while any(writer.is_alive() for writer in writers):
                if tier.get([key], [back]) == [Got.HIT]:
                    assert any(back == value for value in values)
            for writer in writers:
                writer.join()
            assert other.get([key], [back]) == [Got.HIT]
            assert any(back == value for value in values)

    def test_verbs_from_several_threads(self, tier: Tier) -> None:
        problems: list[str] = []

        def work(seed: int) -> None:
            keys, sent = keys_of(16, seed), buffers_of([16 * PAGE] * 16, seed)
            back = buffers_of([16 * PAGE] * 16)
            for _ in range(5):
                if tier.put(keys, sent) != [Put.STORED] * 16 or tier.get(keys, back) != [Got.HIT] * 16:
                    problems.append(f"thread {seed}: not all came back")
                if b"".join(sent) != b"".join(back):
                    problems.append(f"thread {seed}: other bytes")
                tier.delete(keys[::3])

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems

    def test_another_client_sees_what_was_put(self, tier: Tier, place: Place) -> None:
        if not tier.capabilities.persistent:
            pytest.skip("a tier that ends with its process")
        keys, sent, back = keys_of(5), buffers_of([8 * PAGE] * 5, 9), buffers_of([8 * PAGE] * 5)
        tier.put(keys, sent)
        tier.close()
        with closing(place.open()) as again:
            assert again.get(keys, back) == [Got.HIT] * 5
            assert back == sent

    def test_capacity_is_a_bound(self, place: Place) -> None:
        if place.capacity_option is None:
            pytest.skip("bounded by the store itself, tested in a test of its own")
        bound = 4 << 20
        with closing(place.open(**{place.capacity_option: str(bound)})) as tier:
            for seed in range(40):
                keys, sent = keys_of(8, seed), buffers_of([64 << 10] * 8, seed)
                tier.put(keys, sent)
                assert place.used_bytes() <= bound
            assert place.used_bytes() >= bound // 2
            assert tier.contains(keys) == [True] * 8
            assert tier.put(keys_of(1, 99), buffers_of([2 * bound], 1)) == [Put.REFUSED]

    def test_flipped_and_truncated_and_foreign_values_are_misses_and_go(self, place: Place) -> None:
        with closing(Sealed(place.open())) as tier:
            keys, sent = keys_of(6), buffers_of([4 * PAGE] * 6, 10)
            tier.put(keys, sent)
            values = [place.read(key) for key in keys]
            assert values == [bytes(value) for value in sent]
            flipped = bytearray(values[0] or b"")
            flipped[1234] ^= 8
            place.write(keys[0], bytes(flipped))
            place.write(keys[1], (values[1] or b"")[: 2 * PAGE])
            place.write(keys[2], values[3] or b"")  # a whole value, of another key
            place.write(keys[4], b"what somebody else keeps under this name" * 500)
            back = buffers_of([4 * PAGE] * 6)
            damaged = [Got.DAMAGED] * 3
            assert tier.get(keys, back) == [*damaged, Got.HIT, Got.DAMAGED, Got.HIT]
            assert back[3] == sent[3]
            assert back[5] == sent[5]
            assert tier.contains(keys) == [False, False, False, True, False, True]

    def test_random_flips_in_many_values_are_counted_and_never_served(self, place: Place) -> None:
        source, keys = random.Random(21), keys_of(40, 21)
        sent, back = (buffers_of([PAGE << number % 6 for number in range(40)], seed) for seed in (21, None))
        hurt = set(source.sample(range(40), 30))
        with closing(place.opened()) as tier:
            assert tier.put(keys, sent) == [Put.STORED] * 40
            for number in hurt:
                value = bytearray(place.read(keys[number]) or b"")
                for bit in source.sample(range(8 * len(value)), source.randint(1, 3)):
                    value[bit // 8] ^= 1 << bit % 8
                place.write(keys[number], bytes(value))
            wanted = [Got.DAMAGED if number in hurt else Got.HIT for number in range(40)]
            assert tier.get(keys, back) == wanted
            assert all(back[number] == sent[number] for number in set(range(40)) - hurt)
            assert (tier.counters["damaged"], tier.counters["hits"]) == (30, 10)
            assert tier.contains(keys) == [got is Got.HIT for got in wanted]

    def test_closed_tiers_say_so(self, place: Place) -> None:
        tier = place.open()
        tier.close()
        tier.close()
        with pytest.raises(TierUnavailable):
            tier.contains(keys_of(1))
        with pytest.raises(TierUnavailable):
            tier.get(keys_of(1), buffers_of([PAGE]))

    # What a tier may offer besides

    def test_seals_are_made_and_checked_on_the_way(self, tier: Tier) -> None:
        sealed: list[Key] = []
        checked: list[Key] = []
        bad: list[Key] = []

        def seal(key: Key, value: Buffer) -> None:
            value[-len(key) :] = key
            sealed.append(key)

        def check(key: Key, value: Buffer) -> bool:
            checked.append(key)
            return value[-len(key) :] == key and key not in bad

        if not tier.overlap(seal, check):
            pytest.skip("left to the wrapper")
        keys, sent = keys_of(9), buffers_of([4 * PAGE] * 9, 13)
        bad += keys[3:5]
        assert tier.put(keys[1:], sent[1:]) == [Put.STORED] * 8
        assert sorted(sealed) == sorted(keys[1:])
        back = buffers_of([4 * PAGE] * 9)
        damaged = [Got.DAMAGED] * 2
        assert tier.get(keys, back) == [Got.MISS, Got.HIT, Got.HIT, *damaged, *[Got.HIT] * 4]
        assert sorted(checked) == sorted(keys[1:])
        assert back[1:3] + back[5:] == sent[1:3] + sent[5:]

    def test_all_that_is_held_is_listed(self, tier: Tier) -> None:
        if not isinstance(tier, Listing):
            pytest.skip("cannot be listed")
        assert list(tier.keys()) == []
        sizes = [PAGE, 3 * PAGE, 2 * PAGE, PAGE, 8 * PAGE]
        keys, sent = keys_of(5), buffers_of(sizes, 14)
        tier.put(keys, sent)
        tier.delete(keys[:1])
        assert sorted(tier.keys()) == sorted(zip(keys[1:], sizes[1:], strict=True))
        back = buffers_of(sizes)
        assert tier.peek(keys, back) == [Got.MISS, *[Got.HIT] * 4]
        assert back[1:] == sent[1:]
        for correct in (False, True):
            real = tier.recount(correct)
            assert (real.used_bytes, real.values) == (14 * PAGE, 4)
        assert tier.leftovers() == 0

    # Where the store is behind a wire

    def test_close_ends_verbs_under_way(self, place: Place) -> None:
        if place.proxy is None:
            pytest.skip("not behind a wire")
        tier = place.open(timeout="30s")
        tier.put(keys_of(1), buffers_of([PAGE], 13))
        place.proxy.hang()
        ended: list[object] = []

        def wait() -> None:
            try:
                ended.append(tier.get(keys_of(1), buffers_of([PAGE])))
            except TierUnavailable as error:
                ended.append(error)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        time.sleep(0.2)
        assert not ended
        tier.close()
        thread.join(5)
        assert [type(end) for end in ended] == [TierUnavailable]

    def test_a_store_that_hangs_is_given_up_in_time(self, place: Place) -> None:
        if place.proxy is None:
            pytest.skip("not behind a wire")
        with closing(place.open(**self.timeout_options)) as tier:
            keys, sent = keys_of(3), buffers_of([64 * PAGE] * 3, 11)
            tier.put(keys, sent)
            place.proxy.hang()
            for verb in (
                lambda: tier.contains(keys),
                lambda: tier.get(keys, buffers_of([64 * PAGE] * 3)),
                lambda: tier.put(keys, sent),
            ):
                began = time.monotonic()
                with pytest.raises(TierUnavailable):
                    verb()
                assert time.monotonic() - began < 10 * _DEADLINE
            place.proxy.cut()
            place.proxy.restore()
            back = buffers_of([64 * PAGE] * 3)
            assert _patiently(lambda: tier.get(keys, back)) == [Got.HIT] * 3
            assert back == sent

    def test_a_cut_connection_is_an_error_and_then_forgotten(self, place: Place) -> None:
        if place.proxy is None:
            pytest.skip("not behind a wire")
        with closing(place.open(**self.timeout_options)) as tier:
            keys, sent = keys_of(4), buffers_of([256 * PAGE] * 4, 12)
            tier.put(keys, sent)
            back = buffers_of([256 * PAGE] * 4)
            place.proxy.cut_after(300 * PAGE)
            with pytest.raises(TierUnavailable):
                tier.get(keys, back)
            place.proxy.restore()
            assert _patiently(lambda: tier.get(keys, back)) == [Got.HIT] * 4
            assert back == sent
            place.proxy.cut(refuse=True)
            with pytest.raises(TierUnavailable):
                tier.put(keys, sent)
            place.proxy.restore()
            assert _patiently(lambda: tier.put(keys, sent)) == [Put.STORED] * 4


def _patiently(verb):  # type: ignore[no-untyped-def]
    """Stale connections may each fail once before a new one is made."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return verb()
        except TierUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


__all__ = ["TierConformance"]
