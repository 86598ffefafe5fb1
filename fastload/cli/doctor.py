"""``fastload doctor``: versions, CPU, GPU, which engines work here, which is the fastest, and the cure for those that do not."""

from __future__ import annotations

import json

import click


@click.command("doctor")
@click.argument("file", type=click.Path(), required=False)
@click.option("--no-measure", is_flag=True, help="Leave out which engine is the fastest here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def command(file: str | None, no_measure: bool, as_json: bool) -> None:
    """Report what works on this machine, and which engine makes batches of FILE (.beton) fastest.

    Without FILE a few pictures are made for that. Exit code 0 even if something is broken, because the report is the answer; 2 or 1 if
    FILE is missing or damaged.
    """
    from tqdm.auto import tqdm

    from fastload.doctor import diagnose, render
    from fastload.errors import DataError

    # Delayed, so that a FILE that is none leaves one sentence and no bar.
    with tqdm(desc="doctor", unit="check", leave=False, delay=0.1) as bar:

        def step(task: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(task.partition(":")[2] or task)
            bar.update(done - bar.n)

        report = diagnose(step, measure=not no_measure, file=file)
    click.echo(render(report))
    if as_json:
        click.echo(json.dumps(report))
    auto = report.get("auto", {})
    if file is not None and auto.get("bad_file"):
        raise DataError(f"{auto['why']}; {auto['cure']}")
