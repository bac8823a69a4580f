"""Where the samples lie in every tensor of a forward pass, proved from the operators.

The probe *asks* which row belongs to which sample, and has to ask again for every batch, for another batch may couple
what this one does not. Of most operators it is known for every batch: a convolution keeps its images apart whatever is
in them. Where a whole forward pass consists of such operators, its rows are proved, and nothing need be asked.

What is proved is what the probe looks for. Of each tensor that is *tracked* we say which element belongs to which
sample (`sample_strides`), and that no gradient comes back to it from another sample's outputs. So every operator that
takes a tracked tensor must be one of these:

- one that is known to make each sample's elements of that sample's elements; its results are tracked in turn;
- one through which no gradient comes back: its results need not be tracked;
- any other: its results are *mixed*, and so is what is made of them. A program may ask a mixed tensor what it likes, as
  long as no gradient comes back from it: the outputs must not be mixed.

What is neither has nothing tracked behind it that a gradient could reach. Tensors are known by identity, so that
none is lost in a list, an attribute or another slot of the program; whoever makes a tensor of another without `see`
tells it to `cast`.
"""

from collections.abc import Iterable, Sequence
from sys import getrefcount
from typing import Any

from torch import Tensor

from curvature_engine.calls import OperatorCall
from curvature_engine.followers import EDITORS, FOLLOWERS, Found, Seen, elementwise, tensors_among

_LEAST_SAMPLES = 2
_OWN_REFERENCES = 2
"""To a tensor that is released: from where it is held, and as the count's own argument."""
_MIXED = 0
"""In place of a stride."""


class SampleAxes:
    """Follows the samples through one forward pass.

    Attributes:
        N: how many samples.
        proved: whether there is anything left to prove: not after an edit that cannot be followed.
    """

    def __init__(self) -> None:
        self.N = 0
        self.proved = False
        # The tensors are held, so that their ids stay theirs.
        self._held: dict[int, tuple[Tensor, int]] = {}

    def begin(self, inputs: Iterable[Tensor]) -> None:
        """Take the inputs' first axes for the samples'; the outputs show whether they are."""
        tensors = list(inputs)
        if not tensors or any(t.dim() == 0 or t.shape[0] != tensors[0].shape[0] for t in tensors):
            return
        self.N = tensors[0].shape[0]
        if self.N < _LEAST_SAMPLES or any(t.numel() == 0 for t in tensors):
            return
        self.proved = True
        for tensor in tensors:
            self._held[id(tensor)] = tensor, tensor.numel() // self.N

    def stop(self) -> None:
        """Give the proof up."""
        self.proved = False
        self._held.clear()

    def see(self, call: OperatorCall, arguments: Sequence[Any], result: Any) -> None:
        """Follow the samples through one operator."""
        held = self._held
        entered: list[Tensor] = []
        for argument in arguments:
            if id(argument) in held:
                entered.append(argument)
            elif type(argument) is list or type(argument) is tuple:
                entered.extend([t for t in argument if id(t) in held])
        if not entered:
            return
        if call.writes:
            self._edited(call, arguments, entered, result)
            return
        follow = FOLLOWERS.get(call.name)
        if follow is elementwise and len(entered) == 1 and type(result) is Tensor and result.shape == entered[0].shape:
            stride = held[id(entered[0])][1]
            if stride != _MIXED:
                held[id(result)] = result, stride
                return
        found = None
        if follow is not None and _MIXED not in [held[id(t)][1] for t in entered]:
            found = follow(Seen(held, self.N, call, arguments, entered), result)
        if found is not None and len(found) == 1 and found[0][0] is result:
            if found[0][1]:
                held[id(result)] = found[0]
        else:
            self._take(found, entered, result)

    def cast(self, source: Any, result: Any) -> None:
        """Take notice of a tensor that was made of another one, element by element."""
        if id(source) in self._held and isinstance(result, Tensor):
            self._held[id(result)] = result, self._held[id(source)][1]

    def adopt(self, tensor: Tensor) -> None:
        """Track a tensor that nothing of the batch has entered, in the hope that each sample gets a row of its own.

        That is a claim about gradients like any other: what takes it has to keep it.
        """
        if self.proved and tensor.dim() and tensor.shape[0] == self.N and id(tensor) not in self._held:
            self._held[id(tensor)] = tensor, max(1, tensor.numel() // self.N)

    def release(self, tensor: Tensor, held: int) -> None:
        """Let go of a tensor that the program cannot come by again: beyond `held` references there are but our own."""
        place = id(tensor)
        if place in self._held and getrefcount(tensor) <= held + _OWN_REFERENCES:
            del self._held[place]

    def stride(self, tensor: Tensor) -> int | None:
        """A tensor's stride, while there is a proof."""
        found = self._held.get(id(tensor))
        return None if found is None or found[1] == _MIXED else found[1]

    def close(self, outputs: Iterable[Tensor]) -> None:
        """Let go of all tensors but the outputs."""
        ids = {id(t) for t in outputs}
        self._held = {place: held for place, held in self._held.items() if place in ids}

    def keeps_rows(self, outputs: Tensor) -> bool:
        """Whether each row of the outputs is proved to be of the sample with its number."""
        if not self.proved or outputs.dim() == 0 or outputs.shape[0] != self.N:
            return False
        return self.stride(outputs) == outputs.numel() // self.N

    def _edited(self, call: OperatorCall, arguments: Sequence[Any], entered: list[Tensor], result: Any) -> None:
        """Follow an edit in place: the edited tensor has to stay what it and all its views are known for."""
        edited, name = arguments[0], call.name.removesuffix("_")
        known = id(edited) in self._held and all(self._held[id(t)][1] != _MIXED for t in entered)
        if call.writes == (0,) and result is edited and known and name in EDITORS:
            found = FOLLOWERS[name](Seen(self._held, self.N, call, arguments, entered), result)
            if found is not None and found[0][1] == self._held[id(edited)][1]:
                return
        self.stop()

    def _take(self, found: Found, entered: Sequence[Tensor], result: Any) -> None:
        """Track several results, or none; those that were not found are mixed if a gradient can come back from them."""
        told = set()
        for tensor, stride in found or ():
            told.add(id(tensor))
            if stride:
                self._held[id(tensor)] = tensor, stride
        differentiable = any(t.requires_grad for t in entered)
        # A view would become differentiable by an edit of the tensor that it shows.
        places = {_place(t) for t in entered}
        for tensor in tensors_among(result):
            if id(tensor) not in told and (
                (tensor.requires_grad and differentiable)
                or ((tensor.is_floating_point() or tensor.is_complex()) and _place(tensor) in places)
            ):
                self._held[id(tensor)] = tensor, _MIXED


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
