"""What test_distributed.py runs in each of several processes, and in one for comparison.

    python tests/many_processes.py FOLDER STRATEGY PROCESSES SCENARIO …

runs scenarios and writes what each gave to FOLDER/SCENARIO-RANK.pt.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from sklearn.linear_model import Ridge
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from nidl_dcl import DCL
from nidl_dcl.models.probe import Probe

FEATURES = 6


def rows(n, seed=0, features=FEATURES):
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed))


class Encoder(nn.Sequential):
    """No batch statistics."""

    def __init__(self):
        super().__init__(nn.Linear(FEATURES, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4))


class Normalized(nn.Sequential):
    """Batch statistics."""

    def __init__(self):
        super().__init__(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4))


class Regional(nn.Sequential):
    """Three regions of four features."""

    n_regions = 3

    def __init__(self):
        super().__init__(nn.Linear(FEATURES, 12), nn.Tanh(), nn.Unflatten(1, (3, 4)))


class Record(L.Callback):
    """Keeps what training and validation steps return, and the metrics of each epoch."""

    def __init__(self):
        self.steps, self.epochs, self.validations = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.steps.append({name: outputs[name] for name in ("z1", "z2", "y")})

    def on_validation_batch_end(self, trainer, module, outputs, *args):
        if not trainer.sanity_checking:
            self.validations.append(len(outputs["z1"]))

    def on_train_epoch_end(self, trainer, module):
        self.epochs.append({name: float(v) for name, v in trainer.callback_metrics.items()})


class Save(L.Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == self.step and self.path:
            trainer.save_checkpoint(self.path)
            self.path = None


class Jitter:
    def __call__(self, x):
        return x + 0.1 * torch.randn_like(x)


class Spoil(Jitter):
    """Views that turn one sample into NaN."""

    def __init__(self, mark):
        self.mark = float(mark)

    def __call__(self, x):
        return x * torch.nan if float(x[0]) == self.mark else super().__call__(x)


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Labeled(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Pairs(Dataset):
    """Two views made already, perhaps with a target."""

    def __init__(self, n, y=None):
        self.x1, self.x2, self.y = rows(n, 1), rows(n, 1) + 0.1 * rows(n, 2), y

    def __len__(self):
        return len(self.x1)

    def __getitem__(self, i):
        views = [self.x1[i], self.x2[i]]
        return views if self.y is None else (views, self.y[i])


class Plain(L.LightningDataModule):
    """A caller's data module that knows nothing of processes."""

    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(Pairs(29), batch_size=self.batch_size)

    def val_dataloader(self):
        return [DataLoader(Pairs(7), batch_size=self.batch_size)]

    def predict_dataloader(self):
        return DataLoader(rows(7, 3), batch_size=2)


class Run:
    """One process of a run: how many there are, and estimators that use them."""

    def __init__(self, folder, strategy="auto", processes=1):
        self.folder, self.strategy, self.processes = Path(folder), strategy, processes
        self.loaders = 4 if strategy != "auto" else 4 * processes
        """Batch size that gives the same global batches in one process as in several."""

    def joined(self, processes):
        """Return one process that sees the batches of several."""
        run = Run(self.folder)
        run.loaders = 4 * processes
        return run

    def make(self, encoder=Encoder, **options):
        options = {
            "proj_input_dim": 4,
            "proj_hidden_dim": 8,
            "proj_output_dim": 4,
            "optimizer": "sgd",
            "optimizer_kwargs": {"momentum": 0.9},
            "learning_rate": 0.01,
            "lr_scheduler": None,
            "max_epochs": 2,
            "batch_size": 6,
            "random_state": 0,
            "accelerator": "cpu",
            "strategy": self.strategy,
            "devices": self.processes,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
        return DCL(encoder, **options)

    def fit(self, *data, **options):
        record = Record()
        model = self.make(callbacks=[record], **options).fit(*data)
        return {
            "state": model.state_dict(),
            "rows": model.transform(rows(7, 3)),
            "steps": record.steps,
            "epochs": record.epochs,
            "validations": record.validations,
        }


# -- scenarios: each takes a run and returns what is compared --------------------------------


def array(run):
    return run.fit(rows(13), None, rows(7, 5))


def array_in_small_batches(run):
    return run.fit(rows(9).numpy(), batch_size=3, precision="64-true")


def accumulated(run):
    return run.fit(rows(29), accumulate_grad_batches=2, weighting_sigma=0.5)


def dataset_with_targets(run):
    return run.fit(Labeled(rows(13), torch.arange(13)))


def loader(run):
    train = DataLoader(Pairs(29, torch.arange(29)), batch_size=run.loaders)
    validation = DataLoader(Pairs(7), batch_size=run.loaders)
    return run.fit(train, validation, precision="64-true")


def loader_shuffled(run):
    order = torch.Generator().manual_seed(3)
    names = [f"sub-{i:02d}" for i in range(29)]
    data = Pairs(29, names)
    train = DataLoader(data, batch_size=run.loaders, shuffle=True, generator=order)
    return run.fit(train, precision="64-true")


def loader_dropping(run):
    train = DataLoader(Pairs(29), batch_size=run.loaders, drop_last=True)
    return run.fit(train, accumulate_grad_batches=2)


def data_module(run):
    return run.fit(Plain(run.loaders), precision="64-true")


def double_precision(run):
    return run.fit(rows(29), precision="64-true", learning_rate=0.1)


def regional(run):
    return run.fit(rows(29), encoder=Regional, precision="64-true", weighting_sigma=0.5)


def warm_cosine(run):
    return run.fit(
        rows(29),
        optimizer="adamW",
        optimizer_kwargs={"eps": 1e-3},
        max_epochs=3,
        lr_scheduler="warmup_cosine",
        lr_scheduler_kwargs={"warmup_epochs": 1},
    )


def transforms(run):
    model = run.make(max_epochs=1).fit(rows(8))
    found = {"state": model.state_dict()}
    for n in (1, 2, 5):
        x = rows(n, n)
        names = [f"sub-{i}" for i in range(n)]
        labeled = DataLoader(Labeled(x, names), batch_size=2)
        found[n] = {
            "tensor": model.transform(x),
            "array": torch.from_numpy(model.transform(x.numpy())),
            "loader": model.transform(DataLoader(TensorDataset(x), batch_size=2)),
            "stream": model.transform(DataLoader(Stream(list(x)), batch_size=2)),
            "workers": model.transform(DataLoader(x, batch_size=1, num_workers=n == 5)),
            "divided": model.transform(
                DataLoader(x, 2, sampler=DistributedSampler(x, 2, 0) if n > 1 else None)
            ),
            "with names": model.transform_with_targets(labeled),
            "with numbers": model.transform_with_targets(TensorDataset(x, torch.arange(n))),
        }
    found["module"] = torch.from_numpy(model.transform(Plain(2)))
    return found


def no_seed(run):
    found = run.fit(Labeled(rows(13), torch.arange(13)), random_state=None)
    return {"y": [step["y"] for step in found["steps"]], "state": found["state"]}


def shuffled_without_generator(run):
    data = Pairs(13, torch.arange(13))
    found = run.fit(DataLoader(data, batch_size=2, shuffle=True), max_epochs=1)
    return {"y": [step["y"] for step in found["steps"]]}


def mixed_targets(run):
    y = [{"age": float(i), "who": (f"sub-{i}", i), "seen": i % 2 == 0} for i in range(13)]
    found = run.fit(DataLoader(Pairs(13, y), batch_size=4), max_epochs=1)
    return {"y": [step["y"] for step in found["steps"]]}


def not_a_number(run):
    x = rows(13)
    model = run.make(views=Spoil(x[7, 0]), max_epochs=3, random_state=2)
    found = {"error": _error(lambda: model.fit(x)), "state": model.state_dict()}
    pairs = Pairs(29)
    pairs.x2[21, 0] = torch.inf
    model = run.make()
    found["loader_error"] = _error(lambda: model.fit(DataLoader(pairs, batch_size=run.loaders)))
    found["loader_state"] = model.state_dict()
    fitted = run.make().fit(x)
    x[3, 0] = torch.nan
    found["transform_error"] = _error(lambda: fitted.transform(DataLoader(x, batch_size=2)))
    found["after"] = fitted.transform(rows(7, 3))
    return found


def resumed(run):
    middle = run.folder / f"middle-{run.processes}.ckpt"
    options = {
        "max_epochs": 3,
        "views": Jitter(),
        "batch_size": 4,
        "optimizer": "adamW",
        "optimizer_kwargs": None,
        "accumulate_grad_batches": 2,
    }
    whole = run.make(**options, callbacks=[Save(3, middle)]).fit(rows(29), None, rows(7, 5))
    again = run.make(**options, num_workers=1)
    again.fit(rows(29), None, rows(7, 5), ckpt_path=middle)
    other = run.make(**options, callbacks=[Save(3, middle.with_suffix(".none"))], random_state=None)
    other.fit(rows(29))
    same = run.make(**options, random_state=None)
    same.fit(rows(29), ckpt_path=middle.with_suffix(".none"))
    return {
        "whole": whole.state_dict(),
        "resumed": again.state_dict(),
        "whole without seed": other.state_dict(),
        "resumed without seed": same.state_dict(),
    }


def batch_norm(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run.fit(rows(24), None, rows(8, 5), encoder=Normalized, sync_batchnorm=True)
    found["said"] = [str(w.message) for w in caught if "normalization" in str(w.message)]
    return found


def by_itself(run):
    """The first process alone, while the group is running."""
    if dist.get_rank() > 0:
        return {}
    return Run(run.folder).fit(rows(13), None, rows(7, 5))


def streams_of_unequal_length(run):
    rank = dist.get_rank() if run.processes > 1 else 0
    pairs = list(Pairs(8 + 4 * rank))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run.fit(DataLoader(Stream(pairs), batch_size=4), max_epochs=1)
    found["said"] = [str(w.message) for w in caught if "stream" in str(w.message)]
    return found


def fewer_samples_than_processes(run):
    few = run.processes - 1
    return {
        "array": _error(lambda: run.make().fit(rows(few))),
        "loader": _error(lambda: run.make().fit(DataLoader(Pairs(few), batch_size=4))),
    }


def probed(run):
    x = rows(13)
    probe = Probe(
        Ridge(),
        x,
        x[:, 0].numpy(),
        scoring="r2",
        every=1,
        cv=3,
        untrained=True,
        baselines={"rows": x.numpy()},
    )
    model = run.make(callbacks=[probe]).fit(x)
    return {"scores": probe.scores, "baselines": probe.baseline_scores, "state": model.state_dict()}


def bare_steps(run):
    """Steps without a trainer: gradients averaged over processes are those of one process."""
    pairs, grads = Pairs(11), {}
    rank = dist.get_rank() if run.processes > 1 else 0
    part = np.array_split(np.arange(11), run.processes)[rank]
    for encoder, sigma in ((Encoder, None), (Encoder, 0.5), (Regional, None)):
        model = run.make(encoder, weighting_sigma=sigma)
        out = model.training_step(([pairs.x1[part], pairs.x2[part]], torch.from_numpy(part)), 0)
        out["loss"].backward()
        for name, parameter in model.named_parameters():
            if run.processes > 1:
                dist.all_reduce(parameter.grad)
            grads[f"{encoder.__name__} {name} {sigma}"] = parameter.grad / run.processes
    return {"grads": grads, "y": out["y"], "z1": out["z1"], "loss": _mean(out["loss"], run)}


def _mean(value, run):
    value = value.detach().clone()
    if run.processes > 1:
        dist.all_reduce(value)
    return value / run.processes


def _error(call):
    try:
        call()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(folder, strategy, processes, *names):
    run = Run(folder, strategy, int(processes))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.init_process_group("gloo")
    for name in names:
        found = globals()[name](run)
        rank = dist.get_rank() if dist.is_initialized() else 0
        beside = run.folder / f"{name}-{rank}.beside"
        torch.save(found, beside)
        beside.rename(beside.with_suffix(".pt"))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*many workers.*")
    main(*sys.argv[1:])
