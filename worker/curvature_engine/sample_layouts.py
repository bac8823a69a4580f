"""Which elements of a tensor belong to which sample."""

from functools import cached_property

import torch
from torch import Tensor


class Layout:
    """Of N samples with D elements each, where each one's elements stand in a tensor.

    Attributes:
        plain: whether samples come one after another, their elements in order.
    """

    def __init__(self, N: int, D: int, device: torch.device, places: Tensor | None = None) -> None:
        self.N, self.D, self.device = N, D, device
        self._places = places
        self.plain = places is None

    @classmethod
    def of(cls, places: Tensor) -> "Layout":
        """The layout with these places [N, D]."""
        in_order = torch.arange(places.numel(), device=places.device).view(places.shape)
        N, D = places.shape
        return cls(N, D, places.device, None if torch.equal(places, in_order) else places)

    @cached_property
    def places(self) -> Tensor:
        """The flat positions of every sample's elements, [N, D]; axes of averaged matrices are in the rows' order."""
        if self._places is not None:
            return self._places
        return torch.arange(self.N * self.D, device=self.device).view(self.N, self.D)

    def spread(self, vectors: Tensor, shape: torch.Size) -> Tensor:
        """A tensor with vectors [n ≤ N, D] in the places of the first n samples, zero elsewhere."""
        if self.plain and len(vectors) == self.N:
            return vectors.reshape(shape)
        full = vectors.new_zeros(shape.numel())
        full[self.places[: len(vectors)].reshape(-1)] = vectors.reshape(-1)
        return full.view(shape)

    def gathered(self, flat: Tensor) -> Tensor:
        """Every sample's elements of a tensor, [N, D]."""
        return flat.view(self.N, self.D) if self.plain else flat[self.places]
