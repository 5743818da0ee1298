"""Reads a pickle as data: interprets its opcodes, and never imports or calls what it names.

A pickle is a small program for a stack machine. Python's unpickler runs it: it imports whatever the pickle names and calls
it, so an untrusted pickle can do anything. This reader knows only the opcodes of which files of tensors are made:

- numbers, strings, tuples, lists, dicts, and a memo of values to use again;
- a name (GLOBAL) becomes a record of two strings if the module names lists it; any other name ends the reading;
- a call (REDUCE) of a listed name builds a dict or a record from checked arguments;
- a reference to bytes outside (BINPERSID) becomes a record;
- attributes (BUILD) are taken for dicts only, and dropped.

No opcode here imports anything, calls anything else, or sets an attribute, and every other opcode ends the reading. The values
that are built are no larger than the pickle: strings and numbers are cut out of it, and the memo is a dict.

An allow-list for pickle.Unpickler would restrict names only: its C code still sets attributes, accepts every opcode, and
allocates a memo of whatever size an opcode names, and it cannot say at which byte a pickle is damaged.
"""

from __future__ import annotations

import mmap
import struct
from typing import Any, NamedTuple

from mtl_jax.pretrained.torch_bin import names


class Malformed(Exception):
    """The bytes are not a pickle of tensors. The message says what is wrong, and where."""


class _Op(NamedTuple):
    """The action of an opcode on the number that follows it, and the struct format of that number.

    For "text", "bytes" and "integer" the number is how many bytes follow.
    """

    action: str
    format: str


_OPS = {
    b"K": _Op("number", "<B"),
    b"M": _Op("number", "<H"),
    b"J": _Op("number", "<i"),
    b"G": _Op("number", ">d"),
    b"\x8a": _Op("integer", "<B"),
    b"X": _Op("text", "<I"),
    b"\x8c": _Op("text", "<B"),
    b"\x8d": _Op("text", "<Q"),
    b"U": _Op("text", "<B"),  # this and the next are Python 2's str
    b"T": _Op("text", "<I"),
    b"C": _Op("bytes", "<B"),
    b"B": _Op("bytes", "<I"),
    b"\x8e": _Op("bytes", "<Q"),
    b"q": _Op("put", "<B"),
    b"r": _Op("put", "<I"),
    b"h": _Op("get", "<B"),
    b"j": _Op("get", "<I"),
    b"\x80": _Op("skip", "<B"),  # the protocol's number
    b"\x95": _Op("skip", "<Q"),  # the length of a frame
}
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}
_FIXED_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_LONGEST_NAME = 1000


class PickleReader:
    """Reads pickles that follow one another in a mapped file.

    Attributes:
        position: Of the next unread byte.
        storages: The storages that the pickles refer to, by key.
    """

    def __init__(self, data: mmap.mmap, start: int, end: int) -> None:
        self.position = start
        self.storages: dict[str, names.Storage] = {}
        self._data = data
        self._end = end
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}

    def read(self) -> Any:
        """The value of the next pickle: plain values, and the records of the module names.

        Raises:
            names.Forbidden: It asks for a name, a call or an opcode that is not listed.
            Malformed: It is damaged.
        """
        self._stack, self._marks, self._memo = [], [], {}
        try:
            while (code := self._take(1)) != b".":
                self._run(code)
            return self._pop()
        except (IndexError, KeyError, ValueError) as error:
            raise Malformed(f"the pickle makes no sense before byte {self.position}") from error

    def _run(self, code: bytes) -> None:
        stack = self._stack
        if code in _OPS:
            self._argument(_OPS[code])
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _FIXED_TUPLES:
            stack.append(tuple(reversed([self._pop() for _ in range(_FIXED_TUPLES[code])])))
        elif code == b"(":
            self._marks.append(len(stack))
        elif code == b"t":
            stack.append(tuple(self._pop_to_mark()))
        elif code == b"]":
            stack.append([])
        elif code == b"}":
            stack.append({})
        elif code == b"a":
            value = self._pop()
            self._top(list).append(value)
        elif code == b"e":
            values = self._pop_to_mark()
            self._top(list).extend(values)
        elif code == b"s":
            value, key = self._pop(), self._pop()
            names.insert(self._top(dict), [(key, value)])
        elif code == b"u":
            values = self._pop_to_mark()
            names.insert(self._top(dict), list(zip(values[::2], values[1::2], strict=True)))
        elif code == b"0":
            self._pop()
        elif code == b"1":
            self._pop_to_mark()
        elif code == b"\x94":
            self._memo[len(self._memo)] = self._top()
        elif code == b"c":
            module = self._line()
            stack.append(names.resolve(module, self._line()))
        elif code == b"\x93":
            name, module = self._pop(), self._pop()
            stack.append(names.resolve(module, name))
        elif code == b"R":
            arguments, called = self._pop(), self._pop()
            stack.append(names.call(called, arguments))
        elif code == b"b":
            self._pop()
            self._top(dict)
        elif code == b"Q":
            storage = names.storage(self._pop())
            if self.storages.setdefault(storage.key, storage) != storage:
                raise ValueError("a storage that is described in two ways")
            stack.append(storage)
        else:
            raise names.Forbidden(f"the opcode {code!r} at byte {self.position - 1}")

    def _argument(self, op: _Op) -> None:
        (number,) = struct.unpack(op.format, self._take(struct.calcsize(op.format)))
        if op.action == "number":
            self._stack.append(number)
        elif op.action == "integer":
            self._stack.append(int.from_bytes(self._take(number), "little", signed=True))
        elif op.action == "text":
            self._stack.append(self._take(number).decode("utf-8"))
        elif op.action == "bytes":
            self._stack.append(self._take(number))
        elif op.action == "put":
            self._memo[number] = self._top()
        elif op.action == "get":
            self._stack.append(self._memo[number])

    def _take(self, size: int) -> bytes:
        if size > self._end - self.position:
            raise Malformed(f"the pickle is cut off at byte {self.position}")
        self.position += size
        return self._data[self.position - size : self.position]

    def _line(self) -> str:
        stop = self._data.find(b"\n", self.position, min(self._end, self.position + _LONGEST_NAME))
        if stop < 0:
            raise Malformed(f"the pickle has no name at byte {self.position}")
        return self._take(stop + 1 - self.position)[:-1].decode("utf-8")

    def _top(self, kind: type | None = None) -> Any:
        """The last value on the stack above the last mark, which must be of exactly this type."""
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise IndexError("no value on the stack")
        if kind is not None and type(self._stack[-1]) is not kind:
            raise ValueError(f"a {type(self._stack[-1]).__name__} in place of a {kind.__name__}")
        return self._stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        height = self._marks.pop()
        values = self._stack[height:]
        del self._stack[height:]
        return values
