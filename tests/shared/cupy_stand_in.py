"""A stand-in for CuPy on the CPU, in which waiting for the GPU is an error.

A function that CuPy only enqueues returns the result of NumPy here. A function that would make its caller wait for the
GPU raises `HostSynchronisation`, and so does every function or method of CuPy that is not in a list in this file. To
add one, check in CuPy's source that it does not wait. Names that CuPy does not have are missing here too.

An array wraps a NumPy array but is not one: NumPy's functions and Python's conversions cannot access its values.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
from scipy import fft

from dali_saliencymix import _array

try:
    import cupy
except ImportError:  # the tests that use the stand-in are skipped
    cupy = None

# Functions and methods of NumPy and SciPy that CuPy only enqueues, in addition to all universal functions.
REDUCTIONS = {"all", "any", "argmax", "argmin", "max", "mean", "min", "sum"}
FUNCTIONS = {"arange", "as_strided", "ascontiguousarray", "broadcast_to", "clip", "concatenate", "cumsum", "empty"}
FUNCTIONS |= {"expand_dims", "full", "moveaxis", "ones", "ravel", "repeat", "reshape", "squeeze", "stack", "take"}
FUNCTIONS |= {"take_along_axis", "transpose", "where", "zeros", "fft2", "ifft2", "irfft2", "rfft2"} | REDUCTIONS
METHODS = {"astype", "clip", "copy", "cumsum", "ravel", "repeat", "reshape", "squeeze", "swapaxes", "take"}
METHODS |= {"transpose", "view"} | REDUCTIONS
# Functions that do not read values; they do not return arrays in CuPy either.
ABOUT_ARRAYS = {"can_cast", "may_share_memory", "ndim", "promote_types", "result_type", "shape", "size"}
# Parameters whose values CuPy has to know before it can enqueue anything.
ON_HOST = {"axes", "axis", "destination", "dtype", "newshape", "norm", "order", "repeats", "s", "shape", "source"}
ON_HOST |= {"start", "step", "stop", "strides"}
# Methods that take arrays as arguments.
TAKING_ARRAYS = {"clip", "take"}
WAITING = {"dump", "dumps", "get", "item", "nonzero", "tobytes", "tofile", "tolist"}
WAITING |= {f"__{name}__" for name in ("array", "bool", "bytes", "complex", "contains", "float", "format", "index")}
WAITING |= {f"__{name}__" for name in ("int", "reduce_ex", "str")}
BINARY = ("add", "and", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor")
COMPARISONS = ("eq", "ge", "gt", "le", "lt", "ne")
UNARY = ("abs", "invert", "neg", "pos")


class HostSynchronisation(AssertionError):
    """Raised for a call that makes the host wait for the GPU, or may do so.

    A copy from host memory waits if CuPy gets no pinned memory for it, and costs host time in any case.
    """


@functools.cache
def stand_in_for_cupy():
    """Return the module to put into ``sys.modules["cupy"]``, always the same one.

    Its attribute `copies_from_host` counts the copies that `dali_saliencymix._array.constant` has made.
    """
    _add_methods()
    module = _Module(cupy, np)
    module.ndarray, module.asarray, module.from_dlpack = ndarray, asarray, from_dlpack
    module.fft = _Module(cupy.fft, fft)  # like CuPy's and unlike that of old NumPy versions, it keeps float32
    module.lib = SimpleNamespace(stride_tricks=_Module(cupy.lib.stride_tricks, np.lib.stride_tricks))
    module.cuda = SimpleNamespace(
        Device=Device,
        Stream=SimpleNamespace(from_external=lambda lent: Stream(lent.__cuda_stream__()[1])),
        get_current_stream=get_current_stream,
        runtime=SimpleNamespace(getDevice=lambda: 0),
    )
    module.copies_from_host = 0
    return module


def on_device(values):
    """Return a read-only copy of a NumPy array as an array of the stand-in, to be used as a test input."""
    return ndarray(_read_only(np.array(values)))


def on_host(array):
    """Return the values of an array of the stand-in, which is a test result."""
    assert type(array) is ndarray, f"{type(array)} is no array of the stand-in"
    return array._values


# --- Arrays ---


class ndarray:
    """A wrapped NumPy array. `_add_methods` adds operators and most methods."""

    __array_priority__ = 100
    __hash__ = None

    def __init__(self, values):
        self._values = values

    dtype = property(lambda self: self._values.dtype)
    itemsize = property(lambda self: self._values.itemsize)
    nbytes = property(lambda self: self._values.nbytes)
    ndim = property(lambda self: self._values.ndim)
    shape = property(lambda self: self._values.shape)
    size = property(lambda self: self._values.size)
    strides = property(lambda self: self._values.strides)
    T = property(lambda self: ndarray(self._values.T))
    data = property(lambda self: SimpleNamespace(ptr=self._values.ctypes.data))
    device = property(lambda self: Device(0))

    @property
    def flags(self):
        return SimpleNamespace(**{name: getattr(self._values.flags, name) for name in ("c_contiguous", "f_contiguous")})

    @property
    def real(self):
        return ndarray(self._values.real)

    @real.setter
    def real(self, value):
        self._values.real = _operand(value)

    @property
    def imag(self):
        return ndarray(self._values.imag)

    @imag.setter
    def imag(self, value):
        self._values.imag = _operand(value)

    def __len__(self):
        return len(self._values)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key):
        return ndarray(self._values[_index(key)])

    def __setitem__(self, key, value):
        if isinstance(value, (np.ndarray, list, tuple)):
            _refuse_a_copy("an assignment")
        self._values[_index(key)] = _operand(value)

    def __repr__(self):
        # In CuPy this waits; here the report of a failing test needs it.
        return f"<{self.dtype} array of the stand-in, {self.shape}>"

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if method != "__call__":
            return NotImplemented
        return getattr(stand_in_for_cupy(), ufunc.__name__)(*inputs, **options)

    def __array_function__(self, function, types, args, options):
        path = [*function.__module__.split(".")[1:], function.__name__]
        try:
            ours = functools.reduce(getattr, path, stand_in_for_cupy())
        except AttributeError:
            return NotImplemented
        return NotImplemented if ours is function else ours(*args, **options)

    # The memory is on the CPU and says so, so that PyTorch can read it.
    def __dlpack__(self, *, stream=None, **options):
        return self._values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._values.__dlpack_device__()

    def __getattr__(self, name):
        getattr(cupy.ndarray, name)  # AttributeError if CuPy does not have it
        if name.startswith("_"):
            raise AttributeError(name)
        _refuse_the_unknown(f"ndarray.{name}")


def _index(key):
    """Return an index with which NumPy returns an array even if it has no axis, as CuPy does."""
    items = key if isinstance(key, tuple) else (key,)
    for item in items:
        if isinstance(item, ndarray) and item.dtype == np.bool_:
            msg = "an index that is a mask waits for the number of its values"
            raise HostSynchronisation(msg)
        if isinstance(item, (bool, np.bool_, list, tuple, np.ndarray)):
            _refuse_a_copy("an index")
    items = tuple(item._values if isinstance(item, ndarray) else item for item in items)
    return items if any(item is Ellipsis for item in items) else (*items, Ellipsis)


def _operand(value):
    """Return what NumPy computes with in the place of `value`; NotImplemented where CuPy does not know it."""
    if isinstance(value, ndarray):
        return value._values
    if isinstance(value, np.ndarray):
        msg = f"Unsupported type {np.ndarray}"  # CuPy's words
        raise TypeError(msg)
    return value if isinstance(value, (bool, int, float, complex, np.generic)) else NotImplemented


def _argument(value):
    return _operand(value) if isinstance(value, (ndarray, np.ndarray)) else value


def _result(function, *args, **options):
    """Return the result of a NumPy function as an array of the stand-in, even if it has no axis."""
    with np.errstate(all="ignore"):  # a GPU warns of nothing
        return ndarray(np.asarray(function(*args, **options)))


def _add_methods():
    for name in UNARY:
        setattr(ndarray, f"__{name}__", functools.partialmethod(_unary, getattr(operator, f"__{name}__")))
    for name in (*BINARY, *COMPARISONS):
        setattr(ndarray, f"__{name}__", functools.partialmethod(_binary, getattr(operator, f"__{name}__")))
    for name in BINARY:
        setattr(ndarray, f"__r{name}__", functools.partialmethod(_swapped, getattr(operator, f"__{name}__")))
        if hasattr(cupy.ndarray, f"__i{name}__"):
            setattr(ndarray, f"__i{name}__", functools.partialmethod(_in_place, getattr(operator, f"__i{name}__")))
    for name in METHODS:
        setattr(ndarray, name, functools.partialmethod(_called, name))
    for name in WAITING:
        setattr(ndarray, name, functools.partialmethod(_waits, name))


def _unary(self, function):
    return _result(function, self._values)


def _binary(self, function, other):
    other = _operand(other)
    return NotImplemented if other is NotImplemented else _result(function, self._values, other)


def _swapped(self, function, other):
    other = _operand(other)
    return NotImplemented if other is NotImplemented else _result(function, other, self._values)


def _in_place(self, function, other):
    made = _binary(self, function, other)
    return NotImplemented if made is NotImplemented else self


def _called(self, name, *args, **options):
    if name not in TAKING_ARRAYS and any(isinstance(value, ndarray) for value in (*args, *options.values())):
        msg = f"ndarray.{name} waits for an array that it is given in the place of a number"
        raise HostSynchronisation(msg)
    known = _parameters_of_method(name)
    for option in options:
        if option not in known:
            msg = f"CuPy's ndarray.{name} knows no {option}"
            raise TypeError(msg)
    options = {option: _argument(value) for option, value in options.items()}
    return _result(getattr(self._values, name), *map(_argument, args), **options)


@functools.cache
def _parameters_of_method(name):
    # The first line of a docstring is "name(self, axis=None, ...) -> type": all that these methods tell of themselves.
    line = getattr(cupy.ndarray, name).__doc__.partition("\n")[0]
    return set(re.findall(r"(\w+)(?=[,=)])", line))


def _waits(self, name, *_, **__):
    msg = f"ndarray.{name} waits for the GPU"
    raise HostSynchronisation(msg)


# --- Functions ---


class _Module(ModuleType):
    """A module of CuPy, `real`, whose functions are those of NumPy or SciPy in `host`."""

    def __init__(self, real, host):
        super().__init__(real.__name__)
        self.__spec__ = real.__spec__
        self._real, self._host = real, host

    def __getattr__(self, name):
        real = getattr(self._real, name)  # AttributeError if CuPy does not have it
        host = getattr(self._host, name, None)
        if name in ABOUT_ARRAYS:
            return functools.partial(_told, host)
        if isinstance(host, np.ufunc) and isinstance(real, cupy.ufunc):
            return functools.partial(_elementwise, host)
        if name in FUNCTIONS:
            return functools.partial(_function, name, inspect.signature(real), host)
        if not (name.startswith("__") or isinstance(real, (float, type(None))) or real is host):  # nan, float32
            _refuse_the_unknown(name)
        return real


def _told(function, *args, **options):
    return function(*map(_argument, args), **options)


def _elementwise(ufunc, *args, **options):
    for value in args:
        if _operand(value) is NotImplemented:
            msg = f"Unsupported type {type(value)}"  # CuPy's words
            raise TypeError(msg)
    return _result(ufunc, *map(_operand, args), **{name: _argument(value) for name, value in options.items()})


def _function(name, signature, function, *args, **options):
    given = signature.bind(*args, **options).arguments  # a TypeError where CuPy takes no such arguments
    if name == "where" and len(given) == 1:
        msg = "where without values to choose from waits for the number of places"
        raise HostSynchronisation(msg)
    for parameter, value in given.items():
        parts = value if isinstance(value, (list, tuple)) else (value,)
        if parameter in ON_HOST:
            if any(isinstance(part, ndarray) for part in parts):
                msg = f"{name} waits for an array that it is given as {parameter}"
                raise HostSynchronisation(msg)
        elif parts is value and not all(isinstance(part, (ndarray, np.ndarray)) for part in parts):
            _refuse_a_copy(name)
    return _result(function, *map(_arguments, args), **{option: _arguments(value) for option, value in options.items()})


def _arguments(value):
    return type(value)(map(_argument, value)) if isinstance(value, (list, tuple)) else _argument(value)


def asarray(a, dtype=None):
    """Return an array of the device as it is; copy one of the host, where that is a constant."""
    if isinstance(a, ndarray):
        return ndarray(np.asarray(a._values, dtype))
    if not _builds_a_constant():
        _refuse_a_copy("asarray")
    stand_in_for_cupy().copies_from_host += 1
    return ndarray(_read_only(np.array(a, dtype)))  # all callers share it


def from_dlpack(array):
    """Return the memory of another library's array, or of another array of the stand-in."""
    return ndarray(np.from_dlpack(array))


def _read_only(values):
    values.setflags(write=False)
    return values


def _builds_a_constant():
    """Tell whether a function of this module was called by the one that builds constants."""
    frame = sys._getframe(1)
    while frame.f_globals is globals():
        frame = frame.f_back
    return frame.f_code is _array._constant.__wrapped__.__code__


def _refuse_a_copy(where):
    msg = f"{where} copies from host memory, in every batch: see dali_saliencymix._array.constant"
    raise HostSynchronisation(msg)


def _refuse_the_unknown(name):
    msg = f"nobody has looked into CuPy yet whether {name} waits for the GPU; if it does not, see {__name__}.py"
    raise HostSynchronisation(msg)


# --- Streams and devices ---


class _Current(threading.local):
    def __init__(self):
        self.streams = [Stream(0)]


class Stream:
    """A stream, current inside a ``with`` block."""

    def __init__(self, ptr):
        self.ptr = ptr

    def __enter__(self):
        _current.streams.append(self)
        return self

    def __exit__(self, *_):
        _current.streams.pop()

    def synchronize(self):
        if not _builds_a_constant():
            msg = "Stream.synchronize waits for the GPU"
            raise HostSynchronisation(msg)


_current = _Current()


def get_current_stream():
    return _current.streams[-1]


class Device:
    """The only device."""

    def __init__(self, device=0):
        assert device == 0
        self.id = device

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def synchronize(self):
        msg = "Device.synchronize waits for the GPU"
        raise HostSynchronisation(msg)
