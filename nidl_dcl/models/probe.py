"""A probe: a score of frozen embeddings on known targets, measured during training.

The encoder and the random state are left unchanged: training with a probe ends as without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

import lightning as L
import numpy as np
import sklearn.base
import torch
from sklearn.model_selection import GroupKFold, KFold, check_cv, cross_validate

from nidl_dcl.data.batches import single_view
from nidl_dcl.data.loaders import PredictShards
from nidl_dcl.distributed import first_value, world
from nidl_dcl.models.context_managers import fork_rng
from nidl_dcl.models.transformer import gather_in_order


class Probe(L.Callback):
    """Callback that cross-validates a scikit-learn estimator on frozen embeddings, every few epochs.

    The mean score over the folds is logged as ``probe/<name>``, of several scorers as
    ``probe/<name>_<scorer>``, where loggers, ``ModelCheckpoint`` and ``EarlyStopping`` find it.
    Beside it stands what the training has to beat, if asked for: the network before training, as
    ``probe/<name>_untrained``, and each baseline, as ``probe/<name>_<baseline>``, on the same folds.

    Parameters
    ----------
    estimator : scikit-learn estimator
        Cloned for each fold.
    X : anything that ``transform`` takes
        The samples, one view of each: a loader, an array, paths, …
    y : array of shape (n,), optional
        Targets in the order of `X`; by default those that `X` has, of items ``(x, y)``.
    groups : array of shape (n,), optional
        Participants; the images of one are never split between training and test.
    name : str, default="score"
        Ending of the logged name.
    every : int, default=5
        Epochs from one measurement to the next; the last epoch is always measured.
    scoring : str, callable, list or dict, optional
        One scorer or several, as in scikit-learn; by default the estimator's own score.
    cv : int, splitter or iterable of (training, test) indices, default=5
        Number of shuffled folds, or what divides the samples, as in scikit-learn. All measurements
        of a fit are on the same folds.
    untrained : bool, default=False
        Measure the network before the first epoch too; loggers get that score at step 0. A fit that
        resumes keeps that measurement.
    baselines : mapping of str to array of shape (n, features), optional
        Other features of the same samples, such as ``{"voxels": voxels}``, scored once.

    Attributes
    ----------
    scores : list of (int, float)
        Epoch, from 1, and mean score; of several scorers a dict of mean scores.
    baseline_scores : dict of str to float
        The same of each baseline, and of the network before training as ``"untrained"``.

    Raises
    ------
    ValueError
        In training, when `y`, `groups` or a baseline has another length than `X`, or when neither
        `y` nor `X` has targets.

    Examples
    --------
    >>> import torch
    >>> from sklearn.linear_model import Ridge
    >>> from torch import nn
    >>> from nidl_dcl import DCL
    >>> from nidl_dcl.models.probe import Probe
    >>> x = torch.randn(20, 6)
    >>> probe = Probe(Ridge(), x, x[:, 0].numpy(), scoring="r2", every=1)
    >>> model = DCL(nn.Linear(6, 4), proj_input_dim=4, max_epochs=2, lr_scheduler=None,
    ...             callbacks=[probe], random_state=0, enable_progress_bar=False,
    ...             enable_model_summary=False)
    >>> [epoch for epoch, _ in probe.scores] if model.fit(x) else None
    [1, 2]
    """

    def __init__(
        self,
        estimator: Any,
        X: Any,
        y: Any = None,
        *,
        groups: Any = None,
        name: str = "score",
        every: int = 5,
        scoring: Any = None,
        cv: Any = 5,
        untrained: bool = False,
        baselines: Mapping[str, Any] | None = None,
    ) -> None:
        self.estimator = estimator
        self.X = X
        self.y = y
        self.groups = groups
        self.name = name
        self.every = every
        self.scoring = scoring
        self.cv = list(cv) if isinstance(cv, Iterator) else cv  # to be used more than once
        self.untrained = untrained
        self.baselines = baselines
        self.scores: list[tuple[int, Any]] = []
        self.baseline_scores: dict[str, Any] = {}
        self._folds: Any = None

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint: several probes have one each."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the scores of the baselines: what a resumed fit cannot measure again."""
        return dict(self.baseline_scores)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the scores of the baselines from a checkpoint."""
        self.baseline_scores = dict(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure the baselines and, unless the fit resumes, the network as it is."""
        self._folds = None
        targets = self.y
        if (self.untrained and trainer.global_step == 0) or (self.baselines and targets is None):
            features, targets = self._embed(pl_module)
            if self.untrained and trainer.global_step == 0:
                score = self._measure(features, targets, "X")
                self.baseline_scores["untrained"] = score
                for logger in trainer.loggers:
                    logger.log_metrics(_named(f"probe/{self.name}", score), step=0)
        for name, given in (self.baselines or {}).items():
            source = f"baseline {name!r}"
            self.baseline_scores[name] = self._measure(np.asarray(given), targets, source)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure after every `every` epochs, and after the last one."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every and epoch != trainer.max_epochs:
            return
        score = self._measure(*self._embed(pl_module), "X")
        self.scores.append((epoch, score))
        found = _named(f"probe/{self.name}", score)
        for name, value in self.baseline_scores.items():
            found |= _named(f"probe/{self.name}", value, f"_{name}")
        for name, value in found.items():
            pl_module.log(name, value, batch_size=1, sync_dist=True)

    def _embed(self, model: Any) -> tuple[np.ndarray, Any]:
        if self.y is not None:
            return embed_between_steps(model, self.X), self.y
        pieces = _embed(model, self.X)
        targets = [y for *_, y in pieces]
        known = all(y is not None for y in targets)
        y = np.array([value for part in targets for value in part]) if known else None
        return np.concatenate([features for _, features, _ in pieces]), y

    def _measure(self, features: np.ndarray, y: Any, source: str) -> Any:
        if y is None:
            raise ValueError("The probe has no targets: give y, or an X of items (x, y).")
        for what, values in (("y", y), ("groups", self.groups)):
            if values is not None and len(values) != (n := len(features)):
                raise ValueError(
                    f"The probe has {n} samples in {source} and {len(values)} in {what}."
                )
        # One process scores, so that all log the same number.
        return first_value(self._score(features, np.asarray(y)) if world()[0] == 0 else None)

    def _score(self, features: np.ndarray, y: np.ndarray) -> Any:
        if self._folds is None:
            cv = self.cv
            if isinstance(cv, Integral):
                grouped = self.groups is not None
                cv = GroupKFold(cv) if grouped else KFold(cv, shuffle=True, random_state=0)
            # Once: a splitter without random_state divides otherwise each time.
            self._folds = list(check_cv(cv, y).split(features, y, self.groups))
        found = cross_validate(
            sklearn.base.clone(self.estimator), features, y, cv=self._folds, scoring=self.scoring
        )
        scores = {
            name.removeprefix("test_"): float(values.mean())
            for name, values in found.items()
            if name.startswith("test_")
        }
        single = self.scoring is None or isinstance(self.scoring, str) or callable(self.scoring)
        return scores["score"] if single and list(scores) == ["score"] else scores


def _named(name: str, score: Any, ending: str = "") -> dict[str, float]:
    """Return the names and values that a score is logged under."""
    if not isinstance(score, Mapping):
        return {name + ending: score}
    return {f"{name}_{scorer}{ending}": value for scorer, value in score.items()}


def embed_between_steps(model: Any, X: Any) -> np.ndarray:
    """Return what ``transform`` gives for X, float32, on every process, during a fit of the model.

    The state of the model does not change.
    """
    return np.concatenate([features for _, features, _ in _embed(model, X)])


def _embed(model: Any, X: Any) -> list[tuple[Any, ...]]:
    """Return number, embeddings and targets of each batch of X, in order, on every process."""
    loader = model._inference_loader(X)
    rank, processes = world()
    training = [module for module in model.modules() if module.training]
    own = []
    model.eval()
    try:
        with torch.no_grad(), fork_rng():
            for number, batch in enumerate(PredictShards(loader).predict_dataloader()):
                x, y = single_view(batch)
                features = model.transform_step(x.to(model.device, model.dtype), number)
                y = y.cpu().numpy() if isinstance(y, torch.Tensor) else y
                own.append((rank + number * processes, features.float().cpu().numpy(), y))
    finally:
        for module in training:
            module.training = True
    return gather_in_order(own)
