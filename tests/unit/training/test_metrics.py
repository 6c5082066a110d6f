"""The numbers of a step, against ones worked out by hand."""

import math

import pytest

from gqa_parallel.training import metrics
from gqa_parallel.training.metrics import Throughput, loss_metrics, peak_bf16_flops, peak_memory_gib


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def rate_of(clock, **changes):
    arguments = {"tokens_per_step": 700, "flops_per_step": 6e12, "num_devices": 3} | changes
    return Throughput(**arguments, clock=clock)


def test_a_uniform_byte_costs_eight_bits():
    assert loss_metrics("val", math.log(256), byte_level=True) == {
        "val/loss": math.log(256),
        "val/bits_per_byte": pytest.approx(8.0),
    }


def test_a_uniform_token_has_the_vocabularys_size_as_perplexity():
    assert loss_metrics("train", math.log(50257), byte_level=False) == {
        "train/loss": math.log(50257),
        "train/perplexity": pytest.approx(50257),
    }


def test_perplexity_of_a_diverged_loss_is_infinite():
    assert metrics.perplexity(1e6) == math.inf


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_known_devices_have_their_data_sheets_peak(name, tflops):
    assert peak_bf16_flops(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA L40", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla T4"])
def test_unknown_devices_and_slices_have_none(name):
    assert peak_bf16_flops(name) is None


def test_rates_of_one_step(clock):
    rate = rate_of(clock, peak_flops=10e12)
    clock.now += 2.0
    assert rate.update() == {
        "perf/step_s": 2.0,
        "perf/tokens_per_s": 350.0,
        "perf/tflops": 1.0,  # 6e12 / 2 s / 3 devices
        "perf/mfu": pytest.approx(0.1),
    }


def test_without_a_peak_there_is_no_mfu(clock):
    rate = rate_of(clock)
    clock.now += 2.0
    assert "perf/mfu" not in rate.update()


def test_an_update_may_stand_for_several_steps(clock):
    rate = rate_of(clock)
    clock.now += 10.0
    assert rate.update(steps=5)["perf/step_s"] == 2.0
    assert rate.mean_tokens_per_s == 350.0


def test_warm_up_weighs_nothing_and_later_steps_are_smoothed(clock):
    rate = rate_of(clock)
    for seconds in (60.0, 1.0):
        clock.now += seconds
        rate.update()
    assert rate.eta_s(1) == 1.0
    clock.now += 2.0
    assert rate.update()["perf/step_s"] == 2.0
    assert rate.eta_s(10) == pytest.approx(11.0)  # 0.9 * 1 s + 0.1 * 2 s


def test_paused_time_counts_for_nothing(clock):
    rate = rate_of(clock)
    clock.now += 1.0
    with rate.paused():
        clock.now += 500.0
    clock.now += 1.0
    assert rate.update()["perf/step_s"] == 2.0
    assert rate.mean_tokens_per_s == 350.0


def test_before_the_first_update_nothing_is_known(clock):
    rate = rate_of(clock)
    assert math.isnan(rate.eta_s(10))
    assert math.isnan(rate.mean_tokens_per_s)


def test_this_process_uses_some_memory():
    assert 0.01 < peak_memory_gib() < 64
