"""A block's pieces are its bytes: all of them, once, in one order, whatever the tensor looks like."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvkeep.errors import LayoutError
from kvkeep.layout import CHUNK_BYTES, LayerTensor, chunk_blocks, group_layout

SIZES = st.integers(1, 4)


def layer(view: np.ndarray, storage: np.ndarray, name: str = "layer") -> LayerTensor:
    """What an engine says of a view; addresses count from the storage's first byte."""
    strides = tuple(stride // view.itemsize for stride in view.strides)
    address = view.__array_interface__["data"][0] - storage.__array_interface__["data"][0]
    return LayerTensor(name, address, view.shape, strides, view.itemsize)


def check(views: list[np.ndarray], storage: np.ndarray, block_dim: int, num_blocks: int) -> None:
    """Copying a block by its pieces takes exactly the block's elements of each view."""
    layout = group_layout([layer(view, storage, f"layer {n}") for n, view in enumerate(views)], num_blocks)
    raw = storage.reshape(-1).view(np.uint8)
    seen: set[int] = set()
    for block in range(num_blocks):
        own: list[int] = []
        for address, stride, nbytes in layout.pieces:
            start = address + block * stride
            own += range(start, start + nbytes)
        assert len(own) == len(set(own)) == layout.block_bytes
        assert not seen & set(own), "a byte belongs to two blocks"
        seen |= set(own)
        got = np.sort(raw[own].view(storage.dtype))
        expected = np.concatenate([np.take(view, block, axis=block_dim).reshape(-1) for view in views])
        assert np.array_equal(got, np.sort(expected))
    address, stride, nbytes, offset = layout.table()
    assert len(address) == len(stride) == len(layout.pieces)
    assert offset.tolist() == [0, *np.cumsum(nbytes)[:-1].tolist()]
    assert int(nbytes.sum()) == layout.block_bytes


def numbered(*shape: int) -> np.ndarray:
    return np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)


@given(blocks=st.integers(3, 6), shape=st.lists(SIZES, min_size=1, max_size=4), data=st.data())
def test_fused_in_any_order_of_the_inner_dimensions(
    blocks: int, shape: list[int], data: st.DataObject
) -> None:
    """[blocks, …] as the engine shows it, stored in any order of dimensions (NHD, HND, …)."""
    order = data.draw(st.permutations(range(1, len(shape) + 1)))
    storage = numbered(blocks, *(shape[dim - 1] for dim in order))
    view = storage.transpose(0, *(order.index(dim) + 1 for dim in range(1, len(shape) + 1)))
    assert view.shape == (blocks, *shape)
    check([view], storage, 0, blocks)


@given(blocks=st.integers(3, 6), tokens=SIZES, heads=SIZES, size=SIZES, outer=st.booleans())
def test_keys_and_values_apart(blocks: int, tokens: int, heads: int, size: int, outer: bool) -> None:
    """[2, blocks, …], with K and V in two halves or block by block."""
    if outer:
        storage = numbered(2, blocks, tokens, heads, size)
        view = storage
    else:
        storage = numbered(blocks, 2, tokens, heads, size)
        view = storage.transpose(1, 0, 2, 3, 4)
    check([view], storage, 1, blocks)


@given(blocks=st.integers(3, 6), layers=st.integers(1, 4), tokens=SIZES, size=SIZES)
def test_layers_interleaved_in_one_storage(blocks: int, layers: int, tokens: int, size: int) -> None:
    """Blocks outermost, and in each block the layers one after the other."""
    storage = numbered(blocks, layers, 2, tokens, size)
    check([storage[:, index] for index in range(layers)], storage, 0, blocks)


@given(blocks=st.integers(3, 6), tokens=SIZES, size=SIZES, padding=st.integers(0, 3))
def test_padded_rows(blocks: int, tokens: int, size: int, padding: int) -> None:
    storage = numbered(blocks, tokens, size + padding)
    check([storage[:, :, :size]], storage, 0, blocks)


def test_contiguous_blocks_are_one_piece() -> None:
    storage = numbered(8, 2, 16, 4)
    [piece] = group_layout([layer(storage, storage)], 8).pieces
    assert piece == (0, 512, 512)
    apart = numbered(2, 8, 16, 4)
    assert group_layout([layer(apart, apart)], 8).pieces == ((0, 256, 256), (2048, 256, 256))


def test_layers_that_share_a_tensor_are_moved_once() -> None:
    storage = numbered(8, 16)
    one = layer(storage, storage, "one")
    shared = LayerTensor(
        "shared", *(getattr(one, field) for field in ("address", "shape", "strides", "itemsize"))
    )
    assert group_layout([one, shared], 8) == group_layout([one], 8)
    own = LayerTensor("own", 4096, one.shape, one.strides, one.itemsize)
    assert group_layout([one, shared, own], 8).block_bytes == 2 * group_layout([one], 8).block_bytes


def test_one_block_or_two() -> None:
    single = numbered(1, 3, 4)
    check([single], single, 0, 1)
    pair = numbered(2, 3, 4)
    check([pair], pair, 0, 2)


@pytest.mark.parametrize(
    "shape",
    [(), (8,), (7, 16), (16, 8), (3, 8, 16), (4, 4, 8)],
    ids=str,
)
def test_a_shape_without_a_clear_block_dimension_is_refused(shape: tuple[int, ...]) -> None:
    strides = tuple(int(np.prod(shape[dim + 1 :])) for dim in range(len(shape)))
    with pytest.raises(LayoutError, match="no clear block dimension of 8"):
        group_layout([LayerTensor("odd", 0, shape, strides, 2)], 8)


def test_two_by_two_could_be_either() -> None:
    with pytest.raises(LayoutError, match="no clear"):
        group_layout([LayerTensor("odd", 0, (2, 2, 16), (32, 16, 1), 2)], 2)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((8, 4), (2, 1)),  # blocks overlap
        ((8, 4), (0, 1)),  # all blocks are one
        ((8, 2, 2), (4, 4, 1)),  # the second run of a block is the first of the next
        ((8, 4, 4), (16, 0, 1)),  # a broadcast dimension
        ((8, 4), (-4, 1)),
        ((8, 4), (4, -1)),
    ],
    ids=str,
)
def test_overlapping_elements_are_refused(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match="overlap"):
        group_layout([LayerTensor("odd", 1 << 20, shape, strides, 2)], 8)


@given(
    shape=st.lists(SIZES, min_size=1, max_size=3),
    strides=st.lists(st.integers(0, 30), min_size=4, max_size=4),
)
def test_what_is_accepted_overlaps_nowhere(shape: list[int], strides: list[int]) -> None:
    tensor = LayerTensor("any", 0, (3, *shape), tuple(strides[: len(shape) + 1]), 1)
    try:
        layout = group_layout([tensor], 3)
    except LayoutError:
        assume(False)
        return
    places = [
        address + block * stride + byte
        for block in range(3)
        for address, stride, nbytes in layout.pieces
        for byte in range(nbytes)
    ]
    elements = [
        sum(index * stride for index, stride in zip(at, tensor.strides, strict=True))
        for at in itertools.product(*map(range, tensor.shape))
    ]
    assert len(set(places)) == len(places)
    assert sorted(places) == sorted(elements)


def test_a_group_without_layers_is_refused() -> None:
    with pytest.raises(LayoutError, match="without layers"):
        group_layout([], 8)


@given(block_bytes=st.integers(1, 1 << 24))
def test_chunks_are_the_fewest_blocks_that_reach_about_a_mib(block_bytes: int) -> None:
    blocks = chunk_blocks(block_bytes)
    enough = CHUNK_BYTES * 3 // 4
    assert blocks * block_bytes >= enough
    assert blocks == 1 or (blocks - 1) * block_bytes < enough
