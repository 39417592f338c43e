"""Tests that need a GPU: array libraries, kernels and all routes through a pipeline agree."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from shared.batches import assert_equal_batches

import dali_saliencymix.fn as dsfn
from benchmarks.gpu_checks import TAKES_A_BATCH
from dali_saliencymix import DETECTORS, cutmix, draw_params, saliencymix
from dali_saliencymix._dali import python_operator
from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.loaders import imagenet
from dali_saliencymix.loaders.imagenet import training_loader
from dali_saliencymix.options import MixOptions

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cupy():
    return pytest.importorskip("cupy")


@pytest.fixture(scope="module")
def batch(jpeg_images):
    images = np.stack([image for image in jpeg_images if image.shape == jpeg_images[0].shape])
    return images, *draw_params(np.random.default_rng(2), len(images))


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_both_libraries_give_the_same_maps(cupy, batch, name):
    detector = DETECTORS[name]
    ours = detector(cupy.asarray(batch[0])).get()
    # fine_grained is exact; the others go through float32 sums, or FFTs, in another order.
    np.testing.assert_allclose(ours, detector(batch[0]), atol=0 if name == "fine_grained" else 1e-3)


@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("box", ["fit", "clip"])
def test_both_libraries_mix_alike(cupy, batch, box, per_batch):
    options = {"box": box, "per_batch": per_batch}
    on_gpu = [cupy.asarray(array) for array in batch]
    centre = np.random.default_rng(3).random((len(batch[0]), 2))
    fine_grained = {"saliency": "fine_grained", **options}
    for ours, theirs in (
        (saliencymix(*on_gpu, **fine_grained), saliencymix(*batch, **fine_grained)),
        (cutmix(*on_gpu, cupy.asarray(centre), **options), cutmix(*batch, centre, **options)),
    ):
        for our_array, their_array in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(our_array.get(), their_array)


@pytest.mark.parametrize("destination", ["corresponding", "salient"])
@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_kernels_and_array_operations_mix_alike(cupy, batch, name, destination):
    on_gpu = [cupy.asarray(array) for array in batch]
    options = {"saliency": name, "destination": destination}
    by_kernel, by_array = (saliencymix(*on_gpu, algorithm=algorithm, **options) for algorithm in ("kernel", "array"))
    for ours, theirs in zip(by_kernel, by_array, strict=True):
        np.testing.assert_array_equal(ours.get(), theirs.get())


@pipeline_def(batch_size=6, num_threads=1, device_id=0)
def mixed(images, wrong, saliency="spectral_residual"):
    batch = fn.external_source(lambda: list(images), layout="HWC").gpu()
    labels = fn.external_source(lambda: np.arange(len(images)))
    return dsfn.saliencymix(batch / 255 if wrong else batch, labels, saliency=saliency)[0], batch


def test_after_an_error_in_one_pipeline_others_work(batch):
    # Repeat with several pipelines, since a stream may be reused in any of them.
    for _ in range(3):
        with pytest.raises(RuntimeError, match="images must be uint8"):
            mixed(batch[0], wrong=True).run()
        gc.collect()
    for _ in range(4):
        pipeline = mixed(batch[0], wrong=False)
        for _ in range(3):
            pixels, originals = (np.array(output.as_cpu().as_tensor()) for output in pipeline.run())
            assert pixels.shape == originals.shape
            np.testing.assert_array_equal(originals, batch[0])
            assert (pixels != originals).any()


def test_what_cupy_keeps_for_a_thread_is_kept_from_batch_to_batch(cupy, batch):
    kept, seen = threading.local(), []

    def detector(images):
        seen.append((getattr(kept, "calls", 0), cupy.cuda.get_current_stream().ptr))
        kept.calls = seen[-1][0] + 1
        return images[..., 0].astype(cupy.float32)

    pipeline = mixed(batch[0], wrong=False, saliency=detector)
    for _ in range(5):
        pipeline.run()
    del pipeline
    gc.collect()
    first = seen[0][0]
    assert [calls for calls, _ in seen[:5]] == list(range(first, first + 5))
    assert len({stream for _, stream in seen}) == 1
    assert seen[0][1] != 0  # DALI's own stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_sample_data(root, train=4, val=1)
    return list_image_folder(root / "train")


DEVICE = torch.device("cuda", 0)


@pytest.fixture(params=["whole batches", "samples"])
def operator(request, monkeypatch):
    """Run the tests with each of DALI's operators for Python functions."""
    if request.param == "samples":
        monkeypatch.setattr(python_operator, "whole_batches_work", lambda: False)


def loader_of(folder, *, saliency="fine_grained", **options):
    """Return a training loader on the GPU with 4 batches per epoch."""
    mix = MixOptions(saliency=saliency, prob=0.75, algorithm=options.pop("algorithm", "auto"))
    sizes = {"batch_size": 8, "num_threads": 2, "crop_size": 64}
    return training_loader(folder, device=DEVICE, mix=mix, **sizes, **options)


def fetched(batch):
    """Return a batch in host memory, after the GPU has finished."""
    torch.cuda.synchronize()
    return [tensor.cpu() for tensor in batch]


def batches_of(loader, epochs):
    """Yield the batches of some epochs."""
    for _ in range(epochs):
        yield from loader


@pytest.mark.parametrize(("fp16", "channels_last"), [(False, False), (True, True)])
@pytest.mark.parametrize("algorithm", ["array", "kernel"])
def test_every_route_of_the_loader_gives_the_same_batches(
    folder, operator, monkeypatch, algorithm, fp16, channels_last
):
    options = {"fp16": fp16, "channels_last": channels_last}
    ours = list(map(fetched, batches_of(loader_of(folder, algorithm=algorithm, **options), 2)))
    monkeypatch.setattr(python_operator, "whole_batches_work", lambda: False)
    monkeypatch.setattr(imagenet, "pays_in_the_mix", lambda *_: False)
    theirs = list(map(fetched, batches_of(loader_of(folder, algorithm="array", **options), 2)))
    tolerance = 2e-3 if fp16 else 1e-5
    for batch, other in zip(ours, theirs, strict=True):
        for our_part, their_part in zip(batch, other, strict=True):
            assert our_part.dtype == their_part.dtype
            assert our_part.stride() == their_part.stride()
            torch.testing.assert_close(our_part, their_part, rtol=tolerance, atol=tolerance)


def test_the_seed_decides_the_batches(folder, operator):
    ours, theirs, others = (list(map(fetched, batches_of(loader_of(folder, seed=seed), 2))) for seed in (1, 1, 2))
    assert_equal_batches(ours, theirs)
    assert not all(torch.equal(one[0], other[0]) for one, other in zip(ours, others, strict=True))


def test_a_state_taken_anywhere_leads_to_the_batch_that_comes_next(folder, operator):
    loader, batches, states = loader_of(folder), [], []
    for batch in batches_of(loader, 2):
        batches.append(fetched(batch))
        states.append(loader.state())
    for position in (1, 3, 6):
        restored = loader_of(folder, state=states[position - 1])
        rest = [fetched(batch) for batch in restored]
        assert_equal_batches(rest, batches[position : position + len(rest)])


def test_batches_that_are_held_keep_their_pixels(folder, operator):
    held, copies = [], []
    for batch in batches_of(loader_of(folder), 5):
        held.append(batch)
        copies.append(fetched(batch))
    assert len(held) == 20
    assert_equal_batches(list(map(fetched, held)), copies)


def busy(milliseconds):
    """Keep the current stream of PyTorch busy for about this time."""
    torch.cuda._sleep(int(1.5e6 * milliseconds))  # cycles


def slow_detector(images):
    """Return maps that the GPU finishes long after the call."""
    import cupy

    with torch.cuda.stream(torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)):
        busy(30)
    return images[..., 1].astype(cupy.float32)


@pytest.mark.parametrize("stream", ["default", "own"])
def test_a_batch_is_whole_when_it_is_read_at_once(folder, operator, stream):
    make = functools.partial(loader_of, folder, saliency=slow_detector)
    expected = list(map(fetched, batches_of(make(), 2)))
    with torch.cuda.stream(torch.cuda.Stream() if stream == "own" else torch.cuda.default_stream()):
        copies = [[tensor.clone() for tensor in batch] for batch in batches_of(make(), 2)]  # without synchronisation
    assert_equal_batches(list(map(fetched, copies)), expected)


@pytest.mark.parametrize("stream", ["default", "own"])
def test_a_batch_may_be_dropped_while_the_gpu_has_yet_to_read_it(folder, operator, stream):
    expected = list(map(fetched, batches_of(loader_of(folder), 3)))
    copies = []
    with torch.cuda.stream(torch.cuda.Stream() if stream == "own" else torch.cuda.default_stream()):
        for batch in batches_of(loader_of(folder), 3):
            busy(30)  # like the previous training step, which runs asynchronously
            copies.append([tensor.clone() for tensor in batch])
            del batch
    assert_equal_batches(list(map(fetched, copies)), expected)


def test_bad_files_are_named_and_left_out(folder, tmp_path, capfd):
    contents = {7: Path(folder.files[7]).read_bytes()[:24], 11: b"", 22: b"no picture\n" * 40}
    files = list(folder.files)
    for index, content in contents.items():
        files[index] = str(tmp_path / f"{index}.jpg")
        Path(files[index]).write_bytes(content)
    loader = loader_of(replace(folder, files=files), max_bad_batches=3)
    batches = list(map(fetched, batches_of(loader, 2)))
    assert len(batches) == 2 * len(loader) == 8
    assert all(images.isfinite().all() for images, *_ in batches)
    assert sorted(loader.bad_files) == sorted(files[index] for index in contents)
    said = capfd.readouterr().err
    assert all(f": {file}: " in said for file in loader.bad_files)


@pytest.mark.parametrize("what", TAKES_A_BATCH)
def test_a_program_that_has_taken_a_batch_ends_by_itself(folder, what):
    command = [sys.executable, "-c", TAKES_A_BATCH[what], str(folder.root)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=80, check=False)
    assert (ended.returncode, "64" in ended.stdout) == (0, True), ended.stderr
    assert "Traceback" not in ended.stderr
