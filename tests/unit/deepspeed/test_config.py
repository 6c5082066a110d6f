from gqa_parallel.deepspeed.config import deepspeed_config


def test_batch_sizes_and_precision():
    config = deepspeed_config(
        stage=2, precision="bf16", micro_batch_size=3, micro_batches_per_step=5, dp_size=7, clip_grad_norm=0.5
    )
    assert config["train_batch_size"] == 3 * 5 * 7
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 5
    assert config["zero_optimization"] == {"stage": 2}
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    assert "fp16" not in config


def test_fp32_enables_neither():
    config = deepspeed_config(
        stage=0, precision="fp32", micro_batch_size=1, micro_batches_per_step=1, dp_size=1, clip_grad_norm=0.0
    )
    assert not {"bf16", "fp16"} & config.keys()
