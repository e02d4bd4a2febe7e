"""What holds for every module of the package, beyond the layers that import-linter checks."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MODULES = sorted((REPOSITORY / "fedpeat_ray").rglob("*.py"))
LATER = ("ray", "deepspeed", "datasets", "matplotlib", "tyro")  # what only some runs need
ON_RAY = (
    "host_pool",
    "ray_hosts",
    "side_by_side",
    "driver_actor",
    "foundation_driver",
    "node_files",
    "watchers/ray_metrics",
)
MAY_IMPORT_RAY = {f"fedpeat_ray/runtime/{name}.py" for name in ON_RAY} | {"fedpeat_ray/control/branching_ppo.py"}
MAY_IMPORT_DEEPSPEED = {"fedpeat_ray/runtime/foundation_driver.py"}


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def imported(tree: ast.Module) -> set[str]:
    """First parts of the names of all modules imported anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if tree.body:  # the file that makes a folder a package is empty
        assert ast.get_docstring(tree)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_everything_public_has_a_docstring(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    definitions = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    definitions = [node for node in definitions if "overload" not in map(ast.unparse, node.decorator_list)]
    missing = [node.name for node in definitions if node.name[0] != "_" and not ast.get_docstring(node)]
    assert not missing


@pytest.mark.parametrize(("library", "may"), [("ray", MAY_IMPORT_RAY), ("deepspeed", MAY_IMPORT_DEEPSPEED)])
def test_ray_and_deepspeed_are_imported_by_hosts_and_driver_alone(library, may):
    importing = {name_of(path) for path in MODULES if library in imported(ast.parse(path.read_text(encoding="utf-8")))}
    assert importing == may


def test_controllers_know_numbers_of_the_fleet_settings_and_seeds_only():
    rooms = ("control", "fleet", "seeding", "config", "settings", "errors", "own")
    allowed = tuple(f"fedpeat_ray.{name}" for name in rooms)
    heavy = {"fleet_env": {"gymnasium"}, "branching_ppo": {"gymnasium", "torch", "ray"}}
    for path in (REPOSITORY / "fedpeat_ray" / "control").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fedpeat_ray"):
                assert node.module.startswith(allowed), f"{name_of(path)} imports {node.module}"
        known = {"numpy", "safetensors", "fedpeat_ray", *sys.stdlib_module_names, *heavy.get(path.stem, ())}
        assert imported(tree) <= known, f"{name_of(path)} imports {imported(tree) - known}"


def test_importing_the_package_imports_neither_ray_nor_what_only_some_runs_need():
    code = f"import sys, fedpeat_ray; print([m for m in {LATER} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_commands_and_sweeps_read_their_settings_before_they_load_what_computes():
    code = "import sys, fedpeat_ray.__main__, fedpeat_ray.sweep, workloads.large_scale, workloads.train_controller; "
    code += "print([m for m in ('torch', 'transformers', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_nothing_draws_from_a_global_generator():
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert "random" not in imported(tree), name_of(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                seeded = called in ("np.random.default_rng", "np.random.Generator") and node.args
                assert not called.startswith("np.random.") or seeded, f"{name_of(path)}, line {node.lineno}: {called}"
                assert called not in ("torch.manual_seed", "torch.seed", "torch.rand", "torch.randn", "torch.randperm")
