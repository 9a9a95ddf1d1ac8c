"""Which module imports which: no circles, and one direction from the command line down to the types."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import rlhf_ray

PACKAGE = Path(rlhf_ray.__file__).parent
# Each layer imports those after it, and within itself; a part is a folder or a file of the package.
LAYERS = (
    {"cli", "command", "doctor", "launchers", "tune"},
    {"algorithm"},
    {"environments", "evaluation", "learner", "prompts", "quickstart", "rewards", "rollouts", "weight_sync"},
    {"advantages", "algorithms", "checkpoints", "losses", "models", "reporting"},
    {"config"},
    {
        "actor_pool",
        "errors",
        "host_memory",
        "pickling",
        "span_log",
        "stopping",
        "types",
        "untrusted_text",
        "worker_env",
    },
)
LAYER_OF = {part: index for index, parts in enumerate(LAYERS) for part in parts}

# What does not follow the direction, to become fewer: importing module -> imported part.
UPWARD_AT_THE_TOP = {
    ("rlhf_ray.reporting.token_texts", "prompts"),
}
UPWARD_IN_A_FUNCTION = {
    # config.build() starts what is above it.
    ("rlhf_ray.config.builder", "tune"),
    # What names and texts settings may have is known where they are used.
    ("rlhf_ray.config.checks.data", "quickstart"),
    ("rlhf_ray.config.checks.data", "rewards"),
    ("rlhf_ray.config.checks.environment", "environments"),
    ("rlhf_ray.config.checks.environment", "rollouts"),
    ("rlhf_ray.reporting.completions", "prompts"),
    ("rlhf_ray.reporting.completions", "quickstart"),
    ("rlhf_ray.reporting.token_texts", "quickstart"),
}


class Import(NamedTuple):
    module: str
    imported: str
    is_at_top: bool

    @property
    def parts(self) -> tuple[str, str]:
        return part_of(self.module), part_of(self.imported)


def part_of(module: str) -> str:
    return module.split(".")[1]


def name_of(path: Path) -> str:
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_in(module: str, node: ast.AST, *, is_at_top: bool = True) -> Iterator[Import]:
    """Every import of the package's own modules; those for type checkers alone are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        names: list[str] = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: imports are absolute"
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            names = [name if name in FILES else str(child.module) for name in names]
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
            names = [str(argument.value) for argument in child.args if isinstance(argument, ast.Constant)]
        yield from (Import(module, name, is_at_top) for name in names if name in FILES and "." in name)
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports_in(module, child, is_at_top=is_at_top and not is_function)


# The package's own file imports the algorithms, whoever imports it; nothing imports that.
IMPORTS = [
    found
    for module, path in FILES.items()
    if module != "rlhf_ray"
    for found in imports_in(module, ast.parse(path.read_text()))
]


def packages_of(module: str) -> list[str]:
    """The folders whose ``__init__`` runs before a module's."""
    names = module.split(".")
    return [".".join(names[:count]) for count in range(2, len(names))]


def circles() -> set[frozenset[str]]:
    """Groups of modules of which each imports, by way of others, all the others when it is imported."""
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    for module, imported, is_at_top in IMPORTS:
        if is_at_top:
            graph[module] |= {imported, *packages_of(imported)} - {module, *packages_of(module)}
    reached = {module: reachable(graph, module) for module in graph}
    groups = (frozenset(other for other in reached[module] if module in reached[other]) for module in graph)
    return {group for group in groups if len(group) > 1}


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def test_every_part_has_a_layer() -> None:
    assert {part_of(module) for module in FILES if module != "rlhf_ray"} <= set(LAYER_OF)


def test_no_modules_import_one_another() -> None:
    assert circles() == set()


@pytest.mark.parametrize(("is_at_top", "allowed"), [(True, UPWARD_AT_THE_TOP), (False, UPWARD_IN_A_FUNCTION)])
def test_imports_point_one_way(is_at_top: bool, allowed: set[tuple[str, str]]) -> None:
    upward = {
        (found.module, part_of(found.imported))
        for found in IMPORTS
        if found.is_at_top is is_at_top and LAYER_OF[found.parts[1]] < LAYER_OF[found.parts[0]]
    }
    assert upward - allowed == set(), "import from the layers below, or move what is needed there"
    assert allowed - upward == set(), "these imports are gone: take them off the list"


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert reachable(graph, "d") == {"a", "b", "c"}
    assert "d" not in reachable(graph, "a")
