"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, batched over weights of one shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

#: Largest component of an update over the learning rate: in one basis, Adam with the default betas reaches 1.7.
_LARGEST = 2.0


class Soap(Optimizer):
    r"""Adam in a slowly rotating basis in which the gradient's rows and columns are uncorrelated.

    .. math:: L \leftarrow \beta_s L + (1 - \beta_s) G G^T, \quad R \leftarrow \beta_s R + (1 - \beta_s) G^T G, \qquad
              W \leftarrow W - \eta\; Q_L\, \mathrm{Adam}(Q_L^T G Q_R)\, Q_R^T

    with :math:`Q` the eigenvectors of L and R, refreshed by one step of power iteration every ``frequency`` steps.
    Source: Vyas et al., arXiv:2409.11321. The W^l of an N-body network are many small matrices, for which this is cheap
    (all of one shape are batched in one product) and needs about half the steps of Adam.

    A side longer than ``max_size`` is not rotated (its basis costs the cube of its length). Weights that are not
    matrices, have a side of length one, or have no side to rotate are trained by plain Adam. A weight without a
    gradient does not change in that step; its averages use zero as the gradient.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the mean and of the mean square.
        shampoo_beta: decay of L and R.
        frequency: steps between refreshes of the bases.
        max_size: largest side that is rotated.
        eps: added to the root of the mean square.
        weight_decay: decoupled decay.

    Raises: ValueError: a rate or decay out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        shampoo_beta: float = 0.95,
        frequency: int = 10,
        max_size: int = 192,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if lr <= 0 or not all(0 <= beta < 1 for beta in (*betas, shampoo_beta)) or frequency < 1:
            raise ValueError(f"lr and frequency must be positive and decays in [0, 1), got {lr}, {frequency}, {betas}")
        defaults = {
            "lr": lr, "betas": betas, "shampoo_beta": shampoo_beta, "frequency": frequency,
            "max_size": max_size, "eps": eps, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults)

    @classmethod
    def from_module(cls, module: nn.Module, lr: float, weight_decay: float = 0.0) -> Soap:
        return cls([p for p in module.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            matrices: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            others: list[Tensor] = []
            for p in group["params"]:
                turned = p.dim() == 2 and 1 < min(p.shape) <= group["max_size"]
                (matrices[tuple(p.shape)] if turned else others).append(p)
            # Batches must not depend on which weights have a gradient in a step, because the state belongs to the
            # batch.
            for members in matrices.values():
                if any(p.grad is not None for p in members):
                    self._step_matrices(members, group)
            if any(p.grad is not None for p in others):
                self._step_others(others, group)
        return loss

    def _step_matrices(self, members: list[Tensor], group: dict[str, Any]) -> None:
        # The state of a batch of equal shapes is stored with its first member.
        grad, state = torch.stack([_gradient(p) for p in members]), self.state[members[0]]
        if not state:
            self._start(state, grad, group["max_size"])
        state["step"] += 1
        (beta1, beta2), step, keep = group["betas"], int(state["step"]), group["shampoo_beta"]
        for side in _sides(state):
            state[side].lerp_(_gram(grad, side), 1 - keep)
        # The mean is kept in the rotated basis, and rotated when the basis changes.
        turned = _turn(state, grad, into=True)
        state["mean"].lerp_(turned, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
        root = (state["square"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        # The squares do not follow a change of basis: after a zero gradient, as of an ideal crystal, they may vanish.
        bound = _LARGEST * (1 - beta1**step)
        update = _turn(state, (state["mean"] / root).clamp_(-bound, bound), into=False)
        self._apply_update(members, list(update.unbind()), group["lr"] / (1 - beta1**step), group)
        if step % group["frequency"] == 0 or step < 4:
            mean = _turn(state, state["mean"], into=False)
            for side in _sides(state):
                state[f"{side}_basis"] = torch.linalg.qr(state[side] @ state[f"{side}_basis"])[0]
            state["mean"] = _turn(state, mean, into=True)

    @staticmethod
    def _start(state: dict[str, Any], grad: Tensor, max_size: int) -> None:
        state.update(step=torch.zeros(()), mean=torch.zeros_like(grad), square=torch.zeros_like(grad))
        sizes = {"rows": grad.shape[-2], "columns": grad.shape[-1]}
        for side in (side for side, size in sizes.items() if size <= max_size):
            state[side] = _gram(grad, side)
            state[f"{side}_basis"] = _eigenvectors(state[side])

    def _step_others(self, members: list[Tensor], group: dict[str, Any]) -> None:
        grad, state = torch.cat([_gradient(p).flatten() for p in members]), self.state[members[0]]
        if not state:
            state.update(step=torch.zeros(()), mean=torch.zeros_like(grad), square=torch.zeros_like(grad))
        state["step"] += 1
        (beta1, beta2), step = group["betas"], int(state["step"])
        state["mean"].lerp_(grad, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = state["mean"] / (state["square"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        pieces = [u.view_as(p) for u, p in zip(update.split([p.numel() for p in members]), members, strict=True)]
        self._apply_update(members, pieces, group["lr"] / (1 - beta1**step), group)

    @staticmethod
    def _apply_update(members: list[Tensor], update: list[Tensor], rate: float, group: dict[str, Any]) -> None:
        update = [u for u, p in zip(update, members, strict=True) if p.grad is not None]
        members = [p for p in members if p.grad is not None]
        if group["weight_decay"]:
            torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(members, update, alpha=-rate)


def _eigenvectors(gram: Tensor) -> Tensor:
    """The matrix of the first gradient has many eigenvalues of zero, on which LAPACK may fail in float32."""
    try:
        basis: Tensor = torch.linalg.eigh(gram)[1]
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not list it
        basis = torch.linalg.eigh(gram.double())[1]
    return basis.to(gram.dtype)


def _gram(grad: Tensor, side: str) -> Tensor:
    """G G^T of the rows or G^T G of the columns."""
    return grad @ grad.mT if side == "rows" else grad.mT @ grad


def _sides(state: dict[str, Any]) -> list[str]:
    """The sides that are rotated; they follow from the entries of the state, and so are kept in a checkpoint."""
    return [side for side in ("rows", "columns") if side in state]


def _turn(state: dict[str, Any], x: Tensor, into: bool) -> Tensor:
    """Transform into the bases of the rotated sides, or back."""
    if "rows" in state:
        basis = state["rows_basis"]
        x = (basis.mT if into else basis) @ x
    if "columns" in state:
        basis = state["columns_basis"]
        x = x @ (basis if into else basis.mT)
    return x


def _gradient(p: Tensor) -> Tensor:
    """The gradient of a parameter, zero where it has none."""
    return torch.zeros_like(p) if p.grad is None else p.grad
