import torch

from gqa_parallel.megatron.self_attention import document_starts
from gqa_parallel.training.packing import packed_documents

EOD = 9
TOKENS = torch.tensor([[1, 2, EOD, 3, 4], [EOD, 5, EOD, EOD, 6]])


def test_documents_end_with_their_eod_and_with_their_row():
    packed = packed_documents(TOKENS, EOD)
    assert packed.cu_seqlens_q.tolist() == [0, 3, 5, 6, 8, 9, 10]
    assert packed.cu_seqlens_kv is packed.cu_seqlens_q
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 3


def test_the_layer_reads_them():
    starts = document_starts(packed_documents(TOKENS, EOD), TOKENS.numel(), torch.device("cpu"))
    assert starts.tolist() == [0, 0, 0, 3, 3, 5, 6, 6, 8, 9]
