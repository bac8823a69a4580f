"""Which tensor operators a program may call.

Only names listed here are ever called: loading a model file is running a program, and an operator that reads files,
draws random numbers or edits weights would make it more than a function of its inputs.
"""

_ELEMENTWISE = """
add sub mul div rsub true_divide floor_divide remainder fmod pow square sqrt rsqrt exp exp2 expm1 log log2 log10 log1p
neg negative abs absolute sign sgn reciprocal sin cos tan asin acos atan atan2 sinh cosh tanh asinh acosh atanh sinc
sigmoid relu relu6 leaky_relu elu celu selu gelu silu mish softplus softsign softshrink hardshrink tanhshrink hardtanh
hardsigmoid hardswish log_sigmoid threshold prelu glu clamp clamp_min clamp_max clip maximum minimum max min fmax fmin
where erf erfc erfinv lgamma digamma floor ceil round trunc frac lerp addcmul addcdiv nan_to_num isnan isinf isfinite
eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor
__and__ __or__ __xor__ __lshift__ __rshift__ masked_fill masked_scatter xlogy logaddexp hypot copysign heaviside
special_expit special_logit logit special_erf dropout alpha_dropout feature_dropout feature_alpha_dropout
"""

_PRODUCTS = """
linear addmm matmul mm bmm baddbmm addbmm mv addmv dot vdot outer ger addr einsum tensordot bilinear chain_matmul
linalg_multi_dot cdist _trilinear kron inner cross linalg_cross
conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution _convolution_mode
conv_tbc
scaled_dot_product_attention _scaled_dot_product_attention _native_multi_head_attention
lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell _transformer_encoder_layer_fwd
_pack_padded_sequence _pad_packed_sequence
"""

_NORMS = """
batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
_native_batch_norm_legit_functional layer_norm native_layer_norm group_norm native_group_norm instance_norm rms_norm
local_response_norm norm linalg_norm linalg_vector_norm linalg_matrix_norm frobenius_norm norm_except_dim _weight_norm
normalize cosine_similarity pairwise_distance
"""

_REDUCTIONS = """
sum mean prod var std var_mean std_mean amax amin aminmax argmax argmin logsumexp softmax log_softmax _softmax
_log_softmax cumsum cumprod logcumsumexp cummax cummin any all count_nonzero median nanmedian mode kthvalue topk sort
argsort nansum nanmean trace diff unique_consecutive bincount
"""

_SHAPES = """
view reshape flatten unflatten squeeze unsqueeze transpose permute t numpy_T mT matrix_H adjoint movedim moveaxis
swapaxes swapdims expand expand_as view_as reshape_as contiguous clone alias detach slice select narrow chunk split
split_with_sizes tensor_split unsafe_chunk unsafe_split unsafe_split_with_sizes unbind index index_select index_put
index_add index_copy index_fill gather scatter scatter_add take take_along_dim masked_select nonzero nonzero_numpy
cat concat concatenate stack hstack vstack dstack column_stack repeat repeat_interleave tile roll flip fliplr flipud
rot90 diagonal diag diag_embed tril triu tril_indices triu_indices meshgrid broadcast_to broadcast_tensors
pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
replication_pad2d replication_pad3d pixel_shuffle pixel_unshuffle channel_shuffle unfold im2col col2im as_strided
embedding embedding_bag one_hot lift_fresh lift_fresh_copy _unsafe_view to _to_copy type_as copy fill zero
slice_scatter select_scatter
"""

_POOLING = """
max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices
max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d _adaptive_avg_pool3d lp_pool2d
upsample_nearest1d upsample_nearest2d upsample_nearest3d
upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d interpolate __interpolate grid_sampler
grid_sampler_2d affine_grid_generator
"""

_FACTORIES = """
zeros ones full empty new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like arange linspace
eye tensor as_tensor scalar_tensor hann_window
"""

_LOSSES = """
mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits nll_loss nll_loss_nd
nll_loss2d cross_entropy_loss kl_div poisson_nll_loss soft_margin_loss hinge_embedding_loss margin_ranking_loss
cosine_embedding_loss triplet_margin_loss
"""

_QUESTIONS = """
size sym_size dim numel item Int Float Bool IntImplicit FloatImplicit ScalarImplicit is_floating_point is_complex
is_nonzero stride storage_offset len is_same_size equal allclose isclose element_size is_contiguous device cpu cuda
float double half bfloat16 int long bool result_type is_autocast_enabled get_autocast_dtype
is_grad_enabled _shape_as_tensor
"""


def _names(*groups: str) -> frozenset[str]:
    return frozenset(name for group in groups for name in group.split())


ALLOWED = _names(_ELEMENTWISE, _PRODUCTS, _NORMS, _REDUCTIONS, _SHAPES, _POOLING, _FACTORIES, _LOSSES, _QUESTIONS)
"""Operator names without namespace and without the `_` of the in-place form."""

ELEMENTWISE = _names(_ELEMENTWISE) - _names("glu max min masked_scatter")
"""Operators whose output has each element from that element of the input alone."""

MOVERS = _names(
    """
    view reshape flatten unflatten squeeze unsqueeze transpose permute t numpy_T mT movedim moveaxis swapaxes swapdims
    expand expand_as view_as reshape_as contiguous clone alias slice select narrow chunk split split_with_sizes
    tensor_split unsafe_chunk unsafe_split unsafe_split_with_sizes unbind index index_select flip fliplr flipud roll
    repeat tile broadcast_to _unsafe_view
    """
)
"""Operators that only move or copy a tensor's elements: applied to a parameter they give a gather of it."""

FIRST_OUTPUT = _names("native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit_no_training")
"""Operators with several outputs whose parameters enter the first alone."""

ROUTERS = _names(
    """
    index index_select index_put index_add index_copy gather scatter scatter_add take take_along_dim masked_select
    masked_scatter nonzero nonzero_numpy sort argsort topk embedding_bag repeat_interleave unique_consecutive
    _pack_padded_sequence _pad_packed_sequence
    """
)
"""Operators through which data decide where rows go: then an attribution of rows is not kept between batches."""

READINGS = _names("item Int Float Bool IntImplicit FloatImplicit ScalarImplicit is_nonzero equal allclose tolist")
"""Questions about a tensor's values, not its form."""

HOST_READERS = _names(
    """
    tensor_split _pack_padded_sequence _pad_packed_sequence lstm gru rnn_tanh rnn_relu
    """
)
"""Operators that may read a tensor on the host where nobody sees it (lengths, places to split at)."""

LAYOUT_QUESTIONS = _names("stride storage_offset is_contiguous")
"""Questions about how a tensor's elements lie in memory."""

REFUSED: dict[str, tuple[str, str]] = {
    "embedding_renorm": ("max_norm edits the weights inside the forward pass", "use an embedding without max_norm"),
}
"""Operators refused with their own reason and remedy."""


def is_allowed(name: str) -> bool:
    """Whether `name` (without namespace) or its in-place form may be called."""
    return name in ALLOWED or (name.endswith("_") and not name.endswith("__") and name[:-1] in ALLOWED)
