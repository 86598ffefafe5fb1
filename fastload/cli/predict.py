"""``fastload predict runs/photos test.beton -o out.csv``: class probabilities of a trained run."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("run")
@click.argument("data")
@click.option("-o", "--out", required=True, help="CSV file to write: id, prediction, p_<class> ...")
@click.option("--batch-size", type=int, default=64, show_default=True, help="Images per forward pass.")
@click.option(
    "--which", type=click.Choice(["best", "last"]), default="best", show_default=True, help="Checkpoint."
)
@click.option("--threads", type=int, help="Loader threads.")
@click.option("--device", help="cuda, cuda:1, mps, cpu.  [default: the best there is]")
@click.option("--json", "as_json", is_flag=True, help="Last line of the output: one JSON object.")
def command(
    run: str,
    data: str,
    out: str,
    batch_size: int,
    which: str,
    threads: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Predict the classes of DATA (.beton) with the model in the folder RUN."""
    from fastload.train import predict

    result = predict(run, data, batch_size, device, out, which=which, threads=threads)
    click.echo(f"{len(result.ids):,} images, {result.images_per_s:,.0f} images/s, written to {out}")
    if result.accuracy is not None and result.macro_f1 is not None:
        click.echo(
            f"accuracy {result.accuracy:.4f}, macro-F1 {result.macro_f1:.4f} against the labels in {data}"
        )
    else:
        click.echo(result.note)
    if as_json:
        figures = {
            "images": len(result.ids), "out": out, "run": run, "accuracy": result.accuracy, "macro_f1": result.macro_f1,
            "loss": result.loss, "images_per_s": result.images_per_s, "seconds": result.seconds, "note": result.note,
        }  # fmt: skip
        click.echo(json.dumps(figures))
