"""What all detectors share: pytorch-ood's protocol, checks, and the way from a loader to features."""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ccl_fast.checks import (
    check_finite,
    check_floating,
    check_has_values,
    check_matrix,
    check_tensor,
    check_vector,
    whole_numbers,
)
from ccl_fast.errors import ArgumentError, NotFittedError
from ccl_fast.ops.precision import accumulation_dtype


class FeatureDetector(ABC):
    """Base of the detectors. Scores are higher for outliers; labels below 0 mark outliers and are not fitted to.

    Names and behaviour are those of ``FeaturesDetector`` in pytorch-ood 0.4, which this package does not need: if
    pytorch-ood has been imported by the time a detector is made, its benchmarks and its grid search take the detector
    for one of their own. What is raised without a model or before the fit is then its ``ModelNotSetException`` or its
    ``RequiresFittingException`` too.

    Features are finite, of any floating-point dtype; float64 is computed with in float64, all others in float32, also
    under autocast. Fitted tensors live on ``device``, inputs are moved there, scores come from there.

    Args:
        model: images [n, ...] -> features [n, D]; only ``fit`` and ``predict`` need it. A module, or a module's method,
            is run in evaluation mode, without gradients, and left as it was.

    Attributes:
        device: set by ``to``, or by the first fit; None before.

    A subclass implements ``_fit(x, y)``, where y are cluster ids 0, 1, ... without a gap or None, and ``_score(x)``;
    ``_tensors`` names what its ``_fit`` sets.
    """

    requires_fit = True
    # Attributes that a fit sets, all of them tensors.
    _tensors: ClassVar[tuple[str, ...]] = ()
    # Values that a search may try, by attribute.
    hyperparameter_space: ClassVar[dict[str, list]] = {}

    def __new__(cls, *args, **kwargs):  # also called when a detector is unpickled
        theirs = getattr(sys.modules.get("pytorch_ood.api"), "FeaturesDetector", None)
        if theirs is not None:
            theirs.register(FeatureDetector)
        return super().__new__(cls)

    def __init__(self, model: Callable[[Tensor], Tensor] | None = None):
        if model is not None and not callable(model):
            raise ArgumentError(f"model: expected a callable images -> features or None, got {type(model).__name__}")
        self.model = model
        self.device: torch.device | None = None
        self._width: int | None = None  # D, once fitted
        self._dtype: torch.dtype | None = None
        self._check_hyperparameters()

    @property
    def encoder(self) -> Callable[[Tensor], Tensor] | None:
        """pytorch-ood's name for the model; its benchmarks compute features once for all detectors that share it."""
        return self.model

    def fit(self, data_loader: Iterable, device: torch.device | str | None = None) -> FeatureDetector:
        """``fit_features`` on the model's features of a loader's images.

        Args:
            data_loader: of batches ``(images, labels)``, labels [n] as those of ``fit_features``; or of images alone.
            device: where model and detector go first; None: they stay, and the images come to the model.

        Returns:
            self.

        Raises:
            ValueError: there is no model, or no image with a label >= 0; or as ``fit_features``.
        """
        model = self._needed_model("fit")
        if device is not None:
            self.to(device)
        features, labels = [], []
        with _evaluation(model):
            for batch in data_loader:
                images, y = _images_and_labels(batch)
                if y is not None:
                    inside = y >= 0
                    images = images[inside.to(images.device)]
                    labels.append(y[inside])
                if len(images):
                    features.append(self._embed(model, images))
        if not features:
            raise ArgumentError("data_loader: expected at least one image with a label >= 0, got none")
        return self.fit_features(torch.cat(features), torch.cat(labels) if labels else None)

    def predict(self, x: Tensor) -> Tensor:
        """Scores [n] of images x, [n, ...], through the model; ``detector(x)`` is the same. Raises ValueError."""
        model = self._needed_model("predict")
        check_tensor("x", x)
        with _evaluation(model):
            features = self._embed(model, x)
        return self.predict_features(features)

    __call__ = predict

    @torch.no_grad()
    def fit_features(self, x: Tensor, y: Tensor | None = None) -> FeatureDetector:
        """Fit to training features.

        Args:
            x: floating point [N, D], finite.
            y: cluster ids [N], integers or whole numbers of a floating dtype; rows with y < 0 are ignored. None: a
                detector that needs clusters makes its own.

        Returns:
            self.

        Raises:
            ValueError: naming the argument, what was expected and what came; also if there are too few rows.
        """
        check_matrix("x", x)
        check_floating("x", x)
        check_has_values("x", x, "to which it is fitted")
        if y is not None:
            y = _cluster_ids("y", y, len(x))
            inside = y >= 0
            x, y = x[inside.to(x.device)], y[inside].unique(return_inverse=True)[1]
        if not len(x):
            raise ArgumentError(f"x: expected at least one row{'' if y is None else ' with a label >= 0'}, got none")
        if not x.shape[1]:
            raise ArgumentError(f"x: expected at least one feature, got shape {list(x.shape)}")
        x = x.to(self.device or x.device, accumulation_dtype(x))
        check_finite("x", x)
        with torch.autocast(x.device.type, enabled=False):
            self._fit(x, None if y is None else y.to(x.device))
        self.device, self._dtype, self._width = x.device, x.dtype, x.shape[1]
        return self

    @torch.no_grad()
    def predict_features(self, x: Tensor) -> Tensor:
        """Scores of features, higher = more outlying.

        Args:
            x: floating point [M, D], finite.

        Returns:
            [M], float32 (float64 if the training features were).

        Raises:
            NotFittedError: (a RuntimeError) the detector is not fitted.
            ValueError: naming the argument, what was expected and what came.
        """
        self._check_fitted()
        check_matrix("x", x, self._width)
        check_floating("x", x)
        check_has_values("x", x, "which are scored")
        x = x.to(self.device, self._dtype)
        check_finite("x", x)
        with torch.autocast(x.device.type, enabled=False):
            return self._score(x)

    def state_dict(self) -> dict[str, Tensor]:
        """What the fit has found, to be kept in a file: tensors and nothing else; the model is no part of it.

        Returns:
            Tensors by name, not copied; of detectors inside this one under "<where>.<name>"; "input" is [0, D] and has
            the width and the dtype of the features.

        Raises:
            NotFittedError: (a RuntimeError) the detector is not fitted.
            ValueError: it holds a detector of another library's.

        Example:
            >>> import torch
            >>> from ccl_fast.ood import NearestNeighbor
            >>> features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
            >>> fitted = NearestNeighbor(k=2).fit_features(features)
            >>> again = NearestNeighbor(k=2).load_state_dict(fitted.state_dict())
            >>> again.predict_features(features).equal(fitted.predict_features(features))
            True
        """
        self._check_fitted()
        state = {"input": torch.empty(0, self._width or 0, dtype=self._dtype, device=self.device)}
        state |= {name: getattr(self, name) for name in self._tensors}
        for where, detector in self._inside().items():
            state |= {f"{where}.{name}": tensor for name, tensor in detector.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Self:
        """Take over what another detector, made with the same arguments, has found; its scores are then this one's.

        Args:
            state: of its ``state_dict``.

        Returns:
            self, on the device of the tensors.

        Raises:
            ValueError: these are not the tensors of such a detector.
        """
        inside = self._inside()
        own, of_inside = {}, {where: {} for where in inside}
        for name, tensor in state.items():
            where = next((where for where in inside if name.startswith(f"{where}.")), None)
            group = own if where is None else of_inside[where]
            group[name if where is None else name.removeprefix(f"{where}.")] = tensor
        expected = {"input", *self._tensors}
        if own.keys() != expected:
            raise ArgumentError(f"state: expected {', '.join(sorted(expected))}, got {', '.join(sorted(own))}")
        for name, tensor in own.items():
            check_tensor(f"state[{name!r}]", tensor)
        check_matrix("state['input']", own["input"])
        for where, detector in inside.items():
            detector.load_state_dict(of_inside[where])
        for name in self._tensors:
            setattr(self, name, own[name])
        self.device, self._dtype, self._width = own["input"].device, own["input"].dtype, own["input"].shape[1]
        return self

    def to(self, device: torch.device | str) -> FeatureDetector:
        """Move model and fitted tensors, and what comes later, to the device. Returns self."""
        self.device = torch.device(device)
        for name, value in vars(self).items():
            setattr(self, name, _moved(value, self.device))
        return self

    def get_hyperparameters(self) -> dict:
        """The present values of the names in ``hyperparameter_space``."""
        return {name: getattr(self, name) for name in self.hyperparameter_space}

    def set_hyperparameters(self, **values) -> FeatureDetector:
        """Set values of names in ``hyperparameter_space``, for the next fit. Returns self; raises ValueError."""
        for name, value in values.items():
            if name not in self.hyperparameter_space:
                raise ArgumentError(f"{name}: expected one of {sorted(self.hyperparameter_space)}, got {name!r}")
            setattr(self, name, value)
        self._check_hyperparameters()
        return self

    @abstractmethod
    def _fit(self, x: Tensor, y: Tensor | None) -> None:
        """Fit to finite rows [N, D], N >= 1; y: int64 [N], clusters from 0 without gaps, or None."""

    @abstractmethod
    def _score(self, x: Tensor) -> Tensor:
        """Scores [M] of finite rows [M, D]."""

    def _check_hyperparameters(self) -> None:  # noqa: B027 (a detector may have nothing to check)
        """Raises ValueError."""

    def _inside(self) -> dict[str, FeatureDetector]:
        """The detectors that this one is made of, by where they are."""
        return {}

    def _check_fitted(self) -> None:
        if self._width is None:
            not_fitted = _also_theirs(NotFittedError, "RequiresFittingException")
            raise not_fitted(f"this {type(self).__name__} is not fitted yet: call fit or fit_features first")

    def _needed_model(self, method: str) -> Callable[[Tensor], Tensor]:
        if self.model is None:
            no_model = _also_theirs(ArgumentError, "ModelNotSetException")
            raise no_model(f"model: expected one for {method}, got None; or use {method}_features")
        return self.model

    def _embed(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        device = next((p.device for module in _modules(model) for p in module.parameters()), self.device)
        features = model(images if device is None else images.to(device))
        check_matrix("model(images)", features)
        return features


def _also_theirs(error: type[Exception], name: str) -> type[Exception]:
    """An error that is also pytorch-ood's of that name, which only those can catch who have imported it."""
    theirs = getattr(sys.modules.get("pytorch_ood.api"), name, None)
    return error if theirs is None else type(error.__name__, (error, theirs), {})


def _images_and_labels(batch) -> tuple[Tensor, Tensor | None]:
    """Of a loader's batch."""
    images, y = (batch, None) if isinstance(batch, Tensor) else (None, None)
    if isinstance(batch, tuple | list) and batch:
        images, y = batch[0], batch[1] if len(batch) > 1 else None
    if not isinstance(images, Tensor):
        got = type(batch).__name__ if images is None else f"images of type {type(images).__name__}"
        raise ArgumentError(f"data_loader: expected batches (images, labels) or images, as tensors, got {got}")
    return images, None if y is None else _cluster_ids("data_loader's labels", y, len(images))


def _cluster_ids(name: str, y, n: int) -> Tensor:
    """Checked ids [n], int64; those that are bool are a mask."""
    check_vector(name, y, n)
    check_has_values(name, y, "to which it is fitted")
    if y.dtype != torch.bool:
        y = whole_numbers(y)
    if y.dtype != torch.int64:
        raise ArgumentError(f"{name}: expected whole numbers, got {y.dtype}")
    return y


@contextlib.contextmanager
def _evaluation(model: Callable) -> Iterator[None]:
    """Without gradients and in evaluation mode; every module gets back the mode it had."""
    training = [part for module in _modules(model) for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def _modules(model: Callable) -> list[nn.Module]:
    """The module behind a callable: itself, or the one whose method it is; none behind a plain function."""
    owner = getattr(model, "__self__", model)
    return [owner] if isinstance(owner, nn.Module) else []


def _moved(value, device: torch.device):
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    for module in _modules(value):
        module.to(device)
    return value.to(device) if hasattr(value, "to") else value
