"""Train and evaluate one run: a network, an arm and a seed."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks import program
from benchmarks.accuracy.arms import ARMS
from benchmarks.accuracy.data import augmented, draws_of_epoch, first_of_each_class
from benchmarks.accuracy.study import Settings
from dali_saliencymix import paste_normalised
from dali_saliencymix._array import array_namespace
from dali_saliencymix._tensors import to_array, to_tensor
from dali_saliencymix.datasets.cifar import MEAN, SIZE, STD, CifarImages
from dali_saliencymix.training.metrics import mixed_cross_entropy
from dali_saliencymix.training.models import make_model
from dali_saliencymix.training.robustness import gradient_signs, moved_along

NETWORKS = ("resnet9", "resnet18")
WIDTH = 64  # default of the ResNet-9
EPSILONS = {"2/255": 2 / 255, "8/255": 8 / 255}
BINS = 15  # number of bins of the expected calibration error
_EVALUATION_BATCH = 500
_IN_UNITS = {"mean": [mean / 255 for mean in MEAN], "std": [std / 255 for std in STD]}


class Trainer:
    """Train on one device, which also holds the data.

    Parameters
    ----------
    train, test : CifarImages
        The whole data set; `settings` selects the part that is used.
    settings : Settings
    device : torch.device
    """

    def __init__(self, train: CifarImages, test: CifarImages, settings: Settings, device: torch.device) -> None:
        self._settings, self._device = settings, device
        train = first_of_each_class(train, settings.images)
        self._classes = len(train.classes)
        self._images = torch.from_numpy(train.images).to(device)
        self._labels = torch.from_numpy(train.labels).to(device).long()
        pixels = torch.from_numpy(test.images[: settings.test_images]).to(device)
        scale = [torch.tensor(values, device=device) for values in (MEAN, STD)]
        self._test_images = ((pixels.float() - scale[0]) / scale[1]).permute(0, 3, 1, 2)  # channels last in memory
        self._test_labels = torch.from_numpy(test.labels[: settings.test_images]).to(device).long()
        self._algorithm = "kernel" if device.type == "cuda" else "auto"

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Train an arm with a seed; return accuracies and calibration error in percent, and the time in seconds."""
        settings, start = self._settings, time.monotonic()
        torch.manual_seed(seed)
        network = make_network(settings.network, settings.width, self._classes)
        network = network.to(self._device, memory_format=torch.channels_last)
        steps = settings.images // settings.batch_size
        optimiser = torch.optim.SGD(
            network.parameters(), settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser,
            settings.lr,
            total_steps=settings.epochs * steps + 1,
            pct_start=0.2,
            anneal_strategy="linear",
            cycle_momentum=False,
        )
        top1: dict[int, float] = {}
        trained = 0.0
        epochs = range(1, settings.epochs + 1)
        for epoch in program.progress(epochs, desc=f"{arm}, seed {seed}", unit="epoch", leave=False):
            began = time.monotonic()
            self._train_epoch(network, optimiser, schedule, self.batches(arm, seed, epoch))
            trained += time.monotonic() - began
            if epoch % settings.evaluate_every == 0 or epoch == settings.epochs:
                logits = self._logits(network)
                if not logits.isfinite().all():
                    msg = f"--lr must be one at which no run diverges, got {settings.lr:g} with {arm}, seed {seed}"
                    raise ValueError(msg)
                top1[epoch] = percent(logits.argmax(dim=1) == self._test_labels)
        best = max(top1, key=lambda epoch: top1[epoch])
        return {
            "top1_last": top1[settings.epochs],
            "top1_best": top1[best],
            "best_epoch": best,
            "ece": calibration_error(logits, self._test_labels),
            "fgsm_top1": self._attacked(network),
            "seconds": round(time.monotonic() - start, 2),
            "training_seconds": round(trained, 2),
        }

    def _train_epoch(
        self, network: nn.Module, optimiser: Any, schedule: Any, batches: Iterator[tuple[torch.Tensor, ...]]
    ) -> None:
        network.train()
        for images, labels, source_labels, lam in itertools.islice(batches, self._settings.max_steps):
            with self._autocast():
                logits = network(images)
            loss = mixed_cross_entropy(logits.float(), labels, source_labels, lam)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def batches(self, arm: str, seed: int, epoch: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the batches of an epoch: normalised images, labels, labels of the sources, and label weights.

        CuPy and PyTorch both compute on the default stream, so no synchronisation is needed.
        """
        settings = self._settings
        images = to_array(self._images)
        paste = functools.partial(paste_normalised, mean=MEAN, std=STD, layout="HWC", algorithm=self._algorithm)
        chances = {"prob": settings.prob, "augment": settings.augment, "xp": array_namespace(images)}
        for draws in draws_of_epoch(seed, epoch, len(images), settings.batch_size, **chances):
            given = augmented(images, draws), draws.source_index, draws.lam, draws.point
            mixed = ARMS[arm].mix(*given, algorithm=self._algorithm, paste=paste)
            arrays = mixed.images, mixed.lam, draws.index, draws.source_index
            pixels, lam, index, source = map(to_tensor, arrays)
            labels = self._labels[index]
            yield pixels.permute(0, 3, 1, 2), labels, labels[source], lam

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._settings.precision == "bf16")

    @torch.no_grad()
    def _logits(self, network: nn.Module) -> torch.Tensor:
        """Return the logits of all test images, float32."""
        network.eval()
        with self._autocast():
            return torch.cat([network(images) for images in self._test_images.split(_EVALUATION_BATCH)]).float()

    def _attacked(self, network: nn.Module) -> dict[str, float]:
        """Return the accuracy in percent under FGSM for each of `EPSILONS`, all with the same gradient."""
        network.eval()
        right: dict[str, list[torch.Tensor]] = {name: [] for name in EPSILONS}
        batches = (part.split(_EVALUATION_BATCH) for part in (self._test_images, self._test_labels))
        for images, labels in zip(*batches, strict=True):
            signs, _ = gradient_signs(network, images, labels)
            for name, epsilon in EPSILONS.items():
                attacked = moved_along(signs, images, epsilon=epsilon, **_IN_UNITS)
                with torch.no_grad():
                    right[name].append(network(attacked).argmax(dim=1) == labels)
        return {name: percent(torch.cat(found)) for name, found in right.items()}


def percent(right: torch.Tensor) -> float:
    """Return the share of true values in percent."""
    return round(100 * right.double().mean().item(), 4)


def calibration_error(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the expected calibration error in percent, with `BINS` confidence bins of equal width.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3: the mean over all images of the
    difference between mean confidence and accuracy in the image's bin. An edge belongs to the bin below it.
    """
    confidence, answers = functional.softmax(logits.double(), dim=1).max(dim=1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    sums = torch.zeros(BINS, dtype=torch.float64, device=logits.device)
    differences = sums.index_add(0, bins, confidence - (answers == labels).double())
    return round(100 * differences.abs().sum().item() / len(labels), 4)


# ---- networks --------------------------------------------------------------------------------------------------------


class ResNet9(nn.Sequential):
    """A small residual network for images of 32x32 pixels: eight convolutions and a linear layer.

    `width` is the number of channels of the first convolution; the last ones have eight times as many. The design
    follows the ResNet-9 of the DAWNBench entries for CIFAR-10.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(
            _convolution(3, width),
            _convolution(width, 2 * width),
            nn.MaxPool2d(2),
            _Residual(*(_convolution(2 * width, 2 * width) for _ in range(2))),
            _convolution(2 * width, 4 * width),
            nn.MaxPool2d(2),
            _convolution(4 * width, 8 * width),
            nn.MaxPool2d(2),
            _Residual(*(_convolution(8 * width, 8 * width) for _ in range(2))),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, classes, bias=False),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, K) of images (N, 3, 32, 32)."""
        return super().forward(images) / 8  # small initial logits allow a high learning rate


class _Residual(nn.Sequential):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + super().forward(features)


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def make_network(name: str, width: int | None, classes: int) -> nn.Module:
    """Return one of `NETWORKS`, initialised with PyTorch's global generator; ``"resnet18"`` ignores `width`."""
    return ResNet9(width, classes) if name == "resnet9" else make_model("cifar_resnet18", classes)


def operations_of(name: str, width: int | None) -> float:
    """Return the floating-point operations of a forward pass of one image; a multiply-add counts as two.

    PyTorch counts convolutions and linear layers only. A training step takes three times as many operations.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        make_network(name, width, 10).eval()(torch.zeros(1, 3, SIZE, SIZE))
    return float(counter.get_total_flops())
