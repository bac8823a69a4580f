"""The registry of followers: aten operator → how the samples go through it.

What is not listed mixes samples where gradients go through it. A follower holds for every overload and every form of
the arguments, or gives None.
"""

from curvature_engine.followers import layers, shapes
from curvature_engine.followers.base import Follower, Found, Seen, elementwise, first_alone, tensors_among
from curvature_engine.operators import ELEMENTWISE

_DROPOUTS = "dropout alpha_dropout feature_dropout feature_alpha_dropout"
_BY_FOLLOWER: tuple[tuple[Follower, str], ...] = (
    (elementwise, "copy fill zero"),
    (first_alone, f"{_DROPOUTS} expand expand_as broadcast_to"),
    (
        shapes.reshaped,
        """
        view reshape flatten unflatten squeeze unsqueeze view_as reshape_as contiguous clone alias detach _unsafe_view
        to _to_copy type_as lift_fresh lift_fresh_copy
        """,
    ),
    (shapes.transposed, "transpose swapaxes swapdims"),
    (shapes.reversed_axes, "t numpy_T"),
    (shapes.last_two, "mT"),
    (shapes.permuted, "permute"),
    (shapes.moved, "movedim moveaxis"),
    (shapes.selected, "select unbind"),
    (
        shapes.sliced,
        "slice narrow chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split unsafe_split_with_sizes",
    ),
    (shapes.joined, "cat concat concatenate stack slice_scatter"),
    (shapes.indexed, "index"),
    (shapes.repeated, "repeat tile"),
    (shapes.interleaved, "repeat_interleave"),
    (shapes.windows, "unfold"),
    (shapes.shuffled, "pixel_shuffle pixel_unshuffle"),
    (shapes.padded, "pad constant_pad_nd"),
    (shapes.triangle, "tril triu"),
    (
        layers.convolved,
        """
        conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution
        _convolution_mode
        """,
    ),
    (layers.images, "batch_norm group_norm channel_shuffle"),
    (layers.first_of_several, "native_batch_norm _native_batch_norm_legit_no_training native_group_norm"),
    (layers.patched, "im2col col2im"),
    (layers.instance_norm, "instance_norm"),
    (layers.linear, "linear"),
    (layers.addmm, "addmm"),
    (layers.matmul, "matmul mm bmm mv"),
    (layers.baddbmm, "baddbmm"),
    (layers.attention, "scaled_dot_product_attention"),
    (layers.bilinear, "bilinear"),
    (layers.einsum, "einsum"),
    (
        layers.space,
        """
        max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices
        max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d
        upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
        upsample_trilinear3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
        replication_pad3d
        """,
    ),
    (layers.layer_norm, "layer_norm native_layer_norm rms_norm"),
    (
        layers.along,
        """
        softmax log_softmax _softmax _log_softmax cumsum cumprod logcumsumexp cummax cummin glu index_select flip roll
        sort topk
        """,
    ),
    (
        layers.reduced,
        """
        sum mean prod var std var_mean std_mean amax amin argmax argmin logsumexp any all linalg_vector_norm norm nansum
        nanmean median
        """,
    ),
    (layers.extreme, "max min"),
    (layers.where, "where"),
    (layers.looked_up, "embedding one_hot"),
)

FOLLOWERS: dict[str, Follower] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    "_native_batch_norm_legit": layers.norm_of_channels,
    **{name: follower for follower, names in _BY_FOLLOWER for name in names.split()},
}
EDITORS = frozenset(_DROPOUTS.split()) | {name for name, follower in FOLLOWERS.items() if follower is elementwise}
"""Operators that may edit a tracked tensor in place: its shape stays, and each element its sample's."""

__all__ = ["EDITORS", "FOLLOWERS", "Follower", "Found", "Seen", "elementwise", "tensors_among"]
