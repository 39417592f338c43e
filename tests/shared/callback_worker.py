"""Train a few steps with `dali_saliencymix.callbacks`: ``callback_worker.py PACKAGE SCENARIOS``.

A simulated clock, which slow parts advance, makes the results exact. The last line of the output is the result as JSON.
"""

from __future__ import annotations

import importlib
import json
import pickle
import sys
import tempfile
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dali_saliencymix import callbacks

STEPS, EPOCHS, ACCUMULATED, IMAGES = 15, 2, 3, 4
VALIDATION, SAVE, LOG = 1e3, 1e4, 1e5  # seconds for a batch, a checkpoint, a line of the log


class Clock:
    """A clock that only `sleep` advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


clock = Clock()


class Images(Dataset):
    """Samples that take some time, given in seconds per batch."""

    def __init__(self, seconds: float, batches: int) -> None:
        self.seconds, self.batches = seconds, batches

    def __len__(self) -> int:
        return IMAGES * self.batches

    def __getitem__(self, index: int) -> dict:
        clock.sleep(self.seconds / IMAGES)
        return {"x": torch.ones(3), "labels": torch.ones(1)}


def run_lightning(package: str, seconds: dict[str, float], options: dict) -> dict:
    pl = importlib.import_module(package)
    loggers = importlib.import_module(f"{package}.loggers")
    logged = []

    class Log(loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            clock.sleep(LOG)
            logged.append(metrics)

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def training_step(self, batch, index):
            clock.sleep(seconds["step"])
            return (self.layer(batch["x"]) - batch["labels"]).square().mean()

        def validation_step(self, batch, index):
            pass

        def on_save_checkpoint(self, checkpoint):
            clock.sleep(SAVE)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    monitor = callbacks.lightning_callback(**options)
    copied = pickle.loads(pickle.dumps(callbacks.lightning_callback(say=str)))  # as a spawned process gets it
    assert isinstance(copied, type(monitor))
    with tempfile.TemporaryDirectory() as folder:
        saves = importlib.import_module(f"{package}.callbacks").ModelCheckpoint(folder, every_n_train_steps=2)
        trainer = pl.Trainer(
            accelerator="cpu",
            callbacks=[copied, monitor, saves],  # two monitors must not affect each other
            logger=Log(folder),
            max_epochs=EPOCHS,
            accumulate_grad_batches=ACCUMULATED,
            val_check_interval=4,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(Images(seconds["loader"], STEPS), IMAGES)
        trainer.fit(Model(), loader, DataLoader(Images(VALIDATION, 2), IMAGES))
        left = {"start", "stop"} & vars(trainer.profiler).keys()
    assert copied.monitor.steps == monitor.monitor.steps
    return {"monitor": monitor.monitor, "logged": [each for each in logged if "data/wait_share" in each], "left": left}


def run_transformers(package: str, seconds: dict[str, float], options: dict) -> dict:
    import transformers

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x, labels):
            clock.sleep(seconds["step"] if self.training else 0.0)
            return {"loss": (self.layer(x) - labels).square().mean()}

    class Slow(transformers.TrainerCallback):
        def on_log(self, *args, **others):
            clock.sleep(LOG)

    class Trainer(transformers.Trainer):
        def _save_checkpoint(self, *args, **others):
            clock.sleep(SAVE)

    monitor = callbacks.transformers_callback(**options)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=IMAGES,
            per_device_eval_batch_size=IMAGES,
            num_train_epochs=EPOCHS,
            gradient_accumulation_steps=ACCUMULATED,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        data = {"train_dataset": Images(seconds["loader"], STEPS), "eval_dataset": Images(VALIDATION, 2)}
        trainer = Trainer(Model(), arguments, callbacks=[Slow(), monitor], **data)
        trainer.evaluate()  # before training there is nothing to measure
        trainer.train()
    logged = [each for each in trainer.state.log_history if "data/wait_share" in each]
    return {"monitor": monitor.monitor, "logged": logged, "left": ()}


def main() -> None:
    """Run the scenarios: pairs of seconds for the loader and for the step."""
    warnings.simplefilter("ignore")  # the trainers warn about such small runs
    package, scenarios = sys.argv[1], json.loads(sys.argv[2])
    packages = [package] * len(scenarios)
    if package == "lightning":  # by its two names in turn
        packages = ["lightning.pytorch", "pytorch_lightning"]
        for name in packages:
            importlib.import_module(name)
    results = []
    for package, seconds in zip(packages, scenarios, strict=True):
        said: list[str] = []
        options = {"clock": clock, "say": said.append, "patience": 10.0, "batch_size": seconds.pop("batch_size", None)}
        options = {name: value for name, value in options.items() if value is not None}
        run = run_transformers if package == "transformers" else run_lightning
        found = run(package, seconds, options)
        monitor = found["monitor"]
        results.append(
            {
                "said": said,
                "steps": monitor.steps,
                "share": monitor.data_wait_share,
                "step_ms": monitor.step_ms,
                "logged": found["logged"][-1:],
                "left": sorted(found["left"]),
            }
        )
    print(json.dumps(results))  # noqa: T201


if __name__ == "__main__":
    main()
