"""Made-up examples for any schema; they tell nothing but shapes."""

import torch

from megarec.data.batch import Batch, Ids
from megarec.data.schema import Schema

LONGEST_LIST = 5  # a list holds 0 .. 5 ids, as the synthetic data do


def make_batch(schema: Schema, size: int, seed: int) -> Batch:
    """`size` examples with ids spread evenly over the rows."""
    random = torch.Generator().manual_seed(seed)
    ids = {}
    for feature in schema.categorical:
        lengths, weights = None, None
        total = size
        if feature.multi_valued:
            lengths = torch.randint(0, LONGEST_LIST + 1, (size,), generator=random)
            total = int(lengths.sum())
        values = torch.randint(0, feature.rows, (total,), generator=random)
        if feature.weighted:
            weights = torch.rand(total, generator=random)
        ids[feature.name] = Ids(values, lengths, weights)
    return Batch(
        numeric=torch.randn(size, len(schema.numeric), generator=random),
        ids=ids,
        labels=torch.randint(0, 2, (size,), generator=random).float(),
        keys=torch.arange(size),
        valid=size,
    )
