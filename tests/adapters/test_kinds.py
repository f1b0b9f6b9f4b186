from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch

from csalign.adapters.builtin import FastDropout
from csalign.adapters.checkpoint import AdapterInfo, load_adapter, save_adapter
from csalign.adapters.model import KINDS, Adapter, build_side, find_kind, shared_width
from csalign.adapters.side import SideShape
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, SchemaError, ShapeError

MODULE = dedent(
    """
    from pathlib import Path

    from torch import nn

    from csalign.adapters.side import SideAdapter

    Path(__file__).with_suffix(".ran").touch()


    class Tied(SideAdapter):
        def __init__(self, shape):
            super().__init__(shape)
            self.first = nn.Linear(shape.input_width, shape.width)
            self.second = nn.Linear(shape.input_width, shape.width)
            self.second.weight = self.first.weight

        def forward(self, x, noise=0.0):
            u = self.inputs(x, noise)
            return self.first(u) * self.second(u)


    class Wide(Tied):
        def forward(self, x, noise=0.0):
            return super().forward(x, noise).repeat(1, 2)


    class Unready(SideAdapter):
        def __init__(self, shape):
            pass


    class Stranger(nn.Module):
        pass
    """
)
Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """A function that makes the module importable, with entry points, and returns its name."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(site)

    def make(**entries: str) -> str:
        name = f"adapters_of_{tmp_path.name}".replace("-", "_")
        metadata = site / f"{name}-1.dist-info"
        metadata.mkdir(parents=True)
        (site / f"{name}.py").write_text(MODULE)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        lines = [f"{kind} = {name}:{target}" for kind, target in entries.items()]
        (metadata / "entry_points.txt").write_text("\n".join(["[csalign.adapters]", *lines]))
        return name

    return make


def has_run(tmp_path: Path) -> bool:
    return any((tmp_path / "site").glob("*.ran"))


def save(folder: Path, kind: str) -> tuple[Path, Adapter]:
    shapes = {Modality.IMAGE: SideShape(kind, 6, 4), Modality.TEXT: SideShape("linear", 5, 4)}
    adapter = Adapter(shapes, allow=[kind]).eval()
    info = AdapterInfo(
        adapters=shapes,
        encoders={Modality.IMAGE: "eye", Modality.TEXT: "ear"},
        start="random",
        step=1,
        logit_scale=7.0,
        bandwidth=None,
        data_fingerprint="f" * 64,
        train_split="train",
    )
    run = folder / "run"
    run.mkdir()
    save_adapter(run, adapter, info)
    return run, adapter


def test_an_installed_kind_is_built_saved_and_loaded_by_its_name(
    install: Install, tmp_path: Path
) -> None:
    install(tied="Tied")
    run, adapter = save(tmp_path, "tied")
    rows = np.random.default_rng(0).normal(size=(5, 6))

    assert load_adapter(run).embed(Modality.IMAGE, rows).tobytes() == (
        adapter.embed(Modality.IMAGE, rows).tobytes()
    )


def test_a_kind_of_others_maps_tokens_too(install: Install) -> None:
    install(tied="Tied")
    side = build_side(SideShape("tied", 6, 4, token_width=6))
    tokens = torch.randn(2, 3, 6)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = side.forward_tokens(torch.randn(2, 6), tokens, mask).tokens

    torch.testing.assert_close(found[mask], side(tokens[mask]))
    assert side.training


def test_a_run_folder_alone_imports_no_module(install: Install, tmp_path: Path) -> None:
    kind = f"{install()}:Tied"
    run, adapter = save(tmp_path, kind)
    ran = next((tmp_path / "site").glob("*.ran"))
    ran.unlink()

    for allow in ([], ["another.module:Tied"], [f"{kind}2"]):
        with pytest.raises(SchemaError, match=rf"adapter\.json: {kind}: .* allow this kind"):
            load_adapter(run, allow=allow)
    again = load_adapter(run, allow=[kind])
    assert torch.equal(again.image(torch.ones(1, 6)), adapter.image(torch.ones(1, 6)))


def test_a_kind_that_is_not_allowed_is_not_even_imported(install: Install, tmp_path: Path) -> None:
    kind = f"{install()}:Tied"

    with pytest.raises(ConfigError, match="allow this kind"):
        find_kind(kind)
    assert not has_run(tmp_path)
    find_kind(kind, allow=[kind])
    assert has_run(tmp_path)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Wide", r"gives shape \(2, 8\) for 2 embeddings, not \(2, 4\)"),
        ("Unready", "failed to build"),
        ("Stranger", "not a subclass of csalign's SideAdapter"),
        ("Missing", "failed to import .AttributeError"),
    ],
)
def test_what_does_not_keep_to_the_interface_is_refused_in_one_line(
    install: Install, target: str, message: str
) -> None:
    kind = f"{install(mine=target)}:{target}"

    for name in ("mine", kind):
        with pytest.raises(ConfigError, match=f"^{name}: .*{message}"):
            build_side(SideShape(name, 6, 4), allow=[kind])


@pytest.mark.parametrize("kind", ["surprise", "os:", ":path", "../evil:Class", "a b:C", ""])
def test_what_is_no_kind_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="no such kind of adapter; there are linear, mlp"):
        find_kind(kind, allow=[kind])


def test_a_module_that_is_not_there_is_named() -> None:
    kind = "not_there_at_all:Class"

    with pytest.raises(ConfigError, match=f"{kind}: failed to import .ModuleNotFoundError"):
        find_kind(kind, allow=[kind])


def test_an_entry_point_cannot_replace_a_kind_of_csaligns(install: Install) -> None:
    install(linear="Tied")

    assert find_kind("linear") is KINDS["linear"]


def width(image: str, text: str, widths: tuple[int, int], asked: int | None = None) -> int:
    sides = (Modality.IMAGE, Modality.TEXT)
    kinds = dict(zip(sides, (image, text), strict=True))
    return shared_width(kinds, dict(zip(sides, widths, strict=True)), asked)


def test_kinds_that_map_share_what_is_asked_for_or_a_modest_width() -> None:
    assert width("linear", "transformer", (768, 512), 300) == 300
    assert width("mlp", "glu", (768, 512)) == 256
    assert width("mlp", "glu", (768, 100)) == 100


def test_a_kind_that_keeps_its_width_decides_the_shared_one() -> None:
    assert width("identity", "mlp", (768, 512)) == 768
    assert width("glu", "low-rank", (768, 512)) == 512
    assert width("identity", "low-rank", (512, 512)) == 512
    assert width("low-rank", "low-rank", (512, 512), 512) == 512


@pytest.mark.parametrize("kinds", [("identity", "low-rank"), ("low-rank", "low-rank")])
def test_two_kept_widths_that_differ_are_refused(kinds: tuple[str, str]) -> None:
    message = f"{' and '.join(kinds)} keep .* image embeddings are 768 wide and text embeddings 512"
    with pytest.raises(ShapeError, match=message):
        width(*kinds, (768, 512))


def test_another_width_than_the_kept_one_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"identity keeps the 512 of the text .* of 256 is asked"):
        width("mlp", "identity", (768, 512), 256)


def test_two_frozen_sides_are_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        width("identity", "identity", (512, 512))


def test_dropout_keeps_the_mean_and_follows_the_seed() -> None:
    dropout, x = FastDropout(0.3), torch.full((500, 1_001), 2.0, requires_grad=True)
    torch.manual_seed(0)
    found = dropout(x)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), found)
    assert not torch.equal(dropout(x), found)
    assert found.mean().item() == pytest.approx(2, abs=0.02)
    assert (found == 0).double().mean().item() == pytest.approx(0.3, abs=0.005)
    assert found.max().item() == pytest.approx(2 / 0.7, abs=1e-3)
    # Neither rows nor columns are dropped together.
    assert (found == 0).double().mean(0).std().item() == pytest.approx(0.0205, abs=0.003)
    assert (found == 0).double().mean(1).std().item() == pytest.approx(0.0145, abs=0.003)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, found.detach() / 2)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("p", [0.0, 0.999999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropout_at_its_limits_is_finite(p: float, dtype: torch.dtype) -> None:
    for shape in [(0, 3), (3,), (2, 3, 5)]:
        x = torch.ones(shape, dtype=dtype)
        found = FastDropout(p)(x)
        assert (found.dtype, found.shape) == (dtype, x.shape)
        assert found.isfinite().all()
        assert p or torch.equal(found, x)
