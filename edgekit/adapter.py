"""What a user may call an adapter, resolved to files with digests: headers are read, no weights, and no torch.

An adapter is a directory as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`. Its configuration
is a stranger's: PEFT would take regular expressions, names of modules to import and places to fetch from out of it.
Only options that are known here go on to PEFT; the modules to change are those that the weights are for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgekit.artifact import Artifact, Manifest, describe_files, file_sha256
from edgekit.errors import InputError, suggest
from edgekit.formats import safetensors
from edgekit.formats.safetensors import TensorInfo
from edgekit.model import ModelShape, Source, gguf_names, read_user_json

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PROMPT_TENSOR = "prompt_embeddings"
"""The one tensor of a prompt adapter: PEFT saves what its encoder gives, not the encoder."""

MERGED = ("lora", "dora", "rslora", "adalora", "ia3", "loha", "lokr", "oft", "vera")
"""Methods that become part of the weights."""
PREPENDED = ("prompt", "ptuning", "prefix")
"""Methods that stand before the text: they become a precomputed state."""
_METHODS = {
    "LORA": "lora", "ADALORA": "adalora", "IA3": "ia3", "LOHA": "loha", "LOKR": "lokr", "OFT": "oft", "VERA": "vera",
    "PROMPT_TUNING": "prompt", "P_TUNING": "ptuning", "PREFIX_TUNING": "prefix",
}  # fmt: skip
_REFUSED = {
    "ADAPTION_PROMPT": "it adds gated attention layers, which no engine here has",
    "XLORA": "it mixes adapters by a gate at run time",
    "POLY": "it routes between adapters at run time",
    "BOTTLENECK": "it adds layers with a non-linearity, which cannot become part of the weights",
    "MULTITASK_PROMPT_TUNING": "it needs the task's number with every request",
}
_PASSED = {
    "LORA": ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "lora_bias", "alpha_pattern", "modules_to_save",
             "trainable_token_indices"),
    "ADALORA": ("r", "target_r", "init_r", "lora_alpha", "rank_pattern", "bias", "modules_to_save"),
    "IA3": ("modules_to_save",),
    "LOHA": ("r", "alpha", "alpha_pattern", "modules_to_save"),
    "LOKR": ("r", "alpha", "alpha_pattern", "decompose_both", "decompose_factor", "modules_to_save"),
    "OFT": ("r", "oft_block_size", "bias", "coft", "eps", "block_share", "use_cayley_neumann",
            "num_cayley_neumann_terms", "modules_to_save"),
    "VERA": ("r", "projection_prng_key", "save_projection", "bias", "modules_to_save"),
    "PROMPT_TUNING": ("num_virtual_tokens",),
    "P_TUNING": ("num_virtual_tokens",),
    "PREFIX_TUNING": ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim"),
}  # fmt: skip
"""Options that decide what an adapter computes."""
_TRAINING = frozenset(
    [
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "feedforward_modules",
        "fan_in_fan_out",
        "runtime_config",
        "lora_dropout",
        "rank_dropout",
        "module_dropout",
        "rank_dropout_scale",
        "vera_dropout",
        "init_lora_weights",
        "init_weights",
        "init_ia3_weights",
        "d_initial",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "qalora_group_size",
        "use_effective_conv2d",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
        "token_dim",
        "num_transformer_submodules",
        "num_attention_heads",
        "num_layers",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
        "prefix_projection",
        "quantization_config",
        "load_in_4bit",
        "load_in_8bit",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "bnb_4bit_compute_dtype",
    ]
)
"""Options that decided how it was trained, or that its tensors say again."""
_OWN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PREFIX = "base_model.model."
_HINT = "save it again with PEFT's save_pretrained, or check the path"


@dataclass(frozen=True)
class Contents:
    """What the files of an adapter say."""

    peft_type: str
    method: str
    options: Mapping[str, Any]
    """Options for PEFT's configuration class of `peft_type`; without prompt adapters' shapes."""
    modules: Mapping[str, Mapping[str, TensorInfo]]
    """By module of the base model: its tensors, by what follows the module's name."""
    whole: Mapping[str, TensorInfo]
    """Parameters of the base model that the adapter replaces (`modules_to_save`, biases), by name."""
    shared: Mapping[str, TensorInfo]
    """Tensors of no module: a shared projection, the virtual tokens."""

    @property
    def scalable(self) -> bool:
        """Whether a weight other than 1 means something: the adapter adds to matrices, and does nothing else."""
        replaces = self.whole or any("trainable_tokens_delta" in name for t in self.modules.values() for name in t)
        return self.method in MERGED and self.method != "oft" and not replaces


@dataclass(frozen=True)
class Adapter:
    """A resolved adapter and how strongly it is applied."""

    artifact: Artifact
    """Of kind `adapter`; facts: peft_type, method, base_model, target_modules, trained_on, double_quant, rank."""
    weight: float
    uri: str

    @property
    def method(self) -> str:
        """One of `MERGED` or `PREPENDED`."""
        return str(self.artifact.facts["method"])


def resolve_adapter(text: str) -> Adapter:
    """Turn `DIR` or `DIR=WEIGHT` into files with the sha256 of each.

    Raises InputError when it is no such directory, the files are unsafe, damaged or incomplete, or the method can
    neither be merged nor precomputed; `found` says why.
    """
    name, weight = _split_weight(text)
    path = Path(name).expanduser()
    if not path.is_dir():
        found = f"{path}, which is a file" if path.exists() else f"no directory at {path}"
        raise InputError("an adapter's directory, as PEFT saves it", found, "check the path")
    contents = read_adapter(path)
    if weight != 1 and not contents.scalable:
        raise InputError(
            f"no weight for {path}",
            f"={weight:g}, which has no meaning for {_what(contents)}",
            f"--adapter {path}",
        )
    config = read_user_json(path / CONFIG)
    names = [name for name in (CONFIG, WEIGHTS, CARD) if (path / name).is_file()]
    facts = {
        "peft_type": contents.peft_type,
        "method": contents.method,
        "base_model": str(config.get("base_model_name_or_path") or ""),
        "target_modules": sorted({module.rpartition(".")[2] for module in contents.modules}),
        "rank": _rank(contents),
        **_trained_on(contents, config, path / CARD),
    }
    manifest = Manifest(kind="adapter", files=describe_files(path, names), facts=facts)
    return Adapter(Artifact(path, manifest), weight, str(path.absolute()))


def read_adapter(path: Path) -> Contents:
    """Read configuration and header of an adapter's directory. Raises InputError as `resolve_adapter` does."""
    if not (path / WEIGHTS).is_file():
        _refuse_without_weights(path)
    config = read_user_json(path / CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _METHODS:
        why = _REFUSED.get(str(kind), "it can neither be merged into weights nor precomputed")
        meant = "" if str(kind) in _REFUSED else suggest(str(kind), _METHODS)
        found = f"{kind!r} in {path / CONFIG}{meant}: {why}"
        raise InputError(f"an adapter of a known kind ({', '.join(_METHODS)})", found, "choose another adapter")
    options = _options(kind, config, path)
    tensors = safetensors.read_header(path / WEIGHTS)
    if not tensors:
        raise InputError(f"tensors in {path / WEIGHTS}", "none", _HINT)
    modules, whole, shared = _group(kind, tensors, path)
    method = "dora" if options.get("use_dora") else "rslora" if options.get("use_rslora") else _METHODS[kind]
    contents = Contents(kind, method, options, modules, whole, shared)
    if method in PREPENDED:
        if set(tensors) != {PROMPT_TENSOR} or len(tensors[PROMPT_TENSOR].shape) != 2:
            raise InputError(f"one matrix {PROMPT_TENSOR} in {path / WEIGHTS}", f"{min(tensors)!r}", _HINT)
    elif not modules:
        raise InputError(f"tensors for modules of a model in {path / WEIGHTS}", f"only {min(tensors)!r}", _HINT)
    return contents


def open_adapter(artifact: Artifact) -> Contents:
    """Read an adapter whose files must still be those that were resolved. Raises InputError when they changed."""
    for name, entry in artifact.manifest.files.items():
        path = artifact.path / name
        if not path.is_file() or file_sha256(path) != entry.sha256:
            raise InputError(f"sha256 {entry.sha256[:12]}... in {path}", "other content than before", "build again")
    return read_adapter(artifact.path)


def side_adapters(side: Mapping[str, Artifact]) -> list[Artifact]:
    """The adapters among a stage's further artifacts, in the order of the command line."""
    names = [name for name in side if re.fullmatch(r"adapter\.\d+", name)]
    return [side[name] for name in sorted(names, key=lambda name: int(name.partition(".")[2]))]


def check_adapter(adapter: Adapter, source: Source, shape: ModelShape) -> tuple[str, ...]:
    """Compare an adapter with the model it is to change, by headers alone; returns notes for the user.

    Raises InputError that names the first tensor whose module the model lacks, or with both shapes where they differ,
    and where merging would take a tied head apart.
    """
    contents = read_adapter(adapter.artifact.path)
    place = adapter.artifact.path
    if contents.method in PREPENDED:
        _check_prompt(contents, shape, place)
    else:
        _check_modules(contents, shape, place)
    return tuple(_notes(adapter, contents, source))


def _notes(adapter: Adapter, contents: Contents, source: Source) -> list[str]:
    notes = []
    facts, place = adapter.artifact.facts, adapter.artifact.path.name
    base, name = facts["base_model"], str(source.artifact.facts["name"])
    if base and _plain(base) not in (_plain(name), _plain(source.uri)):
        notes.append(f"{place} was trained on {base!r}, not on {name!r}; its shapes fit.")
    if facts["trained_on"] in ("int8", "fp4"):
        notes.append(
            f"{place} was trained on a base in {facts['trained_on']}; it is merged onto the original weights, "
            "which differ a little."
        )
    if contents.method == "vera" and not contents.shared:
        notes.append(f"{place} keeps no projection: PEFT draws it again from its seed, here and now.")
    return notes


def _plain(name: str) -> str:
    """A model's name without owner, revision, punctuation and what quantized copies are called."""
    last = re.split(r"[/\\:]", name.rstrip("/\\").partition("@")[0])[-1].lower()
    return re.sub(r"[^a-z0-9]", "", re.sub(r"(-unsloth)?-bnb-4bit$", "", last))


def _split_weight(text: str) -> tuple[str, float]:
    name, equals, number = text.rpartition("=")
    if not equals or Path(text).expanduser().is_dir():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight == 0:
        raise InputError("a finite weight other than 0 after =", f"{number!r} in {text!r}", f"--adapter {name}=0.5")
    return name, weight


def _refuse_without_weights(path: Path) -> None:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
    if pickles:
        raise InputError(
            f"{WEIGHTS} in {path}",
            f"only pickled weights, which can run code when loaded: {', '.join(pickles[:5])}",
            "ask the publisher for safetensors, or save it again with PEFT if you trust it",
        )
    raise InputError(f"{WEIGHTS} in {path}", "none", _HINT)


def _options(kind: str, config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The options to hand to PEFT, checked. Raises InputError for those that change the result in an unknown way."""
    place = path / CONFIG
    passed = {key: config[key] for key in _PASSED[kind] if config.get(key) is not None}
    for key in config.keys() - set(_PASSED[kind]) - _TRAINING:
        if config[key]:
            raise InputError(f"options of {kind} that can be merged in {place}", f"{key}", "merge it with its own tool")
    initial = config.get("init_lora_weights", True)
    if str(initial).lower().startswith(_OWN_BASE):
        raise InputError(
            f"an adapter of the unchanged base in {path}",
            f"init_lora_weights {initial!r}, which changed the base's weights as well",
            "save it with save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    for key, value in passed.items():
        if not _CHECKS.get(key, _is_number)(value):
            raise InputError(f"a usable {key} in {place}", repr(value)[:80], _HINT)
    return MappingProxyType(passed)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 1 << 16


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(name, str) and re.fullmatch(r"[\w.]{1,200}", name) for name in value
    )


def _is_alphas(value: Any) -> bool:
    # PEFT takes the keys for regular expressions; without groups and many repetitions these end soon
    def short(key: str) -> bool:
        return bool(re.fullmatch(r"[\w.^$\\\[\]*+-]{1,200}", key)) and sum(map(key.count, "*+")) <= 3

    return isinstance(value, dict) and all(short(key) and _is_number(number) for key, number in value.items())


def _is_masks(value: Any) -> bool:
    return isinstance(value, dict) and all(
        re.fullmatch(r"[\w.]{1,200}", key) and isinstance(mask, list) and all(type(bit) is bool for bit in mask)
        for key, mask in value.items()
    )


def _is_tokens(value: Any) -> bool:
    if isinstance(value, dict):
        return _is_names(list(value)) and all(_is_tokens(tokens) for tokens in value.values())
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "target_r": _is_rank,
    "init_r": _is_rank,
    "num_virtual_tokens": _is_rank,
    "bias": lambda value: isinstance(value, str) and value in ("none", "all", "lora_only", "oft_only", "vera_only"),
    "alpha_pattern": _is_alphas,
    "rank_pattern": _is_masks,
    "modules_to_save": _is_names,
    "trainable_token_indices": _is_tokens,
}


_PARTS = {
    "LORA": r"lora_(A|B)\.(weight|bias)|lora_embedding_[AB]|lora_magnitude_vector(\.weight)?",
    "ADALORA": r"lora_[ABE]|ranknum",
    "IA3": r"ia3_l",
    "LOHA": r"hada_w[12]_[ab]",
    "LOKR": r"lokr_w[12](_[ab])?",
    "OFT": r"oft_R\.weight",
    "VERA": r"vera_lambda_[bd]",
}
"""What follows a module's name in the name of a tensor, by kind; any kind may train single tokens too."""
_TOKENS = r"token_adapter\.trainable_tokens_delta"
_Groups = tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo], dict[str, TensorInfo]]


def _group(kind: str, tensors: Mapping[str, TensorInfo], path: Path) -> _Groups:
    modules: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    shared: dict[str, TensorInfo] = {}
    part = re.compile(rf"(.+?)\.({_PARTS[kind]}|{_TOKENS})" if kind in _PARTS else r"(?!)")
    for name, info in tensors.items():
        inner = name.removeprefix(_PREFIX)
        if inner == name:
            if name not in (PROMPT_TENSOR, "base_model.vera_A", "base_model.vera_B"):
                raise InputError(f"tensors of PEFT's {kind} in {path / WEIGHTS}", f"{name!r}", _HINT)
            shared[name] = info
        elif found := part.fullmatch(inner):
            modules.setdefault(found[1], {})[found[2]] = info
        elif inner.endswith((".weight", ".bias")) and not re.search(r"lora|ia3|hada|lokr|oft|vera|adapter", inner):
            whole[inner.replace(".base_layer.", ".")] = info
        else:
            raise InputError(f"tensors of PEFT's {kind} in {path / WEIGHTS}", f"{name!r}", _HINT)
    return modules, whole, shared


def _rank(contents: Contents) -> int | None:
    """The largest rank of a low-rank method; the number of virtual tokens of a prompt; None where there is none."""
    if contents.method in PREPENDED:
        return contents.shared[PROMPT_TENSOR].shape[0]
    ranks = [
        info.shape[0]
        for parts in contents.modules.values()
        for part, info in parts.items()
        if part in ("lora_A.weight", "lora_embedding_A", "lora_A", "hada_w1_b", "lokr_w2_b", "vera_lambda_d")
        and info.shape
    ]
    return max(ranks, default=None)


def _trained_on(contents: Contents, config: Mapping[str, Any], card: Path) -> dict[str, Any]:
    """Precision of the base during training, as far as anything says so: `nf4`, `fp4`, `int8`, `full`, `unknown`.

    Trainers write it into the configuration, PEFT's model cards list bitsandbytes' settings, and the names of
    published quantized bases end in `bnb-4bit` (NF4 with double quantization).
    """
    told = config.get("quantization_config")
    told = {**config, **told} if isinstance(told, dict) else dict(config)
    text = card.read_text(errors="replace")[: 1 << 20] if card.is_file() else ""
    listed = dict(re.findall(r"^- (load_in_[48]bit|bnb_4bit_\w+): (\S+)\s*$", text, re.MULTILINE))

    def says(key: str) -> bool:
        return str(told.get(key, listed.get(key, ""))).lower() == "true"

    if says("load_in_4bit") or "bnb_4bit_quant_type" in told:
        # bitsandbytes' own default is fp4
        kind = str(told.get("bnb_4bit_quant_type", listed.get("bnb_4bit_quant_type", "fp4"))).lower()
        return {"trained_on": "nf4" if kind == "nf4" else "fp4", "double_quant": says("bnb_4bit_use_double_quant")}
    if says("load_in_8bit"):
        return {"trained_on": "int8", "double_quant": False}
    if str(config.get("base_model_name_or_path") or "").rstrip("/").endswith("bnb-4bit"):
        return {"trained_on": "nf4", "double_quant": True}
    # PEFT has no layers of these methods over quantized ones
    return {"trained_on": "full" if contents.method in ("loha", "lokr") else "unknown", "double_quant": False}


def _check_prompt(contents: Contents, shape: ModelShape, place: Path) -> None:
    found = contents.shared[PROMPT_TENSOR].shape
    tokens = contents.options.get("num_virtual_tokens", found[0])
    width = shape.hidden
    if contents.method == "prefix":
        width = 2 * shape.layers * shape.kv_heads * shape.key_dim
        heads = contents.options.get("num_attention_heads", shape.kv_heads)
        if shape.key_dim != shape.value_dim or heads != shape.kv_heads:
            raise InputError(f"{shape.kv_heads} key-value heads in {place}", str(heads), "use the adapter's own base")
    if found != (tokens, width):
        raise InputError(
            f"{PROMPT_TENSOR} of shape {(tokens, width)} in {place}", str(found), "use the model it was trained on"
        )
    if tokens >= shape.context_tokens:
        raise InputError(f"fewer than {shape.context_tokens} virtual tokens", str(tokens), "use another adapter")


def _check_modules(contents: Contents, shape: ModelShape, place: Path) -> None:
    weights = {tensor.name: tuple(reversed(tensor.shape)) for tensor in shape.tensors}
    tied = "output.weight" not in weights

    def shape_of(parameter: str, tensor: str) -> tuple[int, ...]:
        try:
            name = gguf_names(shape.architecture, shape.layers, [parameter])[parameter]
        except InputError:
            name = None
        if tied and name in ("output.weight", "token_embd.weight") and "trainable_tokens_delta" not in tensor:
            raise InputError(
                "an adapter that leaves a tied head and embedding alone",
                f"{tensor!r} in {place}, which would take them apart",
                "merge it with PEFT into a model whose head is untied, and build that",
            )
        if name not in weights:
            found = f"none: {parameter.rpartition('.')[0]} of {tensor!r} in {place}"
            raise InputError(f"every module of the adapter in the {shape.architecture} model", found, _OTHER_BASE)
        return weights[name]

    for name, info in contents.whole.items():
        if info.shape != (wanted := shape_of(name, name)):
            raise _differs(name, wanted, info.shape, place)
    for module, parts in contents.modules.items():
        rows, columns = (*shape_of(f"{module}.weight", f"{module}.{min(parts)}"), 1)[:2]
        _check_parts(contents, module, {n: i.shape for n, i in parts.items()}, rows, columns, place)
    if "base_model.vera_A" in contents.shared:
        rank = int(contents.options.get("r", 0))
        for name, axis in (("base_model.vera_A", 0), ("base_model.vera_B", 1)):
            found = contents.shared[name].shape if name in contents.shared else ()
            if len(found) != 2 or found[axis] != rank:
                raise _differs(name, (rank, "...") if axis == 0 else ("...", rank), found, place)
    if contents.method == "vera" and bool(contents.shared) != bool(contents.options.get("save_projection", True)):
        raise InputError(f"save_projection in {place / CONFIG} that fits the tensors", "the opposite", _HINT)


_OTHER_BASE = "use the model that it was trained on"
_Shape = tuple[int | str, ...]


def _check_parts(
    contents: Contents, module: str, found: Mapping[str, tuple[int, ...]], rows: int, columns: int, place: Path
) -> None:
    """Compare the tensors of one module with its weight of shape (rows, columns)."""
    delta = "token_adapter.trainable_tokens_delta"
    if delta in found:
        if len(found[delta]) != 2 or found[delta][1] != columns:
            raise _differs(f"{module}.{delta}", ("tokens", columns), found[delta], place)
        found = {name: shape for name, shape in found.items() if name != delta}
        if not found:
            return
    forms = _forms(contents, found, rows, columns)
    form = next((f for f in forms if found.keys() == f.keys()), None)
    if form is None:
        missing = min(forms[0].keys() - found.keys(), default=None)
        text = f"no {missing}" if missing else f"{min(found.keys() - forms[0].keys())} as well"
        raise InputError(f"{', '.join(sorted(forms[0]))} for {module} in {place}", text, _HINT)
    for part, wanted in form.items():
        if found[part] != wanted:
            raise _differs(f"{module}.{part}", wanted, found[part], place)


def _forms(
    contents: Contents, found: Mapping[str, tuple[int, ...]], rows: int, columns: int
) -> tuple[dict[str, tuple[int, ...]], ...]:
    """The sets of tensors, with their shapes, that a method may have for a weight of shape (rows, columns)."""

    def size(part: str, axis: int) -> int:
        shape = found.get(part, ())
        return shape[axis] if axis < len(shape) else 0

    kind = contents.peft_type
    if kind == "LORA":
        r, e = size("lora_A.weight", 0), size("lora_embedding_A", 0)
        linear: dict[str, tuple[int, ...]] = {"lora_A.weight": (r, columns), "lora_B.weight": (rows, r)}
        table: dict[str, tuple[int, ...]] = {"lora_embedding_A": (e, rows), "lora_embedding_B": (columns, e)}
        if contents.options.get("use_dora"):
            linear["lora_magnitude_vector"] = (rows,)
            table["lora_magnitude_vector"] = (
                (columns, 1) if len(found.get("lora_magnitude_vector", ())) == 2 else (columns,)
            )
        if contents.options.get("lora_bias"):
            linear["lora_B.bias"] = (rows,)
        return linear, table
    if kind == "ADALORA":
        r = size("lora_A", 0)
        return ({"lora_A": (r, columns), "lora_B": (rows, r), "lora_E": (r, 1)},)
    if kind == "IA3":
        return ({"ia3_l": (1, columns) if size("ia3_l", 0) == 1 and rows != 1 else (rows, 1)},)
    if kind == "LOHA":
        pairs = [(f"hada_w{i}_{side}", side) for i in (1, 2) for side in "ab"]
        r = size("hada_w1_b", 0)
        return ({name: (rows, r) if side == "a" else (r, columns) for name, side in pairs},)
    if kind == "LOKR":
        return tuple(_kronecker(found, rows, columns))
    if kind == "OFT":
        # a skew-symmetric block of size b has b (b - 1) / 2 free entries
        block = (1 + math.isqrt(1 + 8 * size("oft_R.weight", 1))) // 2
        blocks = 1 if contents.options.get("block_share") else columns // max(block, 1)
        whole = columns % max(block, 1) == 0
        return ({"oft_R.weight": (blocks if whole else 0, block * (block - 1) // 2)},)
    return ({"vera_lambda_b": (rows,), "vera_lambda_d": (contents.options.get("r", 0),)},)


def _kronecker(found: Mapping[str, tuple[int, ...]], rows: int, columns: int) -> list[dict[str, tuple[int, ...]]]:
    """Forms of LoKr: two factors, each whole or a product of two, whose sizes multiply to the weight's."""

    def factor(number: int) -> tuple[tuple[int, int], set[str]]:
        name = f"lokr_w{number}"
        pair = found.get(f"{name}_a", (0,)), found.get(f"{name}_b", (0,))
        if name in found:
            shape = found[name]
            return (shape[0], shape[-1]) if shape else (0, 0), {name}
        return (pair[0][0], pair[1][-1]), {f"{name}_a", f"{name}_b"}

    (a, b), first = factor(1)
    c, d = rows // max(a, 1), columns // max(b, 1)
    sizes = {1: (a, b), 2: (c, d)} if a * c == rows and b * d == columns else {1: (0, 0), 2: (0, 0)}
    form: dict[str, tuple[int, ...]] = {}
    for name in first | factor(2)[1]:
        out, inner = sizes[int(name[6])]
        rank = found.get(f"{name[:7]}_b", (0,))[0]
        form[name] = (out, inner) if len(name) == 7 else (out, rank) if name.endswith("_a") else (rank, inner)
    return [form]


def _differs(name: str, wanted: _Shape, found: tuple[int, ...], place: Path) -> InputError:
    text = "(" + ", ".join(map(str, wanted)) + ")"
    return InputError(f"{name} of shape {text} for this model", f"shape {found} in {place}", _OTHER_BASE)


def _what(contents: Contents) -> str:
    return (
        contents.method if contents.method in (*PREPENDED, "oft") else f"an adapter that replaces {_replaced(contents)}"
    )


def _replaced(contents: Contents) -> str:
    return min(contents.whole, default="the embeddings of tokens")
