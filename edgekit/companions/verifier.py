"""Training a verifier on hidden states that an engine gave, and judging it on held-out problems.

Labels are soft: the fraction of the completions of a prefix that ended right (Math-Shepherd, arXiv:2312.08935). What
uses a verifier multiplies and divides its probabilities, so calibration is judged beside ranking.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgekit.adapter import WEIGHTS as ADAPTER_WEIGHTS
from edgekit.adapter import read_adapter
from edgekit.engine import EngineOptions, FloatArray
from edgekit.errors import InputError, suggest
from edgekit.formats.safetensors import TensorInfo, read_checkpoint
from edgekit.huggingface import load_model, load_tokenizer, quiet
from edgekit.model import ARCHITECTURES, gguf_names, read_config
from edgekit.tools import copy_file
from edgekit.verifier import (
    Attention,
    Head,
    Isotonic,
    Linear,
    Metric,
    Mlp,
    OwnTrunk,
    Platt,
    Prefixes,
    head_tensors,
    token_rows,
)

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]
CalibrationKind = Literal["platt", "isotonic"]
_VALIDATION = 0.15
_RESAMPLES = 200
_FEW_PROBLEMS, _MOST_TOKENS = 3, 4096
"""A token has a vector of its own if it is in as many problems, and is among the commonest."""


@dataclass(frozen=True)
class Labelled:
    """Labelled prefixes of one answer and the hidden states they are judged by."""

    prefixes: Prefixes
    hidden: Array
    """float16 or float32, shape (1 + tokens of the answer, hidden size): the prompt's last position first."""
    count: int = 1
    """How many rollouts gave this answer."""


@dataclass(frozen=True)
class Trained:
    """A calibrated head and what held-out problems say of it."""

    head: Head
    metrics: Mapping[str, Metric]
    epochs: int
    """Passes over the training problems up to the weights that were kept."""
    seconds: float


# --- labels


def label_prefixes(answers: Sequence[Sequence[int]], right: Sequence[float]) -> list[Doubles]:
    """Math-Shepherd's soft labels: the mean outcome of all rollouts of a problem that share a prefix.

    Args:
        answers: Tokens of each rollout of one problem.
        right: 1 for a rollout that ended right, else 0.

    Returns for each rollout the labels of its prefixes of 0 to all tokens, shape (tokens + 1,). The last is that of the
    finished answer: its own outcome, whatever became of longer ones.
    """
    children: dict[tuple[int, int], int] = {}
    paths = []
    for answer in answers:
        path = [0]
        for token in answer:
            path.append(children.setdefault((path[-1], token), len(children) + 1))
        paths.append(path)
    total, count = np.zeros(len(children) + 1), np.zeros(len(children) + 1)
    for path, outcome in zip(paths, right, strict=True):
        total[path] += outcome
        count[path] += 1
    shared = [total[path] / count[path] for path in paths]
    return [np.append(labels[:-1], outcome) for labels, outcome in zip(shared, right, strict=True)]


# --- judging


def auc(scores: Array, labels: Array, weights: Array | None = None) -> float:
    """P(the score of a right one > that of a wrong one), ties counted half; NaN where there are no two such.

    A soft label y makes its item right with weight y and wrong with weight 1 - y; no item is compared with itself.
    """
    above, pairs = _auc_parts(scores, labels, weights)
    return above / pairs if pairs > 0 else math.nan


def _auc_parts(scores: Array, labels: Array, weights: Array | None = None) -> tuple[float, float]:
    """Weight of the pairs in order, ties half, and of all pairs."""
    y = np.asarray(labels, np.float64)
    w = np.ones_like(y) if weights is None else np.asarray(weights, np.float64)
    groups, inverse = np.unique(np.asarray(scores), return_inverse=True)
    right = np.bincount(inverse, w * y, len(groups))
    wrong = np.bincount(inverse, w * (1 - y), len(groups))
    itself = float(np.sum(w * w * y * (1 - y)))
    above = float(right @ (np.cumsum(wrong) - wrong / 2)) - itself / 2
    pairs = float(right.sum() * wrong.sum()) - itself
    return above, pairs if pairs > 1e-9 * float(w.sum()) ** 2 else 0.0  # what rounding leaves of none is none


def ece(probabilities: Array, labels: Array, bins: int = 15) -> float:
    """Expected calibration error: mean |probability - label| between means of bins of equal mass."""
    p, y = np.asarray(probabilities, np.float64), np.asarray(labels, np.float64)
    parts = np.array_split(np.argsort(p, kind="stable"), min(bins, len(p)))
    return float(sum(abs(float(np.sum(p[part] - y[part]))) for part in parts) / len(p))


def brier(probabilities: Array, labels: Array) -> float:
    """Mean squared difference between probability and label."""
    return float(np.mean((np.asarray(probabilities, np.float64) - np.asarray(labels, np.float64)) ** 2))


def fit_platt(logits: Array, labels: Array) -> Platt:
    """Fit `Platt` to soft labels by Newton's method; labels are drawn towards 1/2 by 1/(n + 2), as Platt did."""
    x, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    centre, spread = float(x.mean()), float(x.std()) or 1.0
    design = np.stack([(x - centre) / spread, np.ones_like(x)], axis=1)
    target = y + (1 - 2 * y) / (len(y) + 2)

    def loss(at: Doubles) -> float:
        z = design @ at
        return float(np.mean(np.logaddexp(0, z) - target * z))

    fit = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ fit, -500, 500)))
        gradient = design.T @ (p - target) / len(y)
        hessian = (design.T * (p * (1 - p))) @ design / len(y) + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while loss(fit - size * step) > loss(fit) and size > 1e-6:
            size /= 2
        fit = fit - size * step
        if float(np.abs(size * step).max()) < 1e-10:
            break
    return Platt(scale=float(fit[0]) / spread, offset=float(fit[1] - fit[0] * centre / spread))


def fit_isotonic(logits: Array, labels: Array) -> Isotonic:
    """Fit `Isotonic` to soft labels: pool adjacent violators, then knots at both ends of every pool.

    Values stay 1/(n + 2) away from 0 and 1.
    """
    knots, inverse = np.unique(np.asarray(logits, np.float64), return_inverse=True)
    weights = np.bincount(inverse)
    means = np.bincount(inverse, np.asarray(labels, np.float64)) / weights
    pools: list[tuple[float, float, int]] = []  # mean, weight, number of knots
    for mean, weight in zip(means, weights, strict=True):
        pool = (float(mean), float(weight), 1)
        while pools and pools[-1][0] >= pool[0]:
            value, mass, size = pools.pop()
            total = mass + pool[1]
            pool = ((value * mass + pool[0] * pool[1]) / total, total, size + pool[2])
        pools.append(pool)
    margin = 1 / (len(inverse) + 2)
    places: dict[float, float] = {}
    start = 0
    for value, _, size in pools:
        inside = min(max(value, margin), 1 - margin)
        places[float(knots[start])] = places[float(knots[start + size - 1])] = inside
        start += size
    return Isotonic(logits=tuple(places), values=tuple(places.values()))


def head_logits(head: Head, item: Labelled) -> FloatArray:
    """Logits of a head, without calibration, for the labelled prefixes of one answer, shape (positions,)."""
    own, hidden = item.prefixes, np.asarray(item.hidden, np.float32)
    state = head.begin(own.prompt, hidden[:1])
    states, seen = [], 0
    for position in own.positions:
        state = head.extend(state, own.answer[seen:position], hidden[1 + seen : 1 + position])
        states.append(state)
        seen = position
    return head.logits(states, own.done)


def read_trunk(trunk: OwnTrunk, items: Sequence[Prefixes]) -> list[Labelled]:
    """What a trunk of its own computes of labelled prefixes: of each its last position, as `judge` takes them."""
    found = []
    for item in items:
        states = trunk.hidden([(*item.prompt, *item.answer[:position]) for position in item.positions])
        hidden = np.zeros((1 + len(item.answer), states.shape[1]), np.float32)
        hidden[list(item.positions)] = states
        found.append(Labelled(item, hidden))
    return found


def judge(
    head: Head, heldout: Sequence[Labelled], *, calibration: CalibrationKind = "platt", seed: int = 0
) -> tuple[Platt | Isotonic, dict[str, Metric]]:
    """Calibrate a head on held-out problems and measure it there.

    Measured is with two folds of problems: the calibration that a fold's figures are computed with was fitted to the
    other fold. The one returned is fitted to both. Figures, where there is something to compare: `auc`; `auc_done`
    of finished answers; `auc_within` of finished answers to the same problem, which is what choosing among candidates
    needs; `ece`; `brier`; `base_rate`, the mean label. Intervals resample problems. Few items in a bin differ from the
    labels by chance, and resampled ones more so: the bootstrap's estimate of that bias is taken off the `ece` and its
    interval (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 10).

    Raises InputError for fewer than two problems.
    """
    _check_items(heldout, "held-out")
    heldout = [item for item in heldout if item.prefixes.positions]
    groups: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(heldout):
        groups[item.prefixes.problem].append(index)
    if len(groups) < 2:
        raise InputError("at least 2 held-out problems", str(len(groups)), "label more problems")
    logits = [head_logits(head, item) for item in heldout]

    def joined(parts: Sequence[Array]) -> list[Array]:
        return [np.concatenate([parts[index] for index in group]) for group in groups.values()]

    scores = joined(logits)
    labels = joined([np.array(item.prefixes.labels) for item in heldout])
    done = joined([np.array(item.prefixes.done, bool) for item in heldout])

    fit = fit_platt if calibration == "platt" else fit_isotonic
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(groups))
    folds = order[::2], order[1::2]
    probabilities: list[Array] = [np.zeros(0)] * len(groups)
    for fold, other in (folds, folds[::-1]):
        fitted = fit(_at(scores, other), _at(labels, other))
        for index in fold:
            probabilities[index] = fitted.probabilities(scores[index])
    within = np.array([_auc_parts(s[d], y[d]) for s, y, d in zip(scores, labels, done, strict=True)])

    def figures(chosen: Array) -> dict[str, float]:
        s, y, d, p = (_at(parts, chosen) for parts in (scores, labels, done, probabilities))
        above, pairs = within[chosen].sum(axis=0)
        return {
            "auc": auc(s, y),
            "auc_done": auc(s[d], y[d]),
            "auc_within": above / pairs if pairs > 0 else math.nan,
            "ece": ece(p, y),
            "brier": brier(p, y),
            "base_rate": float(y.mean()),
        }

    whole = figures(np.arange(len(groups)))
    drawn = [figures(rng.integers(0, len(groups), len(groups))) for _ in range(_RESAMPLES)]
    metrics = {}
    for name, value in whole.items():
        if not math.isnan(value):
            found = np.array([figure[name] for figure in drawn])
            if name == "ece":
                found = np.maximum(2 * value - found, 0)
                value = float(found.mean())
            low, high = np.nanpercentile(found, [2.5, 97.5])
            metrics[name] = Metric(value=value, ci_low=float(low), ci_high=float(high))
    return fit(np.concatenate(scores), np.concatenate(labels)), metrics


def _at(parts: Sequence[Array], chosen: Array) -> Array:
    return np.concatenate([parts[index] for index in chosen])


# --- training


def train_head(
    train: Sequence[Labelled],
    heldout: Sequence[Labelled],
    *,
    architecture: Linear | Mlp | Attention,
    seed: int = 0,
    epochs: int = 60,
    patience: int = 12,
    batch: int = 64,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.1,
    dropout: float = 0.2,
    calibration: CalibrationKind = "platt",
    threads: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Train a head by binary cross-entropy on soft labels, on the CPU, and judge it as `judge` does.

    AdamW; a slice of the training problems is kept aside, and the weights with the least loss there, once calibrated,
    are kept. Training ends `patience` epochs after them. Every prefix weighs the same, so probabilities keep the base
    rate.

    Args:
        train: Labelled answers to train on.
        heldout: Labelled answers to other problems.
        architecture: What to train. Attention without a vocabulary gets one: the commonest tokens of the answers and
            of the parts of the prompts that it reads.
        seed: Of initial weights, order, dropout and splits.
        epochs: Most passes over the training problems.
        patience: Epochs without improvement before it stops.
        batch: Answers in one step.
        learning_rate: Of AdamW, falling to a tenth along half a cosine.
        weight_decay: Of AdamW, for matrices.
        dropout: Of embedded positions and the hidden layer.
        calibration: `platt` or `isotonic`.
        threads: Of the CPU.
        progress: Called with finished and planned epochs.

    Raises InputError for too few problems, problems on both sides, and states of differing widths.
    """
    import torch

    begin = time.perf_counter()
    for items, name in ((train, "training"), (heldout, "held-out")):
        _check_items(items, name)
    both = {item.prefixes.problem for item in train} & {item.prefixes.problem for item in heldout}
    if both:
        raise InputError("held-out problems that are not trained on", min(both)[:80], "split by problem")
    rng = np.random.default_rng(seed)
    fitted, aside = map(_merge, _split(train, rng))
    if isinstance(architecture, Attention) and not architecture.vocabulary:
        tokens = _common_tokens([item.prefixes for item in fitted], architecture.places)
        architecture = architecture.model_copy(update={"vocabulary": tokens})
    tensors = _initial(architecture, fitted, rng)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            settings = (epochs, patience, batch, learning_rate, weight_decay, dropout)
            tensors, kept = _optimise(architecture, tensors, fitted, aside, rng, settings, progress)
    finally:
        torch.set_num_threads(before)
    chosen, metrics = judge(Head(architecture, tensors), heldout, calibration=calibration, seed=seed)
    head = Head(architecture, tensors, calibration=chosen)
    return Trained(head, metrics, kept, time.perf_counter() - begin)


def _optimise(
    architecture: Linear | Mlp | Attention,
    tensors: Mapping[str, FloatArray],
    fitted: Sequence[Labelled],
    aside: Sequence[Labelled],
    rng: np.random.Generator,
    settings: tuple[int, int, int, float, float, float],
    progress: Callable[[int, int], None],
) -> tuple[dict[str, FloatArray], int]:
    import torch

    epochs, patience, batch, learning_rate, weight_decay, dropout = settings
    parameters = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    trained = {name: parameters[name].requires_grad_() for name in parameters if name not in ("mean", "std")}
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs, learning_rate / 10)
    best, kept, weights = math.inf, 0, dict(tensors)
    for epoch in range(1, epochs + 1):
        for items in _batches(fitted, batch, rng.permutation(len(fitted))):
            loss, count = _loss(architecture, parameters, collate(items, architecture), dropout)
            optimiser.zero_grad()
            (loss / count).backward()
            optimiser.step()
        schedule.step()
        found = _calibrated_loss(architecture, parameters, aside, batch)
        progress(epoch, epochs)
        if found < best:
            best, kept = found, epoch
            weights = {name: p.detach().numpy().copy() for name, p in parameters.items()}
        elif epoch - kept >= patience:
            break
    return weights, kept


def _calibrated_loss(
    architecture: Linear | Mlp | Attention, parameters: Mapping[str, Any], items: Sequence[Labelled], batch: int
) -> float:
    """Mean cross-entropy after the calibration that would be best: being too sure is mended later."""
    import torch

    logits, labels = [], []
    with torch.no_grad():
        for part in _batches(items, batch, np.arange(len(items))):
            one = collate(part, architecture)
            counts = one.count.long().flatten()
            logits.append(forward(architecture, parameters, one).flatten().repeat_interleave(counts))
            labels.append(one.labels.flatten().repeat_interleave(counts))
    z, y = (torch.cat(parts).double().numpy() for parts in (logits, labels))
    fitted = fit_platt(z, y)
    z = fitted.scale * z + fitted.offset
    return float(np.mean(np.logaddexp(0, z) - y * z))


def _loss(
    architecture: Linear | Mlp | Attention, parameters: Mapping[str, Any], batch: Batch, dropout: float = 0.0
) -> tuple[Any, Any]:
    """Sum of the cross-entropies of all prefixes, and how many there are."""
    import torch

    logits = forward(architecture, parameters, batch, dropout)
    entropies = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
    return (entropies * batch.count).sum(), batch.count.sum()


def _batches(items: Sequence[Labelled], size: int, order: Array) -> Iterator[list[Labelled]]:
    for start in range(0, len(items), size):
        yield [items[index] for index in order[start : start + size]]


def _check_items(items: Sequence[Labelled], name: str) -> None:
    if not any(item.prefixes.positions for item in items):
        raise InputError(f"labelled {name} prefixes", "none", "label more problems")
    widths = {item.hidden.shape[1:] for item in items}
    if len(widths) != 1 or any(len(item.hidden) != 1 + len(item.prefixes.answer) for item in items):
        wanted = "hidden states of one width, of every token of the answers and the last one of the prompt"
        raise InputError(wanted, f"widths {sorted(widths)}", "collect them with one engine")


def _split(items: Sequence[Labelled], rng: np.random.Generator) -> tuple[list[Labelled], list[Labelled]]:
    """Part the problems; the smaller part, for early stopping, comes second."""
    problems = sorted({item.prefixes.problem for item in items if item.prefixes.positions})
    if len(problems) < 2:
        raise InputError("at least 2 problems to train on", str(len(problems)), "label more problems")
    count = max(1, round(_VALIDATION * len(problems)))
    aside = {problems[index] for index in rng.permutation(len(problems))[:count]}
    labelled = [item for item in items if item.prefixes.positions]
    return (
        [item for item in labelled if item.prefixes.problem not in aside],
        [item for item in labelled if item.prefixes.problem in aside],
    )


def _merge(items: Sequence[Labelled]) -> list[Labelled]:
    """Count equal answers to a problem, which have equal states and labels, instead of computing each."""
    merged: dict[tuple[object, ...], Labelled] = {}
    for item in items:
        own = item.prefixes
        key = (own.problem, own.prompt, own.answer, own.positions, own.labels)
        merged[key] = replace(item, count=merged[key].count + item.count) if key in merged else item
    return list(merged.values())


def _common_tokens(items: Sequence[Prefixes], places: int) -> tuple[int, ...]:
    """Tokens that several problems have, the commonest if there are many."""
    problems: dict[int, set[str]] = defaultdict(set)
    for item in items:
        for token in (*item.prompt[-places:], *item.answer):
            problems[token].add(item.problem)
    common = sorted((t for t in problems if len(problems[t]) >= _FEW_PROBLEMS), key=lambda t: (-len(problems[t]), t))
    return tuple(sorted(common[:_MOST_TOKENS]))


def _initial(
    architecture: Linear | Mlp | Attention, items: Sequence[Labelled], rng: np.random.Generator
) -> dict[str, FloatArray]:
    """Weights to begin with: standardisation from the data, the base rate as the bias of the logit."""
    total, squares, count = 0.0, 0.0, 0
    for item in items:
        rows = item.hidden.astype(np.float64)
        total, squares, count = total + rows.sum(axis=0), squares + (rows**2).sum(axis=0), count + len(rows)
    mean = np.asarray(total) / count
    std = np.sqrt(np.maximum(np.asarray(squares) / count - mean**2, 0))
    rate = np.clip(np.mean([label for item in items for label in item.prefixes.labels]), 0.01, 0.99)
    tensors = {"mean": mean, "std": np.maximum(std, 1e-3 * (std.mean() or 1.0))}
    for name, shape in head_tensors(architecture, len(mean)).items():
        if name == "score_bias":
            tensors[name] = np.array([math.log(rate / (1 - rate))])
        elif name in ("inner_bias", "distances", "finished"):
            tensors[name] = np.zeros(shape)
        elif name not in tensors:
            scale = 0.5 if name in ("places", "tokens") else 1 / math.sqrt(shape[-1])
            tensors[name] = rng.normal(0, scale, shape)
    return {name: array.astype(np.float32) for name, array in tensors.items()}


@dataclass(frozen=True)
class Batch:
    """Answers as tensors: prompts end in one column, what follows is padded to one length."""

    hidden: Any
    """Of the prompt's last position and the answer, shape (answers, 1 + longest answer, hidden size)."""
    tokens: Any
    """Rows of the table of token vectors, shape (answers, longest prompt + longest answer)."""
    first: Any
    """Column where each prompt begins, shape (answers,)."""
    position: Any
    """Tokens of the answer in each labelled prefix, shape (answers, prefixes), as the following."""
    done: Any
    labels: Any
    count: Any
    """Rollouts with this prefix; 0 is padding."""


def collate(items: Sequence[Labelled], architecture: Linear | Mlp | Attention) -> Batch:
    """Pad answers into tensors; of each prompt, the tokens that the architecture reads are taken."""
    import torch

    reads = architecture.places if isinstance(architecture, Attention) else 1
    prompts = [item.prefixes.prompt[-reads:] for item in items]
    longest, answer = max(map(len, prompts)), max(len(item.prefixes.answer) for item in items)
    prefixes = max(len(item.prefixes.positions) for item in items)
    hidden = np.zeros((len(items), 1 + answer, items[0].hidden.shape[1]), np.float32)
    tokens = np.zeros((len(items), longest + answer), np.int64)
    position = np.zeros((len(items), prefixes), np.int64)
    done, labels, counts = np.zeros((3, len(items), prefixes), np.float32)
    table = architecture.known_tokens() if isinstance(architecture, Attention) else None
    for row, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
        own, count = item.prefixes, len(item.prefixes.positions)
        hidden[row, : len(item.hidden)] = item.hidden
        if table is not None:
            found = token_rows(table, (*prompt, *own.answer))
            tokens[row, longest - len(prompt) : longest + len(own.answer)] = found
        position[row, :count] = own.positions
        done[row, :count], labels[row, :count], counts[row, :count] = own.done, own.labels, item.count
    first = np.array([longest - len(prompt) for prompt in prompts])
    arrays = (hidden, tokens, first, position, done, labels, counts)
    return Batch(*(torch.from_numpy(array) for array in arrays))


def forward(
    architecture: Linear | Mlp | Attention, parameters: Mapping[str, Any], batch: Batch, dropout: float = 0.0
) -> Any:
    """Logits of all prefixes of a batch as `Head` computes them, shape (answers, prefixes); padding gives any value."""
    import torch

    drop, p = torch.nn.functional.dropout, parameters
    rows = torch.arange(len(batch.hidden))[:, None]
    done = batch.done[..., None]
    if isinstance(architecture, Attention):
        return _transform(architecture, p, batch, dropout) @ p["score"] + p["score_bias"]
    states = (batch.hidden - p["mean"]) / p["std"]
    if isinstance(architecture, Linear):
        return torch.cat([states[rows, batch.position], done], dim=-1) @ p["score"] + p["score_bias"]
    states = drop(states, dropout)
    sums = torch.cumsum(states, dim=1)[rows, batch.position] - states[:, :1]
    features = [states[rows, batch.position], sums / batch.position.clamp(min=1)[..., None], done]
    active = torch.relu(torch.cat(features, dim=-1) @ p["inner"].T + p["inner_bias"])
    return drop(active, dropout) @ p["score"] + p["score_bias"]


def _transform(shape: Attention, p: Mapping[str, Any], batch: Batch, dropout: float) -> Any:
    """What the last layer makes of the last position of each prefix, shape (answers, prefixes, size)."""
    import torch

    length = batch.tokens.shape[1]
    column, prompt = torch.arange(length), length + 1 - batch.hidden.shape[1]
    half = (column >= prompt).long()
    place = torch.where(column < prompt, prompt - 1 - column, column - prompt).clamp(max=shape.places - 1)
    # states are the bulk: the small matrix is standardised in their stead
    embed = p["embed"] / p["std"]
    given = torch.nn.functional.pad(batch.hidden @ embed.T - embed @ p["mean"], (0, 0, prompt - 1, 0))
    row = torch.nn.functional.dropout(p["tokens"][batch.tokens] + p["places"][half, place] + given, dropout)
    seen = column >= batch.first[:, None, None]
    for layer in range(shape.layers - 1):
        mask = seen & (column <= column[:, None])
        row = _layer(shape, p, layer, row, row, mask, column[:, None] - column, half, dropout)
    last = prompt - 1 + batch.position
    wanted = row[torch.arange(len(row))[:, None], last] + batch.done[..., None] * p["finished"]
    distance = last[..., None] - column
    return _layer(shape, p, shape.layers - 1, wanted, row, seen & (distance >= 0), distance, half, dropout)


def _layer(
    shape: Attention,
    p: Mapping[str, Any],
    layer: int,
    row: Any,
    memory: Any,
    mask: Any,
    distance: Any,
    half: Any,
    dropout: float,
) -> Any:
    """One layer for the positions `row`, which attend to those of `memory` that `mask` leaves."""
    import torch

    def heads(tensor: Any, name: str) -> Any:
        return (tensor @ p[name][layer].T).unflatten(-1, (shape.heads, -1)).transpose(1, 2)

    bias = p["distances"][layer][:, half, distance.clamp(0, shape.distances - 1)]
    bias = bias.transpose(0, 1) if bias.ndim == 4 else bias
    scores = heads(row, "query") @ heads(memory, "key").transpose(-1, -2) / math.sqrt(shape.size // shape.heads) + bias
    # padding sees nothing, and must not be NaN
    scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
    found = (scores.softmax(dim=-1) @ heads(memory, "value")).transpose(1, 2).flatten(2)
    active = torch.relu(torch.cat([found, row], dim=-1) @ p["inner"][layer].T + p["inner_bias"][layer])
    return row + torch.nn.functional.dropout(active, dropout) @ p["outer"][layer].T


# --- trunks of their own


def train_adapter(
    checkpoint: Path,
    out: Path,
    train: Sequence[Prefixes],
    heldout: Sequence[Prefixes],
    *,
    rank: int = 8,
    seed: int = 0,
    epochs: int = 3,
    batch: int = 8,
    learning_rate: float = 2e-4,
    calibration: CalibrationKind = "platt",
    threads: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Train a LoRA on all linear layers of a checkpoint together with a linear head on its final states.

    The loss is that of `train_head`; the base is in float32 and frozen. The adapter goes to `out` as PEFT saves it;
    the head is returned, judged on states of the base with the adapter, and is one for `OwnTrunk`. There is no early
    stopping: `epochs` is how often each answer is seen. The learning rate is the LoRA's; the head's is ten times that.

    Raises InputError as `train_head` does, and for a checkpoint that cannot be loaded.
    """
    import peft
    import torch

    begin = time.perf_counter()
    items = [item for item in train if item.positions]
    if not items:
        raise InputError("labelled training prefixes", "none", "label more problems")
    if both := {item.problem for item in items} & {item.problem for item in heldout}:
        raise InputError("held-out problems that are not trained on", min(both)[:80], "split by problem")
    rng = np.random.default_rng(seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
            model = peft.get_peft_model(load_model(checkpoint), config)
            trunk = model.get_base_model().base_model
            sample = [_states(trunk, items[index]) for index in rng.permutation(len(items))[: 8 * batch]]
            tensors = _initial(Linear(), sample, rng)
            tensors["score"][:] = 0
            head = {name: torch.from_numpy(array) for name, array in tensors.items()}
            own = [head[name].requires_grad_() for name in ("score", "score_bias")]
            lora = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimiser = torch.optim.AdamW(
                [{"params": lora, "lr": learning_rate}, {"params": own, "lr": 10 * learning_rate}], weight_decay=0.0
            )
            for epoch in range(epochs):
                order = rng.permutation(len(items))
                for start in range(0, len(items), batch):
                    chosen = [items[index] for index in order[start : start + batch]]
                    optimiser.zero_grad()
                    _adapter_loss(trunk, head, chosen).backward()
                    optimiser.step()
                progress(epoch + 1, epochs)
            model.save_pretrained(out)
            judged = [_states(trunk, item) for item in heldout if item.positions]
    finally:
        torch.set_num_threads(before)
    weights = {name: tensor.detach().numpy().copy() for name, tensor in head.items()}
    chosen_calibration, metrics = judge(Head(Linear(), weights), judged, calibration=calibration, seed=seed)
    done = Head(Linear(), weights, calibration=chosen_calibration)
    return Trained(done, metrics, epochs, time.perf_counter() - begin)


def _states(trunk: Any, item: Prefixes) -> Labelled:
    """Final states of a network for the prompt's last position and the answer."""
    import torch

    tokens = torch.tensor([[*item.prompt, *item.answer]])
    with torch.inference_mode():
        states = trunk(input_ids=tokens, use_cache=False).last_hidden_state[0, len(item.prompt) - 1 :]
    return Labelled(item, states.numpy())


def _adapter_loss(trunk: Any, head: Mapping[str, Any], items: Sequence[Prefixes]) -> Any:
    """Mean cross-entropy over the labelled prefixes of a batch. Padding follows the answers, so no position sees it."""
    import torch

    length = max(len(item.prompt) + len(item.answer) for item in items)
    tokens = torch.zeros((len(items), length), dtype=torch.int64)
    for row, item in zip(tokens, items, strict=True):
        row[: len(item.prompt) + len(item.answer)] = torch.tensor([*item.prompt, *item.answer])
    states = trunk(input_ids=tokens, use_cache=False).last_hidden_state
    places = [(row, len(i.prompt) + p - 1) for row, i in enumerate(items) for p in i.positions]
    rows, columns = torch.tensor(places).T
    done = torch.tensor([flag for item in items for flag in item.done], dtype=torch.float32)[:, None]
    labels = torch.tensor([label for item in items for label in item.labels], dtype=torch.float32)
    read = (states[rows, columns] - head["mean"]) / head["std"]
    logits = torch.cat([read, done], dim=1) @ head["score"] + head["score_bias"]
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)


_PERMUTED = ("granite", "llama", "smollm3")
"""Architectures whose query and key rows llama.cpp's converter reorders, for its own order of rotary pairs."""


def write_gguf_adapter(adapter: Path, checkpoint: Path, out: Path) -> None:
    """Convert a LoRA in PEFT's layout to a file for llama.cpp's `llama_adapter_lora_init`.

    Args:
        adapter: A directory as PEFT saves it: a plain LoRA of linear layers.
        checkpoint: The directory of the model it was trained on.
        out: The GGUF file to write.

    Raises InputError for another kind of adapter or a module that the model lacks.
    """
    import gguf
    from safetensors.numpy import load_file

    contents = read_adapter(adapter)
    pairs = all(parts.keys() == {"lora_A.weight", "lora_B.weight"} for parts in contents.modules.values())
    if contents.method != "lora" or contents.options.get("alpha_pattern") or contents.whole or not pairs:
        raise InputError("a plain LoRA of linear layers", f"{contents.method} in {adapter}", "merge it instead")
    config = read_config(checkpoint)
    architecture = ARCHITECTURES[config["architectures"][0]]
    heads = int(config["num_attention_heads"])
    names = gguf_names(architecture, int(config["num_hidden_layers"]), [f"{m}.weight" for m in contents.modules])
    arrays = load_file(adapter / ADAPTER_WEIGHTS)
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(contents.options.get("lora_alpha", 8)))
    for module in contents.modules:
        name = names[f"{module}.weight"]
        first, second = (arrays[f"base_model.model.{module}.lora_{part}.weight"].astype(np.float32) for part in "AB")
        if architecture in _PERMUTED and module.endswith(("q_proj", "k_proj")):
            count = heads if module.endswith("q_proj") else int(config.get("num_key_value_heads") or heads)
            second = second.reshape(count, 2, -1, second.shape[1]).swapaxes(1, 2).reshape(second.shape)
        writer.add_tensor(f"{name}.lora_a", first)
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(second))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_REWARD_MODELS = {
    f"{family}For{task}Classification": f"{family}ForCausalLM"
    for family in ("Gemma2", "Llama", "Mistral", "Qwen2", "Qwen3")
    for task in ("Sequence", "Token")
}


def check_reward_model(directory: Path) -> tuple[dict[str, Any], str, Mapping[str, TensorInfo]]:
    """Read the headers of a reward model: its config, architecture and tensors. Raises as `import_model` does."""
    config = read_config(directory)
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "none"
    if architecture not in _REWARD_MODELS:
        found = f"{architecture!r} in {directory}{suggest(architecture, _REWARD_MODELS)}"
        raise InputError(f"a reward model ({', '.join(_REWARD_MODELS)})", found, "use another reward model")
    tensors = read_checkpoint(directory)
    shape = tensors["score.weight"].shape if "score.weight" in tensors else ()
    if len(shape) != 2 or shape[0] not in (1, 2):
        wanted = f"a tensor score.weight with 1 or 2 rows in {directory}"
        raise InputError(wanted, f"shape {shape}" if shape else "none", "use a reward model of one score")
    return config, architecture, tensors


def import_model(directory: Path, out: Path) -> Head:
    """Part a reward model in Hugging Face layout into a trunk, written to `out`, and its score layer, the head.

    The trunk is a causal language model that engines and converters take: nothing reads its logits, so its head is
    tied to the embedding. Of two labels, the logit is that of the second less that of the first. The head is not
    calibrated.

    Raises InputError for an unknown architecture, other than one or two labels, or a score layer that is missing.
    """
    from safetensors.torch import load_file, save_file

    config, architecture, tensors = check_reward_model(directory)
    shape = tensors["score.weight"].shape
    shards = sorted({info.file for info in tensors.values()})
    score: dict[str, Any] = {}
    out.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    for shard in shards:
        loaded = load_file(directory / shard)
        score |= {name: loaded.pop(name).float().numpy() for name in list(loaded) if name.startswith("score.")}
        if loaded:
            save_file(loaded, out / shard, {"format": "pt"})
            index |= dict.fromkeys(loaded, shard)
    if len(shards) > 1:
        text = json.dumps({"metadata": {}, "weight_map": index}, indent=2, sort_keys=True)
        (out / "model.safetensors.index.json").write_text(text + "\n")
    for pattern in ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*"):
        for path in sorted(directory.glob(pattern)):
            if path.name not in ("config.json", "model.safetensors.index.json"):
                copy_file(path, out / path.name)
    dropped = ("id2label", "label2id", "num_labels", "problem_type", "classifier_dropout")
    plain = {key: value for key, value in config.items() if key not in dropped}
    plain |= {"architectures": [_REWARD_MODELS[architecture]], "tie_word_embeddings": True}
    (out / "config.json").write_text(json.dumps(plain, indent=2) + "\n")
    rows, bias = score["score.weight"], score.get("score.bias", np.zeros(shape[0], np.float32))
    hidden = shape[1]
    return Head(
        Linear(),
        {
            "mean": np.zeros(hidden, np.float32),
            "std": np.ones(hidden, np.float32),
            "score": np.append(rows[-1] - rows[0] if len(rows) == 2 else rows[0], 0).astype(np.float32),
            "score_bias": np.array([bias[-1] - bias[0] if len(rows) == 2 else bias[0]], np.float32),
        },
    )


def judge_model(
    directory: Path,
    out: Path,
    heldout: Sequence[Prefixes],
    base: Path,
    *,
    calibration: CalibrationKind = "platt",
    threads: int = 2,
) -> tuple[Trained, bool]:
    """Import a reward model, calibrate it on held-out answers of a base, and judge it there, in float32.

    Args:
        directory: The reward model in Hugging Face layout.
        out: Where its trunk goes.
        heldout: Labelled answers, in the tokens of the base.
        base: Checkpoint of the base, whose tokenizer is compared.
        calibration: `platt` or `isotonic`.
        threads: Of the CPU.

    Returns the head, and whether the model has another tokenizer than the base and so is given text.
    """
    from edgekit.engines import find_engine

    begin = time.perf_counter()
    head = import_model(directory, out)
    theirs, ours = (load_tokenizer(path) for path in (out, base))
    reads_text = bool(theirs.get_vocab() != ours.get_vocab())
    longest = max(len(item.prompt) + len(item.answer) for item in heldout)
    options = EngineOptions(context_tokens=(4 if reads_text else 1) * longest + 2, threads=threads, fall_back=True)
    # as the device does it: without control tokens
    to_text = (lambda tokens: str(ours.decode(tokens, skip_special_tokens=True))) if reads_text else None
    with OwnTrunk(find_engine("torch_reference").open_model(out, options), head, to_text=to_text) as trunk:
        read = read_trunk(trunk, [item for item in heldout if item.positions])
    chosen, metrics = judge(head, read, calibration=calibration)
    calibrated = Head(head.architecture, head.tensors, calibration=chosen)
    return Trained(calibrated, metrics, 0, time.perf_counter() - begin), reads_text
