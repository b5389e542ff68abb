"""How good embeddings are: age and sex from them, and from what they have to beat.

    python benchmarks/quality.py BIDS_DIR [--derivatives BRAINS] [--output FILE.json]
    python benchmarks/quality.py BIDS_DIR --arms voxels untrained regional --ablation --curve FILE

Takes a BIDS dataset of brains with age and sex, for instance that which `NIDL_DCL_IXI` names. Images
are those of `nidl-dcl study` with its defaults, preprocessing included (--derivatives gives brains that
`nidl-dcl preprocess` has made), and so is every training but for what its arm changes. Everything is
read out by `predict_phenotype`, on the same folds, with the logarithm of the brain's volume beside where
a study has it: mean absolute error of numbers, balanced accuracy of classes, mean over folds and repeats.
A seed is another training, and another untrained network. A gain is over the same participants, positive
where the arm is better than the voxels or the untrained network: each participant's error, or share of
wrong answers (balanced over classes), is averaged over repeats and seeds; its 95 % interval is over
participants drawn with replacement. nidl's arm has the encoder, batches and threads of "regional", for
as long as that trained, and its own views, head, loss and learning rate. In "never saw", one random half
of the participants trains and the other is read out, then the other way round.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.util
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import measure
import numpy as np
import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, Dataset
from views import nidl as nidl_views

from nidl_dcl import predict_phenotype
from nidl_dcl.data.datamodule import BIDSDataModule
from nidl_dcl.data.exposure import recognize
from nidl_dcl.data.views import volume_views
from nidl_dcl.errors import NidlDclError, UsageError, exit_status
from nidl_dcl.evaluation.baselines import Baseline
from nidl_dcl.evaluation.bootstrap import bootstrap_groups
from nidl_dcl.evaluation.metrics import METRIC_WORDS
from nidl_dcl.models.baselines import embed_untrained, read_voxels, untrained_encoder
from nidl_dcl.models.dcl import DCL
from nidl_dcl.models.encoders import RegionalEncoder
from nidl_dcl.models.inference import embed_volumes
from nidl_dcl.models.serialization import load_model, versions
from nidl_dcl.randomness import keyed, permutation
from nidl_dcl.report.svg import OKABE_ITO, STYLE
from nidl_dcl.workflow.factory import data_module, new_model
from nidl_dcl.workflow.inputs import Study
from nidl_dcl.workflow.launcher import on_one_process, run_options
from nidl_dcl.workflow.options import DataOptions, PredictionOptions, RunOptions, TrainingOptions
from nidl_dcl.workflow.predict import _brain_volumes
from nidl_dcl.workflow.preflight import check_targets
from nidl_dcl.workflow.pretrain import pretrain
from nidl_dcl.workflow.study import open_study

TARGETS = ("age", "sex")
LABELED = (20, 32)
"""Participants to learn from in the learning curve, besides half and all of them."""
LOOKS = (0.03, 0.06, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Shares of a training at which --curve reads age out, besides its begin and its end."""
FOLDS = 5


# What is tried ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What differs from `nidl-dcl study` with a regional encoder and everything else by default.

    Attributes
    ----------
    training : mapping
        Fields of `TrainingOptions`.
    views : mapping
        Arguments of `volume_views`, where these are no options.
    take : callable, optional
        From the embeddings, shape (n_images, n_regions, n_features), to what is read out.
    brain_volume : bool
        Whether the logarithm of the brain's volume is read out beside, where a study does so.
    """

    training: Mapping[str, Any] = field(default_factory=dict)
    views: Mapping[str, Any] = field(default_factory=dict)
    take: Callable[[np.ndarray], np.ndarray] | None = None
    brain_volume: bool = True


TRAINED = {"global": Recipe(training={"encoder": "cnn"}), "regional": Recipe()}
ARMS = ("voxels", "untrained", *TRAINED, "nidl", "unseen")


LAST = RegionalEncoder().convolutions[-1][0].out_channels


class Grid2(RegionalEncoder):
    def __init__(self, in_channels: int = 1) -> None:
        super().__init__(in_channels, grid=(2, 2, 2))


class Grid6(RegionalEncoder):
    def __init__(self, in_channels: int = 1) -> None:
        super().__init__(in_channels, grid=(6, 6, 6))


def ablation(base: TrainingOptions) -> dict[str, Recipe]:
    """Return a recipe for each row; one that `base` has already is left out."""
    rows = {
        "views light": Recipe(training={"views": "light"}),
        "views default": Recipe(training={"views": "default"}),
        "views strong": Recipe(training={"views": "strong"}),
        "each view flipped or not": Recipe(views={"flip": "view"}),
        "both views flipped or none": Recipe(views={"flip": "pair"}),
        "no flips": Recipe(views={"flip": "none"}),
        "grid 2 x 2 x 2": Recipe(training={"encoder": "quality:Grid2"}),
        "grid 6 x 6 x 6": Recipe(training={"encoder": "quality:Grid6"}),
        "no grid: cnn": Recipe(training={"encoder": "cnn"}),
        "temperature halved": Recipe(training={"temperature": base.temperature / 2}),
        "temperature doubled": Recipe(training={"temperature": base.temperature * 2}),
        "learning rate halved": Recipe(training={"learning_rate": base.learning_rate / 2}),
        "learning rate doubled": Recipe(training={"learning_rate": base.learning_rate * 2}),
        "half as long": Recipe(training={"max_steps": max(1, base.max_steps // 2)}),
        "twice as long": Recipe(training={"max_steps": base.max_steps * 2}),
        "batches twice as large": Recipe(training={"batch_size": base.batch_size * 2}),
        "spacing 4 mm": Recipe(training={"spacing": [4.0]}),
        "embedding: last maps alone": Recipe(take=lambda regions: regions[..., :LAST]),
        "embedding: first maps alone": Recipe(take=lambda regions: regions[..., LAST:]),
        "embedding: mean over regions": Recipe(take=lambda regions: regions.mean(axis=1)),
        "without brain volume": Recipe(brain_volume=False),
    }
    return {
        name: recipe
        for name, recipe in rows.items()
        if not recipe.training or replace(base, **recipe.training) != base
    }


# Training ---------------------------------------------------------------------------------------


class Clock:
    """Callback that takes the time of a training, and keeps weights on the way, untimed.

    Attributes
    ----------
    seconds : float
        Of the training.
    steps : int
        Of the optimizer.
    kept : list of (float, dict)
        Seconds, and the weights then.
    """

    def __init__(self, looks: Sequence[float] = ()) -> None:
        self.looks, self.kept, self.seconds, self.steps = looks, [], 0.0, 0

    def write(self) -> None:
        """Do nothing: `pretrain` takes the page of a study that is under way, and calls this."""

    def on_train_start(self, trainer: Any, model: Any) -> None:
        self._since = time.perf_counter()
        total = float(trainer.estimated_stepping_batches)
        self._due = {max(1, round(share * total)) for share in self.looks}
        if self.looks:
            self._keep(model)

    def on_train_batch_end(self, trainer: Any, model: Any, *args: Any) -> None:
        self._stop(trainer)
        if trainer.global_step in self._due:
            self._keep(model)
        self._since = time.perf_counter()

    def on_train_end(self, trainer: Any, model: Any) -> None:
        self._stop(trainer)
        if self.looks:
            self._keep(model)

    def _stop(self, trainer: Any) -> None:
        self.seconds += time.perf_counter() - self._since
        self.steps = trainer.global_step

    def _keep(self, model: Any) -> None:
        weights = {name: w.detach().cpu().clone() for name, w in model.state_dict().items()}
        self.kept.append((self.seconds, weights))


class StudyClock(Clock, L.Callback):
    """A clock for Lightning as nidl_dcl imports it."""


@dataclass(eq=False)
class VariedStudy(Study):
    """A study with views that are no option."""

    views: Mapping[str, Any] = field(default_factory=dict)

    def data_module(self, model: Path, **options: Any) -> BIDSDataModule:
        module = super().data_module(model, **options)
        if self.views:
            module.views = volume_views(module.views, **{"kind": module.kind, **self.views})
        return module


class TwoNidlViews(Dataset[Any]):
    """Two views of each volume by nidl's transforms, as its users draw them."""

    def __init__(self, volumes: Sequence[np.ndarray]) -> None:
        self.volumes, self.view = volumes, nidl_views(volumes[0].shape[1:])

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return [self.view(self.volumes[index]).float() for _ in range(2)]


class Flat(nn.Module):
    """An encoder whose regions are one embedding, since nidl's head takes no other."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x).flatten(1)


def fit_nidl(
    encoder: nn.Module,
    volumes: Sequence[np.ndarray],
    training: TrainingOptions,
    epochs: int,
    seed: int,
    looks: Sequence[float] = (),
) -> Clock:
    """Train `encoder` by nidl's DCL, in place, and return the clock."""
    import pytorch_lightning
    from nidl.estimators import ssl

    clock = type("NidlClock", (Clock, pytorch_lightning.Callback), {})(looks)
    loader = DataLoader(TwoNidlViews(volumes), training.batch_size, shuffle=True, drop_last=False)
    with keyed("nidl", seed):
        model = ssl.DCL(
            encoder, proj_input_dim=encoder(torch.from_numpy(volumes[0])[None]).shape[1],
            max_epochs=epochs, lr_scheduler_kwargs={"warmup_epochs": epochs / 10}, random_state=seed,
            callbacks=[clock], logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, **run_options(training),
        )  # fmt: skip
        model.fit(loader)
    encoder.cpu().eval()
    return clock


# Features ---------------------------------------------------------------------------------------


@dataclass
class Arm:
    """What is read out, one matrix or `Baseline` for each seed, and what it took to make it."""

    features: list[Any]
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    note: str = ""
    brain_volume: bool = True


@dataclass(frozen=True)
class Trained:
    """A model of a study, and how its training went."""

    model: DCL
    clock: Clock


class Bench:
    """One dataset, one recipe, and everything that was computed from them.

    Parameters
    ----------
    study : VariedStudy
        Its output is held for writing.
    base : TrainingOptions
        The recipe that is changed.
    seeds, repeats : int
        Trainings of each arm, and repeats of the cross-validation.
    looks : sequence of float
        As of `Clock`.
    """

    def __init__(
        self,
        study: VariedStudy,
        base: TrainingOptions,
        seeds: int,
        repeats: int,
        looks: Sequence[float] = (),
    ) -> None:
        self.study, self.base = study, on_one_process(base)
        self.repeats, self.looks = repeats, looks
        self.seeds = range(seeds)
        self.module = data_module(
            study.table, study.run, training=self.base, work=study.output.work
        )
        study.prepare(self.module)
        self.images = self.module.images
        self.rows = np.arange(len(self.images))
        self.brain_volume = _brain_volumes(self.images, study.table.phenotype_columns)
        self._trained: dict[str, Trained] = {}

    # -- what is compared with ---------------------------------------------------------------

    @cached_property
    def voxels(self) -> np.ndarray:
        return read_voxels(self.module, self.rows)[0]

    @cached_property
    def untrained(self) -> Arm:
        known, found = new_model(self.base, 0), []
        known.set_params(enable_progress_bar=False, enable_model_summary=False)
        for seed in self.seeds:
            fresh = untrained_encoder(known, self.study.run.random_seed, seed)
            found.append(embed_untrained(fresh, self.module, self.rows, f"untrained {seed}"))
        return Arm(found)

    # -- DCL ---------------------------------------------------------------------------------

    def train(self, recipe: Recipe, seed: int, people: Sequence[str] = ()) -> Trained:
        """Train as the stage `pretrain` of a study does; the same training is not done twice.

        Parameters
        ----------
        recipe : Recipe
        seed : int
        people : sequence of str, optional
            Participants to train on; default: all.
        """
        training = replace(self.base, **recipe.training)
        key = repr((training, dict(recipe.views), seed, sorted(people)))
        if key not in self._trained:
            study = copy.copy(self.study)  # with the table of images, unless it is for some of them
            if people:
                study.__dict__.pop("table", None)
                study.data = replace(study.data, participant_label=sorted(people))
            name = f"model{len(self._trained)}"
            study.run = replace(study.run, random_seed=seed, model_name=name)
            study.views, clock = recipe.views, StudyClock(self.looks)
            folder = pretrain(study, training, live=clock)
            model = load_model(folder, trust=["quality"])
            self._trained[key] = Trained(model.set_params(devices=1), clock)
            told = " ".join(f"{k}={v}" for k, v in {**recipe.training, **recipe.views}.items())
            print(f"seed {seed}: {clock.steps} steps, {clock.seconds:.0f} s  {told}", flush=True)
        return self._trained[key]

    def embed(self, model: DCL) -> np.ndarray:
        """Return the embeddings of all images, prepared as the model wants them."""
        study = self.study
        module = data_module(
            study.table, study.run, preparation=model.preparation, work=study.output.work
        )
        module.setup()
        if len(module.images) != len(self.images):
            raise UsageError("Some images cannot be prepared for one of the models.")
        workers = study.run.nprocs or 0
        return embed_volumes(model, module.volumes, digest="quality", num_workers=workers)[0]

    def arm(self, recipe: Recipe) -> Arm:
        """Train, embed and return what is read out."""
        found = [self.train(recipe, seed) for seed in self.seeds]
        features = [self.embed(one.model) for one in found]
        if recipe.take is not None:
            n = found[0].model.encoder.n_regions
            features = [recipe.take(x.reshape(len(x), n, -1)) for x in features]
        clocks = [one.clock for one in found]
        return Arm(
            features,
            [clock.seconds for clock in clocks],
            [clock.steps for clock in clocks],
            brain_volume=recipe.brain_volume,
        )

    def given(self, folder: str) -> Arm:
        """Return the embeddings by a model that is there already."""
        model = load_model(folder)
        seen = recognize(
            self.images["participant_id"], self.images["content"], model.exposure or {}
        )
        people = self.images["participant_id"]
        count = people[[bool(how) for how in seen]].nunique()
        note = f"saw {count} of {people.nunique()} participants"
        if None in seen:
            note = "it is not known whom it saw"
        return Arm([self.embed(model.set_params(devices=1))], note=note)

    # -- nidl --------------------------------------------------------------------------------

    @cached_property
    def arrays(self) -> list[np.ndarray]:
        return [volume.numpy() for volume in self.module.volumes]

    @cached_property
    def nidl(self) -> tuple[Arm, list[Clock]]:
        """Train nidl's DCL for as long as the regional arm with the same seed, once."""
        arm, clocks = Arm([]), []
        trained = self.module.participants("train")
        volumes = [self.arrays[rows[0]] for _, rows in trained]
        for seed in self.seeds:
            wanted = self.train(Recipe(), seed).clock.seconds

            def encoder(seed: int = seed) -> Flat:
                return Flat(new_model(self.base, seed).encoder)

            # The second run tells what an epoch takes when everything is warm.
            epoch = min(fit_nidl(encoder(), volumes, self.base, 1, seed).seconds for _ in range(2))
            own, epochs = encoder(), max(1, round(wanted / epoch))
            clock = fit_nidl(own, volumes, self.base, epochs, seed, self.looks)
            print(f"seed {seed}: {clock.steps} steps, {clock.seconds:.0f} s  nidl", flush=True)
            arm.features.append(self.encode(own))
            arm.seconds.append(clock.seconds)
            arm.steps.append(clock.steps)
            clocks.append(clock)
        return arm, clocks

    @torch.inference_mode()
    def encode(self, encoder: nn.Module) -> np.ndarray:
        encoder.eval()
        return np.stack([encoder(torch.from_numpy(x)[None])[0].numpy() for x in self.arrays])

    # -- scores ------------------------------------------------------------------------------

    def score(
        self,
        target: str,
        arms: Mapping[str, Arm],
        rows: np.ndarray | None = None,
        curve: bool = True,
    ) -> dict[str, Scored]:
        """Read a target out of all arms on the same folds, beside voxels and untrained networks.

        Parameters
        ----------
        target : str
        arms : mapping of str to Arm
            All with brain volume beside, or all without.
        rows : ndarray of int, optional
            Of the images; default: all.
        curve : bool, default=True
            Whether to learn from fewer participants, too.
        """
        rows = self.rows if rows is None else rows
        images = self.images.iloc[rows].reset_index(drop=True)
        beside = self.brain_volume
        if beside is not None:
            beside = beside.iloc[rows].reset_index(drop=True)
        if not all(arm.brain_volume for arm in arms.values()):
            beside = None
        # The untrained networks come first, as what is read out first must be a plain matrix.
        every = {"untrained": self.untrained, "voxels": Arm([self.voxels]), **arms}
        sources = {
            (name, seed): Baseline(x[rows], pca=True) if name == "voxels" else x[rows]
            for name, arm in every.items()
            for seed, x in enumerate(arm.features)
        }
        keys = {f"{name}/{seed}": (name, seed) for name, seed in sources}
        first, *others = keys
        labeled = images.loc[images[target].notna(), "group_id"].nunique()
        shares = [n / (labeled * (1 - 1 / FOLDS)) for n in LABELED]
        result = predict_phenotype(
            sources[keys[first]],
            images[target],
            images["group_id"],
            target=target,
            scaling="shared",
            baselines={key: sources[keys[key]] for key in others},
            extra_features=beside,
            ids=images[["participant_id", "session_id", "run", "person_id"]],
            n_splits=FOLDS,
            n_repeats=self.repeats,
            n_permutations=0,
            learning_curve=[*(share for share in shares if share < 1), 0.5] if curve else False,
            random_state=self.study.run.random_seed,
        )
        metrics = result.metrics
        metric = metrics["headline"]["metric"]
        scores = {first: metrics["scores"], **metrics["baselines"]}
        curves = metrics["learning_curve"] or {"n_participants": [], "scores": {}}
        sizes, points = [round(n) for n in curves["n_participants"]], curves["scores"]
        if points:
            points = {**points, first: points["embeddings"]}
        losses = {
            key: _losses(result.repeats["embeddings" if key == first else key][0], images, target, metrics)
            for key in keys
        }  # fmt: skip
        found = {}
        for name in ["dummy", *([beside.columns[0]] if beside is not None else []), *every]:
            own = [key for key, (arm, _) in keys.items() if arm == name] or [name]
            found[name] = Scored(
                metric=metric,
                n=metrics["n_participants"],
                scores=[scores[key][metric]["mean"] for key in own],
                losses=[losses[key] for key in own if key in losses],
                curve={
                    size: float(np.mean([points[key][i]["mean"] for key in own]))
                    for i, size in enumerate(sizes)
                },
            )
        return found

    def halves(self, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return twice the images of a random half to train on, and those of the other half."""
        people = self.images["group_id"].unique()
        half = people[permutation(len(people), "halves", seed)[: len(people) // 2]]
        inside = self.images["group_id"].isin(half).to_numpy()
        a, b = np.flatnonzero(inside), np.flatnonzero(~inside)
        return [(a, b), (b, a)]

    def unseen(self, recipes: Mapping[str, Recipe]) -> list[tuple[np.ndarray, dict[str, Arm], int]]:
        """Return the rows of each half, what models that the other half trained make of them, the seed."""
        found = []
        for seed in self.seeds:
            for trained_on, rows in self.halves(seed):
                people = self.images["participant_id"].iloc[trained_on].unique()
                arms = {}
                for name, recipe in recipes.items():
                    one = self.train(recipe, seed, people)
                    arms[name] = Arm([self.embed(one.model)], [one.clock.seconds])
                found.append((rows, arms, seed))
        return found

    def score_unseen(self, target: str, halves: Any) -> dict[str, Scored]:
        """Return the scores of the halves together, those of a seed averaged."""
        by_seed: dict[int, list[dict[str, Scored]]] = {}
        for rows, arms, seed in halves:
            by_seed.setdefault(seed, []).append(self.score(target, arms, rows, curve=False))
        first = by_seed[0][0]
        return {
            name: Scored(
                metric=first[name].metric,
                n=sum(half[name].n for half in by_seed[0]),
                scores=[
                    float(np.mean([half[name].score for half in pair])) for pair in by_seed.values()
                ],
                losses=[
                    pd.concat([half[name].loss for half in pair])
                    for pair in by_seed.values()
                    if pair[0][name].losses
                ],
                curve={},
            )
            for name in first
        }


# Scores -----------------------------------------------------------------------------------------


@dataclass
class Scored:
    """Scores of an arm for a target, for each seed, and what each participant adds to them.

    Attributes
    ----------
    metric : str
    n : int
        Participants.
    scores : list of float
    losses : list of Series
        Error, or share of wrong answers, by class (0 for numbers) and person.
    curve : dict
        Participants learned from, to the mean score.
    """

    metric: str
    n: int
    scores: list[float]
    losses: list[pd.Series]
    curve: dict[int, float]

    @property
    def score(self) -> float:
        return float(np.mean(self.scores))

    @property
    def loss(self) -> pd.Series:
        return pd.concat(self.losses, axis=1).mean(axis=1)

    def gain(self, other: Scored) -> dict[str, Any]:
        """Return by how much this arm is better than another one, as `bootstrap_groups` does."""
        if not (self.losses and other.losses):
            return {"mean": None, "ci95": None}
        # Class and person are the index, so rows meet whatever their order.
        difference = (other.loss - self.loss).sort_index()
        kinds = difference.index.get_level_values("kind")
        members = [(kinds == kind).astype(float) for kind in kinds.unique()]
        values = difference.to_numpy()

        def mean(count: np.ndarray) -> dict[str, float]:
            with np.errstate(invalid="ignore"):  # a class that nobody of a draw is of
                each = [(count * member) @ values / (count @ member) for member in members]
            return {"gain": float(np.mean(each))}

        return bootstrap_groups(mean, len(values), "quality")["gain"]


def _losses(
    predicted: np.ndarray, images: pd.DataFrame, target: str, metrics: Mapping[str, Any]
) -> pd.Series:
    """Return the error, or share of wrong answers, of each person, mean over repeats.

    Parameters
    ----------
    predicted : ndarray, shape (n_repeats, n_images) or (n_repeats, n_images, n_classes)
    images : DataFrame
    target : str
    metrics : mapping
        Of the same `predict_phenotype`.
    """
    used = np.isfinite(predicted).reshape(len(predicted), len(images), -1).all(axis=(0, 2))
    truth, person = images[target][used], images["person_id"][used]
    # Images that share a value are one answer, their mean, as everywhere.
    units = [person.rename("person"), truth.rename("truth")]
    kept = predicted[:, used]
    by_unit = [pd.DataFrame(one, index=truth.index).groupby(units).mean() for one in kept]
    true = by_unit[0].index.get_level_values("truth")
    if metrics["task"] == "regression":
        kind = np.zeros(len(true), dtype=int)
        wrong = [np.abs(one[0].to_numpy() - true.to_numpy(dtype=float)) for one in by_unit]
    else:
        labels = np.array(list(metrics["classes"]), dtype=object)
        kind = true.astype(str).to_numpy()
        wrong = [labels[one.to_numpy().argmax(axis=1)] != kind for one in by_unit]
    table = pd.DataFrame(
        {
            "loss": np.mean(wrong, axis=0),
            "kind": kind,
            "person": by_unit[0].index.get_level_values("person"),
        }
    )
    return table.groupby(["kind", "person"])["loss"].mean()


# Tables -----------------------------------------------------------------------------------------


def table_of(
    scored: Mapping[str, Scored], arms: Mapping[str, Arm], references: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a row of text for each arm, the gains over the references among them."""
    rows = []
    for name, one in scored.items():
        digits = 2 if one.metric == "mae" else 3
        seconds = arms[name].seconds if name in arms else []
        row = {
            "features": name,
            "score": f"{one.score:.{digits}f}",
            "seeds": " ".join(f"{x:.{digits}f}" for x in one.scores) if len(one.scores) > 1 else "",
        }
        for reference in references:
            told = "" if name == reference else _signed(one.gain(scored[reference]), digits)
            row[f"gain over {reference} (95 %)"] = told
        row |= {f"{size} labeled": f"{x:.{digits}f}" for size, x in one.curve.items()}
        row["training, s"] = f"{np.mean(seconds):.0f}" if seconds else ""
        row["note"] = arms[name].note if name in arms else ""
        rows.append(row)
    for name, arm in arms.items():
        if not arm.features:
            rows.append({**dict.fromkeys(rows[0], ""), "features": name, "note": arm.note})
    return rows


def _signed(gain: Mapping[str, Any], digits: int) -> str:
    if gain["mean"] is None:
        return ""
    ends = gain["ci95"]
    told = f"{gain['mean']:+.{digits}f}"
    return told if ends is None else f"{told} ({ends[0]:+.{digits}f} to {ends[1]:+.{digits}f})"


def record_of(scored: Mapping[str, Scored], references: Sequence[str]) -> dict[str, Any]:
    """Return the same as numbers for JSON; nothing of a single participant is among them."""
    return {
        name: {
            "metric": one.metric,
            "n_participants": one.n,
            "mean": one.score,
            "seeds": one.scores,
            "gain": {other: one.gain(scored[other]) for other in references if other != name},
            "learning_curve": one.curve,
        }
        for name, one in scored.items()
    }


def title_of(target: str, scored: Mapping[str, Scored]) -> str:
    """Return what the scores of a table are."""
    one = next(iter(scored.values()))
    return f"{target} ({METRIC_WORDS[one.metric]}), {one.n} participants"


def _show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"\n### {title}\n")
    measure.print_table(rows)
    sys.stdout.flush()


# Time to quality --------------------------------------------------------------------------------


def error_by_minutes(bench: Bench, target: str, file: Path) -> list[dict[str, Any]]:
    """Read a target out along the trainings, draw the figure and return a row for each look.

    Parameters
    ----------
    bench : Bench
    target : str
    file : Path
        Its ending is replaced by ``.svg`` and ``.png``.
    """
    looks: dict[str, list[tuple[list[float], Arm]]] = {}
    for name, recipe in TRAINED.items():
        trained = [bench.train(recipe, seed) for seed in bench.seeds]
        looks[name] = _along(
            [one.clock for one in trained],
            lambda seed, weights, trained=trained: bench.embed(_at(trained[seed].model, weights)),
        )
    if importlib.util.find_spec("nidl"):
        encoders = [Flat(new_model(bench.base, seed).encoder) for seed in bench.seeds]

        def encode(seed: int, weights: Mapping[str, torch.Tensor]) -> np.ndarray:
            own = {k.removeprefix("encoder."): w for k, w in weights.items() if k[:8] == "encoder."}
            encoders[seed].load_state_dict(own)
            return bench.encode(encoders[seed])

        looks["nidl"] = _along(bench.nidl[1], encode)
    arms = {f"{name}@{i}": arm for name, all_ in looks.items() for i, (_, arm) in enumerate(all_)}
    scored = bench.score(target, arms, curve=False)
    rows = []
    for name, points in looks.items():
        for i, (seconds, _) in enumerate(points):
            one = scored[f"{name}@{i}"]
            rows.append(
                {
                    "features": name,
                    "minutes": float(np.mean(seconds)) / 60,
                    one.metric: one.score,
                    "lowest": min(one.scores),
                    "highest": max(one.scores),
                }
            )
    _draw(rows, {name: scored[name].score for name in ("voxels", "untrained")}, target, file)
    return rows


def _along(
    clocks: Sequence[Clock], features: Callable[[int, Any], np.ndarray]
) -> list[tuple[list[float], Arm]]:
    """Return for each look the seconds, and what is read out, of each seed."""
    return [
        (
            [clock.kept[i][0] for clock in clocks],
            Arm([features(seed, clock.kept[i][1]) for seed, clock in enumerate(clocks)]),
        )
        for i in range(min(len(clock.kept) for clock in clocks))
    ]


def _at(model: DCL, weights: Mapping[str, torch.Tensor]) -> DCL:
    model.load_state_dict(weights)
    return model


def _draw(
    rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float], target: str, file: Path
) -> None:
    table = pd.DataFrame(rows)
    metric = table.columns[2]
    with mpl.rc_context({**STYLE, "svg.hashsalt": "quality"}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for color, (name, points) in zip(
            OKABE_ITO, table.groupby("features", sort=False), strict=False
        ):
            axes.plot(points["minutes"], points[metric], color=color, marker="o", ms=4, label=name)
            axes.fill_between(
                *(points["minutes"], points["lowest"], points["highest"]),
                color=color,
                alpha=0.15,
                linewidth=0,
            )
        for style, (name, value) in zip(("--", ":"), limits.items(), strict=True):
            axes.axhline(value, color="0.35", linestyle=style, linewidth=1, label=name)
        axes.set(
            xlabel="minutes of training", ylabel=f"{target}: {METRIC_WORDS[metric]}", xlim=(0, None)
        )
        figure.legend(loc="outside upper left", ncols=5)
        for ending, more in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
            figure.savefig(file.with_suffix(f".{ending}"), **more)


# Main -------------------------------------------------------------------------------------------


def main(
    dataset: Path | None = None,
    *,
    data: DataOptions | None = None,
    training: Mapping[str, Any] | None = None,
    seeds: int = 3,
    repeats: int = 5,
    targets: Sequence[str] = TARGETS,
    arms: Sequence[str] = ARMS,
    models: Sequence[str] = (),
    changes: Sequence[str] | None = None,
    curve: Path | None = None,
    output: Path | None = None,
    work_dir: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure, print every table and return the rows of the first ones.

    Parameters
    ----------
    dataset : Path, optional
        Default: the one that `NIDL_DCL_IXI` names.
    data : DataOptions, optional
        Which images; default: as a study.
    training : mapping, optional
        Fields of `TrainingOptions` that differ from a study's in all arms.
    seeds, repeats : int
        Trainings of an arm, repeats of the cross-validation.
    targets : sequence of str
        Columns of phenotypes.
    arms : sequence of str
        Of `ARMS`.
    models : sequence of str
        Model folders.
    changes : sequence of str, optional
        Rows of the ablation, or none for all; default: no ablation.
    curve : Path, optional
        Where the figure of the first target by minutes goes; default: it is not made.
    output : Path, optional
        JSON with everything.
    work_dir : Path, optional
        Where prepared volumes are kept; default: they are not.
    """
    named = os.environ.get("NIDL_DCL_IXI")
    dataset = dataset or (Path(named) if named else None)
    if dataset is None:
        return [measure.skipped("age and sex from embeddings", "a dataset with age and sex")]
    if unknown := {*arms} - {*ARMS}:
        raise UsageError(f"--arms takes {', '.join(ARMS)}; got {', '.join(sorted(unknown))}.")
    data, run = data or DataOptions(), RunOptions(work_dir=work_dir)
    base = TrainingOptions(**{"encoder": "regional", **(training or {})})
    recipes = ablation(base)
    if unknown := {*(changes or ())} - {*recipes}:
        raise UsageError(f"--ablation takes {'; '.join(recipes)}; got {'; '.join(unknown)}.")
    chosen = {name: r for name, r in recipes.items() if changes is not None and (not changes or name in changes)}  # fmt: skip
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    start, rows = time.monotonic(), []
    try:
        with tempfile.TemporaryDirectory() as folder:
            opened = open_study(dataset, Path(folder) / "study", data, run)
            study = VariedStudy(opened.output, data, run)
            with study.output.writing():
                check_targets(study.table, targets, PredictionOptions())
                bench = Bench(study, base, seeds, repeats, () if curve is None else LOOKS)
                record = _record(bench, dataset)
                print(record["machine"], flush=True)
                found = _arms(bench, arms, models)
                for target in targets:
                    measured = {name: arm for name, arm in found.items() if arm.features}
                    scored = bench.score(target, measured)
                    table = table_of(scored, found, ("voxels", "untrained"))
                    _show(title_of(target, scored), table)
                    record["targets"][target] = record_of(scored, ("voxels", "untrained"))
                    rows += [{"target": target, **row} for row in table]
                if "unseen" in arms:
                    halves = bench.unseen({k: r for k, r in TRAINED.items() if k in arms})
                    for target in targets:
                        scored = bench.score_unseen(target, halves)
                        table = table_of(scored, {}, ("voxels", "untrained"))
                        _show(f"{title_of(target, scored)}: by a model that never saw them", table)
                        record["unseen"][target] = record_of(scored, ("voxels", "untrained"))
                if chosen:
                    _ablate(bench, chosen, targets, record)
                if curve is not None:
                    points = error_by_minutes(bench, targets[0], curve)
                    _show(f"{targets[0]} by minutes of training", points)
                    record["minutes"] = points
    finally:
        logging.disable(logging.NOTSET)
    record["arms"] = {
        name: {"seconds": arm.seconds, "steps": arm.steps, "note": arm.note}
        for name, arm in found.items()
    }
    record["seconds"] = time.monotonic() - start
    if output is not None:
        output.write_text(json.dumps(record, indent=2, default=str) + "\n", "utf-8")
    print(f"\n{record['date']}, {record['seconds']:.0f} s.")
    return rows


def _arms(bench: Bench, names: Sequence[str], models: Sequence[str]) -> dict[str, Arm]:
    found = {name: bench.arm(recipe) for name, recipe in TRAINED.items() if name in names}
    if "nidl" in names:
        there = importlib.util.find_spec("nidl") is not None
        found["nidl"] = bench.nidl[0] if there else Arm([], note="nidl is not installed")
    return found | {Path(folder).name: bench.given(folder) for folder in models}


def _ablate(
    bench: Bench, recipes: Mapping[str, Recipe], targets: Sequence[str], record: dict[str, Any]
) -> None:
    arms = {"as it is": bench.arm(Recipe())}
    arms |= {name: bench.arm(recipe) for name, recipe in recipes.items()}
    beside = {name: arm for name, arm in arms.items() if arm.brain_volume}
    for target in targets:
        scored = bench.score(target, beside)
        if len(beside) < len(arms):
            alone = {name: arm for name, arm in arms.items() if not arm.brain_volume}
            scored |= {k: v for k, v in bench.score(target, alone).items() if k in alone}
        scored = {name: scored[name] for name in arms}
        _show(
            f"{title_of(target, scored)}: one part of the recipe changed",
            table_of(scored, arms, ("as it is",)),
        )
        record["ablation"][target] = record_of(scored, ("as it is",))
    record["recipes"] = {
        name: {**recipe.training, **recipe.views} for name, recipe in recipes.items()
    }


def _record(bench: Bench, dataset: Path) -> dict[str, Any]:
    shape = bench.module.preparation.shape or ()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": measure.machine("torch", "monai", "lightning", "scikit-learn", "numpy", "nidl"),
        "versions": versions("nidl"),
        "dataset": dataset.name,
        "participants": int(bench.images["participant_id"].nunique()),
        "images": len(bench.images),
        "preprocessing": bench.study.table.preprocessing,
        "voxels": list(shape),
        "brain_volume": bench.brain_volume is not None,
        "training": asdict(bench.base),
        "seeds": len(bench.seeds),
        "repeats": bench.repeats,
        "folds": FOLDS,
        "threads": torch.get_num_threads(),
        "targets": {},
        "unseen": {},
        "ablation": {},
    }


def _option(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    known = TrainingOptions.__dataclass_fields__
    if not sign or name not in known:
        raise argparse.ArgumentTypeError(f"NAME=VALUE with a name of {', '.join(known)}")
    return name, yaml.safe_load(value)


def _parse(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("dataset", type=Path, nargs="?", help="BIDS_DIR; default: what NIDL_DCL_IXI names")
    add("--derivatives", nargs="+", default=[], help="brains that nidl-dcl preprocess has made")
    add("--preset", help="which images; with --derivatives: preprocessed, else raw-t1w")
    add("--seeds", type=int, default=3, help="trainings of each arm")
    add("--repeats", type=int, default=5, help="repeats of the cross-validation")
    add("--targets", nargs="+", default=TARGETS, help="columns of phenotypes")
    add("--arms", nargs="+", default=ARMS, help=f"of {', '.join(ARMS)}")
    add("--model", nargs="+", default=[], dest="models", help="model folders")
    add("--set", nargs="+", type=_option, default=[], metavar="NAME=VALUE",
        help="training options that differ from a study's in all arms")  # fmt: skip
    add("--ablation", nargs="*", dest="changes", metavar="ROW", help="rows of it; default: all")
    add("--curve", type=Path, metavar="FILE", help="draw the first target by minutes of training")
    add("--output", type=Path, help="JSON with everything")
    add("--work-dir", type=Path, help="where prepared volumes are kept")
    given = vars(parser.parse_args(argv))
    derivatives, preset = given.pop("derivatives"), given.pop("preset")
    preset = preset or ("preprocessed" if derivatives else DataOptions().preset)
    given["data"] = DataOptions(preset=preset, derivatives=derivatives)
    given["training"] = dict(given.pop("set"))
    return given


if __name__ == "__main__":
    try:
        found = main(**_parse())
        if len(found) == 1:  # there was no dataset
            measure.print_table(found)
    except NidlDclError as error:
        print(error, file=sys.stderr)
        sys.exit(exit_status(error))
