"""Which optimizer owns which parameter of a decoder: Muon for hidden matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import AdamW, Muon, Optimizer


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(hidden matrices, other parameters). Embeddings, output head, norms and biases are others."""
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
    }
    head = getattr(model, "lm_head", None)
    outside = embeddings | ({id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set())
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in outside]
    ours = {id(p) for p in matrices}
    return matrices, [p for p in parameters if id(p) not in ours]


def muon_and_adamw(model: nn.Module, matrix_lr: float, lr: float) -> list[Optimizer]:
    """Muon (Jordan et al. 2024, orthogonalised momentum) and AdamW, to be stepped together.

    Meant for a model trained from scratch; for a pretrained one use `adamw`.
    """
    matrices, others = split_parameters(model)
    return [
        Muon(matrices, lr=matrix_lr, weight_decay=0.01, momentum=0.95),
        AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def adamw(model: nn.Module, lr: float) -> list[Optimizer]:
    """AdamW on every trainable parameter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def set_learning_rate(optimizers: Sequence[Optimizer], factor: float) -> None:
    """Set the learning rate of every group to `factor` times its initial one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
