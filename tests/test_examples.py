"""Every example runs on real JPEG files, and what comes out is mixed as labels and weights say.

Each class of the test's data set is a colour, which survives decoding, cropping, resizing and mirroring: every pixel of
a mixed batch tells its class.
"""

from __future__ import annotations

import importlib
import io
import pkgutil
import shutil
import struct
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def
from nvidia.dali import tfrecord as tfrec
from PIL import Image

import pipelines.examples
from dali_saliencymix import core
from dali_saliencymix.datasets.image_folder import list_image_folder
from pipelines.examples import records
from pipelines.examples.__main__ import EXAMPLES, OUTPUTS, main

ROOT = Path(pipelines.examples.__file__).parents[2]
CLASSES = 8
IMAGES = 3  # of each class
BATCH = 8
SIZE = (48, 48)
NOT_EXAMPLES = {"__main__", "records"}
NAMES = sorted({module.name for module in pkgutil.iter_modules(pipelines.examples.__path__)} - NOT_EXAMPLES)
MEAN, STD = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])


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
    """Contents and labels of the files, in an order in which classes alternate."""
    contents = [Path(file).read_bytes() for file in folder.files]
    samples = list(zip(contents, folder.labels, strict=True))
    return [samples[number] for number in np.random.default_rng(1).permutation(len(samples))]


@pytest.fixture
def batches_mixed(monkeypatch):
    """Record what `core.saliencymix` is called with; return the list of (images, source_index, result)."""
    calls = []
    function = core.saliencymix

    def recorded(images, source_index, lam, **options):
        mixed = function(images, source_index, lam, **options)
        calls.append((images.copy(), source_index.copy(), mixed))
        return mixed

    monkeypatch.setattr(core, "saliencymix", recorded)
    return calls


def variants(name, folder, scratch):
    """Return the pipelines of one example, as the command line makes them."""
    definition = importlib.import_module(f"pipelines.examples.{name}").training_pipeline
    return [build(definition, *args, **options) for args, options in EXAMPLES[name](folder, scratch)]


def build(definition, *args, batch_size=BATCH, seed=5, size=SIZE[0], **options):
    return definition(*args, batch_size=batch_size, num_threads=2, device_id=None, seed=seed, size=size, **options)


def run(pipeline):
    """Run one batch; return the outputs by name."""
    return dict(zip(OUTPUTS, (np.array(output.as_tensor()) for output in pipeline.run()), strict=False))


def pixels_of(images):
    """Return images as the mixing left them, but for mirroring: (N, H, W, 3) uint8 from any layout and dtype."""
    images = images.astype(np.float64)
    if images.shape[1] == 3:
        images = images.transpose(0, 2, 3, 1)
    return (images * STD + MEAN).round().astype(np.uint8)


def classes_of(images):
    """Return the class of each pixel, (N, H, W), from its colour."""
    return ((pixels_of(images) > 125) << np.arange(3)).sum(-1)


def check_mixed_as_labels_say(images, labels, source_labels, lam):
    """Check each image: one rectangle of the source's class on ground of its own, of the share that `lam` says."""
    for of_pixel, label, source_label, own in zip(classes_of(images), labels, source_labels, lam, strict=True):
        assert set(np.unique(of_pixel)) <= {label, source_label}
        if label == source_label:
            continue
        foreign = of_pixel == source_label
        assert foreign.mean() == pytest.approx(1 - own, abs=1e-6)
        if foreign.any():
            rows, columns = np.flatnonzero(foreign.any(1)), np.flatnonzero(foreign.any(0))
            assert foreign[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


def test_the_command_line_knows_every_example():
    assert list(NAMES) == sorted(EXAMPLES)


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_out_is_mixed_as_it_says(name, folder, batches_mixed, tmp_path):
    for pipeline in variants(name, folder, tmp_path):
        outputs = [run(pipeline) for _ in range(3)]
        for batch in outputs:
            images, labels, source_labels, lam = (batch[output] for output in OUTPUTS[:4])
            assert len(images) == BATCH
            assert sorted(images.shape[1:]) == [3, *SIZE]
            assert images.dtype == (np.float16 if name == "float16" else np.float32)
            if name != "label_forms":
                assert labels.dtype == source_labels.dtype == (np.int64 if name == "tfrecord" else np.int32)
                assert labels.size == source_labels.size == BATCH
                assert (labels != source_labels).any()
            assert lam.shape == (BATCH,)
            assert lam.dtype == np.float32
            assert ((lam >= 0) & (lam <= 1)).all()
            assert (lam < 1).any()
            if name != "auto_augment" and labels.size == BATCH:  # colours stay, and labels are class ids
                check_mixed_as_labels_say(images, labels.ravel(), source_labels.ravel(), lam)
        if name == "conditionals":
            continue  # the operator does not see the whole batch there
        for batch in outputs:
            # Pipelines run ahead, so the records of one variant may stand among those of another.
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


def test_automatic_augmentation_comes_before_the_mixing(folder, batches_mixed, tmp_path):
    (pipeline,) = variants("auto_augment", folder, tmp_path)
    for _ in range(3):
        run(pipeline)
    before = np.concatenate([images for images, _, _ in batches_mixed])
    # A file's own colours are 60 to 90 and 190 to 220; turning, shifting and the colour operations make others.
    changed = ((before < 50) | ((before > 100) & (before < 180)) | (before > 230)).any((1, 2, 3))
    assert 0.3 < changed.mean() < 1


def test_a_branch_of_a_conditional_mixes_its_samples_among_themselves(folder):
    definition = importlib.import_module("pipelines.examples.conditionals").training_pipeline
    unmixed_class = 5
    pipeline = build(definition, folder.files, folder.labels, unmixed_class=unmixed_class)
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


def test_a_sample_that_is_alone_in_the_branch_stays_as_it_is(folder, batches_mixed):
    definition = importlib.import_module("pipelines.examples.conditionals").training_pipeline
    # One image of class 0, seven of class 1.
    files, labels = folder.files[:1] + [folder.files[IMAGES]] * 7, [0] + [1] * 7
    pipeline = build(definition, files, labels, unmixed_class=1)
    batch = run(pipeline)
    assert [len(images) for images, _, _ in batches_mixed[:1]] == [1]
    np.testing.assert_array_equal(batch["source_labels"], batch["labels"])
    np.testing.assert_array_equal(batches_mixed[0][2].images, batches_mixed[0][0])


def test_targets_of_each_form_are_labels_weighted_by_lam(folder, tmp_path):
    pipelines_of_forms = variants("label_forms", folder, tmp_path)
    assert len(pipelines_of_forms) == 3
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
        # As tags each image has its class and the one behind it.
        own, source = (np.maximum(rows, np.roll(rows, 1, axis=1)) for rows in (own, source))
        np.testing.assert_array_equal(by_tags["labels"], own)
        np.testing.assert_array_equal(by_tags["source_labels"], source)
        np.testing.assert_allclose(by_tags["targets"], lam * own + (1 - lam) * source, atol=1e-6)
        np.testing.assert_array_equal(by_tags["targets"][(own == 1) & (source == 1)], 1)


def test_float16_is_channels_last_in_pytorch_without_a_copy(folder, tmp_path):
    torch = pytest.importorskip("torch")
    (pipeline,) = variants("float16", folder, tmp_path)
    images = torch.from_numpy(run(pipeline)["images"]).permute(0, 3, 1, 2)
    assert images.dtype == torch.float16
    assert images.shape == (BATCH, 3, *SIZE)
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("epochs_before", [0, 1])
def test_a_restored_external_source_goes_on_identically(folder, tmp_path, epochs_before):
    definition = importlib.import_module("pipelines.examples.external_source").training_pipeline
    ((arguments, _),) = EXAMPLES["external_source"](folder, tmp_path)
    batches = len(folder) // BATCH
    pipeline = build(definition, *arguments)
    for _ in range(epochs_before):
        for _ in range(batches):
            run(pipeline)
        with pytest.raises(StopIteration):
            pipeline.run()
        pipeline.reset()
    run(pipeline)
    state = pipeline.checkpoint()
    expected = [run(pipeline) for _ in range(batches - 1)]
    restored = build(definition, *arguments, checkpoint=state)
    for batch in expected:
        for output, values in run(restored).items():
            np.testing.assert_array_equal(values, batch[output])
    for ended in (pipeline, restored):
        with pytest.raises(StopIteration):
            ended.run()


def test_an_external_source_gives_each_image_once_an_epoch_in_a_new_order(folder, tmp_path):
    definition = importlib.import_module("pipelines.examples.external_source").training_pipeline
    ((arguments, _),) = EXAMPLES["external_source"](folder, tmp_path)
    pipeline = build(definition, *arguments)
    orders = []
    for _ in range(2):
        orders.append([label for _ in range(len(folder) // BATCH) for label in run(pipeline)["labels"].ravel()])
        with pytest.raises(StopIteration):
            pipeline.run()
        pipeline.reset()
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(folder.labels)
    assert orders[0] != orders[1]


def test_webdataset_labels_of_any_length_become_numbers(samples, tmp_path):
    numbers = [0, 7, 10, 99, 100, 4321, 65536, 999999]
    records.write_tar([(samples[0][0], number) for number in numbers], tmp_path / "tar", tmp_path / "idx")
    definition = importlib.import_module("pipelines.examples.webdataset").training_pipeline
    batch = run(build(definition, str(tmp_path / "tar"), str(tmp_path / "idx")))
    assert sorted(batch["labels"]) == numbers


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
    """Put a comment of `comment` bytes at the beginning of a JPEG file."""
    return content[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + content[2:]


@pytest.fixture
def awkward(samples):
    """Samples of awkward sizes and labels, and some in which RecordIO's magic number stands, aligned or not."""
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


# The command line.


def test_the_command_line_runs_every_example_on_a_folder(folder):
    # As ``python -m pipelines.examples NAME DATA ..`` for each name, in one process to save the imports.
    run_each = (
        "import runpy, sys\n"
        "names, *arguments = sys.argv[1:]\n"
        "for name in names.split():\n"
        "    sys.argv = ['', name, *arguments]\n"
        "    try:\n"
        "        runpy.run_module('pipelines.examples', run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as end:\n"
        "        print('exit status', end.code)\n"
    )
    options = ["-n", "4", "--size", "40", "--images", "16"]
    command = [sys.executable, "-c", run_each, " ".join(NAMES), str(folder.root), *options]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    printed = found.stdout.split("exit status 0\n")
    assert len(printed) == len(NAMES) + 1, found.stderr
    for name, text in zip(NAMES, printed, strict=False):
        blocks = text.split(f"{name}, ")[1:]
        assert len(blocks) == (12 if name == "label_forms" else 4)
        for block in blocks:
            shape = "(8, 40, 40, 3) float16" if name == "float16" else "(8, 3, 40, 40) float32"
            assert f"  images        {shape}\n" in block
            (line,) = [line for line in block.splitlines() if line.startswith("  lam")]
            weights = [float(word) for word in line.split()[3:]]
            assert line.startswith("  lam           (8,) float32 ")
            assert len(weights) == 8
            assert all(0 <= weight <= 1 for weight in weights)
            assert ("\n  targets       (8, 8) float32\n" in block) == (name == "label_forms")


def test_the_command_line_makes_its_own_data():
    command = [sys.executable, "-m", "pipelines.examples", "tfrecord", "-n", "1", "--size", "32"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    assert found.stdout.startswith("tfrecord, batch 0\n  images        (8, 3, 32, 32) float32\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["float16", "nowhere"], "float16: error: nowhere: no such folder"),
        (["webdataset", ".", "-b", "99"], r"a batch of 99 images needs as many, there are 24"),
        (["tfrecord", ".", "-b", "9", "--images", "8"], r"a batch of 9 images needs as many, there are 8"),
    ],
)
def test_the_command_line_says_what_is_wrong(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder.root)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such"], "argument NAME: invalid choice: 'no_such'"),
        (["tfrecord", "-b", "0"], "argument -b/--batch-size: must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_status:
        main(arguments)
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err
