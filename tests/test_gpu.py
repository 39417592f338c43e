"""What only a GPU can show: array libraries, kernels and all routes through a pipeline agree."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def

import dali_saliencymix.fn as dsfn
from dali_saliencymix import DETECTORS, cutmix, draw_params, saliencymix
from dali_saliencymix._routes import GpuRoute, on_gpu
from dali_saliencymix.datasets.image_folder import list_image_folder
from dali_saliencymix.datasets.sample_data import make_sample_data
from dali_saliencymix.loaders.imagenet import training_loader
from dali_saliencymix.options import MixOptions

pytestmark = pytest.mark.gpu


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
    # Several times, and several pipelines after it: streams come back in any of them.
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
    assert seen[0][1] != 0  # DALI's own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_sample_data(root, train=4, val=1)
    return list_image_folder(root / "train")


@pytest.mark.parametrize(("fp16", "channels_last"), [(False, False), (True, True)])
@pytest.mark.parametrize("algorithm", ["array", "kernel"])
@pytest.mark.parametrize(
    "route", [{"whole_batches": True}, {"normalise": True}, vars(GpuRoute(True, True, True, True))]
)
def test_every_route_of_the_loader_gives_the_same_batches(folder, route, algorithm, fp16, channels_last):
    def batches(algorithm, **route):
        with on_gpu(**route):
            loader = training_loader(
                folder,
                batch_size=8,
                num_threads=2,
                device=torch.device("cuda", 0),
                crop_size=64,
                mix=MixOptions(saliency="fine_grained", prob=0.75, algorithm=algorithm),
                fp16=fp16,
                channels_last=channels_last,
            )
            return [batch for _ in range(2) for batch in loader]

    for ours, theirs in zip(batches(algorithm, **route), batches("array"), strict=True):
        for our_part, their_part in zip(ours, theirs, strict=True):
            assert our_part.dtype == their_part.dtype
            assert our_part.stride() == their_part.stride()
            torch.testing.assert_close(our_part, their_part, rtol=2e-3 if fp16 else 1e-5, atol=2e-3 if fp16 else 1e-5)
