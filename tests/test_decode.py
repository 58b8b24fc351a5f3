"""Strategies on an engine of known laws: every figure against enumeration or a closed form."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from table_engine import END, TableEngine

from edgekit.decode import (
    Budget,
    Choice,
    Node,
    Options,
    Sampling,
    Session,
    Traffic,
    find_answer,
    find_strategy,
    needs_verifier,
    strategy_names,
)
from edgekit.decode._vote import vote
from edgekit.decode.rebase import allocate
from edgekit.errors import InputError
from edgekit.verifier import Constant, RandomVerifier, Work

CHOICES = (Choice(0.5, "weighted", 3), Choice(1, "vgb", 4))
FREE = Sampling(temperature=1)
PROMPT = (3, 1, 2)
A, B, C = 1, 2, 3


@functools.cache
def letters(past: tuple[int, ...]) -> list[float]:
    """A law over the end and three letters that differs after every past."""
    weights = np.random.default_rng([7, *past]).random(4) + np.array([0.1, 0.2, 0.2, 0.2])
    return [float(weight) for weight in weights / weights.sum()]


class Oracle:
    """A verifier whose values are a function of the answer's tokens."""

    reads = False
    work = Work()

    def __init__(self, value: Any) -> None:
        self.value, self.calls = value, 0

    def begin(self, prompt: Sequence[int], hidden: Any) -> tuple[int, ...]:
        return ()

    def extend(self, state: tuple[int, ...], tokens: Sequence[int], hidden: Any) -> tuple[int, ...]:
        return (*state, *tokens)

    def values(self, states: Sequence[tuple[int, ...]], done: Sequence[bool]) -> Any:
        self.calls += len(states)
        return np.array([self.value(s) for s in states], np.float32)


class Reader(Oracle):
    """A verifier that checks the hidden states it is given against the engine's own."""

    reads = True

    def __init__(self, engine: TableEngine) -> None:
        super().__init__(lambda state: 0.5)
        self.engine = engine

    def begin(self, prompt: Sequence[int], hidden: Any) -> tuple[int, ...]:
        past = tuple(prompt)
        assert np.array_equal(hidden, [self.engine.hidden(past)])
        return past

    def extend(self, state: tuple[int, ...], tokens: Sequence[int], hidden: Any) -> tuple[int, ...]:
        for token, row in zip(tokens, hidden, strict=True):
            state = (*state, token)
            assert np.array_equal(row, self.engine.hidden(state))
        return state


def log_law(node: Node) -> float:
    """Log-probability of an answer, computed anew from the laws of its prefixes."""
    past, total = node.prompt, 0.0
    for token in [*node.tokens, *([END] if node.ended == "end" else [])]:
        total += math.log(letters(past)[token])
        past = (*past, token)
    return total


# --- what the session computes

LIMITS = [
    {"sequences": 8},
    {"sequences": 1},
    {"sequences": 2, "fork": False},
    {"sequences": 3, "rewind": False},
    {"sequences": 2, "fork": False, "rewind": False},
    {"sequences": 6, "total_tokens": 40},
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("name", strategy_names())
def test_every_strategy_on_every_kind_of_engine_tells_the_probability_of_its_answer(name: str, limits: Any) -> None:
    engine = TableEngine(letters, **limits)
    options = Options(
        candidates=5, max_tokens=10, sampling=FREE, block_tokens=3, block_end=None, width=2, steps=30,
        revise=lambda answers: [3, 1, *(len(answer) % 3 + 1 for answer in answers)], choices=CHOICES,
    )  # fmt: skip
    session = Session(engine, PROMPT, options, RandomVerifier(1))
    found = list(find_strategy(name)(session))
    assert found
    for node in found:
        # a revision is drawn after another prompt
        if name != "revise":
            assert node.log_probability == pytest.approx(0 if name == "greedy" else log_law(node), abs=1e-4)
        assert len(node.tokens) <= 10
        assert node.data == engine.detokenize(node.tokens)
    assert found[-1].ended
    assert session.cost.tokens_forward == engine.computed
    session.close()
    assert not engine._held


def test_greedy_takes_the_likeliest_token() -> None:
    session = Session(TableEngine(letters), PROMPT, Options(max_tokens=6))
    (*_, node) = find_strategy("greedy")(session)
    past = PROMPT
    for token in node.tokens:
        assert token == int(np.argmax(letters(past)))
        past = (*past, token)


@pytest.mark.parametrize("limits", [limit for limit in LIMITS if limit.get("rewind", True)], ids=str)
def test_the_verifier_reads_the_hidden_states_of_the_positions_it_is_told(limits: Any) -> None:
    engine = TableEngine(letters, **limits)
    options = Options(candidates=6, max_tokens=9, sampling=FREE, block_tokens=2, block_end=None, width=3, steps=20)
    session = Session(engine, PROMPT, options, Reader(engine))
    for name in ("best-of-n", "beam", "rebase", "mcts", "vgb"):
        list(find_strategy(name)(session))
    again = session.begin([3, 1, 1])
    assert session.grow([again])[0].state[:3] == (3, 1, 1)
    answers = [[1, 2], [], [1, 2, 3], [2], [3, 1], [1], [2, 2]]
    read = session.read(session.root, answers)
    assert [node.state for node in read] == [(*PROMPT, *answer) for answer in answers]
    session.close()


def test_what_was_computed_is_not_computed_again() -> None:
    engine = TableEngine(letters, sequences=8)
    session = Session(engine, PROMPT, Options(sampling=FREE, max_tokens=12, block_tokens=2, block_end=None))
    assert engine.computed == 3
    blocks = session.grow([session.root] * 3)
    first = engine.computed
    assert first - 3 == sum(len(node.tokens) - (node.ended == "length") for node in blocks)
    alive = [node for node in blocks if not node.ended]
    more = session.grow([alive[0]] * 3 + [alive[-1]])
    drawn = sum(len(node.tokens) - len(node.parent.tokens) for node in more if node.parent)
    assert engine.computed - first <= drawn


def test_vgb_computes_at_most_half_of_the_tokens_of_the_walk_without_a_cache() -> None:
    costs = []
    for limits in ({"sequences": 8}, {"sequences": 1, "fork": False, "rewind": False}):
        engine = TableEngine(lambda past: [0.02, 0.4, 0.3, 0.28], context_tokens=128, **limits)  # type: ignore[arg-type]
        options = Options(sampling=FREE, max_tokens=24, block_tokens=2, block_end=None, width=2, steps=20, seed=5)
        session = Session(engine, PROMPT, options, Constant())
        list(find_strategy("vgb")(session))
        costs.append(session.cost.tokens_forward)
        session.close()
    assert costs[0] <= 0.5 * costs[1]


def test_a_session_holds_no_more_positions_than_the_engine_has() -> None:
    engine = TableEngine(lambda past: [0.01, 0.5, 0.29, 0.2], sequences=8, total_tokens=30, context_tokens=30)
    session = Session(engine, PROMPT, Options(candidates=8, max_tokens=9, sampling=FREE))
    assert len(session.draw(8)) == 8
    assert engine.most_cells <= 30


def test_long_answers_of_different_parents_grow_in_turns_where_they_do_not_fit_together() -> None:
    engine = TableEngine(lambda past: [0.001, 0.4, 0.3, 0.299], sequences=4, total_tokens=40, context_tokens=40)
    options = Options(candidates=4, max_tokens=20, sampling=FREE, block_tokens=4, block_end=None, width=4, steps=12)
    for name in ("beam", "rebase", "mcts", "vgb"):
        session = Session(engine, PROMPT, options, RandomVerifier(3))
        (*_, node) = find_strategy(name)(session)
        assert node.ended
        session.close()
    assert engine.most_cells <= 40


def test_answers_drawn_in_one_batch_have_the_law_of_answers_drawn_alone() -> None:
    def law(past: tuple[int, ...]) -> list[float]:
        return letters(past) if len(past) < 5 else [1.0, 0, 0, 0]

    def leaves(past: tuple[int, ...], mass: float) -> dict[tuple[int, ...], float]:
        out: dict[tuple[int, ...], float] = {}
        for token, share in enumerate(law(past)):
            if token == END:
                out[past[3:]] = out.get(past[3:], 0) + mass * share
            elif share:
                out |= leaves((*past, token), mass * share)
        return out

    exact = leaves(PROMPT, 1.0)
    session = Session(TableEngine(law), PROMPT, Options(sampling=FREE, max_tokens=9))
    drawn = session.draw(3000)
    counts = dict.fromkeys(exact, 0)
    for node in drawn:
        counts[node.tokens] += 1
    distance = sum(abs(counts[leaf] / 3000 - exact[leaf]) for leaf in exact) / 2
    # the expected distance of 3000 draws: sum sqrt(p (1 - p) / n) * sqrt(2 / pi) / 2
    expected = sum(math.sqrt(p * (1 - p) / 3000) for p in exact.values()) * math.sqrt(2 / math.pi) / 2
    assert distance < 2 * expected


# --- ends and budgets


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it_even_across_tokens() -> None:
    order = [A, B, C, C, A, END]
    engine = TableEngine(lambda past: [1.0 if token == order[len(past) - 1] else 0.0 for token in range(4)])
    session = Session(engine, (A,), Options(stop=("bcc",), sampling=FREE))
    (node,) = session.draw(1)
    assert (node.text, node.ended) == ("a", "stop")
    (*_, streamed) = find_strategy("greedy")(session)
    assert streamed.text == "a"
    session.close()


def test_a_block_ends_at_its_string_or_at_its_length() -> None:
    order = [A, C, A, B, A, A, A, A, END]
    engine = TableEngine(lambda past: [1.0 if token == order[len(past) - 1] else 0.0 for token in range(4)])
    session = Session(engine, (A,), Options(block_end="c", block_tokens=3, sampling=FREE))
    node, texts = session.root, []
    while not node.ended:
        (node,) = session.grow([node])
        texts.append(node.text)
    assert texts == ["ac", "acaba", "acabaaaa", "acabaaaa"]
    session.close()


@pytest.mark.parametrize("name", strategy_names())
def test_a_budget_in_tokens_is_kept_to_one_step_of_the_batch(name: str) -> None:
    engine = TableEngine(lambda past: [0.001, 0.5, 0.299, 0.2])
    options = Options(
        candidates=4, max_tokens=50, sampling=FREE, budget=Budget(tokens=30), block_tokens=4, block_end=None, width=2,
        steps=500, revise=lambda answers: [3, 1, 1], choices=CHOICES,
    )  # fmt: skip
    session = Session(engine, PROMPT, options, Constant())
    list(find_strategy(name)(session))
    assert 30 <= engine.computed <= 30 + 8


def test_bytes_and_joules_are_counted_by_the_traffic() -> None:
    traffic = Traffic(weight_bytes=1000, kv_bytes_per_token=10, watts=5)
    session = Session(
        TableEngine(lambda past: [0, 1, 0, 0]), (A, A), Options(max_tokens=3, sampling=FREE), None, traffic
    )
    session.draw(2)
    # the prompt; two steps of two sequences (3 and 4 positions); the third token has no successor
    assert session.cost.steps == 3
    assert session.cost.bytes_moved == 3 * 1000 + 10 * (2 + 2 * 3 + 2 * 4)
    cost = session.cost
    assert cost.predicted_energy_j == pytest.approx(5 * cost.wall_s)


# --- the walk


DEPTH = 3
LEAVES = list(itertools.product((A, B), repeat=DEPTH))


@functools.cache
def two_letters(past: tuple[int, ...]) -> list[float]:
    """After the prompt `a`: a or b, unevenly, DEPTH times, then the end."""
    depth = len(past) - 1
    if depth >= DEPTH:
        return [1.0, 0.0, 0.0]
    first = 0.3 + 0.4 * np.random.default_rng([3, *past]).random()
    return [0.0, float(first), float(1 - first)]


def reward(leaf: tuple[int, ...]) -> float:
    return 0.05 + 0.9 * float(np.random.default_rng([5, *leaf]).random() ** 3)


@functools.cache
def true_value(prefix: tuple[int, ...]) -> float:
    if len(prefix) == DEPTH:
        return reward(prefix)
    law = two_letters((A, *prefix))
    return sum(law[token] * true_value((*prefix, token)) for token in (A, B))


def noisy(factor: float) -> Any:
    """The true value off by up to a factor; exact at the leaves."""

    @functools.cache
    def value(prefix: tuple[int, ...]) -> float:
        if len(prefix) == DEPTH:
            return reward(prefix)
        exponent = float(np.random.default_rng([11, *prefix]).uniform(-1, 1))
        return min(1.0, true_value(prefix) * factor**exponent)

    return value


def pi(prefix: tuple[int, ...]) -> float:
    return math.prod(two_letters((A, *prefix[:i]))[prefix[i]] for i in range(len(prefix)))


def goal(tilt: float = 1) -> dict[tuple[int, ...], float]:
    masses = {leaf: pi(leaf) * reward(leaf) ** tilt for leaf in LEAVES}
    return {leaf: mass / sum(masses.values()) for leaf, mass in masses.items()}


def distance(one: Any, other: Any) -> float:
    return sum(abs(one.get(leaf, 0) - other.get(leaf, 0)) for leaf in LEAVES) / 2


PREFIXES = [prefix for depth in range(DEPTH + 1) for prefix in itertools.product((A, B), repeat=depth)]


def plain_matrix(value: Any) -> np.ndarray[Any, Any]:
    """Transition probabilities of the walk, by definition."""
    index = {prefix: i for i, prefix in enumerate(PREFIXES)}
    matrix = np.zeros((len(PREFIXES), len(PREFIXES)))
    for prefix, i in index.items():
        weights = {}
        if prefix:
            weights[index[prefix[:-1]]] = value(prefix)
        if len(prefix) < DEPTH:
            law = two_letters((A, *prefix))
            for token in (A, B):
                weights[index[(*prefix, token)]] = law[token] * value((*prefix, token))
        total = sum(weights.values())
        matrix[i, i] += 0.5
        for j, weight in weights.items():
            matrix[i, j] += 0.5 * weight / total
    return matrix


def leaf_law(stationary: Any) -> dict[tuple[int, ...], float]:
    masses = {leaf: stationary[PREFIXES.index(leaf)] for leaf in LEAVES}
    return {leaf: mass / sum(masses.values()) for leaf, mass in masses.items()}


def stationary_of(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values, vectors = np.linalg.eig(matrix.T)
    vector = np.real(vectors[:, np.argmin(abs(values - 1))])
    return np.asarray(vector / vector.sum())


class Places:
    """The tree of enumeration, as the walk sees it."""

    def __init__(self, value: Any, seed: int) -> None:
        self.value, self.random = value, np.random.default_rng(seed)

    def parent(self, node: tuple[int, ...]) -> tuple[int, ...] | None:
        return node[:-1] if node else None

    def is_leaf(self, node: tuple[int, ...]) -> bool:
        return len(node) == DEPTH

    def propose(self, node: tuple[int, ...]) -> tuple[int, ...]:
        return (*node, A if self.random.random() < two_letters((A, *node))[A] else B)

    def children(self, node: tuple[int, ...]) -> list[tuple[float, tuple[int, ...]]]:
        law = two_letters((A, *node))
        return [(law[token], (*node, token)) for token in (A, B)] if len(node) < DEPTH else []


@pytest.mark.parametrize("factor", [1.0, 2.0, 5.0])
def test_the_walk_has_the_target_as_its_law_at_leaves_for_any_value(factor: float) -> None:
    from edgekit.decode._walk import walk

    value = noisy(factor)
    matrix = plain_matrix(value)
    assert distance(leaf_law(stationary_of(matrix)), goal()) < 1e-12
    # the walk's own steps follow the rows of that matrix
    counts = np.zeros_like(matrix)
    index = {prefix: i for i, prefix in enumerate(PREFIXES)}
    places = walk(Places(value, 1), (), np.random.default_rng(2), lambda: False)
    before = 0
    for place in itertools.islice(places, 200_000):
        counts[before, index[place]] += 1
        before = index[place]
    rows = counts.sum(axis=1)
    for i, row in enumerate(matrix):
        error = np.sqrt(row * (1 - row) / max(rows[i], 1))
        assert rows[i] > 100
        assert np.all(abs(counts[i] / rows[i] - row) <= 5 * error + 1e-12)
    found = counts.sum(axis=0)
    assert distance(leaf_law(found), goal()) < 0.03


def test_where_every_value_is_small_a_step_draws_no_more_than_the_walk_has_patience_for() -> None:
    from edgekit.decode._walk import PATIENCE, walk

    value = noisy(2.0)
    matrix = plain_matrix(value)  # a common factor of all values changes nothing
    tree = Places(lambda prefix: 1e-4 * value(prefix), 1)
    drawn, most = 0, 0
    propose = tree.propose

    def counted(node: tuple[int, ...]) -> tuple[int, ...]:
        nonlocal drawn
        drawn += 1
        return propose(node)

    tree.propose = counted  # type: ignore[method-assign]
    counts = np.zeros_like(matrix)
    index = {prefix: i for i, prefix in enumerate(PREFIXES)}
    before = 0
    for place in itertools.islice(walk(tree, (), np.random.default_rng(2), lambda: False), 15_000):
        counts[before, index[place]] += 1
        before, most, drawn = index[place], max(most, drawn), 0
    assert most == PATIENCE
    rows = counts.sum(axis=1, keepdims=True)
    error = np.sqrt(matrix * (1 - matrix) / np.maximum(rows, 1))
    assert np.all((abs(counts / rows - matrix) <= 5 * error + 1 / PATIENCE)[rows[:, 0] > 100])
    assert distance(leaf_law(counts.sum(axis=0)), goal()) < 0.1


def momentum_matrix(value: Any, momentum: float) -> np.ndarray[Any, Any]:
    """Transition probabilities between (place, direction), by definition."""
    n = len(PREFIXES)
    index = {prefix: i for i, prefix in enumerate(PREFIXES)}
    matrix = np.zeros((2 * n, 2 * n))
    for prefix, i in index.items():
        law = two_letters((A, *prefix)) if len(prefix) < DEPTH else []
        masses = {index[(*prefix, t)]: law[t] * value((*prefix, t)) for t in (A, B)} if law else {}
        ahead, behind = sum(masses.values()), value(prefix) if prefix else 0.0
        overlap = momentum * min(ahead, behind)
        for j, mass in masses.items():
            matrix[i, j] += mass / (ahead + behind)
        matrix[i, n + i] += (behind - overlap) / (ahead + behind)
        if prefix:
            matrix[n + i, n + index[prefix[:-1]]] += behind / (ahead + behind)
        matrix[n + i, i] += (ahead - overlap) / (ahead + behind)
        for k in (i, n + i):
            matrix[k, k] += 1 - matrix[k].sum()
    return 0.5 * (np.eye(2 * n) + matrix)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_the_walk_with_momentum_is_exact(momentum: float) -> None:
    from edgekit.decode._walk import momentum_walk

    value = noisy(3.0)
    exact = stationary_of(momentum_matrix(value, momentum))
    assert distance(leaf_law(exact[: len(PREFIXES)] + exact[len(PREFIXES) :]), goal()) < 1e-12
    tree = Places(value, 1)
    places = momentum_walk(tree.children, value, (), tree.parent, momentum, np.random.default_rng(3))
    counts: dict[tuple[int, ...], int] = {}
    for place in itertools.islice(places, 200_000):
        counts[place] = counts.get(place, 0) + 1
    total = sum(counts[leaf] for leaf in LEAVES)
    assert distance({leaf: counts[leaf] / total for leaf in LEAVES}, goal()) < 0.03


def test_doubling_the_current_direction_is_not_exact() -> None:
    """The negative control of momentum: a plausible but wrong rule has another law."""
    value = noisy(3.0)
    n = len(PREFIXES)
    matrix = np.zeros((2 * n, 2 * n))
    index = {prefix: i for i, prefix in enumerate(PREFIXES)}
    for prefix, i in index.items():
        law = two_letters((A, *prefix)) if len(prefix) < DEPTH else []
        down = {index[(*prefix, t)]: law[t] * value((*prefix, t)) for t in (A, B)} if law else {}
        up = {index[prefix[:-1]]: value(prefix)} if prefix else {}
        for k, (two, one) in ((i, (down, up)), (n + i, (up, down))):
            total = 2 * sum(two.values()) + sum(one.values())
            for j, mass in two.items():
                matrix[k, j + (0 if k == i else n)] += 2 * mass / total
            for j, mass in one.items():
                matrix[k, j + (n if k == i else 0)] += mass / total
    exact = stationary_of(0.5 * (np.eye(2 * n) + matrix))
    assert distance(leaf_law(exact[:n] + exact[n:]), goal()) > 0.01


@pytest.mark.parametrize(("factor", "least"), [(1.0, None), (5.0, 0.1)])
def test_stopping_at_the_first_leaf_and_never_going_back_are_exact_only_for_the_true_value(
    factor: float, least: float | None
) -> None:
    """The two negative controls, exactly: absorbing chains."""
    value = noisy(factor)
    matrix = plain_matrix(value)
    leaves = [PREFIXES.index(leaf) for leaf in LEAVES]
    inner = [i for i in range(len(PREFIXES)) if i not in leaves]
    absorbed = np.linalg.solve(np.eye(len(inner)) - matrix[np.ix_(inner, inner)], matrix[np.ix_(inner, leaves)])[0]
    first_leaf = dict(zip(LEAVES, absorbed, strict=True))
    forward = {}
    for leaf in LEAVES:
        mass = 1.0
        for depth in range(DEPTH):
            law = two_letters((A, *leaf[:depth]))
            masses = [law[token] * value((*leaf[:depth], token)) for token in (A, B)]
            mass *= masses[leaf[depth] - 1] / sum(masses)
        forward[leaf] = mass
    for law in (first_leaf, forward):
        assert sum(law.values()) == pytest.approx(1)
        if least is None:
            assert distance(law, goal()) < 1e-12
        else:
            assert distance(law, goal()) > least


def test_where_a_walk_is_seen_at_a_leaf_has_the_target_as_its_law_and_where_it_was_last_has_not() -> None:
    from edgekit.decode._walk import arrive, walk

    value, runs = noisy(2.0), 4000
    random = np.random.default_rng(0)
    seen, last = dict.fromkeys(LEAVES, 0), dict.fromkeys(LEAVES, 0)
    tree = Places(lambda prefix: value(prefix) ** 2, 1)
    for _ in range(runs):
        *_, final = [None, *filter(tree.is_leaf, itertools.islice(walk(tree, (), random, lambda: False), 64))]
        if final is not None:
            last[final] += 1
        *_, leaf = arrive(walk(tree, (), random, lambda: False), tree.is_leaf, 64)
        if tree.is_leaf(leaf):
            seen[leaf] += 1
    exact = goal(2)
    noise = sum(math.sqrt(p * (1 - p) / runs) for p in exact.values()) * math.sqrt(2 / math.pi) / 2
    assert sum(seen.values()) > 0.9 * runs
    assert distance({leaf: count / sum(seen.values()) for leaf, count in seen.items()}, exact) < 2 * noise
    assert distance({leaf: count / sum(last.values()) for leaf, count in last.items()}, exact) > 4 * noise


@pytest.mark.parametrize("tilt", [1.0, 3.0])
def test_vgb_over_an_engine_has_the_target_as_its_law(tilt: float) -> None:
    """Walks of at least 64 steps from the root, through the session, its cache and its batches."""
    value = noisy(2.0)
    counts = dict.fromkeys(LEAVES, 0)
    runs = 500
    for seed in range(runs):
        # the end is a token of its own: a leaf is a node whose answer ended
        walk = {"block_tokens": 1, "block_end": None, "width": 2, "steps": 64, "tilt": tilt}
        options = Options(sampling=FREE, seed=seed, max_tokens=DEPTH, **walk)  # type: ignore[arg-type]
        session = Session(TableEngine(two_letters), (A,), options, Oracle(value))
        (*_, leaf) = find_strategy("vgb")(session)
        counts[leaf.tokens] += 1
        session.close()
    exact = goal(tilt)
    found = {leaf: count / runs for leaf, count in counts.items()}
    expected = sum(math.sqrt(p * (1 - p) / runs) for p in exact.values()) * math.sqrt(2 / math.pi) / 2
    assert distance(found, exact) < 2.5 * expected
    base = {leaf: pi(leaf) for leaf in LEAVES}
    assert distance(base, exact) > 5 * expected
    if tilt != 1:
        assert distance(goal(), exact) > 3 * expected


# --- REBASE, votes, answers, laws


def test_rebase_spends_its_budget_whole_and_in_proportion_to_the_softmax() -> None:
    random = np.random.default_rng(0)
    missed = 0
    for _ in range(300):
        values = random.random(random.integers(1, 12))
        budget = int(random.integers(1, 40))
        counts = allocate(budget, values, 0.1)
        shares = budget * np.exp(values / 0.1) / np.exp(values / 0.1).sum()
        assert sum(counts) == budget
        assert np.all(abs(np.array(counts) - shares) < 1)
        missed += int(np.round(shares).sum() != budget)
    assert missed > 60  # what rounding each share alone does


def test_a_weighted_vote_promotes_a_later_answer() -> None:
    session = Session(TableEngine(letters), PROMPT, Options(answer="text"))
    nodes = [Node(PROMPT, session.root, data=text, ended="end") for text in (b"A", b"B", b"A")]
    assert vote(session, nodes[:2], [0.3, 0.9]).text == "B"
    assert vote(session, nodes, [0.5, 0.9, 0.5]).text == "A"
    assert vote(session, nodes, [1, 1, 1]).text == "A"


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        ("integer", "It is 1,234.0 or 5", "1234"),
        ("integer", "none", None),
        ("integer", "-7 degrees", "-7"),
        ("last-number", "3 apples and 4.50 pears", "4.5"),
        ("json", 'Sure: {"b": 1, "a": [2]} done', '{"a": [2], "b": 1}'),
        ("json", "{broken", None),
        ("text", "  two \n words ", "two words"),
        ("line", "\nfirst\nsecond", "first"),
        ("code", "x = 1  # one\n\n# no\ny", "x = 1  # one\ny"),
    ],
)
def test_equal_answers_have_equal_keys(name: str, text: str, key: str | None) -> None:
    assert find_answer(name)(text) == key


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=0.9, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(temperature=0.6, top_k=9, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
def test_the_law_is_that_of_transformers(sampling: Sampling) -> None:
    import torch
    from transformers.generation import logits_process as theirs

    logits = np.random.default_rng(4).normal(size=500).astype(np.float32) * 3
    scores = torch.from_numpy(logits)[None]
    warpers = [theirs.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(theirs.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(theirs.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(theirs.MinPLogitsWarper(sampling.min_p))
    for warper in warpers:
        scores = warper(None, scores)
    wanted = torch.softmax(scores[0].double(), dim=-1).numpy()
    law = sampling.law(logits)
    found = np.zeros(500)
    found[law.tokens] = np.diff(law.cumulative, prepend=0) / law.cumulative[-1]
    assert np.array_equal(found > 0, wanted > 0)
    assert found == pytest.approx(wanted, abs=1e-6)


def test_top_n_sigma_keeps_what_lies_within_n_deviations_of_the_peak() -> None:
    logits = np.array([10.0, 9.5, 4.0, 0.0, 0.0], np.float32)
    for temperature in (0.5, 2.0):
        kept = set(Sampling(temperature=temperature, top_n_sigma=1.0).law(logits).tokens.tolist())
        assert kept == {i for i in range(5) if logits[i] >= logits.max() - logits.std()} == {0, 1}


def test_draws_follow_the_law() -> None:
    random = np.random.default_rng(1)
    law = FREE.law(np.log(np.array([0.1, 0.2, 0.7], np.float32)))
    draws = [law.draw(random) for _ in range(20_000)]
    shares = np.bincount([token for token, _ in draws], minlength=3) / len(draws)
    assert shares == pytest.approx([0.1, 0.2, 0.7], abs=0.015)
    assert dict(draws)[2] == pytest.approx(math.log(0.7), abs=1e-6)


# --- what a user gets wrong


def test_a_strategy_that_needs_a_verifier_says_so() -> None:
    session = Session(TableEngine(letters), PROMPT, Options(candidates=2, max_tokens=3, choices=CHOICES))
    for name in strategy_names():
        if needs_verifier(name):
            with pytest.raises(InputError, match="a verifier"):
                list(find_strategy(name)(session))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Options(candidates=0), "candidates"),
        (lambda: Options(momentum=2), "momentum"),
        (lambda: Options(stop=("",)), "stop"),
        (lambda: Options(answer="jsn"), "did you mean 'json'"),
        (lambda: Options(balance=0), "balance"),
        (lambda: Sampling(temperature=-1), "temperature"),
        (lambda: Sampling(top_p=0), "top_p"),
        (lambda: Budget(tokens=0), "tokens"),
        (lambda: Session(TableEngine(letters), (), Options()), "prompt"),
        (lambda: Session(TableEngine(letters), (1,) * 64, Options()), "context"),
        (lambda: Session(TableEngine(letters), PROMPT, Options(budget=Budget(joules=1))), "power"),
    ],
)
def test_wrong_options_are_one_clear_error(make: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make()
