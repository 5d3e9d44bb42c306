"""The floors of the house: a folder imports only from floors below it, and only dense/ knows DeepSpeed."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megarec"
SCORER = PACKAGE / "serving/scorer"

FLOORS = [  # from the ground up; rooms of one floor do not know each other
    ["errors", "files", "slices", "signals", "ray_cluster", "ray_driver"],
    ["config", "kernels"],
    ["data", "models", "distributed", "metrics"],
    ["sparse", "dense"],
    ["run"],
    ["checkpoint"],
    ["training"],
    ["serving", "launching", "planning", "parity"],
    ["scaling", "evaluation", "recipes"],
    ["commands"],
    ["train"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
GROUND = 0  # its files are single modules, which may use each other


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, module or module.name) of every import of a file, nested ones and those for types included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names if node.level == 0 else ():  # the scorer's own; see the test below
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name


def violations(room: str, where: str, source: str) -> list[str]:
    """Imports of a file in `room` that do not go down."""
    found = []
    for line, name in imports(source):
        top, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if top != "megarec" or other == room or not other:
            continue
        if FLOOR_OF[room] == FLOOR_OF.get(other) == GROUND:
            continue
        if other not in FLOOR_OF or FLOOR_OF[other] >= FLOOR_OF[room]:
            found.append(f"{where}:{line}: {room} imports {name}, which stands no lower")
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def files() -> list[Path]:
    """All modules but the scorer's, a package of its own that exports carry with them."""
    found = (path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or room_of(path) in FLOOR_OF)
    return sorted(path for path in found if SCORER not in path.parents)


def test_only_the_scorer_imports_relatively() -> None:
    """Elsewhere a relative import hides where a name lives."""
    for path in files():
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes), path


def test_the_scorer_needs_numpy_and_onnxruntime_alone() -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "onnxruntime"}
    for path in sorted(SCORER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if node.level == 0 else []
                assert node.level <= 1, f"{path.name}:{node.lineno}"
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                top = name.split(".")[0]
                lazy = path.name == "files.py" and top == "pyarrow" and node.col_offset > 0
                assert top in allowed or lazy, f"{path.name}:{node.lineno}: imports {name}"


def test_every_room_stands_on_a_floor() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(FLOOR_OF), f"give {sorted(rooms - set(FLOOR_OF))} a floor in FLOORS"


def test_imports_go_down() -> None:
    found = [
        line
        for path in files()
        for line in violations(room_of(path), str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "from megarec.training.step import train_step",
        "from megarec import training",
        "import megarec.dense.side",
        "def f():\n    from megarec.dense.side import DenseSide",
    ],
)
def test_an_import_that_goes_up_or_sideways_is_seen(source: str) -> None:
    (found,) = violations("sparse", "megarec/sparse/side.py", source)
    assert found.startswith("megarec/sparse/side.py:")


def test_only_dense_imports_deepspeed() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: imports {name}"
        for folder in ("megarec", "tools", "launch")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in imports(path.read_text(encoding="utf-8"))
        if name.split(".")[0] == "deepspeed" and PACKAGE / "dense" not in path.parents
    ]
    assert not found, "\n".join(found)


def test_only_the_driver_of_a_ray_cluster_imports_ray() -> None:
    """And not before it works: without the extra nothing imports it."""
    files = [path for folder in ("megarec", "tools", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {
        str(path.relative_to(ROOT))
        for path in files
        for _, name in imports(path.read_text(encoding="utf-8"))
        if name.split(".")[0] == "ray"
    }
    assert found == {"megarec/ray_driver.py"}
    body = ast.parse((PACKAGE / "ray_driver.py").read_text(encoding="utf-8")).body
    top = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [name for node in top for _, name in imports(ast.unparse(node)) if name.split(".")[0] == "ray"]


def test_tables_do_not_know_the_exchange() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: imports {name}"
        for path in sorted((PACKAGE / "sparse/tables").rglob("*.py"))
        for line, name in imports(path.read_text(encoding="utf-8"))
        if name.startswith("megarec.sparse.exchange")
    ]
    assert not found, "\n".join(found)


def test_the_accelerator_is_decided_before_deepspeed_is_imported() -> None:
    """Whichever module comes first. DeepSpeed reads DS_ACCELERATOR once, at its first import: a fork for each."""
    code = (
        "import builtins, importlib, os, sys; import torch; real = builtins.__import__; seen = []\n"
        "def watch(name, *rest, **named):\n"
        "    if name.partition('.')[0] == 'deepspeed' and not seen: seen.append(os.environ.get('DS_ACCELERATOR'))\n"
        "    return real(name, *rest, **named)\n"
        "builtins.__import__ = watch\n"
        "for module in sys.argv[1:]:\n"
        "    if not os.fork():\n"
        "        importlib.import_module('megarec.' + module)\n"
        "        print('first:', module, torch.accelerator.is_available(), seen[0], flush=True)\n"
        "        os._exit(0)\n"
        "    assert os.wait()[1] == 0\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    modules = ["dense.engine", "dense.groups", "training.trainer", "planning.zero"]
    command = [sys.executable, "-W", "ignore", "-c", code, *modules]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split()[1:] for line in ran.stdout.splitlines() if line.startswith("first: ")]
    assert [module for module, _, _ in rows] == modules
    assert all(available == "True" or decided == "cpu" for _, available, decided in rows), rows


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    long = {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > 450}
    assert not long, long
    assert sum(0 < length < 60 for path, length in lengths.items() if path.name != "__init__.py") < 20


def test_no_function_is_longer_than_80_lines() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > 80
    ]
    assert not long, "\n".join(long)


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their base names."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
