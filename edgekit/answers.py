"""How a bundle does on a task: the device answers, and whoever has the checker judges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from edgekit.bundle import open_bundle, open_engine, open_verifier
from edgekit.chat import problem_tokens
from edgekit.decode import Session, find_strategy, streams
from edgekit.devices import Answered, AnswersJob, Question
from edgekit.engine import Engine
from edgekit.measurement import Measurement, median_interval, share_interval
from edgekit.tasks import Problem, Task


def answer_questions(job: AnswersJob, opened: Callable[[Engine], object] = id) -> Iterator[Answered]:
    """Answer one question after another as the bundle's settings say, but for what the task asks for.

    `opened` is called with the engine before the first question.
    """
    bundle = open_bundle(Path(job.bundle))
    settings = bundle.settings
    name = settings.decode.strategy
    candidates = 1 if streams(name) else settings.decode.candidates
    tokenizer = bundle.path / settings.tokenizer
    with open_engine(bundle, candidates=candidates) as engine, open_verifier(bundle, engine) as verifier:
        opened(engine)
        for index, question in enumerate(job.questions):
            problem = Problem(question.prompt, {}, question.system, question.chat)
            options = settings.decode.options(
                stop=job.stop, max_tokens=job.max_tokens, answer=job.answer, seed=job.seed + index
            )
            tokens = problem_tokens(engine, tokenizer, problem)
            with closing(Session(engine, tokens, options, verifier, settings.traffic.counted())) as session:
                *_, node = find_strategy(name)(session)
                cost = session.cost
            forward = cost.tokens_forward + cost.verifier_tokens
            yield Answered(text=node.text, tokens_forward=forward, seconds=cost.wall_s)


def questions(task: Task, problems: Sequence[Problem], bundle: Path, seed: int = 0) -> AnswersJob:
    """The job that asks a task's problems; what the checker knows stays here."""
    return AnswersJob(
        bundle=str(bundle),
        questions=tuple(Question(prompt=p.prompt, system=p.system, chat=p.chat) for p in problems),
        stop=task.stop,
        max_tokens=task.max_tokens,
        answer=task.answer,
        seed=seed,
    )


def judge_answers(
    task: Task, problems: Sequence[Problem], answers: Sequence[Answered], device: str
) -> list[Measurement]:
    """Accuracy with Wilson's interval over problems, and the median time and tokens of an answer."""
    right = [task.check(problem, answer.text) for problem, answer in zip(problems, answers, strict=True)]
    found = [
        ("task_accuracy", "ratio", share_interval(sum(right), len(right))),
        ("answer_s", "s", median_interval([answer.seconds for answer in answers])),
        ("answer_tokens_forward", "tokens", median_interval([float(answer.tokens_forward) for answer in answers])),
    ]
    return [
        Measurement(
            name=name, value=value, unit=unit, kind="measured", n=len(right), ci_low=low, ci_high=high, device=device,
            note=f"{task.name}, {len(right)} problems",
        )
        for name, unit, (value, low, high) in found
    ]  # fmt: skip
