import json
from pathlib import Path

import pytest

from megarec.config.load import json_schema, load_config, micro_batch_size
from megarec.config.sections import DcnConfig, DlrmConfig, WukongConfig
from megarec.errors import UserError

RUN = {"model": {"name": "wukong", "layers": 2}, "data": {"path": "somewhere", "batch_size": 64}}
ROOT = Path(__file__).parents[2]


def write(directory: Path, content: object, name: str = "run.json") -> Path:
    path = directory / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, RUN))
    assert config.model.layers == 2
    assert config.embedding.optimizer == "rowwise_adagrad"
    assert config.deepspeed == {}


def test_a_section_may_be_the_path_of_another_file(tmp_path: Path) -> None:
    write(tmp_path, {"zero_optimization": {"stage": 3}}, "zero3.json")
    path = write(tmp_path, {**RUN, "deepspeed": "zero3.json"})
    assert load_config(path).deepspeed == {"zero_optimization": {"stage": 3}}
    # an override reaches into the included section, and may name another file itself
    assert load_config(path, ["deepspeed.gradient_clipping=0.5"]).deepspeed["gradient_clipping"] == 0.5
    write(tmp_path, {"zero_optimization": {"stage": 1}}, "zero1.json")
    assert load_config(path, ["deepspeed=zero1.json"]).deepspeed["zero_optimization"]["stage"] == 1


def test_overrides_are_json_or_plain_strings(tmp_path: Path) -> None:
    path = write(tmp_path, RUN)
    config = load_config(path, ["model.mlp=[8, 4]", "train.output_dir=runs/a b", "train.max_steps=null"])
    assert config.model.mlp == [8, 4]
    assert config.train.output_dir == "runs/a b"
    assert config.train.max_steps is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.layrs=3", "unknown key 'model.layrs'; did you mean 'layers'?"),
        ("modle.layers=3", "unknown key 'modle'; did you mean 'model'?"),
        ("deepspeed.gradient_cliping=1", "unknown key 'deepspeed.gradient_cliping'; did you mean 'gradient_clipping'?"),
        (
            "embedding.features.a.embedings=2",
            "unknown key 'embedding.features.a.embedings'; did you mean 'embeddings'?",
        ),
        ("model.layers=0", "model.layers=0: input should be greater than 0"),
        ("model.name=wukon", "model.name=\"wukon\": did you mean 'wukong'?"),
        ("model.name=transformer", 'model.name="transformer": expected one of: wukong, dlrm, dcn'),
        ("model.name=[1]", "model.name=[1]: expected one of: wukong, dlrm, dcn"),
        ("model.name=dlrm", "unknown key 'model.layers'; known keys of model 'dlrm': bias, dim, dropout, head,"),
        ('model={"name": "dcn", "layrs": 2}', "unknown key 'model.layrs'; did you mean 'layers'?"),
        ('model={"name": "dcn", "rank": 0}', "model.rank=0: input should be greater than 0"),
        ('model={"name": "dcn", "num_fm": 8}', "unknown key 'model.num_fm'; known keys of model 'dcn': bias,"),
        ("model.attentive.compresed=8", "unknown key 'model.attentive.compresed'; did you mean 'compressed'?"),
        ("model=3", "model=3: expected an object"),
        ("data.shema=a.json", "unknown key 'data.shema'; did you mean 'schema'?"),
        ("data.schema=3", "data.schema=3: input should be a valid string"),
        ("train.epochs=two", 'train.epochs="two": input should be a valid integer'),
        ("model.num_fm=[8,8,8]", "model.num_fm lists 3 sizes for model.layers=2 layers"),
        ("model.mlp=[[8],[8],[8]]", "model.mlp lists 3 MLPs for model.layers=2 layers"),
        ("embedding=absent.json", "embedding='absent.json': no file"),
        ("deepspeed.scheduler={}", "deepspeed.scheduler: use the schedule section"),
        ("deepspeed.amp={}", "deepspeed.amp: removed from DeepSpeed"),
        ("deepspeed.zero_optimization.stage=4", "deepspeed.zero_optimization.stage=4: expected 0, 1, 2 or 3"),
        ("no_equals_sign", "--set no_equals_sign: expected section.key=value"),
        ("model.layers.deeper=1", "layers is not a section"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, RUN), [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_model_is_told_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path, RUN)
    assert isinstance(load_config(path, ["model={}"]).model, WukongConfig)  # without a name it is a Wukong
    dlrm = load_config(path, ['model={"name": "dlrm", "head": [8]}']).model
    assert isinstance(dlrm, DlrmConfig) and dlrm.head == [8] and dlrm.dim == WukongConfig().dim
    write(tmp_path, {"name": "dcn", "rank": None}, "dcn.json")
    dcn = load_config(path, ["model=dcn.json", "model.layers=2"]).model
    assert isinstance(dcn, DcnConfig) and dcn.rank is None and dcn.layers == 2


def test_a_resolved_config_loads_again_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    run = {**RUN, "data": {"path": "somewhere", "schema": "../schemas/mine.json"}, "model": {"name": "dlrm"}}
    config = load_config(write(tmp_path / "configs", run))
    assert config.data.schema_path == str(tmp_path / "schemas/mine.json")
    assert load_config(write(tmp_path, config.model_dump_json(), "resolved.json")) == config


def test_conflicting_fields_name_both(tmp_path: Path) -> None:
    path = write(tmp_path, {**RUN, "dense": {"learning_rate": 0.1}, "deepspeed": {"optimizer": {"type": "AdamW"}}})
    with pytest.raises(UserError, match=r"deepspeed\.optimizer and dense\.learning_rate both"):
        load_config(path)
    with pytest.raises(UserError, match=r"embedding\.optimizer='adam' needs embedding\.backend='torch'"):
        load_config(write(tmp_path, RUN), ["embedding.optimizer=adam", "embedding.backend=fbgemm"])


def test_scale_and_the_sizes_it_derives_exclude_each_other(tmp_path: Path) -> None:
    path = write(tmp_path, {**RUN, "model": {"scale": 0.5}})
    model = load_config(path).model
    assert isinstance(model, WukongConfig) and model.scale == 0.5
    with pytest.raises(UserError, match=r"model\.scale derives model\.layers, model\.mlp: leave out either"):
        load_config(path, ["model.layers=3", "model.mlp=[64]"])
    with pytest.raises(UserError, match=r"model\.scale=0: input should be greater than 0"):
        load_config(path, ["model.scale=0"])
    with pytest.raises(UserError, match=r"model\.scale=5600000000\.0: input should be less than or equal to 1000000"):
        load_config(path, ["model.scale=5.6e9"])


@pytest.mark.parametrize("text", ["{", "[1]", '{"model": '])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"run\.json"):
        load_config(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.json: cannot be read"):
        load_config(tmp_path / "absent.json")


def test_micro_batch_arithmetic(tmp_path: Path) -> None:
    path = write(tmp_path, {**RUN, "deepspeed": {"gradient_accumulation_steps": 4}})
    assert micro_batch_size(load_config(path), world_size=2) == 8
    with pytest.raises(
        UserError, match=r"data\.batch_size=64 does not divide: 3 ranks x 4 .* = 12; try data\.batch_size=60"
    ):
        micro_batch_size(load_config(path), world_size=3)
    with pytest.raises(UserError, match=r"deepspeed\.train_batch_size=128, but data\.batch_size=64"):
        micro_batch_size(load_config(path, ["deepspeed.train_batch_size=128"]), world_size=2)


SHIPPED = sorted(path for path in (ROOT / "ds_configs").glob("*.json") if path.name != "schema.json")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_load(path: Path) -> None:
    assert load_config(path).train.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs/deepspeed").glob("*.json")), ids=lambda path: path.name)
def test_shipped_deepspeed_sections_load(path: Path, tmp_path: Path) -> None:
    config = load_config(write(tmp_path, {**RUN, "deepspeed": json.loads(path.read_text())}))
    assert "zero_optimization" in config.deepspeed


def test_exported_schema_is_current() -> None:
    exported = json.loads((ROOT / "ds_configs/schema.json").read_text())
    assert exported == json_schema(), "run: python tools/config_schema.py > ds_configs/schema.json"
