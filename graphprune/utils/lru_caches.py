"""Results that a model's code keeps in `functools.lru_cache`, which outlive every copy of the model."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

from torch import nn

_Cached: Any = type(functools.lru_cache(lambda: None))

# A cache, and what puts another function in its place.
_CacheAndSetter: TypeAlias = tuple[Any, Callable[[Any], None]]


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Let the cached functions in the model's code compute anew each time.

    A run without data, or in float64, would leave its tensors in the caches for the user's own runs
    to find; and tensors that an earlier run left would hide the operators that make them.
    """
    caches = list(_find_caches(model))
    for cache, put in caches:
        cache.cache_clear()
        put(cache.__wrapped__)
    try:
        yield
    finally:
        for cache, put in caches:
            put(cache)
            cache.cache_clear()  # other code may have called it by another name


def _find_caches(model: nn.Module) -> Iterator[_CacheAndSetter]:
    """Yield the caches among the functions and methods of the files that the model's classes are in."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    module_names = {
        name for name in (cls.__module__ for cls in classes) if name.split(".")[0] != "torch"
    }
    holders = {sys.modules[name] for name in module_names - {"builtins"} if name in sys.modules}
    for holder in [
        *holders,
        *(cls for cls in classes if cls.__module__ in module_names - {"builtins"}),
    ]:
        for name, attribute in list(vars(holder).items()):
            put = partial(setattr, holder, name)
            if isinstance(attribute, (staticmethod, classmethod)):
                yield from _find_in_function(
                    attribute.__func__, partial(_put_method, put, type(attribute))
                )
            else:
                yield from _find_in_function(attribute, put)


def _put_method(put: Callable[[Any], None], kind: Any, function: Any) -> None:
    put(kind(function))


def _find_in_function(attribute: Any, put: Callable[[Any], None]) -> Iterator[_CacheAndSetter]:
    """Yield the cache that a function is, or that a decorated one has in its closure."""
    if isinstance(attribute, _Cached):
        yield attribute, put
    elif inspect.isfunction(attribute):
        # with `@log` above `@lru_cache` the name is log's wrapper, and a cell of that holds the cache
        for cell in attribute.__closure__ or ():
            try:
                if isinstance(cell.cell_contents, _Cached):
                    yield cell.cell_contents, partial(setattr, cell, "cell_contents")
            except ValueError:  # a cell that is not filled yet
                continue
