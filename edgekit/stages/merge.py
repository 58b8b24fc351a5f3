"""Adapters become part of the weights: merged by PEFT in float32, one after the other, and checked.

An adapter that was trained on a base quantized to NF4 (QLoRA, Dettmers et al., arXiv:2305.14314) corrects the error of
that base as well: it belongs onto the base's weights as NF4 gives them back, not onto the original ones.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import FiniteFloat, PositiveInt

from edgekit.adapter import MERGED, WEIGHTS, Contents, open_adapter, side_adapters
from edgekit.artifact import Artifact
from edgekit.calibration import Split, find_text_set
from edgekit.errors import InputError, ToolError
from edgekit.huggingface import open_checkpoint, quiet, text_windows
from edgekit.model import ModelShape
from edgekit.stage import Facts, StageContext, StageParams, stage
from edgekit.tools import copy_file

TOLERANCE = 1e-4
"""Largest difference between merged and unmerged logits, as a share of the largest logit. Rounding in float32 gives
some 1e-6; a merge that loses or doubles a layer's adapter gives far more."""
_LOGITS_KEPT = 32
_DISAGREEMENT = 0.02
Base = Literal["original", "nf4"]


class Params(StageParams):
    """Parameters of `merge`."""

    weights: tuple[FiniteFloat, ...] = ()
    """How strongly each adapter is applied, in order: W + weight x (merged W - W). One that is not given is 1."""
    onto: Literal["auto", "original", "nf4"] = "auto"
    """The weights to merge into; `auto` takes what the adapters say they were trained on, else the original."""
    text: str = "python-docs"
    """Text of the check and of the loss on both bases; the adapters' own kind of text tells most."""
    windows: PositiveInt = 4
    window_tokens: PositiveInt = 128

    @property
    def text_fields(self) -> Mapping[str, Split]:
        """The calibration text."""
        return {"text": "calibration"}


@dataclass(frozen=True)
class _Part:
    """An adapter with its weight and the facts about it."""

    artifact: Artifact
    contents: Contents
    weight: float


@stage(
    version=1,
    takes="checkpoint",
    gives="checkpoint",
    also=("adapter",),
    tools=("torch", "transformers", "peft", "safetensors", "bitsandbytes"),
    reports=True,
)
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Merge adapters into the weights, onto the base that they were trained on, and check the logits."""
    parts = _parts(ctx.side, params.weights)
    base = _choose(params.onto, parts)
    losses: dict[str, float] = {}
    tokenizer, network = open_checkpoint(model)
    windows = text_windows(tokenizer, params.text, "calibration", params.windows, params.window_tokens)
    others: tuple[Base, ...] = ("nf4",) if base == "original" else ("original",)
    for kind in (*others, base):
        if network is None:
            _, network = open_checkpoint(model)
        if kind == "nf4":
            quantize_nf4(network, double_quant=any(part.artifact.facts["double_quant"] for part in parts))
        network, differences = _merge(network, parts, windows, ctx.progress)
        losses[kind] = _loss(network, windows)
        if kind != base:
            network = None
    difference, change = differences
    before = _logits(network, windows)
    _save(model, network, out)
    rounding = float(np.abs(_logits(network, windows) - before).max())
    return {
        **model.facts,
        "adapters": [{"digest": part.artifact.digest, "weight": part.weight, **part.artifact.facts} for part in parts],
        "onto": base,
        "loss_text": find_text_set(params.text).name,
        "measurements": [
            {"name": name, "value": value, "unit": unit, "kind": "measured", "n": windows.size}
            for name, value, unit in (
                ("loss_original_nats", losses["original"], "nats"),
                ("loss_nf4_nats", losses["nf4"], "nats"),
                ("max_logit_difference", difference, "ratio"),
                ("logit_change", change, "ratio"),
                ("rounding_logit_difference", rounding, "ratio"),
            )
        ],
        "notes": _notes(params.onto, base, parts, losses, change, rounding),
    }


def host_bytes(shape: ModelShape, params: Params) -> int:
    """The weights in float32 and a shard of the checkpoint to write, read and rounded; the rest is torch and PEFT."""
    return (1 << 30) + 8 * shape.parameters


def _parts(side: Mapping[str, Artifact], weights: Sequence[float]) -> list[_Part]:
    """The adapters that can be merged. Raises InputError when there is none, or a weight that has no meaning."""
    adapters = side_adapters(side)
    if len(weights) > len(adapters):
        raise InputError("at most one weight per adapter", f"{len(weights)} weights", "--set merge.weights=[]")
    parts = []
    for index, adapter in enumerate(adapters):
        if adapter.facts["method"] not in MERGED:
            continue
        contents = open_adapter(adapter)
        weight = weights[index] if index < len(weights) else 1.0
        if weight != 1 and not contents.scalable:
            found = f"{weight:g} for {contents.method} in {adapter.path}"
            raise InputError("the weight 1 where an adapter does more than add to matrices", found, "leave it out")
        parts.append(_Part(adapter, contents, weight))
    if not parts:
        raise InputError("an adapter to merge", "none", "--adapter DIR")
    return parts


def _choose(onto: str, parts: Sequence[_Part]) -> Base:
    told = onto == "nf4" or (onto == "auto" and any(part.artifact.facts["trained_on"] == "nf4" for part in parts))
    return "nf4" if told else "original"


def _notes(
    onto: str, base: Base, parts: Sequence[_Part], losses: Mapping[str, float], change: float, rounding: float
) -> list[str]:
    """What the user should know: that the other base fits better, or that the adapters are lost."""
    told = []
    other = "nf4" if base == "original" else "original"
    shown = f"{losses[base]:.4f} nats/token onto {base}, {losses[other]:.4f} onto {other}"
    gap = (losses[base] - losses[other]) / losses[base]
    if gap > 0 and abs(gap) > _DISAGREEMENT / 10 and onto == "auto" and not _is_told(parts):
        told.append(
            f"The adapters do not say what they were trained on, and {other} would be better: {shown}. "
            f"If so, build with --set merge.onto={other}."
        )
    elif abs(gap) > _DISAGREEMENT:
        told.append(f"It matters what the adapters are merged onto: {shown}.")
    if len({part.artifact.facts["trained_on"] == "nf4" for part in parts}) > 1:
        told.append(f"The adapters were trained on different bases; all were merged onto {base}.")
    if change == 0:
        told.append("The adapters change nothing.")
    elif rounding > change / 2:
        told.append("Most of what the adapters change is lost in the rounding of the stored weights.")
    return told


def _is_told(parts: Sequence[_Part]) -> bool:
    return all(part.artifact.facts["trained_on"] != "unknown" for part in parts)


def quantize_nf4(network: Any, *, double_quant: bool) -> None:
    """Replace the weights of all linear layers but the head by what bitsandbytes' NF4 gives back for them, in place.

    The same layers and block size (64) as transformers' `load_in_4bit`; `double_quant` quantizes the scales as well.
    """
    import bitsandbytes.functional as bnb
    import torch

    head = network.get_output_embeddings()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            weight = layer.weight.data
            # as blocks: rows of another width come back wrong from its kernels for AVX-512
            blocks = weight.reshape(-1, 64) if weight.numel() % 64 == 0 else weight
            codes, state = bnb.quantize_4bit(blocks, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
            weight.copy_(bnb.dequantize_4bit(codes, state).view_as(weight))


def _merge(
    network: Any, parts: Sequence[_Part], windows: npt.NDArray[np.int32], progress: Callable[..., None]
) -> tuple[Any, tuple[float, float]]:
    """Merge adapters one after the other.

    Returns the network, the largest difference of merged from unmerged logits, and how far the adapters moved them.
    Raises ToolError when the difference is more than rounding.
    """
    start = _logits(network, windows)
    worst = 0.0
    for index, part in enumerate(parts):
        with _quiet_peft():
            model = _attach(network, part)
            with _weighted(model, part.weight):
                unmerged = _logits(model, windows)
            network = _fold(model, part.weight)
        merged = _logits(network, windows)
        difference, largest = float(np.abs(merged - unmerged).max()), float(np.abs(unmerged).max())
        if not difference <= TOLERANCE * largest:
            raise ToolError(
                f"merged logits within {TOLERANCE * largest:.2g} of the unmerged adapter's in {part.artifact.path}",
                f"a difference of {difference:.2g}",
                "report it with the adapter_config.json",
            )
        worst = max(worst, difference)
        progress(index + 1, len(parts), "adapters")
    return network, (worst, float(np.abs(merged - start).max()))


def _attach(network: Any, part: _Part) -> Any:
    """Wrap a network with PEFT and load the adapter. Raises InputError where PEFT refuses it or tensors are left."""
    import peft
    from safetensors.torch import load_file

    contents, place = part.contents, part.artifact.path
    try:
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(contents.peft_type)](**_settings(contents))
        model = peft.PeftModelForCausalLM(network, config)
        weights = load_file(place / WEIGHTS)
        result = peft.set_peft_model_state_dict(model, weights)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise InputError(
            f"an adapter that PEFT loads from {place}", reason, "use the model it was trained on"
        ) from None
    if broken := sorted(name for name, tensor in weights.items() if not bool(tensor.isfinite().all())):
        raise InputError(f"finite weights in {place / WEIGHTS}", f"NaN or infinity in {broken[0]}", "train it again")
    # tied embeddings and VeRA's projection have several names; AdaLoRA counts its ranks itself
    state = model.state_dict()
    loaded = {value.data_ptr() for key, value in state.items() if key not in result.missing_keys}
    missing = [
        key
        for key in result.missing_keys
        if f".{model.active_adapter}" in key and ".ranknum." not in key and state[key].data_ptr() not in loaded
    ]
    if odd := [*result.unexpected_keys, *missing]:
        raise InputError(f"exactly the tensors that PEFT expects in {place}", f"{min(odd)}", "save it again with PEFT")
    return model.eval()


def _settings(contents: Contents) -> dict[str, Any]:
    """Arguments of PEFT's configuration class: what was checked, and what the tensors say."""
    linear = {
        module: parts
        for module, parts in contents.modules.items()
        if any("token_adapter" not in name for name in parts)
    }
    settings: dict[str, Any] = {**contents.options, "task_type": "CAUSAL_LM", "target_modules": sorted(linear)}
    settings["inference_mode"] = True
    if contents.peft_type == "ADALORA":
        settings["total_step"] = 1  # of training, which is over; PEFT wants one
    if contents.peft_type == "IA3":
        # an input is scaled by a row, an output by a column
        settings["feedforward_modules"] = [m for m, parts in linear.items() if parts["ia3_l"].shape[0] == 1]
    ranks = {"LORA": ("lora_A.weight", "lora_embedding_A"), "LOHA": ("hada_w1_b",), "LOKR": ("lokr_w1_b", "lokr_w2_b")}
    if names := ranks.get(contents.peft_type):
        found = {m: next((parts[n].shape[0] for n in names if n in parts), None) for m, parts in linear.items()}
        settings["rank_pattern"] = {m: rank for m, rank in found.items() if rank not in (None, settings.get("r"))}
    return settings


@contextmanager
def _weighted(model: Any, weight: float) -> Iterator[None]:
    """Scale in the block what adapters add to the outputs of their layers: the same, layer by layer, as in weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    def scale(layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        plain = layer.base_layer(*inputs)
        return plain + weight * (output - plain)

    hooks = [
        layer.register_forward_hook(scale)
        for layer in model.modules()
        if weight != 1 and isinstance(layer, BaseTunerLayer) and hasattr(layer, "base_layer")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fold(model: Any, weight: float) -> Any:
    """Merge the adapter and return the plain network."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if weight == 1:
        return model.merge_and_unload(safe_merge=True)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and hasattr(layer, "base_layer"):
            before = {name: value.detach().clone() for name, value in layer.base_layer.named_parameters()}
            layer.merge(safe_merge=True)
            for name, value in layer.base_layer.named_parameters():
                value.data.sub_(before[name]).mul_(weight).add_(before[name])
    return model.unload()


def _logits(network: Any, windows: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Logits at the last positions of each window, shape (windows, positions, vocabulary)."""
    import torch

    with torch.inference_mode():
        rows = [
            network(
                input_ids=torch.from_numpy(window.astype(np.int64))[None], use_cache=False, logits_to_keep=_LOGITS_KEPT
            ).logits[0]
            for window in windows
        ]
    return np.stack([row.float().numpy() for row in rows])


def _loss(network: Any, windows: npt.NDArray[np.int32]) -> float:
    """Mean negative log-likelihood of the text, in nats per token."""
    import torch

    with torch.inference_mode():
        tokens = [torch.from_numpy(window.astype(np.int64))[None] for window in windows]
        return float(np.mean([float(network(input_ids=t, labels=t, use_cache=False).loss) for t in tokens]))


def _save(model: Artifact, network: Any, out: Path) -> None:
    """Write the checkpoint with its own files, names and types; only values change. The network is rounded alike."""
    import torch
    from safetensors.torch import load_file, save_file

    merged = dict(network.state_dict())
    # a tied head is the embedding under a second name
    left = merged.keys() - ({"lm_head.weight"} if network.config.tie_word_embeddings else set())
    for name in model.manifest.files:
        if not name.endswith(".safetensors"):
            copy_file(model.path / name, out / name)
            continue
        tensors = load_file(model.path / name)
        for key, stored in tensors.items():
            if key in merged:
                tensors[key] = merged[key].to(stored.dtype).contiguous()
                merged[key].copy_(tensors[key])
                if not bool(torch.isfinite(tensors[key]).all()):
                    raise InputError(
                        f"merged weights that fit {stored.dtype}".replace("torch.", ""),
                        f"an overflow in {key}",
                        "lower the adapter's weight, or use a base in bfloat16",
                    )
        left = left - tensors.keys()
        save_file(tensors, out / name, {"format": "pt"})
    if left:
        raise ToolError("merged weights under the names of the checkpoint", f"{min(left)}, which it lacks", "report it")


@contextmanager
def _quiet_peft() -> Iterator[None]:
    # what PEFT imports on the way greets the user and complains of GPU kernels
    with quiet(), warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
