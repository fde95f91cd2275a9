"""The s3 tier on a real server (SeaweedFS), behind a proxy that cuts and hangs."""

from __future__ import annotations

import json
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

pytest.importorskip("obstore", reason="needs obstore: pip install 'kvkeep[s3]'")

from kvkeep.cli import main
from kvkeep.errors import ConfigError, TierUnavailable
from kvkeep.tiers.base import Got, Key, Put, Tier, key_name
from kvkeep.tiers.open import Opened, open_tier
from kvkeep.tiers.s3 import S3Options, S3Tier, open_s3, store_arguments
from kvkeep.tiers.url import TierURL
from tests.tiers import weed
from tests.tiers.conformance import TierConformance
from tests.tiers.place import (
    PAGE,
    Place,
    Proxy,
    buffers_of,
    closing,
    free_port,
    keys_of,
    query,
    wait_until,
)

PART = 5 << 20
BIG = 3 * PART + PAGE + 77


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[weed.Weed]:
    with weed.running(tmp_path_factory.mktemp("weed")) as running:
        yield running


class S3Place(Place):
    capacity_option = None  # the bucket's owner sets lifecycle rules

    def __init__(self, server: weed.Weed, prefix: str) -> None:
        self._server, self._prefix = server, prefix
        self.proxy = Proxy(("127.0.0.1", server.port))

    def address(
        self, user: str = f"{weed.KEY}:{weed.SECRET}@", bucket: str = weed.BUCKET, **options: str
    ) -> str:
        assert self.proxy is not None
        options = {"endpoint": f"http://127.0.0.1:{self.proxy.port}", "region": "us-east-1", **options}
        return f"s3://{user}{bucket}/{self._prefix}{query(options)}"

    def read(self, key: Key) -> bytes | None:
        return self._server.request("GET", f"{self._prefix}/{key_name(key)}")

    def write(self, key: Key, value: bytes) -> None:
        self._server.request("PUT", f"{self._prefix}/{key_name(key)}", value)

    def used_bytes(self) -> int:
        raise NotImplementedError("no bound, so nobody asks")


@pytest.fixture
def place(server: weed.Weed, request: pytest.FixtureRequest) -> Iterator[S3Place]:
    found = S3Place(server, f"test/{abs(hash(request.node.name)):x}")
    yield found
    found.proxy.close()


class TestS3(TierConformance):
    pass


def test_large_values_go_and_come_in_parts(place: S3Place) -> None:
    with closing(place.open(part=str(PART), concurrency="4")) as tier:
        keys, sent = keys_of(2), buffers_of([BIG, PART], 1)
        assert tier.put(keys, sent) == [Put.STORED] * 2
        assert place.read(keys[0]) == bytes(sent[0])
        whole = buffers_of([BIG + 2 * PAGE, PART])
        back = [whole[0][PAGE : PAGE + BIG], whole[1]]
        assert tier.get(keys, back) == [Got.HIT] * 2
        assert back == sent
        assert not any(whole[0][:PAGE])
        assert not any(whole[0][PAGE + BIG :])
        for size in (BIG - 1, BIG + 1, PART, 4 * PART):
            (longer,) = buffers_of([size + PAGE])
            assert tier.get(keys[:1], [longer[:size]]) == [Got.DAMAGED]
            assert not any(longer)


def test_signed_bodies_and_single_deletes(place: S3Place) -> None:
    with closing(place.open(sign_payload="yes", bulk_delete="no")) as tier:
        keys, sent, back = keys_of(3), buffers_of([PAGE] * 3, 6), buffers_of([PAGE] * 3)
        assert tier.put(keys, sent) == [Put.STORED] * 3
        assert tier.get(keys, back) == [Got.HIT] * 3
        assert back == sent
        tier.delete(keys[1:])
        tier.delete(keys[1:])
        assert tier.contains(keys) == [True, False, False]


def test_parts_of_two_versions_are_a_miss(place: S3Place) -> None:
    class Racing(S3Tier):
        def _read(self, key, buffer, piece, gate):
            found = super()._read(key, buffer, piece, gate)
            if piece.start == 0:
                self._write(key, other)
            return found

    (key,), (value, other), (back,) = keys_of(1), buffers_of([BIG] * 2, 2), buffers_of([BIG])
    with closing(place.open(part=str(PART))) as tier:
        tier.put([key], [value])
        racing = Racing(tier._store, tier._options)
        assert racing.get([key], [back]) == [Got.MISS]
        racing.close()
        assert tier.get([key], [back]) == [Got.HIT]
        assert back == other


def test_a_store_that_hangs_within_a_value_is_given_up_in_time(place: S3Place) -> None:
    class Halfway(S3Tier):
        def _read(self, key, buffer, piece, gate):
            self.begun = True
            return super()._read(key, buffer, piece, gate)

        def _asked(self, request):
            if getattr(request, "__name__", "") == "bytes":  # the answer's head is here, its body is not
                place.proxy.hang()
            return super()._asked(request)

    (key,), (value,) = keys_of(1), buffers_of([32 << 20], 3)
    with closing(place.open()) as patient, closing(place.open(timeout="500ms", part="64MiB")) as tier:
        patient.put([key], [value])
        halfway = Halfway(tier._store, tier._options)
        began = time.monotonic()
        with pytest.raises(TierUnavailable, match="s3: "):
            halfway.get([key], buffers_of([32 << 20]))
        assert halfway.begun
        assert time.monotonic() - began < 5
        halfway.close()


def test_a_cut_within_a_large_value_is_an_error_and_leaves_the_old_one(place: S3Place) -> None:
    with closing(place.open(part=str(PART))) as tier:
        (key,), (old, new), (back,) = keys_of(1), buffers_of([BIG] * 2, 4), buffers_of([BIG])
        tier.put([key], [old])
        place.proxy.cut_after(PART + PART // 2)
        with pytest.raises(TierUnavailable):
            tier.get([key], [back])
        cutter = threading.Timer(0.05, place.proxy.cut, kwargs={"refuse": True})
        cutter.start()
        with pytest.raises(TierUnavailable):
            _put_until_it_fails(tier, key, new)
        cutter.join()
        place.proxy.restore()
        assert tier.get([key], [back]) == [Got.HIT]
        assert back in (old, new)


def _put_until_it_fails(tier: Tier, key: Key, value: memoryview) -> None:
    while True:
        tier.put([key], [value])


def test_a_put_that_was_given_up_has_let_go_of_the_buffer(place: S3Place) -> None:
    with closing(place.open(timeout="300ms")) as tier:
        memory = mmap.mmap(-1, 8 << 20)
        place.proxy.hang()
        with memoryview(memory) as buffer, pytest.raises(TierUnavailable):
            tier.put(keys_of(1), [buffer])
        memory.close()  # raises BufferError while anybody holds a view


def test_close_ends_a_put_under_way_and_it_lets_go_of_the_buffer(place: S3Place) -> None:
    tier, ended = place.open(timeout="2s"), list[object]()
    memory = mmap.mmap(-1, 8 << 20)
    place.proxy.hang()

    def write() -> None:
        with memoryview(memory) as buffer:
            try:
                ended.append(tier.put(keys_of(1), [buffer]))
            except TierUnavailable as error:
                ended.append(str(error))

    thread = threading.Thread(target=write)
    thread.start()
    time.sleep(0.3)
    tier.close()
    thread.join(10)
    assert ended == ["s3: the tier is closed"]
    memory.close()


def test_a_server_that_was_killed_and_is_back_serves_what_it_had(place: S3Place, server: weed.Weed) -> None:
    keys, sent, back = keys_of(4), buffers_of([PAGE] * 3 + [BIG], 6), buffers_of([PAGE] * 3 + [BIG])
    with closing(place.open()) as tier:
        assert tier.put(keys[:3], sent[:3]) == [Put.STORED] * 3
        server.kill()
        try:
            for verb in (tier.get, tier.put):
                with pytest.raises(TierUnavailable):
                    verb(keys[:3], back[:3])
        finally:
            server.start()
        assert tier.put(keys[3:], sent[3:]) == [Put.STORED]
        assert tier.get(keys, back) == [Got.HIT] * 4
        assert back == sent


def test_reads_do_not_wait_for_writes(place: S3Place) -> None:
    (key,), (value,), (back,), leave = (
        keys_of(1),
        buffers_of([PAGE], 8),
        buffers_of([PAGE]),
        threading.Event(),
    )
    with closing(place.open(concurrency="1")) as tier:
        assert tier.put([key], [value]) == [Put.STORED]
        writing = tier._writes.begin(lambda: leave.wait(10))
        try:
            assert tier.contains([key]) == [True]
            assert tier.get([key], [back]) == [Got.HIT]
            assert not writing.done()
        finally:
            leave.set()


def test_a_bucket_that_goes_while_open_is_misses_and_no_puts_until_it_is_back(
    place: S3Place, server: weed.Weed, caplog: pytest.LogCaptureFixture
) -> None:
    keys, sent, back = keys_of(3, 31), buffers_of([PAGE] * 3, 31), buffers_of([PAGE] * 3)
    server.request("POST", "", bucket="short-lived")
    opened = open_tier(place.address(bucket="short-lived"))
    with closing(opened.tier) as tier:
        assert tier.put(keys, sent) == [Put.STORED] * 3
        server.request("DELETE", "?recursive=true", bucket="short-lived")
        wait_until(lambda: not any(tier.contains(keys)), 20)
        assert tier.get(keys, back) == [Got.MISS] * 3
        switched_off(opened, lambda: tier.put(keys, sent), "NoSuchBucket", caplog)
        server.request("POST", "", bucket="short-lived")
        wait_until(lambda: stored(tier, keys, sent), 20)
        assert tier.get(keys, back) == [Got.HIT] * 3
        assert opened.guard.writable


def test_credentials_revoked_while_open_switch_it_off_until_they_are_back(
    place: S3Place, server: weed.Weed, caplog: pytest.LogCaptureFixture
) -> None:
    keys, sent, back = keys_of(3, 32), buffers_of([PAGE] * 3, 32), buffers_of([PAGE] * 3)
    opened = open_tier(place.address())
    with closing(opened.tier) as tier:
        assert tier.put(keys, sent) == [Put.STORED] * 3
        try:
            server.allow()
            caplog.clear()
            for verb in (tier.get, tier.get, tier.put, tier.get):
                with pytest.raises(TierUnavailable, match="AccessDenied"):
                    verb(keys, back)
            assert not opened.guard.available
            (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
            assert "is switched off until it answers again: s3: AccessDenied" in warning
        finally:
            server.allow("Admin", "Read", "Write", "List")
        wait_until(lambda: opened.guard.probe() or opened.guard.available, 20)
        assert tier.get(keys, back) == [Got.HIT] * 3
        assert tier.put(keys, sent) == [Put.STORED] * 3


def switched_off(
    opened: Opened, put: Callable[[], object], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Puts fail, are then not tried any more, and one warning says so; reads go on."""
    caplog.clear()
    for _ in range(5):
        with pytest.raises(TierUnavailable):
            put()
    assert opened.guard.available
    assert not opened.guard.writable
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "is only read until it takes values again" in warning
    assert why in warning


def stored(tier: Tier, keys: list[Key], sent: list[memoryview]) -> bool:
    with suppress(TierUnavailable):
        return tier.put(keys, sent) == [Put.STORED] * len(keys)
    return False


def test_fsck_of_a_bucket(place: S3Place, capsys: pytest.CaptureFixture[str]) -> None:
    keys, sent = keys_of(12, 33), buffers_of([PAGE] * 12, 33)
    with closing(open_tier(place.address()).tier) as tier:
        assert tier.put(keys, sent) == [Put.STORED] * 12
    for number, value in ((3, b"foreign"), (7, bytes(sent[6]))):
        place.write(keys[number], value)
    for options, code, figures in (
        ([], 1, (12, 2, 12)),
        (["--repair"], 0, (12, 2, 10)),
        ([], 0, (10, 0, 10)),
    ):
        assert main(["fsck", place.address(), "--json", *options]) == code
        report = json.loads(capsys.readouterr().out)
        assert (report["values"], report["damaged"], report["real_values"]) == figures


def test_what_is_not_ours_is_not_listed(place: S3Place) -> None:
    with closing(place.open()) as tier:
        (key,), (value,) = keys_of(1), buffers_of([PAGE], 7)
        tier.put([key], [value])
        for name in ("readme", f"x/{key_name(key)}", f"{key_name(key)}.bak", f"{key.hex()}"):
            place._server.request("PUT", f"{place._prefix}/{name}", b"not ours")
        assert list(tier.keys()) == [(key, PAGE)]


def test_credentials_of_a_reader_read(place: S3Place) -> None:
    (key,), (value,), (back,) = keys_of(1), buffers_of([PAGE], 5), buffers_of([PAGE])
    with closing(place.open()) as tier:
        tier.put([key], [value])
    with closing(place.open(user=f"{weed.READER}:{weed.READER_SECRET}@")) as reader:
        assert reader.get([key], [back]) == [Got.HIT]
        with pytest.raises(TierUnavailable, match="AccessDenied"):
            reader.put([key], [value])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"user": f"{weed.KEY}:wrong@"}, "refuses us: SignatureDoesNotMatch.*set AWS_ACCESS_KEY_ID"),
        ({"user": "nobody:x@"}, "refuses us: InvalidAccessKeyId"),
        ({"bucket": "no-such-bucket"}, "'no-such-bucket' does not exist: create it"),
        ({"endpoint": "http://127.0.0.1:1"}, "cannot connect.*are endpoint= and region= right"),
        ({"endpoint": "nonsense"}, "write endpoint=http://host:port"),
        ({"endpoint": "http://no-such-host.invalid"}, "cannot connect"),
        ({"user": "onlykey@"}, "give key and secret together"),
        ({"part": "1MiB"}, "part must be 5 MiB or more"),
        ({"timeout": "0s"}, "timeout must be more than 0"),
        ({"bucket": "host:9000"}, "write it as s3://bucket/prefix"),
    ],
)
def test_what_cannot_work_is_said_at_once(place: S3Place, wrong: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        place.open(**wrong)
    assert weed.SECRET not in str(raised.value)


def test_credentials_come_from_the_environment(place: S3Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="no credentials for bucket 'kv-cache': set AWS_ACCESS_KEY_ID"):
        place.open(user="")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", weed.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", weed.SECRET)
    place.open(user="").close()


def test_credentials_come_from_a_profile(place: S3Place, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    pytest.importorskip("boto3", reason="needs boto3")
    shared = tmp_path / "credentials"
    shared.write_text(f"[kv]\naws_access_key_id = {weed.KEY}\naws_secret_access_key = {weed.SECRET}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(shared))
    place.open(user="", profile="kv").close()
    with pytest.raises(ConfigError, match="profile 'nobody'"):
        place.open(user="", profile="nobody")


def test_buckets_in_the_host_name() -> None:
    options = S3Options("Bucket_1", "", 1.0, PART, 4)
    by_default = store_arguments(TierURL("s3://Bucket_1/"), options)
    assert by_default["virtual_hosted_style_request"] is True
    assert "endpoint" not in by_default
    named = store_arguments(TierURL("s3://Bucket_1/?endpoint=https://s3.host:1&path_style=no"), options)
    assert named["endpoint"] == "https://Bucket_1.s3.host:1"
    assert "virtual_hosted_style_request" not in store_arguments(
        TierURL("s3://Bucket_1/?endpoint=https://s3.host:1"), options
    )


def test_the_opened_tier_shows_no_secret(place: S3Place) -> None:
    url = TierURL(place.address())
    tier = open_s3(url)
    url.finish()
    assert weed.SECRET not in str(url)
    tier.close()
