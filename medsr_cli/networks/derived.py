"""Tensors that are computed from parameters once, and again only when a parameter has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class Derived(Generic[Made]):
    """What inference makes of parameters: never in a checkpoint, never copied, remade when they change.

    A change is another tensor, type or device, or an operation in place (an optimiser's step, the loading of a
    state_dict). Not every operation is counted: fused optimisers and `.data` leave no trace in the version. So on
    the CPU the sum of a parameter's values is looked at too, which costs a thousandth of a forward; and modules
    that own one of these call `forget` from their `_apply` and from every forward that can be trained on. Made
    outside inference mode whoever asks first.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._made: Made | None = None

    def of(self, parameters: tuple[Tensor | None, ...], make: Callable[[], Made]) -> Made:
        """`make()`, or what it returned last time if the parameters are still the same."""
        key = tuple(map(_state, parameters))
        if self._made is None or key != self._key:
            with torch.inference_mode(False), torch.no_grad():
                self._made, self._key = make(), key
        return self._made

    def forget(self) -> None:
        """Make it anew next time."""
        self._key = self._made = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[Made]:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived[Made]], tuple[()]]:
        return Derived, ()


def _state(parameter: Tensor | None) -> tuple[Any, ...] | None:
    if parameter is None:
        return None
    version = 0 if parameter.is_inference() else parameter._version
    # A sum on a GPU would be waited for, and cannot stand in a CUDA graph.
    total = float(parameter.detach().sum()) if parameter.device.type == "cpu" else 0.0
    return id(parameter), parameter.data_ptr(), version, parameter.dtype, parameter.device, total
