"""scikit-learn's own contract, and the tools around it."""

from __future__ import annotations

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from nidl_dcl import DCL

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Rows(nn.Sequential):
    """Encodes rows of any length."""

    def __init__(self, n_features: int = 4) -> None:
        super().__init__(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, n_features))


def small(**kwargs):
    options = {
        "proj_input_dim": 4,
        "proj_hidden_dim": 4,
        "proj_output_dim": 3,
        "lr_scheduler": None,
        "max_epochs": 1,
        "random_state": 0,
        **QUIET,
        **kwargs,
    }
    return DCL(Rows, **options)


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)


def expected_failures(estimator):
    return {"check_no_attributes_set_in_init": "Lightning sets private attributes in __init__"}


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks([small()], expected_failed_checks=expected_failures)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_clone_of_a_fitted_estimator_carries_no_trained_weights(rows):
    model = small(random_state=None).fit(rows)
    twin = clone(model)
    assert not twin.fitted
    with pytest.raises(NotFittedError):
        twin.transform(rows)
    assert isinstance(twin.encoder[0].weight, nn.UninitializedParameter)


def test_get_params_are_the_callers_own_objects():
    encoder, options = nn.Linear(6, 4), {"eps": 1e-9}
    model = DCL(encoder, optimizer_kwargs=options, max_epochs=3, views=abs)
    params = model.get_params()
    assert params["encoder"] is encoder
    assert params["optimizer_kwargs"] is options
    assert (params["max_epochs"], params["views"], params["temperature"]) == (3, abs, 0.1)


def test_the_callers_encoder_is_not_changed(rows):
    encoder = nn.Linear(6, 4)
    before = encoder.weight.detach().clone()
    DCL(encoder, proj_input_dim=4, max_epochs=1, lr_scheduler=None, **QUIET).fit(rows)
    assert torch.equal(encoder.weight, before)


@pytest.mark.slow
def test_pipeline_and_cross_val_predict_with_two_jobs(rows):
    pipeline = make_pipeline(small(), Ridge())
    predicted = cross_val_predict(pipeline, rows, rows[:, 0], cv=2, n_jobs=2)
    assert predicted.shape == (24,)


@pytest.mark.filterwarnings("ignore:.*scikit-learn.*")
def test_grid_search_over_an_option_of_the_trainer(rows):
    search = GridSearchCV(
        make_pipeline(small(), Ridge()),
        {"dcl__max_epochs": [1, 2], "dcl__temperature": [0.1, 0.5]},
        cv=2,
    )
    search.fit(rows, rows[:, 0])
    assert search.best_params_.keys() == {"dcl__max_epochs", "dcl__temperature"}


def test_column_transformer_and_pandas_output(rows):
    frame = pd.DataFrame(rows, columns=list("abcdef"), index=[f"sub-{i:02d}" for i in range(24)])
    both = ColumnTransformer([("dcl", small(), ["a", "b"]), ("rest", "passthrough", ["c"])])
    out = both.set_output(transform="pandas").fit_transform(frame)
    assert list(out.columns) == [f"dcl__dcl{i}" for i in range(4)] + ["rest__c"]
    assert list(out.index) == list(frame.index)


def test_feature_names(rows):
    assert list(small().fit(rows).get_feature_names_out()) == ["dcl0", "dcl1", "dcl2", "dcl3"]


def test_frozen_estimator(rows):
    model = small().fit(rows)
    frozen = FrozenEstimator(model)
    np.testing.assert_array_equal(frozen.fit(rows[:5], None).transform(rows), model.transform(rows))


def test_joblib_before_and_after_fit(rows, tmp_path):
    model = small()
    joblib.dump(model, tmp_path / "new.joblib")
    again = joblib.load(tmp_path / "new.joblib").fit(rows)
    model.fit(rows)
    np.testing.assert_array_equal(again.transform(rows), model.transform(rows))
    joblib.dump(model, tmp_path / "fitted.joblib")
    loaded = joblib.load(tmp_path / "fitted.joblib")
    np.testing.assert_array_equal(loaded.transform(rows), model.transform(rows))


def test_representations(rows):
    model = small()
    assert repr(model).startswith("DCL(")
    assert "DCL" in model._repr_html_()
    assert "DCL" in model.fit(rows)._repr_html_()


def test_an_unknown_option_names_the_closest_one():
    with pytest.raises(TypeError, match="Did you mean 'max_epochs'"):
        small(max_epoch=3)
    with pytest.raises(TypeError, match="Did you mean 'temperature'"):
        small(temprature=3)
    with pytest.raises(ValueError, match="Invalid parameter 'max_epoch'"):
        small().set_params(max_epoch=3)


def test_metadata_is_routed_to_fit(rows):
    validation = rows[:6]
    seen = []

    class Seen(DCL):
        def fit(self, X, y=None, val_dataloader=None, ckpt_path=None):
            seen.append(val_dataloader)
            return super().fit(X, y, val_dataloader, ckpt_path)

    with sklearn.config_context(enable_metadata_routing=True):
        model = Seen(**small().get_params()).set_fit_request(val_dataloader=True)
        make_pipeline(model).fit(rows, val_dataloader=validation)
    assert seen[0] is validation
