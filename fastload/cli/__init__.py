"""The command line: one file a command, imported only when that command runs.

``fastload convert photos photos.beton``. Errors that a user can cure are printed in one line, exit code 2 for a wrong
call and 1 for wrong data; ``--debug`` anywhere on the line shows the traceback.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback

import click

from fastload import __version__
from fastload.errors import FastloadError, unknown

# Order of the help page: the order in which a new user needs them.
COMMANDS = {
    "demo": "The whole job on images that come with scikit-learn, under 3 minutes.",
    "doctor": "Versions, CPU, GPU, which engines work here, the fastest, and the cure for those that do not.",
    "convert": "Images into one .beton file.",
    "inspect": "What is in a .beton file: fields, sizes, classes, storage.",
    "verify": "Check every checksum and decode every image.",
    "preview": "A PNG contact sheet, with or without augmentation.",
    "parity": "How far our pixels are from Pillow's and torchvision's, on your own images.",
    "bench": "Is the loader or the model the bottleneck?",
    "check": "Leaks, look-alikes, label conflicts, drift: what would make a score false.",
    "find-lr": "A learning rate, from a short rising run.",
    "train": "Train a timm model.",
    "cv": "A model for each fold, and one true score.",
    "tune": "Search options with Optuna.",
    "predict": "Class probabilities or a submission file of trained runs.",
    "report": "One HTML page about one or several runs.",
    "export": "A dataset as tar shards or a folder; a trained run as ONNX and torch.export.",
    "compete": "Check, folds, test-time augmentation, ensemble, submission and page in one command.",
}


class LazyGroup(click.Group):
    """A click group that imports a command's module when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"fastload.cli.{name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise unknown("command", args[0], COMMANDS, "see: fastload --help")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):  # from the table above: --help imports no command
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fastload")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Images to the GPU faster than the model can eat them."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``fastload`` command."""
    # torch's OpenMP threads spin while they wait, and starve the loader's threads on a machine of few cores. Read when
    # torch is imported, which the commands do later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = list(sys.argv[1:] if argv is None else argv)
    end = args.index("--") if "--" in args else len(args)
    debug = "--debug" in args[:end]
    # Whoever adds it to a command that failed adds it at the end.
    args = [arg for arg in args[:end] if arg != "--debug"] + args[end:]
    try:
        code = cli.main(args=args, prog_name="fastload", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except FastloadError as error:
        _report(error, debug)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our pipe has gone, and a message to it would raise again
        sys.exit(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT):
            _report(error, debug, "this looks like a bug in fastload; run with --debug for the traceback")
            sys.exit(1)
        _report(error, debug)
        sys.exit(1)
    except Exception as error:
        _report(error, debug, "this looks like a bug in fastload; run with --debug for the traceback")
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: BaseException, debug: bool, hint: str = "") -> None:
    if debug:
        traceback.print_exception(error)
    name = "" if isinstance(error, (FastloadError, OSError)) else f"{type(error).__name__}: "
    click.echo(f"error: {name}{error}", err=True)
    for note in [*getattr(error, "__notes__", ()), hint]:
        if note and not debug:
            click.echo(f"  {note}", err=True)
