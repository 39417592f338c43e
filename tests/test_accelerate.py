"""Training with Hugging Face Accelerate: in one process, and in two that share the images and agree on the weights.

Run as a program, this module is one process of a training run. It records what it gets without checking it, and can
kill itself at a batch.
"""

from __future__ import annotations

import json
import math
import os
import signal
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
    """Return a data set in which the label of a file is its number."""
    from dali_saliencymix.datasets.image_folder import list_image_folder

    folder = list_image_folder(data / "train")
    names = [f"{number:03d}" for number in range(len(folder))]
    return replace(folder, classes=names, labels=list(range(len(folder))))


def checksums(model):
    return [parameter.double().sum().item() for parameter in model.parameters()]


def record(data, output, killed, at_batch, *, accumulated=1, **options):
    """Train; write what this process got and the resulting weights. Process `killed` dies in a batch of this run."""
    from accelerate import Accelerator

    from pipelines import accelerate_training

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    cross_entropy, given = accelerate_training.cross_entropy, output / f"{accelerator.process_index}.jsonl"
    batches = 0

    def recorded(logits, targets):
        nonlocal batches
        batches += 1
        if (accelerator.process_index, batches) == (killed, at_batch):
            os.kill(os.getpid(), signal.SIGKILL)
        with given.open("a") as lines:
            lines.write(f"{json.dumps(targets.tolist())}\n")
        return cross_entropy(logits, targets)

    accelerate_training.cross_entropy = recorded
    model, losses = accelerate_training.train(numbered(data), accelerator, **{**OPTIONS, **options})
    report = {
        "losses": losses,
        "weights": checksums(model),
        "type": type(model).__name__,
        "processes": accelerator.num_processes,
    }
    (output / f"{accelerator.process_index}.json").write_text(json.dumps(report))
    accelerator.end_training()


def recorded_by(start, data, output, killed=-1, at_batch=0, **options):
    """Run this module as a program, which must succeed unless it is killed; return the record of each process."""
    output.mkdir(exist_ok=True)
    ended = start(__file__, data, output, str(killed), str(at_batch), json.dumps(options), check=killed < 0)
    assert (ended.returncode != 0) == (killed >= 0), ended.stderr
    reports = []
    for given in sorted(output.glob("*.jsonl")):
        end = given.with_suffix(".json")
        targets = [json.loads(line) for line in given.read_text().splitlines()]
        reports.append(
            {"targets": targets, "said": ended.stdout, **(json.loads(end.read_text()) if end.exists() else {})}
        )
    return reports


@pytest.fixture(scope="module")
def reports(data_folder, tmp_path_factory):
    """The records of two processes, with three batches per epoch in updates of two and one."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from shared.programs import torchrun

    return recorded_by(torchrun, data_folder, tmp_path_factory.mktemp("reports"), accumulated=2)


def test_two_processes_take_part(reports):
    assert [report["processes"] for report in reports] == [2, 2]
    assert [report["type"] for report in reports] == ["ResNet", "ResNet"]  # unwrapped


def test_two_processes_agree_on_weights_and_loss(reports):
    assert reports[0]["weights"] == reports[1]["weights"]
    assert reports[0]["losses"] == reports[1]["losses"]
    assert len(reports[0]["losses"]) == EPOCHS
    assert all(map(math.isfinite, reports[0]["losses"]))


def images_of(targets):
    """Return the numbers of the images in a batch: each is a receiver once and a source once."""
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


@pytest.mark.parametrize(("batch_size", "accumulated"), [(BATCH, 1), (10, 3)], ids=["whole batches", "accumulated"])
def test_one_process_trains_as_a_loop_by_hand_does(data_folder, batch_size, accumulated):
    """The same steps in plain PyTorch, without Accelerate, lead to the same weights."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    import torchvision
    from torch.nn.functional import log_softmax

    from pipelines.accelerate_training import train, training_pipeline

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = numbered(data_folder)
    torch.manual_seed(3)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    model, losses = train(folder, accelerator, **{**OPTIONS, "batch_size": batch_size})

    torch.manual_seed(3)
    by_hand = torchvision.models.resnet18(num_classes=IMAGES)
    begin = checksums(by_hand)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
    pipeline = training_pipeline(folder, 32, False, 0, 1, batch_size=batch_size, num_threads=4, device_id=None, seed=0)
    losses_by_hand = []
    for _ in range(EPOCHS):
        epoch, steps = [], IMAGES // batch_size
        # The update of a shorter window also uses the mean gradient of its batches.
        updates = [range(first, min(first + accumulated, steps)) for first in range(0, steps, accumulated)]
        for step in range(math.ceil(IMAGES / batch_size)):
            images, targets = (torch.from_numpy(np.array(output.as_tensor())) for output in pipeline.run())
            if step == steps:  # the rest is padding
                continue
            loss = -(targets * log_softmax(by_hand(images), 1)).sum(1).mean()
            (of_one_update,) = (update for update in updates if step in update)
            (loss / len(of_one_update)).backward()
            if step == of_one_update[-1]:
                optimizer.step()
                optimizer.zero_grad()
            epoch.append(loss.item())
        losses_by_hand.append(sum(epoch) / len(epoch))
    torch.set_num_threads(threads)
    assert losses == pytest.approx(losses_by_hand, rel=1e-5)
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert checksums(by_hand) != begin


# Killed and resumed


def seen_by_all(reports, steps):
    """Return the images of each epoch, of `steps` batches in each process."""
    epochs = range(0, len(reports[0]["targets"]), steps)
    return [
        sorted(
            number for report in reports for batch in report["targets"][first:][:steps] for number in images_of(batch)
        )
        for first in epochs
    ]


def test_two_processes_resume_within_an_epoch_in_which_one_was_killed(reports, data_folder, tmp_path):
    from shared.programs import torchrun

    options = {"accumulated": 2, "checkpoints": str(tmp_path / "checkpoints"), "checkpoint_every": 1}
    # Updates after batches 2, 3, 5 and 6. The process dies in batch 6, the last one of the second epoch.
    first = recorded_by(torchrun, data_folder, tmp_path / "first", killed=1, at_batch=6, **options)
    assert [path.name for path in (tmp_path / "checkpoints").glob("update_*")] == ["update_00000003"]
    second = recorded_by(torchrun, data_folder, tmp_path / "second", **options)
    assert [len(report["targets"]) for report in second] == [1, 1]
    assert "resumes in epoch 2 after 2 steps" in second[0]["said"]
    together = [{"targets": a["targets"][:5] + b["targets"]} for a, b in zip(first, second, strict=True)]
    assert seen_by_all(together, IMAGES // 2 // BATCH) == [list(range(IMAGES))] * EPOCHS
    for ours, undisturbed, end in zip(together, reports, second, strict=True):
        assert ours["targets"] == undisturbed["targets"]
        assert (end["weights"], end["losses"]) == (undisturbed["weights"], undisturbed["losses"])


@pytest.mark.parametrize("batch_size", [12, 10], ids=["whole batches", "a remainder"])
def test_one_process_that_is_killed_again_and_again_sees_each_image_once_in_an_epoch(data_folder, tmp_path, batch_size):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from shared.programs import run_program

    steps = IMAGES // batch_size  # four, and possibly an incomplete batch that is read and dropped
    options = {"batch_size": batch_size, "checkpoint_every": 2}
    (undisturbed,) = recorded_by(run_program, data_folder, tmp_path / "undisturbed", **options)
    assert len(undisturbed["targets"]) == EPOCHS * steps
    options["checkpoints"] = str(tmp_path / "checkpoints")
    targets = []
    # The run resumes from checkpoints within an epoch and at its end.
    for number, killed in enumerate([{"killed": 0, "at_batch": 4}] * 2 + [{}]):
        (report,) = recorded_by(run_program, data_folder, tmp_path / str(number), **killed, **options)
        targets += report["targets"][: 2 if killed else None]
    assert targets == undisturbed["targets"]
    images = [images_of(batch) for batch in targets]
    assert [len(set().union(*images[first:][:steps])) for first in (0, steps)] == [steps * batch_size] * EPOCHS
    assert (report["weights"], report["losses"]) == (undisturbed["weights"], undisturbed["losses"])


def test_a_checkpoint_of_other_batches_is_refused(data_folder, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from shared.programs import run_program

    options = ["--cpu", "--size", "32", "--checkpoints", tmp_path, "--checkpoint-every", "2"]
    train = ["pipelines/accelerate_training.py", data_folder / "train"]
    run_program(*train, *options, "-b", "16")
    ended = run_program(*train, *options, "-b", "8", "--accumulation-steps", "2", check=False)
    what = "batch_size was 16, is 8; gradient_accumulation_steps was 1, is 2"
    assert ended.returncode == 1
    assert ended.stderr.endswith(f"error: {tmp_path}/update_00000002: cannot resume with other batches: {what}\n")


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

    AcceleratorState._reset_state(reset_partial_state=True)  # other tests in this process have set it to the CPU
    model, losses = train(numbered(data_folder), accelerate.Accelerator(mixed_precision=precision), **OPTIONS)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert next(model.parameters()).is_cuda
    assert all(map(math.isfinite, losses))


if __name__ == "__main__":
    data, output, killed, at_batch, options = sys.argv[1:]
    options = json.loads(options)
    if options.get("checkpoints"):
        options["checkpoints"] = Path(options["checkpoints"])
    record(Path(data), Path(output), int(killed), int(at_batch), **options)
