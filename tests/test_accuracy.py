"""The accuracy study: arms differ only as described, and the file loses no run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from shared.cifar_files import write_cifar
from shared.programs import run_program

from benchmarks import pack, program
from benchmarks.accuracy import __main__ as accuracy_program
from benchmarks.accuracy import data, mosaics, released, summary
from benchmarks.accuracy.arms import ARMS
from benchmarks.accuracy.run import Trainer, calibration_error, make_network, operations_of
from benchmarks.accuracy.study import Settings, Study, read_runs
from dali_saliencymix.datasets.cifar import CifarImages, read_cifar

CPU = torch.device("cpu")
SMALL = Settings(
    network="resnet9",
    width=4,
    epochs=2,
    images=40,
    batch_size=8,
    lr=0.05,
    weight_decay=5e-4,
    prob=0.5,
    augment=True,
    precision="fp32",
    evaluate_every=1,
)
PER_BATCH = ("as released", "saliencymix released-code", "cutmix per batch")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    return read_cifar(write_cifar(tmp_path_factory.mktemp("cifar"), "cifar10", train=50, test=20), "cifar10")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trainer(cifar, **changes):
    return Trainer(*cifar, dataclasses.replace(SMALL, **changes), CPU)


# ---- arms ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_mixing(cifar):
    return trainer(cifar, prob=0.0).run("none", 3)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "none"])
def test_with_lam_1_each_arm_is_the_one_without_mixing(cifar, without_mixing, arm):
    found = trainer(cifar, prob=0.0).run(arm, 3)
    for times in ("seconds", "training_seconds"):
        found[times] = without_mixing[times]
    assert found == without_mixing
    for own, other in zip(*(trainer(cifar, prob=0.0).batches(name, 3, 1) for name in (arm, "none")), strict=True):
        images, labels, _, lam = own
        assert torch.equal(images, other[0])
        assert torch.equal(labels, other[1])
        assert lam.tolist() == [1] * 8


def test_a_run_repeats_itself_and_arms_do_not(cifar):
    logits = {}
    for arm in ("cutmix", "saliencymix paper", "as released"):
        made = [[batch[0] for batch in trainer(cifar, prob=1.0).batches(arm, 3, 1)] for _ in range(2)]
        assert all(map(torch.equal, *made))
        logits[arm] = torch.cat(made[0])
    assert not any(torch.equal(*pair) for pair in itertools.combinations(logits.values(), 2))


@pytest.mark.parametrize("arm", ARMS)
def test_arms_share_order_partners_and_initial_weights(cifar, arm):
    of_arm, of_none = (list(trainer(cifar).batches(name, 3, 2)) for name in (arm, "none"))
    for (_, labels, source_labels, _), (_, other_labels, other_source_labels, _) in zip(of_arm, of_none, strict=True):
        assert torch.equal(labels, other_labels)
        assert torch.equal(source_labels, other_source_labels)
    # A learning rate of 0 keeps the initial weights.
    standing, weights = trainer(cifar, lr=0.0, weight_decay=0.0, epochs=1), []
    standing._attacked = lambda network: weights.extend(network.parameters())
    standing.run(arm, 5)
    torch.manual_seed(5)
    for found, initial in zip(weights, make_network("resnet9", SMALL.width, 10).parameters(), strict=True):
        assert torch.equal(found, initial)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in ("none", "saliency labels")])
def test_pixels_and_label_weights_of_an_arm_belong_together(cifar, arm):
    """If image and source have one grey level each, the share of pixels is the weight."""
    levels = np.arange(50, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    plain = CifarImages(levels, np.arange(50, dtype=np.int32) % 10, cifar[0].classes)
    made = Trainer(plain, cifar[1], dataclasses.replace(SMALL, prob=1.0), CPU)
    draws = data.draws_of_epoch(3, 1, 40, 8, prob=1.0, augment=True)
    mixed_at_all = 0
    for (images, _, _, lam), drawn in zip(made.batches(arm, 3, 1), draws, strict=True):
        red = (images[:, 0] * 63.0 + 125.3).round().int().numpy()
        own = red == drawn.index[:, None, None]
        source = red == drawn.index[drawn.source_index][:, None, None]
        assert (own | source).all()
        differs = drawn.index != drawn.index[drawn.source_index]
        np.testing.assert_allclose(own.mean(axis=(1, 2))[differs], lam.numpy()[differs], atol=1e-6)
        assert len(set(lam.tolist())) == 1 or arm not in PER_BATCH
        mixed_at_all += int((lam < 1).sum())
    assert mixed_at_all >= 20


def test_random_peaks_have_the_boxes_of_saliencymix_elsewhere(jpeg_images):
    images = np.stack([np.resize(image, (32, 32, 3)) for image in jpeg_images[:8]])
    rng = np.random.default_rng(0)
    arguments = images, rng.permutation(8), rng.random(8).astype(np.float32), rng.random((8, 2))
    made = {
        arm: ARMS[arm].mix(*arguments, algorithm="auto", paste=lambda images, *rest, **more: images)
        for arm in ("random peak", "saliencymix paper")
    }
    boxes = [found.boxes for found in made.values()]
    sizes = [box[:, 2:] - box[:, :2] for box in boxes]
    assert np.array_equal(*sizes)
    assert not np.array_equal(*boxes)
    centre = (arguments[3] * 32).astype(int)
    assert ((boxes[0][:, :2] <= centre) & (centre < boxes[0][:, 2:]))[sizes[0].min(axis=1) > 0].all()


@pytest.mark.parametrize(("arm", "expected"), [("cutmix", 0.30), ("random peak", 0.48)])
def test_boxes_that_are_cut_off_mix_less(arm, expected):
    """As docs/accuracy.md says: equal draws of `lam` lead to different shares of pixels."""
    draws = next(data.draws_of_epoch(0, 1, 20_000, 20_000, prob=1.0, augment=False))
    images = np.zeros((20_000, 32, 32, 1), np.uint8)
    random_numbers = draws.source_index, draws.lam, draws.point
    mixed = ARMS[arm].mix(images, *random_numbers, algorithm="auto", paste=lambda images, *rest, **more: images)
    assert 1 - mixed.lam.mean() == pytest.approx(expected, abs=0.01)


def test_shuffled_peaks_are_those_of_other_images(jpeg_images):
    images = np.stack([np.resize(image, (32, 32, 3)) for image in jpeg_images])
    count = len(images)
    lam = np.full(count, 0.9, np.float32)
    options = {"algorithm": "auto", "paste": lambda images, *rest, **more: images}
    arguments = lam, np.zeros((count, 2))
    own = ARMS["saliencymix paper"].mix(images, np.roll(np.arange(count), -1), *arguments, **options)
    shuffled = ARMS["shuffled peaks"].mix(images, np.arange(count), *arguments, **options)
    assert np.array_equal(shuffled.boxes, own.boxes)
    assert len(np.unique(own.boxes, axis=0)) > 1


# ---- the saliency of the released code -------------------------------------------------------------------------------


def test_as_released_agrees_with_opencv_fed_with_floats(jpeg_images):
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "saliency"):
        pytest.skip("this cv2 has no module saliency")
    rng = np.random.default_rng(0)
    tiles = []
    while len(tiles) < 200:  # with sizes, textures and flat parts of photographs
        image = jpeg_images[len(tiles) % len(jpeg_images)]
        y, x = (rng.integers(0, max(side - 32, 1)) for side in image.shape[:2])
        tile = image[y : y + 32, x : x + 32]
        tiles.append(np.pad(tile, [(0, 32 - tile.shape[0]), (0, 32 - tile.shape[1]), (0, 0)], mode="reflect"))
    images = np.stack(tiles)
    pixels = released.normalised(images)
    detector = cv2.saliency.StaticSaliencyFineGrained_create()
    expected = np.stack([detector.computeSaliency(image)[1] for image in pixels])
    np.testing.assert_array_equal(released.maps_of_floats(pixels), expected)
    # The released code takes the first maximum of the 8-bit map.
    peaks = (expected * 255).astype(np.uint8).reshape(200, -1).argmax(axis=1)
    one_hot = released.as_released(images)
    assert one_hot.sum() == 200
    assert np.array_equal(one_hot.reshape(200, -1).argmax(axis=1), peaks)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_a_crop_is_that_of_the_image_padded_by_reflection(cifar):
    images = cifar[0].images
    (draws, *_) = data.draws_of_epoch(1, 1, 40, 16, prob=0.5, augment=True)
    assert {0, 8} <= set(draws.corner.ravel().tolist())
    assert 0 < draws.flipped.sum() < 16
    found = data.augmented(images, draws)
    for made, which, (y, x), flipped in zip(found, draws.index, draws.corner, draws.flipped, strict=True):
        padded = np.pad(images[which], [(4, 4), (4, 4), (0, 0)], mode="reflect")[y : y + 32, x : x + 32]
        assert np.array_equal(made, padded[:, ::-1] if flipped else padded)


def test_without_augmentation_images_stay_as_they_are(cifar):
    for draws in data.draws_of_epoch(1, 1, 40, 16, prob=0.5, augment=False):
        assert np.array_equal(data.augmented(cifar[0].images, draws), cifar[0].images[draws.index])


def test_draws_have_the_distributions_that_they_promise():
    draws = next(data.draws_of_epoch(0, 1, 20_000, 20_000, prob=0.25, augment=True))
    mixed = draws.lam < 1
    assert abs(mixed.mean() - 0.25) < 0.02
    for values in (draws.lam[mixed], draws.point[:, 0], draws.point[:, 1]):
        assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert np.bincount(draws.corner.ravel(), minlength=9).min() > 0.9 * 40_000 / 9
    assert np.array_equal(np.sort(draws.index), np.arange(20_000))
    assert np.array_equal(np.sort(draws.source_index), np.arange(20_000))
    other = next(data.draws_of_epoch(0, 2, 20_000, 20_000, prob=0.25, augment=True))
    assert not np.array_equal(draws.index, other.index)


def test_the_first_images_of_each_class(cifar):
    train = cifar[0]
    chosen = data.first_of_each_class(train, 20)
    assert np.bincount(chosen.labels).tolist() == [2] * 10
    for label in range(10):
        expected = train.images[train.labels == label][:2]
        assert np.array_equal(chosen.images[chosen.labels == label], expected)
    with pytest.raises(ValueError, match=r"--images must be a multiple of 10, of at most 50, got 41"):
        data.first_of_each_class(train, 41)
    with pytest.raises(ValueError, match=r"at most 50, got 60"):
        data.first_of_each_class(train, 60)


def test_mosaics_hold_the_images_of_the_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(mosaics, "_SIDE", 3)
    folder = write_cifar(tmp_path, "cifar10", train=45, test=9)
    assert main_of(mosaics, folder, tmp_path / "out", monkeypatch=monkeypatch) is None
    for made, expected in zip(data.read_images(tmp_path / "out"), data.read_images(folder), strict=True):
        assert np.array_equal(made.images, expected.images)
        assert np.array_equal(made.labels, expected.labels)
        assert made.labels.dtype == expected.labels.dtype
        assert made.classes == expected.classes
    with Image.open(tmp_path / "out" / "data_batch_2.webp") as mosaic:
        assert np.array_equal(np.asarray(mosaic)[32:64, 64:96], read_cifar(folder, "cifar10")[0].images[9 + 5])
    (tmp_path / "out" / "test_batch.webp").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_batch\.webp"):
        data.read_images(tmp_path / "out")


def test_archives_of_bounded_size_are_the_folder_again(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for number in range(60):
        path = folder / f"class{number % 3}" / f"{'long' * (number % 30)}{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.bytes(int(rng.integers(0, 9000))))
    main_of(pack, folder, tmp_path / "out", "--megabytes", 0.06, monkeypatch=monkeypatch)
    archives = sorted((tmp_path / "out").iterdir())
    assert len(archives) > 3
    assert all(f"{path}: " in capsys.readouterr().err for path in archives[:1])
    for path in reversed(archives):
        assert path.stat().st_size <= 60_000
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path / "again", filter="data")
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.jpg")}
    again = tmp_path / "again" / "photos"
    assert {path.relative_to(again): path.read_bytes() for path in again.rglob("*.jpg")} == files
    with pytest.raises(SystemExit, match=r"--megabytes must be enough for each file, got 0.0125 with "):
        main_of(pack, folder, tmp_path / "small", "--megabytes", 0.0125, monkeypatch=monkeypatch)
    with pytest.raises(SystemExit, match=r"OUT must have no archives of photos, got .*photos-1\.tar"):
        main_of(pack, folder, tmp_path / "out", monkeypatch=monkeypatch)


def main_of(module, *words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    program.run(module.main)


# ---- networks and measures -------------------------------------------------------------------------------------------


def test_operations_of_a_network_are_those_of_its_layers():
    width = 8
    convolutions = [(3, 1, 32), (1, 2, 32), (2, 2, 16), (2, 2, 16), (2, 4, 16), (4, 8, 8), (8, 8, 4), (8, 8, 4)]
    expected = 2 * 8 * width * 10
    for inputs, outputs, size in convolutions:
        channels = inputs if inputs == 3 else inputs * width
        expected += 2 * 9 * channels * outputs * width * size**2
    assert operations_of("resnet9", width) == expected
    assert operations_of("resnet18", None) == pytest.approx(2 * 0.556e9, rel=0.01)
    assert make_network("resnet9", width, 7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_calibration_error_against_a_loop():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(500, 10)) * 2)
    labels = torch.from_numpy(rng.integers(0, 10, 500))
    confidences, right = [], []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        exponentials = [math.exp(value) for value in row]
        confidences.append(max(exponentials) / sum(exponentials))
        right.append(row.index(max(row)) == label)
    expected = 0.0
    for bin_ in range(15):
        inside = [i for i, confidence in enumerate(confidences) if bin_ / 15 < confidence <= (bin_ + 1) / 15]
        if inside:
            gap = sum(confidences[i] for i in inside) / len(inside) - sum(right[i] for i in inside) / len(inside)
            expected += abs(gap) * len(inside) / 500
    assert calibration_error(logits, labels) == pytest.approx(100 * expected, abs=1e-3)
    sure = torch.full((4, 2), -1e3, dtype=torch.float64)
    sure[:, 0] = 1e3
    assert calibration_error(sure, torch.tensor([0, 0, 0, 1])) == 25


def test_a_network_learns(cifar):
    found = Trainer(*cifar, dataclasses.replace(SMALL, width=8, epochs=12, lr=0.1), CPU).run("none", 0)
    assert found["top1_best"] >= 60  # ten classes that differ in colour
    assert found["top1_best"] >= found["top1_last"]
    assert set(found["fgsm_top1"]) == {"2/255", "8/255"}
    assert found["fgsm_top1"]["8/255"] <= found["top1_last"]
    assert 0 <= found["ece"] <= 100
    assert 0 < found["training_seconds"] < found["seconds"]


def test_a_training_that_diverges_is_no_result(cifar):
    with pytest.raises(ValueError, match=r"--lr must be one at which no run diverges, got 1e\+08 with cutmix, seed 2"):
        trainer(cifar, lr=1e8).run("cutmix", 2)


# ---- the file --------------------------------------------------------------------------------------------------------

FOUND = {"top1_last": 50.0, "top1_best": 51.0, "best_epoch": 2, "ece": 3.0, "seconds": 1.0}
FOUND |= {"fgsm_top1": {"2/255": 20.0, "8/255": 1.0}, "training_seconds": 0.5}
CONDITIONS = {"device": "CPU, 1 thread", "cpu": "x", "date": "2026-01-01", "commit": "c" * 40, "command": "python"}
CONDITIONS |= {"versions": {"torch": "2"}}


def test_a_study_runs_what_is_missing_seed_by_seed(tmp_path):
    path = tmp_path / "x.jsonl"
    arms = ["none", "cutmix", "random peak"]
    study = Study(path, SMALL)
    done = []
    for pair in study.missing(arms, 3):
        study.add(pair, FOUND, CONDITIONS)
        done.append(pair)
        counts = [sum(arm == name for arm, _ in done) for name in arms]
        assert max(counts) - min(counts) <= 1
        assert not set(Study(path, SMALL).missing(arms, 3)) & set(done)
    assert len(done) == 9
    assert Study(path, SMALL).missing(arms, 4) == [(arm, 3) for arm in arms]


def test_parts_share_the_pairs_whatever_is_done_already(tmp_path):
    study = Study(tmp_path / "x.jsonl", SMALL)
    arms = list(ARMS)
    study.add(("none", 0), FOUND, CONDITIONS)
    parts = [study.missing(arms, 5, (number, 3)) for number in (1, 2, 3)]
    assert sorted(itertools.chain(*parts)) == sorted(study.missing(arms, 5))
    study.add(parts[1][0], FOUND, CONDITIONS)
    assert study.missing(arms, 5, (1, 3)) == parts[0]


def test_a_line_that_was_cut_is_run_again_and_nothing_else_is_lost(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    study = Study(path, SMALL)
    for arm in ("none", "cutmix"):
        study.add((arm, 0), FOUND, CONDITIONS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    study = Study(path, SMALL)
    assert study.missing(["none", "cutmix"], 1) == [("cutmix", 0)]
    assert "line 2 is incomplete and is skipped" in capsys.readouterr().err
    study.add(("cutmix", 0), FOUND, CONDITIONS)
    assert [(run["arm"], run["seed"]) for run in read_runs(path)] == [("none", 0), ("cutmix", 0)]
    # A process that reads the file while another one writes to it may add an empty line.
    path.write_bytes(whole.replace(b"\n", b"\n\n"))
    capsys.readouterr()
    assert len(read_runs(path)) == 2
    assert not capsys.readouterr().err


def test_processes_that_write_at_the_same_time_lose_no_run(tmp_path):
    path = tmp_path / "x.jsonl"
    studies = [Study(path, SMALL) for _ in range(4)]  # the file is opened for each run, as in separate processes

    def write(number):
        for seed in range(25):
            studies[number].add((f"arm {number}", seed), FOUND, CONDITIONS)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    found = {(run["arm"], run["seed"]) for run in read_runs(path)}
    assert found == set(itertools.product([f"arm {number}" for number in range(4)], range(25)))


def test_a_file_of_other_settings_or_of_something_else_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    Study(path, SMALL).add(("none", 0), FOUND, CONDITIONS)
    with pytest.raises(ValueError, match=r"the runs of .*x\.jsonl have epochs 2, this call has 3"):
        Study(path, dataclasses.replace(SMALL, epochs=3))
    path.write_text('{"arm": "none"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl: line 1 is not a run"):
        read_runs(path)


# ---- the summary -----------------------------------------------------------------------------------------------------


def runs_of(**accuracies):
    return [
        {"arm": arm.replace("_", " "), "seed": seed, **FOUND, **CONDITIONS, "top1_last": top1}
        | {"settings": dataclasses.asdict(SMALL)}
        for arm, found in accuracies.items()
        for seed, top1 in enumerate(found)
    ]


def test_differences_are_taken_seed_by_seed():
    runs = runs_of(cutmix=[10.0, 20.0, 30.0, 40.0], random_peak=[11.0, 21.5, 30.5, 41.0], none=[5.0, 25.0])
    found = summary.difference(runs, "random peak", "cutmix")
    expected = stats.ttest_1samp([1.0, 1.5, 0.5, 1.0], 0).confidence_interval(0.95)
    assert found == pytest.approx((1.0, expected.low, expected.high, 4))
    assert found.sign == "+"
    assert summary.difference(runs, "cutmix", "random peak").sign == "-"
    assert summary.difference(runs, "none", "cutmix").seeds == 2
    assert summary.difference(runs, "none", "cutmix").sign == "0"
    # Without pairing, the two arms would not differ significantly.
    assert summary.level(runs, "random peak").low < summary.level(runs, "cutmix").high


def test_tables_say_what_was_not_run_and_the_plot_is_drawn():
    runs = runs_of(cutmix=[10.0, 20.0], none=[5.0, 26.0], random_peak=[7.0])
    lines = {line.split("|")[1].strip(): line for line in summary.arms_table(runs).splitlines() if "|" in line}
    assert "| 2 | 15.50 (-117.92 to 148.92) | +0.50 (-69.38 to +70.38) 0 |" in lines["`none`"]
    assert "| 1 | 7.00 | -3.00 |" in lines["`random peak`"]
    assert lines["`as released`"].endswith("| 0 | not run | not run |")
    assert "| `as released` | not run | not run | not run | not run |" in summary.measures_table(runs)
    questions = summary.contrasts_table(runs)
    assert "| `cutmix` - `none` | -0.50 (-70.38 to +69.38) 0 |" in questions
    assert "| `as released` - `cutmix per batch` | not run |" in questions
    assert summary.plot(runs).axes[0].get_yticklabels()[1].get_text() == "random peak"
    assert "5 runs of a resnet9 of width 4 on CPU, 1 thread" in summary.conditions(runs)
    assert summary.conditions(runs[:1]).startswith("1 run of a resnet9")
    runs[0]["command"] = "python --part 1/2"
    assert summary.conditions(runs).endswith(" commit ccccccc. `python --part 1/2`, `python`")


# ---- the program -----------------------------------------------------------------------------------------------------


def test_the_program_goes_on_and_shows_what_it_has(tmp_path, monkeypatch, capsys):
    folder = write_cifar(tmp_path, "cifar10", train=50, test=20)
    path = tmp_path / "x.jsonl"
    small = ("--width", 4, "--images", 40, "-b", 8, "--dry", "--device", "cpu", "--precision", "fp32")
    words = (folder, "-o", path, "--arms", "none", "cutmix", *small)

    def run(*options):
        main_of(accuracy_program, *options, monkeypatch=monkeypatch)
        return capsys.readouterr()

    first = run_program("-m", "benchmarks.accuracy", *map(str, words), "--seeds", "1")
    assert "[2/2] seed 0, cutmix: top-1 " in first.stderr
    before = path.read_text()
    second = run(*words, "--seeds", 2, "--part", "1/2")
    assert path.read_text().startswith(before)
    runs = read_runs(path)
    assert [(run["arm"], run["seed"]) for run in runs] == [("none", 0), ("cutmix", 0), ("none", 1)]
    for name in ("date", "device", "cuda", "driver", "commit", "versions", "cpu", "torch_threads"):
        assert name in runs[0]
    assert "python -m benchmarks.accuracy DATA --arms none cutmix " in runs[0]["command"]
    shown = run("-o", path).out
    assert shown == second.out
    assert "| `cutmix` | CutMix, with a box and a weight for each sample | 1 |" in shown
    path.write_text("".join(json.dumps({**run, "seconds": 1e6}) + "\n" for run in runs))
    assert "3 runs are left for a later call: --minutes 5" in run(*words, "--seeds", 3, "--minutes", 5).err
    assert len(read_runs(path)) == 3
    with pytest.raises(SystemExit, match=r"^error: --output: the runs of .* have lr 0.00625, this call has 1.0$"):
        run(*words, "--lr", 1)


def test_options_that_contradict_each_other_are_refused(monkeypatch, capsys):
    for words, text in (
        (("--network", "resnet18", "--width", 16), "--width must be left out with --network resnet18, got 16"),
        (
            ("--images", 40, "-b", 41),
            "--images must fill at least 5 batches of 41 in 24 epochs, got 40",
        ),
    ):
        with pytest.raises(SystemExit):
            main_of(accuracy_program, "--plan", 100, *words, monkeypatch=monkeypatch)
        assert text in capsys.readouterr().err


def test_a_plan_trains_nothing(monkeypatch, capsys):
    main_of(accuracy_program, "--plan", 100, "--epochs", 20, monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert shown.startswith("A run takes 2,")
    assert "50 runs are" in shown


@pytest.mark.gpu
@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "as released"])  # a GPU sums floats in another order
def test_batches_on_a_gpu_are_those_on_a_cpu(cifar, arm):
    settings = dataclasses.replace(SMALL, prob=1.0)
    here, there = (Trainer(*cifar, settings, torch.device(name)).batches(arm, 3, 1) for name in ("cpu", "cuda"))
    for own, other in zip(here, there, strict=True):
        for expected, found in zip(own, other, strict=True):
            assert found.is_cuda
            # A pixel of another image would differ by 1/68 or more. Weights by saliency differ by rounding in the FFT.
            torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_a_run_on_a_gpu(cifar):
    settings = dataclasses.replace(SMALL, width=8, epochs=12, lr=0.1, precision="bf16")
    trained = Trainer(*cifar, settings, torch.device("cuda"))
    for arm in ("none", "as released", "saliency labels"):
        found = trained.run(arm, 0)
        assert found["top1_best"] >= (60 if arm == "none" else 20)
        assert 0 <= found["ece"] <= 100
