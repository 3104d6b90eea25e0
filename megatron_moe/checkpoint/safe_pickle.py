"""Reads a pickle as data: classes become records that name them, and nothing is ever imported or called.

`pickle.load` runs whatever a file tells it to, and CPython's reader takes gigabytes for some files of ten bytes (an
index into its memo, the announced length of a bytearray). A checkpoint needs few of its operations, so those are
carried out here, on the parse of `pickletools.genops`, which executes nothing. No torch.
"""

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from megatron_moe.config.base import UserError


@dataclass(frozen=True)
class Reference:
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        """The dotted name, as messages show it."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """What calling a reference would have made; compared and hashed as an object, so that it can be a key."""

    made_by: Reference
    args: Any
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What was put into it by key: an `OrderedDict` is a record with items."""
    is_key: bool = field(default=False, repr=False)


@dataclass(eq=False)
class Persistent:
    """Something that lies outside the pickle."""

    id: Any


class _Mark:
    """Where a list of arguments begins on the stack."""


_MARK = _Mark()
# Operations that push what stands behind them.
_PUSH = {
    "BININT",
    "BININT1",
    "BININT2",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "LONG1",
    "LONG4",
    "BINBYTES",
    "SHORT_BINBYTES",
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Malformed(Exception):
    """The pickle is no pickle, or uses what no checkpoint needs."""


def read_pickle(data: bytes, allowed: Collection[str], source: str, kind: str = "checkpoint of this program") -> Any:
    """What a pickle describes.

    Args:
        data: the pickle.
        allowed: dotted names of the classes and functions that it may refer to.
        source: names the file in errors.
        kind: what the file should be, in errors.

    Raises:
        UserError: the pickle refers to anything else, or is damaged.
    """
    machine = _Machine(allowed, source, kind)
    try:
        return machine.run(data)
    except (_Malformed, ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(
            f"{source}: damaged, or not a {kind} ({_reason(error)}); restore it or load another step"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


class _Machine:
    def __init__(self, allowed: Collection[str], source: str, kind: str) -> None:
        self._allowed, self._source, self._kind = allowed, source, kind
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        stack, memo = self._stack, self._memo
        arg: Any
        for opcode, arg, _ in pickletools.genops(data):
            name = opcode.name
            if name in _PUSH:
                stack.append(arg)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[arg] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name in _TUPLES:
                count = _TUPLES[name]
                if len(stack) < count:
                    raise _Malformed("the stack is empty")
                stack[-count:] = [tuple(stack[-count:])]
            elif name == "STOP":
                if len(stack) != 1:
                    raise _Malformed("more than one object")
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                self._change(name, arg)
        raise _Malformed("it has no end")

    def _change(self, name: str, arg: Any) -> None:
        """Operations that change what lies on the stack."""
        stack = self._stack
        if name == "TUPLE":
            stack.append(tuple(self._after_mark()))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = (stack.pop(),) if name == "APPEND" else tuple(self._after_mark())
            _expect(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items([stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self._after_mark())
        elif name == "GLOBAL":
            module, _, attribute = _expect(arg, str).partition(" ")
            stack.append(self._reference(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._reference(_expect(module, str), _expect(attribute, str)))
        elif name in ("REDUCE", "NEWOBJ"):
            args, made_by = stack.pop(), stack.pop()
            stack.append(Record(_expect(made_by, Reference), _expect(args, tuple)))
        elif name == "BUILD":
            state = stack.pop()
            _expect(stack[-1], Record).state = state
        elif name == "BINPERSID":
            stack.append(Persistent(stack.pop()))
        else:
            raise _Malformed(f"it uses the operation {name}, which no checkpoint needs")

    def _reference(self, module: str, name: str) -> Reference:
        reference = Reference(module, name)
        if str(reference) not in self._allowed:
            raise UserError(
                f"{self._source}: refers to {str(reference)[:80]!r}, which no {self._kind} does; it is damaged or made "
                "to do harm, nothing of it was run"
            )
        return reference

    def _after_mark(self) -> list[Any]:
        items: list[Any] = []
        while True:
            item = self._stack.pop()
            if item is _MARK:
                return items[::-1]
            items.append(item)

    def _set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise _Malformed("a key without value")
        target = _expect(self._stack[-1], dict, Record)
        pairs = target if isinstance(target, dict) else target.items
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Deeply nested keys could not be hashed.
            if not isinstance(key, (str, int, Record)):
                raise _Malformed(f"a {type(key).__name__} as a key")
            pairs[key] = value


def _expect(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds):
        raise _Malformed(f"a {type(value).__name__} where {kinds[0].__name__} belongs")
    return value
