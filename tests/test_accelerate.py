"""Training with Hugging Face Accelerate: in one process, and in two that share the images and agree on the weights.

Run as a program, under ``torchrun``, this module is one of the two processes: it records what it gets, and judges
nothing.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest_plugins = ["training_fixtures"]

EPOCHS, BATCH, LR = 2, 8, 0.01
OPTIONS = {"epochs": EPOCHS, "batch_size": BATCH, "crop_size": 32, "num_threads": 1, "lr": LR, "seed": 3}


def numbered(data):
    """Return a data set in which a label says which file it is."""
    from dali_saliencymix.datasets.image_folder import list_image_folder

    folder = list_image_folder(data / "train")
    names = [f"{number:03d}" for number in range(len(folder))]
    return replace(folder, classes=names, labels=list(range(len(folder))))


def checksums(model):
    return [parameter.double().sum().item() for parameter in model.parameters()]


def record(data, output):
    """Train; write what this process was given, and where that led to."""
    from accelerate import Accelerator

    from pipelines import accelerate_training

    accelerator = Accelerator(cpu=True)
    batches, make_loader = [], accelerate_training.training_loader

    class Recorded:
        def __init__(self, loader):
            self.loader = loader

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            for batch in self.loader:
                batches.append([tensor.tolist() for tensor in batch[1:]])
                yield batch

    accelerate_training.training_loader = lambda *args, **options: Recorded(make_loader(*args, **options))
    model, losses = accelerate_training.train(numbered(data), accelerator, **OPTIONS)
    report = {
        "batches": batches,
        "losses": losses,
        "weights": checksums(model),
        "type": type(model).__name__,
        "processes": accelerator.num_processes,
    }
    (output / f"{accelerator.process_index}.json").write_text(json.dumps(report))
    accelerator.end_training()


@pytest.fixture(scope="module")
def reports(data_folder, tmp_path_factory):
    """What two processes recorded."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from training_fixtures import torchrun

    output = tmp_path_factory.mktemp("reports")
    torchrun(__file__, data_folder, output)
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_take_part(reports):
    assert [report["processes"] for report in reports] == [2, 2]
    assert [report["type"] for report in reports] == ["ResNet", "ResNet"]  # unwrapped


def test_two_processes_agree_on_weights_and_loss(reports):
    assert reports[0]["weights"] == reports[1]["weights"]
    assert reports[0]["losses"] == reports[1]["losses"]
    assert len(reports[0]["losses"]) == EPOCHS
    assert all(map(math.isfinite, reports[0]["losses"]))


def test_two_processes_share_the_images_of_each_epoch(reports):
    steps = 48 // 2 // BATCH
    assert [len(report["batches"]) for report in reports] == [EPOCHS * steps] * 2
    for epoch in range(EPOCHS):
        seen = [
            label
            for report in reports
            for labels, _, _ in report["batches"][epoch * steps : (epoch + 1) * steps]
            for label in labels
        ]
        assert sorted(seen) == list(range(48))


def test_two_processes_mix_with_draws_of_their_own(reports):
    lam = [[own for _, _, lam in report["batches"] for own in lam] for report in reports]
    assert min(map(min, lam)) < 0.5
    assert not set(lam[0]) - {1.0} <= set(lam[1])


def test_one_process_trains_as_a_loop_by_hand_does(data_folder):
    """The same steps without Accelerate, by code of its own, lead to the same weights."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    import torchvision
    from torch.nn.functional import cross_entropy

    from dali_saliencymix import fn
    from dali_saliencymix.loaders.dali import training_loader
    from pipelines.accelerate_training import train

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = numbered(data_folder)
    model, losses = train(folder, accelerate.Accelerator(cpu=True), **OPTIONS)

    torch.manual_seed(OPTIONS["seed"])
    by_hand = torchvision.models.resnet18(num_classes=48)
    begin = checksums(by_hand)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
    loader = training_loader(
        folder, batch_size=BATCH, num_threads=1, device=torch.device("cpu"), seed=3, crop_size=32, mix=fn.saliencymix
    )
    losses_by_hand = []
    for _ in range(EPOCHS):
        epoch = []
        for images, labels, source_labels, lam in loader:
            # The same arithmetic, not only the same value: each step makes rounding errors grow about tenfold.
            logits = by_hand(images)
            own, other = (cross_entropy(logits, ids, reduction="none") for ids in (labels, source_labels))
            loss = (lam * own + (1 - lam) * other).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            epoch.append(loss.item())
        losses_by_hand.append(sum(epoch) / len(epoch))
    torch.set_num_threads(threads)
    assert losses == pytest.approx(losses_by_hand, rel=1e-5)
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert checksums(by_hand) != begin


def test_the_command_trains_and_writes_weights(data_folder, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    import torchvision
    from training_fixtures import run_program

    weights = tmp_path / "weights.pt"
    options = ["--cpu", "-b", "8", "--crop-size", "32", "-j", "1", "--lr", "0.01", "--output", weights]
    ended = run_program("-m", "pipelines.accelerate_training", data_folder / "train", *options)
    line = ended.stdout.splitlines()[-1]
    assert line.startswith("epoch 1/1  6 steps  loss ")
    assert math.isfinite(float(line.split()[-1]))
    model = torchvision.models.resnet18(num_classes=8)
    model.load_state_dict(torch.load(weights, weights_only=True))
    torch.manual_seed(0)
    begin = torchvision.models.resnet18(num_classes=8)
    assert not torch.equal(model.conv1.weight, begin.conv1.weight)
    assert torch.isfinite(model.conv1.weight).all()


def test_too_few_images_are_an_error(data_folder):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from pipelines.accelerate_training import train

    with pytest.raises(ValueError, match=r"batch_size must be at most 48, .* got 49"):
        train(numbered(data_folder), accelerate.Accelerator(cpu=True), **{**OPTIONS, "batch_size": 49})


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_on_a_gpu_it_trains_there(data_folder, precision):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState

    from pipelines.accelerate_training import train

    AcceleratorState._reset_state(reset_partial_state=True)  # other tests of this process have asked for the CPU
    model, losses = train(numbered(data_folder), accelerate.Accelerator(mixed_precision=precision), **OPTIONS)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert next(model.parameters()).is_cuda
    assert all(map(math.isfinite, losses))


if __name__ == "__main__":
    record(Path(sys.argv[1]), Path(sys.argv[2]))
