"""The code behind tools/*.py and the `megarec` command: one module a command, each with `main()`."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def example_configs() -> Path:
    """ds_configs of the checkout, or the copy that lies in an installed package."""
    of_checkout = PACKAGE.parent / "ds_configs"
    return of_checkout if (PACKAGE.parent / "tools").is_dir() and of_checkout.is_dir() else PACKAGE / "ds_configs"
