"""The registry of openings: fused aten operator → the elementary operators that it stands for.

A fused operator that consumes parameters has one output for many products, and no rule could read it. Opened up, each
product is a tap of its own. A new opening is one file here and one line below.
"""

from curvature_engine.openings.attention import open_encoder_layer, open_multi_head_attention, open_scaled_attention
from curvature_engine.openings.base import Elementary, Opening
from curvature_engine.openings.cells import open_gru_cell, open_lstm_cell, open_rnn_cell
from curvature_engine.openings.embedding_bag import open_embedding_bag
from curvature_engine.openings.recurrent import open_gru, open_lstm, open_rnn

OPENINGS: dict[str, Opening] = {
    "lstm": open_lstm,
    "gru": open_gru,
    "rnn_tanh": open_rnn,
    "rnn_relu": open_rnn,
    "lstm_cell": open_lstm_cell,
    "gru_cell": open_gru_cell,
    "rnn_tanh_cell": open_rnn_cell,
    "rnn_relu_cell": open_rnn_cell,
    "embedding_bag": open_embedding_bag,
    "scaled_dot_product_attention": open_scaled_attention,
    "_native_multi_head_attention": open_multi_head_attention,
    "_transformer_encoder_layer_fwd": open_encoder_layer,
}

__all__ = ["OPENINGS", "Elementary", "Opening"]
