"""ONNX Runtime in this process, for decoders in the layout of onnxruntime-genai; nothing of genai is needed here."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.engine import Capabilities, Closing, EngineOptions, Entry, FloatArray, StepOutput
from edgekit.engines._tokenizer import Tokenizer
from edgekit.errors import InputError, ToolError
from edgekit.formats.onnx import read_tensors

DISTRIBUTION = "onnxruntime"
RUNS = ("onnx",)
KV_TYPES = ("f32",)

CONFIG_FILE = "genai_config.json"
PROVIDERS: Mapping[str, str] = {
    "cuda": "CUDAExecutionProvider",
    "dml": "DmlExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "OpenVINO": "OpenVINOExecutionProvider",
    "QNN": "QNNExecutionProvider",
    "NvTensorRtRtx": "NvTensorRTRTXExecutionProvider",
}
"""Execution provider by its name in `genai_config.json`; a model that names none is made for the CPU."""
CPU = "CPUExecutionProvider"

_UNQUANTIZED = {"f32", "f16"}
_MAX_JSON_BYTES = 64 << 20
_MAX_CACHE_BYTES = 1 << 40
_ELEMENTS: Mapping[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# their memory is CUDA's: a cache in it is read and written in place
_CUDA = {"CUDAExecutionProvider", "NvTensorRTRTXExecutionProvider"}


def open_model(path: Path, options: EngineOptions) -> OnnxRuntime:
    """Load a directory with `genai_config.json`, its ONNX decoder and `tokenizer.json`.

    The KV cache has the type of the graph, which the engine's `kv_type` tells: f32, or f16 for a half-precision
    graph; both are taken for "not quantized" here.

    Raises:
        InputError: a file is missing, damaged or unsafe, the graph is none that this engine drives, or the options
            ask for what it cannot do.
        ToolError: onnxruntime is not installed, or it lacks the execution provider that the model was made for.
    """
    return OnnxRuntime(path, options)


def build_info() -> dict[str, str]:
    """Version of the package and the execution providers built into it; an open engine's `provider` is what runs."""
    providers = library().get_available_providers()
    return {
        "engine": "onnxruntime",
        "version": importlib.metadata.version(DISTRIBUTION),
        "providers": ",".join(providers),
    }


def library() -> Any:
    """The package onnxruntime. Raises ToolError when it is not installed or does not load."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise ToolError("the package onnxruntime", "it is not installed", "pip install 'edgekit[onnx]'") from None
    except ImportError as error:
        raise ToolError("a working onnxruntime", str(error), "pip install --force-reinstall 'edgekit[onnx]'") from None
    return onnxruntime


class Config:
    """What `genai_config.json` says of a decoder; the file is not trusted."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / CONFIG_FILE
        content = _read_object(self._path, "the layout of onnxruntime-genai")
        model = self._model = self._object(content, "model")
        decoder = self._decoder = self._object(model, "decoder")
        file = decoder.get("filename")
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", file):
            raise self._wrong("a plain file name as model.decoder.filename", file)
        self.model_file = directory / file
        self.layers = self._count(decoder, "num_hidden_layers")
        self.head_size = self._count(decoder, "head_size")
        self.context_tokens = self._count(model, "context_length")
        self.inputs = self._object(decoder, "inputs")
        self.outputs = self._object(decoder, "outputs")
        self.shares_buffers = self._object(content, "search").get("past_present_share_buffer") is True
        self.slides = "sliding_window" in decoder
        self.end_tokens = self._tokens(model.get("eos_token_id"))
        session = decoder.get("session_options")
        offered = session.get("provider_options") if isinstance(session, dict) else None
        names = [name for entry in offered or () if isinstance(entry, dict) for name in entry]
        if unknown := [name for name in names if name not in PROVIDERS]:
            raise self._wrong(f"an execution provider of {', '.join(PROVIDERS)}", unknown[0])
        self.provider = PROVIDERS[names[0]] if names else CPU

    def name(self, of: Mapping[str, Any], key: str, layer: int | None = None) -> str:
        """Name of an input or output, of a layer where it has one per layer."""
        value = of.get(key)
        if not isinstance(value, str) or (layer is not None and value.count("%d") != 1):
            raise self._wrong(f"a name of {key}", value)
        return value if layer is None else value.replace("%d", str(layer))

    def _object(self, of: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = of.get(key)
        if not isinstance(value, dict):
            raise self._wrong(f"an object {key!r}", value)
        return value

    def _count(self, of: Mapping[str, Any], key: str) -> int:
        value = of.get(key)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self._wrong(f"a positive {key}", value)
        return value

    def _tokens(self, value: Any) -> frozenset[int]:
        found = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int or token < 0 for token in found):
            raise self._wrong("tokens as eos_token_id", value)
        return frozenset(found)

    def _wrong(self, wanted: str, found: Any) -> InputError:
        return InputError(f"{wanted} in {self._path}", repr(found)[:200], "build or download the model again")


class OnnxRuntime(Closing):
    """An open decoder whose KV cache is one buffer per layer: every sequence has a row that is read and written there.

    Attention (GroupQueryAttention of ONNX Runtime) takes past and present as the same memory, so a step copies
    nothing of the cache. How much of a row counts is said by the attention mask alone: a rewind is a smaller number.
    """

    def __init__(self, path: Path, options: EngineOptions) -> None:
        _check_options(options)
        self._path = path
        if not path.is_dir():
            raise InputError("the directory of an ONNX model", f"none at {path}", "check the path")
        config = self._config = Config(path)
        read_tensors(config.model_file)  # refuses data outside the directory, and data that is missing
        self._tokenizer = Tokenizer(path)
        self._session: Any = _open_session(config, options)
        self._read_graph()
        if options.context_tokens > config.context_tokens:
            wanted = f"at most {config.context_tokens} tokens, the model's context"
            raise InputError(wanted, str(options.context_tokens), "open it with fewer `context_tokens`")
        self._capabilities = Capabilities(
            fork=True,
            rewind=True,
            batch=True,
            hidden_states=self._hidden_name is not None,
            input_embeddings=False,
            context_tokens=options.context_tokens,
            sequences=options.sequences,
            batch_tokens=options.batch_tokens,
        )
        self._cache = _Cache(self._kv_names, self._kv_shape, self._element, options, self.loaded["provider"] in _CUDA)
        self._ones = np.ones((1, options.context_tokens), np.int64)
        self._bindings: dict[tuple[int, int, bool, bool], Any] = {}
        self._slots: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        # without `only_execute_path_to_fetches` the head would run for a prompt whose logits nobody wants; with it,
        # ONNX Runtime looks for the needed nodes at every call
        self._run_options = [library().RunOptions() for _ in range(2)]
        for head, settings in enumerate(self._run_options):
            settings.log_severity_level = 4
            settings.only_execute_path_to_fetches = not head

    def _read_graph(self) -> None:
        config, session = self._config, self._session
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = {value.name: value for value in session.get_outputs()}
        if not config.shares_buffers or config.slides:
            raise self._unsuitable("past and present in one buffer of full length (GroupQueryAttention)")
        names = [
            tuple(
                config.name(side, f"{prefix}_{part}_names", layer)
                for side, prefix in ((config.inputs, "past"), (config.outputs, "present"))
            )
            for layer in range(config.layers)
            for part in ("key", "value")
        ]
        self._kv_names = [(past, present) for past, present in names]
        self._ids_name = config.name(config.inputs, "input_ids")
        self._mask_name = config.name(config.inputs, "attention_mask")
        self._positions_name = config.inputs.get("position_ids")
        self._logits_name = config.name(config.outputs, "logits")
        self._hidden_name = "hidden_states" if "hidden_states" in outputs else None
        known = {past for past, _ in self._kv_names} | {self._ids_name, self._mask_name, self._positions_name}
        made = {present for _, present in self._kv_names} | {self._logits_name}
        if odd := (known - {None}).symmetric_difference(inputs) or made - set(outputs):
            raise self._unsuitable(f"a decoder with only the inputs of {CONFIG_FILE}", repr(min(map(str, odd))))
        shapes = {tuple(inputs[past].shape[1:2]) for past, _ in self._kv_names}
        types = {inputs[past].type for past, _ in self._kv_names}
        if len(shapes) != 1 or len(types) != 1 or not types <= _ELEMENTS.keys():
            raise self._unsuitable("one shape and float type of all layers' caches", f"{shapes} of {types}")
        ((heads,),) = shapes
        logits = outputs[self._logits_name]
        if not isinstance(heads, int) or logits.type not in _ELEMENTS or not isinstance(logits.shape[-1], int):
            raise self._unsuitable("fixed numbers of KV heads and of logits", f"{heads} and {logits.shape}")
        self._element, self._logits_element = _ELEMENTS[types.pop()], _ELEMENTS[logits.type]
        self._kv_shape = (heads, self._config.head_size)
        self._size: int = logits.shape[-1]
        self._hidden_size = 0
        if self._hidden_name is not None:
            hidden = outputs[self._hidden_name]
            if hidden.type not in _ELEMENTS or not isinstance(hidden.shape[-1], int):
                raise self._unsuitable("hidden states of a fixed size", f"{hidden.type} {hidden.shape}")
            self._hidden_element, self._hidden_size = _ELEMENTS[hidden.type], hidden.shape[-1]

    def _unsuitable(self, wanted: str, found: str = "another graph") -> InputError:
        return InputError(
            f"{wanted} in {self._config.model_file}", found, "build it with edgekit: `edgekit build --recipe onnx-int4`"
        )

    @property
    def capabilities(self) -> Capabilities:
        """What this model can do; hidden states only where the graph was built to give them."""
        return self._capabilities

    @property
    def loaded(self) -> dict[str, str]:
        """The execution provider that really loaded."""
        return {"provider": str(self._session.get_providers()[0])}

    @property
    def kv_type(self) -> str:
        """Element type of the KV cache: `f32` or `f16`, the graph's own."""
        return "f16" if self._element is np.float16 else "f32"

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states; 0 where the graph gives none."""
        return self._hidden_size

    @property
    def vocabulary_size(self) -> int:
        """Width of a row of logits."""
        return self._size

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a generation, as `genai_config.json` and the tokenizer's own files say."""
        return self._config.end_tokens | self._tokenizer.end_tokens

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Encode text; `special` parses control tokens in it and adds the model's BOS."""
        self._check_open()
        return self._tokenizer.tokenize(text, special=special)

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """Decode tokens to bytes, piece by piece: the bytes of a sequence are the bytes of its parts joined.

        A SentencePiece model therefore keeps the space that its tokenizer puts before a text.
        """
        self._check_open()
        for token in tokens:
            self._check_token(token)
        return self._tokenizer.detokenize(tokens)

    def start(self) -> int:
        """Return a new empty sequence. Raises InputError when all are in use."""
        self._check_open()
        most = self._capabilities.sequences
        if len(self._slots) == most:
            found = "one more"
            raise InputError(f"at most {most} sequences alive", found, "release one, or open it with more `sequences`")
        sequence = min(set(range(most)) - self._slots.keys())
        self._slots[sequence] = min(set(range(most)) - set(self._slots.values()))
        self._lengths[sequence] = 0
        return sequence

    def fork(self, sequence: int) -> int:
        """Return a new sequence with a copy of the past; both continue bit for bit alike."""
        self._check_open()
        length = self.length(sequence)
        copy = self.start()
        self._cache.copy(self._slots[sequence], self._slots[copy], length)
        self._lengths[copy] = length
        return copy

    def truncate(self, sequence: int, length: int) -> None:
        """Forget everything after the first `length` positions: exact, and free."""
        self._check_open()
        held = self.length(sequence)
        if not 0 <= length <= held:
            raise InputError(f"a length from 0 to {held}", str(length), "truncate to a position that was stepped")
        self._lengths[sequence] = length

    def release(self, sequence: int) -> None:
        """Forget the sequence and free its row."""
        self.truncate(sequence, 0)
        del self._lengths[sequence], self._slots[sequence]

    def length(self, sequence: int) -> int:
        """Positions that the sequence holds."""
        if sequence not in self._lengths:
            raise InputError("a sequence from start() or fork()", f"{sequence}, which is not alive", "start one")
        return self._lengths[sequence]

    def step(self, entries: Sequence[Entry], *, hidden_states: bool = False) -> StepOutput:
        """Compute entries (several of one sequence follow each other) and return copies of the wanted rows.

        Sequences with one entry each are computed together, whatever their lengths; those with several one after
        the other, at most `batch_tokens` at once. Nothing is computed when an entry is wrong.

        Raises:
            InputError: an entry is malformed, its sequence is not alive, or a sequence would outgrow the context.
            ToolError: ONNX Runtime failed; the sequences are as they were before the failing call.
        """
        self._check_open()
        parts = self._check_entries(entries)
        if hidden_states and self._hidden_name is None:
            found = "one built without them"
            raise InputError("a model that gives hidden states", found, "build it with --set onnx.hidden_states=true")
        rows = sum(entry.wants_logits for entry in entries)
        logits = np.empty((rows, self._size), np.float32)
        hidden = np.empty((rows, self._hidden_size), np.float32) if hidden_states else None
        singles = [sequence for sequence, part in parts.items() if len(part) == 1]
        most = self._capabilities.batch_tokens
        for sequence, part in parts.items():
            if len(part) > 1 or len(singles) == 1:
                for chunk in _chunks(part, most):
                    self._run([sequence], [chunk], logits, hidden)
        if len(singles) > 1:
            for first in range(0, len(singles), most):
                base = self._gather(singles[first : first + most])
                order = sorted(singles[first : first + most], key=self._slots.__getitem__)
                assert self._slots[order[0]] == base  # neighbours, by _gather
                self._run(order, [parts[sequence] for sequence in order], logits, hidden)
        return StepOutput(logits, hidden)

    def _check_entries(self, entries: Sequence[Entry]) -> dict[int, list[tuple[int, int]]]:
        """By sequence: (token, row of the output or -1) of its entries."""
        parts: dict[int, list[tuple[int, int]]] = {}
        row = 0
        for entry in entries:
            self.length(entry.sequence)
            if (entry.token is None) == (entry.embedding is None):
                raise InputError("an entry with a token or an embedding", "both or neither", "give exactly one")
            if entry.token is None:
                found = "an ONNX decoder that takes tokens"
                raise InputError("a model that takes input embeddings", found, "give tokens, or use another engine")
            self._check_token(entry.token)
            parts.setdefault(entry.sequence, []).append((entry.token, row if entry.wants_logits else -1))
            row += entry.wants_logits
        most = self._capabilities.context_tokens
        for sequence, part in parts.items():
            if (length := self._lengths[sequence] + len(part)) > most:
                found = f"{length} in sequence {sequence}"
                raise InputError(
                    f"a sequence of at most {most} tokens", found, "open the model with more `context_tokens`"
                )
        return parts

    def _gather(self, sequences: Sequence[int]) -> int:
        """Bring sequences into neighbouring rows of the cache; moves as few as it can and returns the first row."""
        count = len(sequences)
        rows = {self._slots[sequence]: sequence for sequence in sequences}
        firsts = range(self._capabilities.sequences - count + 1)
        base = max(firsts, key=lambda first: sum(first <= row < first + count for row in rows))
        window = range(base, base + count)
        owners = {row: sequence for sequence, row in self._slots.items()}
        for free, stray in zip(
            [row for row in window if row not in rows], [row for row in rows if row not in window], strict=True
        ):
            moved, other = rows[stray], owners.get(free)
            if other is None:
                self._cache.copy(stray, free, self._lengths[moved])
            else:
                self._cache.swap(stray, free, max(self._lengths[moved], self._lengths[other]))
                self._slots[other] = stray
            self._slots[moved] = free
        return base

    def _run(
        self,
        sequences: Sequence[int],
        parts: Sequence[Sequence[tuple[int, int]]],
        logits: FloatArray,
        hidden: FloatArray | None,
    ) -> None:
        """Compute entries of sequences in neighbouring rows, equally many of each."""
        tokens = np.array([[token for token, _ in part] for part in parts], np.int64)
        rows = np.array([[row for _, row in part] for part in parts]).ravel()
        count, width = tokens.shape
        before = np.array([self._lengths[sequence] for sequence in sequences])
        totals = before + width
        mask = self._ones[:, : totals[0]]
        if count > 1:
            mask = (np.arange(totals.max()) < totals[:, None]).astype(np.int64)
        wanted = np.flatnonzero(rows >= 0)
        base, head = self._slots[sequences[0]], wanted.size > 0
        binding = self._binding(base, count, head, head and hidden is not None)
        feeds = {self._ids_name: tokens, self._mask_name: mask}
        if self._positions_name is not None:
            feeds[self._positions_name] = np.ascontiguousarray(before[:, None] + np.arange(width))
        for name, value in feeds.items():
            binding.bind_input(name, "cpu", 0, np.int64, value.shape, value.ctypes.data)
        results: list[tuple[FloatArray, npt.NDArray[Any]]] = []
        if head:
            whole = logits.dtype == self._logits_element and wanted.size == rows.size and (np.diff(rows) == 1).all()
            # a run whose rows all follow each other is written where it belongs
            out = (
                logits[rows[0] : rows[-1] + 1].reshape(count, width, -1)
                if whole
                else np.empty((count, width, self._size), self._logits_element)
            )
            binding.bind_output(self._logits_name, "cpu", 0, out.dtype, out.shape, out.ctypes.data)
            if not whole:
                results.append((logits, out))
            if hidden is not None:
                states = np.empty((count, width, self._hidden_size), self._hidden_element)
                binding.bind_output(self._hidden_name, "cpu", 0, states.dtype, states.shape, states.ctypes.data)
                results.append((hidden, states))
        try:
            self._session.run_with_iobinding(binding, self._run_options[head])
            binding.synchronize_outputs()
        except Exception as error:  # onnxruntime's own tree; all mean that this call failed
            raise ToolError(
                f"a step of {tokens.size} tokens", _first_line(error), "use a shorter context or smaller batches"
            ) from None
        for out_rows, values in results:
            out_rows[rows[wanted]] = values.reshape(rows.size, -1)[wanted]
        for sequence, total in zip(sequences, totals.tolist(), strict=True):
            self._lengths[sequence] = total

    def _binding(self, base: int, count: int, head: bool, hidden: bool) -> Any:
        """Inputs and outputs of a run over `count` rows of the cache, the cache bound: once for every such run."""
        key = (base, count, head, hidden)
        if key not in self._bindings:
            binding = self._bindings[key] = self._session.io_binding()
            self._cache.bind(binding, base, count)
        return self._bindings[key]

    def _check_token(self, token: int) -> None:
        if not 0 <= token < self._size:
            raise InputError(f"a token from 0 to {self._size - 1}", str(token), "use this model's tokenizer")

    def _check_open(self) -> None:
        if self._session is None:
            raise InputError("an open model", f"{self._path} was closed", "open it again")

    def close(self) -> None:
        """Free the model; later calls raise InputError."""
        self._bindings = {}
        self._session = self._cache = None  # type: ignore[assignment]


class _Cache:
    """Keys and values of all layers, each a buffer of shape (sequences, heads, context, head size)."""

    def __init__(
        self,
        names: Sequence[tuple[str, str]],
        shape: tuple[int, int],
        element: type[np.generic],
        options: EngineOptions,
        cuda: bool,
    ) -> None:
        heads, size = shape
        self._names = names
        self._element = np.dtype(element)
        self._shape = (options.sequences, heads, options.context_tokens, size)
        self._row_bytes = heads * options.context_tokens * size * self._element.itemsize
        total = self._row_bytes * options.sequences * len(names)
        wanted = f"a KV cache of {options.sequences} x {options.context_tokens} tokens"
        if total > _MAX_CACHE_BYTES:
            raise InputError(wanted, f"{total} bytes", "use a shorter context or fewer sequences")
        self._device = "cuda" if cuda else "cpu"
        try:
            # zeros are only reserved; what no sequence reaches is never touched
            self._buffers: list[Any] = [self._allocate() for _ in names]
        except MemoryError:
            raise ToolError(wanted, f"no {total} bytes of memory", "use a shorter context or fewer sequences") from None

    def _allocate(self) -> Any:
        if self._device == "cpu":
            return np.zeros(self._shape, self._element)
        return library().OrtValue.ortvalue_from_shape_and_type(self._shape, self._element, self._device, 0)

    def bind(self, binding: Any, base: int, count: int) -> None:
        """Bind `count` rows from `base` on as past and as present."""
        shape = (count, *self._shape[1:])
        for (past, present), buffer in zip(self._names, self._buffers, strict=True):
            start = buffer.ctypes.data if self._device == "cpu" else buffer.data_ptr()
            place = (self._device, 0, self._element, shape, start + base * self._row_bytes)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row over another's."""
        for values in self._edit():
            values[target, :, :length] = values[source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first `length` positions of two rows."""
        for values in self._edit():
            kept = values[one, :, :length].copy()
            values[one, :, :length] = values[other, :, :length]
            values[other, :, :length] = kept

    def _edit(self) -> Iterator[npt.NDArray[Any]]:
        for buffer in self._buffers:
            if self._device == "cpu":
                yield buffer
            else:  # the package has no copy within a device
                values = buffer.numpy()
                yield values
                buffer.update_inplace(values)


def _open_session(config: Config, options: EngineOptions) -> Any:
    api = library()
    settings = api.SessionOptions()
    settings.intra_op_num_threads = options.cpu_threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    wanted = config.provider if options.accelerate else CPU
    offered = api.get_available_providers()
    if options.fall_back and wanted not in offered:
        wanted = CPU
    if wanted not in offered:
        raise ToolError(
            f"ONNX Runtime with {wanted}, which {config.model_file} was made for",
            f"only {', '.join(offered)}",
            "install the onnxruntime of that device, or open the model without acceleration",
        )
    try:
        session = api.InferenceSession(str(config.model_file), settings, providers=list(dict.fromkeys((wanted, CPU))))
    except Exception as error:  # onnxruntime's own tree; all mean that it takes no such model
        raise InputError(
            f"a model at {config.model_file} that ONNX Runtime loads",
            _first_line(error),
            "build or download the model again",
        ) from None
    # asked for a provider that does not start (no driver, no device), it warns and goes on with the CPU
    if session.get_providers()[0] != wanted and not options.fall_back:
        raise ToolError(
            f"{wanted}, which {config.model_file} was made for",
            f"{session.get_providers()[0]} took its place",
            "check the device's driver, or open the model without acceleration",
        )
    return session


def _chunks(part: Sequence[tuple[int, int]], most: int) -> Iterator[Sequence[tuple[int, int]]]:
    """Split a sequence's entries into runs; those before the first wanted row go without the head."""
    first = next((i for i, (_, row) in enumerate(part) if row >= 0), len(part))
    for entries in (part[:first], part[first:]):
        for start in range(0, len(entries), most):
            yield entries[start : start + most]


def _check_options(options: EngineOptions) -> None:
    options.check_counts()
    if options.kv_type not in _UNQUANTIZED:
        found = f"{options.kv_type!r}; an ONNX graph's cache has the graph's type"
        raise InputError("a KV cache that is not quantized", found, f"use {KV_TYPES[0]}")


def _read_object(path: Path, what: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise InputError(f"at most {_MAX_JSON_BYTES} bytes of JSON in {path}", "more", "use the original file")
        content = json.loads(path.read_bytes())
    except OSError as error:
        found = error.strerror or str(error)
        raise InputError(f"{what}: a file {path.name} in {path.parent}", found, "build the model again") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"JSON in {path}", str(error)[:200], "build or download the model again") from None
    if not isinstance(content, dict):
        raise InputError(f"a JSON object in {path}", type(content).__name__, "build or download the model again")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:300]
