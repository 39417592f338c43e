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

import numpy as np
import pytest
import torch

pytest_plugins = ["shared.training_fixtures"]

IMAGES, EPOCHS, BATCH, LR = 48, 2, 8, 0.01
OPTIONS = {"epochs": EPOCHS, "batch_size": BATCH, "size": 32, "lr": LR}


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
    batches, cross_entropy = [], accelerate_training.cross_entropy

    def recorded(logits, targets):
        batches.append(targets.tolist())
        return cross_entropy(logits, targets)

    accelerate_training.cross_entropy = recorded
    model, losses = accelerate_training.train(numbered(data), accelerator, **OPTIONS)
    report = {
        "targets": batches,
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
    from shared.programs import torchrun

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


def images_of(targets):
    """Return the numbers of the images that a batch is made of: each of them is a receiver once, and a source once."""
    return set(np.nonzero(targets)[1].tolist())


def test_two_processes_share_the_images_of_each_epoch(reports):
    steps = IMAGES // 2 // BATCH
    assert [len(report["targets"]) for report in reports] == [EPOCHS * steps] * 2
    for epoch in range(EPOCHS):
        seen = [images_of(batch) for report in reports for batch in report["targets"][epoch * steps :][:steps]]
        assert sorted(number for images in seen for number in images) == list(range(IMAGES))


def test_two_processes_mix_with_draws_of_their_own(reports):
    weights = [{weight for batch in report["targets"] for row in batch for weight in row} for report in reports]
    assert all(len(of_one) > 2 * BATCH for of_one in weights)
    assert not weights[0] <= weights[1]


@pytest.mark.parametrize("batch_size", [BATCH, 10], ids=["whole batches", "a remainder"])
def test_one_process_trains_as_a_loop_by_hand_does(data_folder, batch_size):
    """The same steps without Accelerate, by code of its own, lead to the same weights."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    import torchvision
    from torch.nn.functional import log_softmax

    from pipelines.accelerate_training import train, training_pipeline

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = numbered(data_folder)
    torch.manual_seed(3)
    model, losses = train(folder, accelerate.Accelerator(cpu=True), **{**OPTIONS, "batch_size": batch_size})

    torch.manual_seed(3)
    by_hand = torchvision.models.resnet18(num_classes=IMAGES)
    begin = checksums(by_hand)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
    pipeline = training_pipeline(folder, 32, False, 0, 1, batch_size=batch_size, num_threads=4, device_id=None, seed=0)
    losses_by_hand = []
    for _ in range(EPOCHS):
        epoch = []
        for step in range(math.ceil(IMAGES / batch_size)):
            images, targets = (torch.from_numpy(np.array(output.as_tensor())) for output in pipeline.run())
            if step == IMAGES // batch_size:  # its end is padding
                continue
            loss = -(targets * log_softmax(by_hand(images), 1)).sum(1).mean()
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
    from shared.programs import run_program

    weights = tmp_path / "weights.pt"
    options = ["--cpu", "-b", "8", "--size", "32", "--lr", "0.01", "--output", weights]
    ended = run_program("pipelines/accelerate_training.py", data_folder / "train", *options)
    line = ended.stdout.splitlines()[-1]
    assert line.startswith("epoch 1/1  6 steps  loss ")
    assert math.isfinite(float(line.split()[-1]))
    model = torchvision.models.resnet18(num_classes=8)
    model.load_state_dict(torch.load(weights, weights_only=True))
    assert torch.isfinite(model.conv1.weight).all()
    assert model.bn1.num_batches_tracked == 6


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
