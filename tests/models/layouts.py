"""Embedding layouts for tests."""

from megarec.sparse.layout import EmbeddingLayout, Feature, Table


def layout(dim: int, full: list[int], small: list[int], rows: int = 7) -> EmbeddingLayout:
    """A layout by features: `full` counts each one's embeddings of width dim, `small` gives each one's width."""
    columns = [count * dim for count in full] + small
    tables = tuple(Table(f"f{i}", rows + i, width) for i, width in enumerate(columns))
    starts = [sum(columns[:i]) for i in range(len(columns))]
    features = tuple(
        Feature(table.name, table.name, "sum", False, start, table.columns)
        for table, start in zip(tables, starts, strict=True)
    )
    return EmbeddingLayout(dim, tables, features, sum(full), sum(small))
