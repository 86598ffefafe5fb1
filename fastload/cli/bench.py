"""``fastload bench photos.beton --model resnet18``: which side is the bottleneck, and what to change, in one sentence.

>>> fastload bench photos.beton --tune
>>> fastload bench photos.tar --compare cpu,ffcv,torch
>>> fastload bench model --models resnet18,convnext_tiny
"""

from __future__ import annotations

import importlib
import json
import textwrap
from typing import Any

import click

from fastload.benchmarks.compare_options import compare_flags
from fastload.errors import UsageError

SUBCOMMANDS = {
    "model": "Which of channels_last, AMP, compile and CUDA graphs pays for which model.",
    "report": "Result files as Markdown and as one HTML page.",
}


class BenchCommand(click.Command):
    """A command whose first argument may name a subcommand instead of DATA; each is imported when it is called."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and args[0] in SUBCOMMANDS:
            module = importlib.import_module(f"fastload.cli.bench_{args[0]}")
            command: click.Command = module.command
            return command.make_context(f"{info_name} {args[0]}", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        with formatter.section("Commands (a DATA of the same name is reached as ./model)"):
            formatter.write_dl(list(SUBCOMMANDS.items()))


@click.command("bench", cls=BenchCommand)
@click.argument("data", type=click.Path())
@click.option(
    "--model", default="resnet18", show_default=True, help="Name of a timm model; none: the loader alone."
)
@click.option(
    "--size", default=224, show_default=True, help="Side of the square that the model sees, in pixels."
)
@click.option("--batch-size", default=64, show_default=True, help="Images a step.")
@click.option("--threads", type=int, default=None, help="Threads of the loader. [default: all cores]")
@click.option("--prefetch", default=2, show_default=True, help="Batches that the loader prepares ahead.")
@click.option("--engine", default="cpu", show_default=True, help="What makes the batches.")
@click.option(
    "--decode",
    type=click.Choice(["fast", "exact"]),
    default="fast",
    show_default=True,
    help="exact smooths chroma as Pillow does.",
)
@click.option("--device", default=None, help="cpu, cuda, cuda:1, mps. [default: the best there is]")
@click.option(
    "--seconds",
    default=60.0,
    show_default=True,
    help="Time for everything; steps and changes adapt to it, rounds do not.",
)
@click.option(
    "--rounds", default=5, show_default=True, help="Alternating rounds of every figure, at least 5."
)
@click.option(
    "--transforms",
    "preset",
    type=click.Choice(["train", "eval"]),
    default="train",
    show_default=True,
    help="Which preset the loader runs.",
)
@click.option("--no-changes", is_flag=True, help="Only the figures and the verdict; run no change.")
@click.option("--compile", "compile", is_flag=True, help="Run torch.compile as one of the changes.")
@click.option(
    "--tune", is_flag=True, help="Search threads, prefetch and batch size, and print what to paste."
)
@click.option(
    "--keep-batch-size", is_flag=True, help="With --tune: leave the batch, and so the training, as it is."
)
@click.option(
    "--compare",
    "peers",
    default=None,
    metavar="PEERS",
    help="Measure these loaders side by side instead, such as cpu,ffcv,torch; all for all.",
)
@compare_flags
@click.option("--out", type=click.Path(), default=None, help="Append the records to this JSON-lines file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a record, last.")
@click.pass_context
def command(
    ctx: click.Context, data: str, tune: bool, peers: str | None, out: str | None, as_json: bool, **given: Any
) -> None:
    """Measure the loader alone, the model alone and both together on DATA (a .beton file), name the bottleneck, and run the changes
    that can help beside the unchanged.

    The model side is what `fastload train` does for one batch: forward, backward and optimizer, with the same AMP and memory
    layout. About a minute at the default settings.
    """
    mode = "compare" if peers is not None else "tune" if tune else "bench"
    if peers is not None and tune:
        raise UsageError(
            f"--compare measures loaders and --tune settings; give one of them, got --compare {peers} --tune"
        )
    _refuse(ctx, mode)
    if peers is not None:
        records = _compare(data, peers, out, given)
    else:
        records = [_tune(data, given) if tune else _bench(data, given)]
        if out is not None:
            from fastload.benchmarks.harness import write_jsonl

            click.echo(f"Record: {write_jsonl(out, records)}")
    if as_json:
        for record in records:
            click.echo(json.dumps(record))


MODES = {"bench": "a plain bench", "tune": "--tune", "compare": "--compare"}
# Options that mean something in one mode only, or not in another: a wrong one is said and not ignored.
ONLY = {
    "workloads": ("compare",),
    "baseline": ("compare",),
    "install": ("compare",),
    "images": ("compare",),
    "keep_batch_size": ("tune",),
    "no_changes": ("bench",),
    "compile": ("bench",),
    "threads": ("bench", "compare"),
    "prefetch": ("bench",),
    "model": ("bench", "tune"),
    "size": ("bench", "tune"),
    "engine": ("bench", "tune"),
    "decode": ("bench", "tune"),
    "device": ("bench", "tune"),
    "seconds": ("bench", "tune"),
    "preset": ("bench", "tune"),
}


def _refuse(ctx: click.Context, mode: str) -> None:
    for name, modes in ONLY.items():
        source = ctx.get_parameter_source(name)
        if mode not in modes and source is click.core.ParameterSource.COMMANDLINE:
            flag = {"preset": "transforms"}.get(name, name).replace("_", "-")
            places = " or ".join(MODES[each] for each in modes)
            raise UsageError(
                f"--{flag} goes with {places} only, not with {MODES[mode]}; got {ctx.params[name]!r}"
            )


def _pipeline(given: dict[str, Any]) -> Any:
    from fastload import transforms

    size = given["size"]
    return transforms.eval(size) if given["preset"] == "eval" else transforms.train(size)


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(
        f"{head}: {text}", 100, subsequent_indent=" " * (len(head) + 2) if head == "Note" else ""
    )


def _bench(data: str, given: dict[str, Any]) -> dict[str, Any]:
    from fastload.benchmarks.bench import bench

    names = (
        "size",
        "batch_size",
        "device",
        "threads",
        "seconds",
        "rounds",
        "prefetch",
        "engine",
        "decode",
        "compile",
    )
    result = bench(
        data,
        given["model"],
        transforms=_pipeline(given),
        changes=not given["no_changes"],
        **{name: given[name] for name in names},
    )
    s = result.settings
    amp = f", AMP {s['amp']}" if s["amp"] is not None else ""
    what = "no model" if s["model"] == "none" else s["model"]
    click.echo(
        f"{what} at {s['size']} px, batches of {s['batch_size']}, {s['device']}{amp}, "
        f"{s['threads']} loader threads, {s['images']:,} {s['store']} images"
    )
    click.echo(result.table())
    click.echo("")
    click.echo(_wrapped("Verdict", result.verdict.sentence))
    for note in result.notes:
        click.echo(_wrapped("Note", note))
    return result.to_json()


def _tune(data: str, given: dict[str, Any]) -> dict[str, Any]:
    from fastload.benchmarks.tune import tune, tune_table

    names = ("size", "batch_size", "keep_batch_size", "device", "seconds", "rounds", "engine", "decode")
    record = tune(data, given["model"], transforms=_pipeline(given), **{name: given[name] for name in names})
    click.echo(tune_table(record))
    click.echo("")
    click.echo(_wrapped("Verdict", record["sentence"]))
    for note in record["notes"]:
        click.echo(_wrapped("Note", note))
    click.echo(f"\nPaste:\n{textwrap.indent(record['paste'], '  ')}")
    return record


def _compare(data: str, peers: str, out: str | None, given: dict[str, Any]) -> list[dict[str, Any]]:
    from tqdm.auto import tqdm

    from fastload.benchmarks.compare import compare
    from fastload.benchmarks.compare_options import CompareOptions, names
    from fastload.benchmarks.compare_table import table
    from fastload.benchmarks.harness import write_jsonl
    from fastload.benchmarks.peers import PEERS
    from fastload.benchmarks.workloads import WORKLOADS

    options = CompareOptions(
        data,
        names(peers, PEERS),
        names(given["workloads"], WORKLOADS),
        batch=given["batch_size"],
        **{name: given[name] for name in ("baseline", "rounds", "images", "threads", "install")},
    )
    if out is not None:
        write_jsonl(out, [])  # a file that cannot be written is said now, and not after an hour
    records = []
    with tqdm(desc="compare", unit="job", leave=False) as bar:

        def say(text: str) -> None:
            bar.set_postfix_str(text)
            bar.update(1)

        for record in compare(options, say):
            records.append(record)
            if out is not None:
                write_jsonl(out, [record])
            bar.clear()
            click.echo(table(record) + "\n")
    if out is not None:
        click.echo(f"Records: {out}")
    return records
