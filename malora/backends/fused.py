"""Base product and experts of sibling layers in as few passes over the data as there can be.

Layers that read the same input (Q, K and V; Gate and Up) are computed together: the down sides and routers of all are
one product, what comes out is routed and gated in one kernel, each up side is added to its base product in place, and
in the backward pass the gradients of the input are added up by the products that make them. Weights are read from
narrow copies, stacked as the products want them and renewed when a weight has changed; sums and weight gradients are
float32. A sibling's dropout is its siblings': one mask for the input they share, kept as its seed.

Shapes: T tokens, n in, m out, G siblings, N experts, r rank, H = N·r, R rows of a sibling's down side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora.backends import kernels
from malora.backends.kernels import GateShape
from malora.routing import Routing

if TYPE_CHECKING:
    from malora.layer import MaloraLayer


class Stack:
    """One adapter of some siblings: their weights in the forms that the products read."""

    def __init__(self, layers: list[MaloraLayer], adapter: str) -> None:
        self.layers, self.adapter = layers, adapter
        self.config = layers[0].settings[adapter]
        self._key: tuple | None = None

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Every layer's output for x [..., n]; leaves what was routed in the layers."""
        config, device = self.config, x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x_Tn = x.to(dtype).flatten(0, -2).contiguous()
        parameters = self._parameters()
        self._renew(parameters, x_Tn)
        seed = None
        if config.lora_dropout and self.layers[0].training:
            seed = torch.randint(2**31 - 1, (1,), device=x.device)
        ys = _Experts.apply(x_Tn, seed, self, *parameters)
        if config.has_router:
            ys, probabilities = ys[: len(self.layers)], ys[len(self.layers) :]
            for layer, probability in zip(self.layers, probabilities, strict=True):
                if layer.routing_log.listening:
                    layer.routings[self.adapter] = Routing(probability.unflatten(0, x.shape[:-1]), config.top_k)
        return [y.unflatten(0, x.shape[:-1]) for y in ys]

    def _parameters(self) -> list[Tensor]:
        """By layer: router, A or P and S, B; without what the method does not have."""
        found = []
        for layer in self.layers:
            f = layer.factors(self.adapter)
            router = layer.malora_router[self.adapter] if self.config.has_router else None
            found += [tensor for tensor in (router, f.A, f.P, f.S, f.B) if tensor is not None]
        return found

    def _renew(self, parameters: list[Tensor], x: Tensor) -> None:
        """Copy the weights if they have changed. A CUDA graph has to hold the copy: they change between replays."""
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        shape_key = (x.dtype, x.device, capturing)
        key = (shape_key, *((p.data_ptr(), p._version) for p in parameters))
        if key == self._key:
            return
        if self._key is None or self._key[0][:2] != shape_key[:2]:
            self._allocate(x)
        self._key = key
        with torch.no_grad():
            torch._foreach_copy_(self.views, [p.detach() for p in parameters])

    def _allocate(self, x: Tensor) -> None:
        config, G = self.config, len(self.layers)
        f = self.layers[0].factors(self.adapter)
        N, r, n = config.num_experts, config.r, x.shape[1]
        H = N * r
        shared = f.S is not None and f.S.dim() == 2
        R = H if f.P is None else config.d
        D = r if f.P is None else f.P.shape[2]
        # Rows and columns of matrix products come in eights, or the tensor cores stand idle; what pads them is zero.
        R8, N8, H8, D8 = (-(-size // 8) * 8 for size in (R, N, H, D))
        if not config.has_router:
            N8 = 0
        self.down = x.new_zeros(G * (R8 + N8), n)
        self.P = None if f.P is None else x.new_zeros(G, N, r, D8)
        self.B = [x.new_zeros(H8, layer.out_features) for layer in self.layers]
        self.is_padded = (R, H) != (R8, H8) or (config.has_router and N != N8)
        self.kinds = [kind for kind in ("router", "A", "P", "S", "B")
                      if (config.has_router if kind == "router" else getattr(f, kind) is not None)]  # fmt: skip
        self.shape = GateShape(
            N=N, top_k=config.top_k, r=r, D=D, z_step=0 if shared else D, z_group=R8, l_group=N8, logits_at=G * R8,
            has_p=f.P is not None, scaling=config.scaling,
        )  # fmt: skip
        z_rows, l_rows = self.down.split([G * R8, G * N8])
        self.views = [view for g in range(G) for view in self.parts(z_rows, l_rows, self.P, self.B[g], g)]

    def new(self, like: Tensor, *shape: int) -> Tensor:
        """For a kernel that writes what is not padding."""
        return like.new_zeros(shape) if self.is_padded else like.new_empty(shape)

    def by_sibling(self, zl: Tensor) -> Tensor:
        """z of each sibling, [G, T, R], as a view."""
        G = len(self.layers)
        return zl[:, : G * self.shape.z_group].unflatten(1, (G, self.shape.z_group)).transpose(0, 1)

    def P_gradient(self, e: Tensor, zl: Tensor) -> Tensor:
        s, z = self.shape, self.by_sibling(zl)
        wide = torch.promote_types(z.dtype, torch.float32)
        if not s.z_step:
            dP = torch.stack([_weight_gradient(e_g, z_g) for e_g, z_g in zip(e, z, strict=True)])
            return dP[:, : s.N * s.r].unflatten(1, (s.N, s.r))
        e = e[..., : s.N * s.r].unflatten(2, (s.N, s.r))
        z = z[..., : s.N * s.D].unflatten(2, (s.N, s.D))
        return torch.einsum("gtnr,gtnd->gnrd", e, z).to(wide)

    def parts(self, z_rows: Tensor, l_rows: Tensor, P: Tensor | None, B: Tensor, g: int) -> list[Tensor]:
        """Sibling g's parameters as views of stacked tensors, which hold weights or their gradients."""
        s = self.shape
        found = [l_rows[g * s.l_group :][: s.N]] if self.config.has_router else []
        rows = z_rows[g * s.z_group :]
        if P is None:
            found.append(rows[: s.N * s.r].unflatten(0, (s.N, s.r)))
        else:
            found.append(P[g, ..., : s.D])
            found.append(rows[: s.N * s.D].unflatten(0, (s.N, s.D)) if s.z_step else rows[: s.D])
        return [*found, B[: s.N * s.r].unflatten(0, (s.N, s.r))]


class _Experts(torch.autograd.Function):
    """(x [T, n], dropout's seed [1] or None, the stack, its parameters) -> outputs [T, m] of each layer, and then, of
    routed ones, the probabilities [T, N] of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor | None, stack: Stack, *parameters: Tensor) -> tuple[Tensor, ...]:
        config, s, down = stack.config, stack.shape, stack.down
        weights = [layer.base_layer.weight.to(x.dtype) for layer in stack.layers]
        zl = x.new_empty(len(x), len(down))
        if seed is None:
            torch.mm(x, down.T, out=zl)
        else:
            torch.mm(kernels.dropout(x, seed, config.lora_dropout), down[: s.logits_at].T, out=zl[:, : s.logits_at])
            if config.has_router:  # it sees all inputs
                torch.mm(x, down[s.logits_at :].T, out=zl[:, s.logits_at :])
        if config.has_router:
            h = stack.new(x, len(stack.layers), len(x), len(stack.B[0]))
            probabilities = kernels.gate(zl, stack.P, h, s).unbind()
            alpha = 1.0
        else:
            h = stack.by_sibling(zl)
            probabilities, alpha = (), config.scaling
        ys = []
        for layer, W, B, h_g in zip(stack.layers, weights, stack.B, h, strict=True):
            bias = layer.base_layer.bias
            y = F.linear(x, W, None if bias is None else bias.to(x.dtype))
            ys.append(y.addmm_(h_g, B, alpha=alpha))
        ctx.stack, ctx.alpha = stack, alpha
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, seed, zl, h if config.has_router else None, down, stack.P, *stack.B, *weights)
        return (*ys, *probabilities)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        stack, alpha = ctx.stack, ctx.alpha
        config, s, G = stack.config, stack.shape, len(stack.layers)
        x, seed, zl, h, down, P, *rest = ctx.saved_tensors
        Bs, weights = rest[:G], rest[G:]
        dys = [
            x.new_zeros(len(x), B.shape[1]) if dy is None else dy.contiguous()
            for dy, B in zip(gradients[:G], Bs, strict=True)
        ]
        needs = dict(zip(stack.kinds, ctx.needs_input_grad[3:], strict=False))  # siblings train alike

        dzl = stack.new(x, *zl.shape)
        dz, dl = dzl[:, : s.logits_at], dzl[:, s.logits_at :]
        if config.has_router:
            dh = x.new_empty(h.shape)
            for dy, B, dh_g in zip(dys, Bs, dh, strict=True):
                torch.mm(dy, B.T, out=dh_g)
            e = kernels.gate_backward(zl, P, dh, _stacked(gradients[G:], x, s.N), dzl, s)
        else:
            h = stack.by_sibling(zl)
            for dy, B, dz_g in zip(dys, Bs, stack.by_sibling(dzl), strict=True):
                torch.addmm(dz_g, dy, B.T, beta=0, alpha=alpha, out=dz_g)

        dx = None
        if ctx.needs_input_grad[0]:
            dx = dys[0] @ weights[0]
            for dy, W in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, W)
            if seed is None:
                dx.addmm_(dzl, down)
            else:
                if config.has_router:
                    dx.addmm_(dl, down[s.logits_at :])
                kernels.dropout(dz @ down[: s.logits_at], seed, config.lora_dropout, add_to=dx)

        # What is not trained gets its weights for gradients, which are then left out.
        z_rows, l_rows, dP, dBs = down[: s.logits_at], down[s.logits_at :], P, Bs
        dropped = x if seed is None else kernels.dropout(x, seed, config.lora_dropout)
        if needs.get("A", needs.get("S")):
            z_rows = _weight_gradient(dz, dropped)
        if needs.get("router"):
            l_rows = _weight_gradient(dl, x)
        if needs.get("P"):
            dP = stack.P_gradient(e, zl)
        if needs["B"]:
            dBs = [_weight_gradient(h_g, dy) for h_g, dy in zip(h, dys, strict=True)]
            if alpha != 1:
                torch._foreach_mul_(dBs, alpha)
        found = [part for g in range(G) for part in stack.parts(z_rows, l_rows, dP, dBs[g], g)]
        wanted = zip(found, ctx.needs_input_grad[3:], strict=True)
        return dx, None, None, *(gradient if needed else None for gradient, needed in wanted)


def _weight_gradient(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right of [T, a] and [T, b], summed and kept in float32 or wider."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return (left.T @ right).to(torch.promote_types(left.dtype, torch.float32))


def _stacked(gradients: tuple[Tensor | None, ...], x: Tensor, N: int) -> Tensor:
    """The gradients of the probabilities, [G, T, N]."""
    if all(gradient is not None for gradient in gradients):
        return torch.stack(gradients)
    zero = x.new_zeros(len(x), N, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.stack([zero if gradient is None else gradient for gradient in gradients])
