"""FuxiCTR's recipe in plain torch and its translation take the same steps from the same weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from megarec.config.load import load_config
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.run.build import Run, build_run
from megarec.training.profiling import StepTimer
from megarec.training.step import train_step
from tools import compare_recipe
from tools.benchmarks import recipe_plain

STEPS = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "data"
    prepare_synthetic(Shape(examples=2_000, seed=4), path)
    return path


def test_metrics_are_scikit_learns() -> None:
    torch.manual_seed(1)
    logits = torch.randn(500).mul(3).round() / 3  # with ties
    labels = torch.bernoulli(torch.sigmoid(logits))
    found = recipe_plain.metrics(logits, labels)
    assert found["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    assert found["logloss"] == pytest.approx(log_loss(labels, torch.sigmoid(logits.double())), abs=1e-9)


@torch.no_grad()
def take_weights(plain: recipe_plain.Plain, run: Run, features: tuple[str, ...]) -> None:
    """Give the plain model the run's first weights."""
    tables = run.sparse.state()
    for table, name in zip(plain.tables, features, strict=True):
        table.get_parameter("weight").copy_(tables[f"{name}/weight"][1])
    ours = {name.removeprefix("over_arch."): tensor for name, tensor in run.dense.module.named_parameters()}
    linears = [part for part in plain.deep if isinstance(part, nn.Linear)]
    for place, linear in enumerate(linears):
        linear.weight.copy_(ours[f"head.linears.{place}.weight"])
    for place, linear in enumerate(plain.cross):
        linear.get_parameter("weight").copy_(ours[f"layers.{place}.product.linears.0.weight"])
    last: list[Tensor] = [ours[f"head.linears.{len(linears)}.weight"]]
    if plain.cross:
        last.insert(0, ours["linear.linears.0.weight"])
    plain.last.weight.copy_(torch.cat(last, dim=1))


def both_losses(path: Path, data: Path, recipe: dict[str, object]) -> list[tuple[float, float]]:
    """By step, the loss of the run and that of the plain model, on the same batches."""
    config = load_config(path)
    device = start_process(config)
    run = build_run(config, device)
    table = recipe_plain.read(data)
    plain = recipe_plain.Plain(recipe, table.sizes)
    take_weights(plain, run, table.features)
    optimizer = torch.optim.Adam(plain.parameters(), lr=config.dense.learning_rate)
    run.dense.set_learning_rate(config.dense.learning_rate)
    clock, losses = StepTimer(device), []
    for step in range(STEPS):
        epoch, position = divmod(step, run.train.steps_per_epoch)
        batch = next(iter(run.train.batches(epoch, start=position)))
        result = train_step(run.dense, run.sparse, batch, timer=clock)
        ids = torch.stack([batch.ids[name].values.long() for name in table.features], dim=1)
        loss = binary_cross_entropy_with_logits(plain(ids), batch.labels)
        optimizer.zero_grad()
        (loss + plain.regularisation(float(str(recipe["embedding_regularizer"])))).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 10.0)
        optimizer.step()
        mine = binary_cross_entropy_with_logits(result.logits, batch.labels)
        losses.append((float(mine), float(loss.detach())))
    return losses


@pytest.mark.parametrize("name", list(compare_recipe.EXPERIMENTS))
def test_the_translation_takes_the_steps_of_plain_torch(
    name: str, data: Path, rank_pool: Callable[[int], RankPool], tmp_path: Path
) -> None:
    compare_recipe.write_yamls(tmp_path, 0.05)
    table = recipe_plain.read(data)
    assert len(table.features) > 2
    path = compare_recipe.translated(tmp_path, name, data, table)
    run = json.loads(path.read_text())
    run["data"]["batch_size"], run["model"]["dropout"] = 128, 0.0  # masks are no part of a recipe
    run["embedding"]["initial_std"] = 0.05
    path.write_text(json.dumps(run))
    recipe = compare_recipe.COMMON | compare_recipe.EXPERIMENTS[name] | {"net_dropout": 0.0}
    recipe["embedding_regularizer"] = 0.05
    losses = rank_pool(1).run(both_losses, path, data, recipe)[0]
    assert max(abs(mine - other) / other for mine, other in losses) <= 1e-3
    assert losses[0][0] - losses[-1][0] > 0.005
