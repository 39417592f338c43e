"""`Monitor` as a callback of PyTorch Lightning, and of the Trainer of Hugging Face's transformers.

A callback times how long each training step waits for its data, as the host sees it, warns once where that starves the
training, and says at its end whether the loader keeps up. Validation, checkpoints and logging between two steps count
neither as wait nor as step. Of several processes the main one speaks: it warns of its own loader, and at the end it
names the process that waited longest.

Importing this imports neither package.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from dali_saliencymix.measure.monitor import Monitor, write_line
from dali_saliencymix.packages import is_installed, require

__all__ = ["lightning_callback", "transformers_callback"]

_PREFIX = "data/"  # of the names in a trainer's log
_LIGHTNING = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
_FETCH = "train_dataloader_next"  # what Lightning tells its profiler when it asks for a training batch


def lightning_callback(**options: Any) -> Any:
    """Return a callback for the ``Trainer`` of PyTorch Lightning, from ``lightning`` or ``pytorch_lightning``.

    It logs ``data/wait_share`` and, with `batch_size`, ``data/images_per_second`` of the last steps through the
    LightningModule. A step is one batch, also where gradients are accumulated. What callbacks before it in the list do
    at the end of a step counts as a part of the step.

    Parameters
    ----------
    **options
        Arguments of `dali_saliencymix.bottleneck.Monitor`: `batch_size`, `window`, `warn_share`, `patience`, `say`,
        which is given the line of `Monitor.verdict` at the end as well, and `clock`.

    Returns
    -------
    Callback
        Of the package that is imported already, of both where both are. Its attribute `monitor` is the `Monitor` of
        the last training, None before the first.

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
    Monitor(**options)  # a wrong option is an error here, not when a training begins
    found = [name for package, name in _LIGHTNING.items() if name in sys.modules]
    found = found or [name for package, name in _LIGHTNING.items() if is_installed(package)][:1]
    if not found:
        require("lightning", by="lightning_callback")
    return _class_of(_LightningHooks, *(f"{name}.Callback" for name in found))(options)


def transformers_callback(**options: Any) -> Any:
    """Return a callback for the ``Trainer`` of transformers.

    It adds ``data/wait_share`` and ``data/images_per_second`` of the last steps to the Trainer's logs of its loss: they
    are in ``trainer_state.json`` and on the console, but not in TensorBoard or Weights & Biases, which are given the
    logs before any callback of the user. A step is an update: the Trainer asks for all batches that it accumulates
    before it uses the first. Let it be the last of the callbacks: what others behind it do at the end of a step counts
    as wait.

    Parameters
    ----------
    **options
        Arguments of `dali_saliencymix.bottleneck.Monitor`: `batch_size`, by default the images of an update in all
        processes, `window`, `warn_share`, `patience`, `say`, which is given the line of `Monitor.verdict` at the end as
        well, and `clock`.

    Returns
    -------
    TrainerCallback
        Its attribute `monitor` is the `Monitor` of the last training, None before the first.

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
    return _class_of(_TransformersHooks, "transformers.TrainerCallback")(options)


@functools.cache
def _class_of(hooks: type[_Hooks], *bases: str) -> Any:
    """Return a class with these hooks that is a callback of other packages, which are imported."""
    found = (name.rpartition(".") for name in bases)
    classes = [getattr(importlib.import_module(module), name) for module, _, name in found]
    return type("DataWaitMonitor", (hooks, *classes), {"__module__": __name__})


class _Hooks:
    """What the callbacks have in common."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self.monitor: Monitor | None = None

    def _begin(self, *, is_main: bool, **defaults: Any) -> None:
        quiet = {} if is_main else {"say": lambda line: None}
        self.monitor = Monitor(**{**defaults, **self._options, **quiet})

    def _end(self, rank: int, *, together: bool) -> None:
        """Say how the loaders did; `together` if all processes call this."""
        assert self.monitor is not None
        line, distributed = self.monitor.verdict(), getattr(sys.modules.get("torch"), "distributed", None)
        if together and distributed is not None and distributed.is_available() and distributed.is_initialized():
            found: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(found, (self.monitor.share_of_all, line))
            number = max(range(len(found)), key=lambda each: found[each][0])
            line = f"process {number} of {len(found)}: {found[number][1]}" if len(found) > 1 else line
        if rank == 0:
            (self._options.get("say") or write_line)(line)

    def _figures(self) -> dict[str, float]:
        """Return what goes to a log, by name; nothing before the second step."""
        assert self.monitor is not None
        figures = {"wait_share": self.monitor.data_wait_share, "images_per_second": self.monitor.images_per_second}
        return {_PREFIX + name: value for name, value in figures.items() if value is not None}


class _LightningHooks(_Hooks):
    """For Lightning: its profiler is told when a batch is asked for and has come, which no hook is."""

    _profiler: Any = None  # while it is listened to

    def __reduce__(self) -> Any:
        """Make a new one in another process: the class has no name that could be imported."""
        return functools.partial(lightning_callback, **self._options), ()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._begin(is_main=trainer.is_global_zero)
            self._listen(trainer.profiler)

    def _listen(self, profiler: Any) -> None:
        assert self.monitor is not None
        start, stop, monitor = profiler.start, profiler.stop, self.monitor

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
            for name in ("start", "stop"):  # those of its class are back; another monitor may have seen to it
                vars(self._profiler).pop(name, None)
            self._profiler = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        assert self.monitor is not None
        self.monitor.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.monitor is not None
        self.monitor.ended()
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0:  # elsewhere it would be lost, at most of a millisecond
            pl_module.log_dict(self._figures(), on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end(trainer.global_rank, together=True)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._listen_no_more()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._listen_no_more()


class _TransformersHooks(_Hooks):
    """For transformers: a batch is asked for after the last hook behind a step, whichever that is."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        images = (state.train_batch_size or args.train_batch_size) * args.gradient_accumulation_steps * args.world_size
        self._begin(is_main=state.is_world_process_zero, batch_size=images)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        assert self.monitor is not None
        self.monitor.start()
        self.monitor.ask()

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        assert self.monitor is not None
        self.monitor.arrived()

    def _ask(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.monitor is not None:  # it is None where evaluate is called before train
            self.monitor.ask()

    on_step_end = on_evaluate = on_prediction_step = on_save = _ask

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        if self.monitor is None:
            return
        if logs and "loss" in logs:  # of the training, not of an evaluation or the end
            figures = self._figures()
            logs.update(figures)
            state.log_history[-1].update(figures)  # a copy of them
        self.monitor.ask()

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        # A trial of a search that is given up ends in one process alone.
        self._end(args.process_index, together=not state.is_hyper_param_search)
