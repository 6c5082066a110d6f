"""Sequences that hold several documents, as packed rows: no attention from one document to another."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def packed_documents(tokens_BS: Tensor, eod: int) -> PackedSeqParams:
    """Where documents begin and end in a micro-batch that is read as one row of B * S tokens.

    Args:
        tokens_BS: token ids, best on the CPU: finding the boundaries waits for them.
        eod: the token that ends a document; it belongs to the document that it ends.
    Returns:
        Megatron's description of the row: a row of the micro-batch also begins a document.
    """
    begins_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    begins_BS[:, 0] = True
    begins_BS[:, 1:] = tokens_BS[:, :-1] == eod
    bounds = torch.cat((begins_BS.flatten().nonzero().flatten(), torch.tensor([tokens_BS.numel()])))
    bounds = bounds.to(torch.int32)
    longest = int(bounds.diff().max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
