"""A trained run -> one probability a row of its test split, as a CSV: in one process, without an engine.

python docs/examples/predict.py runs/shop data/shop runs/shop/predictions.csv

`export` writes the best model's weights alone; that directory is all that another machine needs to predict.
"""

import csv
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import megarec
from megarec.checkpoint.offline import export, locate
from megarec.data.loader import EvalLoader
from megarec.data.store import open_split


def main(run: Path, data: Path, output: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        export(locate(run / "checkpoints/best"), Path(directory) / "model")
        model = megarec.load_model(Path(directory) / "model")
    store = open_split(data, "test", model.schema, bad_rows="error")
    one_rank = {"rank": 0, "world_size": 1, "seed": 1, "prefetch": 4, "pin_memory": False}
    rows = EvalLoader(store, model.schema, batch_size=1024, **one_rank)
    with output.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["probability", "label"])
        for batch in rows.batches():
            probability = torch.sigmoid(model.predict(batch))
            pairs = zip(probability[: batch.valid].tolist(), batch.labels[: batch.valid].tolist(), strict=True)
            table.writerows([f"{p:.6f}", int(label)] for p, label in pairs)
    print(f"{output}: {len(store)} predictions")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
