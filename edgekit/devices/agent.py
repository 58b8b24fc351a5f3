"""What runs on a device: `python -m edgekit.devices.agent JOB.json RESULT.jsonl [--end-with-stdin]`.

It appends one JSON object a line, each with a `type`, as `edgekit.devices._results` reads them: `build`, `board`,
`loaded`, `samples`, `measurement`, `divergence_per_window`, `answer`, `part` after each part of the job, `error`, and
last `done`. With the flag it ends when its standard input does: whoever held the other end is gone. With `--describe
ENGINE` instead it prints the version, the machine and the engine as one JSON object, with `--probe` the version and
the machine as a target.
Nothing but the engine, numpy, pydantic, psutil and, for chat templates, jinja2 is imported.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgekit import __version__
from edgekit.devices import Job, describe_machine
from edgekit.devices.board import read_state, uses_accelerator
from edgekit.engine import Engine
from edgekit.engines import find_engine
from edgekit.errors import EdgekitError, InputError, ToolError
from edgekit.measurement import Measurement

Emit = Callable[..., None]
END_WITH_STDIN = "--end-with-stdin"
DESCRIBE = "--describe"
PROBE = "--probe"


def main(arguments: list[str]) -> int:
    """Run the job and return the exit code: 0, or the code of the error that was written."""
    if arguments[:1] == [DESCRIBE]:
        print(json.dumps(describe(*arguments[1:])))
        return 0
    if arguments == [PROBE]:
        print(json.dumps(probe()))
        return 0
    faulthandler.enable()  # a crash inside the engine then says so on stderr
    job_path, result_path = map(Path, arguments[:2])
    if arguments[2:] == [END_WITH_STDIN]:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    with result_path.open("a", encoding="utf-8") as file:

        def emit(kind: str, **fields: Any) -> None:
            file.write(json.dumps({"type": kind, **fields}) + "\n")
            file.flush()

        try:
            run_job(_read_job(job_path), emit)
        except EdgekitError as error:
            emit("error", **describe_error(error))
            return error.exit_code
        except MemoryError:
            shortage = ToolError("enough memory for the job", "an allocation that failed", "use a smaller context")
            emit("error", **describe_error(shortage))
            return shortage.exit_code
        emit("done")
    return 0


def run_job(job: Job, emit: Emit) -> None:
    """Measure what the job asks for and emit every figure at once when it is known."""
    module = find_engine(job.engine)
    device = describe_machine().text
    info = module.build_info()
    emit("build", device=device, info=info)
    emit("board", state=read_state().model_dump(mode="json"))

    def loaded(engine: Engine) -> Engine:
        info.update(engine.loaded)
        emit("loaded", info=dict(engine.loaded))
        return engine

    def open_model() -> Engine:
        return loaded(module.open_model(Path(job.model), job.options))

    def report(measurement: Measurement) -> None:
        emit("measurement", measurement=measurement.model_dump(mode="json"))

    def keep_samples(name: str, samples: Sequence[float]) -> None:
        emit("samples", name=name, values=list(samples))

    if job.measure.latency is not None:
        from edgekit.measure.energy import Meter, find_meter
        from edgekit.measure.latency import measure_latency
        from edgekit.measure.memory import peak_rss_bytes

        def meter_of(engine: Engine) -> Meter:
            return find_meter(uses_accelerator(engine.loaded))

        settings = job.measure.latency.model_dump()
        timed = measure_latency(
            open_model, **settings, device=device, of=job.of, find_meter=meter_of, on_samples=keep_samples
        )
        for measurement in timed:
            report(measurement)
        # before the divergence, whose reference is mapped into this process, too
        peak = Measurement(
            name="peak_rss_bytes",
            value=peak_rss_bytes(),
            unit="bytes",
            kind="measured",
            device=device,
            of=job.of,
            note="a fresh process that loads and generates, the Python interpreter included",
        )
        report(peak)
        emit("part", part="latency")
    if job.measure.divergence is not None:
        from edgekit.measure.divergence import compare, open_reference

        reference = open_reference(Path(job.measure.divergence.reference))
        with open_model() as engine:
            divergence = compare(engine, reference, job.measure.divergence.windows)
        for measurement in divergence.measurements(device=device, of=job.of):
            report(measurement)
        emit("divergence_per_window", values=divergence.window_kld)
        emit("part", part="divergence")
    if job.measure.answers is not None:
        from edgekit.answers import answer_questions

        for answered in answer_questions(job.measure.answers, loaded):
            emit("answer", answer=answered.model_dump(mode="json"))
        emit("part", part="answers")
    emit("board", state=read_state().model_dump(mode="json"))
    # again, with what the opened model told
    emit("build", device=device, info=info)


def describe(engine: str | None = None) -> dict[str, Any]:
    """What `--describe` prints; `problem` says why the engine cannot run here."""
    machine = describe_machine()
    told: dict[str, Any] = {"version": __version__, "device": machine.text, "facts": machine.facts}
    if engine is not None:
        try:
            told["build"] = find_engine(engine).build_info()
        except EdgekitError as error:
            told["problem"] = describe_error(error)
        except PackageNotFoundError as error:
            missing = ToolError(f"the package {error.name}", "it is not installed", "install it")
            told["problem"] = describe_error(missing)
    return {**told, "board": read_state().model_dump(mode="json")}


def probe() -> dict[str, Any]:
    """What `--probe` prints: the same, with the machine as a target."""
    from edgekit.devices.probe import probe_machine

    try:
        probed = probe_machine()
    except EdgekitError as error:
        return {**describe(), "problem": describe_error(error)}
    return {**describe(), "target": probed.target.model_dump(mode="json"), "power_sensors": probed.power_sensors}


def describe_error(error: EdgekitError) -> dict[str, str]:
    """The fields of an `error` line; `edgekit.devices._results` raises it anew from them."""
    return {
        "error": type(error).__name__,
        "wanted": error.wanted,
        "found": error.found,
        "next_command": error.next_command,
    }


def _end_with_stdin() -> None:
    # the descriptor itself: a buffered reader's lock would hang the interpreter when it exits
    while os.read(0, 1024):
        pass
    os._exit(1)


def _read_job(path: Path) -> Job:
    try:
        return Job.model_validate_json(path.read_bytes())
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"]))
        raise InputError(
            f"a valid job in {path.name}", f"{place}: {detail['msg']}", "use one edgekit version"
        ) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
