"""A probe: a score of frozen embeddings on known targets, measured during training.

The encoder and the random state are left unchanged: training with a probe ends as without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import sklearn.base
import torch
from sklearn.model_selection import GroupKFold, KFold, cross_val_score

from nidl_dcl.data.batches import single_view
from nidl_dcl.data.loaders import PredictShards
from nidl_dcl.distributed import first_value, world
from nidl_dcl.models.transformer import gather_in_order


class Probe(L.Callback):
    """Callback that cross-validates a scikit-learn estimator on frozen embeddings, every few epochs.

    The mean score over the folds is logged as ``probe/<name>``, where loggers, ``ModelCheckpoint``
    and ``EarlyStopping`` find it. Beside it stands what the training has to beat, if asked for: the
    network before training, as ``probe/<name>_untrained``, and each baseline, as
    ``probe/<name>_<baseline>``, on the same folds.

    Parameters
    ----------
    estimator : scikit-learn estimator
        Cloned for each fold.
    X : anything that ``transform`` takes
        The samples, one view of each: a loader, an array, paths, …
    y : array of shape (n,)
        Targets in the order of `X`.
    groups : array of shape (n,), optional
        Participants; the images of one are never split between training and test.
    name : str, default="score"
        Ending of the logged name.
    every : int, default=5
        Epochs from one measurement to the next; the last epoch is always measured.
    scoring : str or callable, optional
        As in scikit-learn; by default the estimator's own score.
    cv : int, default=5
        Number of folds.
    untrained : bool, default=False
        Measure the network before the first epoch too. A fit that resumes keeps that measurement.
    baselines : mapping of str to array of shape (n, features), optional
        Other features of the same samples, such as ``{"voxels": voxels}``, scored once.

    Attributes
    ----------
    scores : list of (int, float)
        Epoch, from 1, and mean score.
    baseline_scores : dict of str to float
        Mean score of each baseline, and of the network before training as ``"untrained"``.

    Raises
    ------
    ValueError
        In training, when `y`, `groups` or a baseline has another length than `X`.

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
        y: Any,
        *,
        groups: Any = None,
        name: str = "score",
        every: int = 5,
        scoring: Any = None,
        cv: int = 5,
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
        self.cv = cv
        self.untrained = untrained
        self.baselines = baselines
        self.scores: list[tuple[int, float]] = []
        self.baseline_scores: dict[str, float] = {}

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint: several probes have one each."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, float]:
        """Return the scores of the baselines: what a resumed fit cannot measure again."""
        return dict(self.baseline_scores)

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Take the scores of the baselines from a checkpoint."""
        self.baseline_scores = dict(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure the baselines and, unless the fit resumes, the network as it is."""
        if self.untrained and trainer.global_step == 0:
            self.baseline_scores["untrained"] = self._measure(
                embed_between_steps(pl_module, self.X), "X"
            )
        for name, features in (self.baselines or {}).items():
            self.baseline_scores[name] = self._measure(np.asarray(features), f"baseline {name!r}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure after every `every` epochs, and after the last one."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every and epoch != trainer.max_epochs:
            return
        score = self._measure(embed_between_steps(pl_module, self.X), "X")
        self.scores.append((epoch, score))
        found = {f"{self.name}_{name}": value for name, value in self.baseline_scores.items()}
        for name, value in {**found, self.name: score}.items():
            pl_module.log(f"probe/{name}", value, batch_size=1, sync_dist=True)

    def _measure(self, features: np.ndarray, source: str) -> float:
        for what, values in (("y", self.y), ("groups", self.groups)):
            if values is not None and len(values) != (n := len(features)):
                raise ValueError(
                    f"The probe has {n} samples in {source} and {len(values)} in {what}."
                )
        # One process scores, so that all log the same number.
        return first_value(self._score(features) if world()[0] == 0 else None)

    def _score(self, features: np.ndarray) -> float:
        folds = KFold(self.cv, shuffle=True, random_state=0)
        found = cross_val_score(
            sklearn.base.clone(self.estimator),
            features,
            np.asarray(self.y),
            groups=self.groups,
            cv=folds if self.groups is None else GroupKFold(self.cv),
            scoring=self.scoring,
        )
        return float(found.mean())


def embed_between_steps(model: Any, X: Any) -> np.ndarray:
    """Return what ``transform`` gives for X, float32, on every process, during a fit of the model.

    The state of the model does not change.
    """
    loader = model._inference_loader(X)
    rank, processes = world()
    training = [module for module in model.modules() if module.training]
    own = []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
            for number, batch in enumerate(PredictShards(loader).predict_dataloader()):
                x, _ = single_view(batch)
                features = model.transform_step(x.to(model.device, model.dtype), number)
                own.append((rank + number * processes, features.float().cpu().numpy()))
    finally:
        for module in training:
            module.training = True
    return np.concatenate([rows for _, rows in gather_in_order(own)])
