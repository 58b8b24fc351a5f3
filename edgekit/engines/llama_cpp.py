"""llama.cpp in this process, over the low-level API of llama-cpp-python (`llama.h` of the same release)."""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.engine import Capabilities, Closing, EngineOptions, Entry, FloatArray, StepOutput
from edgekit.engines._amx import miscompiled
from edgekit.errors import InputError, ToolError, suggest
from edgekit.formats import llama_state

DISTRIBUTION = "llama-cpp-python"
RUNS = ("gguf",)
NEEDS = "a system that llama.cpp compiles for"

KV_TYPES = ("f16", "q8_0", "q4_0")
_ERROR_LEVEL, _CONTINUED = 4, 5  # enum ggml_log_level: 0 none, 1 debug, 2 info, 3 warn, 4 error, 5 continuation
_MAX_CELLS = 1 << 27  # llama.cpp keeps a table of all cells, some 50 bytes each
_UBATCH_TOKENS = 512  # llama.cpp's default of what it computes at once; more only costs memory
_TILE = 4  # rows of a batch that the CPU kernels of quantized types take at once; what is left over goes one by one
_NO_CELLS = 1  # what llama_decode returns, with nothing changed, when the KV cache is full
_UNQUANTIZED = ("0", "1", "32")  # enum llama_ftype: F32, F16, BF16


def open_model(path: Path, options: EngineOptions) -> LlamaCpp:
    """Load a GGUF file and make a context for `options.sequences` sequences.

    Raises:
        InputError: the file or the options are wrong; `found` is llama.cpp's first error.
        ToolError: llama.cpp is not installed or cannot allocate the context.
    """
    return LlamaCpp(path, options)


def open_vocabulary(path: Path) -> Vocabulary:
    """Load only the tokenizer and metadata of a GGUF file. Raises as `open_model` does."""
    return Vocabulary(path)


def build_info() -> dict[str, str]:
    """Version of the package, llama.cpp's CPU features, and whether it can offload to an accelerator here."""
    api = library()
    broken = {} if repacks() else {"repacking": "no, this GCC compiled AMX kernels wrong: take 12.4, 13.3 or later"}
    return {
        "engine": "llama_cpp",
        "version": importlib.metadata.version(DISTRIBUTION),
        "system": api.llama_print_system_info().decode().strip(),
        "gpu_offload": "yes" if api.llama_supports_gpu_offload() else "no",
        **broken,
    }


class Log(list[str]):
    """Lines that llama.cpp logged, without their newlines."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []
        """Those it logged as errors."""


@contextmanager
def collect_log(on_line: Callable[[str], None] | None = None) -> Iterator[Log]:
    """Collect what llama.cpp logs in the block; `on_line` sees each line at once. Outside, the log is dropped.

    An exception of `on_line` (or an interrupt within it) cannot pass through llama.cpp: it is raised at the end.
    """
    library()
    sink = _Sink(on_line)
    _sinks.append(sink)
    try:
        with _interrupts_deferred():
            yield sink.log
    finally:
        _sinks.remove(sink)
    if sink.raised is not None:
        raise sink.raised


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Raise a Ctrl-C at the end of the block: raised where llama.cpp calls back, ctypes would print and lose it."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if received:
        raise KeyboardInterrupt


class _Sink:
    def __init__(self, on_line: Callable[[str], None] | None) -> None:
        self.log = Log()
        self.raised: BaseException | None = None
        self._on_line = on_line
        self._text = ""
        self._level = 0

    def write(self, level: int, text: str) -> None:
        if level != _CONTINUED:
            self._level = level
        *lines, self._text = (self._text + text).split("\n")
        for line in filter(None, lines):
            self.log.append(line)
            if self._level == _ERROR_LEVEL:
                self.log.errors.append(line)
            if self._on_line is not None and self.raised is None:
                self._on_line(line)


_sinks: list[_Sink] = []


def _on_log(level: int, text: bytes, _data: object) -> None:
    for sink in _sinks:
        try:
            sink.write(level, text.decode("utf-8", "replace"))
        except BaseException as error:  # ctypes would print it and go on
            sink.raised = error


# llama.cpp keeps only its address
_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_on_log)


@cache
def library() -> Any:
    """The low-level API of llama-cpp-python, its log silenced. Raises ToolError when it is not installed."""
    try:
        from llama_cpp import llama_cpp as api
    except ModuleNotFoundError:
        raise ToolError("the package llama-cpp-python", "it is not installed", "pip install 'edgekit[gguf]'") from None
    except (ImportError, OSError, RuntimeError) as error:
        found = f"its library does not load: {error}"
        raise ToolError("a working llama-cpp-python", found, "pip install --force-reinstall 'edgekit[gguf]'") from None
    api.llama_log_set(_LOG_CALLBACK, None)
    api.llama_backend_init()
    return api


@cache
def repacks() -> bool:
    """Whether llama.cpp may lay weights out anew for the processor: not for AMX kernels that end the process."""
    api = library()
    if b"AMX_INT8 = 1" not in api.llama_print_system_info():
        return True
    return not any(map(miscompiled, Path(api.__file__).parent.glob("lib/*ggml-cpu*")))


class Vocabulary(Closing):
    """The tokenizer and metadata of an open GGUF file."""

    def __init__(self, path: Path, **params: Any) -> None:
        self._api = library()
        self._path = path
        settings = self._api.llama_model_default_params()
        settings.use_extra_bufts = repacks()
        for name, value in (params or {"vocab_only": True}).items():
            setattr(settings, name, value)
        if not path.is_file():
            raise InputError("a GGUF file", f"no file at {path}", "check the path")
        with collect_log() as log:
            self._model: Any = self._api.llama_model_load_from_file(os.fsencode(path), settings)
        if not self._model:
            raise InputError(f"a GGUF model at {path} that llama.cpp can load", _reason(log), "get the file again")
        told = [int(found[1]) for line in log if (found := re.search(r"offloaded (\d+)/\d+ layers to GPU", line))]
        self.offloaded_layers = told[0] if told else 0
        """Layers that llama.cpp says it put on an accelerator."""
        self._vocab: Any = self._api.llama_model_get_vocab(self._model)
        if self._api.llama_vocab_type(self._vocab) == self._api.LLAMA_VOCAB_TYPE_NONE:
            # llama.cpp aborts the process when such a vocabulary is asked for anything
            self.close()
            raise InputError(f"a tokenizer in {path}", "none", "convert the model with its tokenizer")
        self._size: int = self._api.llama_vocab_n_tokens(self._vocab)

    @property
    def vocabulary_size(self) -> int:
        """Tokens of the vocabulary: the width of a row of logits."""
        return self._size

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Every token that llama.cpp takes for an end of generation: EOS, end of turn, end of message."""
        vocab = self._open_vocab()
        return frozenset(t for t in range(self._size) if self._api.llama_vocab_is_eog(vocab, t))

    @cached_property
    def chat_template(self) -> str | None:
        """The model's chat template (Jinja source), or None."""
        self._open_vocab()
        text = self._api.llama_model_chat_template(self._model, None)
        return None if text is None else text.decode("utf-8", "replace")

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The scalar metadata of the file as text; arrays are left out by llama.cpp."""
        self._open_vocab()
        api, model = self._api, self._model
        return {
            _read_text(api.llama_model_meta_key_by_index, model, i): _read_text(
                api.llama_model_meta_val_str_by_index, model, i
            )
            for i in range(api.llama_model_meta_count(model))
        }

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Encode text; `special` parses control tokens in it and adds the BOS where the model has one."""
        vocab = self._open_vocab()
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                "text", f"half a surrogate pair at character {error.start}", "check the encoding"
            ) from None
        capacity = len(data) + 8
        while True:
            buffer = (ctypes.c_int32 * capacity)()
            count = self._api.llama_tokenize(vocab, data, len(data), buffer, capacity, special, special)
            if count >= 0:
                return buffer[:count]
            if count == -(1 << 31):
                raise InputError("a shorter text", f"{len(data)} bytes", "split the text")
            capacity = -count

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """Decode tokens to bytes, piece by piece: the bytes of a sequence are the bytes of its parts joined.

        A SentencePiece model therefore keeps the space that its tokenizer puts before a text.
        """
        return b"".join(map(self._piece, tokens))

    def _piece(self, token: int) -> bytes:
        known = self._pieces.get(token)
        if known is not None:
            return known
        vocab = self._open_vocab()
        self._check_token(token)
        capacity = 64
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            count = self._api.llama_token_to_piece(vocab, token, buffer, capacity, 0, False)
            if count >= 0:
                return self._pieces.setdefault(token, buffer.raw[:count])
            capacity = -count

    @cached_property
    def _pieces(self) -> dict[int, bytes]:
        return {}

    def _check_token(self, token: int) -> None:
        if not 0 <= token < self._size:
            raise InputError(f"a token from 0 to {self._size - 1}", str(token), "use this model's tokenizer")

    def _open_vocab(self) -> Any:
        # llama.cpp would follow the null pointer
        if self._vocab is None:
            raise InputError("an open model", f"{self._path} was closed", "open it again")
        return self._vocab

    def close(self) -> None:
        """Free the model; later calls raise InputError."""
        self._vocab = None
        model, self._model = self._model, None
        if model:
            self._api.llama_model_free(model)


class LlamaCpp(Vocabulary):
    """An open model with one KV cache of `total_tokens` cells, which forks share."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        api = library()
        _check_options(options, api.llama_max_parallel_sequences() - 1)
        self._accelerate: bool = options.accelerate and api.llama_supports_gpu_offload()
        self._ctx: Any = None
        self._adapted: list[Adapted] = []
        super().__init__(path, n_gpu_layers=-1 if self._accelerate else 0)
        try:
            self._open_context(options)
        except BaseException:
            self.close()
            raise

    def _open_context(self, options: EngineOptions) -> None:
        api, model = self._api, self._model
        if api.llama_model_has_encoder(model) or not api.llama_model_has_decoder(model):
            kind = self.metadata.get("general.architecture", "unknown")
            raise InputError("a decoder-only language model", f"{kind} in {self._path}", "choose another model")
        settings = api.llama_context_default_params()
        settings.n_ctx = options.total_tokens or options.context_tokens * options.sequences
        settings.n_batch = options.batch_tokens
        settings.n_ubatch = min(options.batch_tokens, _UBATCH_TOKENS)
        # a recurrent state is one vector per sequence: it cannot go back to an earlier position
        attends = not (api.llama_model_is_recurrent(model) or api.llama_model_is_hybrid(model))
        quantized = self.metadata.get("general.file_type") not in _UNQUANTIZED
        self._tiles = attends and quantized and not self._accelerate
        # one more sequence holds the rows that fill a batch up
        self._filler = options.sequences
        settings.n_seq_max = options.sequences + self._tiles
        settings.n_threads = settings.n_threads_batch = options.cpu_threads
        settings.type_k = settings.type_v = getattr(api, f"GGML_TYPE_{options.kv_type.upper()}")
        settings.pooling_type = api.LLAMA_POOLING_TYPE_NONE
        settings.kv_unified = True
        # a sliding-window layer keeps what has left its window, so that a rewind finds it
        settings.swa_full = True
        settings.offload_kqv = settings.op_offload = self._accelerate
        with collect_log() as log:
            self._ctx = api.llama_init_from_model(model, settings)
        if not self._ctx:
            wanted = (
                f"a context of {options.sequences} x {options.context_tokens} tokens with a {options.kv_type} cache"
            )
            raise ToolError(wanted, _reason(log), "use a shorter context, fewer sequences or kv_type f16")
        self._memory: Any = api.llama_get_memory(self._ctx)
        self._hidden_size: int = api.llama_model_n_embd_out(model)
        self._embedding_size: int = api.llama_model_n_embd_inp(model)
        self._context_tokens = options.context_tokens
        self._lengths: dict[int, int] = {}
        self._free = list(range(options.sequences - 1, -1, -1))
        # llama.cpp lowers n_batch to the context and aborts the process on a larger batch
        self._batch_tokens: int = api.llama_n_batch(self._ctx)
        self._batch = _Batch(api, self._batch_tokens)
        # with M-RoPE an embedding has several positions
        one_position = api.llama_model_rope_type(model) not in (api.LLAMA_ROPE_TYPE_MROPE, api.LLAMA_ROPE_TYPE_IMROPE)
        self._capabilities = Capabilities(
            fork=attends,
            rewind=attends,
            batch=True,
            hidden_states=True,
            input_embeddings=one_position,
            context_tokens=options.context_tokens,
            sequences=options.sequences,
            batch_tokens=self._batch_tokens,
            total_tokens=settings.n_ctx,
        )

    def adapted(self, adapter: Path, options: EngineOptions) -> Adapted:
        """Open a LoRA beside the model: another context over the same weights. Closing this engine closes it, too.

        Raises InputError for a file that is no adapter of this model, and as `open_model` does.
        """
        self._check_open()
        opened = Adapted(self, adapter, options)
        self._adapted.append(opened)
        return opened

    @property
    def capabilities(self) -> Capabilities:
        """What this model can do; a recurrent or hybrid one neither forks nor rewinds."""
        return self._capabilities

    @property
    def loaded(self) -> dict[str, str]:
        """How many layers llama.cpp says it put on an accelerator."""
        return {"offloaded_layers": str(self.offloaded_layers)}

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self._hidden_size

    @property
    def embedding_size(self) -> int:
        """Width of an input embedding. llama.cpp takes it as the graph's input: models that scale embeddings differ."""
        return self._embedding_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's tensors: what a step reads."""
        self._check_open()
        return int(self._api.llama_model_size(self._model))

    @property
    def pairs_neighbours(self) -> bool:
        """Whether RoPE turns dimensions (0, 1), (2, 3)...: the converter then reorders the rows of queries and keys."""
        return bool(self._api.llama_model_rope_type(self._model) == self._api.LLAMA_ROPE_TYPE_NORM)

    def start(self) -> int:
        """Return a new empty sequence. Raises InputError when all are in use."""
        self._check_open()
        if not self._free:
            wanted = f"at most {self._capabilities.sequences} sequences alive"
            raise InputError(wanted, "one more", "release one, or open the model with more `sequences`")
        sequence = self._free.pop()
        self._lengths[sequence] = 0
        return sequence

    def fork(self, sequence: int) -> int:
        """Return a new sequence with the same past, sharing its cells. Raises InputError where the model cannot.

        Both continue bit for bit alike while their own cells lie in order. Once a released sequence's cells are
        used again, attention sums in another order, and logits agree only up to rounding.
        """
        self._check_open()
        length = self.length(sequence)
        self._require(self._capabilities.fork, "fork")
        copy = self.start()
        self._api.llama_memory_seq_cp(self._memory, sequence, copy, -1, -1)
        self._lengths[copy] = length
        return copy

    def truncate(self, sequence: int, length: int) -> None:
        """Forget everything after the first `length` positions. Raises InputError where the model cannot."""
        self._check_open()
        held = self.length(sequence)
        if not 0 <= length <= held:
            raise InputError(f"a length from 0 to {held}", str(length), "truncate to a position that was stepped")
        if length == held:
            return
        # dropping a whole sequence works for every architecture
        self._require(self._capabilities.rewind or length == 0, "rewind")
        if not self._api.llama_memory_seq_rm(self._memory, sequence, length, -1):
            raise ToolError(f"sequence {sequence} cut to {length} of {held} tokens", "llama.cpp refused", "release it")
        self._lengths[sequence] = length

    def release(self, sequence: int) -> None:
        """Forget the sequence and free its slot."""
        self.truncate(sequence, 0)
        del self._lengths[sequence]
        self._free.append(sequence)

    def save(self, sequence: int) -> bytes:
        """State of a sequence, which `load` takes back: its part of the KV cache as llama.cpp writes it.

        Raises ToolError where it cannot be taken back: an empty sequence, one longer than a sliding window, or an
        architecture without a KV cache.
        """
        self._check_open()
        length = self.length(sequence)
        size = self._api.llama_state_seq_get_size(self._ctx, sequence)
        buffer = (ctypes.c_uint8 * size)()
        with collect_log() as log:
            written = self._api.llama_state_seq_get_data(self._ctx, buffer, size, sequence)
        data = bytes(buffer)
        try:
            positions, found = llama_state.read_state(data)[0], _reason(log)
        except InputError as error:
            positions, found = -1, error.found
        if written != size or positions != length:
            raise ToolError(f"the whole state of {length} positions", found, "use a shorter prefix, or another model")
        return data

    def load(self, data: bytes) -> int:
        """Return a new sequence with a saved state. The state is not trusted; no data in it harms the process.

        Raises InputError when all sequences are in use, or the state is malformed, of another model or KV type, or
        longer than the context; then everything is as it was.
        """
        positions, _ = llama_state.read_state(data)
        if positions > self._context_tokens:
            wanted = f"a state of at most {self._context_tokens} positions"
            raise InputError(wanted, str(positions), "open the model with more `context_tokens`")
        sequence = self.start()
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        with collect_log() as log:
            read = self._api.llama_state_seq_set_data(self._ctx, buffer, len(data), sequence)
        if read != len(data):
            self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            self.release(sequence)
            raise InputError(f"a state of this model with this KV type in {self._path}", _reason(log), "build it again")
        self._lengths[sequence] = positions
        return sequence

    def length(self, sequence: int) -> int:
        """Positions that the sequence holds."""
        if sequence not in self._lengths:
            raise InputError("a sequence from start() or fork()", f"{sequence}, which is not alive", "start one")
        return self._lengths[sequence]

    def step(self, entries: Sequence[Entry], *, hidden_states: bool = False) -> StepOutput:
        """Compute entries (several of one sequence follow each other) and return copies of the wanted rows.

        A step larger than `batch_tokens`, or one that mixes tokens and embeddings, takes several calls of
        llama.cpp. Nothing is computed when an entry is wrong.

        Raises:
            InputError: an entry is malformed, its sequence is not alive, or a sequence would outgrow the context.
            ToolError: llama.cpp failed; the sequences are as they were before the failing call.
        """
        self._check_open()
        self._check_entries(entries)
        rows = sum(entry.wants_logits for entry in entries)
        logits = np.empty((rows, self._size), np.float32)
        hidden = np.empty((rows, self._hidden_size), np.float32) if hidden_states else None
        done = 0
        for chunk, wants_hidden in self._chunks(entries, hidden_states):
            self._decode(chunk, wants_hidden)
            done = self._copy_rows(chunk, wants_hidden, logits, hidden, done)
        return StepOutput(logits, hidden)

    def _check_entries(self, entries: Sequence[Entry]) -> None:
        lengths: dict[int, int] = {}
        for entry in entries:
            length = lengths.get(entry.sequence)
            lengths[entry.sequence] = (self.length(entry.sequence) if length is None else length) + 1
            if (entry.token is None) == (entry.embedding is None):
                raise InputError("an entry with a token or an embedding", "both or neither", "give exactly one")
            if entry.token is not None:
                self._check_token(entry.token)
            elif entry.embedding is not None:
                self._require(self._capabilities.input_embeddings, "take input embeddings")
                if entry.embedding.shape != (self._embedding_size,):
                    wanted = f"an input embedding of shape ({self._embedding_size},)"
                    raise InputError(wanted, str(entry.embedding.shape), "use this model's embedding width")
        for sequence, length in lengths.items():
            if length > self._context_tokens:
                wanted = f"a sequence of at most {self._context_tokens} tokens"
                raise InputError(
                    wanted, f"{length} in sequence {sequence}", "open the model with more `context_tokens`"
                )

    def _chunks(self, entries: Sequence[Entry], hidden_states: bool) -> Iterator[tuple[list[Entry], bool]]:
        """Split entries into calls: one kind of input each, at most a batch, and whether to ask for hidden states.

        With hidden states llama.cpp computes the logits of every entry of the call, so the unwanted ones at the
        front (a prompt but its last token) go first, without.
        """
        first = next((i for i, entry in enumerate(entries) if entry.wants_logits), len(entries)) if hidden_states else 0
        for part, wants_hidden in ((entries[:first], False), (entries[first:], hidden_states)):
            for _, run in itertools.groupby(part, key=lambda entry: entry.token is None):
                while chunk := list(itertools.islice(run, self._batch_tokens)):
                    yield chunk, wants_hidden

    def _decode(self, chunk: Sequence[Entry], wants_hidden: bool) -> None:
        before = {entry.sequence: self._lengths[entry.sequence] for entry in chunk}
        after = dict(before)
        positions = []
        for entry in chunk:
            positions.append(after[entry.sequence])
            after[entry.sequence] += 1
        batch = self._batch.fill(chunk, positions, all_outputs=wants_hidden)
        self._api.llama_set_embeddings(self._ctx, wants_hidden)
        with collect_log() as log:
            # every row the next token of a sequence of its own
            status = self._decode_batch(batch, tiled=len(before) == len(chunk) and all(e.wants_logits for e in chunk))
        if status == 0:
            self._lengths |= after
            return
        for sequence, length in before.items():
            if not self._api.llama_memory_seq_rm(self._memory, sequence, length, -1):
                length = self._api.llama_memory_seq_pos_max(self._memory, sequence) + 1
            self._lengths[sequence] = length
        found = f"{_reason(log)} (llama_decode returned {status})"
        raise ToolError(f"a step of {len(chunk)} tokens", found, "use a shorter context or smaller batches")

    def _decode_batch(self, batch: Any, *, tiled: bool) -> int:
        """Decode, with filler rows where whole tiles take less time: 15 rows take 1.2 to 1.5 times as long as 16."""
        rows, spare = batch.n_tokens, -batch.n_tokens % _TILE
        fits = rows > _TILE and spare in (1, 2) and rows + spare <= self._batch_tokens
        if not (self._tiles and tiled and fits):
            return int(self._api.llama_decode(self._ctx, batch))
        self._batch.fill_up(batch, spare, self._filler)
        status = int(self._api.llama_decode(self._ctx, batch))
        self._api.llama_memory_seq_rm(self._memory, self._filler, -1, -1)
        if status == _NO_CELLS:
            batch.n_tokens = rows
            status = int(self._api.llama_decode(self._ctx, batch))
        return status

    def _copy_rows(
        self, chunk: Sequence[Entry], wants_hidden: bool, logits: FloatArray, hidden: FloatArray | None, done: int
    ) -> int:
        # outputs lie in the order of the batch; with hidden states every entry has one
        outputs = [entry.wants_logits for entry in chunk if wants_hidden or entry.wants_logits]
        wanted = np.flatnonzero(outputs)
        if not wanted.size:
            return done
        rows = slice(done, done + wanted.size)
        pairs = [(logits, self._api.llama_get_logits)]
        if hidden is not None:
            pairs.append((hidden, self._api.llama_get_embeddings))
        for out, getter in pairs:
            pointer = getter(self._ctx)
            if not pointer:
                raise ToolError("outputs from llama.cpp", "none", "use another model: this one gives no logits")
            np.take(np.ctypeslib.as_array(pointer, (len(outputs), out.shape[1])), wanted, axis=0, out=out[rows])
        return done + wanted.size

    def _require(self, able: bool, verb: str) -> None:
        if not able:
            kind = self.metadata.get("general.architecture", "this architecture")
            found = f"{kind}, which cannot {verb} in llama.cpp"
            raise InputError(f"a model that can {verb}", found, "use a strategy that only appends, or another model")

    def _check_open(self) -> None:
        if self._ctx is None:
            raise InputError("an open model", f"{self._path} was closed", "open it again")

    def close(self) -> None:
        """Free context and model; later calls raise InputError."""
        while self._adapted:
            self._adapted.pop().close()
        context, self._ctx = self._ctx, None
        if context:
            self._api.llama_free(context)
        super().close()


class Adapted(LlamaCpp):
    """The model of another engine with a LoRA, in a context of its own."""

    def __init__(self, base: LlamaCpp, adapter: Path, options: EngineOptions) -> None:
        api = base._api
        _check_options(options, api.llama_max_parallel_sequences() - 1)
        if not adapter.is_file():
            raise InputError("a LoRA in GGUF", f"no file at {adapter}", "check the path")
        self._api, self._path, self._size, self._accelerate = api, adapter, base._size, base._accelerate
        self._model, self._vocab, self.offloaded_layers = base._model, base._vocab, base.offloaded_layers
        self._ctx, self._adapted = None, []
        try:
            with collect_log() as log:
                # the model frees it
                lora = api.llama_adapter_lora_init(self._model, os.fsencode(adapter))
            if not lora:
                raise InputError(f"a LoRA for this model at {adapter}", _reason(log), "build it again")
            self._open_context(options)
            adapters, scales = (api.llama_adapter_lora_p_ctypes * 1)(lora), (ctypes.c_float * 1)(1.0)
            if api.llama_set_adapters_lora(self._ctx, adapters, 1, scales):
                raise InputError(f"a LoRA for this model at {adapter}", "llama.cpp refused it", "build it again")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the context; the model stays."""
        self._model = None
        super().close()


class _Batch:
    """A `llama_batch` over buffers that live as long as the engine."""

    def __init__(self, api: Any, capacity: int) -> None:
        self._api = api
        self._tokens = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._sequences = np.zeros(capacity, np.int32)
        self._counts = np.ones(capacity, np.int32)
        self._outputs = np.zeros(capacity, np.int8)
        self._embeddings: npt.NDArray[np.float32] = np.zeros((0, 0), np.float32)
        int32_p = ctypes.POINTER(ctypes.c_int32)
        base = self._sequences.ctypes.data
        self._pointers = (int32_p * capacity)(
            *(ctypes.cast(base + i * self._sequences.itemsize, int32_p) for i in range(capacity))
        )

    def fill(self, chunk: Sequence[Entry], positions: Sequence[int], *, all_outputs: bool) -> Any:
        """Describe entries, all tokens or all embeddings, at their positions."""
        count = len(chunk)
        self._positions[:count] = positions
        self._sequences[:count] = [entry.sequence for entry in chunk]
        self._outputs[:count] = [all_outputs or entry.wants_logits for entry in chunk]
        batch = self._api.llama_batch()
        batch.n_tokens = count
        if chunk[0].token is not None:
            self._tokens[:count] = [entry.token or 0 for entry in chunk]
            batch.token = _pointer(self._tokens, ctypes.c_int32)
        else:
            self._embeddings = np.array([entry.embedding for entry in chunk], np.float32)
            batch.embd = _pointer(self._embeddings, ctypes.c_float)
        batch.pos = _pointer(self._positions, ctypes.c_int32)
        batch.n_seq_id = _pointer(self._counts, ctypes.c_int32)
        batch.seq_id = self._pointers
        batch.logits = _pointer(self._outputs, ctypes.c_int8)
        return batch

    def fill_up(self, batch: Any, spare: int, sequence: int) -> None:
        """Add rows that nobody reads, in a sequence that is empty."""
        rows = slice(batch.n_tokens, batch.n_tokens + spare)
        self._tokens[rows] = self._tokens[0]
        self._positions[rows] = range(spare)
        self._sequences[rows] = sequence
        self._outputs[rows] = True
        batch.n_tokens += spare


def _check_options(options: EngineOptions, max_sequences: int) -> None:
    options.check_counts()
    if options.sequences > max_sequences:
        raise InputError(f"at most {max_sequences} sequences", str(options.sequences), "lower sequences")
    cells = options.total_tokens or options.context_tokens * options.sequences
    if cells > _MAX_CELLS:
        wanted = f"at most {_MAX_CELLS} tokens in the contexts of all sequences"
        raise InputError(wanted, str(cells), "use a shorter context or fewer sequences")
    if options.kv_type not in KV_TYPES:
        found = f"{options.kv_type!r}{suggest(options.kv_type, KV_TYPES)}"
        raise InputError("a kv_type", found, f"use one of {', '.join(KV_TYPES)}")


def _pointer(array: npt.NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def _read_text(getter: Any, model: Any, index: int) -> str:
    capacity = 256
    while True:
        buffer = ctypes.create_string_buffer(capacity)
        needed = getter(model, index, buffer, capacity)
        if needed < capacity:
            return buffer.value.decode("utf-8", "replace")
        capacity = needed + 1


def _reason(log: Log) -> str:
    # the first error is the cause; those that follow it only say that loading or decoding failed
    return (log.errors or [*log[-1:], "no message from llama.cpp"])[0].strip()
