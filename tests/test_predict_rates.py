from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.measure.strategies import StrategyRow
from edgekit.measurement import Measurement
from edgekit.model import ModelShape
from edgekit.predict.against import prediction_errors
from edgekit.predict.fit import (
    EFFICIENCY_SPREAD,
    NOISE,
    OVERHEAD_SPREAD,
    Constants,
    Point,
    fit_constants,
    spread,
)
from edgekit.predict.latency import (
    ARM_BOARD,
    COPY_SHARE,
    GPU_BOARD,
    GPU_CARD,
    INTEGRATED,
    JETSON_CPU,
    NPU,
    PHONE,
    RANGE_Z,
    X86,
    device_class,
    engine_rates,
    multiplied_parameters,
    predict_answer,
    predict_latency,
    streamed_bytes,
    token_traffic,
)
from edgekit.stage import Tensor
from edgekit.target import Figure, Runtime, Target, find_target


def guess(value: float) -> Figure[float]:
    return Figure(value=value, estimate="for a test")


def board(efficiency: float = 0.5, overhead_s: float = 0.01, points: int = 4, **fields: object) -> Target:
    """10 GB/s and 1 TFLOP/s, of which prefill reaches a fifth."""
    base = find_target("generic-x86")
    compute = base.compute.model_copy(
        update={
            "decode_efficiency": guess(efficiency),
            "token_overhead_s": guess(overhead_s),
            "prefill_efficiency": guess(0.2),
            "dense_flops_per_s": guess(1e12),
            "points": points,
        }
    )
    memory = base.memory.model_copy(update={"bandwidth_bytes_per_s": guess(10e9)})
    return base.model_copy(update={"compute": compute, "memory": memory, **fields})


# two layers of 64 with two KV heads of 32: a row of f16 keys and values takes 4 * 2 * 32 * 2 = 512 bytes per cell
TENSORS = (
    Tensor("token_embd.weight", (64, 1000), "f16"),
    *(Tensor(f"blk.{i}.attn_q.weight", (64, 64), "f16") for i in range(2)),
    Tensor("output_norm.weight", (64,), "f32"),
)
SHAPE = ModelShape("llama", 2, 64, 128, 2, 2, 32, 32, 1000, 8192, TENSORS)
HEAD = Tensor("output.weight", (64, 1000), "q8_0")


def decode_of(target: Target, tensors: tuple[Tensor, ...] = TENSORS, context: int = 1024, **more: float) -> Measurement:
    return predict_latency(target, SHAPE, tensors, context, **more)[0]


# --- closed forms


def test_decode_by_hand() -> None:
    # 128000 + 2 * 8192 + 256 bytes of weights, 512 cells of 512 bytes, 5 GB/s, 10 ms
    traffic = 128_000 + 16_384 + 256 + 512 * 512
    assert token_traffic(SHAPE, TENSORS, 512) == traffic
    decode = decode_of(board())
    assert decode.value == pytest.approx(1 / (traffic / 5e9 + 0.01))
    # four runs: 1 / (1 / .25^2 + 4 / .14^2) is what the constants are uncertain by
    deviation = math.sqrt(0.14**2 + 1 / (1 / 0.25**2 + 4 / 0.14**2))
    assert decode.ci_high == pytest.approx(decode.value * math.exp(1.645 * deviation))
    assert decode.ci_low == pytest.approx(decode.value * math.exp(-1.645 * deviation))
    assert (decode.kind, decode.unit, decode.device) == ("predicted", "tokens/s", "generic-x86")


def test_prefill_by_hand() -> None:
    # neither the table nor the head is multiplied at every position: 2 * 64 * 64 weights, two operations each
    (_, prefill) = predict_latency(board(), SHAPE, (*TENSORS, HEAD), 1024)
    assert prefill.value == pytest.approx(0.2 * 1e12 / (2 * 2 * 64 * 64))


def test_a_table_that_is_only_looked_up_is_not_read() -> None:
    tied, untied = streamed_bytes(TENSORS), streamed_bytes((*TENSORS, HEAD))
    assert tied == 128_000 + 16_384 + 256
    # a head of 8.5 bits takes the place of a table of 16
    assert untied == 68_000 + 16_384 + 256


def test_of_a_mixture_only_the_experts_that_a_token_takes_are_read_and_multiplied() -> None:
    experts = Tensor("blk.0.ffn_up_exps.weight", (64, 128, 8), "f16")
    router = Tensor("blk.0.ffn_gate_inp.weight", (64, 8), "f32")
    tensors = (*TENSORS, experts, router)
    quarter = 64 * 128 * 8 * 2 // 4
    assert streamed_bytes(tensors, 0.25) == streamed_bytes(TENSORS) + quarter + 64 * 8 * 4
    assert streamed_bytes(tensors) == sum(tensor.nbytes for tensor in tensors)
    assert multiplied_parameters(tensors, 0.25) == 2 * 64 * 64 + 64 * 8 + 64 * 128 * 2
    decode = decode_of(board(), tensors, expert_share=0.25)
    traffic = streamed_bytes(TENSORS) + quarter + 2048 + 512 * 512
    assert decode.value == pytest.approx(1 / (traffic / 5e9 + 0.01))


def test_an_answer_takes_its_traffic_or_its_arithmetic_and_every_step_its_overhead() -> None:
    row = StrategyRow.model_construct(
        bytes_moved=1e9, steps=10, verifier_calls=5, verifier_tokens=0, tokens_forward=100, candidates=1
    )
    fast = [Measurement(name="prefill_tokens_per_s", value=1e6, unit="tokens/s", kind="predicted")]
    slow = [Measurement(name="prefill_tokens_per_s", value=10.0, unit="tokens/s", kind="predicted")]
    assert predict_answer(board(), fast, row).value == pytest.approx(1e9 / 5e9 + 0.1)
    assert predict_answer(board(), slow, row).value == pytest.approx(100 / 10 + 0.1)
    trunk = row.model_copy(update={"verifier_tokens": 20})
    assert predict_answer(board(), slow, trunk).value == pytest.approx(120 / 10 + 0.15)


# --- properties


@given(st.floats(0.05, 0.95), st.floats(0, 0.1), st.integers(256, 1 << 16), st.integers(0, 20))
def test_rates_rise_and_fall_as_they_must(efficiency: float, overhead_s: float, context: int, points: int) -> None:
    decode = decode_of(board(efficiency, overhead_s, points), context=context)
    assert 0 < decode.ci_low < decode.value < decode.ci_high
    assert decode_of(board(efficiency * 1.01, overhead_s, points), context=context).value > decode.value
    assert decode_of(board(efficiency, overhead_s + 1e-4, points), context=context).value < decode.value
    assert decode_of(board(efficiency, overhead_s, points), (*TENSORS, HEAD), context).value != decode.value
    # a cache of another 256 cells halfway through
    assert decode_of(board(efficiency, overhead_s, points), context=context + 1024).value < decode.value
    # no overhead: the whole share of the bandwidth, never more
    assert decode.value <= efficiency * 10e9 / token_traffic(SHAPE, TENSORS, context // 2) * (1 + 1e-9)


def test_every_run_narrows_the_range() -> None:
    widths = [spread(points) for points in range(30)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == pytest.approx(math.hypot(NOISE, EFFICIENCY_SPREAD))
    assert widths[-1] == pytest.approx(NOISE, rel=0.03)


# --- whose constants


def test_an_engine_without_runs_takes_the_constants_of_its_class() -> None:
    target = board()
    own, pooled = engine_rates(target, "llama_cpp"), engine_rates(target, "onnxruntime")
    assert own.decode == Constants(0.5, 0.01)
    assert "4 published runs" in own.note
    assert pooled.decode == X86.decode
    assert "no published run of onnxruntime" in pooled.note
    assert X86.title in pooled.note
    first, second = (decode_of(target, engine=engine) for engine in ("llama_cpp", "onnxruntime"))
    assert second.ci_high / second.value > first.ci_high / first.value
    assert second.note == pooled.note


def test_a_runtime_of_the_profile_has_its_own_constants_and_processor() -> None:
    npu = Runtime(
        decode_efficiency=guess(0.8), token_overhead_s=guess(0.002), prefill_efficiency=guess(0.1),
        peak_flops_per_s=guess(6e12), points=1,
    )  # fmt: skip
    target = board(runtimes={"rkllm/npu": npu})
    decode, prefill = predict_latency(target, SHAPE, TENSORS, 1024, engine="rkllm/npu")
    assert decode.value == pytest.approx(1 / (token_traffic(SHAPE, TENSORS, 512) / 8e9 + 0.002))
    assert prefill.value == pytest.approx(0.1 * 6e12 / (2 * 2 * 64 * 64))
    assert "1 published run of rkllm/npu" in (decode.note or "")


def test_without_runs_the_estimate_of_a_profile_has_the_range_of_a_class() -> None:
    decode = decode_of(board(points=0))
    assert decode.ci_high / decode.value == pytest.approx(math.exp(RANGE_Z * spread(0)))
    assert "estimated: no published run" in (decode.note or "")


def test_the_copy_bandwidth_stands_for_the_peak_on_a_cpu() -> None:
    pi = find_target("raspberry-pi-5")
    copied = pi.memory.copy_bytes_per_s
    assert copied is not None
    rates = engine_rates(pi, "onnxruntime")
    streamed = rates.decode.efficiency * rates.bandwidth_bytes_per_s
    assert streamed == pytest.approx(COPY_SHARE * copied.value)
    # the GPU of a Mac does not go through the CPU's copies
    assert engine_rates(find_target("mac-mini-m4"), "mlx").decode.efficiency > 0.8


@pytest.mark.parametrize(
    ("target", "engine", "expected"),
    [
        ("rtx-4090", "vllm", GPU_CARD),
        ("rtx-4090", "llama_cpp/cpu", X86),
        ("jetson", "vllm", GPU_BOARD),
        ("jetson", "llama_cpp/vulkan", GPU_BOARD),
        ("jetson", "llama_cpp/cpu", JETSON_CPU),
        ("intel-lunar-lake", "llama_cpp/vulkan", INTEGRATED),
        ("snapdragon-8-elite", "llama_cpp", PHONE),
        ("rk3588", "rkllm/npu", NPU),
        ("pi", "onnxruntime", ARM_BOARD),
        ("intel-n100", "onnxruntime", X86),
    ],
)
def test_every_device_has_a_class(target: str, engine: str, expected: object) -> None:
    assert device_class(find_target(target), engine) == expected


# --- the fit


PRIOR = Constants(0.6, 0.003)


def test_without_points_the_class_is_the_answer() -> None:
    assert fit_constants([], 50e9, PRIOR) == PRIOR


def test_the_fit_finds_the_constants_that_made_the_points() -> None:
    true = Constants(0.45, 0.006)
    points = [Point(traffic, true.tokens_per_s(traffic, 50e9)) for traffic in (1e8, 3e8, 1e9, 4e9)]
    found = fit_constants(points, 50e9, PRIOR)
    assert found.efficiency == pytest.approx(true.efficiency, rel=0.03)
    assert found.overhead_s == pytest.approx(true.overhead_s, rel=0.06)


def test_one_wrong_run_among_five_does_not_move_the_fit() -> None:
    true = Constants(0.6, 0.003)
    points = [Point(traffic, true.tokens_per_s(traffic, 50e9)) for traffic in (2e8, 5e8, 1e9, 4e9)]
    throttled = Point(2e9, true.tokens_per_s(2e9, 50e9) / 3)
    assert fit_constants([*points, throttled], 50e9, PRIOR).efficiency == pytest.approx(0.6, rel=0.05)


def test_large_models_leave_the_overhead_where_the_class_has_it() -> None:
    true = Constants(0.4, 0.003)
    found = fit_constants([Point(traffic, true.tokens_per_s(traffic, 50e9)) for traffic in (8e9, 2e10)], 50e9, PRIOR)
    assert found.efficiency == pytest.approx(0.4, rel=0.05)
    assert found.overhead_s == pytest.approx(PRIOR.overhead_s, rel=0.3)


@pytest.mark.parametrize("points", [0, 1, 3])
def test_nine_runs_in_ten_of_the_model_itself_lie_in_the_range(points: int) -> None:
    draw = random.Random(points)
    inside = []
    for _ in range(150):
        true = Constants(
            min(PRIOR.efficiency * math.exp(draw.gauss(0, EFFICIENCY_SPREAD)), 1.0),
            PRIOR.overhead_s * math.exp(draw.gauss(0, OVERHEAD_SPREAD)),
        )
        rows = []
        for _ in range(points + 1):
            traffic = math.exp(draw.uniform(math.log(5e8), math.log(2e10)))
            noise = draw.expovariate(math.sqrt(2) / NOISE) * draw.choice((-1, 1))
            rows.append(Point(traffic, true.tokens_per_s(traffic, 50e9) * math.exp(noise)))
        new, *seen = rows
        predicted = fit_constants(seen, 50e9, PRIOR).tokens_per_s(new.traffic_bytes, 50e9)
        inside.append(abs(math.log(predicted / new.tokens_per_s)) <= RANGE_Z * spread(points))
    # 150 draws of .9 have a standard deviation of .024
    assert 0.85 <= statistics.fmean(inside) <= 0.96


def test_the_catalog_keeps_what_its_runs_say() -> None:
    """A profile's constants, and the bytes of the run that they name, give the rate of the run."""
    rates = engine_rates(find_target("jetson-agx-orin-64gb"), "llama_cpp/cpu")
    assert rates.decode.tokens_per_s(2.67e9, rates.bandwidth_bytes_per_s) == pytest.approx(7.08, rel=0.05)
    rates = engine_rates(find_target("rk3588"), "rkllm/npu")
    assert rates.decode.tokens_per_s(1.55e9, rates.bandwidth_bytes_per_s) == pytest.approx(16.7, rel=0.15)


# --- against measurements


def figure(name: str, value: float, kind: str = "measured", half: float = 0.1, of: str = "bundle") -> Measurement:
    return Measurement(
        name=name, value=value, unit="x", kind=kind, ci_low=value * (1 - half), ci_high=value * (1 + half), of=of
    )


def test_errors_are_of_the_prediction_relative_to_the_measurement() -> None:
    predicted = [
        figure("decode_tokens_per_s", 90.0, "predicted", half=0.5),
        figure("peak_rss_bytes", 130.0, "predicted", half=0.05),
        figure("required_bytes", 1.0, "predicted"),
        figure("prefill_tokens_per_s", 50.0, "predicted"),
    ]
    measured = [figure("decode_tokens_per_s", 100.0), figure("peak_rss_bytes", 100.0), figure("required_bytes", 2.0)]
    measured.append(figure("prefill_tokens_per_s", 50.0, of="import"))
    told = prediction_errors(predicted, measured)
    assert (
        told == "Predictions against what was measured on the target: decode -10%; peak memory +30%, outside its range."
    )
    assert prediction_errors(predicted, []) is None
    busy = figure("decode_tokens_per_s", 5.0).model_copy(update={"note": "contended: others took 69% of the CPU"})
    assert prediction_errors(predicted, [busy]) is None
    assert prediction_errors(predicted, [figure("decode_tokens_per_s", 1.0, "predicted")]) is None
