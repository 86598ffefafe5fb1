"""Options of a training on the command line: made from :class:`fastload.train.Config`, so that they are written down once.

``@training_options`` gives a command every option of Config, ``--config FILE`` and ``--set key=value``; :func:`resolve` puts them
together: what is given on the line wins over ``--set``, that over the file, and the file over the defaults.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any, TextIO

import click

from fastload.errors import UsageError
from fastload.train.config import Config, parse_sets

_KINDS: dict[str, Any] = {"str": str, "int": int, "float": float}
_SPELT_NO = {"channels_last", "flip"}  # on unless --no-... is given


def training_options(without: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: all options of Config but those in ``without``, ``--config`` and ``--set``, as keyword arguments.

    An option that is not given is None, so that a file or a resumed run can be told from it.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for spec in reversed(fields(Config)):
            if spec.name not in without:
                command = _option(spec)(command)
        command = click.option(
            "--set",
            "sets",
            multiple=True,
            metavar="KEY=VALUE",
            help="Any option by its name in the YAML file; may be repeated.",
        )(command)
        return click.option(
            "--config", "config_file", help="YAML file of options, such as a run's config.yaml."
        )(command)

    return add


def _option(spec: Any) -> Any:
    kind, _, optional = str(spec.type).partition(" | ")
    default = spec.default if spec.default is not MISSING else None
    text = spec.metadata["help"]
    flag = f"--{spec.name.replace('_', '-')}"
    if kind == "bool":
        if spec.name in _SPELT_NO:
            off = f"--no-{spec.name.replace('_', '-')}"
            return click.option(
                off, spec.name, flag_value=False, type=bool, default=None, help=f"Without: {text}"
            )
        return click.option(flag, spec.name, is_flag=True, default=None, help=text)
    shown = "" if default in (None, (), "") or optional else f"  [default: {default}]"
    choices = spec.metadata["choices"]
    value = click.Choice(choices) if choices else str if kind.startswith("tuple") else _KINDS[kind]
    return click.option(flag, spec.name, type=value, default=None, help=text + shown)


def resolve(
    options: dict[str, Any], config_file: str | None, sets: Sequence[str], base: Config | None = None
) -> Config:
    """The Config that is meant. ``base``: what holds where nothing else is said, in place of the defaults."""
    if base is not None and config_file is not None:
        raise UsageError(f"a resumed run has its own options; leave --config out, got {config_file!r}")
    start = Config.load(config_file) if config_file is not None else base or Config()
    given = {name: value for name, value in options.items() if value is not None}
    return start.with_values({**parse_sets(sets), **given})


@contextmanager
def told_warnings() -> Iterator[None]:
    """Warnings about the data as one line each, without the place in our source."""
    from fastload.train.data import TrainWarning

    def tell(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
        line: str | None = None,
    ) -> None:  # fmt: skip
        click.echo(f"warning: {message}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = tell
        warnings.simplefilter("always", TrainWarning)
        yield


class Sections(click.Command):
    """A command whose help shows the options of a training under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        headings = {spec.name: spec.metadata["section"] for spec in fields(Config)}
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            if not isinstance(param, click.Option):
                continue
            record = param.get_help_record(ctx)
            if record is not None:
                groups.setdefault(headings.get(str(param.name), "Options"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def epoch_line(line: dict[str, Any], epochs: int, metric: str) -> str:
    """An epoch's figures as one line for a person."""
    extra = "" if metric in ("accuracy", "macro_f1", "loss", "log_loss") else f"  {metric} {line[metric]:.4f}"
    return (
        f"epoch {line['epoch']:>3}/{epochs}  train loss {line['train_loss']:.4f}  valid loss {line['valid_loss']:.4f}  "
        f"accuracy {line['accuracy']:.4f}  macro-F1 {line['macro_f1']:.4f}{extra}  "
        f"{line['images_per_s']:,.0f} img/s  waits for data {line['stall']:.0%}"
    )
