"""The blocked path and FlexAttention compute the same, and what must change nothing changes nothing."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from gqa_parallel.attention import blocked
from gqa_parallel.attention.blocked import blocked_attention
from gqa_parallel.attention.core_attention import CoreAttention
from gqa_parallel.attention.flexible import block_mask, flexible_attention

S, B, N, G, H = 23, 2, 6, 3, 4
CASES = list(itertools.product([None, 5], [None, 0.8], [False, True], [None, (7, 3, 13)]))


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, n, S, H, generator=generator, dtype=dtype) for n in (N, G, G)]


def first_keys(window, documents):
    attention = CoreAttention(window=window)
    starts = None
    if documents:
        lengths = torch.tensor(documents)
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    found = attention.first_keys(S, torch.device("cpu"), starts)
    return torch.zeros(S, dtype=torch.int64) if found is None else found


@pytest.mark.parametrize(("window", "softcap", "has_sinks", "documents"), CASES)
def test_blocked_equals_flexible(monkeypatch, window, softcap, has_sinks, documents):
    """Forward only: FlexAttention has no backward on the CPU. The blocked path's gradients meet the dense reference."""
    monkeypatch.setattr(blocked, "BLOCK", 5)  # several blocks, the last one shorter
    sinks = torch.randn(N, dtype=torch.float64) if has_sinks else None
    arguments = (*inputs(), first_keys(window, documents))
    results = [
        attend(*arguments, scale=0.4, softcap=softcap, sinks_N=sinks)
        for attend in (blocked_attention, flexible_attention)
    ]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("seq_len", [1, 128, 300, 1000])
@pytest.mark.parametrize("window", [None, 1, 129, 400])
@pytest.mark.parametrize("length", [None, 90, 256])
def test_blocks_are_those_that_the_mask_needs(seq_len, window, length):
    """As torch finds them by asking for all S x S pairs."""
    starts = torch.arange(seq_len) // length * length if length else None
    found = CoreAttention(window=window).first_keys(seq_len, torch.device("cpu"), starts)
    first_key_S = torch.zeros(seq_len, dtype=torch.int64) if found is None else found
    ours = block_mask(first_key_S)
    theirs = create_block_mask(ours.mask_mod, None, None, seq_len, seq_len, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())

    def blocks(number, index):
        return [set(row[:count].tolist()) for row, count in zip(index[0, 0], number[0, 0], strict=True)]

    whole_rows = seq_len // 128  # torch masks the row of blocks that reaches behind the sequence; no one reads that
    expected = blocks(theirs.full_kv_num_blocks, theirs.full_kv_indices)[:whole_rows]
    assert blocks(ours.full_kv_num_blocks, ours.full_kv_indices)[:whole_rows] == expected


def test_first_keys():
    assert CoreAttention().first_keys(5, torch.device("cpu"), None) is None
    assert CoreAttention(window=5).first_keys(5, torch.device("cpu"), None) is None
    assert CoreAttention(window=2).first_keys(4, torch.device("cpu"), None).tolist() == [0, 0, 1, 2]
    starts = torch.tensor([0, 0, 2, 2, 2])
    assert CoreAttention(window=2).first_keys(5, torch.device("cpu"), starts).tolist() == [0, 0, 2, 2, 3]


variants = st.fixed_dictionaries(
    {
        "window": st.sampled_from([None, 1, 4]),
        "softcap": st.sampled_from([None, 0.5]),
        "num_sinks": st.sampled_from([0, N]),
    }
)


def random_layer(seed, variant):
    torch.manual_seed(seed)
    attention = CoreAttention(**variant).double()
    if variant["num_sinks"]:
        torch.nn.init.normal_(attention.softmax_offset)
    return attention, *(torch.randn(S, B, n, H, dtype=torch.float64) for n in (N, G, G))


EXACT = {"rtol": 1e-12, "atol": 1e-13}  # the same sums, at most in another order


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), variants, st.permutations(range(G)))
def test_permuting_groups_permutes_the_output(seed, variant, order):
    attention, q, k, v = random_layer(seed, variant)
    heads = torch.arange(N).view(G, -1)[list(order)].flatten()
    out = attention(q, k, v).unflatten(-1, (N, H))
    if variant["num_sinks"]:
        attention.softmax_offset.data = attention.softmax_offset.data[heads]
    permuted = attention(q[:, :, heads], k[:, :, list(order)], v[:, :, list(order)]).unflatten(-1, (N, H))
    torch.testing.assert_close(permuted, out[:, :, heads], **EXACT)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), variants)
def test_rows_of_a_batch_do_not_meet(seed, variant):
    attention, *qkv = random_layer(seed, variant)
    rows = [attention(*(x[:, row : row + 1] for x in qkv)) for row in range(B)]
    torch.testing.assert_close(torch.cat(rows, dim=1), attention(*qkv), **EXACT)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), variants, st.integers(1, S))
def test_a_prefix_does_not_see_what_follows(seed, variant, length):
    attention, *qkv = random_layer(seed, variant)
    prefix = attention(*(x[:length] for x in qkv))
    torch.testing.assert_close(prefix, attention(*qkv)[:length], **EXACT)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), variants, st.integers(1, S - 1))
def test_a_document_does_not_see_the_others(seed, variant, cut):
    attention, *qkv = random_layer(seed, variant)
    starts = torch.tensor([0] * cut + [cut] * (S - cut))
    apart = [attention(*(x[part] for x in qkv)) for part in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(torch.cat(apart), attention(*qkv, starts), **EXACT)


@pytest.mark.parametrize(
    "variant", [{"window": 256}, {"softcap": 30.0}, {"num_sinks": 2}, {"dropout": 0.2}, {}], ids=str
)
def test_saved_memory_is_linear_in_the_sequence(variant):
    """What autograd keeps between forward and backward; S x S scores would make it four times as much."""

    def saved_bytes(seq_len: int) -> int:
        attention = CoreAttention(**variant)
        q, k, v = (torch.randn(seq_len, 1, n, 8, requires_grad=True) for n in (2, 1, 1))
        starts = None if variant else torch.arange(seq_len) // 128 * 128  # packed documents of 128 tokens
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            attention(q, k, v, starts)
        return sum(kept.values())

    assert saved_bytes(4096) < 2.5 * saved_bytes(2048)
