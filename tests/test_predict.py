from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import pytest

from edgekit.devices import Job, LatencyJob, Measures, open_device
from edgekit.engine import EngineOptions
from edgekit.engines.llama_cpp import collect_log, library, open_model
from edgekit.formats.gguf import read_header, tensor_bytes
from edgekit.model import BUILTIN, ModelShape, model_shape, resolve_model
from edgekit.predict.latency import streamed_bytes
from edgekit.predict.memory import (
    PEAK_RANGE,
    PROCESS_BYTES,
    compute_buffer_bytes,
    kv_cache_bytes,
    peak_rss_bytes,
    plan_memory,
    predict_peak,
    repacked_bytes,
)
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


# --- the peak of a process


def quantize(source: Path, file_type: int, path: Path) -> tuple[Tensor, ...]:
    """Write the source in a file type of llama.cpp (`enum llama_ftype`) and read back the types it chose."""
    api = library()
    params = api.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.allow_requantize = 1, file_type, True
    assert api.llama_model_quantize(os.fsencode(source), os.fsencode(path), params) == 0
    return tuple(Tensor(t.name, t.shape, t.type) for t in read_header(path).tensors)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="what is repacked depends on the processor")
@pytest.mark.parametrize("file_type", [2, 7, 15], ids=["Q4_0", "Q8_0", "Q4_K_M"])
def test_the_copies_are_what_llama_cpp_repacks(
    builtin: tuple[Path, ModelShape], file_type: int, tmp_path: Path
) -> None:
    tensors = quantize(builtin[0], file_type, tmp_path / "model.gguf")
    with collect_log() as log, open_model(tmp_path / "model.gguf", EngineOptions(context_tokens=256, threads=1)):
        pass
    repacked = [found for line in log if (found := re.search(r"CPU_REPACK model buffer size = +([\d.]+) MiB", line))]
    assert repacked_bytes(tensors) / MIB == pytest.approx(float(repacked[0][1]) if repacked else 0, abs=0.01)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="what is repacked depends on the processor")
@pytest.mark.parametrize(
    ("file_type", "context_tokens", "kv_type", "batch_tokens", "sequences", "prompt_tokens"),
    [(2, 2048, "f16", 512, 1, 128), (15, 512, "f16", 128, 1, 400), (7, 1024, "q8_0", 512, 4, 400)],
)
def test_a_fresh_process_peaks_where_predicted(
    builtin: tuple[Path, ModelShape],
    tmp_path: Path,
    file_type: int,
    context_tokens: int,
    kv_type: str,
    batch_tokens: int,
    sequences: int,
    prompt_tokens: int,
) -> None:
    path, shape = tmp_path / "model.gguf", builtin[1]
    tensors = quantize(builtin[0], file_type, path)
    sizes = {"sequences": sequences, "batch_tokens": batch_tokens}
    predicted = peak_rss_bytes(shape, tensors, context_tokens, kv_type, prompt_tokens=prompt_tokens, **sizes)
    options = EngineOptions(context_tokens=context_tokens, kv_type=kv_type, threads=1, accelerate=False, **sizes)
    latency = LatencyJob(prompt_tokens=prompt_tokens, decode_tokens=2, repeats=1, warmup=0)
    job = Job(engine="llama_cpp", model=str(path), options=options, measure=Measures(latency=latency))
    measured = next(m for m in open_device("local").run(job).measurements if m.name == "peak_rss_bytes")
    assert predicted == pytest.approx(measured.value, rel=PEAK_RANGE)


def test_only_matrices_of_whole_groups_of_rows_are_copied() -> None:
    copied = Tensor("blk.0.ffn_up.weight", (256, 64), "q4_0")
    others = (
        Tensor("token_embd.weight", (256, 64), "q4_0"),
        Tensor("output.weight", (256, 64), "q4_0"),
        Tensor("blk.0.attn_k.weight", (256, 12), "q4_0"),
        Tensor("blk.0.ffn_down.weight", (256, 64), "q5_K"),
        Tensor("blk.0.attn_norm.weight", (256,), "f32"),
    )
    assert repacked_bytes([copied, *others]) == tensor_bytes("q4_0", (256, 64))


def test_the_peak_grows_by_exactly_what_the_cache_and_the_copies_do(builtin: tuple[Path, ModelShape]) -> None:
    shape = builtin[1]
    tensors = [Tensor("token_embd.weight", (256, 64), "q8_0"), Tensor("blk.0.ffn_up.weight", (256, 64), "q4_K")]
    short, long = (peak_rss_bytes(shape, tensors, context) for context in (512, 4096))
    assert long - short == kv_cache_bytes(shape, 4096) - kv_cache_bytes(shape, 512)
    assert short - peak_rss_bytes(shape, tensors, 512, copies=False) == tensor_bytes("q4_K", (256, 64))
    assert short > PROCESS_BYTES + kv_cache_bytes(shape, 512) + tensor_bytes("q8_0", (256, 64))


def test_a_peak_is_predicted_for_llama_cpp_on_a_cpu_alone(builtin: tuple[Path, ModelShape]) -> None:
    shape = builtin[1]
    tensors = [Tensor("blk.0.ffn_up.weight", (2048, 8192), "q4_0")]
    (x86,) = predict_peak(find_target("x86"), shape, tensors, 2048, "f16", "llama_cpp")
    (arm,) = predict_peak(find_target("pi"), shape, tensors, 2048, "f16", "llama_cpp")
    assert (x86.value, x86.kind, x86.device) == (arm.value, "predicted", "generic-x86")
    # an Arm build may not copy
    assert arm.ci_low == pytest.approx(x86.ci_low - (1 - PEAK_RANGE) * tensor_bytes("q4_0", (2048, 8192)))
    assert arm.ci_high == x86.ci_high
    assert not predict_peak(find_target("jetson"), shape, tensors, 2048, "f16", "llama_cpp")
    assert not predict_peak(find_target("x86"), shape, tensors, 2048, "f16", "onnxruntime")
