"""Small tables on two ranks, for counts by hand."""

from megarec.config.sections import RunConfig
from megarec.data.schema import CategoricalFeature, Schema
from megarec.run.spec import ModelSpec, resolve
from megarec.sparse.placement import Shard

ROWS, COLUMNS, EXAMPLES = 1000, 16, 64


def run(tables: int = 2, examples: int = EXAMPLES) -> tuple[RunConfig, ModelSpec]:
    """Two ranks; the first table is asked for 5 ids an example, the others for one."""
    features = tuple(
        CategoricalFeature(name=f"t{i}", rows=ROWS, multi_valued=not i, mean_length=1 if i else 5)
        for i in range(tables)
    )
    rows = {"train": 0, "valid": 0, "test": 0}
    schema = Schema(name="x", label_rule="x", categorical=features, numeric=("x",), rows=rows, source="synthetic")
    config = RunConfig.model_validate({
        "model": {"name": "dlrm", "dim": COLUMNS, "numeric_mlp": [8], "head": [8]},
        "data": {"path": "-", "batch_size": examples},
        "embedding": {"optimizer": "rowwise_adagrad"},
    })  # fmt: skip
    return config, resolve(config, schema)


def whole(table: str, rank: int) -> Shard:
    return Shard(table, rank, 0, ROWS, 0, COLUMNS)


def halves(table: str, by: str) -> list[Shard]:
    if by == "rows":
        return [Shard(table, rank, rank * ROWS // 2, (rank + 1) * ROWS // 2, 0, COLUMNS) for rank in range(2)]
    return [Shard(table, rank, 0, ROWS, rank * COLUMNS // 2, (rank + 1) * COLUMNS // 2) for rank in range(2)]
