"""The output of a run: messages, progress bar, log, table, optional loggers, and report."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from dali_saliencymix._errors import naming
from dali_saliencymix._json import finite
from dali_saliencymix._numba.stopwatch import compile_seconds
from dali_saliencymix.measure.monitor import STARVING_SHARE
from dali_saliencymix.measure.results import replace_file, write_json
from dali_saliencymix.packages import require
from dali_saliencymix.training.distributed import is_main_process
from dali_saliencymix.training.lockstep import Preempted

LOG, TABLE, TENSORBOARD, WANDB_ID, REPORT = (
    *("log.jsonl", "summary.csv", "tensorboard", "wandb_run_id.txt", "report.json"),
)
_QUIET_SECONDS = 10.0  # longest time between lines if there is no progress bar
_LONG_START_SECONDS = 5.0  # if the start takes longer, the run reports its parts

SCHEMA, VERSION = "dali-saliencymix/training", 1

# The columns of the table, which are figures of `RunLog.write_epoch`.
COLUMNS = (
    "epoch",
    *(f"train_{name}" for name in ("loss", "mixed_top1", "images", "seconds", "images_per_second")),
    *("train_data_wait_share", "train_lr"),
    *(f"val_{name}" for name in ("loss", "top1", "top5", "images", "seconds")),
    *(f"val_ema_{name}" for name in ("loss", "top1", "top5")),
    *("gpu_peak_mib", "time"),
)


def say(line: str) -> None:
    """Write a line to stdout, above any progress bar, in the main process."""
    if is_main_process():
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def warn(line: str) -> None:
    """Write a line to stderr, above any progress bar, in the main process."""
    if is_main_process():
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """Format a time in seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class StartUp:
    """Measures the parts of the time before the first batch; `begun` is its start by ``time.monotonic()``."""

    def __init__(self, begun: float | None = None) -> None:
        self._begun = self._last = time.monotonic() if begun is None else begun
        self._parts: dict[str, float] = {}

    def end_of(self, part: str) -> None:
        """Assign the time since the last call, or since the start, to a part."""
        now = time.monotonic()
        self._parts[part], self._last = now - self._last, now

    def summary(self) -> str | None:
        """Return a line with the parts of at least one second, the longest first; None if the start was fast."""
        seconds = self._last - self._begun
        if seconds < _LONG_START_SECONDS:
            return None
        parts = sorted(self._parts.items(), key=lambda part: -part[1])
        line = ", ".join(f"{name} {spent:.0f} s" for name, spent in parts if spent >= 1)
        compiled = compile_seconds()
        of_this = f"; Numba's first compilation took {compiled:.0f} s of this" if compiled >= 1 else ""
        return f"first batch after {seconds:.0f} s: {line}{of_this}"


class Progress:
    """A progress bar over `total` steps on a terminal; otherwise lines, at each `show` and at regular intervals.

    Only the main process shows it.
    """

    def __init__(self, description: str, total: int, *, done: int = 0) -> None:
        enabled = is_main_process()
        self._description, self._total, self._step = description, total, done
        self._lines = enabled and not sys.stderr.isatty()
        self._shown_at = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=description,
            bar_format="{desc} {n_fmt}/{total_fmt}{postfix} |{bar}|",  # a narrow terminal cuts off the bar
            disable=not enabled or self._lines,
            leave=False,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()  # before the message of an error

    def advance(self) -> None:
        """Count one step; without a bar, write a line if the last one is `_QUIET_SECONDS` old."""
        self._step += 1
        self._bar.update()
        if self._lines and time.monotonic() - self._shown_at >= _QUIET_SECONDS:
            self.show()

    def show(self, **values: str) -> None:
        """Show figures next to the bar, or in a line."""
        if self._lines:
            shown = "".join(f"  {name} {value}" for name, value in values.items())
            sys.stderr.write(f"{self._description} [{self._step}/{self._total}]{shown}\n")
            self._shown_at = time.monotonic()
        else:
            self._bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def write_event(log: Path, event: str, **values: Any) -> None:
    """Append a JSON object as a line to a log, with null for NaN and infinity, which JSON does not have.

    An OSError names the log.
    """
    line = json.dumps({"event": event, "time": round(time.time(), 3), **finite(values)}, allow_nan=False) + "\n"
    with naming(log), open(log, "ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":  # a full disk or a killed process left half a line
                line = "\n" + line
        stream.write(line.encode())


def read_table(path: Path, epoch: int) -> list[dict[str, Any]]:
    """Return the rows of a table up to an epoch, as numbers without empty cells; later epochs will be repeated."""
    if not epoch or not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as stream:
        texts = [{name: row[name] for name in COLUMNS if row.get(name)} for row in csv.DictReader(stream)]
    try:
        rows = [{name: json.loads(text) for name, text in row.items()} for row in texts]
        return [row for row in rows if "epoch" in row and row["epoch"] <= epoch]
    except (TypeError, ValueError) as error:
        msg = f"{path}: not the table of a run: {error}"
        raise ValueError(msg) from error


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a CSV file with a row for each complete epoch, atomically. Cells of NaN and infinity are empty."""

    def cell(value: Any) -> str:
        return "" if finite(value) is None else str(value)

    lines = [COLUMNS, *([cell(row.get(name)) for name in COLUMNS] for row in rows)]
    replace_file(path, "".join(",".join(line) + "\n" for line in lines))


class _TensorBoard:
    """Scalars for TensorBoard. Scalars of the resumed run after `step` are purged."""

    def __init__(self, folder: Path, *, step: int) -> None:
        require("tensorboard", by="--tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=step and step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases. A file in the folder holds its ID, so that a resumed training continues it."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any], *, resumed: bool) -> None:
        require("wandb", by="--log-wandb")
        import wandb

        kept = folder / WANDB_ID
        identity = kept.read_text().strip() if resumed and kept.exists() else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=project, id=identity, resume="allow", dir=str(folder), config=dict(finite(config))
            )
        except wandb.errors.Error as error:
            msg = f"--log-wandb: Weights & Biases cannot begin a run: {' '.join(str(error).split())}"
            raise ValueError(msg) from error
        replace_file(kept, identity + "\n")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class RunLog:
    """Writes the log files of a run. It is a context manager, and writes ``report.json`` at the end.

    A file that cannot be written does not end the run: stderr shows a warning each time, and the report counts the lost
    records.

    Parameters
    ----------
    folder : path or None
        Output folder of the run. With None nothing is written; only the main process writes.
    facts : mapping
        Facts of the run for log and report: ``config``, and the result of `report.run_facts`.
    epoch, step : int
        Completed epochs, and steps over all epochs, according to the checkpoint to resume from.
    resumed : bool
        Whether this resumes a run of this folder.
    tensorboard : bool
        Whether to log to TensorBoard.
    wandb_project : str, optional
        Project of Weights & Biases to log to.
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
        self.status = "done"  # a run that ends before its last epoch must set this to "stopped"
        if folder is None:
            return
        if not resumed:
            (folder / LOG).write_text("")
        self._rows = read_table(folder / TABLE, epoch)
        write_table(folder / TABLE, self._rows)
        self._loggers: dict[str, _TensorBoard | _WeightsAndBiases] = {}
        if tensorboard:
            self._loggers["tensorboard"] = _TensorBoard(folder, step=step)
        if wandb_project is not None:
            self._loggers["wandb"] = _WeightsAndBiases(folder, wandb_project, facts.get("config", {}), resumed=resumed)
        beginning = {**facts, **facts.get("environment", {})}  # flattened, for easy access
        beginning.pop("environment", None)
        self.write_event("resume" if resumed else "start", epoch=epoch, total_steps=step, **beginning)

    def write_event(self, event: str, **values: Any) -> None:
        """Add a line to the log."""
        if self._folder is not None:
            with self._tolerant(LOG):
                write_event(self._folder / LOG, event, **values)

    def write_step(self, total_steps: int, **figures: float) -> None:
        """Log training figures of a step, counted over all epochs, to TensorBoard and Weights & Biases."""
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
        """Write the figures of an epoch to the log, the table and the loggers.

        Parameters
        ----------
        epoch, step, total_steps : int
            Completed epochs; completed steps of the next epoch; completed steps over all epochs. `step` is 0 unless the
            run ends within an epoch; the table then gets no row.
        train, val, val_ema : mapping from str to float
            Figures of the training, of the validation of the model, and of the validation with the EMA of the weights.
        **values
            Further figures for the log, and for the table if it has a column of that name.
        """
        groups = {"train": train, "val": val, "val_ema": val_ema}
        flat = {(group, name): value for group, given in groups.items() for name, value in (given or {}).items()}
        row = {"epoch": epoch, "time": round(time.time(), 3), **{"_".join(key): flat[key] for key in flat}, **values}
        self._last = {name: row[name] for name in COLUMNS if name in row} | {"step": step}
        self._seconds["training"] += train["seconds"]
        self._seconds["waiting"] += train["seconds"] * train["data_wait_share"]
        self._seconds["validation"] += values.get("val_seconds", 0.0)
        self._images += train["seconds"] * train["images_per_second"]
        if self._folder is None:
            return
        self.write_event("epoch", epoch=epoch, step=step, total_steps=total_steps, **groups, **values)
        if not step:
            self._rows.append(row)
            with self._tolerant(TABLE):
                write_table(self._folder / TABLE, self._rows)
        self._to_loggers(total_steps, {"epoch": epoch, **{"/".join(key): flat[key] for key in flat}})

    def __enter__(self) -> RunLog:
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
            self.status, words = "failed", _words_of(error)
        for name, logger in self._loggers.items():
            with self._tolerant(name):
                logger.close(failed=words is not None)
        with self._tolerant(REPORT):
            write_json(self._folder / REPORT, self.report(words))

    def report(self, error: str | None = None) -> dict[str, Any]:
        """Return the content of ``report.json``; docs/outputs.md documents its entries."""
        rows = [{name: row[name] for name in COLUMNS if finite(row.get(name)) is not None} for row in self._rows]
        done = self._last["epoch"] if self._last else self._epochs_before
        seconds, training = self._seconds, self._seconds["training"]
        share = seconds["waiting"] / training if training else None
        of_rows = sum(row.get(name, 0.0) for row in rows for name in ("train_seconds", "val_seconds"))
        return {
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

    def _to_loggers(self, step: int, scalars: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in finite(scalars).items() if value is not None}
        for name, logger in list(self._loggers.items()):
            with self._tolerant(name):
                logger.write(step, numbers)
            if self.lost[name]:
                del self._loggers[name]
                warn(f"warning: {name} is disabled for the rest of this run")

    @contextlib.contextmanager
    def _tolerant(self, name: str) -> Iterator[None]:
        """Turn an error of writing into a warning: a full disk or a lost connection should not end a training."""
        try:
            yield
        except Exception as error:
            self.lost[name] += 1
            warn(f"warning: {name}: cannot be written, training continues without it: {_words_of(error)}")


def _words_of(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _judged(row: Mapping[str, float]) -> float:
    """Return the top-1 that selects the best checkpoint: with the EMA of the weights if there is one."""
    return row.get("val_ema_top1", row["val_top1"])


def _hint(data_wait_share: float | None) -> str | None:
    if data_wait_share is None:
        return None
    waited = f"training waited for data for {data_wait_share:.0%} of its time"
    if data_wait_share < STARVING_SHARE:
        return f"{waited}: a faster loader would not help"
    return f"{waited}, measured on the host; python -m dali_saliencymix bottleneck finds the cause"
