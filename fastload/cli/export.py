"""``fastload export``: a dataset as tar shards or a folder of images, or a trained run as one file that needs no fastload.

>>> fastload export photos.beton shards/ --to webdataset
>>> fastload export runs/photos -o model.onnx
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import click

from fastload.errors import UsageError


@click.command()
@click.argument("what", metavar="DATA_OR_RUN")
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--to", help="For a dataset: webdataset (tar shards; default) or folder.")
@click.option("--shard-size", type=float, help="For a dataset: MiB of a tar shard, at most.  [default: 256]")
@click.option("--overwrite", is_flag=True, help="For a dataset: replace an earlier export in DIR.")
@click.option("-o", "--out", help="For a run: a .onnx or .pt2 (torch.export) file, or a folder for both.")
@click.option("--which", help="For a run: checkpoint best (default) or last.")
@click.option("--json", "as_json", is_flag=True, help="Last line of the output: one JSON object.")
def command(
    what: str,
    folder: str | None,
    to: str | None,
    shard_size: float | None,
    overwrite: bool,
    out: str | None,
    which: str | None,
    as_json: bool,
) -> None:
    """Write a dataset for other tools, or a trained model that needs no fastload.

    A .beton file and a folder DIR: tar shards with the index that DALI reads, or class folders with labels.csv. JPEG images are copied
    as they are, raw pixels become PNG; 'fastload convert DIR' reads them back.

    A run folder of 'train' or 'cv' (then the mean of the folds' models), or a checkpoint, and -o: the model with its preprocessing,
    checked against the run's. It takes uint8 pixels (batch, size, size, 3) and gives probabilities.
    """
    if what.endswith(".beton"):
        _refuse({"-o": out, "--which": which}, "a run folder", f"{what} is a dataset")
        if folder is None:
            raise UsageError(
                f"name the folder to write: fastload export {what} DIR --to {to or 'webdataset'}"
            )
        _data(what, folder, to, shard_size, overwrite, as_json)
        return
    given = {"DIR": folder, "--to": to, "--shard-size": shard_size, "--overwrite": overwrite or None}
    _refuse(given, "a dataset", f"{what} is no .beton file")
    if out is None:
        raise UsageError(f"name the file to write: fastload export {what} -o model.onnx")
    _model(what, out, which or "best", as_json)


def _refuse(given: Mapping[str, object], owner: str, because: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{name} is for {owner}, and {because}; leave it out, got {value!r}")


def _data(
    path: str, folder: str, to: str | None, shard_size: float | None, overwrite: bool, as_json: bool
) -> None:
    from fastload.exporter import SHARD_MIB, export_data

    size = SHARD_MIB if shard_size is None else shard_size
    done = export_data(path, folder, to or "webdataset", shard_mib=size, overwrite=overwrite)
    click.echo(str(done))
    if as_json:
        click.echo(json.dumps(done.to_json()))


def _model(run: str, out: str, which: str, as_json: bool) -> None:
    if which not in ("best", "last"):
        raise UsageError(f"--which must be best or last, got {which!r}")
    if os.path.isfile(out) and out.endswith(".beton"):
        raise UsageError(f"-o names the model's file, not a dataset, got {out!r}")
    from fastload.train.export import TOLERANCE, export

    done = export(run, out, which=which)
    for name, difference in done.differences.items():
        click.echo(
            f"{name}: differs by {difference:.2g} at most from the PyTorch model on {done.checked_on} (allowed: {TOLERANCE:g})"
        )
    click.echo("written: " + ", ".join(str(path) for path in done.files))
    if as_json:
        click.echo(
            json.dumps({"files": [str(path) for path in done.files], "largest_difference": done.differences})
        )
