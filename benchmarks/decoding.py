"""What a verifier and the strategies on top of it give, and what they cost, beside the same model without them.

MODEL is a GGUF file and VERIFIER a directory of `edgekit train verifier` made for it. Three parts: speed, accuracy
against cost on the task's test problems, and the wall time of best of n beside its_hub over llama.cpp's HTTP server.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from edgekit.chat import problem_tokens, render_chat
from edgekit.decode import Choice, Cost, Node, Options, Sampling, Session, find_strategy
from edgekit.engine import Engine, EngineOptions
from edgekit.engines.llama_cpp import LlamaCpp, open_model
from edgekit.measure.memory import peak_rss_bytes
from edgekit.measurement import median_interval, share_interval
from edgekit.tasks import Problem, Task, find_task
from edgekit.verifier import WEIGHTS, Constant, RandomVerifier, Verifier, load_head

SAMPLING = Sampling(0.7, top_p=0.95)
SERVER_SAMPLING = Sampling(0.7, top_k=40, top_p=0.95, min_p=0.05)
"""What llama.cpp's server does with a request that names the temperature and no penalty for repetition."""
TREES = ("beam", "rebase", "mcts", "vgb")
WALK_STEPS = 4
"""Steps of VGB for each of the candidates that the others draw."""
RESAMPLES = 10_000
REVISE = "Check your answer and improve it. Reply with the whole answer only."
Array = npt.NDArray[Any]
Say = dict[str, Any]


class Proxy:
    """An engine that never ends an answer by itself, or that can neither fork nor rewind."""

    def __init__(self, engine: LlamaCpp, *, tree: bool = True, ends: bool = True) -> None:
        self._engine = engine
        self.capabilities = engine.capabilities if tree else replace(engine.capabilities, fork=False, rewind=False)
        self.end_tokens = engine.end_tokens if ends else frozenset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class Setting(NamedTuple):
    """What every part works with."""

    model: Path
    directory: Path
    """Of the verifier."""
    verifier: Verifier
    task: Task
    tokenizer: Path
    problems: list[Problem]
    candidates: list[int]
    trees: list[int]
    """Candidates of the searches, which take longest."""
    searches: list[str]
    threads: int
    options: Options

    @contextmanager
    def open(self, sequences: int, longest: int, rounds: int = 1) -> Iterator[LlamaCpp]:
        """An engine for answers of `longest` tokens, of which a prompt may hold `rounds`."""
        text = max((problem.prompt for problem in self.problems), key=len)
        with open_model(self.model, EngineOptions(context_tokens=512, threads=self.threads)) as probe:
            prompt = len(probe.tokenize(text)) + 128
        context = prompt + (longest + 64) * rounds
        total = context + 2 * sequences * (longest + 8)
        options = EngineOptions(
            context_tokens=context, sequences=sequences, total_tokens=total, threads=self.threads, fall_back=True
        )
        with open_model(self.model, options) as engine:
            yield engine

    def tokens(self, engine: LlamaCpp, problem: Problem) -> list[int]:
        """The prompt of a problem."""
        return problem_tokens(engine, self.tokenizer, problem)


def ask(engine: Any, prompt: list[int], options: Options, name: str, verifier: Verifier | None) -> tuple[Node, Cost]:
    """The answer of a strategy in a session of its own, and what it cost."""
    with closing(Session(cast(Engine, engine), prompt, options, verifier)) as session:
        *_, node = find_strategy(name)(session)
        return node, copy.copy(session.cost)


# --- speed


def goal(name: str, found: tuple[float, float, float], bound: float, *, least: bool = False) -> Say:
    """Print a ratio beside its bound."""
    value, low, high = found
    met = value >= bound if least else value <= bound
    wanted = f"{'>=' if least else '<='} {bound}"
    print(f"{name:<58} {value:>7.3f} [{low:.3f}, {high:.3f}]  goal {wanted}: {'met' if met else 'MISSED'}")
    return {"ratio": value, "interval": [low, high], "goal": wanted, "met": met}


def speed(setting: Setting, rounds: int) -> Say:
    """The four ratios; sides take turns within each round."""
    prompt_of = setting.problems[0]
    free = replace(setting.options, stop=(), block_end=None, block_tokens=16)
    decode: dict[str, list[float]] = {"head": [], "base": []}
    prefill: dict[str, list[float]] = {"head": [], "base": []}
    processor: dict[str, list[float]] = {"head": [], "base": []}
    walls: dict[str, list[float]] = {"batch": [], "sequential": []}
    equal = True
    with setting.open(17, 128) as engine:
        prompt = setting.tokens(engine, prompt_of)
        endless = Proxy(engine, ends=False)
        for turn in range(-1, rounds):
            answers = set()
            # who goes first takes turns as well
            for side in sorted(decode, reverse=turn % 2 == 0):
                verifier = setting.verifier if side == "head" else None
                begun = time.perf_counter()
                options = replace(free, max_tokens=128, seed=turn + 1)
                with closing(Session(cast(Engine, endless), prompt, options, verifier)) as session:
                    ready, cpu, node = time.perf_counter(), time.process_time(), session.root
                    while not node.ended:
                        (node,) = session.grow([node])
                        if verifier is not None:
                            session.values([node])
                    ended, busy = time.perf_counter(), time.process_time() - cpu
                answers.add(node.tokens)
                if turn >= 0:  # the first round warms up
                    decode[side].append(ended - ready)
                    prefill[side].append(ready - begun)
                    processor[side].append(busy)
            equal = equal and len(answers) == 1
        for turn in range(max(3, rounds // 2)):
            options = replace(free, max_tokens=32, seed=turn)
            for side in sorted(walls, reverse=turn % 2 == 0):
                with closing(Session(cast(Engine, endless), prompt, options, setting.verifier)) as session:
                    begun = time.perf_counter()
                    for part in [[session.root] * 16] if side == "batch" else [[session.root]] * 16:
                        session.values(session.grow(part, whole=True))
                    walls[side].append(time.perf_counter() - begun)

    def ratio(above: list[float], below: list[float]) -> tuple[float, float, float]:
        return median_interval([a / b for a, b in zip(above, below, strict=True)])

    rates = {side: 128 / statistics.median(found) for side, found in decode.items()}
    said: Say = {"tokens_per_s": rates, "equal": equal}
    print(f"one answer of 128 tokens: {rates['base']:.1f} tokens/s, with the head {rates['head']:.1f} tokens/s")
    print(f"{'equal' if equal else 'OTHER'} tokens with and without the head")
    said["head"] = goal("rate with the head / without", ratio(decode["base"], decode["head"]), 0.95, least=True)
    said["cpu"] = ratio(processor["base"], processor["head"])
    said["prefill"] = ratio(prefill["head"], prefill["base"])
    print(f"{'    the same in processor seconds':<58} {said['cpu'][0]:>7.3f}")
    print(f"{'    seconds of the prompt with the head / without':<58} {said['prefill'][0]:>7.3f}")
    base, head = setting.model.stat().st_size, (setting.directory / WEIGHTS).stat().st_size
    said["bytes"] = goal("bytes of weights with the head / without", ((base + head) / base,) * 3, 1.02)
    peaks: dict[str, list[float]] = {"pair": [], "base": []}
    for _ in range(3):
        for side in peaks:
            peaks[side].append(peak_of(setting, side))
    said["peak_bytes"] = {side: statistics.median(found) for side, found in peaks.items()}
    said["peak"] = goal(
        "peak memory with the head / without, fresh processes", ratio(peaks["pair"], peaks["base"]), 1.02
    )
    name = "16 answers of 32 tokens in one batch / one after another"
    said["batch"] = goal(name, ratio(walls["batch"], walls["sequential"]), 0.5)
    said["walk"] = walk_tokens(setting)
    return said


def peak_of(setting: Setting, side: str) -> float:
    """Peak resident bytes of a process that answers one problem."""
    command = [sys.executable, __file__, str(setting.model), str(setting.directory), "--task", setting.task.name]
    command += ["--threads", str(setting.threads), "--tokenizer", str(setting.tokenizer), "--peak", side]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak(setting: Setting, side: str) -> None:
    """Answer one problem, with the verifier or without, and print the peak of this process."""
    verifier = setting.verifier if side == "pair" else None
    with setting.open(2, 64) as engine:
        options = replace(setting.options, max_tokens=64, stop=(), candidates=1)
        name = "sample" if verifier is None else "best-of-n"
        ask(Proxy(engine, ends=False), setting.tokens(engine, setting.problems[0]), options, name, verifier)
    print(peak_rss_bytes())


def walk_tokens(setting: Setting) -> Say:
    """Tokens forward of VGB with forks and rewinds beside the same walk without."""
    tokens: dict[bool, list[int]] = {True: [], False: []}
    same = 0
    problems = setting.problems[:10]
    with setting.open(17, setting.task.max_tokens) as engine:
        for index, problem in enumerate(problems):
            options = replace(setting.options, seed=index, steps=64)
            texts = set()
            for tree in tokens:
                prompt = setting.tokens(engine, problem)
                node, cost = ask(Proxy(engine, tree=tree), prompt, options, "vgb", setting.verifier)
                tokens[tree].append(cost.tokens_forward)
                texts.add(node.text)
            same += len(texts) == 1
    pairs = [a / b for a, b in zip(tokens[True], tokens[False], strict=True)]
    said = goal("tokens forward of a walk with fork and rewind / without", median_interval(pairs), 0.5)
    print(f"    {same} of {len(problems)} walks gave the same answer both ways")
    return {**said, "same_answers": same, "walks": len(problems)}


# --- accuracy against cost


class Run(NamedTuple):
    """A row of the table."""

    strategy: str
    verifier: str
    candidates: int


class Outcome(NamedTuple):
    """A run on a problem."""

    right: float
    cost: Cost


Found = dict[Run, list[Outcome]]


def reviser(setting: Setting, engine: LlamaCpp, problem: Problem) -> Callable[[Sequence[str]], list[int]] | None:
    """Makes the prompt that asks to do better; None for a task that continues text."""
    if not problem.chat:
        return None
    first = [{"role": "system", "content": problem.system}] if problem.system else []

    def revise(answers: Sequence[str]) -> list[int]:
        turns = [*first, {"role": "user", "content": problem.prompt}]
        for answer in answers:
            turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": REVISE}]
        return engine.tokenize(render_chat(setting.tokenizer, turns) or "", special=True)

    return revise


def searches(setting: Setting, choices: tuple[Choice, ...], chat: bool) -> Iterator[tuple[Run, Verifier | None]]:
    """What has a session of its own; the controls take the least of the budgets."""
    for name in ("greedy", "greedy without stop strings", "sample"):
        yield Run(name, "none", 1), None
    controls: dict[str, Verifier] = {"constant": Constant(), "random": RandomVerifier(setting.options.seed)}
    for name in [*setting.searches, *["revise"] * chat]:
        for count in setting.trees:
            yield Run(name, "trained", count), setting.verifier
        yield from ((Run(name, label, setting.trees[0]), control) for label, control in controls.items())
    if choices:
        yield Run("auto", "trained", max(choice.candidates for choice in choices)), setting.verifier


def doublings(first: Sequence[int], last: float) -> list[int]:
    """Numbers of samples: powers of two up to one that is at least `last`, and `first`."""
    return sorted({*first, *(2**power for power in range(math.ceil(math.log2(max(1.0, last))) + 1))})


def accuracy(setting: Setting, choices: tuple[Choice, ...], limit: int) -> Say:
    """Run everything on every problem and print the table."""
    task, most = setting.task, max(setting.candidates + setting.trees)
    chat = setting.problems[0].chat
    found: Found = {}
    judged: list[dict[str, float]] = [{} for _ in setting.problems]

    def keep(run: Run, index: int, node: Node, cost: Cost) -> None:
        text, known = node.text, judged[index]
        if text not in known:
            known[text] = task.check(setting.problems[index], text)
        found.setdefault(run, []).append(Outcome(known[text], cost))

    rounds = 1 + chat * math.ceil(most / setting.options.width)
    with setting.open(most + 1, task.max_tokens, rounds) as engine:
        for index, problem in enumerate(setting.problems):
            prompt = setting.tokens(engine, problem)
            told = replace(setting.options, seed=index, choices=choices, revise=reviser(setting, engine, problem))
            for run, verifier in searches(setting, choices, chat):
                options = replace(told, candidates=run.candidates, steps=WALK_STEPS * run.candidates)
                name, _, without = run.strategy.partition(" ")
                if without:
                    options = replace(options, stop=())
                keep(run, index, *ask(engine, prompt, options, name, verifier))
            for run, node, cost in votes(setting, engine, prompt, told, doublings(setting.candidates, most)):
                keep(run, index, node, cost)
            tell("searches", index, setting)
        drawn = [one.cost.tokens_forward for one in found[Run("best-of-n", "trained", most)]]
        single = [one.cost.tokens_forward for one in found[Run("sample", "none", 1)]]
        each = (statistics.fmean(drawn) - statistics.fmean(single)) / max(1, most - 1)
        dearest = max(statistics.fmean(one.cost.tokens_forward for one in outcomes) for outcomes in found.values())
        # a sample of the vote costs less, for nobody reads the state of its last token
        samples_of_equal_cost = 1 + 1.5 * (dearest - statistics.fmean(single)) / max(each, 0.1)
        points = doublings(setting.candidates, min(limit, samples_of_equal_cost))
        for index, problem in enumerate(setting.problems):
            prompt, told = setting.tokens(engine, problem), replace(setting.options, seed=index)
            for run, node, cost in samples(setting, engine, prompt, told, points, judged[index], problem):
                keep(run, index, node, cost)
            tell("majority", index, setting)
    return table(setting, found, points)


def votes(
    setting: Setting, engine: LlamaCpp, prompt: list[int], told: Options, points: list[int]
) -> list[tuple[Run, Node, Cost]]:
    """Weighted vote and best of n among one pool, which grows from point to point."""
    rows = []
    with closing(Session(cast(Engine, engine), prompt, told, setting.verifier)) as session:
        for count in points:
            session.choose(Choice(1.0, "best-of-n", count))
            for name in ("weighted", "best-of-n"):
                *_, node = find_strategy(name)(session)
                rows.append((Run(name, "trained", count), node, copy.copy(session.cost)))
    return [row for row in rows if row[0].candidates in setting.candidates]


def samples(
    setting: Setting,
    engine: LlamaCpp,
    prompt: list[int],
    told: Options,
    points: list[int],
    known: dict[str, float],
    problem: Problem,
) -> list[tuple[Run, Node, Cost]]:
    """Majority at every point, and the controls that choose among the same samples; no hidden states are asked for."""
    rows, pools = [], []
    with closing(Session(cast(Engine, engine), prompt, told)) as session:
        for count in points:
            session.choose(Choice(1.0, "majority", count))
            *_, node = find_strategy("majority")(session)
            cost = copy.copy(session.cost)
            rows.append((Run("majority", "none", count), node, cost))
            if count in setting.candidates:
                pools.append((session.draw(count), cost))
    controls: dict[str, Verifier] = {"constant": Constant(), "random": RandomVerifier(told.seed)}
    for pool, cost in pools:
        for label, control in controls.items():
            states = [control.extend(control.begin(prompt, None), node.tokens, None) for node in pool]
            best = int(np.argmax(control.values(states, [True] * len(pool))))
            rows.append((Run("best-of-n", label, len(pool)), pool[best], replace(cost, verifier_calls=len(pool))))
        for node in pool:
            if node.text not in known:
                known[node.text] = setting.task.check(problem, node.text)
        rows.append((Run("best-of-n", "oracle", len(pool)), max(pool, key=lambda node: known[node.text]), cost))
    return rows


def tell(what: str, index: int, setting: Setting) -> None:
    """Show progress."""
    print(f"\r{what} {index + 1}/{len(setting.problems)}", end="", file=sys.stderr, flush=True)


class Majority:
    """What a vote of equal cost is right about: linear in log tokens between the measured numbers of samples."""

    def __init__(self, outcomes: Sequence[Sequence[Outcome]], draws: Array) -> None:
        self._draws = draws
        tokens = np.array([[one.cost.tokens_forward for one in row] for row in outcomes])
        right = np.array([[one.right for one in row] for row in outcomes])
        self.range = tokens.mean(axis=1)[[0, -1]]
        everybody = np.arange(draws.shape[1])[None]
        self._points = [
            (np.log(tokens[:, chosen].mean(axis=2)).T, right[:, chosen].mean(axis=2).T) for chosen in (everybody, draws)
        ]

    def difference(self, outcomes: Sequence[Outcome], level: float = 0.05) -> tuple[float, float, float]:
        """Accuracy of a run less that of the vote, with a paired bootstrap interval over problems."""
        right = np.array([one.right for one in outcomes])
        tokens = np.array([one.cost.tokens_forward for one in outcomes])
        sides = []
        for (log_tokens, vote), chosen in zip(self._points, (np.arange(len(right))[None], self._draws), strict=True):
            at = np.log(tokens[chosen].mean(axis=1))
            equal = [np.interp(*one) for one in zip(at, log_tokens, vote, strict=True)]
            sides.append(right[chosen].mean(axis=1) - equal)
        low, high = np.quantile(sides[1], [level / 2, 1 - level / 2])
        return float(sides[0][0]), float(low), float(high)


def table(setting: Setting, found: Found, points: list[int]) -> Say:
    """Print every run, and the best against majority at equal tokens."""
    count = len(setting.problems)
    draws = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    majority = Majority([found[Run("majority", "none", point)] for point in points], draws)
    rows: list[Say] = []
    print(
        f"\n{'strategy':<27} {'verifier':<8} {'n':>4} {'accuracy':>8} {'':<16} {'tokens':>7} {'steps':>6} {'calls':>6} "
        f"{'wall s':>7}  majority at equal tokens"
    )
    for run, outcomes in sorted(found.items(), key=lambda item: (item[0].strategy, item[0].verifier, item[0][2])):
        share = share_interval(sum(one.right for one in outcomes), count)
        mean = {
            name: statistics.fmean(float(getattr(one.cost, name)) for one in outcomes)
            for name in ("tokens_forward", "steps", "verifier_calls", "wall_s")
        }
        over = majority.difference(outcomes)
        low, high = majority.range
        beyond = not 0.98 * low <= mean["tokens_forward"] <= 1.02 * high
        rows.append(
            {**run._asdict(), "accuracy": share[0], "interval": share[1:], **mean, "difference": over[0],
             "difference_interval": over[1:], "beyond_majority": beyond}
        )  # fmt: skip
        name = run.strategy + (" (bound)" if run.verifier == "oracle" else "")
        print(
            f"{name:<27} {run.verifier:<8} {run.candidates:>4} {share[0]:>8.3f} [{share[1]:.3f}, {share[2]:.3f}] "
            f"{mean['tokens_forward']:>7.0f} {mean['steps']:>6.0f} {mean['verifier_calls']:>6.0f} "
            f"{mean['wall_s']:>7.2f}  {over[0]:>+.3f} [{over[1]:+.3f}, {over[2]:+.3f}]{' *' * beyond}"
        )
    trained = [row for row in rows if row["verifier"] == "trained"]
    best = max(trained, key=lambda row: row["difference"])
    outcomes = found[Run(best["strategy"], "trained", best["candidates"])]
    _, low, high = majority.difference(outcomes, 0.05 / len(trained))
    met = best["difference"] >= 0.1 and best["difference_interval"][0] > 0
    print("* costs less or more than any majority measured: compared with the nearest")
    print("votes draw one pool in growing batches: their steps and seconds are up to twice those of a single batch")
    print(
        f"best with the verifier: {best['strategy']} {best['candidates']}, {100 * best['difference']:+.1f} points; "
        f"as the best of {len(trained)} rows [{100 * low:+.1f}, {100 * high:+.1f}]; goal >= +10 with its interval "
        f"above 0: {'met' if met else 'MISSED'}"
    )
    return {"problems": count, "rows": rows, "best": {**best, "interval_as_best": [low, high], "met": met}}


# --- its_hub over HTTP

PEER = """
import asyncio, json, sys, time
from its_hub import AbstractOutcomeRewardModel, BestOfN, OpenAICompatibleLanguageModel
from its_hub.api import ChatMessage

class Model(OpenAICompatibleLanguageModel):
    def _prepare_request_data(self, *arguments, **options):
        data = super()._prepare_request_data(*arguments, **options)
        data["max_tokens"] = data.pop("max_completion_tokens")
        data["repeat_penalty"] = 1.0
        return data

class Length(AbstractOutcomeRewardModel):
    def score(self, conversations, **options):
        return [float(len(str(one[-1].content))) for one in conversations]

    async def ascore(self, conversations, orchestrator=None, **options):
        return self.score(conversations)

async def main(endpoint, tokens):
    model = Model(endpoint, "none", "model", temperature=0.7, max_tokens=tokens)
    for line in sys.stdin:
        messages, count = json.loads(line)
        messages = [ChatMessage(**message) for message in messages]
        begun = time.perf_counter()
        result = await BestOfN(Length()).ainfer(model, messages, count, return_response_only=False)
        seconds = time.perf_counter() - begun
        used = result.usage
        print(json.dumps([seconds, used.completion_tokens, used.prompt_tokens, used.num_calls]), flush=True)
    await model.close()

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def peer(setting: Setting, python: str, threads: int, problems: int, count: int = 16, longest: int = 64) -> Say | None:
    """Wall time of best of n for the same chat prompts; the peer's scoring is free, ours is the verifier's.

    its_hub only talks chat, so a task that continues text is asked as a message; its answers are not judged here.
    """
    command = [python, "-c", "import aiohttp, its_hub, llama_cpp.server.app"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        print(f"its_hub[lm] and llama-cpp-python[server] are not installed for {python}: skipped")
        return None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    walls: dict[str, list[float]] = {"edgekit": [], "its_hub": []}
    tokens: dict[str, int] = {"edgekit": 0, "its_hub": 0}
    prompts_equal = True
    server_command = [python, "-m", "llama_cpp.server", "--model", str(setting.model), "--port", str(port)]
    server_command += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--logits_all", "false"]
    with (
        tempfile.TemporaryDirectory() as scratch,
        setting.open(count + 1, longest) as engine,
        subprocess.Popen(server_command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server,
        subprocess.Popen(
            [python, "-c", PEER, f"http://127.0.0.1:{port}/v1", str(longest)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        ) as client,
    ):  # fmt: skip
        assert client.stdin is not None
        assert client.stdout is not None
        try:
            wait_for(server, port)
            template = Path(scratch)
            (template / "chat_template.jinja").write_text(engine.chat_template or "")
            options = replace(setting.options, stop=(), max_tokens=longest, candidates=count, sampling=SERVER_SAMPLING)
            for index, problem in enumerate([setting.problems[0], *setting.problems[:problems]]):
                messages = [{"role": "system", "content": problem.system}] if problem.system else []
                messages.append({"role": "user", "content": problem.prompt})
                client.stdin.write(json.dumps([messages, count]) + "\n")
                client.stdin.flush()
                line = client.stdout.readline()
                if not line:
                    raise SystemExit("its_hub failed")
                theirs, drawn, asked, answers = json.loads(line)
                prompt = engine.tokenize(render_chat(template, messages) or "", special=True)
                begun = time.perf_counter()
                with closing(
                    Session(cast(Engine, engine), prompt, replace(options, seed=index), setting.verifier)
                ) as session:
                    *_, _best = find_strategy("best-of-n")(session)
                    ours = time.perf_counter() - begun
                    written = sum(len(node.tokens) for node in session.draw(count))
                if not index:
                    continue  # both warm up
                prompts_equal = prompts_equal and asked == answers * len(prompt)
                for side, seconds, length in (("edgekit", ours, written), ("its_hub", theirs, drawn)):
                    walls[side].append(seconds)
                    tokens[side] += length
        finally:
            client.terminate()
            server.terminate()
    for side, found in walls.items():
        rate = tokens[side] / sum(found)
        print(f"{side:<8} {statistics.median(found):>7.2f} s for {count} answers, {rate:.1f} tokens/s of answers")
    print(f"{'equal' if prompts_equal else 'OTHER'} numbers of prompt tokens")
    pairs = [a / b for a, b in zip(walls["edgekit"], walls["its_hub"], strict=True)]
    said = goal(f"our wall time / its_hub's, best of {count}", median_interval(pairs), 0.5)
    each = {side: sum(found) / max(1, tokens[side]) for side, found in walls.items()}
    print(f"{'the same for each token of the answers':<58} {each['edgekit'] / each['its_hub']:>7.3f}")
    return {**said, "per_token": each["edgekit"] / each["its_hub"], "prompts_equal": prompts_equal, "tokens": tokens}


def wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    """Return when the server answers."""
    for _ in range(120):
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit("llama_cpp.server did not start")


def parse_choice(text: str) -> Choice:
    """`DIFFICULTY:STRATEGY:CANDIDATES`."""
    difficulty, strategy, candidates = text.split(":")
    return Choice(float(difficulty), strategy, int(candidates))


def main() -> None:
    """Run the parts that are not skipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("verifier", type=Path, help="a directory of `edgekit train verifier`")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--problems", type=int, default=200, help="of the test split")
    parser.add_argument("--tokenizer", type=Path, help="directory with the chat template  [the model's]")
    parser.add_argument("--candidates", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--tree-candidates", type=int, nargs="+", default=[4], help="of the searches")
    parser.add_argument("--searches", nargs="*", default=list(TREES), choices=TREES)
    parser.add_argument("--majority-limit", type=int, default=64, help="most samples of the vote at equal tokens")
    parser.add_argument("--block", type=int, help="tokens of a block  [16, or an eighth of the longest answer if less]")
    parser.add_argument("--choices", type=parse_choice, nargs="*", default=[], metavar="DIFFICULTY:STRATEGY:N",
                        help="for `auto`, by rising difficulty; without them it is left out")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="of the speed part")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with its_hub[lm] and the server")
    parser.add_argument("--peer-threads", type=int, help="of its server  [as many as ours]")
    parser.add_argument("--peer-problems", type=int, default=10)
    parser.add_argument("--skip", nargs="*", default=[], choices=["speed", "accuracy", "peer"])
    parser.add_argument("--peak", choices=["base", "pair"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    task = find_task(arguments.task)
    block = arguments.block or max(1, min(16, task.max_tokens // 8))
    options = Options(
        sampling=SAMPLING, stop=task.stop, max_tokens=task.max_tokens, answer=task.answer, block_tokens=block
    )
    manifest, verifier = load_head(arguments.verifier)
    setting = Setting(
        arguments.model, arguments.verifier, verifier, task, arguments.tokenizer or arguments.model.parent,
        task.problems("test", arguments.problems), sorted(arguments.candidates), sorted(arguments.tree_candidates),
        arguments.searches, arguments.threads, options,
    )  # fmt: skip
    if arguments.peak:
        return peak(setting, arguments.peak)
    said: Say = {"benchmark": "decoding", "model": arguments.model.name, "task": task.name, "block": block}
    said |= {"domains": manifest.domains, "threads": arguments.threads, "load": os.getloadavg()[0]}
    if task.name not in manifest.domains:
        print(f"the verifier has not seen {task.name}: it learned from {', '.join(manifest.domains)}")
    if "speed" not in arguments.skip:
        print("== speed")
        said["speed"] = speed(setting, arguments.rounds)
    if "accuracy" not in arguments.skip:
        print("== accuracy and cost")
        said["accuracy"] = accuracy(setting, tuple(arguments.choices), arguments.majority_limit)
    if "peer" not in arguments.skip:
        print("== its_hub over HTTP")
        said["peer"] = peer(
            setting, arguments.peer_python, arguments.peer_threads or arguments.threads, arguments.peer_problems
        )
    print(json.dumps(said))


if __name__ == "__main__":
    main()
