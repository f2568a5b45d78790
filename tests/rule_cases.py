"""Calls of every operator that has a rule, on small random tensors, for the test of the rules.

`exact`, `renormalised` and `fixed` say what the rule should find: that some axis of the call can be
cut exactly, that one can be cut but only inexactly, or that none can be cut.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from graphprune.ops.block_sparse_recurrent import OPERATOR
from tests.deformable import deformable_convolution
from tests.models import import_transformers

aten = torch.ops.aten

_GENERATOR = torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class Case:
    """One call of an operator, and the best that its rule should find: exact, renormalised, fixed.

    Outputs in `unread` are those that nothing reads.
    """

    func: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    finds: str
    unread: tuple[int, ...] = ()


CASES: list[Case] = []

# Operators with a rule that have no kernel for the CPU; the rule is shared with one that has.
CANNOT_RUN = {
    "aten::_scaled_dot_product_flash_attention": "a CUDA kernel",
    "aten::_scaled_dot_product_efficient_attention": "a CUDA kernel",
    "aten::_scaled_dot_product_cudnn_attention": "a CUDA kernel",
    "aten::_scaled_dot_product_attention_math_for_mps": "an MPS kernel",
    "aten::cudnn_batch_norm": "a cuDNN kernel",
}


def exact(func: OpOverload, *args: Any, **kwargs: Any) -> None:
    CASES.append(Case(func, args, kwargs, "exact"))


def renormalised(func: OpOverload, *args: Any, **kwargs: Any) -> None:
    CASES.append(Case(func, args, kwargs, "renormalised"))


def fixed(func: OpOverload, *args: Any, **kwargs: Any) -> None:
    CASES.append(Case(func, args, kwargs, "fixed"))


def x(*shape: int) -> Tensor:
    """Return random numbers, none of them zero."""
    return torch.randn(shape, dtype=torch.float64, generator=_GENERATOR)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=_GENERATOR) + 0.5


def whole(below: int, *shape: int) -> Tensor:
    """Return random slot numbers."""
    return torch.randint(below, shape, generator=_GENERATOR)


def bits(*shape: int) -> Tensor:
    return whole(2, *shape).bool()


# Pointwise: a sample of the operators that carry the tag, then those registered by name.
for unary in (aten.gelu, aten.sigmoid, aten.exp, aten.silu, aten.tanh, aten.rsqrt, aten.neg):
    exact(unary.default, positive(4, 6))
for binary in (aten.add, aten.mul, aten.sub, aten.div, aten.remainder):
    exact(binary.Tensor, x(4, 6), x(4, 6))
exact(aten.add.Tensor, x(2, 1, 6), x(4, 1), alpha=2)
exact(aten.add.Scalar, x(4, 6), 3)
exact(aten.floor_divide.default, x(4, 6), positive(4, 6))
exact(aten.mul.Tensor, x(4, 6), x())
exact(torch.ops.prims.where.default, bits(4, 6), x(4, 6), x(4, 6))
exact(torch.ops.prims.convert_element_type.default, x(4, 6), torch.float32)
exact(aten.pow.Tensor_Scalar, x(4, 6), 2)
exact(aten.maximum.default, x(4, 6), x(6))
exact(aten.ge.Scalar, x(4, 6), 0.1)
exact(aten.logical_and.default, bits(4, 6), bits(4, 1))
exact(aten.bitwise_not.default, bits(4, 6))
exact(aten.where.self, bits(4, 1), x(1, 6), x(4, 6))
exact(aten.clamp.default, x(4, 6), -0.5, 0.5)
exact(aten.clamp.Tensor, x(4, 6), x(6) - 2, None)
exact(aten.leaky_relu.default, x(4, 6), 0.3)
exact(aten.lerp.Tensor, x(4, 6), x(6), x(4, 1))
exact(aten.masked_fill.Scalar, x(2, 4, 6), bits(4, 1), -3.0)
exact(aten.masked_fill.Tensor, x(4, 6), bits(4, 6), x())
exact(aten.addcmul.default, x(4, 6), x(4, 1), x(6), value=0.5)
exact(aten._prelu_kernel.default, x(2, 6, 3), x(6, 1))
exact(aten._to_copy.default, x(4, 6), dtype=torch.float32)
exact(aten.alias.default, x(4, 6))
exact(aten.clone.default, x(4, 6), memory_format=torch.contiguous_format)
exact(aten.copy.default, x(4, 6), x(6))
exact(aten.copy.default, x(4, 6), x(4, 1))
exact(aten.detach.default, x(4, 6))
exact(aten.empty_like.default, x(4, 6))
exact(aten.fill.Scalar, x(4, 6), 2.0)
exact(aten.fill.Tensor, x(4, 6), x())
exact(aten.full_like.default, x(4, 6), 2.0)
exact(aten.lift_fresh.default, x(4, 6))
exact(aten.ones_like.default, x(4, 6))
exact(aten.zero.default, x(4, 6))
exact(aten.zeros_like.default, x(4, 6))

# Products of matrices and look-ups.
exact(aten.mm.default, x(3, 4), x(4, 5))
exact(aten.mm.default, x(4, 4), x(4, 4))
exact(aten.bmm.default, x(2, 3, 4), x(2, 4, 5))
for sides, on_the_left in ((x(4, 3, 5), True), (x(1, 5, 3), False)):
    triangles = x(4, 3, 3).tril() + torch.eye(3) * 3
    exact(
        aten.linalg_solve_triangular.default, triangles, sides, upper=False, left=on_the_left,
        unitriangular=on_the_left,
    )  # fmt: skip
exact(aten.mv.default, x(3, 4), x(4))
exact(aten.dot.default, x(4), x(4))
exact(aten.vdot.default, x(4), x(4))
exact(aten.addmm.default, x(5), x(3, 4), x(4, 5), beta=2)
exact(aten.addmm.default, x(3, 1), x(3, 4), x(4, 5))
exact(aten.baddbmm.default, x(3, 5), x(2, 3, 4), x(2, 4, 5), alpha=2)
exact(aten.embedding.default, x(7, 4), whole(7, 2, 3))
exact(aten.embedding.default, x(7, 4), whole(7, 5), 2)
for bag in (aten._embedding_bag.default, aten._embedding_bag_forward_only.default):
    exact(bag, x(7, 4), whole(7, 6), torch.tensor([0, 2, 5]))
    exact(bag, x(7, 4), whole(7, 6), torch.tensor([0, 2, 5]), mode=1)
    exact(bag, x(7, 4), whole(7, 6), torch.tensor([0, 2, 5]), mode=2)
    exact(bag, x(7, 4), whole(7, 6), torch.tensor([0, 2, 5]), per_sample_weights=x(6))


def _convolve(input_: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> None:
    n = input_.dim() - 2
    for stride, padding in ((1, 0), (2, 1)):
        settings = ([stride] * n, [padding] * n, [1] * n, False, [0] * n, groups)
        exact(aten.convolution.default, input_, weight, bias, *settings)


def _convolve_back(input_: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> None:
    n = input_.dim() - 2
    settings = ([2] * n, [1] * n, [1] * n, True, [1] * n, groups)
    exact(aten.convolution.default, input_, weight, bias, *settings)


_convolve(x(2, 4, 7), x(6, 4, 3), x(6))
_convolve(x(2, 4, 7, 6), x(6, 4, 3, 2), None)
_convolve(x(2, 4, 5, 5, 5), x(3, 4, 2, 2, 2), x(3))
_convolve(x(2, 6, 7, 7), x(4, 3, 3, 3), x(4), groups=2)
_convolve(x(2, 12, 7), x(9, 4, 3), None, groups=3)
_convolve(x(2, 4, 7, 7), x(4, 1, 3, 3), x(4), groups=4)
_convolve(x(2, 4, 7, 7), x(12, 1, 3, 3), None, groups=4)
_convolve_back(x(2, 4, 7), x(4, 6, 3), x(6))
_convolve_back(x(2, 4, 7, 7), x(4, 6, 3, 3), None)
_convolve_back(x(2, 6, 5), x(6, 2, 3), x(4), groups=2)
_convolve_back(x(2, 6, 5), x(6, 2, 3), None, groups=2)
_convolve_back(x(2, 9, 5, 5), x(9, 4, 3, 3), None, groups=3)
_convolve_back(x(2, 4, 5), x(4, 1, 3), None, groups=4)

# Factories.
for uniform in (aten.zeros, aten.ones):
    exact(uniform.default, [4, 6], dtype=torch.float64)
exact(aten.full.default, [4, 6], 2.5)
exact(aten.empty.memory_format, [4, 6])
exact(aten.empty_strided.default, [4, 6], [6, 1])
exact(aten.empty_permuted.default, [4, 6], [1, 0])
for new in (aten.new_zeros, aten.new_ones, aten.new_empty):
    exact(new.default, x(3), [4, 6])
exact(aten.new_full.default, x(3), [4, 6], 2.5)
exact(aten.new_empty_strided.default, x(3), [4, 6], [6, 1])
fixed(aten.arange.default, 6)
fixed(aten.arange.start_step, 1, 9, 2)
fixed(aten.linspace.default, 0, 1, 5)
fixed(aten.logspace.default, 0, 1, 5)
fixed(aten.eye.default, 4)
fixed(aten.eye.m, 4, 6)
fixed(aten.rand.default, [4, 6])
fixed(aten.randn.default, [4, 6])
fixed(aten.randint.default, 5, [4, 6])
fixed(aten.randperm.default, 5)
fixed(aten.rand_like.default, x(4, 6))
fixed(aten.randn_like.default, x(4, 6))
fixed(aten.randint_like.default, x(4, 6), 5)
fixed(aten.bernoulli.default, torch.full((4, 6), 0.5))
fixed(aten.tril_indices.default, 4, 4)
fixed(aten.triu_indices.default, 4, 4)
fixed(aten.scalar_tensor.default, 2.5)

# Addressing.
for get in (aten.index.Tensor, aten._unsafe_index.Tensor):
    exact(get, x(5, 4), [whole(5, 6)])
    exact(get, x(5, 4, 3), [None, whole(4, 2, 3)])
    exact(get, x(5, 4, 3), [whole(5, 6, 1), whole(4, 7)])
    exact(get, x(5, 4, 3, 6), [None, whole(4, 2), whole(3, 2)])
    exact(get, x(5, 4, 3, 6), [None, whole(4, 2), None, whole(6, 2)])
    exact(get, x(5, 4, 3, 6), [whole(5, 2), None, whole(3, 2)])
exact(aten.index.Tensor, x(5, 4), [torch.tensor([True, False, True, True, False])])
for put in (aten.index_put, aten._index_put_impl, aten._unsafe_index_put):
    exact(put.default, x(5, 4), [whole(5, 3)], x(3, 4))
    exact(put.default, x(5, 4), [whole(5, 3)], x(3, 4), True)
    exact(put.default, x(5, 4), [whole(5, 3)], x(4))
    exact(put.default, x(5, 4), [whole(5, 3)], x())
    exact(put.default, x(5, 4, 3), [whole(5, 2), whole(4, 2)], x(2, 3))
    fixed(put.default, x(5, 4, 3), [whole(5, 2), None, whole(3, 2)], x(2, 4))
    exact(put.default, x(4, 4, 4), [whole(4, 4), whole(4, 4, 1)], x(4, 4, 1))
    fixed(put.default, x(4, 4), [None, whole(4, 4)], x(4, 4))
fixed(aten.index_put.default, x(5), [bits(5)], x())
exact(aten.index_select.default, x(5, 4), 0, whole(5, 3))
exact(aten.index_select.default, x(5, 4), -1, whole(4, 3))
exact(aten.index_select.default, x(5, 4), 0, torch.tensor(2))
exact(aten.gather.default, x(5, 4), 0, whole(5, 3, 4))
exact(aten.gather.default, x(5, 4, 3), -2, whole(4, 5, 2, 3))
fixed(aten.gather.default, x(5, 4), 1, whole(4, 3, 6))
exact(aten.scatter.src, x(5, 4), 0, whole(5, 3, 4), x(3, 4))
exact(aten.scatter.value, x(5, 4), -1, whole(4, 5, 2), 2.0)
fixed(aten.scatter.src, x(5, 4), 1, whole(4, 3, 2), x(5, 4))
exact(aten.scatter_add.default, x(5, 4), 0, whole(5, 3, 4), x(3, 4))
exact(aten.scatter_reduce.two, x(5, 4), 0, whole(5, 3, 4), x(3, 4), "amax")

# Norms.
_HELD = (x(6), x(6), x(6), positive(6))  # weight, bias, running mean and variance
for norm in (aten.native_batch_norm, aten._native_batch_norm_legit):
    exact(norm.default, x(2, 6, 3), *_HELD, False, 0.1, 1e-5)
    renormalised(norm.default, x(4, 6, 3), *_HELD[:2], x(6), positive(6), True, 0.1, 1e-5)
renormalised(aten.native_batch_norm.default, x(4, 6, 3), None, None, None, None, True, 0.1, 1e-5)
renormalised(aten._native_batch_norm_legit.no_stats, x(4, 6, 3), *_HELD[:2], True, 0.1, 1e-5)
exact(aten._native_batch_norm_legit_no_training.default, x(4, 6), *_HELD, 0.1, 1e-5)
renormalised(
    aten._batch_norm_with_update.default, x(4, 6, 3), *_HELD[:2], x(6), positive(6), 0.1, 1e-5
)
exact(aten._batch_norm_no_update.default, x(4, 6, 3), *_HELD, 0.1, 1e-5)
renormalised(aten.native_layer_norm.default, x(2, 3, 6), [6], x(6), x(6), 1e-5)
renormalised(aten.native_layer_norm.default, x(2, 3, 6), [3, 6], x(3, 6), None, 1e-5)
renormalised(aten.native_group_norm.default, x(2, 6, 5), x(6), x(6), 2, 6, 5, 3, 1e-5)
renormalised(aten.native_group_norm.default, x(2, 6, 2, 2), None, None, 2, 6, 4, 1, 1e-5)
renormalised(aten.native_group_norm.default, x(2, 6, 2, 2), x(6), None, 2, 6, 4, 6, 1e-5)

# Reductions.
exact(aten.sum.default, x(4, 6))
for total in (aten.sum.dim_IntList, aten.nansum.default):
    exact(total, x(4, 5, 6), [1])
    exact(total, x(4, 5, 6), [-1, 0], True)
    exact(total, x(4, 5, 6), None)
exact(aten.sum.dim_IntList, x(4, 5, 6), [])
exact(aten.any.default, bits(4, 6))
exact(aten._is_any_true.default, bits(4, 6))
exact(aten.any.dim, bits(4, 6), -1)
exact(aten.any.dims, bits(4, 5, 6), [0, 2], True)
exact(aten.linalg_vector_norm.default, x(4, 6))
exact(aten.linalg_vector_norm.default, x(4, 6), 1.5, [-1], True)
exact(aten.linalg_vector_norm.default, x(4, 6), float("inf"), [0])
renormalised(aten.linalg_vector_norm.default, x(4, 6), float("-inf"), [0])
exact(aten.norm.Scalar, x(4, 6))
exact(aten.norm.ScalarOpt_dim, x(4, 6), None, [1], True)
exact(aten.norm.ScalarOpt_dim, x(4, 6), 3, [-2])
renormalised(aten.norm.ScalarOpt_dim, x(4, 6), -1, [-2])
exact(aten.norm.ScalarOpt_dim, x(4, 6), 0, [-2])
exact(aten.count_nonzero.default, x(4, 6))
exact(aten.count_nonzero.dim_IntList, x(4, 6), [-1])
for statistic in (aten.mean, aten.var, aten.std, aten.prod):
    renormalised(statistic.default, x(4, 6))
for every in (aten.all, aten._is_all_true):
    renormalised(every.default, bits(4, 6))
for statistic in (aten.mean.dim, aten.var.correction, aten.std.correction, aten.logsumexp.default):
    renormalised(statistic, x(4, 5, 6), [1])
    renormalised(statistic, x(4, 5, 6), [-1, 0], keepdim=True)
for pair in (aten.var_mean.correction, aten.std_mean.correction):
    renormalised(pair, x(4, 5, 6), [-1, 0])
    renormalised(pair, x(4, 5, 6), None, keepdim=True)
for extreme in (aten.amax.default, aten.amin.default):
    renormalised(extreme, x(4, 5, 6), [-1])
    renormalised(extreme, x(4, 5, 6), [0, 1], True)
    renormalised(extreme, x(4, 5, 6))
renormalised(aten.prod.dim_int, x(4, 6), -1, True)
renormalised(aten.all.dim, bits(4, 6), 0)
renormalised(aten.aminmax.default, x(4, 6), dim=-1, keepdim=True)
renormalised(aten.aminmax.default, x(4, 6))
for soft in (aten._softmax.default, aten._log_softmax.default):
    renormalised(soft, x(4, 5, 6), -1, False)
    renormalised(soft, x(4, 5, 6), 1, False)
renormalised(aten._safe_softmax.default, x(4, 5, 6), -2)
exact(aten.cumsum.default, x(4, 6), -1)
exact(aten.cumsum.default, x(4, 6), 0)
for scan in (aten.cumprod, aten.cummax, aten.cummin, aten.logcumsumexp):
    exact(scan.default, x(4, 6), -1)
for choice in (aten.argmax.default, aten.argmin.default):
    exact(choice, x(4, 6), -1)
    exact(choice, x(4, 6), 0, True)
    fixed(choice, x(4, 6))
    CASES.append(Case(choice, (x(4, 6),), {}, "exact", unread=(0,)))
for choice in (aten.max.dim, aten.min.dim, aten.median.dim, aten.nanmedian.dim, aten.mode.default):
    exact(choice, x(4, 6), -1)
    exact(choice, x(4, 6), 0, True)
    CASES.append(Case(choice, (x(4, 6), 1), {}, "renormalised", unread=(1,)))
for choice in (aten.max, aten.min, aten.median, aten.nanmedian):
    renormalised(choice.default, x(4, 6))
exact(aten.kthvalue.default, x(4, 6), 2)
exact(aten.sort.default, x(4, 6), 0)
exact(aten.sort.stable, x(4, 6), stable=True, dim=-1)
exact(aten.topk.default, x(4, 6), 3)
exact(aten.topk.default, x(4, 6), 2, 0)

# Pooling, padding and resampling.
exact(aten.avg_pool2d.default, x(2, 4, 6, 6), [3, 2], [2, 2], [1, 1])
exact(aten.avg_pool2d.default, x(4, 6, 6), [2, 2])
exact(aten._adaptive_avg_pool2d.default, x(2, 4, 6, 6), [1, 1])
exact(aten.adaptive_max_pool2d.default, x(2, 4, 6, 6), [2, 3])
exact(aten.max_pool2d_with_indices.default, x(2, 4, 6, 6), [3, 3], [2, 2], [1, 1])
exact(aten.avg_pool3d.default, x(2, 4, 4, 4, 4), [2, 2, 2])
exact(aten._adaptive_avg_pool3d.default, x(2, 4, 4, 4, 4), [2, 1, 3])
exact(aten.adaptive_max_pool3d.default, x(2, 4, 4, 4, 4), [2, 1, 3])
exact(aten.max_pool3d_with_indices.default, x(2, 4, 4, 4, 4), [2, 2, 2])
for mode in ("reflection", "replication"):
    for n in (1, 2, 3):
        operator = getattr(aten, f"{mode}_pad{n}d").default
        exact(operator, x(2, 4, *[5] * n), [1, 2] * n)
exact(aten.upsample_linear1d.default, x(2, 4, 5), [9], False)
exact(aten.upsample_linear1d.vec, x(2, 4, 5), None, True, [2.0])
exact(aten.upsample_nearest1d.default, x(2, 4, 5), [10])
exact(aten._upsample_nearest_exact1d.default, x(2, 4, 5), [10])
for smooth in ("upsample_bicubic2d", "upsample_bilinear2d"):
    exact(getattr(aten, smooth).default, x(2, 4, 5, 5), [9, 8], False)
    exact(getattr(aten, f"_{smooth}_aa").default, x(2, 4, 5, 5), [3, 8], True)
exact(aten.upsample_nearest2d.default, x(2, 4, 5, 5), [10, 10])
exact(aten.upsample_nearest2d.vec, x(2, 4, 5, 5), None, [2.0, 3.0])
exact(aten._upsample_nearest_exact2d.default, x(2, 4, 5, 5), [10, 7])
exact(aten.upsample_nearest3d.default, x(2, 4, 3, 3, 3), [6, 6, 6])
exact(aten._upsample_nearest_exact3d.default, x(2, 4, 3, 3, 3), [6, 6, 6])
exact(aten.upsample_trilinear3d.default, x(2, 4, 3, 3, 3), [6, 5, 4], False)
exact(aten.grid_sampler_2d.default, x(2, 4, 5, 5), x(2, 3, 6, 2), 0, 0, False)
exact(aten.grid_sampler_3d.default, x(2, 4, 3, 3, 3), x(2, 2, 3, 4, 3), 0, 1, True)
exact(aten.im2col.default, x(2, 4, 5, 6), [3, 2], [1, 1], [1, 0], [2, 1])
exact(aten.im2col.default, x(4, 5, 6), [3, 3], [1, 1], [0, 0], [1, 1])
exact(aten.col2im.default, x(2, 4 * 6, 8), [4, 5], [3, 2], [1, 1], [0, 0], [1, 1])
exact(aten.col2im.default, x(4 * 9, 20), [4, 5], [3, 3], [1, 1], [1, 1], [1, 1])

# Views.
for reshape in (aten.view.default, aten._unsafe_view.default):
    exact(reshape, x(2, 12), [2, 3, 4])
    exact(reshape, x(2, 3, 4), [2, 12])
    exact(reshape, x(2, 3, 4), [-1, 4])
    exact(reshape, x(6, 4, 5), [2, 3, 20])
    exact(reshape, x(4, 6), [8, 3])
    fixed(reshape, x(4, 6), [6, 4])
    exact(reshape, x(2, 12), [2, 1, 12, 1])
    exact(reshape, x(6, 5, 2), [30, 2])
fixed(aten.view.default, x(4, 9), [6, 6])
fixed(aten.view.dtype, x(4, 6), torch.float32)
exact(aten.permute.default, x(2, 3, 4), [2, 0, 1])
exact(aten.permute.default, x(4, 4, 4), [-1, 0, -2])
exact(aten.transpose.int, x(4, 4, 5), 0, -1)
exact(aten.transpose.int, x(4, 4), -2, -1)
exact(aten.t.default, x(4, 5))
exact(aten.t.default, x(4))
exact(aten.expand.default, x(1, 4), [3, 4])
exact(aten.expand.default, x(4, 1), [4, 4])
exact(aten.expand.default, x(4, 1, 3), [2, -1, 5, 3])
exact(aten.squeeze.default, x(1, 4, 1, 6))
exact(aten.squeeze.dim, x(1, 4, 1, 6), -2)
exact(aten.squeeze.dim, x(4, 6), 0)
exact(aten.squeeze.dims, x(1, 4, 1, 6), [0, 1])
exact(aten.unsqueeze.default, x(4, 6), 1)
exact(aten.unsqueeze.default, x(4, 6), -1)
for dim, start, end in ((0, 2, 6), (-2, None, 5), (0, 3, 2**63 - 1), (0, -5, -2), (0, -9, 8)):
    exact(aten.slice.Tensor, x(8, 4), dim, start, end)
exact(aten.slice.Tensor, x(8, 4), 1, 0, 9)
exact(aten.slice.Tensor, x(8, 4), 0, 5, 3)
exact(aten.slice.Tensor, x(4, 12), 1, 0, 12, 3)
exact(aten.slice.Tensor, x(4, 12), -1, 2, None, 3)
exact(aten.slice.Tensor, x(4, 12), 1, 3, 11, 2)
exact(aten.select.int, x(4, 6), 0, 2)
exact(aten.select.int, x(4, 6), -1, -2)
exact(aten.unbind.int, x(3, 6), 0)
exact(aten.unbind.int, x(4, 3), -1)
for cut in (aten.split.Tensor, aten.unsafe_split.Tensor):
    exact(cut, x(8, 6), 3)
    exact(cut, x(4, 6), 2, -1)
for cut in (aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default):
    exact(cut, x(8, 6), [3, 4, 1])
    exact(cut, x(4, 9), [2, 4, 3], -1)
exact(aten.cat.default, [x(3, 4), x(5, 4)])
exact(aten.cat.default, [x(2, 4), x(2, 3), x(2, 4)], -1)
exact(aten.cat.default, [x(3, 4), torch.zeros(0), x(3, 4)])
exact(aten.stack.default, [x(3, 4), x(3, 4)])
exact(aten.stack.default, [x(3, 4), x(3, 4), x(3, 4)], -1)
exact(aten.repeat.default, x(3, 4), [2, 1, 3])
exact(aten.repeat.default, x(4), [4])
exact(aten.constant_pad_nd.default, x(4, 6), [2, 3])
exact(aten.constant_pad_nd.default, x(4, 6), [0, 2, 3, 0], 1.5)
exact(aten.constant_pad_nd.default, x(4, 6), [-1, -1])
exact(aten.constant_pad_nd.default, x(4, 8), [-2, -3])
exact(aten.constant_pad_nd.default, x(4, 8), [3, -2, -1, 2])
exact(aten.index_select.default, x(4, 6), 1, torch.tensor([3, 1, 0, 5, 4, 2]))
exact(aten.index_select.default, x(4, 6), -1, torch.tensor([3, 1, 0, 5, 4, 2], dtype=torch.int32))
exact(aten.index_select.default, x(4, 6), 1, torch.tensor([3, 1, 0, 5, 4, 4]))
exact(aten.index.Tensor, x(4, 6, 5), [None, torch.tensor([3, 1, 0, -1, 4, 2])])
exact(aten.index.Tensor, x(4, 6), [torch.tensor([3, 1, 0, 2])])
exact(aten.index.Tensor, x(2, 6), [torch.tensor([1, 0], dtype=torch.uint8)])
exact(aten.index.Tensor, x(4, 4), [torch.tensor([3, 1, 0, 2]), torch.tensor([0, 1, 2, 3])])
exact(aten.flip.default, x(4, 6), [0])
exact(aten.flip.default, x(4, 5, 6), [-1, 0])
exact(aten.roll.default, x(4, 6), [2], [-1])
fixed(aten.roll.default, x(4, 6), [2])
exact(aten.unfold.default, x(4, 8), -1, 3, 2)
exact(aten.unfold.default, x(8, 4), 0, 2, 2)
exact(aten.as_strided.default, x(4, 6), [4, 6], [6, 1])
fixed(aten.as_strided.default, x(4, 6), [6, 4], [1, 6])
fixed(aten.as_strided.default, x(4, 6), [3, 6], [6, 1], 6)

# Attention.
_ATTEND = aten._scaled_dot_product_flash_attention_for_cpu.default
for mask in (None, x(5, 7), x(2, 4, 5, 7), x(2, 1, 1, 7)):
    renormalised(_ATTEND, x(2, 4, 5, 8), x(2, 4, 7, 8), x(2, 4, 7, 8), attn_mask=mask)
renormalised(_ATTEND, x(2, 4, 5, 8), x(2, 4, 7, 8), x(2, 4, 7, 8), scale=0.3)
renormalised(_ATTEND, x(2, 6, 5, 8), x(2, 2, 7, 8), x(2, 2, 7, 8))
exact(_ATTEND, x(2, 4, 5, 8), x(2, 4, 5, 8), x(2, 4, 5, 8), 0.0, True)

# Recurrent layers: states, and for each layer and direction two matrices, two biases, a projection.
_GATES = {aten.lstm: 4, aten.gru: 3, aten.rnn_tanh: 1, aten.rnn_relu: 1}


def recurrent(
    packet: Any,
    layers: int,
    both: bool,
    biases: bool = True,
    projected: int = 0,
    first: bool = False,
) -> None:
    """Add calls of a recurrent operator: batch 2, 3 steps of 5 features, 6 hidden slots."""
    directions, rows, passed = 2 if both else 1, 6 * _GATES[packet], projected or 6
    parameters = []
    for layer in range(layers):
        for _ in range(directions):
            columns = 5 if layer == 0 else passed * directions
            parameters += [x(rows, columns), x(rows, passed)]
            parameters += [x(rows), x(rows)] if biases else []
            parameters += [x(passed, 6)] if projected else []
    count = layers * directions
    states: Any = x(count, 2, passed)
    if packet is aten.lstm:
        states = [states, x(count, 2, 6)]
    options = (biases, layers, 0.0, False, both)
    data = x(2, 3, 5) if first else x(3, 2, 5)
    exact(packet.input, data, states, parameters, *options, first)
    packed = (x(5, 5), torch.tensor([2, 2, 1]))
    exact(packet.data, *packed, states, parameters, *options)


for packet in _GATES:
    recurrent(packet, layers=1, both=False)
    recurrent(packet, layers=2, both=True, first=True)
recurrent(aten.lstm, layers=2, both=False, biases=False)
recurrent(aten.lstm, layers=2, both=True, projected=2)

# three gates of six units in blocks of three rows and two columns: only the batch can be cut
exact(
    OPERATOR.default, x(4, 4, 5), [x(6, 5)],
    x(6, 3, 2), torch.tensor([0, 1, 1, 0, 0, 1]), x(6, 3, 2), torch.tensor([0, 2, 1, 0, 2, 1]),
    x(18), x(18), "gru", False,
)  # fmt: skip
for first in (False, True):
    data = x(2, 3, 5) if first else x(3, 2, 5)
    exact(aten._pack_padded_sequence.default, data, torch.tensor([3, 2]), first)

# Complex numbers and transforms.
pairs = torch.view_as_complex(x(4, 6, 2))
exact(aten.view_as_complex.default, x(4, 6, 2))
exact(aten.view_as_real.default, pairs)
exact(aten._conj.default, pairs)
exact(aten._neg_view.default, x(4, 6))
exact(aten._fft_r2c.default, x(4, 6), [1], 0, True)
exact(aten._fft_c2c.default, pairs, [0], 0, True)
exact(aten._fft_c2r.default, pairs, [1], 0, 10)
fixed(aten._fft_r2c.default, x(4, 6), [0, 1], 0, True)

# Distances, products of three, and other sums of products.
exact(aten._cdist_forward.default, x(4, 6), x(5, 6), 2.0, None)
exact(aten._cdist_forward.default, x(3, 4, 6), x(3, 5, 6), 1.0, None)
exact(aten._cdist_forward.default, x(3, 1, 4, 6), x(2, 5, 6), 3.0, None)
exact(aten._trilinear.default, x(4, 5), x(6, 5, 7), x(4, 7), [1, 3], [0], [1, 2], [2, 3])
exact(aten.conv_tbc.default, x(9, 2, 6), x(3, 6, 5), x(5), 1)
exact(aten.rrelu_with_noise.default, x(4, 6), x(4, 6), 0.1, 0.3, False)

# Writing by number and by mask.
exact(aten.index_add.default, x(4, 6), 0, whole(4, 3), x(3, 6), alpha=2)
exact(aten.index_add.default, x(4, 6), -1, whole(6, 3), x(4, 3))
exact(aten.index_copy.default, x(4, 6), 1, torch.tensor([2, 0, 5]), x(4, 3))
exact(aten.index_reduce.default, x(4, 6), 0, whole(4, 3), x(3, 6), "amax")
exact(aten.index_fill.int_Scalar, x(4, 6), 0, whole(4, 3), 2.0)
exact(aten.index_fill.int_Tensor, x(4, 6), 1, whole(6, 3), x())
exact(aten.index.Tensor, x(4, 5, 6), [bits(4)])
exact(aten.index.Tensor, x(4, 5, 6), [None, bits(5, 6)])
exact(aten.index.Tensor, x(4, 5, 6), [bits(4, 5)])
fixed(aten.index.Tensor, x(4, 5), [bits(4, 5)])
exact(aten.index.Tensor, x(4, 5, 6), [torch.tensor([True, False, True, False]), whole(5, 2)])
exact(aten.index_put.default, x(4, 5, 6), [bits(4, 5)], x())
exact(aten.index_put.default, x(4, 6), [torch.tensor([True, False, True, True])], x(3, 6))
exact(aten.masked_scatter.default, x(4, 6), bits(4, 1).expand(4, 6), x(9, 6))
exact(aten.masked_scatter.default, x(3, 4, 6), bits(4, 1), x(12, 6))
fixed(aten.masked_scatter.default, x(4, 6), bits(4, 6), x(9, 6))
fixed(aten.masked_scatter.default, x(4, 6), bits(4, 1).expand(4, 6), x(54))

# Slots that the values decide.
for func, *others in (
    (aten.nonzero.default,),
    (aten._unique2.default,),
    (aten.unique_dim.default, 0),
    (aten.unique_consecutive.default,),
    (aten.histc.default,),
    (aten.masked_select.default, bits(4, 6)),
):
    fixed(func, x(4, 6), *others)
fixed(aten.bincount.default, whole(5, 9))
fixed(aten.searchsorted.Tensor, torch.arange(6.0), x(4))
fixed(aten.repeat_interleave.Tensor, whole(3, 6))
fixed(aten.multinomial.default, positive(4, 6), 1)

pooled, places = aten.max_pool2d_with_indices(x(2, 4, 6, 6), [2, 2])
exact(aten.max_unpool2d.default, pooled, places, [6, 6])
pooled, places = aten.max_pool3d_with_indices(x(2, 4, 4, 4, 4), [2, 2, 2])
exact(aten.max_unpool3d.default, pooled, places, [4, 4, 4], [2, 2, 2], [0, 0, 0])

# Products of groups of rows: tokens by expert, features by expert, and both in a matrix each.
ends = torch.tensor([2, 5, 8], dtype=torch.int32)
exact(aten._grouped_mm.default, x(8, 6), x(3, 6, 5), ends)
exact(aten._grouped_mm.default, x(3, 4, 6), x(6, 8), ends)
exact(aten._grouped_mm.default, x(4, 8), x(8, 5), ends)
exact(aten._grouped_mm.default, x(3, 4, 6), x(3, 6, 5))

import_transformers()  # brings an operator for products of groups of rows of its own
importlib.import_module("transformers.integrations.moe")
grouped = torch.ops.transformers.grouped_mm_fallback.default
exact(grouped, x(8, 6), x(3, 6, 5), torch.tensor([2, 5, 8], dtype=torch.int32))

# Fake quantisation; float32 is what the kernels with tensors of scales take.
_STEPS, _ZEROS, _ON = positive(6).float(), whole(9, 6).int(), torch.tensor([1])
exact(aten.fake_quantize_per_tensor_affine_cachemask.default, x(4, 6), 0.1, 3, 0, 15)
exact(
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default,
    x(4, 6), torch.tensor(0.1), torch.tensor(3), _ON, 0, 15,
)  # fmt: skip
learnt = aten._fake_quantize_learnable_per_tensor_affine.default
exact(learnt, x(4, 6).float(), torch.tensor([0.1]), torch.tensor([3.0]), 0, 15)
for axis, shape in ((1, (4, 6, 3)), (0, (6, 4))):
    per_channel = aten.fake_quantize_per_channel_affine_cachemask.default
    exact(per_channel, x(*shape).float(), _STEPS, _ZEROS, axis, 0, 15)
learnt = aten._fake_quantize_learnable_per_channel_affine.default
exact(learnt, x(4, 6).float(), _STEPS, _ZEROS.float(), 1, 0, 15)
for observe, unread in (
    (aten._fused_moving_avg_obs_fq_helper.default, ()),
    (
        aten._fused_moving_avg_obs_fq_helper_functional.default,
        (2, 3),
    ),  # averages that rounding clamps
):
    for on in (0, 1):
        switches = torch.tensor([on]), _ON
        held = x(6).float() - 3, x(6).float() + 3, _STEPS.clone(), _ZEROS.clone()
        operands = (x(6, 4).float(), *switches, *held, 1.0, -128, 127, 0, True, True)
        CASES.append(Case(observe, operands, {}, "exact", unread))
        held = torch.tensor(-1.0), torch.tensor(1.0), torch.tensor([0.1]), _ZEROS[:1].clone()
        operands = (x(4, 6).float(), *switches, *held, 1.0, 0, 127, 0, False)
        CASES.append(Case(observe, operands, {}, "exact", unread))


def deformed(groups: int, offset_groups: int, *, masked: bool = True) -> None:
    """Add a call of the deformable convolution: a window of 3 x 2, 12 channels to 8."""
    offset, mask = x(2, offset_groups * 12, 4, 4), positive(2, offset_groups * 6, 4, 4)
    tensors = x(2, 12, 6, 5), x(8, 12 // groups, 3, 2), offset, mask if masked else x(2, 1), x(8)
    settings = (1, 1, 0, 0, 1, 1, groups, offset_groups, masked)
    exact(deformable_convolution(), *tensors, *settings)


for groups, offset_groups in ((1, 1), (4, 1), (1, 3), (2, 4), (4, 2), (4, 3)):
    deformed(groups, offset_groups)
deformed(1, 1, masked=False)

# Chance.
for draw in (aten.uniform.default, aten.exponential.default, aten.random.default):
    fixed(draw, x(4, 6))
fixed(aten.normal.Tensor_float, x(4, 6), 1.0)
