"""Where the figures of a run go beside its log: a table, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dali_saliencymix._json import finite

LOG, TABLE, TENSORBOARD, WANDB_ID = "log.jsonl", "summary.csv", "tensorboard", "wandb_run_id.txt"

# The columns of the table, each a figure of `RunRecord.write_epoch`.
COLUMNS = (
    "epoch",
    *(f"train_{name}" for name in ("loss", "mixed_top1", "images", "seconds", "images_per_second")),
    *("train_data_wait_share", "train_lr"),
    *(f"val_{name}" for name in ("loss", "top1", "top5", "images", "seconds")),
    *(f"val_ema_{name}" for name in ("loss", "top1", "top5")),
    *("gpu_peak_mib", "time"),
)


def replace_file(path: Path, text: str) -> None:
    """Write a file so that it is there with its old or its new content, whatever happens."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class SummaryTable:
    """A CSV file with one row for each whole epoch, in the columns of `COLUMNS`.

    Parameters
    ----------
    path : path
        The file. It is replaced as a whole for each row.
    epoch : int
        Epochs done so far: the rows of these are kept, later ones belong to epochs that are done again.
    """

    def __init__(self, path: Path, *, epoch: int = 0) -> None:
        self._path = path
        self.rows: list[dict[str, str]] = []
        if epoch and path.exists():
            with open(path, newline="", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
            self.rows = [row for row in rows if (row.get("epoch") or "").isdigit() and int(row["epoch"]) <= epoch]
        self._write()

    def write(self, figures: Mapping[str, Any]) -> None:
        """Add a row, in the place of one that may be there for its epoch."""
        row = {name: "" if (value := finite(figures.get(name))) is None else str(value) for name in COLUMNS}
        self.rows = [*(old for old in self.rows if old["epoch"] != row["epoch"]), row]
        self._write()

    def _write(self) -> None:
        lines = [",".join(COLUMNS), *(",".join(row.get(name) or "" for name in COLUMNS) for row in self.rows)]
        replace_file(self._path, "\n".join(lines) + "\n")

    def figures(self) -> list[dict[str, float]]:
        """Return the rows with numbers in the place of texts, without what is empty."""
        return [{name: json.loads(text) for name, text in row.items() if name in COLUMNS and text} for row in self.rows]


class TensorBoard:
    """Scalars in the format of TensorBoard, below a folder ``tensorboard``.

    Parameters
    ----------
    folder : path
        Output folder of the run.
    step : int
        Steps done so far. What is there of later ones, of a run that this one takes up, is not shown any more.

    Raises
    ------
    ImportError
        If TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            msg = "--tensorboard needs TensorBoard: pip install 'dali-saliencymix[tensorboard]'"
            raise ImportError(msg) from error
        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=step and step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of a step."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a training that is resumed continues.

    Parameters
    ----------
    folder : path
        Output folder of the run; a file in it keeps the identity of the run of Weights & Biases.
    project : str
        Name of the project there.
    config : mapping
        The options of the run.
    anew : bool
        Whether to begin another run there, even if the folder knows one.

    Raises
    ------
    ImportError
        If the package is not installed.
    ValueError
        If Weights & Biases refuses to begin a run, such as without a login.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any], *, anew: bool) -> None:
        try:
            import wandb
        except ImportError as error:
            msg = "--log-wandb needs Weights & Biases: pip install 'dali-saliencymix[wandb]'"
            raise ImportError(msg) from error
        kept = folder / WANDB_ID
        identity = kept.read_text().strip() if kept.exists() and not anew else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=project, id=identity, resume="allow", dir=str(folder), config=dict(finite(config))
            )
        except wandb.errors.Error as error:
            msg = f"--log-wandb: Weights & Biases cannot begin a run: {' '.join(str(error).split())}"
            raise ValueError(msg) from error
        kept.write_text(identity + "\n")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of a step."""
        self._run.log(dict(scalars), step=step)

    def close(self, *, failed: bool) -> None:
        """End the run there."""
        self._run.finish(exit_code=int(failed))
