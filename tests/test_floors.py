"""The rooms of the package and the direction of their imports."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "csalign"
MODULES = sorted(PACKAGE.rglob("*.py"))
# From the ground up. A room may import from itself and from lower floors only.
FLOORS = (
    {"core"},
    {"features", "sources", "objective"},
    {"encoders", "adapters", "metrics", "report"},
    {"ingest", "runs"},
    {"indexing"},
    {"evaluation"},
    {"training", "generation"},
    {"cli"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FRONT_DOORS = {"__init__.py", "__main__.py", "calls.py"}
# Each heavy library is imported by these modules alone.
ONLY_DOORS = {
    "diffusers": {"generation/unclip.py"},
    "faiss": {"indexing/vectors.py", "metrics/approximate.py"},
    "huggingface_hub": {"adapters/hub.py", "generation/unclip.py", "encoders/hf_texts.py"},
    "h5py": {"sources/arrays/files.py"},
    "onnx": {"adapters/wrappers.py"},
    "onnxruntime": {"adapters/wrappers.py"},
    "open_clip": {"encoders/openclip.py", "encoders/openclip_models.py"},
    "optuna": {
        "training/tuning/search_space.py",
        "training/tuning/tune.py",
    },
    "jinja2": {"runs/export.py", "report/page.py"},
    "plotly": {"report/diagnosis.py", "report/evaluation.py", "report/page.py", "report/sides.py"},
    "pyarrow": {
        "evaluation/versions.py",
        "features/sides.py",
        "indexing/build.py",
        "indexing/manifest.py",
        "ingest/import_arrays.py",
        "ingest/import_sides.py",
        "sources/arrays/base.py",
        "sources/arrays/files.py",
        "sources/arrays/opening.py",
        "sources/arrays/tables.py",
        "sources/arrow.py",
        "sources/image_rows.py",
        "sources/items.py",
        "sources/keys.py",
        "sources/labels.py",
        "sources/pairing.py",
        "features/export.py",
        "features/join.py",
        "features/checks.py",
        "features/pages.py",
        "features/reader.py",
        "features/schema.py",
        "features/splits.py",
        "features/writer.py",
        "ingest/repeats.py",
    },
    "safetensors": {
        "adapters/checkpoint.py",
        "encoders/checkpoints.py",
        "generation/unclip.py",
        "sources/arrays/files.py",
        "training/state.py",
    },
    "sklearn": {"metrics/groups.py"},
    "timm": {"encoders/timm_images.py"},
    "torch.distributed": {"core/distributed.py"},
    "transformers": {"generation/unclip.py", "encoders/hf_texts.py"},
    "umap": {"evaluation/page.py"},
    "typer": {"cli/app.py", "cli/errors.py", "cli/help.py", "cli/options.py"},
}
MAX_LINES = 450  # of a module
MAX_MODULES = 15  # of a folder, beside its __init__
MAX_TOTAL = 216  # modules of the package
MAX_TOTAL_LINES = 45_600


@cache
def imports(module: Path) -> set[str]:
    """Dotted names that a module imports, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def relative(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_imports_point_down_only(module: Path) -> None:
    if relative(module) in FRONT_DOORS:
        return  # they name everything and import it on use
    room = module.relative_to(PACKAGE).parts[0]
    used = {name.split(".")[1] for name in imports(module) if name.startswith("csalign.")}

    assert used - {room} <= {other for other in FLOOR if FLOOR[other] < FLOOR[room]}


def test_every_module_is_in_a_room() -> None:
    loose = {path.name for path in PACKAGE.glob("*.py")}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}

    assert loose == FRONT_DOORS
    assert rooms == set(FLOOR)


def test_the_training_command_knows_few_modules() -> None:
    tree = ast.parse((PACKAGE / "training/train.py").read_text(encoding="utf-8"))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]

    assert len([name for name in modules if name and name.startswith("csalign.")]) <= 12


def test_modules_and_folders_stay_small() -> None:
    lines = {relative(path): len(path.read_text().splitlines()) for path in MODULES}
    folders = {path.parent for path in MODULES}
    modules = {folder.name: len([*folder.glob("*.py")]) - 1 for folder in folders}

    assert {name for name, count in lines.items() if count > MAX_LINES} == set()
    assert {name for name, count in modules.items() if count > MAX_MODULES} == set()
    assert len(MODULES) <= MAX_TOTAL
    assert sum(lines.values()) <= MAX_TOTAL_LINES


@pytest.mark.parametrize("library", ONLY_DOORS)
def test_each_heavy_library_has_its_doors(library: str) -> None:
    doors = {
        relative(module)
        for module in MODULES
        if any(f"{name}.".startswith(f"{library}.") for name in imports(module))
    }

    assert doors == ONLY_DOORS[library]
