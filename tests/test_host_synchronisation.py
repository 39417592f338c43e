"""The GPU path never makes the host wait for the GPU: it runs on a stand-in for CuPy that raises an error instead.

Results are compared bit-exactly with those on NumPy arrays, since the stand-in computes with NumPy and SciPy. Each
function is called twice: the first call may copy constants to the device, the second one must not.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from shared import kernels_on_cpu
from shared.cupy_stand_in import HostSynchronisation, ndarray, on_device, on_host, stand_in_for_cupy
from shared.kernels_on_cpu import launch
from torch.utils import dlpack

import dali_saliencymix.fn as dsfn
from benchmarks import bench_ops, timing
from benchmarks.accuracy.arms import ARMS
from benchmarks.accuracy.data import augmented, draws_of_epoch
from dali_saliencymix import (
    DETECTORS,
    MODES,
    _array,
    _routes,
    _tensors,
    blend_images,
    cutmix,
    get_detector,
    mix,
    mixup,
    paste_boxes,
    paste_normalised,
    pytorch,
    saliency_peaks,
    saliencymix,
    soft_labels,
)
from dali_saliencymix._array import LentStream
from dali_saliencymix._cuda import launch as cuda_launch
from dali_saliencymix._dali import bridge
from dali_saliencymix._dali import mix_nodes as dali_mix
from dali_saliencymix._dali import python_operator as dali_operator
from dali_saliencymix.options import DESTINATIONS

pytest_plugins = ["shared.kernels_on_cpu"]

COUNT, HEIGHT, WIDTH = 5, 24, 29
PER_BATCH = [False, True]
BOXES = ["fit", "clip"]
MEAN, STD = [120.0, 110.0, 100.0], [50.0, 51.0, 52.0]


@pytest.fixture
def cupy(monkeypatch):
    """Replace CuPy by the stand-in during the test, without kernels unless a test asks for them."""
    pytest.importorskip("cupy")
    module = stand_in_for_cupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    # Without a GPU and without Numba, "auto" selects array operations.
    monkeypatch.setattr(_routes, "is_host", lambda xp: True)
    monkeypatch.setattr(_routes, "_numba_is_installed", lambda: False)
    return module


def test_constants_are_made_once_for_each_device(monkeypatch):
    made, device = [], [0]
    monkeypatch.setattr(_array, "device_of", lambda xp: device[0])

    def build(value):
        made.append((device[0], value))
        return np.array(value)

    for device[0] in (0, 1, 0, 1):
        assert [int(_array.constant(np, build, value)) for value in (3, 4)] == [3, 4]
    assert made == [(0, 3), (0, 4), (1, 3), (1, 4)]


def pictures(channels=3, height=HEIGHT, width=WIDTH):
    """Return random images with some structure, and a constant one: (N, H, W, C) uint8."""
    images = kernels_on_cpu.pictures(COUNT, height, width, channels).copy()
    images[1] = 90
    return images


def drawn():
    """Return partners, lam and points for a batch; one image is not mixed and one is replaced completely."""
    rng = np.random.default_rng(7)
    lam = np.array([0.3, 0.9, 1.0, 0.0, 0.6], np.float32)
    return SimpleNamespace(source_index=np.array([2, 0, 3, 3, 1]), lam=lam, point=rng.random((COUNT, 2)))


def moved(value):
    """Return the arguments with NumPy arrays replaced by arrays of the stand-in."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(moved, value))
    return on_device(value) if isinstance(value, np.ndarray) else value


def arrays_of(result):
    """Return the arrays of a result (an array, or nested tuples and lists) as NumPy arrays."""
    if isinstance(result, (list, tuple)):
        return [array for part in result for array in arrays_of(part)]
    return [result if isinstance(result, np.ndarray) else on_host(result)]


def assert_same(ours, theirs):
    ours, theirs = arrays_of(ours), arrays_of(theirs)
    assert [(array.dtype, array.shape) for array in ours] == [(array.dtype, array.shape) for array in theirs]
    for our_array, their_array in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(our_array, their_array)


def called_twice(cupy, function, *args, **options):
    """Return the result of a function on the stand-in; the second call must not copy from the host."""
    args, options = moved(args), {name: moved(value) for name, value in options.items()}
    first = function(*args, **options)
    copies = cupy.copies_from_host
    second = function(*args, **options)
    assert cupy.copies_from_host == copies, "something is copied from host memory in each call"
    assert_same(second, arrays_of(first))
    return second


def assert_runs(cupy, function, *args, on_cpu=None, **options):
    """Require equal results on the stand-in and in host memory; `on_cpu` are extra options for the latter."""
    expected = function(*args, **options, **(on_cpu or {}))
    assert_same(called_twice(cupy, function, *args, **options), expected)


# --- Functions on arrays ---

# On a CPU, "kernel" is Numba's kernel, whose maps differ by rounding.
of_arrays = {"on_cpu": {"algorithm": "array"}}


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (70, 66)], ids=str)
@pytest.mark.parametrize("detector", DETECTORS)
def test_detectors_and_peaks(cupy, detector, size, channels):
    images = pictures(channels, *size)
    maps = get_detector(detector, algorithm="array")(images)
    assert_same(called_twice(cupy, DETECTORS[detector], images), maps)
    for least in (False, True):
        assert_runs(cupy, saliency_peaks, maps, *size, least=least, **of_arrays)


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
def test_peaks_of_other_maps(cupy, dtype):
    maps = np.random.default_rng(1).integers(0, 3, (COUNT, 6, 9)).astype(dtype)
    if dtype != "uint8":
        maps[0, 2:4] = np.nan
    assert_runs(cupy, saliency_peaks, maps, HEIGHT, WIDTH, **of_arrays)


@pytest.mark.parametrize("per_batch", PER_BATCH)
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("destination", DESTINATIONS)
@pytest.mark.parametrize("detector", DETECTORS)
def test_saliencymix(cupy, detector, destination, box, per_batch):
    given, images = drawn(), pictures()
    options = {"saliency": detector, "destination": destination, "box": box, "per_batch": per_batch}
    if destination == "random":
        options["point"] = given.point
    for source in ("salient", "non_salient"):
        arguments = images, given.source_index, given.lam
        assert_runs(cupy, saliencymix, *arguments, source=source, **options, **of_arrays)


@pytest.mark.parametrize("per_batch", PER_BATCH)
@pytest.mark.parametrize("destination", DESTINATIONS)
def test_labels_weighted_by_saliency(cupy, destination, per_batch):
    given, images = drawn(), pictures()
    options = {"destination": destination, "per_batch": per_batch, "label_weight": "saliency"}
    arguments = images, given.source_index, given.lam
    assert_runs(cupy, mix, *arguments, np.arange(COUNT) % len(MODES), given.point, **options, **of_arrays)
    if destination == "random":
        options["point"] = given.point
    assert_runs(cupy, saliencymix, *arguments, **options, **of_arrays)
    options["saliency"] = lambda images: images[..., 1] - 60.5  # negative at some pixels
    assert_runs(cupy, saliencymix, *arguments, **options, **of_arrays)


@pytest.mark.parametrize("per_batch", PER_BATCH)
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("destination", ["corresponding", "salient", "random"])
def test_saliencymix_with_peaks(cupy, destination, box, per_batch):
    given, images = drawn(), pictures(channels=1)
    options = {"destination": destination, "box": box, "per_batch": per_batch}
    if destination == "random":
        options["point"] = given.point
    options["peaks"] = np.array([[0, 0], [23, 28], [10, 20], [3, 3], [20, 0]])
    assert_runs(cupy, saliencymix, images, given.source_index, given.lam, **options, **of_arrays)


def test_saliencymix_with_a_detector_of_the_user(cupy):
    given, images = drawn(), pictures()
    arguments = images, given.source_index, given.lam
    assert_runs(cupy, saliencymix, *arguments, saliency=lambda images: images[..., 1] * 2.0, **of_arrays)


@pytest.mark.parametrize("per_batch", PER_BATCH)
@pytest.mark.parametrize("box", BOXES)
def test_cutmix_and_mixup(cupy, box, per_batch):
    given, images = drawn(), pictures()
    arguments = images, given.source_index, given.lam
    assert_runs(cupy, cutmix, *arguments, given.point, box=box, per_batch=per_batch)
    assert_runs(cupy, mixup, *arguments, per_batch=per_batch)


@pytest.mark.parametrize("per_batch", PER_BATCH)
@pytest.mark.parametrize("destination", DESTINATIONS)
def test_mix(cupy, destination, per_batch):
    given, images = drawn(), pictures()
    mode = np.arange(COUNT) % len(MODES)
    arguments = images, given.source_index, given.lam, mode, given.point
    assert_runs(cupy, mix, *arguments, destination=destination, per_batch=per_batch, **of_arrays)
    if destination != "non_salient":
        peaks = np.array([[0, 0], [23, 28], [10, 20], [3, 3], [20, 0]])
        assert_runs(cupy, mix, *arguments, destination=destination, per_batch=per_batch, peaks=peaks)


def test_soft_labels(cupy):
    labels, source_labels, lam = np.array([0, 4, 2]), np.array([1, 4, 0]), np.array([0.25, 0.5, 1.0])
    for smoothing in (0.0, 0.1):
        assert_runs(cupy, soft_labels, labels, source_labels, lam, num_classes=5, smoothing=smoothing)
    assert_runs(cupy, soft_labels, np.eye(5)[labels], np.eye(5)[source_labels], lam)
    unknown = called_twice(cupy, soft_labels, labels, source_labels, lam, num_classes=4)
    assert np.isnan(on_host(unknown)).all(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize("other_place", [False, True])
@pytest.mark.parametrize("layout", ["CHW", "HWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pasting(cupy, dtype, layout, other_place):
    given, images = drawn(), pictures()
    boxes = np.array([[0, 0, 24, 29], [0, 0, 0, 0], [5, 6, 17, 28], [20, 10, 24, 29], [1, 2, 2, 3]], np.int32)
    shift = np.array([[0, 0], [0, 0], [7, -6], [-7, 0], [-1, 3]], np.int32)
    options = {"source_boxes": boxes + np.tile(shift, 2)} if other_place else {}
    arguments = images, given.source_index, boxes
    assert_runs(cupy, paste_boxes, *arguments, **options)
    for mirror in (None, given.lam > 0.5, np.arange(COUNT)):
        options |= {"mirror": mirror, "mean": MEAN, "std": STD, "dtype": dtype, "layout": layout}
        assert_runs(cupy, paste_normalised, *arguments, **options, **of_arrays)


def test_results_go_where_they_are_asked_for(cupy):
    given, images = drawn(), pictures()
    boxes = np.tile(np.array([5, 6, 17, 28]), (COUNT, 1))
    arguments = images, given.source_index, boxes
    out = cupy.empty(images.shape, cupy.uint8)
    assert called_twice(cupy, paste_boxes, *arguments, out=out) is out
    assert_same(out, paste_boxes(*arguments))
    options = {"mean": MEAN, "std": STD}
    out = cupy.empty((COUNT, 3, HEIGHT, WIDTH), cupy.float32)
    assert called_twice(cupy, paste_normalised, *arguments, out=out, **options) is out
    assert_same(out, paste_normalised(*arguments, algorithm="array", **options))


def test_blending(cupy):
    given, images = drawn(), pictures()
    for dtype in ("float32", "float64"):
        assert_runs(cupy, blend_images, images, given.source_index, given.lam.astype(dtype))


# --- The functions that DALI calls ---


@pytest.fixture
def recorded(monkeypatch):
    """Run an operator of `dali_saliencymix.fn` on a CPU; return the function that DALI calls, arguments and result."""
    calls = []

    def recording(function, *inputs, **options):
        def recorded_function(*batches):
            made = function(*batches)
            calls.append((function, [np.array(batch) for batch in batches], [np.array(batch) for batch in made]))
            return made

        return dali_operator.python_operator(recorded_function, *inputs, **options)

    for module in (dali_mix, dsfn):
        monkeypatch.setattr(module, "python_operator", recording)

    def run(name, *, images=None, **options):
        images = pictures() if images is None else images

        @pipeline_def(batch_size=COUNT, num_threads=2, device_id=None, seed=11)
        def pipeline():
            batch = fn.external_source(lambda: images, layout="HWC")
            labels = fn.external_source(lambda: np.arange(COUNT)[:, None])
            nodes = {key: value() if callable(value) else value for key, value in options.items()}
            if name == "saliency_peaks":
                return dsfn.saliency_peaks(batch, **nodes)
            if name == "soft_labels":
                if "num_classes" not in nodes:
                    labels = fn.one_hot(labels, num_classes=COUNT)
                lam = fn.random.uniform(range=[0.0, 1.0])
                return dsfn.soft_labels(labels, fn.permute_batch(labels, indices=[1, 2, 3, 4, 0]), lam, **nodes)
            return getattr(dsfn, name)(batch, labels, **nodes)

        pipeline().run()
        return calls[0]  # DALI prefetches, so there are more calls

    return run


def given_peaks():
    return fn.random.uniform(range=[0.0, 23.0], shape=[2])


def normalised(**options):
    mirror = fn.random.coin_flip(probability=0.5)
    return dsfn.Normalise(mean=MEAN, std=STD, mirror=mirror, **options)


WAYS = {name: 1.0 for name in MODES}
OPERATORS = {
    "saliencymix": ("saliencymix", {"algorithm": "array", "prob": 0.7}),
    "weighted by saliency": ("saliencymix", {"algorithm": "array", "prob": 0.7, "label_weight": "saliency"}),
    "to the most salient place": ("saliencymix", {"algorithm": "array", "destination": "salient"}),
    "to a random place": ("saliencymix", {"algorithm": "array", "destination": "random", "preset": "released-code"}),
    "with peaks": ("saliencymix", {"peaks": given_peaks, "destination": "random"}),
    "normalised": ("saliencymix", {"algorithm": "array", "normalise": normalised}),
    "normalised as it lies": (
        "saliencymix",
        {"algorithm": "array", "normalise": functools.partial(normalised, dtype="float16", layout="HWC")},
    ),
    "cutmix": ("cutmix", {}),
    "mixup": ("mixup", {"alpha": 0.4}),
    "mixup, normalised": ("mixup", {"normalise": normalised}),
    "boxes, flipped": ("saliencymix", {"algorithm": "array", "normalise": normalised, "return_boxes": True}),
    "mix, normalised with boxes": (
        "mix",
        {"algorithm": "array", "modes": WAYS, "normalise": normalised, "return_boxes": True},
    ),
    "mix": ("mix", {"algorithm": "array", "modes": WAYS, "destination": "random"}),
    "mix of batches": (
        "mix",
        {"algorithm": "array", "modes": WAYS, "choose": "batch", "alpha": dict.fromkeys(WAYS, 2)},
    ),
    "mix with peaks": ("mix", {"modes": WAYS, "peaks": given_peaks, "per_batch": True}),
    "saliency_peaks": ("saliency_peaks", {"algorithm": "array", "least": True}),
    "soft_labels": ("soft_labels", {"num_classes": COUNT, "smoothing": 0.1}),
    "soft_labels of vectors": ("soft_labels", {}),
}
each_operator = pytest.mark.parametrize(("name", "options"), OPERATORS.values(), ids=OPERATORS)


@each_operator
def test_the_functions_of_operators(cupy, recorded, name, options):
    function, batches, expected = recorded(name, **options)
    assert_same(called_twice(cupy, function, *batches), expected)


@each_operator
@pytest.mark.parametrize("apart", [0, 40, None], ids=["in one block", "evenly apart", "in disorder"])
def test_lists_of_samples(cupy, recorded, name, options, apart):
    function, batches, expected = recorded(name, **options)
    samples = [samples_in_memory(batch, apart) for batch in batches]
    rules = [bridge.OF_IMAGES] * len(samples)
    with cupy.cuda.Stream.from_external(LentStream(7)):
        first = bridge.on_samples(function, *samples, rules=rules)
        copies = cupy.copies_from_host
        second = bridge.on_samples(function, *samples, rules=rules)
    assert cupy.copies_from_host == copies
    for made in (first, second):
        for ours, theirs in zip(made, expected, strict=True):
            assert_same(ours, [np.asarray(value) for value in theirs])


def samples_in_memory(batch, apart):
    """Return the samples of a NumPy batch on the stand-in, with a gap of so many bytes; None reverses their order."""
    size = batch[0].nbytes
    memory = np.zeros((len(batch), size + (apart or 0)), np.uint8)
    memory[:, :size] = batch.reshape(len(batch), -1).view(np.uint8)[:: -1 if apart is None else 1]
    samples = [row[:size].view(batch.dtype).reshape(batch.shape[1:]) for row in on_device(memory)]
    return samples[::-1] if apart is None else samples


@each_operator
def test_whole_batches(cupy, recorded, name, options):
    function, batches, expected = recorded(name, **options)
    tensors = [ndarray(batch) for batch in batches]
    for _ in range(2):
        capsules = dali_operator._on_gpu_tensors(functools.partial(dali_operator._limited, 2, function), 7, *tensors)
        made = [dlpack.from_dlpack(capsule).numpy() for capsule in capsules]
        assert_same(made, expected)


# --- PyTorch's tensors ---

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
WAITING = {getattr(torch.Tensor, name) for name in ("cpu", "item", "masked_select", "nonzero", "numpy", "tolist")}
WAITING |= {getattr(torch.Tensor, f"__{name}__") for name in ("array", "bool", "float", "index", "int")}
WAITING |= {torch.masked_select, torch.nonzero, torch.unique}


class OnGpu(torch.Tensor):
    """A tensor that claims to be on a GPU, and raises an error for calls that would synchronise."""

    is_cuda = property(lambda self: True)
    device = property(lambda self: CUDA)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        to = args[1] if function is torch.Tensor.to else None
        if function in WAITING or to in ("cpu", CPU):
            msg = f"{function.__name__} waits for the GPU"
            raise HostSynchronisation(msg)
        return args[0] if to == CUDA else super().__torch_function__(function, types, args, kwargs)

    def __dlpack__(self, *, stream=None, **options):
        return self.as_subclass(torch.Tensor).__dlpack__(**options)

    def __dlpack_device__(self):
        return self.as_subclass(torch.Tensor).__dlpack_device__()


class Pinned(torch.Tensor):
    """A tensor in pinned memory, which can be copied to a GPU asynchronously."""

    def to(self, device, *, non_blocking=False):
        assert device == CUDA
        if not non_blocking:
            msg = "a copy that blocks waits for the GPU"
            raise HostSynchronisation(msg)
        return on_gpu(self)


def on_gpu(tensor):
    return tensor.as_subclass(OnGpu)


@pytest.fixture
def torch_s_gpu(cupy, monkeypatch):
    """Fake the parts of PyTorch's GPU API that are used; the current stream is 7. Return the streams made current."""
    made_current = []

    def stream(wanted):
        made_current.append(wanted)
        return contextlib.nullcontext()

    def from_dlpack(array):
        return on_gpu(dlpack.from_dlpack(array)) if isinstance(array, ndarray) else dlpack.from_dlpack(array)

    monkeypatch.setattr(_tensors, "dlpack", SimpleNamespace(from_dlpack=from_dlpack))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.as_subclass(Pinned))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: pointer)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return made_current


MIXES = {
    "default": {},
    "fine_grained": {"saliency": "fine_grained", "destination": "salient", "prob": 0.5},
    "random": {"preset": "released-code", "destination": "random", "label_smoothing": 0.1},
    "cutmix": {"modes": {"cutmix": 1.0}},
    "mixup": {"modes": {"mixup": 1.0}, "alpha": 0.3},
    "all": {"modes": WAYS, "source": "non_salient"},
    "all, batch by batch": {"modes": WAYS, "choose": "batch", "per_batch": True},
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("options", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize(("labels", "labels_on_gpu"), [("class ids", True), ("class ids", False), ("vectors", True)])
def test_batches_of_pytorch(cupy, torch_s_gpu, options, memory_format, labels, labels_on_gpu):
    images = torch.from_numpy(pictures()).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
    labels = torch.eye(COUNT) if labels == "vectors" else torch.arange(COUNT)
    options = {"return_boxes": True, "algorithm": "array", **options}
    on_cpu, ours = (pytorch.SaliencyMix(COUNT, seed=3, **options) for _ in range(2))
    for call in range(3):
        expected = on_cpu(images, labels)
        copies = cupy.copies_from_host
        mixed = ours(on_gpu(images), on_gpu(labels) if labels_on_gpu else labels)
        assert call == 0 or cupy.copies_from_host == copies
        for our_tensor, their_tensor in zip(mixed, expected, strict=True):
            assert type(our_tensor) is OnGpu
            assert our_tensor.stride() == their_tensor.stride()
            assert torch.equal(our_tensor.as_subclass(torch.Tensor), their_tensor)


def test_a_cuda_graph_is_refused(cupy, torch_s_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    images = torch.from_numpy(pictures()).permute(0, 3, 1, 2)
    with pytest.raises(RuntimeError, match="SaliencyMix must be called outside of a CUDA graph"):
        pytorch.SaliencyMix(COUNT)(on_gpu(images), on_gpu(torch.arange(COUNT)))
    pytorch.SaliencyMix(COUNT)(images, torch.arange(COUNT))


def test_detectors_get_pytorch_s_stream(cupy, torch_s_gpu):
    streams = []

    def detector(images):
        streams.append(cupy.cuda.get_current_stream().ptr)
        return images[..., 0].astype(cupy.float32)

    images = torch.from_numpy(pictures()).permute(0, 3, 1, 2)
    pytorch.SaliencyMix(COUNT, seed=0, saliency=detector)(on_gpu(images), on_gpu(torch.arange(COUNT)))
    assert streams == [7]
    assert cupy.cuda.get_current_stream().ptr == 0


@pytest.mark.parametrize("size", [None, 16])
def test_a_network_as_detector(cupy, torch_s_gpu, size):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 3), torch.nn.Sigmoid()).eval()
    given = drawn()
    arguments = pictures(), given.source_index, given.lam
    expected = saliencymix(*arguments, saliency=pytorch.NetworkSaliency(network, size=size), algorithm="array")
    with cupy.cuda.Stream.from_external(LentStream(9)):
        ours = called_twice(cupy, saliencymix, *arguments, saliency=pytorch.NetworkSaliency(network, size=size))
    assert_same(ours, expected)
    assert torch_s_gpu == [9, 9]


# --- The kernels ---


@pytest.fixture
def launches(libraries, monkeypatch):
    """Launch kernels on the CPU with arrays of the stand-in; return the list of launches, which grows."""
    launched = []

    def find_kernel(xp, file, name):
        assert xp is sys.modules["cupy"]

        def kernel(grid, block, arguments):
            assert not any(isinstance(argument, np.ndarray) for argument in arguments)
            launched.append(name)
            launch(libraries, file, name, grid, block, arguments)

        return kernel

    monkeypatch.setattr(cuda_launch, "find_kernel", find_kernel)
    monkeypatch.setattr(_routes, "is_host", _array.is_host)
    return launched


@pytest.mark.parametrize("destination", DESTINATIONS)
@pytest.mark.parametrize("detector", ["spectral_residual", "fine_grained", "frequency_tuned"])
def test_saliencymix_in_kernels(cupy, launches, detector, destination):
    given, images = drawn(), pictures(height=70, width=66)
    options = {"saliency": detector, "destination": destination}
    if destination == "random":
        options["point"] = given.point
    arguments = images, given.source_index, given.lam
    expected = saliencymix(*arguments, algorithm="array", **options)
    assert_same(called_twice(cupy, saliencymix, *arguments, algorithm="kernel", **options), expected)
    if destination == "corresponding" and detector != "frequency_tuned":
        assert len(launches) == 2 * {"spectral_residual": 3, "fine_grained": 5}[detector]
    # The maps are needed, so the kernel that does not store them is not used.
    options["label_weight"] = "saliency"
    weighted = called_twice(cupy, saliencymix, *arguments, algorithm="kernel", **options)
    assert_same(weighted._replace(lam=weighted.images), expected._replace(lam=expected.images))
    by_saliency = saliencymix(*arguments, algorithm="array", **options).lam
    np.testing.assert_allclose(on_host(weighted.lam), by_saliency, rtol=1e-5)


@each_operator
def test_the_functions_of_operators_with_kernels_as_the_default(cupy, launches, recorded, name, options):
    function, batches, expected = recorded(name, images=pictures(height=70, width=66), **options)
    if name == "saliency_peaks":
        function = functools.partial(function, algorithm="auto")
    elif name in ("saliencymix", "mix"):
        function._options = replace(function._options, algorithm="auto")
    assert_same(called_twice(cupy, function, *batches), expected)
    assert launches or name in ("cutmix", "mixup", "mix", "soft_labels")


@pytest.mark.parametrize("detector", ["spectral_residual", "phase_spectrum", "fine_grained"])
def test_detectors_and_peaks_in_kernels(cupy, launches, detector):
    images = pictures(height=70, width=66)
    maps = called_twice(cupy, DETECTORS[detector], images, algorithm="kernel")
    expected = DETECTORS[detector](images, algorithm="array")
    np.testing.assert_allclose(on_host(maps), expected, atol=1e-4 if detector == "spectral_residual" else 0)
    peaks = called_twice(cupy, saliency_peaks, on_host(maps), 70, 66, algorithm="kernel")
    assert_same(peaks, saliency_peaks(on_host(maps), 70, 66, algorithm="array"))
    assert "saliency_peaks" in launches


# --- The stand-in ---

WAITS = {
    "get": lambda xp, a: a.get(),
    "item": lambda xp, a: a[0, 0].item(),
    "tolist": lambda xp, a: a.tolist(),
    "int": lambda xp, a: int(a[0, 0]),
    "float": lambda xp, a: float(a[0, 0]),
    "bool": lambda xp, a: bool(a.any()),
    "if": lambda xp, a: 1 if a.max() > 0 else 0,
    "in": lambda xp, a: 3 in a,
    "range": lambda xp, a: range(a[0, 0]),
    "a slice": lambda xp, a: a[: a[0, 0]],
    "text": lambda xp, a: f"{a}",
    "a copy to NumPy": lambda xp, a: np.asarray(a),
    "a NumPy function": lambda xp, a: np.linalg.norm(a),
    "asnumpy": lambda xp, a: xp.asnumpy(a),
    "a mask": lambda xp, a: a[a > 1],
    "a mask beside slices": lambda xp, a: a[:, a[0] > 1],
    "a mask that is written to": lambda xp, a: operator.setitem(a, a > 1, 0),
    "nonzero": lambda xp, a: a.nonzero(),
    "flatnonzero": lambda xp, a: xp.flatnonzero(a),
    "argwhere": lambda xp, a: xp.argwhere(a),
    "where": lambda xp, a: xp.where(a > 1),
    "unique": lambda xp, a: xp.unique(a),
    "repeat": lambda xp, a: xp.repeat(a, a[0], axis=1),
    "an array as a shape": lambda xp, a: xp.zeros(a[0, 0]),
    "an array as an axis": lambda xp, a: a.sum(axis=a[0, 0]),
    "synchronize": lambda xp, a: xp.cuda.get_current_stream().synchronize(),
    "Device": lambda xp, a: xp.cuda.Device(0).synchronize(),
    "what nobody has looked up": lambda xp, a: xp.histogram(a),
    "a method that nobody has looked up": lambda xp, a: a.argpartition(1),
    "asarray": lambda xp, a: xp.asarray(np.ones(3)),
    "an index of NumPy": lambda xp, a: a[np.array([0, 1])],
    "a list as an index": lambda xp, a: a[[0, 1]],
    "a list that is taken": lambda xp, a: xp.take(a, [0, 1], axis=1),
    "writing NumPy's values": lambda xp, a: operator.setitem(a, 0, np.zeros(3)),
}
IS_REFUSED = {
    "NumPy on the right": lambda xp, a: a + np.ones(3),
    "NumPy on the left": lambda xp, a: np.ones(3) * a,
    "NumPy in place": lambda xp, a: operator.iadd(a, np.ones(3, int)),
    "NumPy in a function": lambda xp, a: xp.where(a > 1, a, np.ones(3)),
    "NumPy among arrays": lambda xp, a: xp.stack([a, np.ones((2, 3))]),
    "NumPy in a universal function": lambda xp, a: xp.maximum(a, np.ones(3)),
    "a list in a universal function": lambda xp, a: xp.maximum(a, [1, 2, 3]),
    "an option that CuPy has not": lambda xp, a: xp.concatenate([a, a], where=True),
    "an option that CuPy's method has not": lambda xp, a: a.max(initial=0),
    "None": lambda xp, a: a + None,
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_the_stand_in_does_not_wait(cupy, wait):
    with pytest.raises(HostSynchronisation):
        wait(cupy, cupy.arange(6).reshape(2, 3))


@pytest.mark.parametrize("mix_up", IS_REFUSED.values(), ids=IS_REFUSED)
def test_the_stand_in_refuses_what_cupy_refuses(cupy, mix_up):
    with pytest.raises(TypeError):
        mix_up(cupy, cupy.arange(6).reshape(2, 3))


@pytest.mark.parametrize("name", ["not_there", "float128", "busday_count"])
def test_the_stand_in_has_no_name_that_cupy_has_not(cupy, name):
    for owner in (cupy, cupy.fft, cupy.arange(3)):
        with pytest.raises(AttributeError):
            getattr(owner, name)


class Empty:
    pass


def test_what_the_stand_in_has_of_its_own_is_cupy_s():
    real = pytest.importorskip("cupy")
    module = stand_in_for_cupy()
    for name, ours in vars(module.cuda).items():
        theirs = getattr(real.cuda, name)
        assert [part for part in vars(ours) if not hasattr(theirs, part) and not part.startswith("__")] == []
    # The last two exist but raise an error: without them Python would use other methods.
    names = vars(ndarray).keys() - vars(Empty).keys() - {"__getattr__", "__contains__", "__index__"}
    assert [name for name in sorted(names) if not hasattr(real.ndarray, name)] == []


def test_the_stand_in_computes_as_numpy_does(cupy):
    values = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    array = on_device(values)
    row, *_ = array.T
    assert_same(row, values[:, 0])
    assert_same(array[1, 2], np.asarray(values[1, 2]))
    assert_same(array[cupy.asarray(array[0].astype("int64") % 3), 1:], values[[0, 1, 2, 0], 1:])
    assert_same(1 - array * np.float32(2) + 3**array, 1 - values * np.float32(2) + 3**values)
    assert_same(np.float64(2) / array[1:], np.float64(2) / values[1:])
    assert_same(np.exp(-array) // 1, np.exp(-values) // 1)
    assert_same(array @ array.T, values @ values.T)
    assert_same(cupy.fft.rfft2(array).imag, np.fft.rfft2(values).imag.astype(np.float32))
    written = array.copy()
    view = written[1:, ::2]
    view += 10
    written[0, :2] = array[1, 2:]
    assert_same(written, np.array([[6, 7, 2, 3], [14, 5, 16, 7], [18, 9, 20, 11]], np.float32))
    with pytest.raises(ValueError, match="read-only"):
        array += 1


def test_a_detector_of_the_user_that_waits_is_found(cupy):
    def detector(images):
        maps = images[..., 0].astype(cupy.float32)
        return maps / maps.max() if maps.max() > 0 else maps

    given, images = drawn(), pictures()
    with pytest.raises(HostSynchronisation, match="__bool__ waits for the GPU"):
        called_twice(cupy, saliencymix, images, given.source_index, given.lam, saliency=detector)


def test_a_copy_in_each_call_is_found(cupy, monkeypatch):
    monkeypatch.setattr("dali_saliencymix.boxes.constant", lambda xp, build, *args: xp.asarray(build(*args)))
    given, images = drawn(), pictures()
    with pytest.raises(HostSynchronisation, match="asarray copies from host memory, in every batch"):
        called_twice(cupy, saliencymix, images, given.source_index, given.lam)


def test_constants_are_not_written_to(cupy):
    from dali_saliencymix._array import constant

    with pytest.raises(ValueError, match="read-only"):
        constant(cupy, np.arange, 5)[0] = 1


@pytest.mark.parametrize("name", ["cpu", "item", "__bool__"])
def test_tensors_that_say_that_they_are_on_a_gpu_do_not_wait(name):
    with pytest.raises(HostSynchronisation):
        getattr(on_gpu(torch.ones(1)), name)()


# --- The benchmarks ---


def test_what_the_benchmark_of_operations_times_on_a_gpu(cupy, launches, monkeypatch):
    for detector in ("spectral_residual", "fine_grained", "frequency_tuned"):
        with monkeypatch.context() as setting_up:
            setting_up.setattr(cupy, "asarray", lambda array: on_device(array))
            variants = bench_ops.package_variants(bench_ops.Inputs(70, 3), "cupy", detector, steps=True)
        for variant in variants.values():
            if not isinstance(variant.call, timing.Graph):  # the stand-in cannot capture graphs
                variant.call()
    assert {"spectral_residual", "contrast_peaks", "paste_normalised_float32_CHW"} <= set(launches)


@pytest.mark.parametrize("arm", ARMS)
def test_arms_of_the_accuracy_study(cupy, launches, arm):
    """With kernels, as in a run on a GPU."""
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    (drawn,) = draws_of_epoch(1, 1, 40, 40, prob=1.0, augment=True)

    def made(images, draws, algorithm):
        batch = augmented(images, draws)
        paste = functools.partial(paste_normalised, mean=MEAN, std=STD, layout="HWC", algorithm=algorithm)
        random_numbers = draws.source_index, draws.lam, draws.point
        return ARMS[arm].mix(batch, *random_numbers, algorithm=algorithm, paste=paste)

    expected = made(images, drawn, "array")
    for _ in range(2):
        found = made(on_device(images), type(drawn)(*map(on_device, drawn)), "kernel")
        for own, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(on_host(own), other)
    assert "paste_normalised_float32_HWC" in launches
