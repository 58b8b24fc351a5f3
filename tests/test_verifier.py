"""The verifier against oracles: torch, brute force, closed forms, and a task whose answer is known."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from edgekit.companion import open_verifier
from edgekit.companions.verifier import (
    Labelled,
    auc,
    brier,
    collate,
    ece,
    fit_isotonic,
    fit_platt,
    forward,
    head_logits,
    import_model,
    judge,
    label_prefixes,
    train_adapter,
    train_head,
    write_gguf_adapter,
)
from edgekit.engine import Capabilities, EngineOptions, Entry, StepOutput
from edgekit.errors import InputError
from edgekit.formats.safetensors import read_arrays, write_arrays
from edgekit.verifier import (
    HELDOUT,
    MANIFEST,
    WEIGHTS,
    Attention,
    Constant,
    Head,
    Isotonic,
    Linear,
    Metric,
    Mlp,
    OwnTrunk,
    Platt,
    Prefixes,
    RandomVerifier,
    Training,
    Trunk,
    head_tensors,
    load_head,
    read_heldout,
    save_verifier,
    token_rows,
    verify_files,
)

HIDDEN = 24
ARCHITECTURES = [
    Linear(),
    Mlp(width=16),
    Attention(size=16, heads=4, places=6, distances=5, width=12, vocabulary=tuple(range(3, 50, 2))),
    Attention(layers=3, size=16, heads=4, places=8, distances=5, width=12, vocabulary=(0, 1, 2, 30)),
]
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=["linear", "mlp", "attention", "layers"])
TRUNK = Trunk(source_digest="a" * 64, model_digest="b" * 64, name="tiny", engine="llama_cpp")
TRAINING = Training(problems=2, rollouts=4, prefixes=8, tokens_forward=100, seconds=1.5, engine="llama_cpp 0.3.36")


def random_head(architecture: Any, seed: int = 0, **more: Any) -> Head:
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(0, 1 / np.sqrt(shape[-1]), shape).astype(np.float32)
        for name, shape in head_tensors(architecture, HIDDEN).items()
    }
    tensors["std"] = np.abs(tensors["std"]) + 0.5
    return Head(architecture, tensors, **more)


def random_item(rng: np.random.Generator, problem: str = "p", prompt: int = 9, answer: int = 8) -> Labelled:
    positions = sorted(rng.choice(answer + 1, size=min(3, answer + 1), replace=False))
    prefixes = Prefixes(
        problem=problem,
        domain="toy",
        prompt=[int(token) for token in rng.integers(0, 50, prompt)],
        answer=[int(token) for token in rng.integers(0, 50, answer)],
        positions=[int(position) for position in positions],
        labels=[float(label) for label in rng.random(len(positions))],
        done=[bool(position == answer) for position in positions],
    )
    return Labelled(prefixes, rng.normal(0, 2, (1 + answer, HIDDEN)).astype(np.float32))


# --- controls


def test_the_random_verifier_is_uniform_and_depends_on_seed_and_tokens_alone() -> None:
    verifier = RandomVerifier(3)
    states = [verifier.extend(verifier.begin([1, 2], None), [i], None) for i in range(4000)]
    values = np.sort(verifier.values(states, [False] * len(states)))
    assert not verifier.reads
    assert 0 < values[0] < values[-1] < 1
    # Kolmogorov-Smirnov: the 0.1% point is 1.95 / sqrt(n)
    steps = np.arange(len(values) + 1) / len(values)
    assert max(np.abs(values - steps[1:]).max(), np.abs(values - steps[:-1]).max()) < 1.95 / math.sqrt(len(values))
    pieces = verifier.extend(verifier.extend(verifier.begin([1], None), [2], None), [7], None)
    again = RandomVerifier(3)
    assert again.values([pieces], [True]) == verifier.values([states[7]], [False])
    assert RandomVerifier(4).values([pieces], [False]) != again.values([pieces], [False])


def test_the_constant_stays_inside() -> None:
    assert list(Constant().values([None, None], [False, True])) == [0.5, 0.5]
    (one,) = Constant(1.0).values([None], [True])
    assert 0 < one < 1


def test_the_half_for_the_device_imports_no_torch() -> None:
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'safetensors'): sys.modules[name] = None\n"
        "import edgekit.verifier"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the head


@each_architecture
def test_numpy_computes_what_torch_computes(architecture: Any) -> None:
    import torch

    rng = np.random.default_rng(1)
    shapes = [(9, 8), (3, 1), (7, 0), (1, 12), (12, 30)]
    items = [random_item(rng, prompt=prompt, answer=answer) for prompt, answer in shapes]
    head = random_head(architecture)
    batch = collate(items, architecture)
    with torch.no_grad():
        theirs = forward(architecture, {n: torch.from_numpy(t) for n, t in head.tensors.items()}, batch)
    ours = np.concatenate([head_logits(head, item) for item in items])
    assert len(ours) == 3 + 2 + 1 + 3 + 3
    assert np.abs(ours).max() > 0.5
    np.testing.assert_allclose(ours, theirs[batch.count > 0].numpy(), rtol=1e-5, atol=1e-5)


@each_architecture
def test_extending_in_pieces_is_extending_at_once(architecture: Any) -> None:
    rng = np.random.default_rng(2)
    head = random_head(architecture)
    prompt, answer = rng.normal(0, 1, (1, HIDDEN)), rng.normal(0, 1, (11, HIDDEN))
    begun = head.begin(range(9), prompt)
    whole = head.extend(begun, range(11), answer)
    pieces = begun
    for start, end in itertools.pairwise([0, 1, 1, 4, 10, 11]):
        pieces = head.extend(pieces, range(start, end), answer[start:end])
    other = head.extend(begun, range(11), -answer)  # a sibling, which must change nothing
    values = head.values([whole, pieces, other], [True, True, True])
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert abs(values[0] - values[2]) > 1e-4
    assert head.logits([begun], [False]) == head.logits([head.begin(range(9), prompt)], [False])


@each_architecture
def test_a_batch_gives_what_its_states_give_alone(architecture: Any) -> None:
    rng = np.random.default_rng(3)
    head = random_head(architecture)
    states, done = [head.begin([], None)], [False]
    for length in (0, 1, 5, 40):
        begun = head.begin(range(1 + length), rng.normal(0, 1, (1, HIDDEN)))
        states.append(head.extend(begun, range(length), rng.normal(0, 1, (length, HIDDEN))))
        done.append(length > 4)
    together = head.values(states, done)
    alone = [head.values([state], [flag])[0] for state, flag in zip(states, done, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert len(set(alone)) == len(alone)
    assert len(head.values([], [])) == 0


@each_architecture
def test_what_a_head_sees(architecture: Any) -> None:
    rng = np.random.default_rng(4)
    head = random_head(architecture)
    tokens, prompt, answer = (3, 5, 7, 9, 11), rng.normal(0, 1, (1, HIDDEN)), rng.normal(0, 1, (5, HIDDEN))

    def value(tokens: Any, first: Any, after: Any, second: Any) -> float:
        return float(head.logits([head.extend(head.begin(tokens, first), after, second)], [False])[0])

    def differs(other: float) -> bool:
        return abs(other - value(tokens, prompt, tokens, answer)) > 1e-4

    attends = isinstance(architecture, Attention)
    assert differs(value(tokens, prompt, tokens, answer[::-1]))
    # of the answer's states the mean loses their order but for the last, and a linear head all of them
    assert differs(value(tokens, prompt, tokens, answer[[1, 0, 2, 3, 4]])) == attends
    assert differs(value(tokens, -prompt, tokens, answer)) == attends
    # tokens and their places
    known = isinstance(architecture, Attention) and 5 in architecture.vocabulary
    assert differs(value((5, 3, 7, 9, 11), prompt, tokens, answer)) == known
    assert differs(value(tokens, prompt, (5, 3, 7, 9, 11), answer)) == known
    assert differs(value((3, *tokens), prompt, tokens, answer)) == attends
    # farther back than it has places, nothing is read
    far = [1] * 12
    assert value([3, *far], prompt, tokens, answer) == value([5, *far], prompt, tokens, answer)


def test_a_token_outside_the_vocabulary_shares_one_vector() -> None:
    assert list(token_rows(Attention(vocabulary=(2, 5, 9)).known_tokens(), [9, 2, 3, 5, 10, 0])) == [3, 1, 0, 2, 0, 0]
    assert list(token_rows(Attention().known_tokens(), [0, 7])) == [0, 0]


def test_extreme_states_stay_strictly_inside() -> None:
    head = random_head(Linear())
    states = [head.begin([1], np.full((1, HIDDEN), sign * 1e6)) for sign in (-1, 1)]
    assert all(0 < value < 1 for value in head.values(states, [False, True]))


def test_wrong_states_are_refused() -> None:
    head = random_head(Mlp(width=4))
    with pytest.raises(InputError, match="a logit for every prefix"):
        head.values([head.begin([1], np.full((1, HIDDEN), np.nan, np.float32))], [False])
    with pytest.raises(InputError, match="an engine that gives none"):
        head.begin([1], None)
    state = head.begin([1], np.ones((1, HIDDEN), np.float32))
    with pytest.raises(InputError, match="hidden states of width 24"):
        head.extend(state, [1], np.zeros((1, HIDDEN + 1), np.float32))
    with pytest.raises(InputError, match="hidden states of 2 tokens"):
        head.extend(state, [1, 2], np.zeros((1, HIDDEN), np.float32))
    with pytest.raises(InputError, match="an engine that gives none"):
        head.extend(state, [1], None)


# --- figures and calibration


@pytest.mark.parametrize("soft", [False, True])
def test_auc_is_its_definition(soft: bool) -> None:
    rng = np.random.default_rng(5)
    scores = rng.integers(0, 12, 60) / 4  # with ties
    labels = rng.random(60) if soft else (rng.random(60) < 0.4).astype(float)
    weights = rng.random(60) + 0.1
    above = pairs = 0.0
    for i, j in itertools.permutations(range(60), 2):
        weight = weights[i] * weights[j] * labels[i] * (1 - labels[j])
        pairs += weight
        above += weight * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
    assert auc(scores, labels, weights) == pytest.approx(above / pairs, abs=1e-12)


def test_auc_of_one_class_is_nothing() -> None:
    assert math.isnan(auc(np.arange(9), np.ones(9)))
    assert math.isnan(auc(np.array([1.0]), np.array([0.3])))
    assert auc(np.arange(4), np.array([0, 0, 1, 1])) == 1


def test_ece_and_brier_of_known_cases() -> None:
    p = np.repeat([0.2, 0.8], 50)
    y = np.concatenate([np.arange(50) < 10, np.arange(50) < 30]).astype(float)  # .2 and .6
    assert ece(p, y, bins=2) == pytest.approx(0.1)
    assert ece(p, p) == pytest.approx(0)
    assert ece(np.array([0.3]), np.array([1.0])) == pytest.approx(0.7)
    assert brier(p, y) == pytest.approx((10 * 0.64 + 40 * 0.04 + 30 * 0.04 + 20 * 0.64) / 100)


def test_platt_finds_the_least_loss() -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(100, 30, 4000)
    labels = rng.random(4000) < 1 / (1 + np.exp(-(0.05 * logits - 4)))
    fit = fit_platt(logits, labels)
    assert fit.scale == pytest.approx(0.05, rel=0.1)
    assert fit.offset == pytest.approx(-4, rel=0.1)
    target = labels + (1 - 2 * labels) / 4002

    def loss(scale: float, offset: float) -> float:
        z = scale * logits + offset
        return float(np.mean(np.logaddexp(0, z) - target * z))

    here = loss(fit.scale, fit.offset)
    assert all(loss(fit.scale + a, fit.offset + b) > here for a, b in [(1e-4, 0), (-1e-4, 0), (0, 1e-2), (0, -1e-2)])


def test_platt_of_separable_and_of_constant_logits_is_finite() -> None:
    sharp = fit_platt(np.array([-1.0, -2.0, 1.0, 2.0]), np.array([0, 0, 1, 1]))
    assert sharp.scale > 0
    flat = fit_platt(np.full(10, 3.0), np.arange(10) < 3)
    assert flat.probabilities(np.array([3.0]))[0] == pytest.approx(4 / 12, abs=0.01)


def test_isotonic_is_the_minimax_of_means() -> None:
    rng = np.random.default_rng(7)
    logits = rng.integers(0, 25, 70) / 3  # with ties
    labels = np.clip(logits / 9 + rng.normal(0, 0.3, 70), 0, 1)
    fit = fit_isotonic(logits, labels)
    knots = np.unique(logits)
    margin = 1 / 72
    for i, knot in enumerate(knots):
        means = [
            min(labels[(logits >= knots[a]) & (logits <= knots[b])].mean() for b in range(i, len(knots)))
            for a in range(i + 1)
        ]
        wanted = min(max(max(means), margin), 1 - margin)
        assert fit.probabilities(np.array([knot]))[0] == pytest.approx(wanted, abs=1e-12)
    assert len(fit.logits) < 2 * len(knots)
    assert 0 < fit.probabilities(np.array([-1e9]))[0] < fit.probabilities(np.array([1e9]))[0] < 1


@pytest.mark.parametrize(
    "knots",
    [((1.0, 1.0), (0.2, 0.3)), ((1.0, 2.0), (0.3, 0.2)), ((1.0,), (0.2, 0.3)), ((1.0,), (1.0,)), ((math.nan,), (0.5,))],
)
def test_knots_that_are_no_calibration_are_refused(knots: Any) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Isotonic(logits=knots[0], values=knots[1])


def test_labels_of_shared_prefixes_are_means() -> None:
    answers = [[1, 2, 3], [1, 2, 4], [1, 5], [6]]
    right = [1, 0, 0, 1]
    labels = label_prefixes(answers, right)
    for answer, outcome, found in zip(answers, right, labels, strict=True):
        assert found[len(answer)] == outcome
        for length in range(len(answer)):
            through = [r for a, r in zip(answers, right, strict=True) if a[:length] == answer[:length]]
            assert found[length] == pytest.approx(np.mean(through))
    # as a prefix it has both ends before it, as an answer its own
    assert [list(part) for part in label_prefixes([[1], [1, 2]], [1, 0])] == [[0.5, 1.0], [0.5, 0.5, 0.0]]


# --- training


def digit_task(problems: int, seed: int, *, shuffled: bool = False) -> list[Labelled]:
    """Right is an answer whose last token repeats the prompt's one marked digit among others that are not marked."""
    rng = np.random.default_rng(seed)
    items = []
    for problem in range(problems):
        digits, marked = rng.integers(0, 3, 6), rng.integers(0, 6)
        for _ in range(4):
            answer = rng.integers(0, 3, 3)
            # the states know the answer's digits; the prompt's are only in its tokens
            hidden = rng.normal(0, 0.1, (4, HIDDEN)).astype(np.float32)
            hidden[np.arange(1, 4), answer] += 1
            label = float(rng.random() < 1 / 3) if shuffled else float(answer[-1] == digits[marked])
            prefixes = Prefixes(
                problem=f"{seed}/{problem}",
                domain="digits",
                prompt=[int(digit) + 10 * (place == marked) for place, digit in enumerate(digits)],
                answer=[int(digit) for digit in answer],
                positions=[0, 3],
                labels=[1 / 3, label],
                done=[False, True],
            )
            items.append(Labelled(prefixes, hidden.astype(np.float16)))
    return items


SMALL = Attention(size=16, heads=2, places=8, distances=8, width=24)


def test_a_head_learns_what_needs_an_earlier_position_and_nothing_from_noise() -> None:
    train, heldout = digit_task(300, 1), digit_task(80, 2)
    trained = train_head(
        train, heldout, architecture=SMALL, seed=1, epochs=40, patience=40, learning_rate=0.01, threads=1
    )
    assert trained.metrics["auc_done"].value > 0.9
    assert trained.metrics["auc_within"].value > 0.9
    assert trained.metrics["ece"].value < 0.1
    for metric in trained.metrics.values():
        assert metric.ci_low <= metric.value <= metric.ci_high
    assert trained.metrics["auc_done"].ci_low > 0.8
    # a head that does not look at the prompt cannot know
    blind = train_head(train, heldout, architecture=Mlp(width=24), epochs=8, learning_rate=0.01, threads=1)
    assert abs(blind.metrics["auc_within"].value - 0.5) < 0.15
    train, heldout = digit_task(300, 1, shuffled=True), digit_task(80, 2, shuffled=True)
    noise = train_head(train, heldout, architecture=SMALL, epochs=8, learning_rate=0.01, threads=1)
    assert abs(noise.metrics["auc_done"].value - 0.5) < 0.15
    assert noise.metrics["auc_done"].ci_low < 0.5 < noise.metrics["auc_done"].ci_high


def test_training_again_gives_the_same_weights() -> None:
    train, heldout = digit_task(8, 1), digit_task(4, 2)
    first, second = (train_head(train, heldout, architecture=SMALL, seed=5, epochs=2, threads=1) for _ in range(2))
    assert all((first.head.tensors[name] == second.head.tensors[name]).all() for name in first.head.tensors)
    assert first.metrics == second.metrics


def test_a_problem_on_both_sides_is_refused() -> None:
    items = digit_task(4, 1)
    with pytest.raises(InputError, match="not trained on"):
        train_head(items, items, architecture=SMALL)
    with pytest.raises(InputError, match="at least 2 problems"):
        train_head(items[:4], digit_task(4, 2), architecture=SMALL)
    with pytest.raises(InputError, match="at least 2 held-out"):
        train_head(items, digit_task(1, 2), architecture=SMALL, epochs=1)


def one_number(logits: Any, labels: Any) -> tuple[Head, list[Labelled]]:
    """A head that reads its logit off the state, and one answer to each of many problems."""
    weight = np.eye(1, HIDDEN + 1, dtype=np.float32)[0]
    tensors = {"mean": np.zeros(HIDDEN, np.float32), "std": np.ones(HIDDEN, np.float32), "score": weight}
    items = []
    for problem, (logit, label) in enumerate(zip(logits, labels, strict=True)):
        hidden = np.zeros((2, HIDDEN), np.float32)
        hidden[1, 0] = logit
        prefixes = Prefixes(
            problem=str(problem),
            domain="toy",
            prompt=[1],
            answer=[2],
            positions=[1],
            labels=[float(label)],
            done=[True],
        )
        items.append(Labelled(prefixes, hidden))
    return Head(Linear(), {**tensors, "score_bias": np.zeros(1, np.float32)}), items


def test_judging_again_corrects_states_of_another_scale() -> None:
    """What quantizing the base may do to its states: the ranking stays, the calibration does not."""
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 2, 300)
    labels = (rng.random(300) < 1 / (1 + np.exp(-logits))).astype(float)
    head, items = one_number(6 * logits + 4, labels)
    calibration, metrics = judge(head, items)
    assert isinstance(calibration, Platt)
    assert calibration.scale == pytest.approx(1 / 6, rel=0.25)
    assert metrics["brier"].value < brier(Platt().probabilities(6 * logits + 4), labels)
    assert metrics["auc"].value == pytest.approx(auc(logits, labels))
    assert "auc_within" not in metrics  # one answer to each problem has nothing to be compared with
    isotonic, _ = judge(head, items, calibration="isotonic")
    assert isotonic.probabilities(np.array([4.0]))[0] == pytest.approx(0.5, abs=0.2)


def test_figures_are_of_problems_that_the_calibration_did_not_see() -> None:
    rng = np.random.default_rng(9)
    logits, labels = rng.normal(0, 1, 100), (rng.random(100) < 0.5).astype(float)
    head, items = one_number(logits, labels)
    calibration, metrics = judge(head, items, calibration="isotonic")
    # fitted to noise it looks better than the base rate alone, and is worse
    base = float(np.var(labels))
    assert brier(calibration.probabilities(logits), labels) < base < metrics["brier"].value


# --- files


def saved(directory: Path, architecture: Any = ARCHITECTURES[2], **more: Any) -> tuple[Head, list[Prefixes]]:
    head = random_head(architecture, calibration=more.pop("calibration", Platt(scale=1.5, offset=-0.25)))
    heldout = [random_item(np.random.default_rng(i), str(i)).prefixes for i in range(3)]
    metrics = {"auc": Metric(value=0.8, ci_low=0.7, ci_high=0.9)}
    save_verifier(
        directory,
        head,
        **{"trunk": TRUNK, "domains": ["toy"], "training": TRAINING, "metrics": metrics, "heldout": heldout, **more},
    )
    return head, heldout


@each_architecture
def test_what_is_saved_is_loaded(architecture: Any, tmp_path: Path) -> None:
    calibration = Isotonic(logits=(-1.0, 0.5), values=(0.1, 0.7))
    head, heldout = saved(tmp_path / "one", architecture, calibration=calibration)
    manifest, loaded = load_head(tmp_path / "one")
    assert isinstance(loaded, Head)
    assert (manifest.kind, loaded.reads, manifest.domains) == ("head", True, ("toy",))
    assert (loaded.architecture, loaded.calibration) == (architecture, calibration)
    assert read_heldout(tmp_path / "one") == heldout
    item = random_item(np.random.default_rng(9))
    np.testing.assert_allclose(head_logits(loaded, item), head_logits(head, item), rtol=2e-3, atol=5e-3)
    for name, array in head.tensors.items():
        stored = array if array.ndim < 2 else array.astype(np.float16).astype(np.float32)
        assert (loaded.tensors[name] == stored).all()
    saved(tmp_path / "two", architecture, calibration=calibration)
    for name in (MANIFEST, WEIGHTS, HELDOUT):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert verify_files(tmp_path / "one") == manifest


def test_the_safetensors_package_reads_what_we_write(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    arrays = {
        "a": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.float32(7.5).reshape(1),
        "none": np.zeros((0, 3), np.float32),
    }
    write_arrays(tmp_path / "ours.safetensors", arrays)
    theirs = load_file(tmp_path / "ours.safetensors")
    assert {name: (a.dtype, a.shape, a.tolist()) for name, a in theirs.items()} == {
        name: (a.dtype, a.shape, a.tolist()) for name, a in arrays.items()
    }
    save_file(arrays, tmp_path / "theirs.safetensors")
    read = read_arrays(tmp_path / "theirs.safetensors", 10_000)
    assert all((read[name] == array).all() and read[name].shape == array.shape for name, array in arrays.items())
    save_file({"a": np.arange(3)}, tmp_path / "integers.safetensors")
    with pytest.raises(InputError, match="tensors of F16 or F32"):
        read_arrays(tmp_path / "integers.safetensors", 10_000)


def test_values_beyond_float16_stay_whole(tmp_path: Path) -> None:
    head = random_head(ARCHITECTURES[1])
    head.tensors["inner"][0, 0] = 1e6
    save_verifier(tmp_path, head, trunk=TRUNK, domains=[], training=TRAINING, metrics={})
    assert load_head(tmp_path)[1].tensors["inner"][0, 0] == 1e6  # type: ignore[attr-defined]


def rewrite(directory: Path, change: Any) -> None:
    """Change the manifest's JSON."""
    content = json.loads((directory / MANIFEST).read_text())
    change(content)
    (directory / MANIFEST).write_text(json.dumps(content))


def replace_file(directory: Path, name: str, data: bytes) -> None:
    """Put other content in a file, and its digest in the manifest."""
    (directory / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(directory, lambda content: content["files"].update({name: entry}))


def flip(directory: Path) -> None:
    data = bytearray((directory / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (directory / WEIGHTS).write_bytes(data)


def weights_with(**changes: Any) -> Any:
    def change(directory: Path) -> None:
        arrays = read_arrays(directory / WEIGHTS, 1 << 20)
        arrays.update(changes)
        write_arrays(directory / WEIGHTS, {name: array for name, array in arrays.items() if array is not None})
        replace_file(directory, WEIGHTS, (directory / WEIGHTS).read_bytes())

    return change


def huge_header(directory: Path) -> None:
    replace_file(directory, WEIGHTS, (1 << 60).to_bytes(8, "little") + (directory / WEIGHTS).read_bytes()[8:])


def huge_shape(directory: Path) -> None:
    text = json.dumps({"mean": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}}).encode()
    replace_file(directory, WEIGHTS, len(text).to_bytes(8, "little") + text)


def linked(directory: Path) -> None:
    outside = directory.parent / "outside"
    (directory / WEIGHTS).rename(outside)
    (directory / WEIGHTS).symlink_to(outside)


def setting(path: str, value: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for part in parents:
            content = content[part]
        content[last] = value

    return lambda directory: rewrite(directory, change)


FILE = {"bytes": 1, "sha256": "0" * 64}
HOSTILE = {
    "no manifest": lambda d: (d / MANIFEST).unlink(),
    "truncated manifest": lambda d: (d / MANIFEST).write_text((d / MANIFEST).read_text()[:-9]),
    "deep JSON": lambda d: (d / MANIFEST).write_text("[" * 200_000),
    "huge manifest": lambda d: (d / MANIFEST).write_text(" " * (5 << 20) + (d / MANIFEST).read_text()),
    "a list": lambda d: (d / MANIFEST).write_text("[]"),
    "another schema": setting("schema_version", 2),
    "an unknown field": setting("code", "import os"),
    "an unknown kind": setting("kind", "pickle"),
    "an unknown architecture": setting("architecture/name", "transformer"),
    "heads that do not divide": setting("architecture/heads", 3),
    "a huge size": setting("architecture/size", 1 << 40),
    "another size": setting("architecture/size", 20),
    "another width": setting("hidden_size", HIDDEN + 1),
    "NaN calibration": setting("calibration/scale", math.nan),
    "infinite metric": setting("metrics/auc/value", math.inf),
    "an absolute path": setting("files//etc/hostname", FILE),
    "a path upwards": setting("files/../outside", FILE),
    "no weights named": setting("files", {}),
    "a missing file": setting("files/more.bin", FILE),
    "truncated weights": lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-10]),
    "truncated weights, new digest": lambda d: replace_file(d, WEIGHTS, (d / WEIGHTS).read_bytes()[:-10]),
    "a flipped bit": flip,
    "NaN": weights_with(score=np.array([math.nan] * 12)),
    "another shape": weights_with(score=np.zeros(13)),
    "a missing tensor": weights_with(score=None),
    "another tensor": weights_with(more=np.zeros(1)),
    "no deviation": weights_with(std=np.zeros(HIDDEN)),
    "no mean": weights_with(mean=None),
    "a scalar mean": weights_with(mean=np.array(1.0)),
    "a huge header": huge_header,
    "a huge shape": huge_shape,
    "a link outside": linked,
    "a directory": lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_error(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "verifier"
    saved(directory)
    load_head(directory)
    # a path with slashes is one key of `files`
    if name in ("an absolute path", "a path upwards"):
        key = "/etc/hostname" if "absolute" in name else "../outside"
        (tmp_path / "outside").write_text("x")
        rewrite(directory, lambda content: content["files"].update({key: FILE}))
    else:
        HOSTILE[name](directory)
    with pytest.raises(InputError) as caught:
        load_head(directory)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "data",
    [
        b"no gzip",
        gzip.compress(b"{}\n"),
        gzip.compress(b"not JSON\n"),
        gzip.compress(b"x" * 100_000)[:-20],
        gzip.compress(b"\n" * ((64 << 20) + 1), 1),
    ],
    ids=["no gzip", "fields", "no JSON", "truncated", "bomb"],
)
def test_hostile_held_out_answers_are_one_error(data: bytes, tmp_path: Path) -> None:
    saved(tmp_path)
    replace_file(tmp_path, HELDOUT, data)
    load_head(tmp_path)
    with pytest.raises(InputError):
        read_heldout(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"positions": [3, 1, 8]}, {"positions": [0, 1, 9]}, {"labels": [0.5]}, {"labels": [0, 1, 1.5]}, {"prompt": []}],
)
def test_labels_that_fit_no_answer_are_refused(changes: dict[str, Any]) -> None:
    fields = random_item(np.random.default_rng(1)).prefixes.model_dump()
    with pytest.raises(ValueError, match="validation error"):
        Prefixes.model_validate({**fields, **changes})


# --- a trunk of its own


class Echo:
    """An engine whose hidden state is a running hash of the tokens; it counts what it computes."""

    end_tokens = frozenset[int]()
    vocabulary_size = 100

    def __init__(self, *, rewind: bool = True, hidden_states: bool = True) -> None:
        self.capabilities = Capabilities(False, rewind, False, hidden_states, False, 128, 1, 16)
        self.loaded = {"device": "test"}
        self.past: dict[int, list[int]] = {}
        self.computed = 0
        self.closed = False

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        return [1 if special else 0, *text.encode()]

    def start(self) -> int:
        if self.past:
            raise InputError("a free sequence", "none", "release one")
        self.past[5] = []
        return 5

    def truncate(self, sequence: int, length: int) -> None:
        assert self.capabilities.rewind
        self.past[sequence] = self.past[sequence][:length]

    def release(self, sequence: int) -> None:
        del self.past[sequence]

    def length(self, sequence: int) -> int:
        return len(self.past[sequence])

    def step(self, entries: Sequence[Entry], *, hidden_states: bool = False) -> StepOutput:
        rows = []
        for entry in entries:
            assert entry.token is not None
            self.past[entry.sequence].append(entry.token)
            self.computed += 1
            if entry.wants_logits:
                rows.append(state_of(self.past[entry.sequence]))
        return StepOutput(np.zeros((len(rows), 100), np.float32), np.stack(rows) if hidden_states else None)

    def close(self) -> None:
        self.closed = True


def state_of(tokens: Sequence[int]) -> Any:
    seed = int.from_bytes(hashlib.sha256(bytes(tokens)).digest()[:8], "little")
    return np.random.default_rng(seed).normal(0, 1, HIDDEN).astype(np.float32)


@pytest.mark.parametrize("rewind", [True, False])
@pytest.mark.parametrize("architecture", [Linear(), Mlp(width=8)], ids=lambda a: a.name)
def test_a_trunk_of_its_own_scores_each_prefix_by_its_last_state(architecture: Any, rewind: bool) -> None:
    head, engine = random_head(architecture), Echo(rewind=rewind)
    rng = np.random.default_rng(10)
    with OwnTrunk(engine, head) as verifier:  # type: ignore[arg-type]
        assert not verifier.reads
        for _ in range(5):
            begun = verifier.begin([7, 8], None)
            states = [verifier.extend(begun, list(rng.integers(0, 2, rng.integers(0, 5))), None) for _ in range(6)]
            done = [bool(flag) for flag in rng.integers(0, 2, 6)]
            found = verifier.values(states, done)
            read = [head.extend(head.begin((), None), [0], state_of(s)[None]) for s in states]
            np.testing.assert_allclose(found, head.values(read, done), atol=1e-6)
    assert engine.closed


def test_a_trunk_computes_what_is_new_only_and_says_how_much() -> None:
    engine = Echo()
    verifier = OwnTrunk(engine, random_head(Linear()), weight_bytes=1000)  # type: ignore[arg-type]
    state = verifier.begin(range(10), None)
    verifier.values([state], [False])
    assert engine.computed == 10
    verifier.values([verifier.extend(state, [50], None), verifier.extend(state, [60, 61], None)], [False, False])
    assert engine.computed == 13
    verifier.values([state, state], [False, True])  # its last position is computed again, once
    assert engine.computed == 14
    assert verifier.work == (14, 4 * 1000)


def test_another_tokenizer_reads_the_text() -> None:
    engine, head = Echo(), random_head(Linear())
    verifier = OwnTrunk(engine, head, to_text=lambda tokens: "".join(chr(97 + token) for token in tokens))  # type: ignore[arg-type]
    (found,) = verifier.values([verifier.extend(verifier.begin([0, 1], None), [2], None)], [False])
    read = head.extend(head.begin((), None), [0], state_of([1, *b"abc"])[None])
    assert found == pytest.approx(head.values([read], [False])[0], abs=1e-6)


def test_an_empty_prefix_and_an_engine_without_states_are_refused() -> None:
    verifier = OwnTrunk(Echo(), random_head(Linear()))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one token"):
        verifier.values([verifier.begin([], None)], [False])
    with pytest.raises(InputError, match="an engine with hidden states"):
        OwnTrunk(Echo(hidden_states=False), random_head(Linear()))  # type: ignore[arg-type]


def test_a_verifier_with_a_trunk_is_opened_as_it_was_built_and_not_as_it_was_trained(tmp_path: Path) -> None:
    saved(tmp_path, Linear(), kind="model", heldout=[])
    assert read_heldout(tmp_path) == []
    options = EngineOptions(context_tokens=64, threads=1)
    with pytest.raises(InputError, match="a built verifier"), open_verifier(tmp_path, Echo(), options):  # type: ignore[arg-type]
        pass
    (tmp_path / "trunk.gguf").write_bytes(b"GGUF")
    saved(tmp_path, Linear(), kind="adapter", heldout=[], files=["trunk.gguf"])
    with pytest.raises(InputError, match="which runs a LoRA"), open_verifier(tmp_path, Echo(), options):  # type: ignore[arg-type]
        pass


# --- adapters and reward models


def token_task(problems: int, seed: int) -> list[Prefixes]:
    """Right is an answer that ends in an even token."""
    rng = np.random.default_rng(seed)
    items = []
    for problem in range(problems):
        for _ in range(2):
            answer = [int(token) for token in rng.integers(10, 30, 4)]
            items.append(
                Prefixes(
                    problem=f"{seed}/{problem}",
                    domain="even",
                    prompt=[1, *(int(token) for token in rng.integers(10, 30, 3))],
                    answer=answer,
                    positions=[2, 4],
                    labels=[float(answer[1] % 2 == 0), float(answer[3] % 2 == 0)],
                    done=[False, True],
                )
            )
    return items


@pytest.fixture(scope="module")
def adapter(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A LoRA of the tiny model with its head."""
    out = tmp_path_factory.mktemp("lora") / "adapter"
    trained = train_adapter(
        tiny_hf, out, token_task(60, 1), token_task(30, 2), rank=4, learning_rate=3e-3, epochs=6, batch=16, threads=1
    )
    return out, trained


@pytest.mark.slow
def test_an_adapter_learns_with_its_head(adapter: Any, tiny_hf: Path) -> None:
    import peft
    import torch

    from edgekit.huggingface import load_model

    out, trained = adapter
    assert trained.metrics["auc"].value > 0.9
    # what is on disk is what was judged
    network = peft.PeftModel.from_pretrained(load_model(tiny_hf), out).eval()
    item = token_task(1, 3)[0]
    with torch.no_grad():
        trunk = network.get_base_model().base_model
        hidden = trunk(input_ids=torch.tensor([[*item.prompt, *item.answer]])).last_hidden_state[0, 3:].numpy()
    right = head_logits(trained.head, Labelled(item, hidden)) > 0
    assert list(right) == [label > 0.5 for label in item.labels]


@pytest.mark.slow
def test_llama_cpp_computes_the_converted_adapter(adapter: Any, tiny_hf: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    import peft
    import torch

    from edgekit.engines.llama_cpp import open_model
    from edgekit.huggingface import load_model

    out, _ = adapter
    write_gguf_adapter(out, tiny_hf, tmp_path / "adapter.gguf")
    tokens = [1, 20, 30, 40, 50, 60, 70]
    network = load_model(tiny_hf)
    with torch.no_grad():
        plain = network.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0].numpy()
        changed = peft.PeftModel.from_pretrained(network, out).eval().get_base_model().base_model
        wanted = changed(input_ids=torch.tensor([tokens])).last_hidden_state[0].numpy()

    def states(engine: Any) -> Any:
        sequence = engine.start()
        found = engine.step([Entry(sequence, token) for token in tokens], hidden_states=True).hidden
        engine.release(sequence)
        return found

    options = EngineOptions(context_tokens=64, threads=1)
    with open_model(tiny_gguf, options) as engine:
        before = states(engine)
        adapted = engine.adapted(tmp_path / "adapter.gguf", options)
        found = states(adapted)
        # one model in memory, and the other context does not see the adapter
        assert np.array_equal(states(engine), before)
        assert adapted.weight_bytes == engine.weight_bytes
        with pytest.raises(InputError, match="a LoRA for this model"):
            engine.adapted(tiny_gguf, options)
    with pytest.raises(InputError, match="was closed"):
        adapted.start()
    change = np.abs(wanted - plain).max()
    assert change > 0.1
    assert np.abs(found - wanted).max() < 0.02 * change


def test_an_adapter_that_is_no_plain_lora_is_not_converted(tiny_hf: Path, tmp_path: Path) -> None:
    import peft

    from edgekit.huggingface import load_model

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    peft.get_peft_model(load_model(tiny_hf), config).save_pretrained(tmp_path / "dora")
    with pytest.raises(InputError, match="a plain LoRA"):
        write_gguf_adapter(tmp_path / "dora", tiny_hf, tmp_path / "adapter.gguf")


@pytest.mark.parametrize(("labels", "kind"), [(1, "sequence"), (2, "sequence"), (2, "token")])
def test_a_reward_model_is_its_trunk_and_its_score(labels: int, kind: str, tiny_hf: Path, tmp_path: Path) -> None:
    import torch

    from edgekit.engines.torch_reference import open_model
    from edgekit.model import resolve_model

    model = tiny.write_reward_model(tmp_path / "reward", tiny_hf, labels, kind)
    head = import_model(tmp_path / "reward", tmp_path / "trunk")
    assert resolve_model(str(tmp_path / "trunk")).artifact.facts["architecture"] == "llama"
    prefixes = [[1, 20, 30], [1, 20, 30, 40, 50], [1, 20, 60]]
    wanted = []
    with torch.no_grad():
        for tokens in prefixes:
            logits = model(input_ids=torch.tensor([tokens])).logits
            row = logits[0, -1] if kind == "token" else logits[0]
            wanted.append(float(row.softmax(0)[1] if labels == 2 else row.sigmoid()[0]))
    with OwnTrunk(open_model(tmp_path / "trunk", EngineOptions(context_tokens=64, threads=1)), head) as verifier:
        states = [verifier.extend(verifier.begin(tokens[:2], None), tokens[2:], None) for tokens in prefixes]
        found = verifier.values(states, [False, True, False])
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert len({round(value, 3) for value in wanted}) == 3


def test_what_is_no_reward_model_is_refused(tiny_hf: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a reward model"):
        import_model(tiny_hf, tmp_path / "trunk")
    tiny.write_reward_model(tmp_path / "three", tiny_hf, 3, "sequence")
    with pytest.raises(InputError, match="1 or 2 rows"):
        import_model(tmp_path / "three", tmp_path / "trunk")
