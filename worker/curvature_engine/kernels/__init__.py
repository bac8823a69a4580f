"""Fused kernels for what is bound by memory on a GPU, each beside a plain form that every device has.

Whoever may use one asks `choice` first; nothing here imports Triton before a kernel is wanted.
"""
