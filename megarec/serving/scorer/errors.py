"""What goes wrong when rows are scored: the export's fault, or a row's."""


class ScoringError(ValueError):
    """The export cannot be used; one line says which file, what was found and what was expected."""


class RowError(ValueError):
    """A row cannot be scored; one line names the column, the value and what was expected."""


def shown(value: object, most: int = 60) -> str:
    """A value in a message: short, on one line."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
