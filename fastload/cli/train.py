"""``fastload train photos.beton --model resnet18 -o runs/photos``: learn, validate, keep the best."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, TextIO

import click

from fastload.errors import UsageError
from fastload.train.config import AMP, AUGMENT, METRICS, Config

DEFAULT = Config()


def _option(name: str, kind: Any, text: str) -> Any:
    """An option of Config. It stays None when it is not given, so that --resume can tell."""
    value = getattr(DEFAULT, name)
    shown = "" if value is None else f"  [default: {value}]"
    return click.option(f"--{name.replace('_', '-')}", name, type=kind, default=None, help=text + shown)


@click.command()
@click.argument("data")
@click.option("-o", "--out", help="Run folder.  [default: runs/MODEL]")
@click.option("--valid", help="Validation data (.beton). Without it a part of DATA is held out.")
@click.option("--resume", is_flag=True, help="Go on with the run in the folder, with its own options.")
@click.option("--overwrite", is_flag=True, help="Start anew in a folder that holds a run.")
@click.option("--json", "as_json", is_flag=True, help="Last line of the output: one JSON object.")
@click.option("--model", help="Name of a timm model; needed unless --resume finds the run's own.")
@click.option("--pretrained", is_flag=True, default=None, help="Start from timm's published weights.")
@_option("epochs", int, "Times every image is seen.")
@_option("size", int, "Side of the images the model sees, in pixels.")
@_option("batch_size", int, "Images per forward pass.")
@_option("accumulate", int, "Forward passes per optimizer step.")
@click.option(
    "--drop-last", is_flag=True, default=None, help="Leave out the last, smaller batch of an epoch."
)
@_option("optimizer", str, "Name of a timm optimizer.")
@_option("lr", float, "Peak learning rate.  [default: 1e-3, pretrained 2e-4, SGD 50 times that]")
@_option("weight_decay", float, "Not applied to biases and norms.")
@_option("warmup_epochs", float, "Warm-up before the cosine.  [default: a tenth of the epochs, at most 5]")
@_option("clip_grad", float, "Largest gradient norm; 0: off.")
@_option("label_smoothing", float, "Weight spread over all classes.")
@_option("mixup", float, "Alpha of Mixup; 0: off.")
@_option("cutmix", float, "Alpha of CutMix; 0: off.")
@_option("augment", click.Choice(AUGMENT), "light: padded crops for small images; none: centre crop.")
@click.option(
    "--no-flip", "flip", flag_value=False, type=bool, default=None, help="No mirror images: digits, text."
)
@_option("ema", float, "Decay of averaged weights; 0: off.")
@_option("amp", click.Choice(AMP), "Mixed precision.")
@click.option(
    "--no-channels-last", "channels_last", flag_value=False, type=bool, default=None, help="NCHW memory."
)
@click.option("--compile", "compile", is_flag=True, default=None, help="torch.compile the model.")
@_option("metric", click.Choice(METRICS), "What the best checkpoint is best in.")
@_option("valid_fraction", float, "Share held out where --valid is not given.")
@_option(
    "groups", str, "Field that must not stand on two sides (a person); auto: 'group' if it is there; none."
)
@_option("seed", int, "Of order, augmentation and weights.")
@_option("threads", int, "Loader threads.")
@_option("device", str, "cuda, cuda:1, mps, cpu.  [default: the best there is]")
def command(
    data: str,
    out: str | None,
    valid: str | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a timm model on DATA (.beton) and write a run folder."""
    from fastload.train import Trainer
    from fastload.train.data import TrainWarning
    from fastload.train.runs import CONFIG, read_config

    given = {name: value for name, value in options.items() if value is not None}
    if valid is not None and "valid_fraction" in given:
        raise UsageError(
            "--valid names the validation data and --valid-fraction holds some out; give one of them"
        )
    folder = Path(out if out is not None else f"runs/{given.get('model', DEFAULT.model)}")
    if resume and (folder / CONFIG).is_file():
        cfg = Config.from_dict({**read_config(folder).to_dict(), **given})
    elif "model" not in given:
        raise UsageError("say which model to train, for example --model resnet18")
    else:
        cfg = Config(**given)

    def show(line: dict[str, Any]) -> None:
        click.echo(
            f"epoch {line['epoch']:>3}/{cfg.epochs}  train loss {line['train_loss']:.4f}  valid loss {line['valid_loss']:.4f}  "
            f"accuracy {line['accuracy']:.4f}  macro-F1 {line['macro_f1']:.4f}  "
            f"{line['images_per_s']:,.0f} img/s  waits for data {line['stall']:.0%}"
        )

    def tell(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        click.echo(f"warning: {message}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = tell  # one line each, without the place in our source
        warnings.simplefilter("always", TrainWarning)
        run = Trainer(cfg).fit(data, valid, folder, resume=resume, overwrite=overwrite, on_epoch=show)
    click.echo(
        f"best: epoch {run.best_epoch} of {len(run.history)}, accuracy {run.accuracy:.4f}, macro-F1 {run.macro_f1:.4f} "
        f"on {run.valid_images:,} images held apart from {run.train_images:,}\n"
        f"speed: {run.images_per_s:,.0f} images/s, {run.stall:.0%} of the time waiting for data, {run.seconds:.1f} s in all\n"
        f"run: {run.folder}"
    )
    if as_json:
        click.echo(json.dumps(run.figures()))
