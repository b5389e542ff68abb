"""What `fit` and `transform` take, what they take it for, and what they refuse."""

from __future__ import annotations

import os
import signal

import lightning as L
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import RandFlip
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from nidl_dcl import DCL, MultiViewsTransform, TwoViews
from nidl_dcl.data.datasets import read_item

VOLUMES = torch.rand(8, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
PLAIN = VOLUMES[:, 0].numpy()


class Small(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, width, 3, stride=2), nn.BatchNorm3d(width), nn.ReLU()
        )

    def forward(self, x):
        return self.layers(x).mean(dim=(2, 3, 4))


def make(**options):
    options = {
        "encoder": Small,
        "proj_input_dim": 4,
        "proj_hidden_dim": 8,
        "proj_output_dim": 4,
        "max_epochs": 1,
        "lr_scheduler": None,
        "random_state": 0,
        "batch_size": 4,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        **options,
    }
    return DCL(**options)


@pytest.fixture(scope="module")
def expected():
    return make().fit(VOLUMES).transform(VOLUMES).numpy()


class Items(Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return len(VOLUMES)

    def __getitem__(self, i):
        return self.item(i)


def read_only():
    array = PLAIN.copy()
    array.setflags(write=False)
    return array


@pytest.mark.parametrize(
    "given",
    [
        TensorDataset(VOLUMES),
        TensorDataset(VOLUMES, torch.arange(8)),
        Items(lambda i: VOLUMES[i].numpy()),
        Items(lambda i: (VOLUMES[i].numpy()[:, ::-1][:, ::-1], f"sub-{i}")),
        PLAIN[::-1].copy()[::-1],
        PLAIN[:, :, ::-1].copy()[:, :, ::-1],
        PLAIN.astype(">f4"),
        np.asfortranarray(PLAIN),
        read_only(),
        list(PLAIN),
        list(VOLUMES),
    ],
    ids=["one tensor", "tensor and label", "arrays", "negative strides in items", "negative strides",
         "negative strides inside", "foreign byte order", "Fortran order", "read-only",
         "list of arrays", "list of tensors"],
)  # fmt: skip
def test_samples_in_any_form_are_the_same_samples(given, expected):
    found = make().fit(given).transform(given)
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_one_image_or_path_is_a_list_of_one(tmp_path):
    image = nib.Nifti1Image(PLAIN[0], np.diag([4, 4, 4, 1]))
    nib.save(image, tmp_path / "image.nii.gz")
    model = make().fit([image, image])
    for given in (image, tmp_path / "image.nii.gz", str(tmp_path / "image.nii.gz")):
        np.testing.assert_array_equal(model.transform(given), model.transform([image]))


MASKS = (VOLUMES > 0.5).float()


@pytest.mark.parametrize("masks", [MASKS, MASKS.long()])
def test_a_tuple_in_a_dataset_is_a_sample_and_its_target_of_whatever_shape(
    masks, expected, recwarn
):
    given = Items(lambda i: (VOLUMES[i], masks[i]))
    model = make().fit(given)
    taken_for = [w for w in recwarn if "taken for a sample and its target" in str(w.message)]
    assert len(taken_for) == (masks is MASKS)
    features, targets = model.transform_with_targets(given)
    np.testing.assert_array_equal(features, expected)
    np.testing.assert_array_equal(targets, masks.numpy())


def test_a_list_in_a_dataset_is_two_views():
    (x1, x2), y = read_item(([VOLUMES[0], MASKS[0]], 7))
    assert y == 7
    assert torch.equal(x1, VOLUMES[0])
    assert torch.equal(x2, MASKS[0])
    given = Items(lambda i: [VOLUMES[i], VOLUMES[i] + 0.1])
    model = make().fit(given)
    with pytest.raises(ValueError, match="two views of each sample"):
        model.transform(given)


def test_a_loader_of_images_and_masks_is_not_taken_for_two_views():
    loader = DataLoader(Items(lambda i: (VOLUMES[i], MASKS[i].long())), batch_size=4)
    with pytest.raises(ValueError, match=r"one dtype, got torch\.float32 and torch\.int64"):
        make().fit(loader)


@pytest.mark.parametrize(
    ("item", "got"),
    [
        (lambda i: {"image": VOLUMES[i]}, r"dict with keys \['image'\]"),
        (lambda i: (VOLUMES[i], 1, 2), r"tuple\(Tensor\(1, 12, 12, 12\), int, int\)"),
        (lambda i: "text", "str"),
        (lambda i: ({"image": VOLUMES[i]}, 1), r"tuple\(dict"),
        (lambda i: (), r"tuple\(\)"),
    ],
)
def test_other_items_are_refused_with_what_is_taken(item, got):
    model = make()
    model.fitted = True
    for method in (model.fit, model.transform):
        with pytest.raises(TypeError, match=r"\(x, y\), or \[x1, x2\].*got " + got):
            method(Items(item))


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ({"a": 1}, "dict with keys"),
        (None, "NoneType"),
        ([{"image": VOLUMES[0]}], r"list\(dict"),
        ((x for x in VOLUMES), "generator"),
        ([DataLoader(VOLUMES), DataLoader(VOLUMES)], "DataLoader, DataLoader"),
    ],
)
def test_other_inputs_are_refused_with_what_is_taken(given, got):
    model = make()
    model.fitted = True
    for method in (model.fit, model.transform):
        with pytest.raises(TypeError, match=f"X must be a DataLoader.*list of arrays.*got.*{got}"):
            method(given)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([*list(PLAIN[:2]), PLAIN[2, 1:]], "must have one shape"),
        (PLAIN[0], r"\(12, 12, 12\).*X\[None\]"),
        (nib.Nifti1Image(np.zeros((4, 4, 4, 3)), np.eye(4)), "holds 3 volumes"),
        ("no/such/file.nii.gz", r"no/such/file\.nii\.gz: There is no such file"),
    ],
)
def test_what_cannot_be_read_is_said(given, why):
    with pytest.raises(ValueError, match=why):
        make().fit(given)


def test_a_stream_is_for_a_loader():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(VOLUMES)

    with pytest.raises(TypeError, match="IterableDataset in a DataLoader"):
        make().fit(Stream())


class Module(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([[x, x + 0.1] for x in VOLUMES], batch_size=4)


def test_a_data_module_needs_a_loader_to_predict():
    model = make().fit(Module())
    with pytest.raises(TypeError, match="Module has no predict_dataloader"):
        model.transform(Module())


# -- validation data and batches --------------------------------------------------------------


@pytest.mark.parametrize("place", ["y", "val_dataloader"])
@pytest.mark.parametrize(
    "validation",
    [
        DataLoader([[x, x + 0.1] for x in VOLUMES], batch_size=4),
        TensorDataset(VOLUMES),
        [TensorDataset(VOLUMES), DataLoader([[x, x + 0.1] for x in VOLUMES], batch_size=4)],
    ],
)
def test_loaders_and_datasets_are_validated_on_wherever_they_are_given(place, validation):
    seen = {}

    class Keep(L.Callback):
        def on_validation_end(self, trainer, module):
            seen.update(trainer.callback_metrics)

    make(callbacks=[Keep()]).fit(VOLUMES, **{place: validation})
    if isinstance(validation, list):
        assert {"loss/val/dataloader_idx_0", "loss/val/dataloader_idx_1"} <= set(seen)
    else:
        assert "loss/val" in seen


def test_targets_in_the_place_of_validation_data_are_without_effect(expected):
    for y in (np.arange(8), list(range(8)), ["a"] * 8, []):
        np.testing.assert_array_equal(make().fit(PLAIN, y).transform(PLAIN), expected)


@pytest.mark.parametrize("limit", [None, 0])
def test_a_fit_without_batches_is_an_error(limit):
    loader = DataLoader([[x, x] for x in VOLUMES], batch_size=9 if limit is None else 4,
                        drop_last=True)  # fmt: skip
    model = make(limit_train_batches=limit)
    with pytest.raises(ValueError, match="training loader gave no batch"):
        model.fit(loader)
    assert not model.fitted


def test_no_epochs_are_no_error():
    assert make(max_epochs=0).fit(VOLUMES).fitted


# -- views, encoders, interruption ------------------------------------------------------------


@pytest.mark.parametrize(
    "views",
    [TwoViews(RandFlip(prob=1)), MultiViewsTransform(RandFlip(prob=1), n_views=2), lambda x: {}],
)
def test_views_that_do_not_give_one_view_are_refused(views):
    with pytest.raises(TypeError, match="makes one view of a sample, and is called twice"):
        make(views=views).fit(VOLUMES)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda h: (h.mean(dim=(2, 3, 4)), h), r"tuple\(Tensor\(\d, 4\)"),
        (lambda h: h, r"Tensor\(\d, 4, 5, 5, 5\)"),
        (lambda h: {"h": h}, "dict"),
    ],
)
@pytest.mark.filterwarnings("ignore:chunk_size")
def test_an_encoder_of_another_form_is_refused_with_what_to_do(output, got):
    class Other(Small):
        def forward(self, x):
            return output(self.layers(x))

    match = rf"\(n, features\).*got {got}.*AdaptiveAvgPool3d.*returns one"
    with pytest.raises(ValueError, match=match):
        make(encoder=Other).fit(VOLUMES)
    with pytest.raises(ValueError, match=match):
        make(encoder=Other, batch_size=8, chunk_size=4).fit(VOLUMES)
    model = make(encoder=Other)
    model.fitted = True
    with pytest.raises(ValueError, match=match):
        model.transform(VOLUMES[:4])


def test_a_misspelt_argument_of_the_encoder_names_the_closest():
    with pytest.raises(TypeError, match=r"Small has no argument 'widht'.*Did you mean 'width'"):
        make(encoder_kwargs={"widht": 8}).fit(VOLUMES)


def test_after_an_interruption_the_weights_are_usable():
    class Interrupt(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        model = make(max_epochs=5, callbacks=[Interrupt()])
        with (
            pytest.warns(UserWarning, match="interrupted after 3 steps"),
            pytest.raises(KeyboardInterrupt),
        ):
            model.fit(VOLUMES)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert model.fitted
    assert model.transform(VOLUMES).shape == (8, 4)


def test_the_progress_bar_of_an_encoding_has_a_total(capsys):
    make(enable_progress_bar=True).fit(VOLUMES).transform(DataLoader(VOLUMES, batch_size=3))
    shown = capsys.readouterr()
    assert "3/3" in (shown.out + shown.err).split("Predicting")[-1]


def test_the_embedding_of_an_image_does_not_depend_on_the_others():
    images = [nib.Nifti1Image(volume, np.diag([4, 4, 4, 1])) for volume in PLAIN[:6]]
    model = make().fit(images)
    together = model.transform(images)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(together[i : i + 1], model.transform([image]))
    assert together.shape == (6, 4)
    np.testing.assert_array_equal(model.transform(images[::-1]), together[::-1])
