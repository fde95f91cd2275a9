"""The compiled copy engine equals the torch reference, byte for byte, over random geometries."""

import mmap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.errors import LayoutError
from kvkeep.transfer import make_transfer
from kvkeep.transfer.cpu import CpuTransfer
from kvkeep.transfer.reference import ReferenceTransfer

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
FORMS = ("fused", "apart", "token first", "block outermost", "sliced")


def paged(form: str, blocks: int, heads: int, tokens: int, dim: int, layers: int, dtype: torch.dtype):
    """Layers as engines register them: one tensor each, or views of one storage."""
    if form == "block outermost":
        whole = random(dtype, blocks, layers, heads, tokens, 2 * dim)
        return [whole[:, layer] for layer in range(layers)]
    if form == "sliced":  # the inner dimension is a part of a wider one: pieces are not contiguous
        return [random(dtype, blocks, heads, tokens, 4 * dim)[..., dim : 3 * dim] for _ in range(layers)]
    shape = {
        "fused": (blocks, heads, tokens, 2 * dim),
        "apart": (2, blocks, heads, tokens, dim),
        "token first": (blocks, 2, tokens, heads, dim),
    }[form]
    return [random(dtype, *shape) for _ in range(layers)]


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = dtype.itemsize
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
    return raw.view(dtype)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    blocks=st.integers(3, 12),
    heads=st.integers(1, 4),
    tokens=st.sampled_from([1, 16, 32]),
    dim=st.sampled_from([8, 24, 64]),
    layers=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_equal_to_the_reference(form, blocks, heads, tokens, dim, layers, dtype, threads, seed) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tensors = [("layer", tensor) for tensor in paged(form, blocks, heads, tokens, dim, layers, dtype)]
    arenas = [mmap.mmap(-1, 8 << 20) for _ in range(2)]
    fast = CpuTransfer([tensors], blocks, arenas[0], threads)
    slow = ReferenceTransfer([tensors], blocks, arenas[1])
    size = fast.layouts[0].block_bytes
    assert size == layers * 2 * heads * tokens * dim * dtype.itemsize
    chosen = rng.permutation(blocks)[: rng.integers(1, blocks + 1)].astype(np.int64)
    offsets = (rng.permutation((8 << 20) // size)[: len(chosen)] * size).astype(np.int64)
    assert fast.save(0, offsets, chosen) == slow.save(0, offsets, chosen) == size * len(chosen)
    assert arenas[0][:] == arenas[1][:]
    raw = [tensor.contiguous().view(torch.uint8).clone() for _, tensor in tensors]
    for _, tensor in tensors:
        tensor.copy_(torch.zeros(tensor.shape, dtype=torch.uint8).to(torch.float32).to(dtype))
    fast.load(0, offsets, chosen)
    for before, (_, tensor) in zip(raw, tensors, strict=True):
        axis = 1 if form == "apart" else 0
        after = tensor.contiguous().view(torch.uint8)
        index = torch.from_numpy(chosen)
        assert torch.equal(before.index_select(axis, index), after.index_select(axis, index))
        others = torch.tensor(
            [block for block in range(blocks) if block not in set(chosen.tolist())], dtype=int
        )
        assert not after.index_select(axis, others).any(), "a block that was not loaded has changed"


def test_places_out_of_bounds_are_refused_before_a_byte_moves() -> None:
    tensor = random(torch.float32, 4, 1, 16, 16)
    transfer = make_transfer([[("layer", tensor)]], 4, mmap.mmap(-1, 1 << 20))
    size = transfer.layouts[0].block_bytes
    for offset, block in (((1 << 20) - size + 1, 0), (-1, 0), (0, 4), (0, -1)):
        with pytest.raises(LayoutError):
            transfer.load(0, np.array([offset]), np.array([block]))
    with pytest.raises(LayoutError):
        transfer.save(0, np.array([0, size]), np.array([0]))


def test_a_layout_that_is_not_clear_is_refused() -> None:
    for shape in ((5, 4, 16, 16), (2, 2, 16, 16), (7,)):
        with pytest.raises(LayoutError):
            make_transfer([[("layer", random(torch.float32, *shape))]], 2, mmap.mmap(-1, 1 << 20))
