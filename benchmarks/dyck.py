"""The Dyck experiment of "Taming Imperfect Process Verifiers" (arXiv:2510.03149): does VGB beat the frontier?

A small transformer is trained here, too briefly, on words of two kinds of brackets; a value head learns from its
rollouts. Given beginnings of words, each method answers a number of times. Its accuracy is the fraction of balanced
words, its diversity the number of distinct balanced words among the answers. In one half of the table values come from
the head everywhere: no method is told what is balanced. In the other V of a finished word is its outcome, for every
method and control, as the theory has it. Tokens forward count one position for each token computed; wall times say
nothing about a device, because the engine here remembers every prefix it has computed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgekit.companions.rollouts import collect
from edgekit.companions.verifier import train_head
from edgekit.decode import Node, Options, Sampling, Session, find_strategy
from edgekit.engine import Capabilities, Closing, Entry, FloatArray, StepOutput
from edgekit.tasks import Problem, Split, choose
from edgekit.tasks.dyck import balanced, dyck_word
from edgekit.verifier import SMALLEST, Attention, Constant, RandomVerifier, Verifier, Work

LENGTH = 32
PAIRS = {"(": ")", "[": "]"}
SHORTEST, LONGEST = 8, 16
"""Of the beginnings."""
BEGIN, END, BRACKETS = 0, 1, "()[]"
MOST_STEPS = 600
"""Of a walk: one by single brackets would need thousands, and hours; it is left out."""
TILTS = (1.0, 4.0, 16.0)
"""Powers of V that the walk draws by, where the end is judged by V: best of n takes the greatest of n."""
RESAMPLES = 2000
REMEMBERED = 300_000
"""Prefixes that the engine keeps the outputs of."""
Doubles = npt.NDArray[np.float64]


# --- the words and the model


class Words:
    """The task: a beginning, to be completed to a balanced word of the length."""

    name, summary, answer, stop, max_tokens = "dyck-2", "words of two kinds of brackets", "text", (), LENGTH

    def problems(self, split: Split, count: int | None, seed: int = 0) -> list[Problem]:
        """The beginnings of words."""

        def drawn() -> Iterator[Problem]:
            draw = random.Random(seed)
            while True:
                yield Problem(dyck_word(draw, LENGTH, PAIRS)[: draw.randint(SHORTEST, LONGEST)], {}, chat=False)

        return choose(drawn(), split, count)

    def check(self, problem: Problem, answer: str) -> float:
        """1 for a balanced word of the length."""
        whole = problem.prompt + answer
        return float(len(whole) == LENGTH and balanced(whole))


class Network(torch.nn.Module):
    """A decoder-only transformer with learned positions."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        vocabulary = 2 + len(BRACKETS)
        self.tokens = torch.nn.Embedding(vocabulary, width)
        self.places = torch.nn.Embedding(2 * LENGTH, width)
        layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = torch.nn.TransformerEncoder(layer, layers, torch.nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = torch.nn.Linear(width, vocabulary, bias=False)
        self.width = width

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Final states, shape (words, length, width)."""
        length = tokens.shape[1]
        mask = torch.nn.Transformer.generate_square_subsequent_mask(length)
        states: torch.Tensor = self.blocks(self.tokens(tokens) + self.places.weight[:length], mask, is_causal=True)
        return states


def train(steps: int, width: int, layers: int, seed: int) -> tuple[Network, float]:
    """Train on words; returns the network and its last loss in nats a token."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    network = Network(width, layers)
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    losses = []
    for _ in range(steps):
        rows = [
            [BEGIN, *(2 + BRACKETS.index(letter) for letter in dyck_word(draw, LENGTH, PAIRS)), END] for _ in range(64)
        ]
        tokens = torch.tensor(rows)
        logits = network.head(network(tokens[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return network.eval(), statistics.fmean(losses[-20:])


class WordEngine(Closing):
    """The network behind the Engine protocol; a sequence is its tokens, so that a fork is a copy."""

    def __init__(self, network: Network, sequences: int) -> None:
        self._network = network
        self._held: dict[int, tuple[int, ...]] = {}
        self._known: dict[tuple[int, ...], tuple[FloatArray, FloatArray]] = {}
        self.vocabulary_size = 2 + len(BRACKETS)
        self.end_tokens = frozenset({END})
        self.loaded: Mapping[str, str] = {"device": "cpu"}
        self.capabilities = Capabilities(
            fork=True,
            rewind=True,
            batch=True,
            hidden_states=True,
            input_embeddings=False,
            context_tokens=2 * LENGTH,
            sequences=sequences,
            batch_tokens=sequences * LENGTH,
        )

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Brackets, and the begin of a word."""
        return [BEGIN] * special + [2 + BRACKETS.index(letter) for letter in text]

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """Brackets."""
        return "".join(BRACKETS[token - 2] for token in tokens if token > END).encode()

    def start(self) -> int:
        """A new empty sequence."""
        sequence = next(place for place in range(self.capabilities.sequences) if place not in self._held)
        self._held[sequence] = ()
        return sequence

    def fork(self, sequence: int) -> int:
        """A copy of a sequence."""
        copy = self.start()
        self._held[copy] = self._held[sequence]
        return copy

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first tokens."""
        self._held[sequence] = self._held[sequence][:length]

    def release(self, sequence: int) -> None:
        """Forget a sequence."""
        del self._held[sequence]

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return len(self._held[sequence])

    def step(self, entries: Sequence[Entry], *, hidden_states: bool = False) -> StepOutput:
        """Append tokens, and compute those prefixes that were never seen."""
        wanted = []
        for entry in entries:
            assert entry.token is not None
            past = self._held[entry.sequence] = (*self._held[entry.sequence], entry.token)
            if entry.wants_logits:
                wanted.append(past)
        if len(self._known) > REMEMBERED:
            self._known.clear()
        if new := [past for past in dict.fromkeys(wanted) if past not in self._known]:
            if len(new) < 4:
                # the next step will ask for one of them, and a small batch costs what one row costs
                new += [(*past, token) for past in new for token in range(END + 1, self.vocabulary_size)]
            self._compute(new)
        rows = [self._known[past] for past in wanted]
        logits = np.array([row[0] for row in rows], np.float32).reshape(len(rows), self.vocabulary_size)
        hidden = np.array([row[1] for row in rows], np.float32).reshape(len(rows), self._network.width)
        return StepOutput(logits, hidden if hidden_states else None)

    def _compute(self, pasts: Sequence[tuple[int, ...]]) -> None:
        tokens = torch.zeros((len(pasts), max(map(len, pasts))), dtype=torch.int64)
        for row, past in zip(tokens, pasts, strict=True):
            row[: len(past)] = torch.tensor(past)
        with torch.inference_mode():
            # what is padded follows, so no prefix sees it
            last = self._network(tokens)[torch.arange(len(pasts)), torch.tensor([len(past) - 1 for past in pasts])]
            logits = self._network.head(last).numpy()
        self._known |= {past: (logits[i], last[i].numpy()) for i, past in enumerate(pasts)}

    def close(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._known.clear()


# --- the methods


@dataclass(frozen=True)
class Outcome:
    """A verifier for partial words, and the truth for finished ones."""

    inner: Verifier

    @property
    def reads(self) -> bool:
        """As the inner one."""
        return self.inner.reads

    @property
    def work(self) -> Work:
        """As the inner one."""
        return self.inner.work

    def begin(self, prompt: Sequence[int], hidden: FloatArray | None) -> Any:
        """Remember the word."""
        return self.inner.begin(prompt, hidden), tuple(prompt)

    def extend(self, state: Any, tokens: Sequence[int], hidden: FloatArray | None) -> Any:
        """And how it goes on."""
        return self.inner.extend(state[0], tokens, hidden), (*state[1], *tokens)

    def values(self, states: Sequence[Any], done: Sequence[bool]) -> FloatArray:
        """V of partial words; nearly 1 or 0 for finished ones."""
        values = self.inner.values([state for state, _ in states], done).copy()
        for index, ((_, tokens), ended) in enumerate(zip(states, done, strict=True)):
            if ended:
                word = "".join(BRACKETS[token - 2] for token in tokens if token > END)
                values[index] = 1 - SMALLEST if len(word) == LENGTH and balanced(word) else SMALLEST
        return values


Decode = Callable[[Session], Iterator[Node]]


def block_rejection(session: Session) -> Iterator[Node]:
    """Keep the first of at most `candidates` blocks that passes with probability V, else the last; then the next."""
    node = session.root
    while not node.ended:
        tried = node
        for _ in range(session.options.candidates):
            (tried,) = session.grow([node])
            if session.random.random() < session.values([tried])[0]:
                break
        node = tried
        yield node


@dataclass(frozen=True)
class Method:
    """A method with its arguments."""

    name: str
    verifier: str
    block: int
    effort: int
    """Candidates of a block, or steps of the walk."""
    outcome: bool = False
    """Whether V of a finished word is its outcome."""
    tilt: float = 1.0
    """Of the walk."""

    def decode(self) -> Decode:
        """The strategy; best of n block by block is a beam of one."""
        if self.name == "block-rejection":
            return block_rejection
        return find_strategy({"vgb": "vgb", "sample": "sample", "block-best-of-n": "beam"}[self.name])

    def options(self, seed: int) -> Options:
        """Its arguments: a walk draws proposals one at a time, so that it pays for none that it does not look at."""
        return Options(
            candidates=self.effort,
            steps=self.effort,
            tilt=self.tilt,
            width=1,
            block_tokens=self.block,
            block_end=None,
            max_tokens=LENGTH,
            sampling=Sampling(1.0),
            seed=seed,
        )


@dataclass(frozen=True)
class Found:
    """What a method did, for each beginning."""

    method: Method
    accuracy: Doubles
    """Fraction of the answers that are balanced."""
    diversity: Doubles
    """Distinct balanced answers."""
    tokens: Doubles
    """Mean tokens forward of an answer."""
    seconds: float

    def interval(self, values: Doubles, draws: npt.NDArray[np.intp]) -> tuple[float, float, float]:
        """Mean over the beginnings and its bootstrap interval."""
        low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
        return float(values.mean()), float(low), float(high)


def answer(
    engine: WordEngine, task: Words, problems: Sequence[Problem], method: Method, verifier: Verifier | None, count: int
) -> Found:
    """Let a method answer every problem `count` times, each time in a session of its own."""
    begun = time.perf_counter()
    decode = method.decode()
    accuracy, diversity, tokens = [], [], []
    for index, problem in enumerate(problems):
        right, spent = [], []
        for turn in range(count):
            options = method.options(1000 * index + turn)
            session = Session(engine, engine.tokenize(problem.prompt, special=True), options, verifier)
            try:
                *_, node = decode(session)
                spent.append(session.cost.tokens_forward)
            finally:
                session.close()
            if task.check(problem, node.text):
                right.append(node.text)
        accuracy.append(len(right) / count)
        diversity.append(float(len(set(right))))
        tokens.append(statistics.fmean(spent))
    seconds = time.perf_counter() - begun
    return Found(method, np.array(accuracy), np.array(diversity), np.array(tokens), seconds)


# --- the frontier


def frontier(points: Sequence[tuple[float, float]], accuracy: float) -> float:
    """Diversity of the best of `points` (accuracy, diversity) at an accuracy.

    Between the points that no other beats in both it is linear, which is more than each of them gives alone; beyond
    the most accurate it stays as it is there. Both favour the points.
    """
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (-point[0], -point[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    best.reverse()
    return float(np.interp(accuracy, [point[0] for point in best], [point[1] for point in best]))


def gap(one: Found, others: Sequence[Found], draws: npt.NDArray[np.intp]) -> tuple[float, float, float]:
    """Diversity above the frontier of the others at equal accuracy, with a paired bootstrap over the beginnings."""

    def at(chosen: npt.NDArray[np.intp]) -> float:
        points = [(float(other.accuracy[chosen].mean()), float(other.diversity[chosen].mean())) for other in others]
        return float(one.diversity[chosen].mean()) - frontier(points, float(one.accuracy[chosen].mean()))

    low, high = np.percentile([at(chosen) for chosen in draws], [2.5, 97.5])
    return at(np.arange(draws.shape[1])), float(low), float(high)


COLOURS = {"vgb": "#c0392b", "block-best-of-n": "#2c6fbb", "block-rejection": "#3a9150", "sample": "#222222"}


def plot(rows: Sequence[dict[str, Any]], count: int, path: Path) -> None:
    """Accuracy against diversity as SVG: filled with the trained head, hollow the controls."""
    size, edge = 420, 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size + 200}" height="{size + 2 * edge}" font-size="12" '
        'font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>',
        f'<path d="M{edge},{edge} V{edge + size} H{edge + size}" fill="none" stroke="black"/>',
        f'<text x="{edge + size / 2 - 60}" y="{size + edge + 36}">fraction balanced, 0 to 1</text>',
        f'<text x="8" y="{edge - 16}">distinct balanced among {count}, 0 to {count}</text>',
    ]
    for row in rows:
        x, y = edge + size * row["accuracy"], edge + size * (1 - row["diversity"] / count)
        colour = COLOURS[row["method"]]
        fill = colour if row["verifier"] == "trained" else "none"
        label = f"{row['method']}, {row['verifier']}, block {row['block']}, {row['effort']}"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}"><title>{label}</title></circle>'
        )
    for place, (name, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{edge + size + 10}" y="{edge + 20 * place}" fill="{colour}">{name}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def main() -> None:
    """Train, roll out, answer, print the frontier."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few beginnings, few arguments: a minute")
    parser.add_argument("--steps", type=int, default=700, help="training steps of the transformer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beginnings", type=int, help="words to complete  [16, quick 8]")
    parser.add_argument("--answers", type=int, help="of each method to each  [12, quick 6]")
    parser.add_argument("--out", type=Path, help="write the plot here, as SVG")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick, task = arguments.quick, Words()
    arguments.answers = arguments.answers or (6 if quick else 12)
    begun = time.perf_counter()
    network, loss = train(arguments.steps, 64, 2, arguments.seed)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"transformer: {parameters} parameters, {loss:.3f} nats a token, {time.perf_counter() - begun:.0f} s")
    begun = time.perf_counter()
    with WordEngine(network, sequences=40) as engine:
        learn, judge = (80, 40) if quick else (400, 100)
        rollouts = [
            collect(
                engine,
                task,
                task.problems(split, count, arguments.seed),
                Path(),
                samples=16,
                options=Options(sampling=Sampling(1.0), seed=arguments.seed),
            )
            for split, count in (("train", learn), ("validation", judge))
        ]
        trained = train_head(
            rollouts[0].answers,
            rollouts[1].answers,
            architecture=Attention(layers=2, size=64, heads=4, places=LENGTH, distances=LENGTH, width=128),
            seed=arguments.seed,
            threads=1,
        )
        figures = {name: metric.value for name, metric in trained.metrics.items()}
        print(
            f"rollouts: {rollouts[0].right:.1%} balanced; head: "
            + ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            + f"; {time.perf_counter() - begun:.0f} s"
        )
        verifiers: dict[str, Verifier | None] = {
            "trained": trained.head,
            "random": RandomVerifier(arguments.seed),
            "none": None,
            "constant": Constant(),
        }
        methods = [
            Method("sample", "none", LENGTH, 1),
        ]
        blocks, efforts = ((8,), (2, 8)) if quick else ((1, 4, 16), (2, 8, 32))
        peers = ("block-best-of-n", "block-rejection")
        for outcome in (False, True):
            methods += [Method("vgb", name, 8, 36, outcome) for name in ("constant", "random")]
            methods += [Method(name, "random", 8, 8, outcome) for name in peers]
            for block in blocks:
                methods += [Method(name, "trained", block, effort, outcome) for name in peers for effort in efforts]
                # a walk over h blocks needs some h^2 steps
                square = math.ceil((LENGTH - SHORTEST) / block) ** 2
                long = (16,) if outcome and not quick else ()
                # a power makes values small and walks long: it is tried where there are few blocks
                tilts = (1.0,) if outcome or square > 16 else TILTS
                walks = [(4, tilt) for tilt in tilts] + [(times, 1.0) for times in long]
                methods += [
                    Method("vgb", "trained", block, times * square, outcome, tilt)
                    for times, tilt in walks
                    if times * square <= MOST_STEPS
                ]
        problems = task.problems("test", arguments.beginnings or (8 if quick else 16), arguments.seed)
        found = []
        for method in methods:
            verifier = verifiers[method.verifier]
            if verifier is not None and method.outcome:
                verifier = Outcome(verifier)
            found.append(answer(engine, task, problems, method, verifier, arguments.answers))
            one = found[-1]
            means = f"balanced {one.accuracy.mean():.3f}, distinct {one.diversity.mean():.2f}"
            print(f"{method}: {means}, {one.seconds:.1f} s", file=sys.stderr, flush=True)
    report(found, arguments, {"loss": loss, "rollouts_right": rollouts[0].right, "head": figures})


def report(found: Sequence[Found], arguments: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Print the table, the verdict and the JSON line."""
    count = len(found[0].accuracy)
    draws = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    peers = [one for one in found if one.method.name != "vgb" and one.method.verifier in ("trained", "none")]
    others = {
        outcome: [one for one in peers if one.method.outcome == outcome or one.method.verifier == "none"]
        for outcome in (False, True)
    }
    rows: list[dict[str, Any]] = []
    print(
        f"{'method':<16} {'verifier':<9} {'ends by':<8} {'block':>5} {'n':>4} {'tilt':>4}  "
        f"balanced {'':<14} distinct {'':<13} tokens  above"
    )
    for one in found:
        method = one.method
        accuracy, diversity = one.interval(one.accuracy, draws), one.interval(one.diversity, draws)
        row = {
            "method": method.name, "verifier": method.verifier, "block": method.block, "effort": method.effort,
            "outcome": method.outcome, "tilt": method.tilt,
            "accuracy": accuracy[0], "accuracy_interval": accuracy[1:], "diversity": diversity[0],
            "diversity_interval": diversity[1:], "tokens_forward": float(one.tokens.mean()), "wall_s": one.seconds,
        }  # fmt: skip
        above = ""
        if method.name == "vgb" and method.verifier == "trained":
            row["above"], *row["above_interval"] = gap(one, others[method.outcome], draws)
            above = f"{row['above']:+.2f} [{row['above_interval'][0]:+.2f}, {row['above_interval'][1]:+.2f}]"
        rows.append(row)
        print(
            f"{method.name:<16} {method.verifier:<9} {'outcome' if method.outcome else 'V':<8} "
            f"{method.block:>5} {method.effort:>4} {method.tilt:>4g}  "
            f"{accuracy[0]:>8.3f} [{accuracy[1]:.3f}, {accuracy[2]:.3f}] "
            f"{diversity[0]:>8.2f} [{diversity[1]:>5.2f}, {diversity[2]:>5.2f}] {row['tokens_forward']:>6.0f}  {above}"
        )
    walks = [row for row in rows if "above" in row]
    verdicts = {
        "beyond": sum(row["above_interval"][0] > 0 for row in walks),
        "inside": sum(row["above_interval"][1] < 0 for row in walks),
    }
    verdicts["on, or not told apart"] = len(walks) - sum(verdicts.values())
    base = next(row for row in rows if row["method"] == "sample")["accuracy"]
    print(
        "`above`: distinct balanced words more than the frontier of the other methods at equal accuracy; 95% intervals"
        f"\nfrom {count} beginnings, none corrected for how many there are. VGB's arguments: "
        + ", ".join(f"{number} {name}" for name, number in verdicts.items())
    )
    if not 0.3 <= base <= 0.7:
        print(f"The base alone is right {base:.0%} of the time: change --steps to have it between 30% and 70%.")
    if arguments.out is not None:
        plot(rows, arguments.answers, arguments.out)
    print(json.dumps({"benchmark": "dyck", "verdicts": verdicts, "beginnings": count, **facts, "rows": rows}))


if __name__ == "__main__":
    main()
