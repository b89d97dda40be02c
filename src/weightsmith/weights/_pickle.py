"""What a pickle describes, without doing what it says.

A pickle is a program: loading one the usual way can call any function that is installed. This
module interprets the same opcodes as a description. Names of functions stay names, calls of a few
known constructors of plain data are carried out by our own code, and every other object becomes an
inert `Opaque` that remembers what it would have been.

Two things bound the work, whatever the pickle says: the number of opcodes, and the sum of what
calls may copy. Nothing here compares or hashes nested values, which shared parts can make
exponentially large.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weightsmith.errors import Error, FormatError
from weightsmith.weights._files import Bytes, read_bytes

MOST_OPCODES = 10_000_000
"""A tensor takes about 40, so this is room for 200,000 of them."""

DEEPEST = 1000
LONGEST_NAME = 1024
LONGEST_INTEGER = 1024

_RUN = 2**18
_ABSENT = "an opcode that takes what is not there"
_MISFITS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True, slots=True)
class Name:
    """A function or class that a pickle mentions. It is never looked up."""

    module: str
    qualname: str

    def __str__(self) -> str:
        return f"{self.module}.{self.qualname}"


@dataclass(eq=False, slots=True)
class Opaque:
    """An object that nobody made: its class or function, and what it would have been made from."""

    name: Name
    arguments: Any
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


class Buildable:
    """Data of our own that a pickle completes with a state once it is made, as numpy's arrays are."""

    __slots__ = ()

    def build(self, state: Any) -> None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a pickle describes, the offset after its last byte, and how many opcodes it had."""

    value: Any
    end: int
    opcodes: int


Calls = Mapping[str, Callable[..., Any]]


def load(
    file: Bytes,
    start: int,
    stop: int,
    calls: Calls | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Loaded:
    """Interpret the pickle that begins at ``start`` and ends before ``stop``.

    Args:
        file: holds the pickle; its name goes into messages.
        start: offset of the first byte.
        stop: offset that the pickle does not reach.
        calls: ``"module.name"`` -> our own function for what the pickle calls by that name.
        persistent: what stands for an object that is kept outside the pickle, from its id.

    Raises:
        FormatError: it is truncated, not a pickle of protocols 2 to 5, nested too deep, or too long.
    """
    return _Machine(_Source(file, start, stop), {**_PLAIN, **(calls or {})}, persistent).run()


class _Source:
    """The bytes of a pickle, read in runs."""

    def __init__(self, file: Bytes, start: int, stop: int):
        self.file, self.start, self.stop = file, start, min(stop, file.size)
        self._run, self._at, self._read = b"", 0, start

    @property
    def position(self) -> int:
        return self._read - len(self._run) + self._at

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if self._at + count > len(self._run):
            self._more(count)
        self._at += count
        return self._run[self._at - count : self._at]

    def _more(self, count: int) -> None:
        if count > self.stop - self.position:
            raise FormatError(f"{self.file.name}: truncated inside a pickle, at byte {self.stop}")
        left = self._run[self._at :]
        wanted = min(max(_RUN, count - len(left)), self.stop - self._read)
        self._run, self._at = left + read_bytes(self.file, self._read, wanted), 0
        self._read += wanted

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def sized(self, count: int) -> bytes:
        """Bytes that stand after their length, which takes ``count`` bytes itself."""
        return self.take(self.number(count))

    def text(self, count: int) -> str:
        return self.decoded(self.sized(count))

    def line(self) -> str:
        found = bytearray()
        while (byte := self.take(1)) != b"\n":
            found += byte
            if len(found) > LONGEST_NAME:
                raise self.wrong(f"a name of more than {LONGEST_NAME} bytes")
        return self.decoded(bytes(found))

    def integer(self, length: int) -> int:
        if length > LONGEST_INTEGER:
            raise self.wrong(f"an integer of {length} bytes")
        return int.from_bytes(self.take(length), "little", signed=True)

    def decoded(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong("text that is not UTF-8") from None

    def wrong(self, what: str) -> FormatError:
        return FormatError(f"{self.file.name}: not a readable pickle: it has {what}")


class _Machine:
    """The stack, the marks in it and the memo of one pickle being interpreted."""

    def __init__(self, source: _Source, calls: Calls, persistent: Callable[[Any], Any] | None):
        self.source, self.calls, self.persistent = source, calls, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def run(self) -> Loaded:
        take, opcodes = self.source.take, 0
        while (opcode := take(1)) != b".":
            opcodes += 1
            if opcodes > MOST_OPCODES:
                raise self.wrong(f"more than {MOST_OPCODES} opcodes")
            action = _ACTIONS.get(opcode)
            if action is None:
                raise self.wrong(f"the opcode {opcode!r}, which no state dict needs")
            action(self)
        return Loaded(self.pop(), self.source.position, opcodes)

    def wrong(self, what: str) -> FormatError:
        return self.source.wrong(what)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.wrong(_ABSENT)
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        del self.stack[-1]
        return value

    def discard(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def last(self, count: int) -> tuple[Any, ...]:
        return tuple(self.pop() for _ in range(count))[::-1]

    def mark(self) -> None:
        if len(self.marks) >= DEEPEST:
            raise self.wrong(f"more than {DEEPEST} levels of nesting")
        self.marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise self.wrong(_ABSENT)
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def remember(self, key: int) -> None:
        self.memo[key] = self.top()

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise self.wrong(_ABSENT)
        self.stack.append(self.memo[key])

    def name(self, module: Any, qualname: Any) -> None:
        for word in (module, qualname):
            if not isinstance(word, str) or len(word) > LONGEST_NAME:
                raise self.wrong("a class without a readable name")
        # Protocol 2 writes the module names of Python 2.
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        self.stack.append(Name(module, qualname))

    def call(self, function: Any, arguments: Any) -> None:
        """Push what the call would make, as data."""
        name = function if isinstance(function, Name) else _kind(function)
        known = self.calls.get(str(name)) if name is function else None
        if known is None or not isinstance(arguments, tuple):
            self.stack.append(Opaque(name, arguments))
            return
        # A long value that is called for again and again must not be copied each time for free.
        self.copied += sum(len(a) for a in arguments if isinstance(a, str | bytes | list | tuple | dict))
        if self.copied > 2**20 + 8 * (self.source.position - self.source.start):
            raise self.wrong("calls that copy the same values again and again")
        self.stack.append(self.attempt(f"a call of {name} that cannot be", known, *arguments))

    def attempt(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Error:
            raise
        except _MISFITS as error:
            raise self.wrong(f"{what}: {str(error)[:200]}") from None

    def new(self, function: Any, arguments: Any, keywords: Any) -> None:
        # Nothing that is known takes keywords: a list of both is no tuple of arguments, and `call` leaves it alone.
        self.call(function, [arguments, keywords] if keywords else arguments)

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Opaque):
            target = target.elements
        if not isinstance(target, list):
            raise self.wrong("elements for what is no list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Opaque):
            target = target.entries
        if not isinstance(target, dict) or len(items) % 2:
            raise self.wrong("entries for what is no dictionary")
        target.update(pairs(zip(items[::2], items[1::2], strict=True)))

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        if isinstance(target, Opaque):
            target.state = state
        elif isinstance(target, Buildable):
            self.attempt(f"a state that no {_kind(target)} can have", target.build, state)
        elif not isinstance(target, dict):  # attributes of a dictionary say nothing of its content
            raise self.wrong(f"a state for a {_kind(target)}")

    def outside(self) -> None:
        identity = self.pop()
        if self.persistent is None:
            raise self.wrong("a part that is kept elsewhere")
        self.stack.append(self.persistent(identity))


def _kind(value: Any) -> Name:
    """The name under which a value that is called, or cannot be completed, is spoken of."""
    return value.name if isinstance(value, Opaque) else Name("builtins", type(value).__name__)


def key(value: Any) -> Any:
    """What stands for a dictionary's key: itself where it can be hashed at once, else an `Opaque`.

    Hashing a tuple of tuples that share their parts can take for ever, and so can integers of many
    words that were made to collide.
    """
    if value is None or isinstance(value, str | bytes | float | bool | Name):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else Opaque(_kind(value), (value,))
    if isinstance(value, tuple) and len(value) <= 16 and all(map(_short, value)):
        return value
    return Opaque(_kind(value), (value,))


def _short(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and len(value) <= 256)


def pairs(items: Any) -> dict[Any, Any]:
    """A dictionary of key and value pairs, its keys made safe to hash."""
    return {key(name): value for name, value in items}


def _dictionary(items: Any = ()) -> dict[Any, Any]:
    return dict(items) if isinstance(items, dict) else pairs(items)


def _elements(items: Any = ()) -> list[Any]:
    # A set is a list here: its order says nothing, and hashing its members could take for ever.
    if not isinstance(items, list | tuple):
        raise TypeError("elements from what is no list")
    return list(items)


def encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes, which protocol 2 writes as text."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise TypeError(f"bytes from {type(text).__name__} in the encoding {str(encoding)[:40]}")
    return text.encode(encoding)


def _bytes(content: Any = b"", *encoding: Any) -> bytes:
    if isinstance(content, bytes):
        return content
    return encoded(content, *encoding)


_PLAIN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": lambda factory=None, items=(): _dictionary(items),
    "builtins.dict": _dictionary,
    "builtins.list": _elements,
    "builtins.set": _elements,
    "builtins.frozenset": _elements,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.complex": lambda real, imaginary: complex(float(real), float(imaginary)),
    "_codecs.encode": encoded,
}


def _old_text(raw: bytes) -> str | bytes:
    """A string of Python 2, which was text or bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _global(machine: _Machine) -> None:
    machine.name(machine.source.line(), machine.source.line())


def _signed(machine: _Machine) -> None:
    machine.push(machine.source.integer(4))


def _protocol(machine: _Machine) -> None:
    if not 2 <= (protocol := machine.source.number(1)) <= 5:
        raise machine.wrong(f"the protocol {protocol}; protocols 2 to 5 are known")


_ACTIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": _protocol,
    b"\x95": lambda m: m.source.take(8),  # the length of a frame, which only helps to read ahead
    b"(": _Machine.mark,
    b"0": _Machine.discard,
    b"1": _Machine.since_mark,
    b"2": lambda m: m.push(m.top()),
    # Plain values
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": _signed,
    b"K": lambda m: m.push(m.source.number(1)),
    b"M": lambda m: m.push(m.source.number(2)),
    b"\x8a": lambda m: m.push(m.source.integer(m.source.number(1))),
    b"\x8b": lambda m: m.push(m.source.integer(m.source.number(4))),
    b"G": lambda m: m.push(struct.unpack(">d", m.source.take(8))[0]),
    b"X": lambda m: m.push(m.source.text(4)),
    b"\x8c": lambda m: m.push(m.source.text(1)),
    b"\x8d": lambda m: m.push(m.source.text(8)),
    b"B": lambda m: m.push(m.source.sized(4)),
    b"C": lambda m: m.push(m.source.sized(1)),
    b"\x8e": lambda m: m.push(m.source.sized(8)),
    b"\x96": lambda m: m.push(m.source.sized(8)),
    b"T": lambda m: m.push(_old_text(m.source.sized(4))),
    b"U": lambda m: m.push(_old_text(m.source.sized(1))),
    # Containers
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push({}),
    b")": lambda m: m.push(()),
    b"\x8f": lambda m: m.push([]),
    b"\x85": lambda m: m.push(m.last(1)),
    b"\x86": lambda m: m.push(m.last(2)),
    b"\x87": lambda m: m.push(m.last(3)),
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b"\x91": lambda m: m.push(m.since_mark()),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.since_mark()),
    b"\x90": lambda m: m.append(m.since_mark()),
    b"s": lambda m: m.set_items(list(m.last(2))),
    b"u": lambda m: m.set_items(m.since_mark()),
    # The memo
    b"h": lambda m: m.recall(m.source.number(1)),
    b"j": lambda m: m.recall(m.source.number(4)),
    b"q": lambda m: m.remember(m.source.number(1)),
    b"r": lambda m: m.remember(m.source.number(4)),
    b"\x94": lambda m: m.remember(len(m.memo)),
    # Objects
    b"c": _global,
    b"\x93": lambda m: m.name(*m.last(2)),
    b"R": lambda m: m.call(*m.last(2)),
    b"\x81": lambda m: m.call(*m.last(2)),
    b"\x92": lambda m: m.new(*m.last(3)),
    b"b": _Machine.build,
    b"Q": _Machine.outside,
}
