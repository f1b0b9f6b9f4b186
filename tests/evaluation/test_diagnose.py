import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csalign.core.errors import OutputError
from csalign.evaluation.config import DiagnoseConfig
from csalign.evaluation.diagnose import diagnose
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.objective.pairwise import infonce
from csalign.training.config import TrainConfig
from csalign.training.train import train


def clouds(tmp_path: Path, offset: float, spread: float = 0.05) -> Path:
    """200 pairs on two caps of the sphere whose centres are apart."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(200, 8)) * 0.3
    for name, sign in (("images", 1), ("texts", -1)):
        rows = shared + spread * rng.normal(size=shared.shape)
        np.save(tmp_path / f"{name}.npy", np.column_stack([rows, np.full(200, sign * offset)]))
    out = tmp_path / f"set-{offset}"
    paths = {name: tmp_path / f"{name}.npy" for name in ("images", "texts")}
    import_arrays(ImportConfig(**paths, out=out))
    return out


def told(features: Path, **options: Any) -> dict[str, Any]:
    return diagnose(DiagnoseConfig(features=features, **options))


def test_the_terms_add_up_to_the_losses(tmp_path: Path) -> None:
    features = clouds(tmp_path, 0.5)
    document = told(features, logit_scale=10.0, cs_weight=0.7)
    plain, full = document["infonce"], document["objective"]
    x, y = (np.load(tmp_path / f"{name}.npy") for name in ("images", "texts"))
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))
    expected = infonce(torch.from_numpy(x), torch.from_numpy(y), logit_scale=10.0)

    assert plain["loss"] == pytest.approx(float(expected), abs=1e-5)
    assert plain["alignment"] + plain["uniformity"] == pytest.approx(plain["loss"])
    assert full["alignment"] + full["uniformity"] == pytest.approx(full["loss"])
    assert full["loss"] == pytest.approx(plain["loss"] + 0.7 * full["cs_divergence"])
    assert full["cs_cross"] + full["cs_intra"] == pytest.approx(full["cs_divergence"])


def test_infonce_undoes_itself_and_the_divergence_does_not(tmp_path: Path) -> None:
    document = told(clouds(tmp_path, 1.0), cs_weight=10.0)
    plain, full = document["infonce"], document["objective"]

    assert document["logit_scale"] == 100.0
    assert plain["gradient_cosine"] < -0.5
    assert full["gradient_cosine"] > plain["gradient_cosine"]


def test_an_offset_is_told_from_a_difference_in_shape(tmp_path: Path) -> None:
    apart = told(clouds(tmp_path, 1.0))["gap"]
    together = told(clouds(tmp_path, 0.0, spread=0.3))["gap"]

    assert apart["centroid_share"] > 0.9
    assert together["centroid_share"] < 0.5
    assert together["shape_share"] == pytest.approx(1 - together["centroid_share"])


def test_a_run_is_looked_at_with_its_own_temperature(features: Path, tmp_path: Path) -> None:
    train(TrainConfig(features=features, out=tmp_path / "run", steps=0, logit_scale=5.0))
    document = told(features, adapter=tmp_path / "run", pairs=20)

    assert (document["logit_scale"], document["pairs"], document["split"]) == (5.0, 20, "test")


def test_the_conflict_is_told_for_soft_and_for_sharp_temperatures(tmp_path: Path) -> None:
    document = told(clouds(tmp_path, 0.5), logit_scale=7.0, cs_weight=0.5)
    scales = [row["logit_scale"] for row in document["by_scale"]]
    here = document["by_scale"][scales.index(7.0)]

    assert scales == sorted(scales)
    assert {1.0, 100.0} < set(scales)
    assert here["infonce"] == document["infonce"]["gradient_cosine"]
    assert here["objective"] == document["objective"]["gradient_cosine"]


def test_the_page_says_what_the_document_says_and_needs_no_network(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    document = told(clouds(tmp_path, 0.5), report=page)
    text = page.read_text(encoding="utf-8")
    own = re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.S)

    assert f"{document['infonce']['loss']:.4f}" in text
    assert own.count('class="plotly-graph-div"') == 3
    assert not re.search(r"(src|href)=", own)
    assert "default-src 'none'" in text
    share = 100 * document["gap"]["centroid_share"]
    assert f"{share:.0f} % of the gap is an offset of the centroids" in text.split("</header>")[0]


def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    features = clouds(tmp_path, 0.5)
    with pytest.raises(OutputError, match=r"the folder .* does not exist"):
        told(features, report=tmp_path / "missing/page.html")
    with pytest.raises(OutputError, match="is a folder; name a file"):
        told(features, report=tmp_path)


def test_uniformity_is_that_of_a_sample_and_not_of_the_first_rows(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5_400, 4))
    rows[:5_000] = rows[:1]  # whose uniformity by themselves is 0
    np.save(tmp_path / "ordered.npy", rows)
    out = tmp_path / "ordered"
    path = tmp_path / "ordered.npy"
    import_arrays(ImportConfig(images=path, texts=path, out=out))
    first, again, other = (told(out, pairs=10, seed=seed)["gap"] for seed in (0, 0, 1))

    assert first["uniformity_image"] < -0.05
    assert first == again
    assert first["uniformity_image"] != other["uniformity_image"]
