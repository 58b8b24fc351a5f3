"""One question to a model: the tree of its partial answers, grown in batches, and what it has cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from edgekit.decode._cache import NoRoom, PrefixCache, Taken
from edgekit.decode._options import Choice, Options, Traffic
from edgekit.decode._sampling import Sampling
from edgekit.engine import Engine, Entry, FloatArray, StepOutput
from edgekit.errors import InputError
from edgekit.verifier import Verifier

GREEDY = Sampling(temperature=0)


@dataclass
class Cost:
    """What a question has cost so far."""

    tokens_forward: int = 0
    """Positions computed by the base: the prompt, every token of every candidate, and what was computed again."""
    steps: int = 0
    """Forward passes; each reads the weights once, whatever the number of candidates in it."""
    verifier_calls: int = 0
    """Partial answers scored."""
    verifier_tokens: int = 0
    """Positions computed by a verifier with a trunk of its own."""
    bytes_moved: int = 0
    """Weights and KV cache read, by `Traffic`, and the weights of a verifier's trunk."""
    wall_s: float = 0.0
    predicted_energy_j: float | None = None
    """Wall time at the power of `Traffic`: it means something where that device is this machine."""


@dataclass(eq=False)
class Node:
    """A partial answer: a node of the tree of prefixes."""

    prompt: tuple[int, ...]
    parent: Node | None
    tokens: tuple[int, ...] = ()
    """The whole answer so far, without an end token."""
    data: bytes = b""
    """Its text in UTF-8, which a token may end in the middle of a character; cut at a stop string."""
    log_probability: float = 0.0
    """Of the answer under the law it was drawn from."""
    ended: Literal["end", "stop", "length"] | None = None
    """Why the answer is finished: an end token, a stop string, or no room; None while it can go on."""
    state: Any = None
    """What the verifier remembers of it."""
    value: float | None = None
    """V of it, once it was asked for."""

    @property
    def text(self) -> str:
        """The answer so far."""
        return self.data.decode("utf-8", "replace")


class Session:
    """One question. Strategies grow nodes from `root` and ask for their values; they see no engine.

    Args:
        engine: An open model. Its sequences belong to the session until it is closed.
        prompt: Tokens of the question, at least one.
        options: What to draw, and how much of it.
        verifier: V, for the strategies that need one.
        traffic: What a step moves, to count bytes and joules.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        options: Options,
        verifier: Verifier | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.options = options
        self.random = np.random.default_rng(options.seed)
        self._engine = engine
        self._limits = engine.capabilities
        self._verifier = verifier
        self._reads = verifier is not None and verifier.reads
        if self._reads and not self._limits.hidden_states:
            raise InputError("an engine that gives hidden states to the verifier", "one that does not", "build again")
        self._traffic = Traffic() if traffic is None else traffic
        if options.budget.joules is not None and self._traffic.watts is None:
            raise InputError("a device with a known power for a budget in joules", "none", "give seconds or tokens")
        self._cache = PrefixCache(engine)
        self._started = time.perf_counter()
        self._cost = Cost()
        self._drawn: list[Node] = []
        self.votes: dict[str, float] = {}
        """What each answer of the last vote weighed."""
        self.root = self.begin(prompt)

    @property
    def cost(self) -> Cost:
        """What was spent until now."""
        self._cost.wall_s = time.perf_counter() - self._started
        if self._traffic.watts is not None:
            self._cost.predicted_energy_j = self._cost.wall_s * self._traffic.watts
        return self._cost

    @property
    def spent(self) -> bool:
        """Whether the budget is used up: no node grows any more."""
        cost, budget = self.cost, self.options.budget
        pairs = (
            (cost.tokens_forward + cost.verifier_tokens, budget.tokens),
            (cost.wall_s, budget.seconds),
            (cost.predicted_energy_j, budget.joules),
        )
        return any(bound is not None and used is not None and used >= bound for used, bound in pairs)

    def begin(self, prompt: Sequence[int]) -> Node:
        """Compute another prompt and return its root. What it shares with earlier ones is not computed again."""
        if not prompt:
            raise InputError("a prompt of at least one token", "none", "ask something")
        if len(prompt) >= self._limits.context_tokens:
            wanted = f"a prompt shorter than the context of {self._limits.context_tokens} tokens"
            raise InputError(wanted, f"{len(prompt)} tokens", "shorten it, or build with a longer --context")
        node = Node(tuple(prompt), None)
        output = self._compute(node, hidden_states=self._reads)
        if self._verifier is not None:
            node.state = self._verifier.begin(node.prompt, None if output is None else output.hidden)
        return node

    def stream(self, node: Node, sampling: Sampling | None = None) -> Iterator[Node]:
        """Continue a node to its end, token by token; each comes as a child of the node."""
        if node.ended or self.spent:
            return
        growth = self._open(node)
        try:
            while growth.ended is None and not self.spent:
                self._advance([growth], sampling)
                yield growth.node(self._extend(growth))
        finally:
            self._close(growth)

    def draw(self, count: int) -> list[Node]:
        """The first `count` whole answers of this session; those that were not drawn before are drawn in one batch."""
        self._drawn += self.grow([self.root] * (count - len(self._drawn)), whole=True)
        return self._drawn[:count]

    def read(self, node: Node, answers: Sequence[Sequence[int]]) -> list[Node]:
        """The nodes after given tokens, as if they had been drawn: to know the values of texts from elsewhere."""
        found: list[Node] = []
        while len(found) < len(answers):
            left = answers[len(found) :]
            growths: list[_Growth] = []
            try:
                for tokens in left[: self._wave(node, max(1, *map(len, left)))]:
                    growth = self._open(node, max(1, len(tokens)))
                    growths.append(growth)
                    growth.tokens += tokens
                    growth.data += self._engine.detokenize(tokens)
                    growth.ended = "end"
                waiting = [growth for growth in growths if len(growth.tokens) > growth.first]
                entries = [Entry(g.taken.sequence, token) for g in waiting for token in g.tokens[g.first :]]
                if entries:
                    self._take_rows(self._step(entries, [g.taken for g in waiting], self._reads), waiting)
                found += [growth.node(self._extend(growth)) for growth in growths]
            finally:
                for growth in growths:
                    self._close(growth)
        return found

    def grow(self, nodes: Sequence[Node], *, whole: bool = False) -> list[Node]:
        """Continue each node by a block, or to its end, all in one batch; a node may stand there several times.

        Finished nodes come back as they are. When the budget is spent, blocks are shorter, or empty.
        """
        grown: dict[int, Node] = {i: node for i, node in enumerate(nodes) if node.ended or self.spent}
        # those of one parent stand together: it is computed at most once
        first: dict[Node, int] = {}
        order = sorted(
            (i for i in range(len(nodes)) if i not in grown), key=lambda i: first.setdefault(nodes[i], len(first))
        )
        room = self.options.max_tokens if whole else self.options.block_tokens
        while order:
            size = self._wave(nodes[order[0]], room)
            found = self._grow_wave([nodes[i] for i in order[:size]], whole)
            grown.update(zip(order, found, strict=False))
            order = order[len(found) :]
        return [grown[i] for i in range(len(nodes))]

    def choose(self, choice: Choice) -> None:
        """Go on with as many candidates as were chosen for this question."""
        self.options = replace(self.options, candidates=choice.candidates)

    def values(self, nodes: Sequence[Node]) -> FloatArray:
        """V of each node, shape (nodes,). Raises InputError without a verifier."""
        if self._verifier is None:
            raise InputError("a verifier for this strategy", "none", "build with --verifier, or use majority")
        unknown = list(dict.fromkeys(node for node in nodes if node.value is None))
        if unknown:
            before = self._verifier.work
            found = self._verifier.values([n.state for n in unknown], [n.ended is not None for n in unknown])
            self._cost.verifier_calls += len(unknown)
            self._cost.verifier_tokens += self._verifier.work.tokens - before.tokens
            self._cost.bytes_moved += self._verifier.work.bytes_moved - before.bytes_moved
            for node, value in zip(unknown, found, strict=True):
                node.value = float(value)
        return np.array([node.value for node in nodes], np.float32)

    @property
    def has_verifier(self) -> bool:
        """Whether `values` can be asked."""
        return self._verifier is not None

    def close(self) -> None:
        """Give the engine's sequences back."""
        self._cache.close()

    def _wave(self, node: Node, room: int) -> int:
        """Nodes that can grow at once."""
        cells = self._limits.total_tokens - len(node.prompt) - len(node.tokens)
        return max(1, min(self._limits.sequences, cells // max(1, room)))

    def _grow_wave(self, nodes: Sequence[Node], whole: bool) -> list[Node]:
        """Grow the first of the nodes, as many as there is room for."""
        for node in nodes:
            self._cache.touch([*node.prompt, *node.tokens])
        growths: list[_Growth] = []
        try:
            for node in nodes:
                try:
                    growths.append(self._open(node, None if whole else self.options.block_tokens))
                except NoRoom:
                    # those that are open go first
                    if not growths:
                        raise
                    break
            while (live := [growth for growth in growths if not growth.stopped]) and not self.spent:
                self._advance(live)
            return [growth.node(self._extend(growth)) for growth in growths]
        finally:
            for growth in growths:
                self._close(growth)

    def _compute(self, node: Node, *, hidden_states: bool = False) -> StepOutput | None:
        """Make the logits after a node known; None where the cache has them and no hidden state is asked for."""
        path = [*node.prompt, *node.tokens]
        if self._cache.holds(path) and not hidden_states:
            return None
        # a verifier reads the last position even where another prompt computed it before
        taken = self._cache.take(path[: len(path) - hidden_states], int(hidden_states))
        last = len(path) - 1
        entries = [Entry(taken.sequence, path[i], wants_logits=i == last) for i in range(taken.known, len(path))]
        output = self._step(entries, [taken], hidden_states)
        self._cache.give(taken, path, output.logits[-1])
        return output

    def _open(self, node: Node, block: int | None = None) -> _Growth:
        path = [*node.prompt, *node.tokens]
        room = self.options.max_tokens if block is None else block
        if not self._cache.holds(path):
            self._compute(node)
        taken = self._cache.take(path, room)
        assert taken.logits is not None
        return _Growth(taken, path, taken.logits, node, len(node.tokens), block)

    def _close(self, growth: _Growth) -> None:
        self._cache.give(growth.taken, growth.path, growth.logits)

    def _advance(self, live: Sequence[_Growth], sampling: Sampling | None = None) -> None:
        """Draw a token for each and compute those that have a successor or that the verifier reads."""
        sampling = sampling or self.options.sampling
        entries, waiting = [], []
        for growth in live:
            assert growth.logits is not None
            token, log_probability = sampling.law(growth.logits).draw(self.random)
            growth.log_probability += log_probability
            if token in self._engine.end_tokens:
                growth.ended = "end"
                continue
            growth.tokens.append(token)
            self._append_text(growth, self._engine.detokenize([token]))
            if growth.ended is None and len(growth.tokens) >= self.options.max_tokens:
                growth.ended = "length"
            if len(growth.path) + 1 >= self._limits.context_tokens:
                growth.ended = growth.ended or "length"
            if growth.ended is None or self._reads:
                entries.append(Entry(growth.taken.sequence, token))
                waiting.append(growth)
        if not entries:
            return
        self._take_rows(self._step(entries, [growth.taken for growth in waiting], self._reads), waiting)

    def _take_rows(self, output: StepOutput, stepped: Sequence[_Growth]) -> None:
        """Note what a step computed: the tokens of each growth that its sequence did not hold, in their order."""
        end = 0
        for growth in stepped:
            new = growth.tokens[len(growth.path) - len(growth.start.prompt) :]
            start, end = end, end + len(new)
            growth.path += new
            growth.logits = output.logits[end - 1]
            if output.hidden is not None:
                growth.hidden += list(output.hidden[start:end])

    def _append_text(self, growth: _Growth, piece: bytes) -> None:
        before = len(growth.data)
        growth.data += piece
        for stop in map(str.encode, self.options.stop):
            found = growth.data.find(stop, max(0, before - len(stop) + 1))
            if found >= 0:
                del growth.data[found:]
                growth.ended = "stop"
        end = self.options.block_end
        if growth.block is not None and end and end.encode() in growth.data[max(0, before - len(end.encode()) + 1) :]:
            growth.block_ended = True

    def _extend(self, growth: _Growth) -> Any:
        if self._verifier is None:
            return None
        tokens = growth.tokens[growth.read :]
        growth.read = len(growth.tokens)
        rows = np.stack(growth.hidden) if growth.hidden else None
        growth.hidden.clear()
        if tokens:
            growth.state = self._verifier.extend(growth.state, tokens, rows)
        return growth.state

    def _step(self, entries: Sequence[Entry], taken: Sequence[Taken], hidden_states: bool) -> StepOutput:
        output = self._engine.step(entries, hidden_states=hidden_states)
        counts: dict[int, int] = {}
        for entry in entries:
            counts[entry.sequence] = counts.get(entry.sequence, 0) + 1
        past = 0
        for one in taken:
            self._cache.grew(one, counts[one.sequence])
            past += len(one.cells)
        self._cost.tokens_forward += len(entries)
        self._cost.steps += 1
        self._cost.bytes_moved += self._traffic.weight_bytes + self._traffic.kv_bytes_per_token * past
        return output


@dataclass(eq=False)
class _Growth:
    """A node on its way to the next: a sequence of the engine and what was added."""

    taken: Taken
    path: list[int]
    """What the sequence holds."""
    logits: FloatArray | None
    start: Node
    first: int
    block: int | None
    """Tokens after which it stops; None lets it go on to its end."""
    tokens: list[int] = field(init=False)
    data: bytearray = field(init=False)
    log_probability: float = field(init=False)
    state: Any = field(init=False)
    read: int = field(init=False)
    """Tokens that the verifier has read."""
    hidden: list[FloatArray] = field(default_factory=list)
    ended: Literal["end", "stop", "length"] | None = None
    block_ended: bool = False

    def __post_init__(self) -> None:
        self.tokens, self.data = list(self.start.tokens), bytearray(self.start.data)
        self.log_probability, self.state, self.read = self.start.log_probability, self.start.state, self.first

    @property
    def stopped(self) -> bool:
        """Whether the block or the answer is at its end."""
        full = self.block is not None and len(self.tokens) - self.first >= self.block
        return self.ended is not None or self.block_ended or full

    def node(self, state: Any) -> Node:
        """The node that it has come to."""
        return Node(
            prompt=self.start.prompt,
            parent=self.start,
            tokens=tuple(self.tokens),
            data=bytes(self.data),
            log_probability=self.log_probability,
            ended=self.ended,
            state=state,
        )
