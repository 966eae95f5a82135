"""Imports run downward: each module imports only what stands in its own layer or below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom to the top; a folder stands for all that is in it, and the package for its face, __init__.py.
LAYERS = (
    ("errors", "_C"),
    ("kernels",),
    ("triton_kernels",),
    ("ops",),
    ("architectures", "elimination"),
    ("quantization",),
    ("slicing",),
    ("patching",),
    (
        *("calibration", "evaluation", "benchmark", "search", "checkpoint", "published", "tables", "tasks", "plots"),
        *("inspection", "text_files", "export", "recovery", "streaming", "unfinished"),
    ),
    ("",),
    ("cli", "quickstart", "workflow"),
)
HEIGHTS = {name: height for height, names in enumerate(LAYERS) for name in names}


def modules() -> Iterator[tuple[str, Path]]:
    """The dotted name within slicegpt_fast, "" for itself, and file of each module."""
    for base, prefix in ((ROOT / "slicegpt_fast", ()), (ROOT / "triton_kernels", ("triton_kernels",))):
        for file in sorted(base.rglob("*.py")):
            parts = (*prefix, *file.relative_to(base).with_suffix("").parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


MODULES = dict(modules())


def imported(module: str, file: Path, source: str) -> Iterator[str]:
    """The modules of the package that ``source`` imports, at the top or in a function; names as in MODULES."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["slicegpt_fast", *filter(None, package.split("."))]
            base = ".".join([*above[: len(above) - node.level + 1], node.module or ""] if node.level else [node.module])
            names = [f"{base.rstrip('.')}.{alias.name}" for alias in node.names]
            # What is no module is a name within one.
            found = [name if _within(name) in (*MODULES, "_C") else base.rstrip(".") for name in names]
        else:
            continue
        yield from (_within(name) for name in found if name.split(".")[0] == "slicegpt_fast")


def _within(name: str) -> str:
    return name.removeprefix("slicegpt_fast").removeprefix(".")


def upward(module: str, file: Path, source: str) -> list[str]:
    """What ``source`` imports of the layers above it."""
    own = HEIGHTS[module.split(".")[0]]
    names = sorted(set(imported(module, file, source)))
    if module.split(".")[0] == "triton_kernels":
        return [name for name in names if name.split(".")[0] not in ("kernels", "triton_kernels")]
    return [name for name in names if HEIGHTS[name.split(".")[0]] > own]


def test_each_module_has_a_layer():
    assert {name.split(".")[0] for name in MODULES} <= HEIGHTS.keys(), "name the layer of a new module in LAYERS"


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward(module):
    assert upward(module, MODULES[module], MODULES[module].read_text()) == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("ops.") and "backends" not in name])
def test_ops_know_no_backend(module):
    names = imported(module, MODULES[module], MODULES[module].read_text())
    assert [name for name in names if name.startswith("ops.backends")] == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("ops.dispatch", "import slicegpt_fast.slicing.plan", ["slicing.plan"]),
        ("ops.dispatch", "from slicegpt_fast import slicing, _C", ["slicing"]),
        (
            "ops.dispatch",
            "def f():\n    from slicegpt_fast.slicing import plan, slice_model",
            ["slicing", "slicing.plan"],
        ),
        ("ops.dispatch", "from slicegpt_fast import slice_model", [""]),
        ("ops.dispatch", "from ..patching.packing import PackedWeight", ["patching.packing"]),
        ("ops.dispatch", "from . import tuning\nfrom slicegpt_fast.kernels import measured\nimport torch", []),
        ("slicing.plan", "from slicegpt_fast.ops.covariance import covariance_", []),
        ("triton_kernels.tiles", "from .launch import Gpu\nfrom slicegpt_fast.kernels import measured", []),
        ("triton_kernels.tiles", "from slicegpt_fast.errors import InputError", ["errors"]),
        ("triton_kernels.tiles", "def f():\n    import slicegpt_fast.ops.dispatch", ["ops.dispatch"]),
    ],
)
def test_what_runs_upward_is_found(module, source, found):
    assert upward(module, MODULES[module], source) == found
