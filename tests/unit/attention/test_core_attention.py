import contextlib

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gqa_parallel.attention.core_attention import CoreAttention

S, B, H = 11, 2, 6


def written_out(q, k, v, scale):
    """Loops over heads; query head i reads KV head i // (N / G)."""
    heads, kv_heads = q.shape[2], k.shape[2]
    out = []
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        for_each = []
        for batch in range(B):
            scores = scale * q[:, batch, head] @ k[:, batch, kv_head].T
            scores += torch.full((S, S), -torch.inf, dtype=q.dtype).triu(1)
            for_each.append(scores.softmax(-1) @ v[:, batch, kv_head])
        out.append(torch.stack(for_each, dim=1))
    return torch.cat(out, dim=-1)


def inputs(heads, kv_heads, dtype=torch.float64):
    torch.manual_seed(heads)
    return [torch.randn(S, B, n, H, dtype=dtype, requires_grad=True) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("scale", [None, 0.37])
@pytest.mark.parametrize(("heads", "kv_heads"), [(5, 5), (6, 3), (6, 2), (7, 1), (1, 1)])
def test_equals_the_formula(heads, kv_heads, scale):
    q, k, v = inputs(heads, kv_heads)
    grad = torch.randn(S, B, heads * H, dtype=torch.float64)
    gradients = []
    outputs = [CoreAttention(softmax_scale=scale)(q, k, v), written_out(q, k, v, scale or H**-0.5)]
    for out in outputs:
        gradients.append(torch.autograd.grad(out, (q, k, v), grad))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_grouped_heads_take_the_fused_kernel():
    """With the fused kernel alone allowed, anything else raises."""
    q, k, v = inputs(6, 2, torch.float32)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        CoreAttention()(q, k, v).sum().backward()


def test_dropout_draws_in_its_own_stream_and_only_while_training():
    entered = []

    @contextlib.contextmanager
    def stream():
        entered.append(True)
        yield

    q, k, v = inputs(4, 2)
    attention = CoreAttention(dropout=0.5, dropout_rng=stream)
    attention.eval()(q, k, v)
    assert not entered
    dropped = attention.train()(q, k, v)
    assert entered
    assert not torch.equal(dropped, attention(q, k, v))


@pytest.mark.parametrize("variant", [{}, {"window": 3}, {"softcap": 2.0}])
def test_the_backward_pass_drops_what_the_forward_pass_dropped(variant):
    """The output is linear in the values: out . 1 = v . d(out . 1)/dv holds for one set of weights only."""
    q, k, v = inputs(4, 2)
    total = CoreAttention(dropout=0.4, **variant)(q, k, v).sum()
    (grad,) = torch.autograd.grad(total, v)
    torch.testing.assert_close((grad * v).sum(), total, rtol=1e-12, atol=0)
