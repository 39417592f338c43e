"""What a run leaves behind beside its checkpoints: log, table, optional loggers, and a report at its end."""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dali_saliencymix._json import finite
from dali_saliencymix.training import logs
from dali_saliencymix.training.data_wait import STARVING_SHARE
from dali_saliencymix.training.logs import JsonLines
from dali_saliencymix.training.preemption import Preempted
from dali_saliencymix.training.writers import (
    COLUMNS,
    LOG,
    TABLE,
    SummaryTable,
    TensorBoard,
    WeightsAndBiases,
    replace_file,
)

REPORT = "report.json"
SCHEMA, VERSION = "dali-saliencymix/training", 1


class RunRecord:
    """Writes down what a run does; used in a ``with`` statement, whose end writes ``report.json``.

    A file that cannot be written during the run does not end it: stderr says so each time, and the report counts the
    records that are lost.

    Parameters
    ----------
    folder : path or None
        Output folder of the run, which is there. With None nothing is written, as in all processes but the main one.
    facts : mapping
        What log and report say of the run from its beginning: ``config`` and those of `banner.run_facts`.
    epoch, step : int
        Epochs and, counted over all of them, steps done so far, by the checkpoint that is resumed.
    resumed : bool
        Whether this goes on with a run of this folder.
    tensorboard : bool
        Whether to write for TensorBoard.
    wandb_project : str, optional
        Project of Weights & Biases to write to.

    Raises
    ------
    ImportError
        If a package for one of the two is missing.
    OSError
        If the folder cannot be written to.
    ValueError
        If Weights & Biases refuses to begin a run.
    """

    def __init__(
        self,
        folder: Path | None,
        facts: Mapping[str, Any],
        *,
        epoch: int = 0,
        step: int = 0,
        resumed: bool = False,
        tensorboard: bool = False,
        wandb_project: str | None = None,
    ) -> None:
        self._folder = folder
        self._facts = facts
        self._begun, self._epochs_before = time.monotonic(), epoch
        self._seconds: dict[str, float] = dict.fromkeys(("training", "waiting", "validation"), 0.0)  # of this run
        self._images = 0.0
        self._last: dict[str, Any] | None = None
        self.lost: Counter[str] = Counter()
        self.status = "done"  # a run that ends before its last epoch has to set this to "stopped"
        if folder is None:
            return
        self._log = JsonLines(folder / LOG, anew=not resumed)
        self._table = SummaryTable(folder / TABLE, epoch=epoch)
        self._loggers: dict[str, TensorBoard | WeightsAndBiases] = {}
        if tensorboard:
            self._loggers["tensorboard"] = TensorBoard(folder, step=step)
        if wandb_project is not None:
            config = facts.get("config", {})
            self._loggers["wandb"] = WeightsAndBiases(folder, wandb_project, config, anew=not resumed)
        beginning = {**facts, **facts.get("environment", {})}  # what is looked up most stands at the top
        beginning.pop("environment", None)
        self.write_event("resume" if resumed else "start", epoch=epoch, total_steps=step, **beginning)

    def write_event(self, event: str, **values: Any) -> None:
        """Add a line to the log."""
        if self._folder is not None:
            self._try(LOG, lambda: self._log.write(event, **values))

    def write_step(self, total_steps: int, **figures: float) -> None:
        """Hand figures of the training at a step, counted over all epochs, to TensorBoard and Weights & Biases."""
        if self._folder is not None:
            self._to_loggers(total_steps, {f"train/step_{name}": value for name, value in figures.items()})

    def write_epoch(
        self,
        epoch: int,
        step: int,
        total_steps: int,
        *,
        train: Mapping[str, float],
        val: Mapping[str, float] | None = None,
        val_ema: Mapping[str, float] | None = None,
        **values: Any,
    ) -> None:
        """Write the figures of an epoch everywhere.

        Parameters
        ----------
        epoch : int
            Whole epochs done.
        step : int
            Steps done of the next one: 0, unless the run ends within it. Then it gets no row in the table.
        total_steps : int
            Steps done, counted over all epochs.
        train, val, val_ema : mapping from str to float
            Figures of the training, of the validation of the model, and of that of its moving average.
        **values
            Further figures: for the log, and for the table where it has a column of that name.
        """
        groups = {"train": train, "val": val, "val_ema": val_ema}
        flat = {f"{group}_{name}": value for group, given in groups.items() for name, value in (given or {}).items()}
        row = {"epoch": epoch, "time": round(time.time(), 3), **flat, **values}
        self._last = {name: row[name] for name in COLUMNS if name in row} | {"step": step}
        self._seconds["training"] += train["seconds"]
        self._seconds["waiting"] += train["seconds"] * train["data_wait_share"]
        self._seconds["validation"] += values.get("val_seconds", 0.0)
        self._images += train["seconds"] * train["images_per_second"]
        if self._folder is None:
            return
        self.write_event("epoch", epoch=epoch, step=step, total_steps=total_steps, **groups, **values)
        if not step:
            self._try(TABLE, lambda: self._table.write(row))
        scalars = {f"{group}/{name}": value for group, given in groups.items() for name, value in (given or {}).items()}
        self._to_loggers(total_steps, {"epoch": epoch, **scalars})

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is None:
            return
        words = None
        if isinstance(error, KeyboardInterrupt):
            self.status = "interrupted"
        elif isinstance(error, Preempted):
            self.status = "preempted"
        elif error is not None:
            self.status, words = "failed", " ".join(str(error).split()) or type(error).__name__
        for name, logger in self._loggers.items():
            self._try(name, functools.partial(logger.close, failed=words is not None))
        path = self._folder / REPORT
        self._try(REPORT, lambda: replace_file(path, json.dumps(self.report(words), indent=1, allow_nan=False) + "\n"))

    def report(self, error: str | None = None) -> dict[str, Any]:
        """Return what ``report.json`` holds; docs/outputs.md explains every entry."""
        rows = self._table.figures()
        done = self._last["epoch"] if self._last else self._epochs_before
        seconds, training = self._seconds, self._seconds["training"]
        share = seconds["waiting"] / training if training else None
        of_rows = sum(row.get(name, 0.0) for row in rows for name in ("train_seconds", "val_seconds"))
        return finite(
            {
                "schema": SCHEMA,
                "version": VERSION,
                "status": self.status,
                "error": error,
                **self._facts,
                "epochs_done": done,
                "epochs_done_by_this_run": done - self._epochs_before,
                "best": max((row for row in rows if "val_top1" in row), key=_judged, default=None),
                "last": self._last,
                "seconds": {
                    "this_run": round(time.monotonic() - self._begun, 3),
                    "training": round(training, 3),
                    "validation": round(seconds["validation"], 3),
                    "all_epochs": round(of_rows, 3),
                },
                "images_per_second": self._images / training if training else None,
                "data_wait_share": share,
                "bottleneck_hint": _hint(share),
                "lost_records": dict(self.lost),
            }
        )

    def _to_loggers(self, step: int, scalars: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in finite(scalars).items() if value is not None}
        for name, logger in list(self._loggers.items()):
            if not self._try(name, lambda logger=logger: logger.write(step, numbers)):  # type: ignore[misc]
                del self._loggers[name]
                logs.warn(f"warning: {name} gets nothing more from this run")

    def _try(self, name: str, write: Callable[[], object]) -> bool:
        """Write, and say so if that fails: a full disk or a lost connection is no reason to end a training."""
        try:
            write()
        except Exception as error:
            self.lost[name] += 1
            words = " ".join(str(error).split()) or type(error).__name__
            logs.warn(f"warning: {name}: cannot be written, the training goes on without it: {words}")
            return False
        return True


def _judged(row: Mapping[str, float]) -> float:
    """Return the top-1 that decides on the best checkpoint: that of the moving average where there is one."""
    return row.get("val_ema_top1", row["val_top1"])


def _hint(data_wait_share: float | None) -> str | None:
    if data_wait_share is None:
        return None
    if data_wait_share < STARVING_SHARE:
        return f"the training waited for its data for {data_wait_share:.0%} of its time: nothing to gain there"
    return (
        f"the training waited for its data for {data_wait_share:.0%} of its time, as the host sees it; "
        "python -m dali_saliencymix bottleneck says what to do about it"
    )
