"""Every job of pipelines/ runs on real JPEG files, and its images are mixed as its labels and weights say.

So do the pipelines in the pages on jobs and on DALI. Each class of the test data set is a colour, which survives
decoding, cropping, resizing and flipping, so every pixel of a mixed batch shows its class.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import io
import math
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tarfile
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali import tfrecord as tfrec
from PIL import Image
from shared import records
from shared.programs import REPOSITORY, run_program

from dali_saliencymix._dali import mix_nodes as dali_mix
from dali_saliencymix.datasets.image_folder import list_image_folder
from pipelines import external_source, imagenet

CLASSES = 8
IMAGES = 3  # of each class
BATCH = 8
SIZE = (48, 48)
JOBS = {path.stem: path for path in (REPOSITORY / "pipelines").glob("*.py")}
OUTPUTS = ("images", "labels", "source_labels", "lam", "targets")
MEAN, STD = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])
# Multi-label vectors: each image has its class and the next one.
TAGS = np.maximum(np.eye(CLASSES, dtype=np.float32), np.roll(np.eye(CLASSES, dtype=np.float32), 1, axis=1))


def jpeg(label, number):
    """Return a JPEG file of one colour for each class, with a light spot for the detector to find."""
    rng = np.random.default_rng([label, number])
    height, width = rng.integers(60, 120, 2)
    y, x = np.mgrid[:height, :width]
    spot = 30 * np.exp(-(((y - rng.uniform(0, height)) ** 2 + (x - rng.uniform(0, width)) ** 2) / 50))
    colour = [60 + 130 * (label >> channel & 1) for channel in range(3)]
    stream = io.BytesIO()
    Image.fromarray((colour + spot[..., None]).astype(np.uint8)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    for label in range(CLASSES):
        (root / f"class{label}").mkdir()
        for number in range(IMAGES):
            (root / f"class{label}" / f"{number}.jpg").write_bytes(jpeg(label, number))
    return list_image_folder(root)


@pytest.fixture(scope="module")
def samples(folder):
    """Contents and labels of the files, with alternating classes."""
    contents = [Path(file).read_bytes() for file in folder.files]
    samples = list(zip(contents, folder.labels, strict=True))
    return [samples[number] for number in np.random.default_rng(1).permutation(len(samples))]


@pytest.fixture
def batches_mixed(monkeypatch):
    """Record the calls of the DALI operators; return the list of (images, source_index, result)."""
    calls = []
    function = dali_mix.apply

    def recorded(options, images, **arrays):
        mixed = function(options, images, **arrays)
        calls.append((images.copy(), arrays["source_index"].copy(), mixed))
        return mixed

    monkeypatch.setattr(dali_mix, "apply", recorded)
    return calls


def page_as_module(page, folder):
    """Return a module with the imports, constants and functions of a page.

    DALI reads the source of a pipeline definition, so the module has to be a file.
    """
    blocks = re.findall(r"^```python\n(.*?)^```$", (REPOSITORY / "docs" / page).read_text(), re.M | re.S)

    def kept(node):
        constant = isinstance(node, ast.Assign) and all(
            name.id.isupper() for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)
        )
        return constant or isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)

    source = "\n".join(ast.unparse(node) for node in ast.parse("".join(blocks)).body if kept(node))
    path = folder / "page.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    return page_as_module("guides/dali.md", tmp_path_factory.mktemp("guide"))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return page_as_module("jobs.md", tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def record_files(samples, tmp_path_factory):
    """The samples in each record format: an object with pairs of file and index."""
    root = tmp_path_factory.mktemp("records")
    files = {}
    for name, (write, _) in FORMATS.items():
        files[name] = str(root / name), str(root / f"{name}.idx")
        write(samples, *files[name])
    return SimpleNamespace(**files)


def label_forms_pipeline(form):
    return lambda data: functools.partial(
        data.jobs.label_forms_pipeline, data.files, data.labels, form=form, num_classes=CLASSES, tags=TAGS
    )


# For each pipeline, a function from the test's data to a function that creates the pipeline.
GRAPHS = {
    "imagenet": lambda data: functools.partial(imagenet.training_pipeline, data.files, data.labels, device="cpu"),
    "conditionals": lambda data: functools.partial(data.jobs.conditional_pipeline, data.root),
    "external_source": lambda data: functools.partial(external_source.training_pipeline, data.source),
    "webdataset": lambda data: functools.partial(data.jobs.webdataset_pipeline, *data.tar),
    "tfrecord": lambda data: functools.partial(data.jobs.tfrecord_pipeline, *data.tfrecord),
    "recordio": lambda data: functools.partial(data.jobs.recordio_pipeline, *data.recordio),
    "class_ids": label_forms_pipeline("class_ids"),
    "one_hot": label_forms_pipeline("one_hot"),
    "multi_label": label_forms_pipeline("multi_label"),
    "guide: augmented": lambda data: functools.partial(data.guide.augmented_pipeline, data.root),
    "guide: float16": lambda data: functools.partial(data.guide.float16_pipeline, data.root),
}


@pytest.fixture
def build(folder, record_files, guide, jobs):
    """Return a function that builds one of `GRAPHS` by its name."""
    source = external_source.ShuffledImages(folder)
    of_folder = {"root": str(folder.root), "files": folder.files, "labels": folder.labels, "source": source}
    data = SimpleNamespace(**of_folder, **vars(record_files), guide=guide, jobs=jobs)
    return lambda name, **options: built(GRAPHS[name](data), **options)


def built(definition, *args, seed=5, **options):
    options = {"batch_size": BATCH, "num_threads": 2, "device_id": None, "seed": seed, "size": SIZE[0], **options}
    return definition(*args, **options)


def run(pipeline):
    """Run one batch; return the outputs by name."""
    return dict(zip(OUTPUTS, (np.array(output.as_tensor()) for output in pipeline.run()), strict=False))


def pixels_of(images):
    """Return images as they were after mixing, but possibly flipped: (N, H, W, 3) uint8 from any layout and dtype."""
    images = images.astype(np.float64)
    if images.shape[1] == 3:
        images = images.transpose(0, 2, 3, 1)
    return (images * STD + MEAN).round().astype(np.uint8)


def classes_of(images):
    """Return the class of each pixel, (N, H, W), from its colour."""
    return ((pixels_of(images) > 125) << np.arange(3)).sum(-1)


def check_mixed_as_labels_say(images, labels, source_labels, lam):
    """Check that each image has one rectangle of the source's class, whose area agrees with `lam`."""
    for of_pixel, label, source_label, own in zip(classes_of(images), labels, source_labels, lam, strict=True):
        assert set(np.unique(of_pixel)) <= {label, source_label}
        if label == source_label:
            continue
        foreign = of_pixel == source_label
        assert foreign.mean() == pytest.approx(1 - own, abs=1e-6)
        if foreign.any():
            rows, columns = np.flatnonzero(foreign.any(1)), np.flatnonzero(foreign.any(0))
            assert foreign[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


@pytest.mark.parametrize("name", GRAPHS)
def test_what_comes_out_is_mixed_as_it_says(name, build, batches_mixed):
    pipeline = build(name)
    outputs = [run(pipeline) for _ in range(3)]
    for batch in outputs:
        images, labels, source_labels, lam = (batch[output] for output in OUTPUTS[:4])
        assert len(images) == BATCH
        assert sorted(images.shape[1:]) == [3, *SIZE]
        assert images.dtype == (np.float16 if name == "guide: float16" else np.float32)
        if name not in ("one_hot", "multi_label"):
            assert labels.dtype == source_labels.dtype == (np.int64 if name == "tfrecord" else np.int32)
            assert labels.size == source_labels.size == BATCH
            assert (labels != source_labels).any()
        assert lam.shape == (BATCH,)
        assert lam.dtype == np.float32
        assert ((lam >= 0) & (lam <= 1)).all()
        assert (lam < 1).any()
        if name != "guide: augmented" and labels.size == BATCH:  # colours are preserved, and labels are class ids
            check_mixed_as_labels_say(images, labels.ravel(), source_labels.ravel(), lam)
        if name == "conditionals":
            continue  # the operator does not see the whole batch there
        # Pipelines prefetch, so there are more records than batches.
        called = [call for call in batches_mixed if np.array_equal(call[2].lam, batch["lam"])]
        before, source_index, mixed = called[0]
        np.testing.assert_array_equal(batch["source_labels"], batch["labels"][source_index])
        for image, whole, receiver, source in zip(
            pixels_of(batch["images"]), mixed.images, before, before[source_index], strict=True
        ):
            mirrored = np.abs(whole[:, ::-1].astype(int) - image).max() <= 1
            whole_image = image[:, ::-1] if mirrored else image
            close = [(np.abs(other.astype(int) - whole_image) <= 1).all(-1) for other in (receiver, source)]
            assert (close[0] | close[1]).all()


def test_automatic_augmentation_comes_before_the_mixing(build, batches_mixed):
    pipeline = build("guide: augmented")
    for _ in range(3):
        run(pipeline)
    before = np.concatenate([images for images, _, _ in batches_mixed])
    # The colours of a file are 60 to 90 and 190 to 220; rotations, shifts and colour operations produce others.
    changed = ((before < 50) | ((before > 100) & (before < 180)) | (before > 230)).any((1, 2, 3))
    assert 0.3 < changed.mean() < 1


def test_a_branch_of_a_conditional_mixes_its_samples_among_themselves(build):
    unmixed_class = 5
    pipeline = build("conditionals", unmixed_class=unmixed_class)
    untouched = 0
    for _ in range(6):
        batch = run(pipeline)
        labels, source_labels = batch["labels"].ravel(), batch["source_labels"].ravel()
        outside = labels == unmixed_class
        untouched += outside.sum()
        np.testing.assert_array_equal(batch["lam"][outside], 1)
        np.testing.assert_array_equal(source_labels[outside], unmixed_class)
        assert sorted(source_labels[~outside]) == sorted(labels[~outside])
        assert (classes_of(batch["images"])[~outside] != unmixed_class).all()
        assert (classes_of(batch["images"])[outside] == unmixed_class).all()
    assert untouched


def test_a_sample_that_is_alone_in_the_branch_stays_as_it_is(batches_mixed, jobs, tmp_path):
    # One image of class 0, seven of class 1.
    for number in range(BATCH):
        file = tmp_path / f"class{min(number, 1)}" / f"{number}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(jpeg(min(number, 1), number))
    batch = run(built(jobs.conditional_pipeline, str(tmp_path), unmixed_class=1))
    assert sorted(batch["labels"].ravel()) == [0] + [1] * 7
    assert [len(images) for images, _, _ in batches_mixed[:1]] == [1]
    np.testing.assert_array_equal(batch["source_labels"], batch["labels"])
    np.testing.assert_array_equal(batches_mixed[0][2].images, batches_mixed[0][0])


def test_targets_of_each_form_are_labels_weighted_by_lam(build):
    pipelines_of_forms = [build(form) for form in ("class_ids", "one_hot", "multi_label")]
    ids, one_hot, multi_label = ([run(pipeline) for _ in range(3)] for pipeline in pipelines_of_forms)
    eye = np.eye(CLASSES, dtype=np.float32)
    for by_id, by_vector, by_tags in zip(ids, one_hot, multi_label, strict=True):
        lam = by_id["lam"][:, None]
        own, source = (eye[by_id[output].ravel()] for output in ("labels", "source_labels"))
        np.testing.assert_array_equal(by_vector["labels"], own)
        np.testing.assert_array_equal(by_vector["source_labels"], source)
        for batch in (by_id, by_vector):
            assert batch["targets"].dtype == np.float32
            np.testing.assert_allclose(batch["targets"], lam * own + (1 - lam) * source, atol=1e-6)
            np.testing.assert_allclose(batch["targets"].sum(1), 1, atol=1e-6)
        # Targets name the classes of the pixels, in their shares.
        shares = (classes_of(by_vector["images"])[..., None] == np.arange(CLASSES)).mean((1, 2))
        np.testing.assert_allclose(by_vector["targets"], shares, atol=1e-6)
        own, source = (TAGS[by_id[output].ravel()] for output in ("labels", "source_labels"))
        np.testing.assert_array_equal(by_tags["labels"], own)
        np.testing.assert_array_equal(by_tags["source_labels"], source)
        np.testing.assert_allclose(by_tags["targets"], lam * own + (1 - lam) * source, atol=1e-6)
        np.testing.assert_array_equal(by_tags["targets"][(own == 1) & (source == 1)], 1)


def test_float16_is_channels_last_in_pytorch_without_a_copy(build):
    images = torch.from_numpy(run(build("guide: float16"))["images"]).permute(0, 3, 1, 2)
    assert images.dtype == torch.float16
    assert images.shape == (BATCH, 3, *SIZE)
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("epochs_before", [0, 1])
def test_a_restored_external_source_goes_on_identically(build, epochs_before):
    batches = CLASSES * IMAGES // BATCH
    pipeline = build("external_source")
    for _ in range(epochs_before):
        for _ in range(batches):
            run(pipeline)
        with pytest.raises(StopIteration):
            pipeline.run()
        pipeline.reset()
    run(pipeline)
    state = pipeline.checkpoint()
    expected = [run(pipeline) for _ in range(batches - 1)]
    restored = build("external_source", checkpoint=state)
    for batch in expected:
        for output, values in run(restored).items():
            np.testing.assert_array_equal(values, batch[output])
    for ended in (pipeline, restored):
        with pytest.raises(StopIteration):
            ended.run()


def test_an_external_source_gives_each_image_once_an_epoch_in_a_new_order(folder, build):
    pipeline = build("external_source")
    orders = []
    for _ in range(2):
        orders.append([label for _ in range(len(folder) // BATCH) for label in run(pipeline)["labels"].ravel()])
        with pytest.raises(StopIteration):
            pipeline.run()
        pipeline.reset()
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(folder.labels)
    assert orders[0] != orders[1]


def test_webdataset_labels_of_any_length_become_numbers_and_other_text_no_class(samples, jobs, tmp_path):
    texts = {"0": 0, "7": 7, "10\n": 10, "0099": 99, "100": 100, "4321": 4321, "65536": 65536, "999999\n": 999999}
    texts |= dict.fromkeys(("1000000", "12\r\n", " 7", "7 ", "1 2", "-1", "cat", "\n"), -1)
    records.write_tar([(samples[0][0], text) for text in texts], tmp_path / "tar", tmp_path / "idx")
    pipeline = built(jobs.webdataset_pipeline, str(tmp_path / "tar"), str(tmp_path / "idx"))
    labels = [label for _ in range(len(texts) // BATCH) for label in run(pipeline)["labels"].ravel()]
    assert sorted(labels) == sorted(texts.values())


# The record files.


@pipeline_def
def read_tar(archive, index):
    return tuple(fn.readers.webdataset(paths=archive, index_paths=index, ext=["jpg", "cls"]))


@pipeline_def
def read_tfrecord(path, index):
    features = {
        "image/encoded": tfrec.FixedLenFeature((), tfrec.string, ""),
        "image/class/label": tfrec.FixedLenFeature([1], tfrec.int64, -1),
    }
    example = fn.readers.tfrecord(path=path, index_path=index, features=features)
    return example["image/encoded"], example["image/class/label"]


@pipeline_def
def read_recordio(path, index):
    return tuple(fn.readers.mxnet(path=path, index_path=index))


FORMATS = {
    "tar": (records.write_tar, read_tar),
    "tfrecord": (records.write_tfrecord, read_tfrecord),
    "recordio": (records.write_recordio, read_recordio),
}


def with_comment(content, comment):
    """Insert a comment of `comment` bytes at the beginning of a JPEG file."""
    return content[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + content[2:]


@pytest.fixture
def awkward(samples):
    """Samples of unusual sizes and labels, some of which contain RecordIO's magic number, aligned or not."""
    magic = bytes.fromhex("0a23d7ce")
    contents = [with_comment(content, bytes(number)) for number, (content, _) in enumerate(samples[:8])]
    contents += [
        with_comment(samples[8][0], bytes(number) + 2 * magic + b"x" * (5 + number) + 3 * magic) for number in range(8)
    ]
    labels = [0, 1, 9, 10, 127, 128, 16383, 16384, 65535, 2**21, 2**24, *range(5)]
    return list(zip(contents, labels, strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_record_files_give_back_bytes_and_labels(name, samples, awkward, tmp_path):
    write, read = FORMATS[name]
    expected = samples + awkward
    write(expected, tmp_path / "records", tmp_path / "index")
    pipeline = read(
        str(tmp_path / "records"), str(tmp_path / "index"), batch_size=len(expected), num_threads=1, device_id=None
    )
    contents, labels = pipeline.run()
    for number, (content, label) in enumerate(expected):
        assert bytes(np.array(contents.at(number))) == content
        found = np.array(labels.at(number))
        assert int(bytes(found) if name == "tar" else found[0]) == label


def test_tar_files_hold_what_tar_finds(awkward, tmp_path):
    records.write_tar(awkward, tmp_path / "a.tar", tmp_path / "a.idx")
    with tarfile.open(tmp_path / "a.tar") as archive:
        found = {entry.name: archive.extractfile(entry).read() for entry in archive}
    assert list(found)[:4] == ["00000000.jpg", "00000000.cls", "00000001.jpg", "00000001.cls"]
    assert list(found.values())[0::2] == [content for content, _ in awkward]
    assert list(found.values())[1::2] == [str(label).encode() for _, label in awkward]


def crc32c_bit_by_bit(data):
    """Divide by Castagnoli's polynomial in its usual notation, high powers first, on reflected bytes."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= int(f"{byte:08b}"[::-1], 2) << 24
        for _ in range(8):
            register = (register << 1 ^ (0x11EDC6F41 if register >> 31 else 0)) & 0xFFFFFFFF
    return int(f"{register:032b}"[::-1], 2) ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        # The examples of RFC 3720, section B.4.
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_crc32c_of_known_data(data, crc):
    assert records.crc32c(data) == crc32c_bit_by_bit(data) == crc


def test_tfrecords_are_framed_with_masked_crcs(samples, tmp_path):
    records.write_tfrecord(samples[:2], tmp_path / "records", tmp_path / "index")
    data = (tmp_path / "records").read_bytes()
    position = 0
    for _ in range(2):
        (length,) = struct.unpack_from("<Q", data, position)
        for begin, size in ((position, 8), (position + 12, length)):
            crc = crc32c_bit_by_bit(data[begin : begin + size])
            turned = crc >> 15 | (crc & 0x7FFF) << 17
            (found,) = struct.unpack_from("<I", data, begin + size)
            assert found == (turned + 0xA282EAD8) % 2**32
        position += 16 + length
    assert position == len(data)


def test_a_tfrecord_is_what_tensorflow_writes(tmp_path):
    # Written by tf.io.TFRecordWriter from a tf.train.Example, TensorFlow 2.21, serialised with deterministic=True.
    expected = bytes.fromhex(TENSORFLOW_RECORD)
    records.write_tfrecord([(b"pixels", 300)], tmp_path / "records", tmp_path / "index")
    assert (tmp_path / "records").read_bytes() == expected


def test_a_recordio_file_is_what_mxnet_writes(tmp_path):
    # Written by mxnet.recordio.MXIndexedRecordIO with ids 0 and 1, MXNet 1.9.1; the second holds
    # the magic number twice, once at a multiple of 4.
    expected = bytes.fromhex(MXNET_RECORDS)
    magic = bytes.fromhex("0a23d7ce")
    records.write_recordio([(b"pixels", 300), (b"four" + magic + b"xy" + magic, 2)], tmp_path / "rec", tmp_path / "idx")
    assert (tmp_path / "rec").read_bytes() == expected
    assert (tmp_path / "idx").read_text() == f"0\t0\n1\t{8 + 24 + 6 + 2}\n"


TENSORFLOW_RECORD = (
    "3c00000000000000c8b7a3520a3a0a1b0a11696d6167652f636c6173732f6c6162656c12061a040a02ac020a1b0a0d69"
    "6d6167652f656e636f646564120a0a080a06706978656c7350152d87"
)
MXNET_RECORDS = (
    "0a23d7ce1e000000000000000000964300000000000000000000000000000000706978656c7300000a23d7ce1c000020"
    "000000000000004001000000000000000000000000000000666f75720a23d7ce0600006078790a23d7ce0000"
)


def script(name):
    path = Path(sysconfig.get_path("scripts"), name)
    if not path.exists():
        pytest.skip(f"DALI's script {name} is not in {path.parent}")
    return str(path)


@pytest.mark.parametrize(("name", "tool"), [("tar", "wds2idx"), ("tfrecord", "tfrecord2idx")])
def test_indexes_are_what_dalis_scripts_make(name, tool, awkward, tmp_path):
    if tool == "wds2idx" and shutil.which("tar") is None:
        pytest.skip("wds2idx calls tar, which is not installed")
    FORMATS[name][0](awkward, tmp_path / "records", tmp_path / "index")
    command = [sys.executable, script(tool), str(tmp_path / "records"), str(tmp_path / "expected")]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "index").read_text() == (tmp_path / "expected").read_text()


def test_negative_class_ids_are_refused(tmp_path):
    with pytest.raises(ValueError, match="class ids must not be negative, got -1"):
        records.write_tfrecord([(b"", -1)], tmp_path / "records", tmp_path / "index")


# The jobs as programs.


def run_job(name, *arguments, check=True):
    return run_program(JOBS[name], *arguments, check=check)


def test_the_job_of_an_external_source_prints_labels_and_weights(folder):
    shape, head, rows = run_job("external_source", folder.root).stdout.split("\n", 2)
    assert (shape, head) == ("(8, 3, 224, 224)", "label, source label, lam:")
    rows = np.array(re.findall(r"\d[\d.e-]*", rows), float).reshape(-1, 3)
    assert len(rows) == 8
    assert np.isin(rows[:, :2], np.arange(CLASSES)).all()
    assert ((rows[:, 2] >= 0) & (rows[:, 2] <= 1)).all()


@pytest.mark.parametrize("layout", ["class folders", "train/"])
def test_the_imagenet_job_trains_ten_steps(folder, tmp_path, layout):
    data = folder.root
    if layout == "train/":
        (tmp_path / "train").symlink_to(folder.root)
        data = tmp_path
    lines = run_job("imagenet", data, "-b", "8", "--size", "32").stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [["step", str(step), "loss"] for step in range(1, 11)]
    assert all(math.isfinite(float(line.split()[3])) for line in lines)


def test_the_imagenet_job_says_in_one_line_that_there_is_no_gpu(folder):
    ended = run_job("imagenet", folder.root, "--device", "gpu", check=False)
    assert ended.returncode == 1
    assert ended.stderr == "error: --device must be cpu if PyTorch finds no CUDA GPU, got gpu\n"


def test_the_imagenet_job_is_short():
    assert len(JOBS["imagenet"].read_text().splitlines()) <= 80


@pytest.mark.parametrize("name", JOBS)
def test_no_job_has_the_name_of_a_module(name):
    # The folder of a program is first on its path, so the job would be imported instead of the module.
    elsewhere = [path for path in sys.path if Path(path).resolve() != REPOSITORY / "pipelines"]
    assert PathFinder.find_spec(name, elsewhere) is None
    assert name not in sys.stdlib_module_names


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_one_file_that_needs_the_public_package_only(name):
    imported = {
        module
        for node in ast.walk(ast.parse(JOBS[name].read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert not {module.partition(".")[0] for module in imported} & {"pipelines", *JOBS}
    of_package = {module for module in imported if module.startswith("dali_saliencymix")}
    known = {"", ".fn", ".datasets.image_folder", ".packages", ".pixels"}
    assert of_package <= {f"dali_saliencymix{module}" for module in known}
