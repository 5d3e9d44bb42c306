import pytest

from megarec.dense import engine
from megarec.errors import UserError


class NoHalves:
    def is_fp16_supported(self) -> bool:
        return False

    def is_bf16_supported(self) -> bool:
        return False


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(engine, "get_accelerator", NoHalves)
    with pytest.raises(UserError, match=f"deepspeed.{precision}.enabled=true: this device has no {precision}"):
        engine.check_precision({precision: {"enabled": True}})
    engine.check_precision({precision: {"enabled": False}})
