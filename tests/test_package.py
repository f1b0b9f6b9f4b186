import ast
import re
import tomllib
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest

import csalign

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "csalign"
MODULES = sorted(PACKAGE.rglob("*.py"))
PARTS = {"store", "sources", "encoders", "decoders", "adapters", "metrics", "report", "nearest"}
BASE = {"errors", "enums", "progress", "results", "files", "locations", "onednn", "sealed"}
BASE |= {"stopping", "__version__", "csalign", "processes", "names"}
# What each folder may import from csalign beside itself; parts take plain arguments, so none of
# them sees a config.
ALLOWED = {
    "config": BASE,
    "objective": BASE,
    "store": BASE,
    "sources": BASE,
    "encoders": BASE | {"store"},
    "decoders": BASE,
    "adapters": BASE,
    "nearest": BASE | {"store"},
    "metrics": BASE | {"objective"},
    "report": BASE,
    "steps": BASE | PARTS | {"objective", "config", "devices", "memory", "steps"},
    "cli": BASE | {"steps", "config"},
    "": BASE,
}
ONLY_DOORS = {
    "diffusers": {"decoders/unclip.py"},
    "faiss": {"nearest/vectors.py", "metrics/approximate.py"},
    "huggingface_hub": {"adapters/hub.py", "decoders/unclip.py", "encoders/hf_texts.py"},
    "h5py": {"sources/vectors/hdf5_files.py"},
    "onnx": {"adapters/graphs.py"},
    "onnxruntime": {"adapters/graphs.py"},
    "open_clip": {"encoders/openclip.py", "encoders/openclip_models.py"},
    "optuna": {"steps/search_space.py", "steps/study.py", "steps/tune.py"},
    "plotly": {"report/diagnosis.py", "report/evaluation.py", "report/page.py"},
    "pyarrow": {
        "nearest/items.py",
        "sources/columnar/files.py",
        "sources/columnar/layout.py",
        "sources/vectors/arrow_files.py",
        "store/export.py",
        "store/join.py",
        "store/keys.py",
        "store/reader.py",
        "store/schema.py",
        "store/shard.py",
        "store/workspace.py",
    },
    "safetensors": {
        "adapters/checkpoint.py",
        "decoders/unclip.py",
        "sources/vectors/tensor_files.py",
        "steps/state.py",
    },
    "timm": {"encoders/timm_images.py"},
    "torch.distributed": {"processes.py"},
    "transformers": {"decoders/unclip.py", "encoders/hf_texts.py"},
    "umap": {"steps/report.py"},
    "typer": {"cli/app.py", "cli/options.py", "cli/run.py"},
}


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
    if relative(module) in ("__init__.py", "__main__.py"):
        return  # the front doors: they name everything and import it on use
    folder = relative(module).split("/")[0] if "/" in relative(module) else ""
    used = {name.split(".")[1] for name in imports(module) if name.startswith("csalign.")}

    assert used <= ALLOWED[folder] | {folder}


@pytest.mark.parametrize("library", ONLY_DOORS)
def test_each_heavy_library_has_its_doors(library: str) -> None:
    doors = {
        relative(module)
        for module in MODULES
        if any(f"{name}.".startswith(f"{library}.") for name in imports(module))
    }

    assert doors == ONLY_DOORS[library]


def test_every_module_imports_and_every_public_name_is_there() -> None:
    for found in walk_packages(csalign.__path__, "csalign."):
        if not found.name.endswith("__main__"):
            import_module(found.name)

    assert csalign.__all__ == sorted(csalign.__all__)
    for name in csalign.__all__:
        assert getattr(csalign, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'surprise'"):
        _ = csalign.surprise


def test_changelog_and_package_agree_on_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)

    assert versions[0] == project["version"] == csalign.__version__
