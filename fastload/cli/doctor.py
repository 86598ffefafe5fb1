"""``fastload doctor``: versions, CPU, GPU, which engines work here, and the cure for those that do not."""

from __future__ import annotations

import json

import click


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def command(as_json: bool) -> None:
    """Report what works on this machine. Exit code 0 even if something is broken: the report is the answer."""
    from tqdm.auto import tqdm

    from fastload.doctor import diagnose, render

    with tqdm(desc="doctor", unit="check", leave=False) as bar:

        def step(task: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(task.partition(":")[2] or task)
            bar.update(done - bar.n)

        report = diagnose(step)
    click.echo(render(report))
    if as_json:
        click.echo(json.dumps(report))
