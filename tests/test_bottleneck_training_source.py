"""The bottleneck tool measures the same batches as a training run with the same options."""

from __future__ import annotations

import pytest
import torch
from shared.batches import assert_equal_batches, epoch
from shared.cifar_files import write_cifar

from dali_saliencymix.__main__ import main
from dali_saliencymix.bottleneck import BottleneckError, command, stages, whatifs
from dali_saliencymix.bottleneck.training import training_source
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.loaders.cifar import CifarData
from dali_saliencymix.loaders.data import open_data
from dali_saliencymix.loaders.folder import FolderData
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.measure import windows
from dali_saliencymix.training.arguments import parse_arguments

ALONE = Processes(0, 0, 1, torch.device("cpu"))
FOLDER = ("--train-crop-size", "32", "--color-jitter", "0.4", "--min-crop-area", "0.5", "--hflip-prob", "0.9")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with 32 images in class folders and 30 images of CIFAR-10, both for training."""
    root = tmp_path_factory.mktemp("data")
    make_sample_data(root, train=4, val=1)
    write_cifar(root, "cifar10", train=30, test=5)
    (root / "list.txt").write_text(
        "\n".join(str(path.relative_to(root / "train")) for path in sorted((root / "train").glob("*/*"))[::4])
    )
    return root


def options(root, *more):
    return parse_arguments([str(root), "-b", "4", "-j", "1", "--device", "cpu", *more])


@pytest.mark.parametrize(
    "more",
    [
        FOLDER,
        (*FOLDER, "--mix", "none", "--channels-last"),
        (*FOLDER, "--data-backend", "pytorch"),
        ("--dataset", "cifar10", "--hflip-prob", "0.9"),
        ("--dataset", "cifar10", "--data-backend", "pytorch"),
        ("--data-backend", "synthetic", "--synthetic-steps", "3", "--train-crop-size", "32"),
    ],
    ids=" ".join,
)
def test_the_batches_are_those_of_the_training(root, more):
    args = options(root, *more)
    source = training_source(args, ALONE, images=2048)
    training = open_data(args.data).train_loader(args.data, ALONE)
    assert_equal_batches(epoch(source.open({})), epoch(training))
    assert len(next(iter(source.open({"batch_size": 2})))[0]) == 2


@pytest.mark.parametrize(
    ("more", "setting", "label"),
    [
        ((*FOLDER, "--data-backend", "pytorch"), "workers", "worker processes"),
        (("--dataset", "cifar10"), "num_threads", "DALI threads"),
        (("--data-backend", "synthetic"), None, "DALI threads"),
    ],
)
def test_what_if_there_were_more_threads_or_processes(root, monkeypatch, more, setting, label):
    args = options(root, *more)
    opened, aheads = [], []
    loader = FolderData.train_loader if "pytorch" in more else CifarData.train_loader

    def noted(self, args, *others, **named):
        opened.append((args.workers, args.prefetch, args.batch_size))
        return loader(self, args, *others, **named)

    class Batches(windows.Batches):
        def __init__(self, loader, *, ahead):
            aheads.append(ahead)
            super().__init__(loader, ahead=ahead)

    def in_turns(self, subjects, *, seconds):
        return windows.Windows({name: [1.0] * 5 for name in subjects}, {})

    for kind in (FolderData, CifarData):
        monkeypatch.setattr(kind, "train_loader", noted)
    monkeypatch.setattr(windows.Meter, "in_turns", in_turns)
    monkeypatch.setattr(whatifs, "Batches", Batches)
    source = training_source(args, ALONE, images=2048)
    rows = whatifs.measured_rows(source, seconds=0.1, meter=windows.Meter())
    found = [row for row in rows if row["what"] in ("DALI threads", "worker processes")]
    assert [row["what"] for row in found] == [label]
    assert source.settings.get(setting) == (1 if setting else None)
    if setting is None:
        assert found[0]["not_measured"] == "this loader has no num_threads that can be changed"
        return
    assert (found[0]["now"], found[0]["then"]) == (1, 2)
    assert found[0]["loader_images_per_second"].median == 4000
    assert opened == [(1, 2, 4), (2, 2, 4), (1, 4, 4), (1, 2, 2), (1, 2, 8)]
    assert aheads == ([2, 4, 4, 2, 2] if setting == "workers" else [2, 2, 4, 2, 2])


GROWING = ("--epochs", "8", "--progressive-size", "24@0", "40@4")


@pytest.mark.parametrize(
    ("more", "size", "mixed", "note"),
    [
        (
            GROWING,
            40,
            True,
            "measured with the batches of epochs 5 to 8 (40x40 pixels); not measured: epochs 1 to 4 (24x24 pixels)",
        ),
        (
            ("--epochs", "8", "--mix-off-epochs", "2"),
            32,
            True,
            "measured with the batches of epochs 1 to 6 (32x32 pixels, mixed); not measured: epochs 7 to 8 "
            "(32x32 pixels, not mixed)",
        ),
        ((*GROWING, "--mix-off-epochs", "4"), 40, False, "epochs 5 to 8 (40x40 pixels, not mixed); not measured"),
        (("--epochs", "8", "--mix-off-epochs", "8"), 32, False, None),
    ],
)
def test_of_epochs_that_differ_those_with_the_largest_images_are_measured(root, more, size, mixed, note):
    source = training_source(options(root, *FOLDER, *more), ALONE, images=2048)
    instead = source.conditions.get("notes", [])
    assert len(instead) == (note is not None)
    assert (note or "") in "".join(instead)
    images, _, _, lam = next(iter(source.open({})))
    assert images.shape == (4, 3, size, size)
    assert (lam < 1).any() == mixed
    assert ("saliency" in [cut.name for cut in stages.cut_pipeline(lambda: source.define({}))]) == mixed


def test_a_loader_leaves_out_as_many_bad_files_as_the_training_does(root, tmp_path):
    files = sorted((root / "train").glob("*/*"))
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
    for number, file in enumerate(files[:12]):
        content = b"no image" if number == 5 else file.read_bytes()
        (tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg").write_bytes(content)
    folder = str(tmp_path / "train")
    args = options(root, *FOLDER, "--train-dir", folder, "--val-dir", folder, "--max-bad-batches", "1")
    loader = training_source(args, ALONE, images=2048).open({})
    assert all(len(images) == 4 for images, *_ in epoch(loader))
    assert [file.endswith("5.jpg") for file in loader.bad_files] == [True]


def test_images_that_are_too_few_are_repeated_and_the_report_says_so(root):
    source = training_source(options(root, *FOLDER, "-b", "64"), ALONE, images=2048)
    assert len(next(iter(source.open({})))[0]) == 64
    assert source.conditions["notes"] == [
        "32 images are too few for a step: train.py would reject them, here they are repeated"
    ]


def test_a_folder_that_dali_reads_is_cut_as_its_options_say(root):
    source = training_source(options(root, *FOLDER), ALONE, images=2048)
    names = [cut.name for cut in stages.cut_pipeline(lambda: source.define({}))]
    assert names == ["read", "decode", "resize", "ColorTwist", "paste and normalise", "saliency"]


def test_a_part_of_the_images_stands_for_all_of_them(root):
    whole = training_source(options(root, *FOLDER), ALONE, images=2048)
    part = training_source(options(root, *FOLDER), ALONE, images=16)
    assert (len(whole.files), len(part.files)) == (32, 16)
    assert part.conditions["images_in_data_set"] == 32
    assert part.dataset_bytes == pytest.approx(whole.dataset_bytes, rel=0.3)
    listed = training_source(options(root, *FOLDER, "--train-list", str(root / "list.txt")), ALONE, images=2048)
    assert len(listed.files) == listed.conditions["images_in_data_set"] == 8


def test_a_backend_for_a_gpu_is_refused_without_one(root):
    with pytest.raises(ValueError, match="--data-backend dali-gpu needs a run on a GPU, but this one is on cpu"):
        training_source(options(root, "--data-backend", "dali-gpu"), ALONE, images=2048)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (("--dataset", "cifar10", "--data-backend", "pytorch"), "training loader, cifar10 by pytorch, mix saliencymix"),
        (("--train-list", "list.txt"), "training pipeline, mix saliencymix"),
        (("--epochs", "8", "--mix-off-epochs", "8"), "training pipeline, mix none"),
        (("--epochs", "8", "--mix-off-epochs", "2"), "training pipeline, mix saliencymix"),
    ],
)
def test_the_command_measures_what_its_options_name_and_says_what_it_leaves_out(root, monkeypatch, capfd, more, name):
    measured = []

    def measure(source, step, **options):
        measured.append(source)
        msg = "far enough"
        raise BottleneckError(msg)

    monkeypatch.setattr(command, "measure_source", measure)
    more = [str(root / word) if word == "list.txt" else word for word in more]
    assert main(["bottleneck", str(root), "--no-step", "-b", "4", "-j", "1", "--device", "cpu", *more]) == 1
    err = capfd.readouterr().err
    assert "error: far enough" in err
    assert ("not measured: epochs 7 to 8" in err) == (more[-1] == "2")
    assert [source.name for source in measured] == [name]


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_built_in_step_has_the_kernels_of_the_training(root, monkeypatch, deterministic):
    kernels = []

    def measure(source, step, **options):
        kernels.append((torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()))
        msg = "far enough"
        raise BottleneckError(msg)

    monkeypatch.setattr(command, "measure_source", measure)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)  # the opposite of what the step must set
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    more = ["--deterministic"] if deterministic else []
    try:
        assert main(["bottleneck", str(root), "-a", "resnet18", "-b", "4", "--device", "cpu", *more]) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernels == [(not deterministic, deterministic)]
