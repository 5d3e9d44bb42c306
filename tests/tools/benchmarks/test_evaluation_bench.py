from tools.benchmarks import evaluation


def test_the_benchmark_agrees_with_scikit_learn() -> None:
    found = evaluation.run(rows=5_000, groups=50, sample=50)
    assert [row["what"] for row in found["rows"]][:2] == ["gauc", "gauc_ndcg_hr"]
    assert found["ratios"]["largest_difference_of_auc"] <= 1e-12 and found["ratios"]["of_scikit_learn"] > 0
