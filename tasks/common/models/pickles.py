"""Interpreter of the pickles that ``torch.save`` writes: it makes tensors and plain values only.

Python's own unpickler calls what a pickle names, and PyTorch's reader ``weights_only`` makes
objects as large as a pickle says. This one knows the instructions of ``torch.save`` and calls
nothing by name. A known class or function becomes a stand-in; any other name is an error. Work and
memory are bounded by the size of the pickle and by the bytes that the file stores.
"""

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import torch
from torch import Tensor

#: Bounds on a pickle: 30 instructions and 200 bytes stand for one tensor.
MOST_BYTES, MOST_INSTRUCTIONS = 2**26, 1_000_000
_MOST_DIMENSIONS = 16

#: Function (dtype, key, number of values) that returns the bytes of a storage, uint8 (n,).
ReadStorage = Callable[[torch.dtype, str, int], Tensor]


class Inert:
    """Stand-in for an object beside the weights. It stores nothing and calls nothing."""


class Array(Inert):
    """Stand-in for a NumPy array."""


@dataclass(frozen=True)
class Unusable:
    """Stand-in for a tensor that cannot be loaded, such as a sparse one."""

    problem: str  # form of the tensor, such as "in the layout sparse_coo"


class ForeignObjectError(Exception):
    """A pickle names a class or function that is not known; the text is its full name."""


@dataclass(frozen=True)
class _Name(Inert):
    """A class, function or type that a pickle names."""

    text: str


@dataclass(frozen=True)
class _Storage:
    values: Tensor  # uint8 (n,)
    dtype: torch.dtype


_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.int8, "QUInt8Storage": torch.uint8, "QInt32Storage": torch.int32,
}  # fmt: skip
_TORCH_MODULES = "torch", "torch.cuda", "torch.storage"
_TORCH_TYPES = torch.dtype | torch.layout | torch.qscheme | torch.memory_format


def _names(modules: dict[str, str]) -> set[str]:
    return {f"{module}.{name}" for module, names in modules.items() for name in names.split()}


_TENSORS = "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"
_TYPED_TENSOR = "torch._utils._rebuild_tensor_v3"
_WITH_CLASS = "torch._tensor._rebuild_from_type_v2"
_PLAIN_CLASSES = "torch.Tensor", "torch.nn.parameter.Parameter"
_PARAMETERS = _names({"torch._utils": "_rebuild_parameter _rebuild_parameter_with_state"})
_SPARSE = "torch._utils._rebuild_sparse_tensor"
_UNUSABLE = {
    "torch._utils._rebuild_meta_tensor_no_storage": "on the device 'meta', without values",
    "torch._utils._rebuild_qtensor": "as a quantized tensor",
    "torch._utils._rebuild_nested_tensor": "as a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "as a tensor of another class",
    "torch._utils._rebuild_device_tensor_from_numpy": "on a device of its own",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "on a device of its own",
}
#: Functions that return their first argument.
_FIRST = _names({"torch": "Size", "torch.serialization": "_get_layout"})
#: Classes of mappings and of sequences. Trainers keep settings and logs in them.
_MAPPINGS = _names({
    "collections": "OrderedDict defaultdict",
    "easydict": "EasyDict",
    "yacs.config": "CfgNode",
    "detectron2.config.config": "CfgNode",
    "fvcore.common.config": "CfgNode",
    "lightning.fabric.utilities.data": "AttributeDict",
    "lightning_fabric.utilities.data": "AttributeDict",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
})  # fmt: skip
_SEQUENCES = {"collections.deque"}
_ARRAYS = _names({"numpy": "core.multiarray._reconstruct _core.multiarray._reconstruct ndarray"})
_PATHS = "Path PosixPath PurePosixPath PureWindowsPath WindowsPath"
_INERT = _names({
    "torch": "device Tensor",
    "torch.nn.parameter": "Parameter",
    "collections": "Counter",
    "_codecs": "encode",
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "builtins": "bool bytearray complex dict float frozenset getattr int list set str tuple",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf": "dictconfig.DictConfig listconfig.ListConfig",
    "omegaconf.nodes": "AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode PathNode "
    "StringNode",
    "typing": "Any",
    "datetime": "date datetime timedelta timezone",
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "numpy": "core.multiarray.scalar _core.multiarray.scalar dtype",
    "mmengine.logging.history_buffer": "HistoryBuffer",
})  # fmt: skip
_KNOWN = {
    *_TENSORS, _TYPED_TENSOR, _WITH_CLASS, *_PARAMETERS, _SPARSE, *_UNUSABLE, *_FIRST, *_MAPPINGS,
    *_SEQUENCES, *_ARRAYS, *_INERT,
}  # fmt: skip


def unpickle(file: BinaryIO, read_storage: ReadStorage) -> Any:
    """Return the object of the pickle that begins at the position of ``file``.

    Raises:
        ForeignObjectError: the pickle names an unknown class or function.
        Exception: any other, for a damaged pickle; the reason is its text.
    """
    machine = _Machine(read_storage)
    try:
        return _result(machine, file)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"its pickle does not make sense ({type(error).__name__})") from error


def _result(machine: "_Machine", file: BinaryIO) -> Any:
    for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        if count >= MOST_INSTRUCTIONS:
            raise ValueError(f"its pickle has more than {MOST_INSTRUCTIONS} instructions")
        if instruction.name == "STOP":
            break
        machine.run(instruction.name, argument)
    return machine.stack.pop()


class _Machine:
    """Stack, marks and memo of a pickle while it runs."""

    def __init__(self, read_storage: ReadStorage) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0  # values of lists that became mappings
        self.read_storage = read_storage

    def run(self, name: str, argument: Any) -> None:
        """Run one instruction; ``name`` is that of :mod:`pickletools`."""
        stack = self.stack
        match name:
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[name])
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._last(int(name[-1]))))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "APPEND" | "APPENDS":
                items = self._last(1) if name == "APPEND" else self._since_mark()
                if isinstance(stack[-1], list):
                    stack[-1].extend(items)
                elif not isinstance(stack[-1], Inert):
                    raise ValueError("its pickle appends to what is no list")
            case "SETITEM" | "SETITEMS":
                items = self._last(2) if name == "SETITEM" else self._since_mark()
                _fill(stack[-1], zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1)))
            case "REDUCE" | "NEWOBJ":
                called, arguments = self._last(2)
                stack.append(self._made(called, arguments))
            case "BUILD":  # attributes of an object: stand-ins have none
                stack.pop()
                if not isinstance(stack[-1], Inert | Tensor | Unusable | dict | list):
                    raise ValueError("its pickle sets attributes of a plain value")
            case "BINPERSID":
                stack.append(self._storage(*stack.pop()))
            case "PROTO":
                if argument > 3:
                    raise ValueError(f"its pickle has the protocol {argument}")
            case _:
                raise ValueError(f"its pickle has the instruction {name}, unknown to torch.save")

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count + (self.marks[-1] if self.marks else 0):
            raise ValueError("its pickle takes more values than it has")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _since_mark(self) -> list[Any]:
        return self._last(count) if (count := len(self.stack) - self.marks.pop()) else []

    def _made(self, called: Any, arguments: Any) -> Any:
        """Return the value or the stand-in for a call or for a new object."""
        if not isinstance(called, _Name) or not isinstance(arguments, tuple):
            raise ForeignObjectError("a call of what has no name")
        name = called.text
        if name in _TENSORS:
            storage, offset, size, stride, *rest = arguments
            return _tensor(storage, storage.dtype, offset, size, stride, rest[2:])
        if name == _TYPED_TENSOR:
            storage, offset, size, stride, _, _, dtype, *rest = arguments
            dtype = vars(torch)[dtype.text.removeprefix("torch.")]
            return _tensor(storage, dtype, offset, size, stride, rest)
        if name == _WITH_CLASS:
            function, kind, inner, *_ = arguments
            plain = isinstance(kind, _Name) and kind.text in _PLAIN_CLASSES
            return self._made(function, inner) if plain else Unusable("as a tensor of its class")
        if name in _UNUSABLE:
            return Unusable(_UNUSABLE[name])
        if name == _SPARSE:
            layout = arguments[0] if isinstance(arguments[0], str) else "sparse"
            return Unusable(f"in the layout {layout[:20].removeprefix('torch.')}")
        if name in _PARAMETERS or name in _FIRST:
            return arguments[0]
        if name in _MAPPINGS:
            listed = arguments[0] if arguments and isinstance(arguments[0], list) else []
            self.copied += len(listed)  # a list may be copied again and again
            if self.copied > MOST_INSTRUCTIONS:
                raise ValueError("its pickle copies too many values")
            return _fill({}, listed)
        if name in _SEQUENCES:
            return []
        return Array() if name in _ARRAYS else Inert()

    def _storage(self, kind: Any, cls: Any, key: Any, place: Any, count: Any, *rest: Any) -> Any:
        if kind != "storage" or not isinstance(cls, _Name) or not isinstance(key, str):
            raise ValueError("its pickle has a storage without class or key")
        if type(count) is not int or count < 0 or any(part is not None for part in rest):
            raise ValueError(f"its storage {key[:20]!r} has no number of values")
        dtype = _STORAGES[cls.text.rpartition(".")[2]]
        return _Storage(self.read_storage(dtype, key, count), dtype)


def _named(module: str, name: str) -> _Name:
    """Return the stand-in for a name. Raises ForeignObjectError."""
    # Pickles of protocol 2 have Python 2's names, such as ``__builtin__.unicode`` for ``str``.
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    text = f"{module}.{name}"
    of_torch = name in _STORAGES or isinstance(vars(torch).get(name), _TORCH_TYPES)
    if text not in _KNOWN and not (of_torch and module in _TORCH_MODULES):
        raise ForeignObjectError(text)
    return _Name(text)


def _fill(target: Any, pairs: Iterable[Any]) -> Any:
    """Put the pairs of key and value into ``target`` and return it.

    Only texts and small integers are kept as keys. Others do not name weights, and a file could
    choose them so that their hashes are equal or take years.
    """
    if isinstance(target, Inert):
        return target
    if not isinstance(target, dict):
        raise ValueError("its pickle puts a key into what is no dictionary")
    for key, value in pairs:
        if isinstance(key, str) or (type(key) is int and abs(key) < 2**32):
            if key in target:
                raise ValueError(f"its pickle has the key {str(key)[:100]!r} twice")
            target[key] = value
    return target


def _tensor(
    storage: Any, dtype: Any, offset: Any, size: Any, stride: Any, bits: list[Any]
) -> Tensor | Unusable:
    """Return a view of the values of a storage. Raises an error if they do not lie in it."""
    if not isinstance(storage, _Storage):
        raise ValueError("its pickle has a tensor without storage")
    numbers = (offset, *size, *stride)
    if any(type(one) is not int or one < 0 for one in numbers) or len(size) > _MOST_DIMENSIONS:
        raise ValueError("its pickle has a tensor of impossible shape")
    if any(bits):
        return Unusable("with values that are stored negated or conjugated")
    values = storage.values.view(dtype)
    if prod(size) > len(values):
        return Unusable(f"as {prod(size)} values of which only {len(values)} are stored")
    return values.as_strided(size, stride, offset)
