"""LSTM, GRU and RNN layers: several, in both directions, on batches and on packed sequences.

The products with the inputs of all steps are one operator, so one tap; those with the state are one per step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from curvature_engine.openings.base import Elementary
from curvature_engine.openings.cells import State, Step, Weights, gru_step, lstm_step, rnn_step


@dataclass(frozen=True)
class Stack:
    """Layers of one kind.

    Attributes:
        sizes: of each step, how many sequences still run, for packed sequences; else None.
        states: the initial states [layers·directions, n, ·], one or two tensors.
    """

    step: Step
    layers: list[list[Weights]]
    sizes: list[int] | None
    states: State

    def run(self, ops: Elementary, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs and final states; x is [T, n, in], or the rows of a packed sequence [R, in]."""
        finals: list[State] = []
        for directions in self.layers:
            outputs = []
            for reverse, weights in enumerate(directions):
                start = tuple(ops.select(s, 0, len(finals)) for s in self.states)
                gates = ops.linear(x, weights.input, weights.input_bias)
                if self.sizes is None:
                    output, final = self._steps(ops, gates, start, weights, bool(reverse))
                else:
                    output, final = self._packed(ops, gates, start, weights, bool(reverse), self.sizes)
                outputs.append(output)
                finals.append(final)
            x = ops.concatenate(outputs, -1)
        return x, *(ops.stack([f[i] for f in finals]) for i in range(len(self.states)))

    def _steps(
        self, ops: Elementary, gates: Tensor, state: State, weights: Weights, reverse: bool
    ) -> tuple[Tensor, State]:
        outputs = []
        for t in _order(len(gates), reverse):
            state = self.step(ops, ops.select(gates, 0, t), state, weights)
            outputs.append(state[0])
        return ops.stack(outputs[::-1] if reverse else outputs), state

    def _packed(
        self, ops: Elementary, gates: Tensor, start: State, weights: Weights, reverse: bool, sizes: list[int]
    ) -> tuple[Tensor, State]:
        """Sequences are sorted by length: the first `sizes[t]` run at step t."""
        firsts = [sum(sizes[:t]) for t in range(len(sizes))]
        running = tuple(ops.narrow(s, 0, 0, 0) for s in start) if reverse else start
        ended: list[State] = []
        outputs = []
        for t in _order(len(sizes), reverse):
            n, before = sizes[t], len(running[0])
            if n < before:
                ended.append(tuple(ops.narrow(s, 0, n, before - n) for s in running))
                running = tuple(ops.narrow(s, 0, 0, n) for s in running)
            elif n > before:
                joining = [ops.narrow(s, 0, before, n - before) for s in start]
                running = tuple(ops.concatenate([r, j]) for r, j in zip(running, joining, strict=True))
            running = self.step(ops, ops.narrow(gates, 0, firsts[t], n), running, weights)
            outputs.append(running[0])
        ended.append(running)
        final = tuple(ops.concatenate([e[i] for e in reversed(ended)]) for i in range(len(start)))
        return ops.concatenate(outputs[::-1] if reverse else outputs), final


def open_lstm(ops: Elementary, arguments: Sequence[Any]) -> Any:
    """`lstm(x, [h, c], params, …)`."""
    h, c = arguments[2 if isinstance(arguments[3], list | tuple) else 1]
    return _open(ops, lstm_step, arguments, projected=h.shape[-1] != c.shape[-1])


def open_gru(ops: Elementary, arguments: Sequence[Any]) -> Any:
    """`gru(x, h, params, …)`."""
    return _open(ops, gru_step, arguments)


def open_rnn(ops: Elementary, arguments: Sequence[Any]) -> Any:
    """`rnn_tanh` and `rnn_relu`."""
    return _open(ops, rnn_step(ops.name.split("_")[1]), arguments)


def _open(ops: Elementary, step: Step, arguments: Sequence[Any], *, projected: bool = False) -> Any:
    """Both overloads: (x, hx, params, …, batch_first) and (data, batch_sizes, hx, params, …)."""
    packed = isinstance(arguments[3], list | tuple)
    if packed:
        x, batch_sizes, hx, parameters, biases, layers, dropout, train, bidirectional = arguments
        sizes, batch_first = batch_sizes.tolist(), False
    else:
        x, hx, parameters, biases, layers, dropout, train, bidirectional, batch_first = arguments
        sizes = None
    if train and dropout > 0:
        return None
    states = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
    weights = _weights(parameters, layers, 2 if bidirectional else 1, biases, projected)
    x = ops.transpose(x, 0, 1) if batch_first else x
    output, *finals = Stack(step, weights, sizes, states).run(ops, x)
    return (ops.transpose(output, 0, 1) if batch_first else output), *finals


def _weights(
    parameters: Sequence[Tensor], layers: int, directions: int, biases: bool, projected: bool
) -> list[list[Weights]]:
    """The flat list that the operator takes, by layer and direction."""
    each = 2 + 2 * biases + projected
    found = []
    for place in range(0, layers * directions * each, each):
        own = list(parameters[place : place + each])
        b_ih, b_hh = own[2:4] if biases else (None, None)
        found.append(Weights(own[0], own[1], b_ih, b_hh, own[-1] if projected else None))
    return [found[i : i + directions] for i in range(0, len(found), directions)]


def _order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)
