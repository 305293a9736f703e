"""The `cotune` command: global flags, and every error as one sentence with an exit code. Commands are in commands/.

Exit codes: 0 done, 1 a run failed (or a bug), 2 wrong usage, config or data, 130 interrupted. Nothing heavy is imported
before a command runs: `cotune --help` loads neither torch nor pandas nor pydantic.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import cotune
from cotune.commands import data, home, report, run
from cotune.errors import CotuneError, DataError, UsageError
from cotune.output import note

CONTINUES = "Give the same command again and it continues from its last checkpoint."


class Commands(TyperGroup):
    """Turns exceptions into a sentence on stderr and an exit code, unless --debug asks for the traceback.

    --debug is taken anywhere on the line, because one wants it after having typed the rest.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        self._debug = "--debug" in args[:end]
        if not args:  # a bare `cotune` asks what there is; that is no error
            args = ["--help"]
        return super().parse_args(ctx, [a for i, a in enumerate(args) if a != "--debug" or i > end])

    def invoke(self, ctx: Any) -> Any:
        try:
            with _no_interrupt_lost():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            resumable = ctx.invoked_subcommand in ("run", "study", "predict")
            note("Interrupted. " + (CONTINUES if resumable else "Nothing was changed."))
            raise typer.Exit(130) from None
        except CotuneError as error:
            self._say(str(error))
            raise typer.Exit(2 if isinstance(error, UsageError | DataError) else 1) from None
        except OSError as error:
            self._say(f"{error}. Check that place and its free space, then give the same command again.")
            raise typer.Exit(1) from None
        except MemoryError:
            self._say("There is not enough memory. Use a smaller model, or --set runner.batch_size=1.")
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except Exception as error:
            self._say(f"{type(error).__name__}: {error}. This looks like a bug; --debug shows where.")
            raise typer.Exit(1) from None

    def _say(self, sentence: str) -> None:
        if self._debug:
            traceback.print_exc()
        note(f"Error: {sentence}")


@contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Ctrl-C during a garbage collection is raised inside some `__del__`, where Python drops it: send it once more."""
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            report(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = report


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help and one-line errors, the same in a pipe and on a terminal
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cotune {cotune.__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
) -> None:
    """Tune the prompt, the weights, both in turn, or both jointly? One honest comparison.

    Start with: cotune run --strategy prompt-only --model tiny --task micro-gsm8k
    """


app.command()(run.run)
app.command()(report.compare)
app.command()(report.difficulty)
app.command()(report.show)
app.command()(report.watch)
app.command("list")(report.list_)
app.command()(report.doctor)
app.add_typer(data.group, name="data")
app.command()(data.grade)
app.command()(data.regrade)
app.command()(home.export)
app.command()(home.predict)
app.command()(home.serve)
app.command()(run.study)

if __name__ == "__main__":
    app()
