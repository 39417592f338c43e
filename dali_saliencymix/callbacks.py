"""Callbacks with a `Monitor` for PyTorch Lightning and for the Trainer of Hugging Face transformers.

A callback measures on the host how long each training step waits for its data. It warns once if the loader is too slow,
and prints at the end of the training whether the loader kept up. Validation, checkpoints and logging between two steps
count neither as wait nor as step. With several processes, only the main process prints: warnings are about its own
loader, and the line at the end names the process that waited longest.

Importing this module imports neither package.
"""

from __future__ import annotations

import functools
import pkgutil
import sys
from typing import Any

from dali_saliencymix.measure.monitor import Monitor, write_line
from dali_saliencymix.packages import is_installed, require

__all__ = ["lightning_callback", "transformers_callback"]

_PREFIX = "data/"  # of the names in a trainer's logs
_LIGHTNING = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
_FETCH = "train_dataloader_next"  # Lightning's profiler action for fetching a training batch


def lightning_callback(**options: Any) -> Any:
    """Return a callback for the ``Trainer`` of PyTorch Lightning, from ``lightning`` or ``pytorch_lightning``.

    The callback logs ``data/wait_share`` and, with `batch_size`, ``data/images_per_second`` of the last steps through
    the LightningModule. A step is one batch, also with gradient accumulation. The time that callbacks before it in the
    list take at the end of a step counts as part of the step.

    Parameters
    ----------
    **options
        Arguments of `dali_saliencymix.bottleneck.Monitor`: `batch_size`, `window`, `warn_share`, `patience`, `say` and
        `clock`. `say` also receives the line of `Monitor.verdict` at the end.

    Returns
    -------
    Callback
        A callback for the package that is already imported, or for both if both are; if neither is, for an installed
        one. Its attribute `monitor` is the `Monitor` of the last training, None before the first.

    Raises
    ------
    ValueError
        If an option is out of range.
    ModuleNotFoundError
        If neither package is installed.

    Examples
    --------
    >>> import lightning  # doctest: +SKIP
    >>> trainer = lightning.Trainer(callbacks=[lightning_callback(batch_size=256)])  # doctest: +SKIP
    """
    Monitor(**options)  # raises for wrong options now, not at the start of a training
    found = [name for package, name in _LIGHTNING.items() if name in sys.modules]
    found = found or [name for package, name in _LIGHTNING.items() if is_installed(package)][:1]
    if not found:
        require("lightning", by="lightning_callback")
    return _class_of(_LightningHooks, *(f"{name}:Callback" for name in found))(options)


def transformers_callback(**options: Any) -> Any:
    """Return a callback for the ``Trainer`` of transformers.

    The callback adds ``data/wait_share`` and ``data/images_per_second`` of the last steps to the Trainer's logs of the
    loss. They appear in ``trainer_state.json`` and on the console, but not in TensorBoard or Weights & Biases, which
    receive the logs before any callback of the user. A step is one weight update, because the Trainer fetches all
    batches that it accumulates before it uses the first. Put this callback last in the list: the time that callbacks
    after it take at the end of a step counts as wait.

    Parameters
    ----------
    **options
        Arguments of `dali_saliencymix.bottleneck.Monitor`: `batch_size` (by default, the images of an update in all
        processes), `window`, `warn_share`, `patience`, `say` and `clock`. `say` also receives the line of
        `Monitor.verdict` at the end.

    Returns
    -------
    TrainerCallback
        The callback. Its attribute `monitor` is the `Monitor` of the last training, None before the first.

    Raises
    ------
    ValueError
        If an option is out of range.
    ModuleNotFoundError
        If transformers is not installed.

    Examples
    --------
    >>> import transformers  # doctest: +SKIP
    >>> trainer = transformers.Trainer(..., callbacks=[transformers_callback()])  # doctest: +SKIP
    """
    Monitor(**options)
    require("transformers", by="transformers_callback")
    return _class_of(_TransformersHooks, "transformers:TrainerCallback")(options)


@functools.cache
def _class_of(hooks: type[_Hooks], *bases: str) -> Any:
    """Return a class with these hooks and these base classes, ``"module:name"``, whose packages are imported."""
    return type("DataWaitMonitor", (hooks, *map(pkgutil.resolve_name, bases)), {"__module__": __name__})


class _Hooks:
    """Base class of the callbacks."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self.monitor: Monitor | None = None

    def _begin(self, *, is_main: bool, **defaults: Any) -> None:
        quiet = {} if is_main else {"say": lambda line: None}
        self.monitor = Monitor(**{**defaults, **self._options, **quiet})

    @property
    def _running(self) -> Monitor:
        assert self.monitor is not None
        return self.monitor

    def _end(self, rank: int, *, together: bool) -> None:
        """Print the verdict on the loaders; `together` if all processes call this."""
        monitor = self._running
        line, distributed = monitor.verdict(), getattr(sys.modules.get("torch"), "distributed", None)
        if together and distributed is not None and distributed.is_available() and distributed.is_initialized():
            found: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(found, (monitor.share_of_all, line))
            number = max(range(len(found)), key=lambda each: found[each][0])
            line = f"process {number} of {len(found)}: {found[number][1]}" if len(found) > 1 else line
        if rank == 0:
            (self._options.get("say") or write_line)(line)

    def _figures(self) -> dict[str, float]:
        """Return the figures to log, by name; empty before the second step."""
        monitor = self._running
        figures = {"wait_share": monitor.data_wait_share, "images_per_second": monitor.images_per_second}
        return {_PREFIX + name: value for name, value in figures.items() if value is not None}


class _LightningHooks(_Hooks):
    """Hooks for Lightning. No hook is called around the fetching of a batch, but the profiler is."""

    _profiler: Any = None  # whose methods are wrapped

    def __reduce__(self) -> Any:
        """Create a new callback when unpickled: the class cannot be imported by name."""
        return functools.partial(lightning_callback, **self._options), ()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._begin(is_main=trainer.is_global_zero)
            self._listen(trainer.profiler)

    def _listen(self, profiler: Any) -> None:
        start, stop, monitor = profiler.start, profiler.stop, self._running

        def started(action: str) -> None:
            start(action)
            if action.endswith(_FETCH):
                monitor.ask()

        def stopped(action: str) -> None:
            if action.endswith(_FETCH):
                monitor.arrived()
            stop(action)

        self._profiler, profiler.start, profiler.stop = profiler, started, stopped

    def _listen_no_more(self) -> None:
        if self._profiler is not None:
            for name in ("start", "stop"):  # restores the methods of its class; another monitor may have done so
                vars(self._profiler).pop(name, None)
            self._profiler = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._running.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._running.ended()
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0:  # Lightning discards what is logged at other steps
            pl_module.log_dict(self._figures(), on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end(trainer.global_rank, together=True)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._listen_no_more()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._listen_no_more()


class _TransformersHooks(_Hooks):
    """Hooks for transformers. The batch is fetched after the last hook that follows a step, whichever that is."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        images = (state.train_batch_size or args.train_batch_size) * args.gradient_accumulation_steps * args.world_size
        self._begin(is_main=state.is_world_process_zero, batch_size=images)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._running.start()
        self._running.ask()

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._running.arrived()

    def _ask(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.monitor is not None:  # None if evaluate is called before train
            self.monitor.ask()

    on_step_end = on_evaluate = on_prediction_step = on_save = _ask

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        if self.monitor is None:
            return
        if logs and "loss" in logs:  # logs of the training, not of an evaluation or of the end
            figures = self._figures()
            logs.update(figures)
            state.log_history[-1].update(figures)  # holds a copy of the logs
        self.monitor.ask()

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        # In a hyperparameter search, an abandoned trial ends in one process alone.
        self._end(args.process_index, together=not state.is_hyper_param_search)
