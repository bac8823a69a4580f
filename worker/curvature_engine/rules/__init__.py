"""The registry of rules: aten operator → matchers, tried in order.

A new rule is one file here and one line below.
"""

from curvature_engine.rules.base import Match, Matcher, Rule, Through, gives
from curvature_engine.rules.concatenation import match_concatenation
from curvature_engine.rules.contraction import match_batched_product, match_bilinear, match_einsum
from curvature_engine.rules.convolution import match_convolution
from curvature_engine.rules.elementwise import match_elementwise, match_prelu
from curvature_engine.rules.embedding import match_embedding
from curvature_engine.rules.linear import match_addmm, match_linear, match_matmul
from curvature_engine.rules.normalization import (
    match_batch_norm,
    match_group_norm,
    match_instance_norm,
    match_layer_norm,
    match_rms_norm,
)

RULES: dict[str, tuple[Matcher, ...]] = {
    "linear": (match_linear,),
    "addmm": (match_addmm,),
    "matmul": (match_matmul, match_batched_product),
    "mm": (match_matmul,),
    "bmm": (match_batched_product,),
    "mv": (match_batched_product,),
    "einsum": (match_einsum,),
    "bilinear": (match_bilinear,),
    **dict.fromkeys(
        (
            "conv1d",
            "conv2d",
            "conv3d",
            "conv_transpose1d",
            "conv_transpose2d",
            "conv_transpose3d",
            "convolution",
            "_convolution",
            "_convolution_mode",
        ),
        (match_convolution,),
    ),
    **dict.fromkeys(
        ("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"),
        (match_batch_norm,),
    ),
    "instance_norm": (match_instance_norm,),
    "layer_norm": (match_layer_norm,),
    "native_layer_norm": (match_layer_norm,),
    "rms_norm": (match_rms_norm,),
    "group_norm": (match_group_norm,),
    "native_group_norm": (match_group_norm,),
    "embedding": (match_embedding,),
    "add": (match_elementwise,),
    "sub": (match_elementwise,),
    "mul": (match_elementwise,),
    "div": (match_elementwise,),
    "prelu": (match_prelu,),
    "_prelu_kernel": (match_prelu,),
    **dict.fromkeys(("cat", "concat", "concatenate"), (match_concatenation,)),
}

__all__ = ["RULES", "Match", "Matcher", "Rule", "Through", "gives"]
