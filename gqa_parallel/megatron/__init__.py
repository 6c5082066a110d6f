from gqa_parallel.megatron.cpu import run_megatron_without_cuda

run_megatron_without_cuda()
