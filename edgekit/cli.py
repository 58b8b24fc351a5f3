"""The command line: one module per command in `commands/`, imported when it is called."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from edgekit import __version__
from edgekit.errors import EdgekitError, InputError, ToolError, suggest

COMMANDS = {
    "build": "Make a bundle for one or more targets.",
    "cache": "Look after the store of finished steps.",
    "compare": "Set builds side by side and find what got worse.",
    "device": "Look at a board behind SSH, and set it up.",
    "doctor": "Say what is installed, what is missing, and how to fix it.",
    "plan": "Show what a build would do and what it would need; writes nothing.",
    "recipes": "List and show recipes.",
    "run": "Generate text with a bundle.",
    "targets": "List and show hardware targets.",
    "tco": "Say what owning a fleet of devices costs, against cloud and API.",
    "train": "Train a companion for a model: a verifier.",
    "validate": "Check a bundle's files and measure it again.",
}
"""Every module of `commands/` with the summary that `--help` prints; stated here so that help imports none."""


class _ReaderGone(Exception):
    """Whoever read our output went away: nobody is left to tell."""


@contextlib.contextmanager
def _notice_reader() -> Iterator[None]:
    """Raise `_ReaderGone` before click or rich end with 1, which means a bug of ours."""
    try:
        yield
    except BrokenPipeError:
        raise _ReaderGone from None
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            raise _ReaderGone from None
        raise


class _Commands(click.Group):
    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with _notice_reader():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _notice_reader():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"edgekit.commands.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise InputError("a command of edgekit", f"{args[0]!r}{suggest(args[0], COMMANDS)}", "edgekit --help")
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgekit")
def cli() -> None:
    """Plan, quantize, package and prove language models for edge devices.

    Start with:  edgekit build --target jetson
    """


def main() -> None:
    """Run the command line and turn every error into its exit code (see docs/exit-codes.md)."""
    try:
        # without standalone mode click returns the code of an Exit, and else what the command returned: None
        sys.exit(cli.main(prog_name="edgekit", standalone_mode=False))
    except EdgekitError as error:
        _fail_with(error)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _fail_with(_explain_usage(error))
    except (click.Abort, KeyboardInterrupt):
        _fail(130, "interrupted: finished steps are kept; the same command goes on", {"found": "interrupted"})
    except _ReaderGone:
        _abandon_stdout()
        sys.exit(141)  # 128 + SIGPIPE, what a shell shows for other programs
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OUTPUT_LOST:
            _abandon_stdout()
            place = f"room for the output, and for temporary files in {tempfile.gettempdir()}"
            _fail_with(ToolError(place, str(error.strerror), "make room, or write the output elsewhere"))
        if os.environ.get("EDGEKIT_DEBUG"):
            raise
        text = f"{type(error).__name__}: {error}"
        advice = "run it again with EDGEKIT_DEBUG=1 and report what it prints"
        _fail(1, f"error: a bug in edgekit: {text}\n  next: {advice}", {"found": text, "next": advice})


_OUTPUT_LOST = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def _explain_usage(error: click.ClickException) -> InputError:
    """Say what click says in our three parts: the usage, its message, and the help to read."""
    context = getattr(error, "ctx", None) or click.Context(cli, info_name="edgekit")
    usage = " ".join([context.command_path, *context.command.collect_usage_pieces(context)])
    message = " ".join(error.format_message().split()).rstrip(".")
    return InputError(usage, message[:1].lower() + message[1:], f"{context.command_path} --help")


def _abandon_stdout() -> None:
    """Keep the interpreter from writing what is left to a stdout that takes nothing any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail_with(error: EdgekitError) -> NoReturn:
    told = {"wanted": error.wanted, "found": error.found, "next": error.next_command}
    _fail(error.exit_code, f"error: {error}", None if error.documented else told)


def _fail(code: int, message: str, document: dict[str, str] | None) -> NoReturn:
    if document is not None and "--json" in sys.argv[1:]:
        try:
            click.echo(json.dumps({"error": {"exit_code": code, **document}}, indent=2))
        except OSError:  # stderr still says it, and the code is the first error's
            _abandon_stdout()
    click.echo(message, err=True)
    sys.exit(code)
