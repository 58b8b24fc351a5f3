"""The command line: one module per command in `commands/`, imported when it is called."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

import click

from edgekit import __version__
from edgekit.errors import EdgekitError, suggest

COMMANDS = {
    "build": "Make a bundle for one or more targets.",
    "cache": "Look after the store of finished steps.",
    "doctor": "Say what is installed, what is missing, and how to fix it.",
    "plan": "Show what a build would do and what it would need; writes nothing.",
    "recipes": "List and show recipes.",
    "run": "Generate text with a bundle.",
    "targets": "List and show hardware targets.",
    "validate": "Check a bundle's files and measure it again.",
}
"""Every module of `commands/` with the summary that `--help` prints; stated here so that help imports none."""


class _Commands(click.Group):
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
            ctx.fail(f"no command {args[0]!r}{suggest(args[0], COMMANDS)}. Next: edgekit --help")
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
        sys.exit(cli.main(standalone_mode=False))
    except EdgekitError as error:
        told = {"wanted": error.wanted, "found": error.found, "next": error.next_command}
        _fail(error.exit_code, f"error: {error}", None if error.documented else told)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _fail(130, "interrupted: finished steps are kept; the same command goes on", {"found": "interrupted"})
    except BrokenPipeError:
        # the reader of our output went away; keep the interpreter from writing to the closed pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("EDGEKIT_DEBUG"):
            raise
        text = f"{type(error).__name__}: {error}"
        advice = "run it again with EDGEKIT_DEBUG=1 and report what it prints"
        _fail(1, f"error: a bug in edgekit: {text}\n  next: {advice}", {"found": text, "next": advice})


def _fail(code: int, message: str, document: dict[str, str] | None) -> None:
    if document is not None and "--json" in sys.argv[1:]:
        click.echo(json.dumps({"error": {"exit_code": code, **document}}, indent=2))
    click.echo(message, err=True)
    sys.exit(code)
