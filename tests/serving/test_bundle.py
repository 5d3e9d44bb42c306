"""Every model leaves the trainer: raw rows scored by numpy and onnxruntime have the trainer's logits."""

import csv
import importlib.util
import json
import runpy
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from google.protobuf import text_format

from megarec.checkpoint.offline import locate
from megarec.commands import evaluate
from megarec.data.loader import EvalLoader
from megarec.data.schema import load_schema, select_label
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.data.store import open_split
from megarec.dense.layers import has_compiler
from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.serving.export.bundle import export_bundle
from megarec.serving.predictor import load_checkpoint
from megarec.serving.scorer import Scorer, ScoringError
from megarec.serving.scorer.bundle import Bundle
from megarec.serving.scorer.tables import TableType
from tests.checkpoint.runs import TOWER_MODULE, TOWERS, leg, write_run

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")

Pools = Callable[[int], RankPool]
SIZES = {"dim": 8, "numeric_embeddings": 2, "numeric_mlp": [8]}
WUKONG = {"name": "wukong", "layers": 2, "num_fm": 2, "num_lcb": 2, "rank": 4, "mlp": [16], "head": [8], "dropout": 0.1}
TOWER = {"parallel": {"towers": TOWERS}}
RUNS: dict[str, dict[str, Any]] = {
    "wukong": {"model": WUKONG},
    "wukong, attentive": {"model": WUKONG | {"projection": "attentive", "attentive": {"compressed": 2, "mlp": [8]}}},
    "wukong, full": {"model": WUKONG | {"fm": "full"}},
    **{
        name: {"model": {"name": name}}
        for name in ["dlrm", "dcn", "lr", "fm", "dnn", "deepfm", "xdeepfm", "autoint", "masknet", "finalmlp", "afn"]
    },
    "wukong, wukong towers": {"model": WUKONG, "tower_module": TOWER_MODULE, **TOWER},
    "dlrm, dlrm towers": {"model": {"name": "dlrm"}, "tower_module": {"name": "dlrm", "compression": 2}, **TOWER},
    "dcn, dcn towers": {"model": {"name": "dcn"}, "tower_module": {"name": "dcn", "compression": 2}, **TOWER},
    "dcn, towers without modules": {"model": {"name": "dcn"}, **TOWER},
    "wukong, several and small embeddings": {
        "model": WUKONG,
        "embedding": {"features": {"single_1": {"embeddings": 2}, "single_2": {"width": 4}, "single_3": {"width": 4}}},
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data"
    prepare_synthetic(Shape(examples=400, numeric=3, seed=3), path)
    return path


@pytest.fixture(scope="module")
def trained(rank_pool: Pools, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a run that took three steps."""
    known: dict[str, Path] = {}

    def train(name: str) -> Path:
        if name not in known:
            path = write_run(tmp_path_factory.mktemp("run"), data)
            run = json.loads(path.read_text())
            sections = RUNS[name] | {"model": SIZES | RUNS[name]["model"]}
            run |= {key: run.get(key, {}) | section if key != "model" else section for key, section in sections.items()}
            path.write_text(json.dumps(run))
            rank_pool(1).run(partial(leg, load=False, save=True), path, [], 0, 3)
            known[name] = locate(path.parent / "out" / "checkpoints/latest")
        return known[name]

    return train


def raw_rows(data: Path, split: str = "test") -> list[dict[str, Any]]:
    return pq.read_table(data / split).to_pylist()


def trainer_logits(checkpoint: Path, data: Path) -> np.ndarray:
    """What the run's own evaluation computes for the test split."""
    return trainer_logits_of(checkpoint, data, None)


def trainer_logits_of(checkpoint: Path, data: Path, labels: list[str] | None) -> np.ndarray:
    """The same of several labels."""
    schema = select_label(load_schema(data), labels)
    store = open_split(data, "test", schema, "error")
    rows = EvalLoader(store, schema, batch_size=64, rank=0, world_size=1, seed=1, prefetch=1, pin_memory=False)
    model = load_checkpoint(checkpoint)
    return np.concatenate([model.predict(batch)[: batch.valid].numpy() for batch in rows.batches()])


def batches(rows: list[dict[str, Any]], sizes: tuple[int, ...]) -> Iterator[list[dict[str, Any]]]:
    for size in sizes:
        yield [rows[place % len(rows)] for place in range(size)]


FAST = ("wukong", "wukong, attentive", "autoint", "dlrm, dlrm towers", "wukong, several and small embeddings")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_raw_rows_have_the_logits_of_the_trainer(
    name: str, trained: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    checkpoint = trained(name)
    export_bundle(checkpoint, tmp_path / "out")
    scorer, expected, rows = Scorer(tmp_path / "out"), trainer_logits(checkpoint, data), raw_rows(data)
    assert expected.std() > 1e-3
    for batch in batches(rows, (1, 7, len(rows), 9_000)):
        found = scorer.score(batch)
        wanted = expected[np.arange(len(batch)) % len(rows)]
        assert not found.errors and (np.abs(found.logits - wanted) <= 1e-5 * np.maximum(1, np.abs(wanted))).all()
        assert found.probabilities == pytest.approx(1 / (1 + np.exp(-wanted.astype(np.float64))), abs=1e-5)


def score_file(export: Path, file: Path) -> list[list[str]]:
    """By the export's own script, in a Python that finds neither megarec nor the directory of the tests."""
    packages = sorted({str(Path(numpy_or_other.__file__).parents[1]) for numpy_or_other in (np, onnxruntime)})
    code = (
        f"import sys; sys.path[:0] = {packages}; sys.argv = [{str(export / 'score.py')!r}, {str(file)!r}]\n"
        "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert not {'torch', 'megarec', 'pyarrow'} & {*sys.modules}, [*sys.modules]\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return list(csv.reader(done.stdout.splitlines()))


def test_an_export_scores_files_without_torch_and_megarec(
    trained: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    export_bundle(trained("wukong"), tmp_path / "out")
    rows, scorer = raw_rows(data), Scorer(tmp_path / "out")
    names = [name for name in rows[0] if name != "label"]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(names)
        for row in rows:
            lines.writerow(["|".join(map(str, v)) if isinstance(v := row[n], list) else repr(v) for n in names])
        lines.writerow(["x"] * len(names))
    found = score_file(tmp_path / "out", tmp_path / "rows.csv")
    assert found[0] == ["prediction", "error"] and len(found) == len(rows) + 2 and found[-1][0] == ""
    expected = scorer.score(rows).probabilities
    assert [float(line[0]) for line in found[1:-1]] == pytest.approx(expected, abs=1e-7) and "expected" in found[-1][1]


def test_quantised_tables_are_smaller_and_near(trained: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    checkpoint, rows = trained("wukong"), raw_rows(data)
    expected = trainer_logits(checkpoint, data)
    sizes, off = {}, {}
    for kind in get_args(TableType):
        export_bundle(checkpoint, tmp_path / kind, tables=kind)
        sizes[kind] = sum(path.stat().st_size for path in (tmp_path / kind / "tables").iterdir())
        off[kind] = float(np.abs(Scorer(tmp_path / kind).score(rows).logits - expected).max())
    width = SIZES["dim"]
    wanted = {"fp32": 4 * width, "fp16": 2 * width, "int8": width + 2, "int4": width // 2 + 4}
    assert {kind: size * 4 * width // sizes["fp32"] for kind, size in sizes.items()} == wanted
    assert off["fp32"] <= 1e-5 < off["int4"] < 0.5 and off["fp16"] <= 2e-3 and off["int8"] <= 5e-2


def test_a_damaged_export_is_named(trained: Callable[[str], Path], tmp_path: Path) -> None:
    export_bundle(trained("dcn"), tmp_path / "out")
    table = next((tmp_path / "out" / "tables").iterdir())
    good = table.read_bytes()
    table.write_bytes(bytes(len(good)))
    with pytest.raises(ScoringError, match=f"{table.name}: is not what was exported"):
        Bundle(tmp_path / "out").verify()
    table.write_bytes(good[:-1])
    with pytest.raises(ScoringError, match=f"{table.name}: has {len(good) - 1} bytes, the manifest says {len(good)}"):
        Scorer(tmp_path / "out")
    table.write_bytes(good)
    golden = json.loads((tmp_path / "out/golden.json").read_text())
    golden["logits"][3] *= 1.001
    text = json.dumps(golden, indent=2)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    manifest["files"]["golden.json"]["bytes"] = len(text)
    (tmp_path / "out/golden.json").write_text(text)
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ScoringError, match=r"row 3 of the golden sample has the logit"):
        Scorer(tmp_path / "out")


def test_mistakes_leave_nothing(trained: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs the vocabularies of its data: .*schema.json does not exist"):
        export_bundle(trained("dcn"), tmp_path / "out", tmp_path)
    other = tmp_path / "other"
    prepare_synthetic(Shape(examples=50, numeric=3, seed=4), other)
    with pytest.raises(UserError, match="take the seed and the features that it was trained on"):
        export_bundle(trained("dcn"), tmp_path / "out", other)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_program_of_torch_and_what_is_compiled_of_it(trained: Callable[[str], Path], tmp_path: Path) -> None:
    if not has_compiler(torch.device("cpu")):
        pytest.skip("there is no C++ compiler")
    said = export_bundle(trained("dlrm"), tmp_path / "out", program=True)
    assert said["compiled"] == "dense_compiled.pt2" and "not_compiled" not in said
    scorer = Scorer(tmp_path / "out")
    manifest = scorer.bundle.manifest
    assert manifest["compiled"] in manifest["files"] and "dense.pt2" in manifest["files"]
    golden = json.loads((tmp_path / "out/golden.json").read_text())
    inputs = [torch.from_numpy(values) for values in scorer.inputs(scorer.encode(golden["rows"])).values()]
    program = torch.export.load(tmp_path / "out/dense.pt2").module()
    compiled = torch._inductor.aoti_load_package(str(tmp_path / "out" / manifest["compiled"]))
    for dense in (program, compiled):
        for rows in (1, 5, 16):
            logits = dense(*(values[:rows] for values in inputs))
            assert logits.tolist() == pytest.approx(golden["logits"][:rows], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_model_compiles(name: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    """The golden sample is compared with what was compiled."""
    assert "compiled" in export_bundle(trained(name), tmp_path / "out", program=True)


@pytest.mark.parametrize("fault", ["no compiler", "other numbers", "interrupted"])
def test_an_export_stands_without_what_cannot_be_compiled(
    fault: str, trained: Callable[[str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(program: object, package_path: str) -> str:
        Path(package_path).write_bytes(b"something")
        if fault == "interrupted":
            raise RuntimeError("the linker was killed\nin line 7")
        return package_path

    if fault == "no compiler":
        monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    else:
        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", written)
        monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: lambda *inputs: inputs[0].sum(1) + 9)
    said = export_bundle(trained("dlrm"), tmp_path / "out", program=True)
    expected = {
        "no compiler": "No working C++ compiler found",
        "other numbers": "compiled, row ",
        "interrupted": "the linker was killed",
    }[fault]
    assert expected in said["not_compiled"] and "\n" not in said["not_compiled"] and "compiled" not in said
    scorer = Scorer(tmp_path / "out")
    assert scorer.bundle.manifest["not_compiled"] == said["not_compiled"]
    assert not (tmp_path / "out/dense_compiled.pt2").exists() and (tmp_path / "out/dense.pt2").is_file()
    scorer.bundle.verify()


class _Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self._values = name, values

    def as_numpy(self) -> np.ndarray:
        return self._values


def triton_config(text: str) -> Any:
    """Read by Triton's own definition; a field that it does not know, or a wrong type, is an error."""
    package = importlib.util.find_spec("tritonclient")
    if package is None:
        pytest.skip("tritonclient is not installed (requirements-dev.txt)")
    (place,) = package.submodule_search_locations or ()
    # This file alone: its package would import gRPC, which does not like the forks of other tests.
    module = runpy.run_path(f"{place}/grpc/model_config_pb2.py")
    return text_format.Parse(text, module["ModelConfig"]())


def test_triton_runs_the_scorer(
    trained: Callable[[str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the module that Triton gives to a python model; its server is not run."""
    export_bundle(trained("dcn"), tmp_path / "out")
    triton = types.ModuleType("triton_python_backend_utils")
    triton.Tensor, triton.InferenceResponse = _Tensor, lambda output_tensors: output_tensors  # type: ignore
    triton.get_input_tensor_by_name = lambda request, name: request[name]  # type: ignore
    monkeypatch.setitem(sys.modules, triton.__name__, triton)
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = runpy.run_path(str(tmp_path / "out/1/model.py"))["TritonPythonModel"]()
    model.initialize({})
    rows = raw_rows(data)[:5]
    texts = np.array([[json.dumps(row).encode()] for row in rows], dtype=object)
    bad = np.array([[b"{"]], dtype=object)
    first, second = model.execute([{"row": _Tensor("row", texts)}, {"row": _Tensor("row", bad)}])
    assert first[0].as_numpy()[:, 0] == pytest.approx(Scorer(tmp_path / "out").score(rows).probabilities, abs=1e-7)
    assert first[1].as_numpy()[:, 0].tolist() == [""] * 5 and "expected an object" in second[1].as_numpy()[0, 0]

    config = triton_config((tmp_path / "out/config.pbtxt").read_text())
    assert config.backend == "python" and config.max_batch_size > 0 and config.HasField("dynamic_batching")
    types_of = {"TYPE_FP64": np.dtype(np.float64), "TYPE_STRING": np.dtype(object)}
    kind = config.DESCRIPTOR.fields_by_name["input"].message_type.fields_by_name["data_type"].enum_type
    for declared, tensors in ((config.input, [_Tensor("row", texts)]), (config.output, first)):
        assert [one.name for one in declared] == [tensor.name for tensor in tensors]
        for one, tensor in zip(declared, tensors, strict=True):
            assert tensor.as_numpy().shape == (5, *one.dims)  # max_batch_size puts the batch before these
            assert tensor.as_numpy().dtype == types_of[kind.values_by_number[one.data_type].name]
    with pytest.raises(text_format.ParseError, match="max_batch_sizes"):
        triton_config("max_batch_sizes: 4")


def test_evaluate_takes_a_bundle(
    trained: Callable[[str], Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, found = trained("dlrm, dlrm towers"), []
    export_bundle(checkpoint, tmp_path / "out")
    for run in (checkpoint, tmp_path / "out"):
        words = [str(evaluate.__file__), "--run", str(run), "--data", str(data), "--json"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            evaluate.main()
        found.append(json.loads(capsys.readouterr().out))
    assert found[1]["auc"] == pytest.approx(found[0]["auc"], abs=1e-6)
    assert found[1]["logloss"] == pytest.approx(found[0]["logloss"], abs=1e-6)


def test_probabilities_are_calibrated_if_asked(trained: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    """By the temperature that does best on the split valid, found here by trying many."""
    export_bundle(trained("dcn"), tmp_path / "plain")
    export_bundle(trained("dcn"), tmp_path / "out", calibrate=True)
    plain, scorer, rows = Scorer(tmp_path / "plain"), Scorer(tmp_path / "out"), raw_rows(data, "valid")
    logits, labels = plain.score(rows).logits.astype(np.float64), np.array([row["label"] for row in rows])
    tried = np.geomspace(0.05, 50, 3_000)
    losses = [np.logaddexp(0, np.where(labels, -logits, logits) / temperature).mean() for temperature in tried]
    best = float(tried[int(np.argmin(losses))])
    assert scorer.bundle.manifest["temperature"] == pytest.approx(best, rel=5e-3) and abs(best - 1) > 0.01
    found = scorer.score(rows)
    assert found.logits.tolist() == plain.score(rows).logits.tolist()
    assert found.probabilities == pytest.approx(1 / (1 + np.exp(-logits / best)), abs=5e-3)
