"""The doors for a user's own parts: classes that a script derives from ours, and functions that it registers by name.

Our own entries come through the same doors. A part of the user's has an Origin, the file that defines it: config.json records
its hash, and an error can name the file to import. Nothing here imports anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from mtl_jax.core.configuration import Configuration, WrongField
from mtl_jax.core.errors import UserError, listed, unknown
from mtl_jax.core.files import shown

PACKAGE = "mtl_jax"
NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")
# Metadata of a field that is written to JSON only where it is not at its default: workdirs of before it existed stay the same.
ONLY_IF_SET = MappingProxyType({"only_if_set": True})
# Of such a field that a run fills in itself, and that therefore has no flag.
FILLED_IN = MappingProxyType({**ONLY_IF_SET, "filled_in": True})

F = TypeVar("F", bound=Callable[..., Any])


class Origin(NamedTuple):
    """The file that defines a user's part.

    Attributes:
        file: Its path, relative to the working directory where it is below; "<...>" if it is not a file, as in a notebook.
        sha256: The hash of the file when the part was defined; empty if it is not a file.
    """

    file: str
    sha256: str


def origin_of(part: Any) -> Origin | None:
    """The origin of a class or function, as it was when it was defined or registered; None for a part of mtl_jax itself.

    Args:
        part: A class, a function, or a functools.partial of one.
    """
    part = inspect.unwrap(getattr(part, "func", part))
    if part not in _ORIGINS:
        _ORIGINS[part] = _find_origin(part)
    return _ORIGINS[part]


# Kept from the first look at a part, which its definition takes: the file may be edited while a run trains.
_ORIGINS: dict[Any, Origin | None] = {}


def _find_origin(part: Any) -> Origin | None:
    if str(getattr(part, "__module__", PACKAGE)).partition(".")[0] == PACKAGE:
        return None
    code = getattr(part, "__code__", None)
    module = sys.modules.get(part.__module__)
    return _origin(code.co_filename if code else getattr(module, "__file__", None) or f"<{part.__module__}>")


def _origin(name: str) -> Origin:
    path = Path(name)
    if not path.is_file():
        return Origin(name if name.startswith("<") else f"<{name}>", "")
    path = path.resolve()
    shown_path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return Origin(str(shown_path), hashlib.sha256(path.read_bytes()).hexdigest())


class Part(Configuration):
    """Base of the configuration classes that a script may derive its own from: tasks, trunks, adapters, regularisers.

    A class directly below Part is a door; the classes below a door are its kinds, known by their names.
    """

    door: ClassVar[str] = ""  # what the kinds of a door are, for errors: "task"

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        lacking = sorted(getattr(cls, "__abstractmethods__", ()))
        if lacking:
            raise WrongField(
                f"class {cls.__name__} lacks {listed(lacking)}, which every {cls.door} needs; define it in the class"
            )
        if "__dataclass_fields__" not in vars(cls) and vars(cls).get("__annotations__"):
            raise WrongField(f"class {cls.__name__} is not a dataclass: put @dataclasses.dataclass(frozen=True) above it")
        return super().__new__(cls, *args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Part in cls.__bases__:
            _KINDS.setdefault(cls, {})
            return
        if cls.__module__.partition(".")[0] != PACKAGE:
            origin_of(cls)
            _resolve_annotations(cls)
        if "kind" in vars(cls).get("__annotations__", {}):
            raise UserError(f"class {cls.__name__}: config.json has the class's name as kind; give the field kind another name")
        kinds = _KINDS[door_of(cls)]
        check_free(cls.door, cls.__name__, kinds.get(cls.__name__), cls)
        kinds[cls.__name__] = cls


_KINDS: dict[type[Part], dict[str, type[Part]]] = {}


def _resolve_annotations(cls: type) -> None:
    """Replaces annotations that are texts by types: later, the script's globals may not be those of its module's name."""
    names = vars(sys.modules[cls.__module__]) if cls.__module__ in sys.modules else {}
    for field, annotation in list(vars(cls).get("__annotations__", {}).items()):
        if isinstance(annotation, str):
            try:
                cls.__annotations__[field] = eval(annotation, dict(names), dict(vars(cls)))  # as typing.get_type_hints does
            except NameError as error:
                raise UserError(f"class {cls.__name__}: the type of {field}, {annotation!r}, is unknown ({error})") from error


def door_of(cls: type[Part]) -> type[Part]:
    """The door that a class came through, for example Task."""
    return next(base for base in cls.__mro__ if Part in base.__bases__)


def kinds(door: type[Part]) -> Mapping[str, type[Part]]:
    """{name: class} of the kinds of a door that can be built; abstract classes between are left out."""
    return {name: kind for name, kind in _KINDS[door].items() if not inspect.isabstract(kind)}


def check_free(door: str, name: str, present: Any, new: Any) -> None:
    """Raises UserError if a name is taken by a part of another file, or cannot be a name.

    A part of the same file is replaced: a module that is loaded once more, a cell of a notebook that runs again.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{door} {shown(name)!r}: use letters, digits and '_' for a name, and no digit first")
    if present is None or present is new:
        return
    old, origin = origin_of(present), origin_of(new)
    if old is None and origin is not None:
        raise UserError(f"{origin.file}: the name {name!r} is taken by mtl_jax's own {door}; choose another")
    if old is not None and origin is not None and old.file != origin.file:
        raise UserError(f"{origin.file}: the name {name!r} is taken by the {door} of {old.file}; choose another")


class Registry(Mapping[str, F]):
    """Functions by name: those of mtl_jax, and those that a script registers.

    Args:
        door: What they are, for errors: "weighting rule".
        own: Those of mtl_jax.
    """

    def __init__(self, door: str, own: Mapping[str, F]):
        self.door, self._functions = door, dict(own)
        _REGISTRIES.append(self)

    def __getitem__(self, name: str) -> F:
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    def find(self, name: str, field: str = "") -> F:
        """The function of a name.

        Raises:
            UserError: There is none; lists those that there are. `field` is what the line begins with.
        """
        if name not in self._functions:
            raise unknown(field or self.door, name, self._functions)
        return self._functions[name]

    def register(self, name: str) -> Callable[[F], F]:
        """A decorator that adds a function under a name.

        Raises:
            UserError: The name is taken.
        """

        def add(function: F) -> F:
            origin_of(function)
            check_free(self.door, name, self._functions.get(name), function)
            self._functions[name] = function
            return function

        return add


_REGISTRIES: list[Registry[Any]] = []


def by_door() -> dict[str, dict[str, Any]]:
    """{door: {name: class or function}} of the parts that are loaded, those of mtl_jax and those of the user."""
    functions = {registry.door: dict(registry) for registry in _REGISTRIES}
    return {**functions, **{door.door: dict(kinds(door)) for door in _KINDS}}


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """Parts that are defined within this context are forgotten after it: for tests, and for scripts that are only looked at.

    Parts of mtl_jax itself stay: their modules may be imported within the context, which happens once.
    """
    tables: list[dict[str, Any]] = [*_KINDS.values(), *(registry._functions for registry in _REGISTRIES)]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, known in zip(tables, before, strict=True):
            imported = {name: part for name, part in table.items() if name not in known and origin_of(part) is None}
            table.clear()
            table.update(known | imported)


def as_json(parts: Mapping[str, tuple[str, Any]]) -> dict[str, dict[str, str]]:
    """The record of the user's parts among those given: {name: {"door": ..., "file": ..., "sha256": ...}}.

    Args:
        parts: {name: (door, class or function)}.
    """
    origins = {name: (door, origin_of(part)) for name, (door, part) in sorted(parts.items())}
    return {name: {"door": door, **origin._asdict()} for name, (door, origin) in origins.items() if origin is not None}
