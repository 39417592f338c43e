"""The operators in real DALI pipelines, on files decoded by DALI."""

from __future__ import annotations

import functools
import inspect
import re
from types import SimpleNamespace

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.auto_aug import augmentations, trivial_augment

import dali_saliencymix.fn as dsfn
from dali_saliencymix import (
    MODES,
    cutmix,
    fine_grained,
    mix,
    mixup,
    paste_normalised,
    saliency_peaks,
    saliencymix,
    soft_labels,
)
from dali_saliencymix._dali import mix_nodes as dali_mix
from dali_saliencymix._dali import python_operator as dali_operator
from dali_saliencymix.datasets.sample_data import CLASSES, sample_jpeg
from dali_saliencymix.saliency import spectral_residual

FILES = 24
HEIGHT, WIDTH = 40, 56


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of real JPEG files; tests use the number of a file as its label."""
    folder = tmp_path_factory.mktemp("jpegs")
    paths = []
    for number in range(FILES):
        path = folder / f"{number:02d}.jpg"
        path.write_bytes(sample_jpeg("train", CLASSES[number % len(CLASSES)], number))
        paths.append(str(path))
    return paths


@pytest.fixture(params=["whole batches", "samples"])
def operator(request, monkeypatch):
    """Run a test with both of DALI's operators for Python functions."""
    if request.param == "samples":
        monkeypatch.setattr(dali_operator, "whole_batches_work", lambda: False)


both_operators = pytest.mark.usefixtures("operator")  # for what depends on how batches come to Python and back


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def read(files, device="cpu", size=(HEIGHT, WIDTH)):
    encoded, labels = fn.readers.file(files=files, labels=list(range(len(files))), name="reader")
    images = fn.decoders.image(encoded, device="mixed" if device == "gpu" else "cpu")
    return (fn.resize(images, size=size) if size else images), labels


def build(definition, *args, batch_size=8, device="cpu", seed=3, **options):
    device_id = 0 if device == "gpu" else None
    return definition(*args, batch_size=batch_size, num_threads=2, device_id=device_id, seed=seed, **options)


def run(pipeline):
    return [np.array(output.as_cpu().as_tensor()) for output in pipeline.run()]


@pipeline_def
def before_and_after(files, options, device="cpu", op=dsfn.saliencymix):
    images, labels = read(files, device)
    return images, *op(images, labels, **options)


MIXED = functools.partial(dsfn.mix, modes={"saliencymix": 1, "cutmix": 1, "mixup": 1})
each_op = pytest.mark.parametrize(
    "op",
    [dsfn.saliencymix, dsfn.cutmix, dsfn.mixup, MIXED],
    ids=["saliencymix", "cutmix", "mixup", "mix"],
)


@both_operators
@each_op
def test_fused_normalisation_is_bit_identical_to_normalising_mixed_images(files, op, device):
    scaling = {"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}

    @pipeline_def
    def normalised(along):
        images, labels = read(files, device)
        mirror = fn.random.coin_flip(seed=4)
        normalise = dsfn.Normalise(**scaling, mirror=mirror) if along else None
        return mirror, *op(images, labels, prob=0.75, normalise=normalise)

    ours, theirs = (build(normalised, along, device=device) for along in (True, False))
    for _ in range(2):
        (mirror, pixels, *others), (_, mixed, *same) = run(ours), run(theirs)
        nothing = np.zeros((len(mixed), 4), np.int32)
        expected = paste_normalised(mixed, np.arange(len(mixed)), nothing, mirror=mirror, **scaling)
        np.testing.assert_array_equal(pixels, expected)
        for other, as_it_was in zip(others, same, strict=True):
            np.testing.assert_array_equal(other, as_it_was)


@both_operators
@pytest.mark.parametrize("mirrored", [False, True], ids=["as it lies", "flipped"])
@pytest.mark.parametrize("op", [dsfn.saliencymix, dsfn.cutmix, MIXED], ids=["saliencymix", "cutmix", "mix"])
@pytest.mark.parametrize("place", ["corresponding", "random"])
def test_boxes_are_where_the_pixels_are(files, op, mirrored, place, device):
    if op is dsfn.cutmix and place == "random":
        pytest.skip("cutmix has one place")
    options = {} if op is dsfn.cutmix else {"destination": place}

    @pipeline_def
    def with_boxes():
        images, labels = read(files, device)
        mirror = fn.random.coin_flip(seed=4)
        normalise = dsfn.Normalise([0] * 3, [1] * 3, mirror, layout="HWC") if mirrored else None
        return images, mirror, *op(images, labels, prob=0.75, normalise=normalise, return_boxes=True, **options)

    pipeline = build(with_boxes, batch_size=12, device=device)
    outputs = pipeline.run()
    assert len(outputs) == 7
    on_gpu_too = [type(outputs[number]).__name__ for number in (2, 6)]
    assert on_gpu_too == ["TensorListGPU" if device == "gpu" else "TensorListCPU"] * 2
    images, mirror, mixed, labels, source_labels, lam, boxes = (np.array(out.as_cpu().as_tensor()) for out in outputs)
    assert (boxes.shape, boxes.dtype) == ((12, 4), np.int32)
    if mirrored:
        images = np.where(mirror[:, None, None, None] == 1, images[:, :, ::-1], images)
    number_of = {label: number for number, label in enumerate(labels.ravel())}
    pasted = 0
    for number, (y0, x0, y1, x1) in enumerate(boxes):
        inside = np.zeros((HEIGHT, WIDTH), bool)
        inside[y0:y1, x0:x1] = True
        source = images[number_of[source_labels[number, 0]]]
        if mirrored and mirror[number] != mirror[number_of[source_labels[number, 0]]]:
            source = source[:, ::-1]  # the patch is flipped with its receiver
        if not inside.any() and lam[number] < 1:  # blended
            assert op is MIXED
            continue
        np.testing.assert_array_equal(mixed[number][~inside], images[number][~inside])
        assert lam[number] == np.float32(1 - inside.mean())
        if place == "corresponding":
            np.testing.assert_array_equal(mixed[number][inside], source[inside])
        else:  # the box may be anywhere in the source
            height, width = y1 - y0, x1 - x0
            windows = (
                np.lib.stride_tricks.sliding_window_view(source, (height, width), (0, 1)) if inside.any() else None
            )
            patch = mixed[number, y0:y1, x0:x1].transpose(2, 0, 1)
            assert windows is None or (windows == patch).all(axis=(2, 3, 4)).any()
        pasted += inside.any()
    assert pasted > 4
    assert (boxes[lam == 1] == 0).all()


def test_boxes_come_out_only_where_they_are_asked_for(files):
    assert len(run(build(before_and_after, files, {}))) == 5
    with pytest.raises(TypeError, match="return_boxes"):
        build(before_and_after, files, {"return_boxes": True}, "cpu", dsfn.mixup)


@both_operators
@pytest.mark.parametrize("layout", ["CHW", "HWC"])
@each_op
def test_fused_normalisation_equals_dali_s_normaliser(files, op, layout, device):
    mean, std = [123.7, 116.3, 103.5], [58.4, 57.1, 57.4]

    @pipeline_def
    def normalised(along, mirrored):
        images, labels = read(files, device)
        mirror = fn.random.coin_flip(seed=4) if mirrored else None
        if along:
            return op(images, labels, prob=0.75, normalise=dsfn.Normalise(mean, std, mirror, layout=layout))
        images, *others = op(images, labels, prob=0.75)
        options = {"mean": mean, "std": std, "mirror": mirror if mirrored else 0, "output_layout": layout}
        return fn.crop_mirror_normalize(images, dtype=types.FLOAT, **options), *others

    for mirrored in (True, False):
        ours, theirs = (build(normalised, along, mirrored, device=device) for along in (True, False))
        for _ in range(3):
            for got, expected in zip(run(ours), run(theirs), strict=True):
                assert got.shape == expected.shape
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        assert [output.layout() for output in ours.run()] == [layout, "", "", ""]


@both_operators
@pytest.mark.parametrize("dtype", ["float16", np.float16, types.FLOAT16], ids=str)
def test_fused_normalisation_to_half_precision(files, dtype):
    @pipeline_def
    def normalised():
        images, labels = read(files)
        return dsfn.cutmix(images, labels, normalise=dsfn.Normalise([0, 0, 0], [255, 255, 255], dtype=dtype))

    images, *_ = run(build(normalised))
    assert images.dtype == np.float16
    assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"std": [1, 0, 1]}, r"std must be positive, got \[1, 0, 1\]"),
        ({"layout": "NCHW"}, "layout must be one of CHW, HWC, got 'NCHW'"),
        ({"dtype": "float64"}, "dtype must be one of float32, float16, got 'float64'"),
        ({"dtype": types.UINT8}, "dtype must be one of float32, float16, got 'uint8'"),
    ],
)
def test_wrong_normalisation_is_refused_while_the_pipeline_is_defined(files, wrong, message):
    normalise = dsfn.Normalise(**{"mean": [0, 0, 0], "std": [1, 1, 1], **wrong})
    with pytest.raises(ValueError, match=message):
        build(before_and_after, files, {"normalise": normalise})


@each_op
def test_an_invalid_normalise_is_refused_by_name(files, op):
    with pytest.raises(TypeError, match=r"normalise must be a dali_saliencymix\.fn\.Normalise, got {'mean': 0}"):
        build(before_and_after, files, {"normalise": {"mean": 0}}, "cpu", op)


@both_operators
def test_mirror_may_be_of_shape_1_and_of_any_dtype(files):
    @pipeline_def
    def normalised(shape, dtype):
        images, labels = read(files)
        mirror = fn.cast(fn.random.coin_flip(shape=shape, seed=4), dtype=dtype)
        return dsfn.cutmix(images, labels, normalise=dsfn.Normalise([0, 0, 0], [1, 1, 1], mirror))

    expected = run(build(normalised, [], types.INT32))
    for shape, dtype in (([1], types.INT32), ([], types.BOOL), ([], types.FLOAT)):
        for ours, theirs in zip(run(build(normalised, shape, dtype)), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("value", [0.25, 7, -1])
def test_a_mirror_that_is_neither_0_nor_1_is_an_error(files, value):
    @pipeline_def
    def normalised():
        images, labels = read(files)
        mirror = fn.random.choice([value])
        return dsfn.saliencymix(images, labels, normalise=dsfn.Normalise([0, 0, 0], [1, 1, 1], mirror))

    with pytest.raises(RuntimeError, match=f"mirror must be 0 or 1 for each image, got {value}"):
        run(build(normalised))


@both_operators
def test_batches_that_somebody_holds_are_not_written_to_again(files):
    @pipeline_def
    def mixed():
        images, labels = read(files)
        return dsfn.saliencymix(images, labels)

    pipeline = build(mixed)
    held = [pipeline.run() for _ in range(6)]
    copies = [np.array(outputs[0].as_tensor()) for outputs in held]
    for _ in range(6):
        pipeline.run()
    for outputs, copy in zip(held, copies, strict=True):
        np.testing.assert_array_equal(np.array(outputs[0].as_tensor()), copy)


def on(device, array):
    return pytest.importorskip("cupy").asarray(array) if device == "gpu" else array


def in_numpy(array):
    return array.get() if hasattr(array, "get") else array


def draws_of(monkeypatch):
    """Record the draws with which images are mixed in the pipeline; return the list of records."""
    calls = []
    function = dali_mix.apply

    def recorded(options, images, **arrays):
        mixed = function(options, images, **arrays)
        # Copies, since DALI's arrays are valid only during the call.
        kept = {key: in_numpy(value).copy() for key, value in arrays.items() if is_array(value)}
        calls.append({"options": options, **kept})
        return mixed

    monkeypatch.setattr(dali_mix, "apply", recorded)
    return calls


def is_array(value):
    return hasattr(value, "__array_interface__") or hasattr(value, "__cuda_array_interface__")


def check_against_the_array_function(calls, function, pipeline, device, batches=1):
    for batch in range(batches):
        images, mixed, labels, source_labels, lam = run(pipeline)
        arrays = {key: on(device, value) for key, value in calls[batch].items() if is_array(value)}
        names = inspect.signature(function).parameters.keys() & vars(calls[batch]["options"]).keys()
        options = {name: getattr(calls[batch]["options"], name) for name in names}
        if "peaks" in arrays:
            del options["saliency"]
        # With the array library of that device, since two FFTs round differently, which can move a peak.
        expected = function(on(device, images), **arrays, **options)
        np.testing.assert_array_equal(mixed, in_numpy(expected.images))
        np.testing.assert_array_equal(lam, in_numpy(expected.lam))
        assert lam.shape == labels.shape[:1]
        assert lam.dtype == np.float32
        source_index = calls[batch]["source_index"]
        np.testing.assert_array_equal(source_labels, labels[source_index])
        assert sorted(source_index) == list(range(len(labels)))


@both_operators
@pytest.mark.parametrize(
    ("options", "batch_size"),
    [
        ({}, 1),
        ({}, 5),
        ({}, 8),
        ({"prob": 0.5, "alpha": 0.3}, 8),
        ({"saliency": "fine_grained", "box": "clip"}, 5),
        ({"per_batch": True, "box": "clip"}, 1),
        ({"per_batch": True, "box": "clip"}, 5),
        ({"saliency": spectral_residual, "source": "non_salient"}, 5),
        ({"destination": "random"}, 1),
        ({"destination": "salient", "preset": "paper"}, 8),
        ({"preset": "released-code"}, 5),
        ({"label_weight": "saliency", "prob": 0.5}, 8),
    ],
    ids=lambda value: re.sub("<function (.*?) at .*?>", r"\1", str(value)),
)
def test_saliencymix_in_a_pipeline_equals_the_array_function(monkeypatch, files, device, options, batch_size):
    calls = draws_of(monkeypatch)
    pipeline = build(before_and_after, files, options, device, batch_size=batch_size, device=device)
    check_against_the_array_function(calls, saliencymix, pipeline, device, batches=3)
    for name in options.keys() - {"prob", "alpha"}:
        assert getattr(calls[0]["options"], name) == options[name]


@both_operators
@pytest.mark.parametrize("options", [{}, {"prob": 0.5, "per_batch": True}, {"box": "fit"}], ids=str)
def test_cutmix_in_a_pipeline_equals_the_array_function(monkeypatch, files, device, options):
    calls = draws_of(monkeypatch)
    pipeline = build(before_and_after, files, options, device, dsfn.cutmix, device=device)
    check_against_the_array_function(calls, cutmix, pipeline, device, batches=2)
    point = calls[0]["point"]
    assert len(np.unique(point)) == point.size  # drawn for each sample and each axis


@both_operators
@pytest.mark.parametrize("options", [{}, {"prob": 0.5, "alpha": 0.2}, {"per_batch": True}], ids=str)
def test_mixup_in_a_pipeline_equals_the_array_function(monkeypatch, files, device, options):
    calls = draws_of(monkeypatch)
    pipeline = build(before_and_after, files, options, device, dsfn.mixup, device=device)
    check_against_the_array_function(calls, mixup, pipeline, device, batches=2)


@both_operators
@pytest.mark.parametrize(
    "options",
    [
        {"modes": {"saliencymix": 0.5, "cutmix": 0.2, "mixup": 0.3}},
        {"modes": {"mixup": 1, "saliencymix": 3}, "alpha": {"saliencymix": 1.0, "mixup": 0.2}, "prob": 0.8},
        {"modes": {"mixup": 1, "cutmix": 1, "saliencymix": 1}, "choose": "batch"},
        {"modes": {"saliencymix": 1.0}, "destination": "random", "per_batch": True},
        {"modes": {"saliencymix": 2, "cutmix": 1}, "label_weight": "saliency"},
    ],
    ids=str,
)
def test_mix_in_a_pipeline_equals_the_array_function(monkeypatch, files, device, options):
    calls = draws_of(monkeypatch)
    pipeline = build(before_and_after, files, options, device, dsfn.mix, device=device)
    check_against_the_array_function(calls, mix, pipeline, device, batches=3)
    for call in calls:
        assert set(call["mode"]) <= {MODES.index(name) for name in options["modes"]}
        assert options.get("choose") != "batch" or len(set(call["mode"])) == 1


def test_modes_come_as_often_as_their_weights_say_each_with_its_own_alpha(monkeypatch, files):
    calls = draws_of(monkeypatch)
    options = {"modes": {"mixup": 3.0, "cutmix": 1.0}, "alpha": {"mixup": 100.0, "cutmix": 0.01}}
    pipeline = build(before_and_after, files, options, "cpu", dsfn.mix, batch_size=50)
    for _ in range(20):
        run(pipeline)
    mode, lam = (np.concatenate([call[name] for call in calls])[:1000] for name in ("mode", "lam"))
    # Four standard errors: sqrt(0.75 * 0.25 / 1000).
    assert abs((mode == MODES.index("mixup")).mean() - 0.75) < 0.055
    # Beta(100, 100) stays near a half, Beta(0.01, 0.01) near 0 or 1.
    in_the_middle = np.abs(lam - 0.5) < 0.2
    assert in_the_middle[mode == MODES.index("mixup")].all()
    assert in_the_middle[mode == MODES.index("cutmix")].mean() < 0.1


def test_one_mode_for_a_batch_differs_between_batches(monkeypatch, files):
    calls = draws_of(monkeypatch)
    options = {"modes": {"mixup": 1, "cutmix": 1}, "choose": "batch"}
    pipeline = build(before_and_after, files, options, "cpu", dsfn.mix)
    for _ in range(20):
        run(pipeline)
    assert {len(set(call["mode"])) for call in calls} == {1}
    assert len({call["mode"][0] for call in calls}) == 2


@both_operators
def test_peaks_of_the_operator_are_those_of_the_map_and_serve_in_its_place(files, device):
    @pipeline_def
    def with_peaks():
        images, labels = read(files, device)
        peaks = dsfn.saliency_peaks(images, saliency="fine_grained")
        least = dsfn.saliency_peaks(images, saliency="fine_grained", least=True)
        return images, peaks, least, *dsfn.saliencymix(images, labels, peaks=peaks)

    images, peaks, least, mixed, *rest = run(build(with_peaks, device=device))
    maps = fine_grained(images)
    np.testing.assert_array_equal(peaks, saliency_peaks(maps, HEIGHT, WIDTH))
    np.testing.assert_array_equal(least, saliency_peaks(maps, HEIGHT, WIDTH, least=True))
    assert peaks.dtype == np.int32
    options = {"saliency": "fine_grained"}
    _, asked, *asked_rest = run(build(before_and_after, files, options, device, device=device))
    np.testing.assert_array_equal(mixed, asked)
    for ours, theirs in zip(rest, asked_rest, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@both_operators
@pytest.mark.parametrize(
    ("mirror", "got"),
    [
        (lambda labels: fn.random.coin_flip(shape=[2]), r"shape \(2,\)"),
        (lambda labels: ragged(labels), r"3 shapes: \(2,\), \(3,\), \(4,\)"),
    ],
    ids=["two", "ragged"],
)
def test_a_mirror_of_several_numbers_is_an_error(files, mirror, got):
    @pipeline_def
    def mixed():
        images, labels = read(files)
        return dsfn.cutmix(images, labels, normalise=dsfn.Normalise([0, 0, 0], [1, 1, 1], mirror(labels)))

    with pytest.raises(RuntimeError, match=f"mirror must be one number for each image, got {got}"):
        run(build(mixed))


@both_operators
@pytest.mark.parametrize("shape", [[], [1], [3]], ids=str)
def test_peaks_of_a_wrong_shape_are_an_error_that_names_it(files, shape):
    @pipeline_def
    def with_peaks():
        images, labels = read(files)
        peaks = fn.random.uniform(range=[0, HEIGHT - 1], shape=shape)
        return dsfn.saliencymix(images, labels, peaks=peaks)

    count = shape[0] if shape else 1
    with pytest.raises(RuntimeError, match=rf"peaks must have shape \(8, 2\), .* got \(8, {count}\)"):
        run(build(with_peaks))


@both_operators
def test_the_pipelines_seed_decides_everything(files):
    first, second, other = (build(before_and_after, files, {"prob": 0.5}, seed=seed) for seed in (3, 3, 4))
    differs = False
    for _ in range(3):
        outputs = [run(pipeline) for pipeline in (first, second, other)]
        for ours, same, different in zip(*outputs, strict=True):
            np.testing.assert_array_equal(ours, same)
            differs |= not np.array_equal(ours, different)
    assert differs


@both_operators
def test_a_restored_checkpoint_resumes_bit_identically(files):
    def make(checkpoint=None):
        options = {"prob": 0.7, "alpha": 0.5}
        return build(before_and_after, files, options, enable_checkpointing=True, checkpoint=checkpoint)

    pipeline = make()
    for _ in range(2):
        run(pipeline)
    state = pipeline.checkpoint()
    expected = [run(pipeline) for _ in range(3)]
    restored = make(state)
    for batch in expected:
        for ours, theirs in zip(run(restored), batch, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@both_operators
def test_it_works_behind_conditionals_and_auto_augment(files):
    @pipeline_def(enable_conditionals=True)
    def augmented():
        images, labels = read(files)
        if fn.random.coin_flip(dtype=types.BOOL):
            images = fn.flip(images)
        images = trivial_augment.apply_trivial_augment([augmentations.identity, augmentations.solarize], images)
        return images, *dsfn.saliencymix(images, labels)

    pipeline = build(augmented)
    for _ in range(2):
        images, mixed, labels, source_labels, lam = run(pipeline)
        source_index = np.array([list(labels.ravel()).index(source) for source in source_labels.ravel()])
        own = (mixed == images).all(-1)
        source = (mixed == images[source_index]).all(-1)
        assert (own | source).all()
        assert (own.mean((1, 2)) >= lam - 1e-6).all()


@both_operators
def test_it_works_inside_a_conditional_on_the_samples_that_take_it(files):
    @pipeline_def(enable_conditionals=True)
    def sometimes():
        images, labels = read(files)
        taken = fn.random.coin_flip(dtype=types.BOOL)
        if taken:
            mixed, labels, source_labels, lam = dsfn.saliencymix(images, labels)
        else:
            mixed = images
            source_labels = fn.copy(labels)
            lam = fn.cast(1.0, dtype=types.FLOAT)
        return taken, images, mixed, labels, source_labels, lam

    pipeline = build(sometimes)
    taken, images, mixed, labels, source_labels, lam = run(pipeline)
    assert 0 < taken.sum() < len(taken)
    np.testing.assert_array_equal(mixed[taken == 0], images[taken == 0])
    np.testing.assert_array_equal(lam[taken == 0], 1)
    # The mixed samples are partners of each other.
    assert set(source_labels[taken == 1].ravel()) == set(labels[taken == 1].ravel())


@both_operators
@pytest.mark.parametrize("executor", [{}, {"exec_dynamic": False}], ids=["default executor", "static executor"])
def test_the_layout_survives_for_the_operators_behind_it(files, executor):
    @pipeline_def
    def normalised():
        images, labels = read(files)
        images, *rest = dsfn.saliencymix(images, labels)
        return images, fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW"), *rest

    pipeline = build(normalised, **executor)
    outputs = pipeline.run()
    assert outputs[0].layout() == "HWC"
    images, chw = (np.array(output.as_tensor()) for output in outputs[:2])
    np.testing.assert_array_equal(chw, images.transpose(0, 3, 1, 2).astype(np.float32))


@both_operators
def test_labels_of_any_shape_and_dtype_are_passed_through_and_permuted(files):
    @pipeline_def
    def multi_label():
        images, labels = read(files)
        many_hot = fn.stack(fn.cast(labels, dtype=types.FLOAT), fn.cast(labels * labels, dtype=types.FLOAT))
        return labels, *dsfn.saliencymix(images, many_hot)

    ids, _, labels, source_labels, _ = run(build(multi_label))
    np.testing.assert_array_equal(labels[..., 0], np.stack([ids, ids**2], 1)[..., 0])
    assert source_labels.shape == labels.shape
    np.testing.assert_array_equal(source_labels[:, 1], source_labels[:, 0] ** 2)


def test_prob_0_changes_nothing_and_says_so(files):
    images, mixed, _, _, lam = run(build(before_and_after, files, {"prob": 0.0}))
    np.testing.assert_array_equal(mixed, images)
    np.testing.assert_array_equal(lam, 1)


def test_prob_and_alpha_shape_the_draws(monkeypatch, files):
    calls = draws_of(monkeypatch)
    pipeline = build(before_and_after, files, {"prob": 0.4, "alpha": 2.0}, "cpu", dsfn.cutmix, batch_size=50)
    for _ in range(20):
        run(pipeline)
    lam = np.concatenate([call["lam"] for call in calls])[:1000]
    mixed = lam[lam < 1]
    # Four standard errors: sqrt(0.4 * 0.6 / 1000) for the share, sqrt(0.05 / 400) for the mean of Beta(2, 2).
    assert abs(len(mixed) / 1000 - 0.4) < 0.062
    assert abs(mixed.mean() - 0.5) < 0.045
    assert abs(mixed.var() - 0.05) < 0.012


def test_one_batch_has_one_box_with_per_batch(files):
    images, mixed, *_, lam = run(build(before_and_after, files, {"per_batch": True}))
    assert len(np.unique(lam)) == 1
    # No image changes outside the common box.
    changed = (mixed != images).any(-1).any(0)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    assert area == round((1 - lam[0]) * HEIGHT * WIDTH)


@both_operators
def test_soft_labels_in_a_pipeline_equal_the_array_function(files, device):
    @pipeline_def
    def softened():
        images, labels = read(files, device)
        _, labels, source_labels, lam = dsfn.saliencymix(images, labels)
        return labels, source_labels, lam, dsfn.soft_labels(labels, source_labels, lam, num_classes=FILES)

    labels, source_labels, lam, targets = run(build(softened, batch_size=5, device=device))
    expected = soft_labels(labels.ravel(), source_labels.ravel(), lam, num_classes=FILES)
    np.testing.assert_array_equal(targets, expected)
    assert targets.dtype == np.float32


@both_operators
def test_soft_labels_of_vectors_are_weighted_in_the_graph(files, device):
    @pipeline_def
    def softened():
        images, labels = read(files, device)
        one_hot = fn.one_hot(labels, num_classes=FILES)
        _, labels, source_labels, lam = dsfn.saliencymix(images, one_hot)
        return labels, source_labels, lam, dsfn.soft_labels(labels, source_labels, lam)

    labels, source_labels, lam, targets = run(build(softened, device=device))
    np.testing.assert_array_equal(targets, soft_labels(labels, source_labels, lam))
    assert targets.dtype == np.float32


def test_smoothing_in_a_pipeline_is_that_of_the_array_function(files):
    @pipeline_def
    def softened():
        images, labels = read(files)
        _, labels, source_labels, lam = dsfn.saliencymix(images, labels)
        return labels, source_labels, lam, dsfn.soft_labels(labels, source_labels, lam, num_classes=30, smoothing=0.1)

    labels, source_labels, lam, targets = run(build(softened))
    expected = soft_labels(labels.ravel(), source_labels.ravel(), lam, num_classes=30, smoothing=0.1)
    np.testing.assert_array_equal(targets, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": 0.1}, "smoothing must be 0 where labels are vectors, .* got 0.1"),
        ({"num_classes": 3, "smoothing": -1}, r"smoothing must be in \[0, 1\], got -1"),
    ],
)
def test_wrong_smoothing_is_refused_while_the_pipeline_is_defined(files, options, message):
    @pipeline_def
    def softened():
        images, labels = read(files)
        return dsfn.soft_labels(*dsfn.saliencymix(images, labels)[1:], **options)

    with pytest.raises(ValueError, match=message):
        build(softened)


@pytest.mark.parametrize("num_classes", [2, 1])
def test_a_label_outside_num_classes_is_an_error_that_names_it(files, num_classes):
    @pipeline_def
    def softened():
        images, labels = read(files)
        return dsfn.soft_labels(*dsfn.saliencymix(images, labels)[1:], num_classes=num_classes)

    message = rf"labels must be in \[0, {num_classes}\) for num_classes={num_classes}, got {num_classes}"
    with pytest.raises(RuntimeError, match=message):
        run(build(softened))


@pytest.mark.parametrize("wrong", [0.5, float("nan"), float("inf"), 2.0**60])
@pytest.mark.parametrize("name", ["labels", "source_labels"])
def test_an_invalid_class_id_is_an_error_and_not_truncated(name, wrong):
    @pipeline_def
    def softened():
        lam = fn.random.uniform(range=[0.0, 1.0])
        ids = fn.constant(idata=[1])
        nodes = {"labels": ids, "source_labels": ids, name: fn.constant(fdata=[wrong])}
        return dsfn.soft_labels(nodes["labels"], nodes["source_labels"], lam, num_classes=4)

    message = rf"ValueError: {name} must be integer class ids, got {re.escape(str(wrong))}"
    with pytest.raises(RuntimeError, match=message):
        run(build(softened))


@both_operators
def test_labels_and_weights_of_soft_labels_may_be_integers_of_any_kind(files):
    @pipeline_def
    def softened():
        _, labels = read(files)
        small = fn.cast(labels, dtype=types.UINT8)
        lam = fn.random.coin_flip()
        return labels, lam, dsfn.soft_labels(small, small, lam, num_classes=FILES)

    labels, lam, targets = run(build(softened))
    assert set(lam.ravel()) == {0, 1}
    np.testing.assert_array_equal(targets, np.eye(FILES, dtype=np.float32)[labels.ravel()])


def test_vectors_with_num_classes_are_an_error_that_says_so(files):
    @pipeline_def
    def softened():
        images, labels = read(files)
        one_hot = fn.one_hot(labels, num_classes=FILES)
        return dsfn.soft_labels(*dsfn.saliencymix(images, one_hot)[1:], num_classes=FILES)

    message = rf"labels must be one number per sample if num_classes={FILES} is given, got shape \({FILES},\)"
    with pytest.raises(RuntimeError, match=message):
        run(build(softened))


def wrong_images(kind, files):
    images, labels = read(files, size=None if kind == "ragged" else (HEIGHT, WIDTH))
    if kind == "float":
        images = fn.cast(images, dtype=types.FLOAT)
    if kind == "channels first":
        images = fn.transpose(images, perm=[2, 0, 1])
    return dsfn.saliencymix(images, labels)


@both_operators
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("ragged", r"ValueError: all images of a batch must have one shape, got \d shapes: \(.*; resize or crop"),
        ("float", r"images must be uint8 with pixel values 0\.\.255, got float32: .* Mix before normalising"),
        ("channels first", rf"\(N, H, W, C\) .* got \(8, 3, {HEIGHT}, {WIDTH}\): that looks like channels first"),
    ],
)
def test_wrong_images_are_refused_while_the_pipeline_runs(files, kind, message):
    @pipeline_def
    def wrong():
        return wrong_images(kind, files)

    with pytest.raises(RuntimeError, match=message):
        run(build(wrong))


def test_return_boxes_is_true_or_false(files):
    with pytest.raises(TypeError, match="return_boxes must be True or False, got 2"):
        build(before_and_after, files, {"return_boxes": 2})


@pytest.mark.parametrize("num_classes", [0, -3, 2.5, True])
def test_wrong_numbers_of_classes_are_refused(files, num_classes):
    @pipeline_def
    def softened():
        images, labels = read(files)
        return dsfn.soft_labels(*dsfn.saliencymix(images, labels)[1:], num_classes=num_classes)

    with pytest.raises(ValueError, match="num_classes must be an integer of at least 1, got "):
        build(softened)


def ragged(labels):
    """Return vectors of two to four numbers instead of labels."""
    return fn.pad(labels, axes=[0], shape=fn.cast(labels % 3 + 2, dtype=types.INT32))


@both_operators
@pytest.mark.parametrize("options", [{"num_classes": FILES}, {}], ids=["ids", "vectors"])
def test_labels_of_different_shapes_are_an_error_that_speaks_of_labels(files, options):
    @pipeline_def
    def softened():
        _, labels = read(files)
        labels = ragged(labels)
        return dsfn.soft_labels(labels, labels, 1.0, **options)

    message = r"ValueError: all labels of a batch must have one shape, got 3 shapes: \(2,\), "
    with pytest.raises(RuntimeError, match=message):
        run(build(softened))


@both_operators
def test_labels_of_sources_are_refused_in_words_of_their_own(files):
    @pipeline_def
    def softened():
        _, labels = read(files)
        return dsfn.soft_labels(fn.one_hot(labels, num_classes=3), ragged(labels), 1.0)

    with pytest.raises(
        RuntimeError, match=r"ValueError: all source_labels of a batch must have one shape, got 3 shapes: \(2,"
    ):
        run(build(softened))


@both_operators
def test_peaks_of_different_lengths_are_refused(files):
    @pipeline_def
    def mixed():
        images, labels = read(files)
        return dsfn.saliencymix(images, labels, peaks=ragged(labels))

    with pytest.raises(
        RuntimeError,
        match=r"ValueError: all peaks of a batch must have shape \(2,\), got 3 shapes: \(2,\), \(3,\), ",
    ):
        run(build(mixed))


@both_operators
def test_peaks_of_images_of_different_shapes_are_refused(files):
    @pipeline_def
    def ragged():
        images, _ = read(files, size=None)
        return dsfn.saliency_peaks(images)

    with pytest.raises(RuntimeError, match="ValueError: all images of a batch must have one shape, got "):
        run(build(ragged))


@both_operators
@pytest.mark.parametrize(
    ("shape", "dtype"), [([], types.INT32), ([1], types.INT64), ([1], types.UINT8), ([], types.FLOAT)]
)
def test_class_ids_without_num_classes_are_an_error_that_says_so(files, shape, dtype, device):
    @pipeline_def
    def softened():
        images, labels = read(files, device)
        labels = fn.cast(fn.reshape(labels, shape=shape), dtype=dtype)
        return dsfn.soft_labels(*dsfn.saliencymix(images, labels)[1:])

    name = types.to_numpy_type(dtype).__name__
    message = rf"ValueError: num_classes must be given where labels are class ids, got {name} of shape \(8,(| 1)\)"
    with pytest.raises(RuntimeError, match=message):
        run(build(softened, device=device))


@pytest.mark.parametrize("dtype", [types.FLOAT, types.UINT8])
def test_vectors_are_not_mixed_with_class_ids(files, dtype):
    @pipeline_def
    def softened():
        _, labels = read(files)
        return dsfn.soft_labels(fn.one_hot(labels, num_classes=FILES), fn.cast(labels, dtype=dtype), 0.5)

    message = rf"ValueError: source_labels must have shape \(8, {FILES}\), one entry for each image, got \(8, 1\)"
    with pytest.raises(RuntimeError, match=message):
        run(build(softened))


@pytest.mark.parametrize("form", ["ids", "vectors"])
def test_a_lam_outside_of_0_to_1_is_refused_while_the_pipeline_runs(files, form):
    @pipeline_def
    def softened():
        _, labels = read(files)
        labels, options = (labels, {"num_classes": FILES}) if form == "ids" else (fn.one_hot(labels), {})
        return dsfn.soft_labels(labels, labels, fn.constant(fdata=1.5, shape=[]), **options)

    with pytest.raises(RuntimeError, match=r"ValueError: lam must be in \[0, 1\], got 1\.5 at \[0\]"):
        run(build(softened))


def test_labels_that_are_no_nodes_are_refused_by_name(files):
    @pipeline_def
    def softened(name):
        _, labels = read(files)
        given = {"labels": labels, "source_labels": labels, name: types.Constant(3)}
        return dsfn.soft_labels(**given, lam=0.5, num_classes=FILES)

    for name in ("labels", "source_labels"):
        with pytest.raises(TypeError, match=f"^{name} must be a DataNode, got 3"):
            build(softened, name)


@both_operators
@pytest.mark.parametrize("dtype", [types.FLOAT, types.FLOAT16, types.BOOL])
def test_one_weight_is_a_vector(files, dtype):
    @pipeline_def
    def softened():
        images, labels = read(files)
        _, weight, other, lam = dsfn.saliencymix(images, fn.cast(labels % 2, dtype=dtype))
        return weight, other, lam, dsfn.soft_labels(weight, other, lam)

    *vectors, lam, targets = run(build(softened))
    assert (targets.shape, targets.dtype) == ((8, 1), np.float32)
    np.testing.assert_array_equal(targets, soft_labels(*vectors, lam))


@both_operators
@pytest.mark.parametrize("lam", [1.0, 0.25, types.Constant(1.0), types.Constant(np.float32(0.75)), 1])
@pytest.mark.parametrize("form", ["ids", "vectors"])
def test_lam_may_be_one_number_for_all(files, lam, form, device):
    @pipeline_def
    def softened():
        _, labels = read(files, device)
        labels = labels.gpu() if device == "gpu" else labels
        if form == "vectors":
            labels = fn.one_hot(labels, num_classes=FILES)
        others = fn.permute_batch(labels, indices=[1, 2, 3, 4, 5, 6, 7, 0])
        options = {"num_classes": FILES, "smoothing": 0.1} if form == "ids" else {}
        return labels, others, dsfn.soft_labels(labels, others, lam, **options)

    labels, others, targets = run(build(softened, device=device))
    weight = np.full(8, getattr(lam, "value", lam), np.float32)
    options = {"num_classes": FILES, "smoothing": 0.1} if form == "ids" else {}
    np.testing.assert_array_equal(targets, soft_labels(labels, others, weight, **options))


@both_operators
def test_a_constant_lam_serves_inside_of_a_conditional(files):
    @pipeline_def(enable_conditionals=True)
    def sometimes():
        _, labels = read(files)
        if labels[0] % 2 == 0:
            targets = dsfn.soft_labels(labels, labels, 1.0, num_classes=FILES)
        else:
            targets = dsfn.soft_labels(labels, labels, types.Constant(0.5), num_classes=FILES)
        return labels, targets

    labels, targets = run(build(sometimes))
    np.testing.assert_array_equal(targets, np.eye(FILES, dtype=np.float32)[labels[:, 0]])


@pytest.mark.parametrize("lam", [1.5, -1, float("nan"), True, "1"])
def test_a_wrong_constant_lam_is_refused(files, lam):
    @pipeline_def
    def softened():
        _, labels = read(files)
        return dsfn.soft_labels(labels, labels, lam, num_classes=FILES)

    with pytest.raises(ValueError, match=rf"lam must be in \[0, 1\], got {lam!r}"):
        build(softened)


@pytest.mark.parametrize(
    ("name", "op"),
    [("prob", dsfn.saliencymix), ("alpha", dsfn.cutmix), ("saliency", dsfn.saliencymix), ("per_batch", dsfn.mixup)],
)
def test_options_that_must_be_plain_values_refuse_nodes(files, name, op):
    @pipeline_def
    def drawn(value):
        images, labels = read(files)
        return op(images, labels, **{name: fn.random.uniform(range=[0.0, 1.0]) if value is None else value})

    message = f"{name} must be a plain value, the same for all batches, got a DALI DataNode"
    with pytest.raises(TypeError, match=message):
        build(drawn, None)
    with pytest.raises(TypeError, match=message.replace("DataNode", "ScalarConstant")):
        build(drawn, types.Constant(0.5))


def test_no_alpha_of_a_mode_is_a_node(files):
    @pipeline_def
    def drawn():
        images, labels = read(files)
        return dsfn.mix(images, labels, modes={"mixup": 1}, alpha={"mixup": fn.random.uniform(range=[0.1, 1.0])})

    with pytest.raises(TypeError, match="alpha must be a plain value"):
        build(drawn)


OPERATORS = [name for name in dsfn.__all__ if not name.startswith("Normali")]


def test_normalise_has_an_american_name():
    assert dsfn.Normalize is dsfn.Normalise
    assert "Normalize" in dsfn.__all__


@pytest.mark.parametrize("name", OPERATORS)
def test_outside_of_a_pipeline_the_operators_name_the_function_on_arrays(name):
    images, labels = np.zeros((2, 8, 8, 3), np.uint8), np.arange(2)
    arguments = {
        "saliency_peaks": (images,),
        "soft_labels": (labels, labels, np.ones(2, np.float32)),
    }.get(name, (images, labels))
    options = {"mix": {"modes": {"mixup": 1}}}.get(name, {})
    with pytest.raises(RuntimeError, match=rf"fn\.{name} must be called in .* use dali_saliencymix\.{name}$"):
        getattr(dsfn, name)(*arguments, **options)


def test_a_gpu_pipeline_without_cupy_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs CuPy, which is not installed; .*: pip install '\.\[cuda12\]'"):
        dali_operator.python_operator(
            print, SimpleNamespace(device="gpu"), name="saliencymix", stage=dali_operator.Stage("paste")
        )


@pytest.mark.gpu
def test_on_a_gpu_a_label_outside_num_classes_makes_its_row_nan(files):
    @pipeline_def
    def softened():
        images, labels = read(files, "gpu")
        _, labels, source_labels, lam = dsfn.saliencymix(images, labels)
        return labels, source_labels, dsfn.soft_labels(labels, source_labels, lam, num_classes=3)

    labels, source_labels, targets = run(build(softened, device="gpu"))
    outside = (labels.ravel() > 2) | (source_labels.ravel() > 2)
    np.testing.assert_array_equal(np.isnan(targets).all(1), outside)
