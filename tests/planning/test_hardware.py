"""The machines of hardware/: each figure has a source, and a mistake in a file is one clear line."""

import json
from pathlib import Path
from typing import Any

import pytest

from megarec.errors import UserError
from megarec.planning.hardware import ByHosts, Hardware, Ramp, known_hardware, load_hardware, needed
from megarec.training.profiling import PEAK_TFLOPS


@pytest.mark.parametrize("name", known_hardware())
def test_every_figure_has_a_source(name: str) -> None:
    hardware = load_hardware(name)
    figures = [getattr(hardware, key) for key in Hardware.model_fields if hasattr(getattr(hardware, key), "source")]
    assert len(figures) >= 10 and all(len(figure.source) > 5 for figure in figures)
    assert load_hardware(name.upper()) == hardware


def test_peaks_are_those_of_the_monitor() -> None:
    """A run's MFU is against the same data sheet."""
    sheets = {hardware.name: hardware.peak_tflops for hardware in map(load_hardware, known_hardware())}
    assert all(figure.value == PEAK_TFLOPS[name] for name, figure in sheets.items() if figure is not None)


def h100(**changes: Any) -> dict[str, Any]:
    return {**load_hardware("h100").model_dump(exclude_none=True), **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network_gb_s": {"value": 0, "source": "x"}}, r"m\.json: network_gb_s\.value=0: .*equal to 0\.000000001"),
        ({"network_gb_s": {"value": 1e-300, "source": "x"}}, r"network_gb_s\.value=1e-300: .*equal to 0\.000000001"),
        ({"network_incast": {"value": 2, "source": "x"}}, r"network_incast\.value=2: .*less than 2"),
        ({"ranks_per_host": {"value": 0.5, "source": "x"}}, r"ranks_per_host\.value=0\.5; expected a whole number"),
        ({"network_us": {"value": {"2": 1, "02": 3}, "source": "x"}}, r"network_us\.value has the key '02'; expected"),
        ({"network_gb_s": {"value": 50}}, r"m\.json: network_gb_s\.source is missing"),
        ({"netwrok_gb_s": {"value": 50, "source": "x"}}, r"unknown key 'netwrok_gb_s'; did you mean 'network_gb_s'"),
        (
            {"network_us": {"value": {"two": 37}, "source": "x"}},
            r"network_us\.value has the key 'two'; expected a whole",
        ),
        ({"network_ramp": {"value": {"1024": 1.5}, "source": "x"}}, r"network_ramp\.value\.1024=1\.5: .*equal to 1"),
        ({"memory_tb_s": {"value": "fast", "source": "x"}}, r"memory_tb_s\.value=\"fast\": .*valid number"),
    ],
)
def test_a_mistake_in_a_file(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps(h100(**changes)))
    with pytest.raises(UserError, match=said):
        load_hardware(str(path))


def test_what_is_not_there() -> None:
    with pytest.raises(UserError, match=r"--hardware h10: no such machine.*did you mean 'h100'.*all: a100, a40"):
        load_hardware("h10")
    with pytest.raises(UserError, match=r"nowhere\.json"):
        load_hardware("nowhere.json")
    values = h100()
    del values["network_gb_s"]
    with pytest.raises(UserError, match="hardware H100: network_gb_s is not known"):
        needed(Hardware.model_validate(values), "network_gb_s")


def test_between_measured_points() -> None:
    delays = ByHosts(value={"2": 10.0, "8": 30.0}, source="made up")
    assert [delays.at(hosts) for hosts in (1, 2, 8, 16)] == [10, 10, 30, 60]
    assert delays.at(4) == pytest.approx(20)
    ramp = Ramp(value={"1024": 0.2, "4096": 0.6}, source="made up")
    assert ramp.at(10, 2) == 0.2 and ramp.at(2048, 2) == pytest.approx(0.4) and ramp.at(1e9, 2) == 0.6
    assert ramp.at(1024, 4) == pytest.approx(0.6), "more hosts, more messages at once"
