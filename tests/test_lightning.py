"""The code of the guide for Lightning, in trainings that begin again, resume, and run in two processes."""

from __future__ import annotations

import json
import re

import pytest
from shared.programs import REPOSITORY, run_program, torchrun

from dali_saliencymix.datasets.sample_data import make_sample_data

GUIDE = (REPOSITORY / "docs" / "guides" / "lightning.md").read_text()
IMAGES, BATCH_SIZE = 32, 4

COMMON = """
import dataclasses, json, os, sys

os.environ["TORCHELASTIC_RUN_ID"] = "test"  # by this, Lightning recognises torchrun


class Recorded(Classifier):
    '''Records the labels of each batch, which are the numbers of the images, by epoch.'''

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(num_classes=32, size=16)
        self.trained, self.validated = {}, []

    def training_step(self, batch, batch_idx):
        self.trained.setdefault(self.current_epoch, []).extend(batch[1].tolist())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.validated.extend(batch[1].tolist())
        super().validation_step(batch, batch_idx)


def images():
    data = Images("data/train", "data/val", batch_size=4, size=16)
    data.train = dataclasses.replace(data.train, labels=list(range(32)))
    data.val = data.train.take(range(9))  # of two processes with batches of 4 images, one has an empty batch
    return data


def trainer(callbacks=(), **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"accelerator": "cpu", "num_sanity_val_steps": 0, "enable_checkpointing": bool(callbacks)}
    return lightning.Trainer(callbacks=list(callbacks), **quiet, **options)


def saving(folder):
    '''Save a checkpoint after each step.'''
    name = {"filename": "{step}", "auto_insert_metric_name": False}
    return lightning.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, **name)


def weights(model):
    return [parameter.tolist() for parameter in model.parameters()]
"""


def code_of(*names: str) -> str:
    """Return the blocks of the guide that define these classes."""
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    return "\n".join(block for name in names for block in blocks if f"\nclass {name}(" in block)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("lightning")
    folder = tmp_path_factory.mktemp("lightning")
    make_sample_data(folder / "data", train=IMAGES // 8, val=1)
    return folder


@pytest.mark.slow
def test_trainings_can_begin_again_and_resume_anywhere(folder):
    script = f"""
{code_of("Images", "Classifier")}
{COMMON}
data, whole, again = images(), Recorded(), Recorded()
trainer(max_epochs=3, callbacks=[saving("one")]).fit(whole, data)
loaders = data.loader, data.val_dataloader()
trainer(max_epochs=1).fit(again, *loaders)
trainer().validate(again, loaders[1])
resumed = []
for steps in (3, 8):  # in the middle of the first epoch, and at its end
    model = Recorded()
    trainer(max_epochs=3).fit(model, images(), ckpt_path=f"one/{{steps}}.ckpt")
    resumed.append([model.trained, weights(model) == weights(whole)])
print(json.dumps([whole.trained, whole.validated, again.trained, again.validated, resumed]))
"""
    lines = run_program("-c", script, folder=folder).stdout.splitlines()
    trained, validated, again, validated_again, resumed = json.loads(lines[-1])
    assert list(trained) == ["0", "1", "2"]
    for epoch in (*trained.values(), again["0"]):
        assert sorted(epoch) == list(range(IMAGES))
    assert len({tuple(epoch) for epoch in (*trained.values(), again["0"])}) == 4  # the orders differ
    assert validated == 3 * list(range(9))
    assert validated_again == 2 * list(range(9))
    in_the_middle, at_the_end = resumed
    assert in_the_middle == [trained | {"0": trained["0"][3 * BATCH_SIZE :]}, True]
    assert at_the_end == [{"1": trained["1"], "2": trained["2"]}, True]


@pytest.mark.slow
def test_two_processes_share_the_images_and_resume(folder):
    script = f"""
{code_of("Images", "Classifier")}
{COMMON}
os.chdir({str(folder)!r})
two = {{"devices": 2, "strategy": "ddp"}}
whole, model = Recorded(), Recorded()
first = trainer(max_epochs=2, callbacks=[saving("two")], **two)
first.fit(whole, images())
accuracy = first.callback_metrics["val_acc"].item()
trainer(max_epochs=2, **two).fit(model, images(), ckpt_path="two/3.ckpt")
result = [whole.trained, whole.validated, model.trained, accuracy, weights(model) == weights(whole)]
sys.stdout.write(f"result {{json.dumps(result)}}\\n")  # at once: the processes share their output
"""
    lines = torchrun("-c", script).stdout.splitlines()
    ranks = [json.loads(line.removeprefix("result")) for line in lines if line.startswith("result")]
    assert len(ranks) == 2
    for epoch in ("0", "1"):
        assert sorted(ranks[0][0][epoch] + ranks[1][0][epoch]) == list(range(IMAGES))
    assert sorted(ranks[0][1] + ranks[1][1]) == sorted(2 * list(range(9)))
    assert ranks[0][3] == ranks[1][3] == pytest.approx(round(9 * ranks[0][3]) / 9)  # the accuracy over 9 images
    for trained, _, resumed, _, same_weights in ranks:
        assert resumed == {"0": trained["0"][3 * BATCH_SIZE :], "1": trained["1"]}
        assert same_weights
