"""Python functions in a pipeline, and the memory of their results."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types

from dali_saliencymix._dali import python_operator as dali_operator
from dali_saliencymix._dali.python_operator import Buffers, Stage, python_operator


def address(array):
    return array.__array_interface__["data"][0]


def test_a_buffer_is_used_again_once_no_view_of_it_is_left():
    buffers = Buffers()
    first = buffers.take((3, 4, 5), np.float32)
    at = address(first)
    assert at % 64 == 0
    row = first.reshape(12, 5)[2:4]
    del first
    other = buffers.take((3, 4, 5), np.float32)
    assert address(other) != at  # there is still a view of the first one
    del row
    assert address(buffers.take((3, 4, 5), np.float32)) == at
    assert address(buffers.take((5, 12), np.int32)) == at  # the same number of bytes


def test_a_buffer_of_another_size_is_not_used():
    buffers = Buffers()
    del (taken := {"array": buffers.take((2, 8), np.uint8)})["array"]
    del taken
    larger = buffers.take((40, 8), np.uint8)
    larger[:] = 7
    assert larger.shape == (40, 8)
    assert larger.flags.c_contiguous
    assert larger.flags.writeable


def test_no_more_buffers_are_kept_than_are_in_use_at_a_time():
    buffers = Buffers()
    held = [buffers.take((100,), np.uint8) for _ in range(20)]
    assert len({address(array) for array in held}) == 20
    del held
    assert len(buffers._free) == dali_operator._MOST_FREE


@pytest.fixture(params=["whole batches", "samples"])
def operator(request, monkeypatch):
    if request.param == "samples":
        monkeypatch.setattr(dali_operator, "whole_batches_work", lambda: False)
    return request.param


@pipeline_def(batch_size=4, num_threads=3, device_id=None)
def calling(function, values, num_outputs, layouts=()):
    numbers = fn.external_source(source=lambda: values)
    outputs = python_operator(
        function, numbers, name="doubled", stage=Stage("double"), num_outputs=num_outputs, layouts=layouts
    )
    return tuple(outputs) if num_outputs > 1 else outputs


def test_a_function_gets_a_batch_and_gives_batches(operator):
    values = np.arange(4 * 2 * 3 * 1, dtype=np.int16).reshape(4, 2, 3, 1)
    seen = []

    def function(batch):
        seen.append((batch.shape, batch.dtype))
        read_only = batch * 2
        read_only.setflags(write=False)
        return read_only, batch.sum(axis=(1, 2, 3)).astype(np.float32), batch[..., 0].transpose(0, 2, 1)

    doubled, sums, turned = calling(function, values, 3, ["HWC"]).run()
    assert seen[0] == ((4, 2, 3, 1), np.int16)
    np.testing.assert_array_equal(doubled.as_array(), values * 2)
    assert (doubled.layout(), sums.layout(), turned.layout()) == ("HWC", "", "")
    np.testing.assert_array_equal(sums.as_array(), values.sum(axis=(1, 2, 3)))
    assert sums.dtype == types.FLOAT
    np.testing.assert_array_equal(turned.as_array(), values[..., 0].transpose(0, 2, 1))


def test_parts_of_a_batch_of_one_are_taken_as_they_are(operator):
    # With a batch of one, an array is contiguous whatever its strides.
    values = np.arange(12.0).reshape(1, 3, 4)

    def function(batch):
        return batch[:, 0, 1], batch[:, :1].transpose(0, 2, 1), batch[:, :, 1:2]

    outputs = calling(function, values, 3, batch_size=1).run()
    for output, expected in zip(outputs, function(values), strict=True):
        np.testing.assert_array_equal(output.as_array(), expected)


def test_what_a_function_raises_is_in_dali_s_error(operator):
    def function(batch):
        msg = f"four is enough, got {len(batch)}"
        raise ValueError(msg)

    with pytest.raises(RuntimeError, match="ValueError: four is enough, got 4"):
        calling(function, np.zeros((4, 1)), 1).run()


def test_pipelines_may_end_while_they_work(operator):
    # DALI releases Python objects in its own threads, which need the GIL for it.
    for runs in (0, 1, 2, 1, 0, 3):
        pipeline = calling(lambda batch: (batch + 1,), np.zeros((4, 50, 50)), 1)
        for _ in range(runs):
            outputs = pipeline.run()
        ended = weakref.ref(pipeline)
        del pipeline
        gc.collect(0)  # of the new objects only: a collection of all takes longer than the test
        assert ended() is None
        if runs:
            np.testing.assert_array_equal(outputs[0].as_array(), 1)


def made(how):
    """Return a placeholder for the nodes of an operator, which records how it was created."""
    return SimpleNamespace(source=SimpleNamespace(), how=how)


@pytest.fixture
def in_no_graph(monkeypatch):
    """Allow creating operators without a pipeline definition; return the pipeline that they see."""
    pipeline = SimpleNamespace(num_threads=1)
    monkeypatch.setattr(dali_operator.Pipeline, "current", lambda: pipeline)
    whole_batches = lambda *_, **__: lambda *_: made("whole batches")  # noqa: E731
    monkeypatch.setattr(dali_operator, "_whole_batch_function", lambda: whole_batches)
    monkeypatch.setattr(dali_operator, "whole_batches_work", lambda: True)
    monkeypatch.setattr(fn, "python_function", lambda *_, **__: made("samples"))
    return pipeline


@pytest.mark.parametrize("debugged", [True, False])
def test_debug_mode_uses_the_documented_operator(in_no_graph, debugged):
    in_no_graph._debug_on = debugged
    node = python_operator(print, SimpleNamespace(device="cpu", shape=lambda: None), name="mix", stage=Stage("paste"))
    assert node.how == ("samples" if debugged else "whole batches")


def test_on_a_gpu_whole_batches_are_copied(in_no_graph, monkeypatch):
    pytest.importorskip("cupy")
    monkeypatch.setattr(fn, "copy", lambda nodes: made(f"copy of {nodes.how}"))
    node = python_operator(print, SimpleNamespace(device="gpu"), name="mix", stage=Stage("paste"))
    assert node.how == "copy of whole batches"


@pytest.mark.parametrize("outputs", [1, 2])
def test_nodes_carry_what_they_are(operator, outputs):
    stage = Stage("paste")

    @pipeline_def(batch_size=2, num_threads=1, device_id=None)
    def pipeline():
        given = fn.constant(idata=[1, 2], shape=[2])
        nodes = python_operator(lambda batch: (batch + 0,) * outputs, given, name="x", num_outputs=outputs, stage=stage)
        nodes = nodes if outputs > 1 else [nodes]
        assert [node.source.stage for node in nodes] == [stage] * outputs
        return tuple(nodes)

    for output in pipeline().run():
        np.testing.assert_array_equal(output.as_array(), [[1, 2], [1, 2]])


@pytest.mark.parametrize("shape", [(1,), (1, 1, 4), (3, 1, 2), ()])
def test_what_dali_takes_has_the_strides_of_a_dense_array(shape):
    canonical = np.zeros(shape).strides
    odd = np.lib.stride_tricks.as_strided(np.arange(24.0), shape, [8 * stride for stride in canonical])
    for array in (odd, np.zeros(shape)):
        dense = dali_operator._dense(array)
        assert dense.strides == canonical
        np.testing.assert_array_equal(dense, array)
    assert dali_operator._dense(array) is array


@pytest.mark.gpu
def test_a_held_batch_of_a_gpu_does_not_change():
    @pipeline_def(batch_size=4, num_threads=2, device_id=0)
    def counting():
        numbers = fn.external_source(source=lambda info: np.full((4, 1000), info, np.int32), batch_info=False)
        return python_operator(lambda batch: (batch * 2,), numbers.gpu(), name="doubled", stage=Stage("double"))

    pipeline = counting()
    held = [pipeline.run()[0] for _ in range(20)]
    for number, batch in enumerate(held):
        np.testing.assert_array_equal(batch.as_cpu().as_array(), 2 * number)


@pytest.mark.parametrize(("version", "tested"), [("2.2.0", False), ("2.4.0", True), ("2.4.1", True), ("2.5.0", False)])
def test_only_tested_versions_of_dali_use_the_undocumented_operator(monkeypatch, version, tested):
    monkeypatch.setattr("nvidia.dali.__version__", version)
    assert dali_operator.whole_batches_work() == tested
