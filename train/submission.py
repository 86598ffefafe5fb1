"""A submission file after the template that a competition gives: its ids, its order, its column names.

Two kinds of template are known: one column for the label, and one column for each class (probabilities). Numbers or names are
written as the template's example values have them. Each guess is said in the result, and nothing is left out silently: an id
without a prediction is an error.

>>> print(write_submission(predictions, "sample_submission.csv", "submission.csv").note)
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastload.errors import DataError, UsageError
from fastload.train.files import write_csv
from fastload.train.predictions import Predictions


@dataclass(frozen=True)
class Submission:
    """What was written: ``rows`` of the template, ``unused`` predictions that it does not ask for, and in words how it was read."""

    rows: int
    unused: int
    note: str


def write_submission(predictions: Predictions, sample: str | Path, out: str | Path) -> Submission:
    """Fill in the template ``sample`` (.csv, or .tsv; ids in the first column) and write it to ``out``, atomically.

    UsageError: no template there; DataError: it asks for ids or classes that there are no predictions of, or is of another kind.
    """
    header, rows = _read(Path(sample))
    asked = [row[0] for row in rows]
    places, how, used = _match(predictions.ids, asked, sample)
    columns = header[1:]
    numbers = _class_columns(columns, predictions.classes, sample)
    if numbers is not None:
        probs = predictions.probs[:, numbers]
        values = [[f"{p:.6g}" for p in probs[place].tolist()] for place in places]
        said = "a column of probabilities for each class"
        if columns[0] not in predictions.classes:
            said += ", by class number"
    else:
        examples = [row[1] if len(row) > 1 else "" for row in rows]
        labels, said = _labels(predictions, examples, columns[0])
        values = [[labels[place]] for place in places]
    write_csv(out, header, ([id, *value] for id, value in zip(asked, values)))
    unused = len(predictions) - used
    left = f", {unused:,} predictions not asked for" if unused else ""
    return Submission(len(rows), unused, f"{len(rows):,} rows, {said}, ids matched {how}{left}")


def check_sample(sample: str | Path, ids: Sequence[str]) -> None:
    """The errors of :func:`write_submission` that need no probabilities: before hours of predicting, not after."""
    _match(ids, [row[0] for row in _read(Path(sample))[1]], sample)


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [
                row
                for row in csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
                if row
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text file of UTF-8"
        raise UsageError(
            f"cannot read the sample submission: {why}; give a CSV file, got {str(path)!r}"
        ) from error
    if len(lines) < 2 or len(lines[0]) < 2:
        raise DataError(
            f"{path} is no sample submission: it needs a header, an id and at least one other column, got "
            f"{len(lines)} lines and the columns {', '.join(lines[0]) if lines else 'none'!r}"
        )
    return lines[0], lines[1:]


def _match(ids: Sequence[str], asked: Sequence[str], sample: str | Path) -> tuple[list[int], str, int]:
    """Row of the predictions for each id of the template, how they were matched, and how many predictions were used."""
    failed: list[str] = []
    for how, key in (("exactly", str), ("by the file name without folder and extension", _stem)):
        place: dict[str, int] = {}
        twice = set()
        for i, id in enumerate(ids):
            if place.setdefault(key(id), i) != i:
                twice.add(key(id))
        missing = [id for id in asked if key(id) not in place]
        if not missing:
            wanted = {key(id) for id in asked}
            if wanted & twice:
                raise DataError(
                    f"several predictions have an id that {sample} asks for once (matched {how}); give each image an id of its own, "
                    f"got {min(wanted & twice)!r}"
                )
            return [place[key(id)] for id in asked], how, len(wanted)
        failed = missing if not failed or len(missing) < len(failed) else failed
    raise DataError(
        f"{len(failed)} of {len(asked)} ids in {sample} have no prediction; predict these images too, got "
        f"{', '.join(map(repr, failed[:5]))}{' and more' if len(failed) > 5 else ''} (the predictions have ids such as {ids[0]!r})"
    )


def _stem(id: str) -> str:
    return PurePosixPath(id.replace("\\", "/")).stem


def _class_columns(columns: Sequence[str], classes: Sequence[str], sample: str | Path) -> list[int] | None:
    """Number of the class of each column, or None where there is one column for the label."""
    numbers = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in columns if name not in numbers]
    if not unknown and len(columns) == len(classes):
        return [numbers[name] for name in columns]
    if len(columns) == 1 and (unknown or len(classes) > 2):
        return None
    if len(columns) == 1:  # the probability of one of two classes
        return [numbers[columns[0]]]
    if columns == [str(i) for i in range(len(classes))]:
        return list(range(len(classes)))
    lacking = [name for name in classes if name not in columns]
    raise DataError(
        f"{sample} has neither one label column nor one column for each class; "
        f"its unknown columns: {', '.join(map(repr, unknown[:8])) or 'none'}, classes without a column: "
        f"{', '.join(map(repr, lacking[:8])) or 'none'}; rename its columns or the classes"
    )


def _labels(predictions: Predictions, examples: Sequence[str], column: str) -> tuple[list[str], str]:
    """What goes into the label column for each prediction, and in words what that is."""
    classes = predictions.classes
    words = [
        word
        for text in examples
        for word in (text.split() if predictions.multilabel else [text.strip()])
        if word
    ]
    if words and not all(re.fullmatch(r"[+-]?\d+", word) for word in words):
        fractions = all(re.fullmatch(r"[+-]?\d*\.\d+([eE][+-]?\d+)?|[+-]?\d+", word) for word in words)
        if fractions and len(classes) == 2 and not predictions.multilabel:
            return [
                f"{p:.6g}" for p in predictions.probs[:, 1].tolist()
            ], f"{column!r} as the probability of {classes[1]!r}"
        odd = (
            next((word for word in words if word not in classes), None)
            if not predictions.multilabel
            else None
        )
        said = "class names" if odd is None else f"class names (the example {odd!r} of the template is none)"
        return predictions.predicted_names(), said
    if not words or set(words) <= set(classes):
        return predictions.predicted_names(), "class names"
    if all(name.isdecimal() for name in classes):  # "007" and 7 are the same class
        texts = [str(int(name)) for name in classes]
        said = "class names as numbers"
    else:
        texts = [str(i) for i in range(len(classes))]
        said = f"class numbers (0 is {classes[0]!r}, {len(classes) - 1} is {classes[-1]!r})"
    predicted = predictions.predicted
    if predictions.multilabel:
        return [" ".join(texts[i] for i in row.nonzero()[0]) for row in predicted], said
    return [texts[number] for number in predicted.tolist()], said
