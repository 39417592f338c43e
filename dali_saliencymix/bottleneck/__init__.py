"""Measure whether the loader or the training step is the bottleneck, without changes in the training script.

``python -m dali_saliencymix bottleneck`` is the command. From Python::

    from dali_saliencymix import bottleneck

    report = bottleneck.diagnose(loader, step)
    print(bottleneck.report_text(report))

`loader` is an iterable of batches that can be iterated over repeatedly, or a function that returns a DALI pipeline.
`step` is called with each batch. `Monitor` measures the data wait of a running training.

Importing this package needs only NumPy; DALI and PyTorch are imported when they are needed.
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
    """Measure a loader and a training step, and return a report that names the bottleneck.

    Parameters
    ----------
    loader : iterable or callable
        An iterable of batches that can be iterated over once per epoch, such as a DataLoader or a DALI iterator that
        resets itself. Or a function that returns a new DALI pipeline at each call, such as one decorated with
        ``pipeline_def`` and bound to its arguments by ``functools.partial``; such a pipeline is split into stages.
    step : callable, optional
        ``step(batch)`` trains on a batch. Without it, only the loader is measured, and the verdict is LOADER-ALONE.
    batch_size, num_threads : int, optional
        Arguments for the pipeline function. For an iterable, `batch_size` is the number of images in a full batch; by
        default it is that of the first batch.
    files : sequence of str, optional
        The files that the loader reads, for measuring storage. By default, those of the pipeline's readers.
    device : {"cpu", "cuda"}
        Where the step runs.
    seconds : float
        Approximate duration of the whole measurement.
    rounds : int
        Number of windows for each figure, at least 5.
    cache : {"auto", "warm", "cold"}
        Whether the training will find its files in memory; ``"auto"`` compares their size with the memory.
    storage, what_ifs : bool
        Whether to measure storage, and the loader with other settings.
    tune : bool
        Whether to search for a faster setting of the pipeline function instead of measuring what-ifs. The search varies
        its arguments ``num_threads``, ``prefetch_queue_depth`` and ``hw_decoder_load``, as far as it has them. The
        result is ``report["tune"]``: ``best`` holds the arguments, ``trials`` the figures.
    notify : callable
        Called with a line of text about each part of the measurement.

    Returns
    -------
    dict
        The report, a dictionary that can be saved as JSON. ``report["verdict"]`` has the strings ``name``, ``why`` and
        ``next``. The other keys are listed under :ref:`bottleneck-report`.

    Raises
    ------
    BottleneckError
        If the loader or the step fails, or if `tune` is set and the loader has no setting to search. The message is one
        line with the reason.
    ValueError
        If an option is out of range.

    Examples
    --------
    >>> import time
    >>> import numpy as np
    >>> batches = [np.zeros((8, 3, 32, 32))] * 50
    >>> report = diagnose(batches, lambda batch: time.sleep(0.01), seconds=1, rounds=5, storage=False)
    >>> report["rates"]["storage"]["not_measured"]
    'not requested'
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
