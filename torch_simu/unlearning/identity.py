"""identity: what an objective is, in words that are the same in every process."""

from __future__ import annotations

import itertools
import json
import sys
import types
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_simu._hashes import sha256_of_all
from torch_simu.attribution.checkpoint import weights_hash

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_COLLECTIONS = (tuple, list, set, frozenset, dict, types.MappingProxyType, types.CodeType)
_LIBRARIES = {"torch", "torch_simu", "transformers", *sys.stdlib_module_names} - {"__main__"}


def identity(value: object) -> object:
    """Describe a value by its class and parameters, a function also by its code, and nothing by its address.

    A function counts with its code, what it closes over, its defaults, and what it names in its own module: plain
    values, functions and classes. An object counts with its class, the code of its methods, and what pickle would keep
    of it; tensors and modules with their bits. What Python, torch, transformers and this package define counts by name.

    Args:
        value: Anything. Of what cannot be taken apart the class counts.

    Returns:
        What JSON can hold: the same for the same value in every process.

    Examples:
        >>> identity(partial(round, ndigits=1)) == identity(partial(round, ndigits=1))
        True
        >>> identity(partial(round, ndigits=1)) == identity(partial(round, ndigits=2))
        False
    """
    return _Description().of(value)


class _Description:
    """One description. What is met again is told by the number of its first meeting."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        # With the value itself: another one could get its address otherwise.
        self._met: dict[int, tuple[int, object]] = {}

    def of(self, value: object) -> object:
        kind = _name(type(value))
        if isinstance(value, _PLAIN):
            return [kind, repr(value)]
        if id(value) in self._met:
            return ["met", self._met[id(value)][0]]
        self._met[id(value)] = (next(self._numbers), value)
        parts = [kind, *self._parts(value)]
        if isinstance(value, _COLLECTIONS):
            # Whether equal ones are one is Python's choice.
            del self._met[id(value)]
        return parts

    def _parts(self, value: Any) -> Iterator[object]:
        match value:
            case Tensor():
                yield sha256_of_all([("", value)])
            case nn.Module():
                yield from (weights_hash(value), self._module(value))
            case torch.Generator():
                yield sha256_of_all([("", value.get_state())])
            case types.FunctionType():
                yield from self._function(value)
            case types.MethodType():
                yield from map(self.of, (value.__func__, value.__self__))
            case types.BuiltinFunctionType() | types.ModuleType():
                yield value.__name__
            case types.CodeType():
                yield from (value.co_code.hex(), value.co_names, value.co_varnames)
                yield [self.of(each) for each in value.co_consts]
            case partial():
                yield from map(self.of, (value.func, value.args, value.keywords))
            case type():
                yield from (_name(value), self._methods(value))
            case tuple() | list():
                yield from map(self.of, value)
            case set() | frozenset():
                # Each process has its own order.
                yield sorted((self.of(each) for each in value), key=json.dumps)
            case dict() | types.MappingProxyType():
                yield from ([self.of(key), self.of(each)] for key, each in value.items())
            case _ if hasattr(value, "__wrapped__"):
                yield self.of(value.__wrapped__)
            case _:
                yield from (self._methods(type(value)), self._kept(value))

    def _function(self, function: types.FunctionType) -> Iterator[object]:
        yield _name(function)
        yield [self.of(_content(cell)) for cell in function.__closure__ or ()]
        yield from map(self.of, (function.__defaults__, function.__kwdefaults__))
        if not _is_libraries(function):
            yield self.of(function.__code__)
            names = {name: function.__globals__.get(name) for name in sorted(_names(function.__code__))}
            yield {name: self.of(each) for name, each in names.items() if _counts(each, function.__module__)}

    def _methods(self, kind: type) -> object:
        found: dict[str, object] = {}
        for each in kind.__mro__:
            for name, value in () if _is_libraries(each) else vars(each).items():
                value = getattr(value, "fget", getattr(value, "__func__", value))
                counts = isinstance(value, (types.FunctionType, *_PLAIN))
                if counts and (name == "__call__" or not name.startswith("__")):
                    found[f"{each.__qualname__}.{name}"] = self.of(value)
        return found

    def _module(self, module: nn.Module) -> object:
        own = {key: self.of(value) for key, value in _set_on(module) if not _is_libraries(type(module))}
        plain = {
            f"{name}.{key}": repr(value)
            for name, part in module.named_modules()
            for key, value in _set_on(part)
            if isinstance(value, _PLAIN)
        }
        return [self._methods(type(module)), own, plain]

    def _kept(self, value: object) -> object:
        try:
            kept = value.__reduce_ex__(2)
        # Any exception: the class has its own reason not to be pickled.
        except Exception:
            return self.of(getattr(value, "__dict__", None))
        return [
            self.of(list(part) if isinstance(part, Iterator) else part)
            for part in ([kept] if isinstance(kept, str) else kept)
        ]


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _is_libraries(value: Any) -> bool:
    return str(value.__module__).partition(".")[0] in _LIBRARIES


def _set_on(module: nn.Module) -> Iterator[tuple[str, object]]:
    return ((key, value) for key, value in vars(module).items() if not key.startswith("_") and key != "training")


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*inner)


def _counts(value: object, module: str) -> bool:
    if isinstance(value, (types.FunctionType, type)):
        return value.__module__ == module
    return value is not None and isinstance(value, (*_PLAIN, tuple, frozenset, partial))


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return None
