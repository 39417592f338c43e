"""What the public functions and loaders gave before the package was put in order, as digests: they still give the same.

``GOLDEN=write`` records them anew. The digests belong to one machine and its versions: they guard a reorganisation,
and no other.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar_files import write_cifar
from nvidia.dali import fn, pipeline_def, types
from training_fixtures import TINY

import dali_saliencymix as dsm
import dali_saliencymix.fn as mix_fn
from dali_saliencymix import paste_normalised
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.loaders.data import open_data
from dali_saliencymix.loaders.processes import Processes
from dali_saliencymix.preview import save_preview
from dali_saliencymix.pytorch import NetworkSaliency, SaliencyMix
from dali_saliencymix.training.arguments import parse_arguments

pytest_plugins = ["training_fixtures"]
FILE = Path(__file__).with_name("golden.json")
SIZES = [(5, 37, 23, 3), (4, 96, 128, 3), (3, 64, 64, 1), (6, 32, 32, 3), (1, 70, 70, 3)]


def digest(*values) -> str:
    found = hashlib.blake2b(digest_size=12)

    def add(value):
        if isinstance(value, torch.Tensor):
            value = value.detach().numpy()
        if isinstance(value, dict):
            value = [part for item in sorted(value.items()) for part in item]
        if isinstance(value, tuple | list):
            for part in value:
                add(part)
        elif isinstance(value, np.ndarray):
            found.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        else:
            found.update(repr(value).encode())

    add(values)
    return found.hexdigest()


def pictures(shape) -> np.ndarray:
    rng = np.random.default_rng(shape)
    smooth = rng.normal(size=shape).cumsum(1).cumsum(2)
    smooth -= smooth.min(axis=(1, 2), keepdims=True)
    return (255 * smooth / smooth.max(axis=(1, 2), keepdims=True)).astype(np.uint8)


def array_cases():
    for shape in SIZES:
        images = pictures(shape)
        count, height, width, _ = shape
        params = dsm.draw_mix_params(
            np.random.default_rng(7), count, modes={"saliencymix": 2, "cutmix": 1, "mixup": 1}, prob=0.8
        )
        yield f"draw_mix_params {shape}", params
        source_index, lam = dsm.draw_params(np.random.default_rng(3), count, alpha=0.7, prob=0.9)
        yield f"draw_params {shape}", (source_index, lam)
        for algorithm in ("array", "kernel"):
            for name in dsm.DETECTORS:
                yield f"{name} {algorithm} {shape}", dsm.get_detector(name, algorithm=algorithm)(images)
        maps = dsm.fine_grained(images)
        for least, algorithm in itertools.product((False, True), ("array", "kernel")):
            peaks = dsm.saliency_peaks(maps, height, width, least=least, algorithm=algorithm)
            yield f"saliency_peaks {least} {algorithm} {shape}", peaks
        for box in ("fit", "clip"):
            boxes = dsm.boxes_at(peaks, lam, height, width, box=box)
            yield f"boxes_at {box} {shape}", boxes
            pasted = dsm.paste_boxes(images, source_index, boxes)
            yield f"paste_boxes {box} {shape}", (pasted, dsm.kept_fraction(boxes, height, width))
        moved = dsm.boxes_moved_to(boxes, dsm.points_at(params.point, height, width), height, width)
        yield f"boxes_moved_to {shape}", moved
        for layout, dtype, algorithm in itertools.product(("CHW", "HWC"), ("float32", "float16"), ("array", "kernel")):
            options = {"mean": [110.0, 120.5, 99.0][: shape[3]], "std": [50.0, 61.0, 57.5][: shape[3]]}
            options |= {"layout": layout, "dtype": dtype, "algorithm": algorithm, "mirror": source_index % 2}
            got = paste_normalised(images, source_index, moved, source_boxes=boxes, **options)
            yield f"paste_normalised {layout} {dtype} {algorithm} {shape}", got
        yield f"blend_images {shape}", dsm.blend_images(images, source_index, lam)
        for preset, source, destination, box, per_batch in itertools.product(
            dsm.PRESETS, (None, "non_salient"), (None, "salient", "random"), (None, "clip"), (None, True)
        ):
            options = {"preset": preset, "source": source, "destination": destination, "box": box}
            options |= {"per_batch": per_batch}
            at = {"point": params.point} if destination == "random" else {}
            yield f"saliencymix {options} {shape}", dsm.saliencymix(images, source_index, lam, **at, **options)
            yield f"mix {options} {shape}", dsm.mix(images, *params, **options)
        yield f"saliencymix array {shape}", dsm.saliencymix(images, source_index, lam, algorithm="array")
        given = dsm.points_at(params.point, height, width)
        yield f"saliencymix peaks {shape}", dsm.saliencymix(images, source_index, lam, peaks=given)
        for box, per_batch in itertools.product(("fit", "clip"), (False, True)):
            options = {"box": box, "per_batch": per_batch}
            yield f"cutmix {options} {shape}", dsm.cutmix(images, source_index, lam, params.point, **options)
        yield f"mixup {shape}", dsm.mixup(images, source_index, lam)
        labels = np.arange(count)
        targets = dsm.soft_labels(labels, labels[source_index], lam, num_classes=9, smoothing=0.1)
        yield f"soft_labels {shape}", targets


def test_arrays(golden):
    golden("arrays", array_cases())


def fn_cases(root):
    @pipeline_def(batch_size=6, num_threads=2, device_id=None, seed=11, enable_checkpointing=True)
    def pipeline(mixed):
        jpegs, labels = fn.readers.file(file_root=str(root / "train"), random_shuffle=True, seed=4, name="reader")
        images = fn.resize(fn.decoders.image(jpegs), size=(48, 40))
        return mixed(images, labels)

    mean, std = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]

    def normalised(function, **options):
        def mixed(images, labels):
            normalise = mix_fn.Normalise(mean, std, fn.random.coin_flip(), dtype=types.FLOAT)
            return function(images, labels, normalise=normalise, **options)

        return mixed

    def with_peaks(images, labels):
        return mix_fn.saliencymix(images, labels, peaks=mix_fn.saliency_peaks(images, saliency="fine_grained"))

    def with_targets(images, labels):
        images, labels, source_labels, lam = mix_fn.cutmix(images, labels, prob=0.5)
        return images, mix_fn.soft_labels(labels, source_labels, lam, num_classes=8, smoothing=0.1)

    modes = {"saliencymix": 0.5, "cutmix": 0.2, "mixup": 0.3}
    cases = {
        "saliencymix": mix_fn.saliencymix,
        "saliencymix options": functools.partial(
            mix_fn.saliencymix, alpha=0.5, prob=0.6, preset="released-code", destination="random"
        ),
        "saliencymix salient": functools.partial(mix_fn.saliencymix, destination="salient", saliency="fine_grained"),
        "saliencymix normalised": normalised(mix_fn.saliencymix),
        "cutmix": functools.partial(mix_fn.cutmix, box="fit"),
        "cutmix normalised": normalised(mix_fn.cutmix, prob=0.5),
        "mixup": functools.partial(mix_fn.mixup, alpha=0.2),
        "mix": functools.partial(mix_fn.mix, modes=modes, alpha={"saliencymix": 1.0, "cutmix": 1.0, "mixup": 0.2}),
        "mix by batch": functools.partial(mix_fn.mix, modes=modes, choose="batch", prob=0.7, per_batch=True),
        "peaks": with_peaks,
        "targets": with_targets,
    }
    for name, mixed in cases.items():
        pipe = pipeline(mixed)
        yield f"fn {name}", [[np.array(output.as_tensor()) for output in pipe.run()] for _ in range(3)]


def test_operators(golden, data_folder):
    golden("fn", fn_cases(data_folder))


def pytorch_cases():
    images = torch.from_numpy(pictures((8, 40, 36, 3))).permute(0, 3, 1, 2).contiguous()
    labels = torch.arange(8)
    modes = {"saliencymix": 1.0, "mixup": 1.0}
    for name, options in {
        "default": {},
        "modes": {"modes": modes, "alpha": {"saliencymix": 1.0, "mixup": 0.3}, "choose": "batch"},
        "options": {"preset": "paper", "destination": "random", "prob": 0.5, "label_smoothing": 0.1},
    }.items():
        mix = SaliencyMix(num_classes=8, seed=5, **options)
        yield f"pytorch {name}", [mix(images, labels) for _ in range(3)]
        torch.manual_seed(3)
        mix = SaliencyMix(num_classes=8, **options)
        yield f"pytorch {name} collate", mix.collate(list(zip(images, range(8), strict=True)))
    torch.manual_seed(0)
    detector = NetworkSaliency(torch.nn.Conv2d(3, 1, 3, padding=1), size=32)
    yield "network saliency", detector(pictures((3, 40, 36, 3)))


def test_pytorch(golden):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    golden("pytorch", pytorch_cases())
    torch.set_num_threads(threads)


def loader_cases(root, cifar):
    sizes = ("--train-crop-size", "40", "--val-resize-size", "44", "--val-crop-size", "40", "-b", "8", "-j", "2")
    mixes = [
        ("--mix", "none"),
        ("--mix", "saliencymix"),
        ("--mix", "saliencymix", "--preset", "released-code", "--mix-prob", "0.5", "--color-jitter", "0.2"),
        ("--mix", "saliencymix", "--saliency", "fine_grained", "--destination", "random", "--channels-last"),
        ("--mix", "cutmix", "--mix-alpha", "0.5", "--box", "fit"),
        ("--mix", "mixup", "--per-batch", "--min-crop-area", "0.5", "--hflip-prob", "0"),
    ]
    for backend, mix, rank in itertools.product(("dali-cpu", "pytorch"), mixes, (0, 1)):
        options = ("--data-backend", backend, "--device", "cpu", "--seed", "3", *mix)
        yield f"folder {backend} {mix} {rank}", batches([str(root), *sizes, *options], rank)
        if "--color-jitter" in mix:
            continue
        options += ("--dataset", "cifar10", "-b", "4", "-j", "1")
        yield f"cifar {backend} {mix} {rank}", batches([str(cifar), *options], rank)
    options = ("--data-backend", "synthetic", "--device", "cpu", "--synthetic-steps", "2", "--synthetic-classes", "5")
    yield "synthetic", batches(["--device", "cpu", *sizes, *options], 0)


def batches(arguments, rank):
    options = parse_arguments(arguments).data
    processes = Processes(rank, rank, 2, torch.device("cpu"))
    data = open_data(options)
    loader = data.train_loader(options, processes)
    taken = [[part.clone() for part in batch] for batch in itertools.islice(loader, 2)]
    state = loader.state()
    taken += [[part.clone() for part in batch] for batch in itertools.islice(loader, 1)]
    resumed = data.train_loader(options, processes, state=state)
    again = [[part.clone() for part in batch] for batch in itertools.islice(resumed, 1)]
    val = [[part.clone() for part in batch] for batch in data.val_loader(options, processes)]
    return taken, again, val, data.fingerprint, data.mean, data.std


def test_loaders(golden, data_folder, tmp_path):
    write_cifar(tmp_path, "cifar10")
    golden("loaders", loader_cases(data_folder, tmp_path))


def training_cases(train_here, data_folder, tmp_path):
    for number, options in enumerate([
        ("--data-backend", "dali-cpu", "--model-ema", "--mix-off-epochs", "1"),
        ("--data-backend", "pytorch", "--mix", "cutmix", "--accumulation-steps", "2", "--amp", "--channels-last"),
        ("--data-backend", "dali-cpu", "--mix", "mixup", "--progressive-size", "24@0", "32@1", "--clip-grad-norm", "1"),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        ended = train_here(data_folder, *TINY, *options, "--output-dir", folder)
        assert ended.status == 0, ended.err
        saved = torch.load(folder / "checkpoint_last.pt", weights_only=False)
        weights = {name: value for name, value in saved["model"].items()}
        config = {name: value for name, value in saved["config"].items() if name not in ("output_dir", "data")}
        config = {name: value for name, value in config.items() if name not in ("train_dir", "val_dir")}
        yield f"train {options}", (weights, saved["totals"], saved["best_top1"], config, sorted(saved))


def test_training(golden, train_here, data_folder, tmp_path):
    golden("training", training_cases(train_here, data_folder, tmp_path))


def test_files(golden, tmp_path):
    make_sample_data(tmp_path / "sample", train=2, val=1, seed=3)
    files = sorted((tmp_path / "sample").rglob("*.jpg"))
    content = [(str(file.relative_to(tmp_path)), hashlib.sha1(file.read_bytes()).hexdigest()) for file in files]
    save_preview(tmp_path / "sample", tmp_path / "preview.png", count=3, size=48, modes=["saliencymix", "mixup"])
    save_preview(tmp_path / "sample", tmp_path / "compare.png", count=2, size=48, compare=True)
    pixels = [np.asarray(image_of(tmp_path / f"{name}.png")) for name in ("preview", "compare")]
    golden("files", [("sample-data", content), ("preview", pixels)])


def image_of(path):
    from PIL import Image

    return Image.open(path).convert("RGB")


@pytest.fixture
def golden():
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {}

    def check(group, cases):
        found = {name: digest(value) for name, value in cases}
        assert len(found) > 1
        if os.environ.get("GOLDEN") == "write":
            FILE.write_text(json.dumps({**recorded, group: found}, indent=0) + "\n")
            return
        was = recorded[group]
        assert [name for name in was if was[name] != found.get(name)] == []
        assert len(was) == len(found)

    return check
