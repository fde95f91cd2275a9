"""The arena's memory: mapped where huge pages fit, allocated ahead, entered in the background."""

import gc
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep import pages


def mapped_bytes(arena: memoryview) -> int:
    """How much of a mapping is in this process's page table."""
    address = pages.address(arena)
    entry = Path("/proc/self/smaps").read_text().split(f"\n{address:x}-", 1)[1]
    return int(re.findall(r"\nRss: +(\d+) kB", entry)[0]) << 10


@pytest.fixture
def arena() -> Iterator[tuple[memoryview, int]]:
    """40 MiB of shared memory that is not allocated yet, and its descriptor."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, 40 << 20)
    yield pages.map_shared(fd, 40 << 20), fd
    os.close(fd)


def test_the_mapping_is_prepared_as_it_is_allocated(arena: tuple[memoryview, int]) -> None:
    memory, fd = arena
    memory[5] = 7
    thread = pages.prepare(memory, fd)
    for start in range(0, 40 << 20, 10 << 20):
        assert mapped_bytes(memory) < 1 << 20
        time.sleep(2 * pages._LOOK_EVERY)
        os.posix_fallocate(fd, start, 10 << 20)
    thread.join(30)
    assert mapped_bytes(memory) == 40 << 20
    assert memory[5] == 7
    assert not any(memory[6:4096])


def test_the_mapping_is_prepared_while_the_engine_rests(arena: tuple[memoryview, int]) -> None:
    memory, fd = arena
    os.posix_fallocate(fd, 0, 40 << 20)
    busy, closed = threading.Event(), threading.Event()
    busy.set()
    thread = pages.prepare(memory, fd, busy.is_set, closed)
    thread.join(0.5)
    assert thread.is_alive()
    assert mapped_bytes(memory) <= pages._PREPARE_STEP
    busy.clear()
    thread.join(30)
    assert mapped_bytes(memory) == 40 << 20


def test_a_mapping_that_is_left_is_not_prepared_to_its_end(arena: tuple[memoryview, int]) -> None:
    memory, fd = arena
    os.posix_fallocate(fd, 0, 40 << 20)
    closed = threading.Event()
    thread = pages.prepare(memory, fd, lambda: True, closed)
    closed.set()
    thread.join(30)
    assert not thread.is_alive()
    assert mapped_bytes(memory) <= pages._PREPARE_STEP


def test_what_the_keeper_does_not_allocate_ahead_no_client_allocates(
    keeper_process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_PATIENCE", 0.5)
    for option, expected in (("no", 0), ("yes", 16 << 20)):
        connection = keeper_process("--prefault", option).connect(arena=True)
        memory = connection.map_arena()
        pages.prepare(memory, connection.arena_fd).join(30)
        assert os.fstat(connection.arena_fd).st_blocks * 512 == expected
        assert mapped_bytes(memory) == expected


def huge_bytes(memory: memoryview) -> int:
    """How much of a mapping is huge pages in this process's page table."""
    entry = Path("/proc/self/smaps").read_text().split(f"\n{pages.address(memory):x}-", 1)[1]
    return int(re.findall(r"\nShmemPmdMapped: +(\d+) kB", entry)[0]) << 10


@pytest.mark.skipif(not pages.huge_size(), reason="a kernel without huge pages")
def test_what_is_allocated_ahead_is_huge_pages(arena: tuple[memoryview, int]) -> None:
    memory, fd = arena
    memory[5] = 7
    size = pages.huge_size()
    assert pages.address(memory) % size == 0
    made = pages.allocate(fd, pages.address(memory), size // 2, 4 * size)
    if not made:
        pytest.skip("a kernel that makes none (before Linux 6.1), or without room for one")
    assert made == 3 * size, "whole ones only"
    assert pages.allocate(fd, pages.address(memory), 0, len(memory)) == len(memory)
    assert memory[5] == 7
    assert not any(memory[6:])
    other = pages.map_shared(fd, len(memory))
    assert pages.populate(pages.address(other), len(other))
    assert huge_bytes(other) == len(other)
    assert other[5] == 7


def test_what_it_holds_survives_its_becoming_huge_pages(arena: tuple[memoryview, int]) -> None:
    memory, fd = arena
    content = os.urandom(len(memory))
    memory[:] = content
    ended = threading.Event()

    def write() -> None:  # another process would do so by its own mapping
        other = pages.map_shared(fd, len(memory))
        while not ended.is_set():
            for at in range(0, len(memory), 4096):
                other[at] = content[at]

    writer = threading.Thread(target=write)
    writer.start()
    for at in range(0, len(memory), 4 << 20):
        pages.allocate(fd, pages.address(memory), at, 4 << 20)
    ended.set()
    writer.join()
    assert memory == content


def test_it_is_unmapped_with_its_last_view() -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 5 << 20)
    memory = pages.map_shared(fd, 5 << 20)
    where, view = f"\n{pages.address(memory):x}-", memory[4096:8192]
    os.close(fd)
    del memory
    gc.collect()
    assert where in Path("/proc/self/maps").read_text()
    view[:] = bytes(4096)
    del view
    gc.collect()
    assert where not in Path("/proc/self/maps").read_text()


def test_a_mapping_that_cannot_be_leaves_nothing_behind() -> None:
    before = Path("/proc/self/maps").read_text().count("\n")
    for _ in range(20):
        with pytest.raises(OSError, match="Bad file descriptor"):
            pages.map_shared(10_000, 5 << 20)
    assert Path("/proc/self/maps").read_text().count("\n") <= before + 5
