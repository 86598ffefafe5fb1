"""A search for options: trials of a training, each a run folder that can be repeated, in a study of Optuna (Akiba et al. 2019).

``tune("photos.beton", cfg, {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "optimizer": ["adamw", "sgd"]}, trials=20)``. All
trials are scored on one and the same hold-out (or folds), made and looked at for leaks once. The trade-off: the best score of
many is too good, by the luck of the choice; a true one needs images that no trial has seen.

Any number of processes may work on one folder, and each may be killed: what makes that safe is two kinds of file locks, which the
system frees when a process dies. ``tune.lock`` is held while the study is changed, ``trial-0007.lock`` while that trial runs.
A trial that is marked as running and whose lock is free was killed, and is put in line again.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import html
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastload.dataset import Dataset
from fastload.errors import DataError, UsageError, require, unknown
from fastload.train import metrics, runs
from fastload.train.callbacks import Callback
from fastload.train.config import Config, differences
from fastload.train.cv import FOLDS, cross_validate
from fastload.train.data import TrainWarning, folds_of, make_split, open_data, read_labelled, refuse_leaks
from fastload.train.files import write_atomic, write_csv, write_json
from fastload.train.folds import Folds, check_folds
from fastload.train.model import Given
from fastload.train.trainer import Trainer
from fastload.train.tune_plots import history, importances, score_of, slices
from fastload.train.tune_space import Space, Suggest, quiet, read_space, suggestions

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

PRUNERS = ("median", "none")
BEST, LOCK, STUDY = "best.yaml", "tune.lock", "study.db"
STRIDE = 10_000  # Optuna's step of epoch e in fold k is k * STRIDE + e, however many epochs a trial has
REASON, REPEATS = "reason", "repeats"  # why a trial failed; which killed trial it repeats
SHOWN = 10  # trials in a table

Tell = Callable[["FrozenTrial"], object]


# -- the result --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """A search, finished or not: ``study`` is Optuna's, with all that it can do; ``config``: the options that were not searched."""

    folder: Path
    config: Config
    study: optuna.Study

    @property
    def trials(self) -> list[FrozenTrial]:
        """Those that were run: complete, pruned, or failed with a reason."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if _counts(trial)]

    @property
    def ranked(self) -> list[FrozenTrial]:
        """The complete trials, best first; of equal ones the earlier."""
        sign = -1.0 if metrics.higher_is_better(self.config.metric) else 1.0
        done = [trial for trial in self.trials if trial.state.name == "COMPLETE"]
        return sorted(done, key=lambda trial: (sign * score_of(trial), trial.number))

    @property
    def best_trial(self) -> FrozenTrial:
        """UsageError where no trial was completed, with the reason of one that failed."""
        ranked = self.ranked
        if not ranked:
            why = [trial.user_attrs[REASON] for trial in self.trials if REASON in trial.user_attrs]
            raise UsageError(
                f"no trial in {self.folder} was completed{f': {why[-1]}' if why else ''}; run more trials, or change the space"
            )
        return ranked[0]

    @property
    def best_score(self) -> float:
        """Of the best trial, in the metric of the search."""
        return score_of(self.best_trial)

    @property
    def best_config(self) -> Config:
        """All options of the best trial, with its data and split."""
        return Config.load(self.folder_of(self.best_trial.number) / runs.CONFIG)

    def folder_of(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.folder / f"trial-{number:04d}"

    def lock_of(self, number: int) -> Path:
        """The file that is locked while a trial runs."""
        return self.folder / f"trial-{number:04d}.lock"

    def _rows(self, count: int) -> tuple[list[str], list[list[str]]]:
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.params))
        others = [trial for trial in self.trials if trial.state.name != "COMPLETE"]
        rows = []
        for trial in [*self.ranked[:count], *others[-count:]]:
            state = trial.state.name.lower()
            said = f"{score_of(trial):.4f}" if state == "complete" else state
            rows.append([str(trial.number), said, *(_shown(trial.params.get(name)) for name in names)])
        return ["trial", self.config.metric, *names], rows

    def table(self, count: int = SHOWN) -> str:
        """The best trials as text, then the last of those that were pruned or failed."""
        head, rows = self._rows(count)
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        return "\n".join("  ".join(map(str.rjust, row, widths)) for row in [head, *rows])

    def figures(self) -> dict[str, Any]:
        """The outcome as plain values, for JSON."""
        states = [trial.state.name for trial in self.trials]
        return {
            "search": str(self.folder), "metric": self.config.metric, "best_trial": self.best_trial.number,
            "best_score": self.best_score, "best_params": self.best_trial.params, "complete": states.count("COMPLETE"),
            "pruned": states.count("PRUNED"), "failed": states.count("FAIL"),
        }  # fmt: skip

    def plot(self) -> list[Path]:
        """Write ``history.png``, ``slices.png`` and ``importances.png`` into the folder, as far as there is something to see."""
        written = []
        for name, draw in (("history", history), ("slices", slices), ("importances", importances)):
            figure = draw(self)
            if figure is not None:
                written.append(self.folder / f"{name}.png")
                write_atomic(written[-1], partial(figure.savefig, format="png", dpi=120))
        return written

    def _repr_html_(self) -> str:
        head, rows = self._rows(SHOWN)
        lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
        lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
        best = f", best {html.escape(self.config.metric)} {self.best_score:.4f}" if self.ranked else ""
        return f"<p>{html.escape(str(self.folder))}: {len(self.trials)} trials{best}</p><table>{''.join(lines)}</table>"


def _counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of the total. One that was killed is not, since it is repeated; its repetition is."""
    failed = trial.state.name == "FAIL" and (REASON in trial.user_attrs or REPEATS in trial.user_attrs)
    return failed or trial.state.name in ("COMPLETE", "PRUNED")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def trial_line(trial: FrozenTrial, metric: str) -> str:
    """A finished trial as one line for a person."""
    params = "  ".join(f"{name} {_shown(value)}" for name, value in trial.params.items())
    if trial.state.name == "COMPLETE":
        return f"trial {trial.number:>3}  {metric} {score_of(trial):.4f}  {params}"
    if trial.state.name == "PRUNED":
        after = f"pruned after {len(trial.intermediate_values)} epochs"
        return f"trial {trial.number:>3}  {after}  {params}"
    return f"trial {trial.number:>3}  failed: {trial.user_attrs.get(REASON, 'killed')}  {params}"


# -- the search --------------------------------------------------------------------------------------------------------


def tune(
    data: Dataset | str | Path | None = None,
    cfg: Config | None = None,
    space: Space | str | Path | None = None,
    trials: int = 20,
    out: str | Path = "runs/tune",
    *,
    folds: int | None = None,
    timeout: float | None = None,
    storage: str | None = None,
    pruner: str | None = None,
    workers: int = 1,
    resume: bool = False,
    model: Given | None = None,
    progress: bool = True,
    on_trial: Tell | None = None,
) -> Search:
    """Run trials until there are ``trials`` in all, and write the folder ``out``.

    ``space`` as in :func:`read_space`; what it leaves open is as in ``cfg``. A trial's score is ``cfg.metric`` of its best epoch on
    the hold-out, or pooled over ``folds``. ``timeout``: minutes after which no new trial begins. ``storage``: a database URL of
    Optuna (default: ``study.db`` in the folder). ``pruner`` "median" (the default) stops a trial that, from its second epoch on,
    is worse than the median of at least five complete ones at the same epoch. ``workers``: processes that share the trials.
    ``resume`` goes on in ``out``, where all but ``trials`` is known already. A trial that runs out of memory, diverges or gets
    options that do not fit together is recorded with the reason, and the search goes on; any other error ends it.
    DataError: the split probably leaks, or a worker died; UsageError: what does not fit, before the first trial.
    """
    require("optuna", "tune")
    end = math.inf if timeout is None else time.monotonic() + 60 * timeout
    for name, value in (("trials", trials), ("workers", workers)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value!r}")
    if pruner is not None and pruner not in PRUNERS:
        raise unknown("pruner", pruner, PRUNERS)
    folder, tell = Path(out), on_trial or (lambda trial: None)
    given = {"folds": folds, "storage": storage, "pruner": pruner, "space": _noted(space)}
    about = _read_about(folder, resume)
    if about is None:
        about = _start(folder, data, cfg or Config(), space, given)
    else:
        _go_on(folder, about, cfg, given)
    search = Search(folder, Config.load(folder / runs.CONFIG), _open_study(folder, about))
    chosen = space if space is not None else about["space"]
    if chosen is None:
        raise UsageError("the space of this search is a function that is in no file; give it again, got None")
    if workers > 1:
        if about["space"] is None or model is not None or isinstance(data, Dataset):
            raise UsageError(
                "several workers are processes of their own: they need the data by its path, the model by its name and the "
                f"space in a file or a mapping, got workers {workers}"
            )
        _share_out(search, trials, workers, end, tell)
    else:
        opened = open_data(data if isinstance(data, Dataset) else str(search.config.data))
        table = None
        if about["folds"] is not None:
            table = Folds.load(folder / runs.SPLIT).match([str(id) for id in opened.ids])
        suggest = suggestions(read_space(chosen), search.config)
        with warnings.catch_warnings():
            # The same data in every trial: the same words about them.
            warnings.simplefilter("once", TrainWarning)
            _Worker(search, suggest, opened, table, model, progress).work(trials, end, tell)
    if search.ranked:
        search.best_config.save(folder / BEST)
        search.plot()
    return search


def read_search(folder: str | Path) -> Search:
    """The search in a folder. UsageError: none there."""
    folder = Path(folder)
    about = _read_about(folder, resume=True)
    if about is None:
        raise UsageError(f"no search in the folder; give one that 'fastload tune' wrote, got {str(folder)!r}")
    return Search(folder, Config.load(folder / runs.CONFIG), _open_study(folder, about))


def _noted(space: Space | str | Path | None) -> Any:
    """A space as it is written into ``run.json`` for other processes; None for a function that is in no file."""
    if isinstance(space, (str, Path)):
        found = read_space(space)
        return str(Path(space).resolve()) if callable(found) else dict(found)
    return None if space is None or callable(space) else dict(space)


def _read_about(folder: Path, resume: bool) -> dict[str, Any] | None:
    """What ``run.json`` says of the search in a folder; None where it has to be begun."""
    if (folder / runs.CONFIG).is_file() and not (folder / runs.ABOUT).is_file() and resume:
        return None  # killed before its first trial
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    about = runs.read_about(folder) if (folder / runs.ABOUT).is_file() else {}
    ours = about.get("kind") == "tune"
    if not (ours and resume):
        cure = "--resume goes on with its search" if ours else "no search of fastload is in it"
        raise UsageError(
            f"the folder of the search is not empty ({cure}); give another one with -o, got {str(folder)!r}"
        )
    return about


def _start(
    folder: Path, data: Dataset | str | Path | None, cfg: Config, space: Space | str | Path | None, given: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """Check everything that can be wrong, make the split, and write what the trials have in common."""
    if data is None and cfg.data is None:
        raise UsageError("there is nothing to train on; give the training data, got None")
    if space is None:
        raise UsageError("there is nothing to search; give the space of options, got None")
    fixed = cfg.valid if cfg.valid is not None else cfg.split
    if given["folds"] is not None and fixed is not None:
        raise UsageError(
            f"folds exclude validation data and a saved split; give one of them, got {fixed!r} too"
        )
    suggestions(read_space(space), cfg)
    opened = open_data(data if data is not None else str(cfg.data))
    # Trials run from anywhere, and are repeated from anywhere.
    paths = {"data": opened.path, "valid": cfg.valid, "split": cfg.split}
    known: dict[str, Any] = {k: str(Path(path).resolve()) for k, path in paths.items() if path is not None}
    cfg = replace(cfg, **known)
    if given["folds"] is not None:
        whole = read_labelled(opened, cfg.groups)
        table = folds_of(whole, "auto", cfg, folds=given["folds"])
        for text in check_folds(table, whole.classes):
            warnings.warn(text, TrainWarning, stacklevel=3)
        if not cfg.allow_leak:
            refuse_leaks([opened], [table.vector()], [whole.labels], whole.group_field, cfg.threads)
        rows: Iterable[tuple[Any, ...]] | None = table.rows()
    else:
        split = make_split(opened, cfg.valid, cfg)
        rows = split.rows() if fixed is None else None
        if fixed is None:
            cfg = replace(cfg, split=str((folder / runs.SPLIT).resolve()))
    cfg.save(folder / runs.CONFIG)  # first: it marks the folder as ours
    if rows is not None:
        write_csv(folder / runs.SPLIT, ("id", "fold", "group", "label"), rows)
    about = {
        "kind": "tune", "study": folder.resolve().name, **given, "pruner": given["pruner"] or "median",
        "versions": runs.versions(), "machine": runs.machine(),
    }  # fmt: skip
    _open_study(folder, about, begin=True)
    write_json(folder / runs.ABOUT, about)
    return about


def _go_on(folder: Path, about: dict[str, Any], cfg: Config | None, given: dict[str, Any]) -> None:
    """A search may only go on as what it was, but on another device, or with another pruner."""
    old = Config.load(folder / runs.CONFIG)
    changed = {} if cfg is None else differences(old, cfg)
    for name in ("folds", "storage", "space"):
        if given[name] is not None and given[name] != about[name]:
            changed[name] = (about[name], given[name])
    if changed:
        text = ", ".join(f"{name} {was!r} -> {now!r}" for name, (was, now) in changed.items())
        raise UsageError(
            f"{folder} was started with other options ({text}); resume it with its own, or search in another folder"
        )
    about["pruner"] = given["pruner"] or about["pruner"]
    if cfg is not None:
        replace(cfg, data=old.data, valid=old.valid, split=old.split).save(folder / runs.CONFIG)


def _open_study(folder: Path, about: dict[str, Any], begin: bool = False) -> optuna.Study:
    optuna = require("optuna", "tune")
    url = about["storage"] or f"sqlite:///{(folder / STUDY).resolve()}"
    # Several processes write: SQLite's own patience of 5 s is short on a busy disk.
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    metric = Config.load(folder / runs.CONFIG).metric
    direction = "maximize" if metrics.higher_is_better(metric) else "minimize"
    median = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2)
    pruner = median if about["pruner"] == "median" else optuna.pruners.NopPruner()
    with quiet():
        try:
            store = optuna.storages.RDBStorage(url, engine_kwargs=engine)
            if not begin:
                return optuna.load_study(study_name=about["study"], storage=store, pruner=pruner)
            return optuna.create_study(
                study_name=about["study"], storage=store, direction=direction, pruner=pruner, load_if_exists=about["storage"] is None
            )  # fmt: skip
        except optuna.exceptions.DuplicatedStudyError as error:
            raise UsageError(
                f"the storage has a search of this name already; give the folder another name with -o, got {about['study']!r}"
            ) from error
        except KeyError as error:
            raise UsageError(
                f"the storage of {folder} does not know its search; search anew in another folder, got {about['study']!r}"
            ) from error
        except Exception as error:  # of SQLAlchemy or of a driver that is missing, each has its own errors
            raise UsageError(
                f"the storage cannot be used ({' '.join(str(error).split())[:160]}); give a database URL such as "
                f"sqlite:////data/study.db, got {url!r}"
            ) from error


# -- one process -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Worker:
    """Runs trials of a search in this process."""

    search: Search
    suggest: Suggest
    data: Dataset
    folds: Folds | None
    model: Given | None
    progress: bool

    def work(self, total: int, end: float, tell: Tell) -> None:
        """One trial after the other, until there are ``total`` in all processes together or the time is over."""
        while time.monotonic() < end:
            with contextlib.ExitStack() as held:
                trial = self._next(total, held)
                if trial is None:
                    return
                finished = self._run(trial)
            tell(finished)
            if torch.cuda.is_available():
                gc.collect()  # what cycles still hold of a model would lack on the GPU

    def _next(self, total: int, held: contextlib.ExitStack) -> Trial | None:
        """A trial to run, whose lock is in ``held``; None where there are enough."""
        search, optuna = self.search, require("optuna", "tune")
        with _locked(search.folder / LOCK):
            _repeat_killed(search)
            known = search.study.get_trials(deepcopy=False)
            begun = sum(_counts(one) or one.state.name == "RUNNING" for one in known)
            if begun >= total:
                return None
            # A seed for each trial: processes that share a study, or one that goes on, must not draw what was drawn before.
            seed = np.random.SeedSequence([search.config.seed, begun]).generate_state(1)[0]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # before version 5 Optuna calls constant_liar experimental
                search.study.sampler = optuna.samplers.TPESampler(seed=int(seed), constant_liar=True)
            trial = search.study.ask()
            held.enter_context(_locked(search.lock_of(trial.number)))
            return trial

    def _run(self, trial: Trial) -> FrozenTrial:
        """Train as ``trial`` says, and write down how it ended. What is not foreseen leaves it as running, as a kill does."""
        optuna = require("optuna", "tune")
        try:
            outcome: dict[str, Any] = {"values": self._score(trial)}
        except optuna.TrialPruned:
            outcome = {"state": optuna.trial.TrialState.PRUNED}
        except (DataError, UsageError, torch.OutOfMemoryError) as error:
            trial.set_user_attr(REASON, str(error))
            outcome = {"state": optuna.trial.TrialState.FAIL}
        with _locked(self.search.folder / LOCK):
            finished = self.search.study.tell(trial, **outcome)
            self.search.lock_of(trial.number).unlink(missing_ok=True)
        return finished

    def _score(self, trial: Trial) -> float:
        cfg = self.search.config.with_values(self.suggest(trial))
        place = self.search.folder_of(trial.number)
        # The folder is begun here and "resumed" there: so a trial that fails at once has its options in it, and the folds, which
        # are the same in all trials, are not looked at for leaks again and again.
        cfg.save(place / runs.CONFIG)
        common: dict[str, Any] = {
            "out": place, "resume": True, "callbacks": [_Report(trial)], "progress": self.progress,
        }  # fmt: skip
        if self.folds is None:
            score = Trainer(cfg, model=self.model).fit(self.data, checked=True, **common).score
        else:
            self.folds.save(place / FOLDS)
            score = cross_validate(self.data, cfg, self.folds, model=self.model, **common).score
        if not math.isfinite(score):
            raise DataError(f"{cfg.metric} is not defined on the images held out, got {score}")
        return score


class _Report(Callback):
    """Tells Optuna after each epoch how good the trial is so far: mean of the finished folds and of the best epoch of this one."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.done: list[float] = []

    def on_epoch(self, session: Any, line: dict[str, Any]) -> None:
        if session.best is None:
            return  # the metric has not been a number yet
        best = float(session.best[runs.column(session.cfg.metric)])
        self.trial.report(float(np.mean([*self.done, best])), len(self.done) * STRIDE + line["epoch"])
        if self.trial.should_prune():
            import optuna

            raise optuna.TrialPruned  # the checkpoint of this epoch is written, and the trainer closes what it opened

    def on_end(self, session: Any, run: runs.Run) -> None:
        self.done.append(run.score)


# -- several processes -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that no other process has at the same time, and that is free again when this one is gone, however it went."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _free(path: Path) -> bool:
    """Whether nobody holds the lock."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _repeat_killed(search: Search) -> None:
    """Put the trials of processes that are gone in line again, each once: what kills two processes is not worth a third.

    Only while the lock of the search is held: otherwise a trial could end between the look at its state and at its lock.
    """
    from optuna.trial import TrialState

    for trial in search.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _free(search.lock_of(trial.number)):
            search.study.tell(trial.number, state=TrialState.FAIL)
            if trial.params and REPEATS not in trial.user_attrs:
                search.study.enqueue_trial(trial.params, user_attrs={REPEATS: trial.number})
            search.lock_of(trial.number).unlink(missing_ok=True)


def _share_out(search: Search, total: int, workers: int, end: float, tell: Tell) -> None:
    """Start processes that resume the search, and wait for them; DataError if one ended badly and trials are missing."""
    told = {trial.number for trial in search.trials}
    command = [sys.executable, "-m", "fastload", "tune", "--resume", "-o", str(search.folder)]
    command += ["--trials", str(total)]
    if end < math.inf:
        command += ["--timeout", str((end - time.monotonic()) / 60)]
    logs = [search.folder / f"worker-{number}.log" for number in range(workers)]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number, path in enumerate(logs):
            env = {**os.environ, **_own_device(number, workers, search.config)}
            with open(path, "ab") as log:
                started.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
                )
        running = True
        while running:
            time.sleep(0.2)
            running = any(process.poll() is None for process in started)
            for trial in search.trials:
                if trial.number not in told:
                    told.add(trial.number)
                    tell(trial)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
    bad = [path for path, process in zip(logs, started) if process.returncode]
    missing = total - len(search.trials)
    if bad and missing > 0:
        last = bad[0].read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise DataError(
            f"{len(bad)} of {workers} workers ended with an error and {missing} trials are missing; --resume goes on. The end of "
            f"{bad[0]}: {' '.join(last) or 'nothing was written'}"
        )


def _own_device(number: int, workers: int, cfg: Config) -> dict[str, str]:
    """Environment in which each worker has its own GPU where there are several, and its share of the processor."""
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    count = torch.cuda.device_count()
    if count > 1 and cfg.device in (None, "cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % count]
    return env
