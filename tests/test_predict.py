from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgekit.engine import EngineOptions
from edgekit.engines.llama_cpp import collect_log, open_model
from edgekit.formats.gguf import tensor_bytes
from edgekit.model import BUILTIN, ModelShape, model_shape, resolve_model
from edgekit.predict.latency import predict_latency, streamed_bytes
from edgekit.predict.memory import compute_buffer_bytes, kv_cache_bytes, plan_memory
from edgekit.stage import Tensor
from edgekit.target import find_target

MIB = 1 << 20


@pytest.fixture(scope="module")
def builtin() -> tuple[Path, ModelShape]:
    source = resolve_model(BUILTIN).artifact
    return source.path / next(iter(source.manifest.files)), model_shape(source)


def reserved_mib(path: Path, options: EngineOptions) -> dict[str, float]:
    """What llama.cpp says that it allocates: the oracle."""
    with collect_log() as log, open_model(path, options):
        pass
    found = (re.search(r": +CPU (KV|compute) buffer size = +([\d.]+) MiB", line) for line in log)
    return {match[1]: float(match[2]) for match in found if match}


@pytest.mark.parametrize(
    ("context_tokens", "kv_type", "batch_tokens"),
    [(4096, "f16", 512), (2048, "f16", 512), (8192, "q8_0", 512), (1024, "q4_0", 512), (4096, "f16", 128)],
)
def test_memory_is_what_llama_cpp_reserves(
    builtin: tuple[Path, ModelShape], context_tokens: int, kv_type: str, batch_tokens: int
) -> None:
    path, shape = builtin
    options = EngineOptions(context_tokens=context_tokens, kv_type=kv_type, batch_tokens=batch_tokens, threads=1)
    reserved = reserved_mib(path, options)
    assert kv_cache_bytes(shape, context_tokens, kv_type) / MIB == pytest.approx(reserved["KV"], abs=0.01)
    assert compute_buffer_bytes(shape, context_tokens, batch_tokens) / MIB == pytest.approx(
        reserved["compute"], rel=0.06
    )


def test_the_context_is_padded_to_whole_blocks_of_cells(builtin: tuple[Path, ModelShape]) -> None:
    _, shape = builtin
    assert kv_cache_bytes(shape, 1) == kv_cache_bytes(shape, 256) == kv_cache_bytes(shape, 257) / 2
    assert kv_cache_bytes(shape, 300, sequences=3) == 3 * kv_cache_bytes(shape, 512)


def test_a_plan_fits_up_to_the_last_byte(builtin: tuple[Path, ModelShape]) -> None:
    _, shape = builtin
    needed = plan_memory(shape, 100 * MIB, 1 << 30, 2048)
    without_margin = needed.required_bytes - needed.margin_bytes
    usable = without_margin * 20 // 19 + 20
    assert plan_memory(shape, 100 * MIB, usable, 2048).fits
    assert not plan_memory(shape, 100 * MIB, usable - MIB, 2048).fits


def test_an_embedding_that_is_only_looked_up_is_not_streamed() -> None:
    table, layer = Tensor("token_embd.weight", (256, 1000), "q8_0"), Tensor("blk.0.attn_q.weight", (256, 256), "q4_0")
    head = Tensor("output.weight", (256, 1000), "q6_K")
    small = tensor_bytes("q4_0", (256, 256))
    assert streamed_bytes([table, layer]) == small + tensor_bytes("q8_0", (256, 1000))
    assert streamed_bytes([table, layer, head]) == small + tensor_bytes("q6_K", (256, 1000))


def test_rates_follow_the_roofline(builtin: tuple[Path, ModelShape]) -> None:
    _, shape = builtin
    target = find_target("pi")
    decode, prefill = predict_latency(target, shape, shape.tensors, 4096)
    bandwidth = target.compute.decode_efficiency.value * target.memory.bandwidth_bytes_per_s.value
    seconds = (streamed_bytes(shape.tensors) + kv_cache_bytes(shape, 2048)) / bandwidth
    assert decode.value == pytest.approx(1 / (seconds + target.compute.token_overhead_s.value))
    flops = target.compute.prefill_efficiency.value * target.compute.dense_flops_per_s.value
    assert prefill.value == pytest.approx(flops / (2 * shape.parameters), rel=1e-3)
    assert {decode.kind, prefill.kind} == {"predicted"}
    assert decode.ci_low < decode.value < decode.ci_high
