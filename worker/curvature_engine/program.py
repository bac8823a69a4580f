"""A loaded model: a front end on a device, what is known of it, and its forward passes."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature_engine.digests import Digest
from curvature_engine.errors import EngineError, first_line
from curvature_engine.execution import Decision, Run, map_tensors, tensors_in
from curvature_engine.formats import FrontEnd, Inputs, open_model
from curvature_engine.grad_mode import with_gradients
from curvature_engine.layouts import ChannelsLast, LayoutShows, pays, tells
from curvature_engine.memory_format import channels_last, has_image_layout
from curvature_engine.pages import with_room
from curvature_engine.parameters import Parameter
from curvature_engine.probe import Derived, Verdicts
from curvature_engine.sample_axes import SampleAxes
from curvature_engine.sums import Sums
from curvature_engine.tape import Tape

__all__ = ["Forward", "Inputs", "Parameter", "Program", "digest", "load"]


@dataclass
class Forward:
    """What one forward pass left behind."""

    outputs: Any
    tape: Tape
    decisions: tuple[Decision, ...]
    routed_by_data: bool
    used_dropout: bool
    signature: tuple[Any, ...]
    """Shapes and dtypes of the inputs."""
    readings: tuple[Any, ...] = ()
    """Numbers that the program read from the batch's tensors, decisions aside."""
    kept_bytes: int = 0
    """What its results take: about what its graph keeps."""
    samples: SampleAxes = field(default_factory=SampleAxes)
    """Where the samples are proved to lie in the outputs."""
    sums: tuple[Sums, ...] = ()
    """Of all that operators made of the batch, where asked for."""


class Program:
    """A model ready to be run and differentiated.

    Attributes:
        front: the model in its own format.
        parameters: name → parameter, as in `named_parameters()`; shared ones once.
        aliases: a shared parameter's further names → its first.
        buffers: names of the tensors that are none.
        was_training: whether the file was saved in training mode.
        verdicts: what the probe found, per shapes and path.
        derived: what follows from shapes and path without a verdict.
        met: batches, by their shapes, whose few first samples went through it once.
    """

    def __init__(self, front: FrontEnd, device: torch.device, *, eval: bool) -> None:
        self.front = front
        self.device = device
        self.parameters, self.aliases, self.buffers = front.parameters, front.aliases, front.buffers
        self.was_training = front.was_training
        self.keeps_training = front.was_training and not eval
        self.verdicts, self.derived, self.met = Verdicts(), Derived(), Derived()
        self._channels_last = pays(device, front.operators(), asks_layout=front.asks_layout)
        self._asked = False
        self._layout = threading.RLock()
        """Held within `channels_last`: two threads that exchange the parameters' memory would restore each other's."""
        self._usual: list[tuple[Tensor, Tensor]] = []

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The parameters' number formats."""
        return {p.tensor.dtype for p in self.parameters.values()}

    @contextmanager
    def channels_last(self) -> Iterator[None]:
        """Have images and the parameters with spatial axes lie with their channels last, as long as it lasts.

        Raises:
            EngineError: `invalid_option`: the program could tell.
        """
        if tells(self.front.operators(), asks_layout=self.front.asks_layout):
            raise _layout_shows("the model asks how its tensors lie in memory")
        with self._layout:
            images = {id(t): t for p in self.parameters.values() for t in p.tensors if has_image_layout(t)}
            self._usual = [(t, t.data) for t in images.values()]
            self._asked = True
            try:
                with _holding([(t, channels_last(data)) for t, data in self._usual]):
                    yield
            finally:
                self._asked, self._usual = False, []

    @contextmanager
    def still(self) -> Iterator[None]:
        """Have nobody exchange the parameters' memory, as long as it lasts."""
        with self._layout:
            yield

    @contextmanager
    def usual_layout(self) -> Iterator[None]:
        """Within `channels_last`: everything as it lies without it."""
        asked, self._asked = self._asked, False
        try:
            with _holding(self._usual):
                yield
        finally:
            self._asked = asked

    def _parameter_places(self) -> frozenset[int]:
        """Where parameters lie now, and within `channels_last` where they usually do."""
        tensors = [*(t for p in self.parameters.values() for t in p.tensors), *(data for _, data in self._usual)]
        return frozenset(t.untyped_storage().data_ptr() for t in tensors if t.numel())

    @property
    def format(self) -> str:
        """The model's format, e.g. "torchscript"."""
        return self.front.format

    def run(
        self,
        inputs: Inputs,
        tape: Tape,
        limit_bytes: int | None = None,
        *,
        graph: bool = True,
        summed: bool = False,
        most_rounds: int | None = None,
    ) -> Forward:
        """Run forward once on `inputs`, recording on `tape`.

        Without `graph` nothing can be differentiated, and intermediate values go as soon as they are spent. `summed`
        keeps the sums of all of them.

        Raises:
            EngineError: if the program cannot be run on them, or its loops go round more than `most_rounds` times.
            TooLarge: as soon as it keeps more than `limit_bytes`.
        """
        limits = limit_bytes, most_rounds
        arguments = self.front.bind(inputs)
        if self._asked:
            try:
                return self._run(arguments, tape, limits, graph, summed, ChannelsLast(every=True))
            except LayoutShows:
                raise _layout_shows("the model edits a tensor in place through a view of it") from None
        if self._channels_last:
            try:
                return self._run(arguments, tape, limits, graph, summed, ChannelsLast())
            except LayoutShows:
                self._channels_last = False
                tape.restart()
        return self._run(arguments, tape, limits, graph, summed, None)

    def _run(
        self,
        arguments: list[Any],
        tape: Tape,
        limits: tuple[int | None, int | None],
        graph: bool,
        summed: bool,
        layout: ChannelsLast | None,
    ) -> Forward:
        run = Run(
            self.device,
            tape,
            edits=self.front.edits_tensors or self.keeps_training,
            parameter_places=self._parameter_places(),
            allow_dropout=self.keeps_training,
            limit_bytes=limits[0],
            most_rounds=limits[1],
            lean=not graph,
            summed=summed,
            layout=layout,
        )
        placed = arguments if layout is None else map_tensors(layout.take, arguments)
        try:
            with torch.set_grad_enabled(graph), _attention(twice=tape.twice):
                outputs = self.front.run(run, placed)
        finally:
            run.close()
        run.samples.close(tensors_in(outputs))
        return Forward(
            outputs,
            tape,
            tuple(run.decisions),
            run.routed_by_data,
            run.used_dropout,
            _signature(arguments),
            tuple(run.readings),
            run.kept_bytes,
            run.samples,
            tuple(run.sums),
        )


def _layout_shows(reason: str) -> EngineError:
    return EngineError(
        "invalid_option",
        f"channels last the model might compute something else: {reason}",
        param="channels_last",
        remedy="leave channels_last out",
    )


@contextmanager
def _holding(numbers: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Have tensors hold the memory of others, as long as it lasts."""
    before = [(tensor, tensor.data) for tensor, _ in numbers]
    try:
        for tensor, data in numbers:
            tensor.data = data
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def digest(program: Program) -> str:
    """What a program computes, as 64 hexadecimal digits.

    Two files of one model (traced twice, saved again, in other names) have one digest. Programs that differ in any
    number, name of a parameter, operator, or mode (`eval=`) differ in it. A program that holds what cannot be told (an
    object of a custom class, sparse tensors) has another digest each time.
    """
    told = Digest()
    told.add(program.keeps_training)
    for name, parameter in program.parameters.items():
        told.add(name, parameter.trainable, list(parameter.tensors))
    told.add(program.aliases)
    program.front.describe(told)
    return told.hexdigest()


def _signature(arguments: Sequence[Any]) -> tuple[Any, ...]:
    found: list[Any] = []
    map_tensors(lambda t: found.append((tuple(t.shape), t.dtype)), list(arguments))
    return tuple(found)


@with_gradients
def load(model: Any, *, device: str | torch.device = "cpu", eval: bool = True) -> Program:
    """Load a model file, or take a ScriptModule or nn.Module.

    The caller's module stays as it is: the program works on a copy.

    Args:
        model: path, ScriptModule, or nn.Module (which is scripted).
        device: where to compute.
        eval: put the model into eval mode.

    Raises:
        EngineError: `invalid_model`, `no_parameters`, `unsupported_model`.
    """
    if isinstance(model, Program):
        return model
    device = _device(device)
    return with_room(lambda: Program(open_model(model, device, eval=eval), device, eval=eval))


def _device(device: Any) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise EngineError(
            "invalid_option",
            f"device {device!r} is not available: {first_line(error)}",
            param="device",
            remedy='pass "cpu", or a device that is there',
        ) from error
    if found.type == "meta":
        raise EngineError(
            "invalid_option", "the meta device holds no numbers", param="device", remedy='pass "cpu" or "cuda"'
        )
    return found


def _attention(*, twice: bool) -> AbstractContextManager[None]:
    """Which kernels attention may take: of the fast ones, none has a second derivative."""
    return sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()
