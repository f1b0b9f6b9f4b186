from csalign.core.results import EvalResult

DOCUMENT = {
    "features": "features",
    "adapter": None,
    "split": "test",
    "counts": {"images": 3, "texts": 4, "pairs": 4},
    "retrieval": {"image_to_text": {"R@1": 0.5, "mrr": 0.6}, "mean_recall": 0.7},
    "gap": {"rmg": 0.4, "centroid_distance": 0.2},
    "mixed": {"image": {"ndcg@10": 0.1}, "ndcg@10": 0.3, "same_side@10": 0.8},
    "groups": {"column": "kind", "classes": 3, "v_measure": 0.2, "knn": {"mean": 0.9}},
    "zero_shot": {"column": "kind", "classes": 4, "top1": 0.5},
    "twins": {"images": 2, "image_to_text": {"R@1": 0.75}},
    "before": {"gap": {"rmg": 0.6}},
    "intervals": {
        "image_to_text": {"R@1": [0.4, 0.6]},
        "rmg": [0.3, 0.5],
        "mixed": {"image": {"ndcg@10": [0.05, 0.15]}, "ndcg@10": [0.2, 0.4]},
        "groups": {"v_measure": [0.1, 0.3], "knn": {"mean": [0.8, 1.0]}},
        "zero_shot": {"top1": [0.25, 0.75]},
    },
    "baselines": {"raw": {"gap": {"rmg": 0.8}, "intervals": {"rmg": [0.7, 0.9]}}},
}


def test_each_figure_has_its_own_interval() -> None:
    table = EvalResult(DOCUMENT).to_frame().fillna({"part": ""}).dropna()

    found = table.set_index(["block", "part", "figure"])[["low", "high"]].T.to_dict("list")

    assert found == {
        ("retrieval", "image_to_text", "R@1"): [0.4, 0.6],
        ("gap", "", "rmg"): [0.3, 0.5],
        ("mixed", "image", "ndcg@10"): [0.05, 0.15],
        ("mixed", "", "ndcg@10"): [0.2, 0.4],
        ("groups", "", "v_measure"): [0.1, 0.3],
        ("groups", "knn", "mean"): [0.8, 1.0],
        ("zero_shot", "", "top1"): [0.25, 0.75],
        ("baselines", "raw.gap", "rmg"): [0.7, 0.9],
    }


def test_the_repr_names_figures_and_omits_counts_and_repeated_blocks() -> None:
    lines = repr(EvalResult(DOCUMENT)).splitlines()

    shown = {tuple(line.strip().split("  ", 1)) for line in lines[5:]}
    assert {(label, value.strip()) for label, value in shown} == {
        ("image to text R@1 % ↑", "50.00 ± 10.00"),
        ("mean recall % ↑", "70.00"),
        ("centroid distance ↓", "0.2000"),
        ("mixed NDCG@10 % ↑", "30.00 ± 10.00"),
        ("mixed same-side share of 10 (0.5: no gap)", "0.8000"),
        ("V-measure ↑", "0.2000 ± 0.1000"),
        ("k-NN accuracy % ↑", "90.00 ± 10.00"),
        ("top-1 % ↑", "50.00 ± 25.00"),
        ("twins, image to text R@1 % ↑", "75.00"),
    }
