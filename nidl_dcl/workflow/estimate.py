"""How long the stages after a training take, from small pieces of them that are really done.

What a training costs is measured in `dry_run`, preprocessing in `preprocess`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from torch.utils.data import Dataset

from nidl_dcl.data.loaders import image_loader
from nidl_dcl.errors import InputsUnusableError
from nidl_dcl.evaluation.baselines import Baseline
from nidl_dcl.evaluation.occlusion import find_inside, lay_blocks
from nidl_dcl.evaluation.prediction import predict_phenotype
from nidl_dcl.models.baselines import UNTRAINED_SEEDS, average_blocks
from nidl_dcl.models.dcl import DCL
from nidl_dcl.volumes.quality import measure_quality
from nidl_dcl.workflow.occlusion_maps import PEOPLE
from nidl_dcl.workflow.options import PredictionOptions

_PAGES = 4
"""A study writes its report before and after training, after embedding, and at the end."""

_PAGE_SECONDS, _TARGET_SECONDS = 2.0, 0.5
"""Of a report without targets, and for each of them: pictures, which hardly depend on the data."""

_MOST_PEOPLE = 300
"""Participants that a prediction is measured on; beyond, time is taken to grow with their square."""

_PERMUTATIONS = 20


class FewVolumes(Dataset[Tensor]):
    """A few volumes in memory, over and over."""

    def __init__(self, volumes: Sequence[Tensor], count: int) -> None:
        self.volumes, self.count = volumes, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.volumes[index % len(self.volumes)]


def measure_encoding(model: DCL, volumes: Sequence[Tensor]) -> tuple[float, int]:
    """Return the seconds to encode one volume, and the length of its embedding."""
    model.fitted = True  # only the time counts
    model.set_params(devices=1, enable_progress_bar=False, enable_model_summary=False)
    loader = image_loader(FewVolumes(volumes, 8), 0)
    model.transform(loader)  # the first time costs more
    seconds, features = _timed(lambda: model.transform(loader))
    return seconds / 8, int(features.shape[1])


def measure_reading(volumes: Sequence[Tensor], spacing: Sequence[float]) -> tuple[float, int]:
    """Return the seconds to look at one prepared volume, and the number of its coarse voxels."""
    volume = volumes[0][0].numpy()
    seconds, _ = _timed(lambda: measure_quality(volume, spacing))
    return seconds, average_blocks(volume, spacing).size


def prediction_seconds(
    images: pd.DataFrame,
    target: str,
    site: str | None,
    prediction: PredictionOptions,
    *,
    n_features: int,
    n_voxels: int,
) -> float:
    """Return how long the cross-validation of a target takes, from one repeat of random features.

    Parameters
    ----------
    images : DataFrame
        Of a data module.
    target : str
        Column to predict.
    site : str or None
        Column of sites.
    prediction : PredictionOptions
        Confounds and harmonization.
    n_features, n_voxels : int
        Of the embeddings, and of the coarse voxels.
    """
    people = images["group_id"].unique()
    some = people[np.linspace(0, len(people) - 1, min(len(people), _MOST_PEOPLE)).astype(int)]
    images = images[images["group_id"].isin(some)].reset_index(drop=True)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((len(images), n_features))
    voxels = Baseline(rng.standard_normal((len(images), n_voxels)), pca=True)
    baselines = {"untrained": [features] * UNTRAINED_SEEDS, "voxels": voxels}
    given: dict[str, Any] = {
        "confounds": images[prediction.confounds] if prediction.confounds else None,
        "harmonize": prediction.harmonize,
        "site": images[site] if site is not None else None,
        "target": target,
        "scaling": "shared",
        "random_state": 0,
    }

    def once(**more: Any) -> float:
        def predict() -> object:
            options = {**given, **more, "n_repeats": 1}
            return predict_phenotype(features, images[target], images["group_id"], **options)

        return _timed(predict)[0]

    usual = inspect.signature(predict_phenotype).parameters
    repeats, permutations = (usual[n].default for n in ("n_repeats", "n_permutations"))
    try:
        whole = once(baselines=baselines, n_permutations=0)
        alone = once(learning_curve=False, n_permutations=0)
        permuted = once(learning_curve=False, n_permutations=_PERMUTATIONS)
    except InputsUnusableError:  # of so few; or only another cohort's readout is applied
        return 0.0
    seconds = repeats * whole + permutations * max(0.0, permuted - alone) / _PERMUTATIONS
    return float(seconds * (len(people) / len(some)) ** 2)


def occlusion_images(volume: Tensor, spacing: Sequence[float], n_targets: int) -> int:
    """Return how many volumes with a hidden block are encoded.

    Parameters
    ----------
    volume : Tensor, shape (1, d, h, w)
        A prepared one, in place of the mean brain.
    spacing : sequence of float
        In mm.
    n_targets : int
        Targets.
    """
    blocks = lay_blocks(find_inside(volume[0].numpy()), spacing)
    few = len(blocks.thinned)
    return 2 + len(blocks) + few + n_targets * PEOPLE * (1 + few)


def report_seconds(n_targets: int) -> float:
    """Return how long a study writes at its report, all times together."""
    return _PAGES * (_PAGE_SECONDS + _TARGET_SECONDS * n_targets)


def duration(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result
