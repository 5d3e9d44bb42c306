"""What the JSON says of the L2, the updates and the first weights of tables: what it means, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from megarec.config.load import load_config
from megarec.config.regularisation import L2Config, TableRule
from megarec.config.sections import EmbeddingConfig
from megarec.errors import UserError

ALL, DECAY = {"weight": 0.1, "rows": "all"}, {"weight": 0.1, "rows": "all", "coupled": False}


def loaded(tmp_path: Path, **embedding: Any) -> EmbeddingConfig:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model": {"dim": 16}, "data": {"path": "somewhere"}, "embedding": embedding}))
    return load_config(path).embedding


def test_what_they_mean(tmp_path: Path) -> None:
    own = {"user": {"l2": DECAY, "update_rows": "looked_up"}, "item": {"l2": 0.2, "initial_std": 0.3}, "tag": {}}
    config = loaded(tmp_path, l2=ALL, initial_std=0.5, tables=own | {"shop": {"l2": DECAY, "update_rows": "all"}})
    assert config.rule_of("other") == config.rule_of("tag") == TableRule(all_rows=True, coupled=0.1)
    assert config.rule_of("user") == TableRule(decay=0.1) and config.rule_of("user").lazy_decay
    assert config.rule_of("shop") == TableRule(all_rows=True, decay=0.1) and not config.rule_of("shop").lazy_decay
    assert config.rule_of("item") == TableRule() and config.rule_of("item").reason is None
    assert [config.looked_up_l2(name) for name in ("item", "user", "other")] == [0.2, 0.0, 0.0]
    assert [config.initial_std_of(name) for name in ("item", "other")] == [0.3, 0.5]
    assert config.table_placements == {}
    same = loaded(tmp_path, l2={"weight": 0.2})
    assert same.l2 == L2Config(weight=0.2) and same.looked_up_l2("item") == loaded(tmp_path, l2=0.2).looked_up_l2(
        "item"
    )
    assert loaded(tmp_path, l2=ALL | {"weight": 0}).rule_of("item") == TableRule()
    assert loaded(tmp_path, update_rows="all").rule_of("item") == TableRule(all_rows=True)
    read = config.only_read()
    assert {read.rule_of(name) for name in ("user", "item", "other")} == {TableRule()} and not read.looked_up_l2("item")


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        ({"l2": {"weight": 0.1, "row": "all"}}, "unknown key 'embedding.l2.row'; did you mean 'rows'"),
        ({"l2": {"rows": "all"}}, "embedding.l2.weight is missing"),
        ({"l2": "much"}, 'embedding.l2="much": input should be a valid number'),
        ({"l2": -1}, "embedding.l2=-1: input should be greater"),
        ({"l2": {"weight": 0.1, "rows": "every"}}, "embedding.l2.rows=\"every\": input should be 'looked_up' or 'all'"),
        (
            {"tables": {"u": {"l2": {"wieght": 1, "weight": 1}}}},
            "unknown key 'embedding.tables.u.l2.wieght'; did you mean",
        ),
        ({"tables": {"u": {"placment": "row"}}}, "unknown key 'embedding.tables.u.placment'; did you mean 'placement'"),
        ({"l2": {"weight": 0.1, "coupled": False}}, "embedding.l2.coupled=false needs embedding.l2.rows='all'"),
        (
            {"l2": ALL, "update_rows": "looked_up"},
            "update_rows='looked_up' would leave most of them; leave update_rows",
        ),
        (
            {"update_rows": "looked_up", "tables": {"u": {"l2": ALL}}},
            "embedding.tables.u.l2 is in the gradient of all rows",
        ),
        (
            {"l2": DECAY | {"weight": 40}, "learning_rate": 0.05},
            "embedding.l2.weight=40 x embedding.learning_rate=0.05 = 2: a step would",
        ),
        (
            {"rounding": "stochastic"},
            "embedding.rounding='stochastic' has nothing to round at embedding.weights='fp32'",
        ),
        (
            {"weights": "fp16", "tables": {"u": {"l2": DECAY}}},
            "embedding.tables.u.l2 on all rows and embedding.weights='fp16' need embedding.rounding='stochastic'",
        ),
    ],
    ids=lambda value: None,
)
def test_what_is_refused(tmp_path: Path, embedding: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        loaded(tmp_path, **embedding)
    assert message in str(error.value) and "\n" not in str(error.value)
