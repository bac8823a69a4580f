"""One step of the recurrent layers, as PyTorch writes it (`torch.nn.LSTM`, `GRU`, `RNN`)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from curvature_engine.openings.base import Elementary

State = tuple[Tensor, ...]
"""What a cell hands to its next step; the first entry is also its output."""

Step = Callable[[Elementary, Tensor, State, "Weights"], State]


class Weights(NamedTuple):
    """The parameters of one direction of one layer.

    Attributes:
        input: [gates·H, in]. The products with it need no state, so they are made for all steps at once.
        hidden: [gates·H, H], or [gates·H, P] with projections.
        projection: [P, H], or None.
    """

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None
    projection: Tensor | None = None


def lstm_step(ops: Elementary, gates: Tensor, state: State, weights: Weights) -> State:
    """(h, c) from the input's gates [n, 4H], in the order input, forget, cell, output."""
    h, c = state
    gates = ops.add(gates, ops.linear(h, weights.hidden, weights.hidden_bias))
    i, f, g, o = ops.chunk(gates, 4, 1)
    kept = ops.mul(ops.apply("sigmoid", f), c)
    c = ops.add(kept, ops.mul(ops.apply("sigmoid", i), ops.apply("tanh", g)))
    h = ops.mul(ops.apply("sigmoid", o), ops.apply("tanh", c))
    return (h if weights.projection is None else ops.linear(h, weights.projection)), c


def gru_step(ops: Elementary, gates: Tensor, state: State, weights: Weights) -> State:
    """(h,) from the input's gates [n, 3H], in the order reset, update, new."""
    (h,) = state
    reset_in, update_in, new_in = ops.chunk(gates, 3, 1)
    reset_h, update_h, new_h = ops.chunk(ops.linear(h, weights.hidden, weights.hidden_bias), 3, 1)
    reset = ops.apply("sigmoid", ops.add(reset_in, reset_h))
    update = ops.apply("sigmoid", ops.add(update_in, update_h))
    new = ops.apply("tanh", ops.add(new_in, ops.mul(reset, new_h)))
    return (ops.add(new, ops.mul(update, ops.sub(h, new))),)


def rnn_step(function: str) -> Step:
    """(h,) from the input's part [n, H]; `function` is tanh or relu."""

    def step(ops: Elementary, gates: Tensor, state: State, weights: Weights) -> State:
        (h,) = state
        return (ops.apply(function, ops.add(gates, ops.linear(h, weights.hidden, weights.hidden_bias))),)

    return step


def open_lstm_cell(ops: Elementary, arguments: Sequence[Any]) -> Any:
    """`lstm_cell(x, [h, c], w_ih, w_hh, b_ih, b_hh)`."""
    return _cell(ops, lstm_step, arguments, tuple(arguments[1]))


def open_gru_cell(ops: Elementary, arguments: Sequence[Any]) -> Any:
    """`gru_cell(x, h, w_ih, w_hh, b_ih, b_hh)`."""
    return _cell(ops, gru_step, arguments, (arguments[1],))[0]


def open_rnn_cell(ops: Elementary, arguments: Sequence[Any]) -> Any:
    """`rnn_tanh_cell` and `rnn_relu_cell`."""
    function = ops.name.split("_")[1]
    return _cell(ops, rnn_step(function), arguments, (arguments[1],))[0]


def _cell(ops: Elementary, step: Step, arguments: Sequence[Any], state: State) -> State:
    w_ih, w_hh, b_ih, b_hh = (*arguments[2:], None, None)[:4]
    weights = Weights(w_ih, w_hh, b_ih, b_hh)
    return step(ops, ops.linear(arguments[0], w_ih, b_ih), state, weights)
