"""Made-up features in place of those behind Wukong's ladder, which the paper does not disclose.

python -m megarec.scaling.stand_in > ds_configs/schemas/wukong-ladder.json

They match what it discloses (arXiv 2403.02545): with `numeric_embeddings: 32` n = 723 embeddings, and with d = 160
627 G sparse parameters. The rest is ours: 691 tables whose rows rise evenly in their logarithm from 100 to 76 million,
every fourth feature a list, and 64 numeric features.
"""

import json
import math

from megarec.data.schema import SPLITS, CategoricalFeature, Schema

CATEGORICAL = 691
NUMERIC = 64
FEWEST_ROWS, MOST_ROWS = 100, 76_200_000
LISTS_EVERY = 4


def ladder_schema() -> Schema:
    """The stand-in features; they have no examples."""
    return Schema(
        name="wukong-ladder",
        label_rule="none: stand-in features without examples",
        categorical=tuple(_feature(index) for index in range(CATEGORICAL)),
        numeric=tuple(f"x{index:02d}" for index in range(NUMERIC)),
        rows=dict.fromkeys(SPLITS, 0),
        source="made up (python -m megarec.scaling.stand_in): arXiv 2403.02545 does not disclose its features",
    )


def _feature(index: int) -> CategoricalFeature:
    rows = FEWEST_ROWS * (MOST_ROWS / FEWEST_ROWS) ** (index / (CATEGORICAL - 1))
    unit = 10 ** (int(math.log10(rows)) - 2)
    return CategoricalFeature(
        name=f"f{index:03d}", rows=round(rows / unit) * unit, multi_valued=index % LISTS_EVERY == LISTS_EVERY - 1
    )


def as_json(schema: Schema) -> str:
    """A schema as JSON with one categorical feature a line and without what is default."""
    content = schema.model_dump(exclude_defaults=True)
    lines = ",\n    ".join(json.dumps(feature) for feature in content.pop("categorical"))
    head = json.dumps({"version": schema.version, **content}, indent=2)
    return f'{head[:-2]},\n  "categorical": [\n    {lines}\n  ]\n}}\n'


if __name__ == "__main__":
    print(as_json(ladder_schema()), end="")
