"""What an export is: files that score without torch and megarec, damage that is named, formats of others."""

import csv
import importlib.util
import json
import re
import runpy
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format

from megarec.commands import checkpoint, evaluate
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.dense.layers import has_compiler
from megarec.errors import UserError
from megarec.serving.bundle_predictor import BundlePredictor
from megarec.serving.export.bundle import export_bundle
from megarec.serving.scorer import Scorer, ScoringError
from megarec.serving.scorer.bundle import checksum, sealed
from tests.serving.trained_runs import OF_TABLE, RUNS, raw_rows

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")


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


def test_every_damaged_file_is_named(trained: Callable[[str], Path], data: Path, columns: Path, tmp_path: Path) -> None:
    """Truncated, with one bit another, or gone: of each file, the manifest too."""
    out, random = tmp_path / "out", np.random.default_rng(2)
    export_bundle(trained(OF_TABLE), out, columns)
    checkpoint.verify_export(out)
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.stat().st_size]
    read = {"manifest.json", "dense.onnx", "golden.json", "run.json", "tables", "vocabulary"}
    assert read <= {path.relative_to(out).parts[0] for path in files}
    for path in files:
        good = path.read_bytes()
        place, bit = int(random.integers(len(good))), 1 << int(random.integers(8))
        flipped = bytearray(good)
        flipped[place] ^= bit
        for damaged in (bytes(flipped), good[: int(random.integers(len(good)))], good + b"x", None):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            with pytest.raises(UserError) as refused:
                checkpoint.verify_export(out)
            assert str(path) in str(refused.value) and "\n" not in str(refused.value)
            if path.relative_to(out).parts[0] in read:
                with pytest.raises(UserError, match=re.escape(str(path))):
                    BundlePredictor(out)
        path.write_bytes(good)
    checkpoint.verify_export(out)


def test_a_large_file_is_compared_when_asked(
    trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size at once: opening an export does not read its tables."""
    export_bundle(trained("dcn"), tmp_path / "out")
    monkeypatch.setattr("megarec.serving.scorer.bundle._SMALL", 100)
    table = tmp_path / "out/tables/multi_1.bin"
    content = bytearray(table.read_bytes())
    content[-1] ^= 1
    table.write_bytes(content)
    scorer = Scorer(tmp_path / "out", check=False)
    with pytest.raises(ScoringError, match="is not what was exported; copy the export again"):
        scorer.bundle.verify()
    table.write_bytes(content[:-1])
    with pytest.raises(ScoringError, match=f"has {len(content) - 1} bytes, the manifest says {len(content)}"):
        Scorer(tmp_path / "out")


def with_manifest(export: Path, change: Callable[[dict[str, Any]], None], version: int = 2) -> None:
    manifest = json.loads((export / "manifest.json").read_text()) | {"version": version}
    change(manifest)
    (export / "manifest.json").write_bytes(sealed(manifest) if version > 1 else json.dumps(manifest).encode())


def test_another_logit_than_where_it_was_exported(trained: Callable[[str], Path], tmp_path: Path) -> None:
    export_bundle(trained("dcn"), tmp_path / "out")
    golden = json.loads((tmp_path / "out/golden.json").read_text())
    golden["logits"][3] *= 1.001
    (tmp_path / "out/golden.json").write_text(json.dumps(golden))

    def edit(manifest: dict[str, Any]) -> None:
        path = tmp_path / "out/golden.json"
        manifest["files"]["golden.json"] = {"bytes": path.stat().st_size, "sha256": checksum(path)}

    with_manifest(tmp_path / "out", edit)
    with pytest.raises(ScoringError, match=r"row 3 of the golden sample has the logit"):
        Scorer(tmp_path / "out")


def test_an_export_of_version_1_scores(trained: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    """It has no seal, and says less of its files of rows."""
    export_bundle(trained("dcn"), tmp_path / "out")
    expected = Scorer(tmp_path / "out").score(raw_rows(data)).logits.tolist()

    def of_before(manifest: dict[str, Any]) -> None:
        for key in ("header", "labels"):
            del manifest["text"][key]
        del manifest["sealed"]

    with_manifest(tmp_path / "out", of_before, version=1)
    assert Scorer(tmp_path / "out").score(raw_rows(data)).logits.tolist() == expected
    good = (tmp_path / "out/manifest.json").read_bytes()
    for change, message in (
        (lambda manifest: manifest.pop("tables"), "is not the manifest of an export"),
        (lambda manifest: manifest.update(dense="../x"), "'../x' is not a file of the export"),
        (lambda manifest: manifest.update(dense="/etc/x", files={"/etc/x": {}}), "is not a file of the export"),
        (lambda manifest: manifest.update(features=[5]), "is not the manifest of an export"),
    ):
        (tmp_path / "out/manifest.json").write_bytes(good)
        with_manifest(tmp_path / "out", change, version=1)
        with pytest.raises(ScoringError, match=re.escape(message)) as raised:
            Scorer(tmp_path / "out")
        assert "manifest.json" in str(raised.value) and "\n" not in str(raised.value)


def test_mistakes_leave_nothing(trained: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs the vocabularies of its data: .*schema.json does not exist"):
        export_bundle(trained("dcn"), tmp_path / "out", tmp_path)
    other = tmp_path / "other"
    prepare_synthetic(Shape(examples=50, numeric=3, seed=4), other)
    with pytest.raises(UserError, match="take the seed and the features that it was trained on"):
        export_bundle(trained("dcn"), tmp_path / "out", other)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.slow  # AOTInductor compiles for a minute
def test_a_program_of_torch_and_what_is_compiled_of_it(trained: Callable[[str], Path], tmp_path: Path) -> None:
    if not has_compiler(torch.device("cpu")):
        pytest.skip("there is no C++ compiler")
    report = export_bundle(trained("dlrm"), tmp_path / "out", program=True)
    assert report["compiled"] == "dense_compiled.pt2" and "not_compiled" not in report
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
    report = export_bundle(trained("dlrm"), tmp_path / "out", program=True)
    expected = {
        "no compiler": "No working C++ compiler found",
        "other numbers": "compiled, row ",
        "interrupted": "the linker was killed",
    }[fault]
    assert expected in report["not_compiled"] and "\n" not in report["not_compiled"] and "compiled" not in report
    scorer = Scorer(tmp_path / "out")
    assert scorer.bundle.manifest["not_compiled"] == report["not_compiled"]
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
