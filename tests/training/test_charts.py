"""The charts of TensorBoard: one tag each, all tags somewhere, quality first."""

from megarec.training.charts import layout

TAGS = [
    "train/logloss", "train/auc", "train/gradient_norm", "train/skipped_steps", "workload/mfu", "workload/slowest_rank",
    "workload/time_ms/ids", "workload/memory_mib/tables", "workload/traffic_mib_per_step/world",
    "workload/rows_used/mean",
]  # fmt: skip


def test_every_tag_has_a_chart_of_its_own() -> None:
    charts = layout(TAGS)
    assert next(iter(charts)) == "Quality"
    shown = {name: pattern for category in charts.values() for name, pattern in category.items()}
    assert set(TAGS) | {"valid/logloss", "test/auc"} <= set(shown)
    assert all(pattern == ["Multiline", [f"^{name}$"]] for name, pattern in shown.items())
    quality = list(charts["Quality"])
    assert quality[:3] == ["train/logloss", "valid/logloss", "test/logloss"], "splits lie beside each other"


def test_a_category_without_tags_is_left_out() -> None:
    assert set(layout(["train/logloss"])) == {"Quality"}
