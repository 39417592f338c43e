"""Whether the loader or the training step is the bottleneck, measured from outside.

``python -m dali_saliencymix bottleneck`` is the command. From Python::

    from dali_saliencymix import bottleneck

    report = bottleneck.diagnose(loader, step)
    print(bottleneck.report_text(report))

`loader` is any iterable of batches that can be iterated over again and again, or a function that makes a DALI
pipeline; `step` is called with each batch. `Monitor` watches a training while it runs.

Importing this needs NumPy alone; DALI and PyTorch are imported for what needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dali_saliencymix.bottleneck.diagnose import measure_source
from dali_saliencymix.bottleneck.display import comparison_text, report_text
from dali_saliencymix.bottleneck.report import compare, load_report, save_report
from dali_saliencymix.bottleneck.sources import loader_source, pipeline_source
from dali_saliencymix.bottleneck.verdict import Figures, RankFigures, Stage, Verdict, decide
from dali_saliencymix.measure.monitor import Monitor
from dali_saliencymix.measure.windows import MeasurementError as BottleneckError

__all__ = [
    "BottleneckError",
    "Figures",
    "Monitor",
    "RankFigures",
    "Stage",
    "Verdict",
    "compare",
    "comparison_text",
    "decide",
    "diagnose",
    "load_report",
    "report_text",
    "save_report",
]


def diagnose(
    loader: Iterable[Any] | Callable[..., Any],
    step: Callable[[Any], Any] | None = None,
    *,
    batch_size: int | None = None,
    num_threads: int | None = None,
    files: Sequence[str] | None = None,
    device: str = "cpu",
    seconds: float = 100.0,
    rounds: int = 9,
    cache: str = "auto",
    storage: bool = True,
    what_ifs: bool = True,
    tune: bool = False,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a loader and a training step, and say what holds the training back.

    Parameters
    ----------
    loader : iterable or callable
        Batches, epoch after epoch: a DataLoader, a DALI iterator that resets itself. Or a function that makes a new
        DALI pipeline each time, such as one decorated with ``pipeline_def`` and bound to its arguments by
        ``functools.partial``; it is cut into stages.
    step : callable, optional
        ``step(batch)`` trains on a batch. Without it the loader is measured alone, and the verdict is LOADER-ALONE.
    batch_size, num_threads : int, optional
        For a pipeline's function; for an iterable `batch_size` is the number of images in a full batch, where it
        cannot be seen.
    files : sequence of str, optional
        The files that the loader reads, for the measurement of storage; a pipeline's readers are asked.
    device : {"cpu", "cuda"}
        Where the step runs.
    seconds : float
        For everything, about.
    rounds : int
        Windows of each figure, at least 5.
    cache : {"auto", "warm", "cold"}
        Whether the training will find its files in memory; ``"auto"`` compares their size with the memory.
    storage, what_ifs : bool
        Whether to measure these.
    tune : bool
        Whether to search for a faster setting of a pipeline's function, with arguments of it that are called
        ``num_threads``, ``prefetch_queue_depth`` and ``hw_decoder_load``, in the place of the measured what-ifs. The
        result is ``report["tune"]``: ``best`` are the arguments, ``trials`` the figures.
    notify : callable
        Is given lines that say what is being measured.

    Returns
    -------
    dict
        The report: JSON as it stands. ``report["verdict"]["name"]`` is one of `verdict.VERDICTS`.

    Raises
    ------
    BottleneckError
        If the loader or the step fail, or with `tune` the loader has no setting to search, with the reason in one line.

    Examples
    --------
    >>> import time
    >>> import numpy as np
    >>> batches = [np.zeros((8, 3, 32, 32))] * 50
    >>> report = diagnose(batches, lambda batch: time.sleep(0.01), seconds=1, rounds=5, storage=False)
    >>> report["rates"]["storage"]["not_measured"]
    'was not asked for'
    """
    listed = list(files) if files is not None else None
    if callable(loader) and not isinstance(loader, type) and not hasattr(loader, "__iter__"):
        source = pipeline_source(loader, {"batch_size": batch_size, "num_threads": num_threads}, files=listed)
    else:
        source = loader_source(loader, batch_size=batch_size, files=listed)
    return measure_source(
        source,
        step,
        device=device,
        seconds=seconds,
        rounds=rounds,
        cache=cache,
        with_storage=storage,
        with_what_ifs=what_ifs,
        with_tuning=tune,
        notify=notify,
    )
