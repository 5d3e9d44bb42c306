import json
from pathlib import Path

import pytest

from megarec.config.deepspeed import micro_batch_size
from megarec.config.load import json_schema, load_config
from megarec.config.models import DcnConfig, DlrmConfig, WukongConfig
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
        ("model.name=dlrm", "unknown key 'model.layers'; known keys of model 'dlrm': activation, bias, dim, dropout,"),
        ('model={"name": "dcn", "layrs": 2}', "unknown key 'model.layrs'; did you mean 'layers'?"),
        ('model={"name": "dcn", "rank": 0}', "model.rank=0: input should be greater than 0"),
        (
            'model={"name": "dcn", "num_fm": 8}',
            "unknown key 'model.num_fm'; known keys of model 'dcn': activation, bias,",
        ),
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
        ("parallel.exchange=towers", "parallel.exchange=\"towers\": input should be 'flat' or 'tower'"),
        ("parallel.exchange=tower", "parallel.exchange='tower' needs parallel.towers: give a number of towers, lists"),
        ("parallel.towers=0", "parallel.towers=0: input should be greater than 0"),
        ("parallel.towers=2.5", "parallel.towers=2.5: input should be a valid integer"),
        ("parallel.towers=[1]", "parallel.towers.0=1: input should be a valid list"),
        ('parallel.towers=[["a"], ["b", 3]]', "parallel.towers.1.1=3: input should be a valid string"),
        ("parallel.towers=absent.json", "parallel.towers='absent.json': no file absent.json; it is a number of towers"),
        ("tower_module.name=dlmr", "tower_module.name=\"dlmr\": did you mean 'dlrm'?"),
        ("tower_module.compression=4", "unknown key 'tower_module.compression'; known keys of tower_module 'identity'"),
        ('tower_module={"name": "dcn", "layrs": 1}', "unknown key 'tower_module.layrs'; did you mean 'layers'?"),
        ('tower_module={"name": "dcn", "c": 1}', "unknown key 'tower_module.c'; known keys of tower_module 'dcn': "),
        ('tower_module={"name": "dcn", "compression": 0.5}', "tower_module.compression=0.5: input should be greater"),
        ('tower_module={"name": "dlrm", "compression": 4}', "tower_module.name='dlrm' needs parallel.towers: give"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, RUN), [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_model_is_chosen_by_its_name(tmp_path: Path) -> None:
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
    for backend in ("fbgemm", "triton"):
        expected = rf"embedding\.optimizer='adam' needs embedding\.backend='torch' \(or 'auto'\): {backend} has no lazy"
        with pytest.raises(UserError, match=expected):
            load_config(write(tmp_path, RUN), ["embedding.optimizer=adam", f"embedding.backend={backend}"])


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


TOWERS = {"towers": [["a", "b"], ["c"]], "strategy": "strided", "seed": 1, "cost": {"bytes": [2.0, 1.0]}}


def test_towers_may_be_a_number_lists_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs, elsewhere = tmp_path / "configs", tmp_path / "elsewhere"
    configs.mkdir()
    elsewhere.mkdir()
    write(tmp_path, TOWERS, "towers.json")
    write(elsewhere, {"towers": [["a"], ["b", "c"]]}, "mine.json")
    monkeypatch.chdir(elsewhere)
    path = write(configs, {**RUN, "parallel": {"exchange": "tower", "towers": "../towers.json"}})
    config = load_config(path)
    assert config.parallel.towers == TOWERS["towers"]  # relative to the run's JSON
    assert load_config(path, ["parallel.towers=mine.json"]).parallel.towers == [["a"], ["b", "c"]]  # to where one is
    assert load_config(path, ["parallel.towers=4"]).parallel.towers == 4
    assert load_config(path, ['parallel.towers=[["c"], ["a"]]', "train.epochs=2"]).parallel.towers == [["c"], ["a"]]
    write(configs, {"towers": "../towers.json"}, "parallel.json")
    assert load_config(path, ["parallel=parallel.json"]).parallel.towers == TOWERS["towers"]
    assert load_config(write(tmp_path, config.model_dump_json(), "resolved.json")) == config


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not JSON"),
        ([["a"]], 'holds [["a"]], expected a JSON object'),
        ({}, "towers is missing"),
        ({**TOWERS, "strateggy": "x"}, "unknown key 'strateggy'; did you mean 'strategy'?"),
        ({**TOWERS, "model": 1}, "unknown key 'model'; known keys: cost, seed, strategy, towers"),
        ({"towers": [["a"], 3]}, "towers.1=3: input should be a valid list"),
    ],
)
def test_mistakes_in_a_towers_file_name_it(tmp_path: Path, content: object, expected: str) -> None:
    write(tmp_path, content, "towers.json")
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, {**RUN, "parallel": {"towers": "towers.json"}}))
    assert str(caught.value).startswith(str(tmp_path / "towers.json")) and expected in str(caught.value)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ({"name": "dlrm"}, "tower_module needs tower_module.c and tower_module.p, or tower_module.compression"),
        ({"name": "dlrm", "c": 1}, "tower_module needs tower_module.c and tower_module.p, or"),
        ({"name": "dlrm", "c": 0, "p": 0}, "tower_module.c=0 and tower_module.p=0: nothing would leave"),
        (
            {"name": "wukong", "compression": 2, "num_fm": 1},
            "tower_module.compression derives tower_module.num_fm and tower_module.num_lcb: leave out either it or "
            "tower_module.num_fm",
        ),
        ({"name": "dcn"}, "tower_module needs tower_module.embeddings, or tower_module.compression"),
    ],
)
def test_sizes_of_tower_modules_are_given_once(tmp_path: Path, module: dict[str, object], expected: str) -> None:
    path = write(tmp_path, {**RUN, "parallel": {"towers": 2}, "tower_module": module})
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert expected in str(caught.value)


def test_tower_modules_do_not_follow_deepspeeds_optimizer(tmp_path: Path) -> None:
    run = {**RUN, "parallel": {"towers": 2}, "tower_module": {"name": "dcn", "compression": 4}}
    path = write(tmp_path, {**run, "deepspeed": {"optimizer": {"type": "AdamW"}}})
    with pytest.raises(
        UserError, match=r"deepspeed\.optimizer is the dense model's alone: state tower_module\.optimizer"
    ):
        load_config(path)
    own = load_config(path, ["tower_module.optimizer=sgd", "tower_module.learning_rate=0.1"])
    assert own.tower_module.learning_rate == 0.1


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
