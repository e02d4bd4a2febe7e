"""What users bring themselves: an algorithm, a controller, an aggregator or a dataset, by name.

A name is one of ours, or an import path: `module:Name`, or `folder/file.py:Name` for a file that is part of no
package. What is given from Python goes by an import path too, so that config.json says what a run was made with.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fedpeat_ray.errors import ConfigError, one_of

_OURS = __name__.split(".")[0]
_PATHS = ", or an import path, module:Name or file.py:Name"
_given: dict[str, Any] = {}
_modules: dict[str, ModuleType] = {}


def find(field: str, name: str, ours: Mapping[str, str]) -> Any:
    """What goes by a name: one of ours, `{name: import path}`, or what was given or can be imported.

    Raises ConfigError, with the reason, for a setting `field` that names nothing.
    """
    path = ours.get(name, name)
    if path in _given:
        return _given[path]
    if not is_import_path(path):
        raise ConfigError.of(field, name, one_of(name, ours, _PATHS))
    place, _, attribute = path.rpartition(":")
    if name in ours:
        return getattr(importlib.import_module(place), attribute)
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else _from_module(place)
        return getattr(module, attribute)
    except Exception as error:  # whatever a file of the user's may raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError.of(field, name, f"{', '.join(ours)}{_PATHS}; this one: {reason}") from error


def given(what: Any) -> str:
    """The name by which `find` knows a class or function from now on."""
    name = f"{what.__module__}:{what.__qualname__}"
    _given[name] = what
    if (module := sys.modules.get(what.__module__)) is not None:
        _note(module)
    return name


def is_import_path(name: str) -> bool:
    """Whether a name can only be one: `place:Name`, in a place that is no existing directory."""
    place, colon, attribute = name.rpartition(":")
    return bool(colon and place) and attribute.isidentifier() and not Path(name).exists()


def short(name: str) -> str:
    """A name without its place, e.g. for a directory."""
    return name.rpartition(":")[2] if is_import_path(name) else name


def modules() -> list[ModuleType]:
    """Those of users that were met: other processes cannot import them, or perhaps not the same."""
    return list(_modules.values())


def _from_module(name: str) -> ModuleType:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    return _note(importlib.import_module(name))


def _from_file(path: Path) -> ModuleType:
    path = path.expanduser().absolute()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"  # of two files, each is its own
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return _note(module)


def _note(module: ModuleType) -> ModuleType:
    if module.__name__.split(".")[0] not in (_OURS, "__main__"):
        _modules[module.__name__] = module
    return module
