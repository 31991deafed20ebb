"""AdamW, which the paper trains with, and Muon, with which Nano learns the emoji (`--optimizer`).

AdamW divides each number of a gradient by its own typical size. Muon (Keller Jordan, 2024) looks at a weight matrix as
a whole: of the averaged gradient M = U S V^T it keeps U V^T, so that directions of which the gradient has little are
learned as fast as the few that dominate it. On the emoji that gives the same loss after 0.85 to 0.6 of the images
(docs/measurements.md), at a cost per step that wants batches of 64 or more. torch.optim.Muon does the same one matrix
at a time (a test compares the two); stacked by shape it takes 0.6 of the time on a CPU. Each process does all the work.
"""

import torch

from runtime.machine import pick_precision

QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at 0, so that small singular values grow fast; they end in 0.7 .. 1.2


def orthogonalise(matrices, rounds=5):
    """U V^T of each of the matrices (N, rows, columns), roughly, by Newton-Schulz. Same shape and dtype.

    X (X^T X)^k has the singular vectors of X and its singular values to the power 2k + 1. So X <- a X + b (X X^T) X +
    c (X X^T)^2 X changes each singular value s to a s + b s^3 + c s^5, which drives all of (0, 1] towards 1. Rough is
    enough: it is done in bfloat16 where the machine is fast in it.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    X = matrices.mT if tall else matrices  # (N, r, k), r <= k: X X^T is then the smaller of the two products
    X = X.bfloat16() if pick_precision("auto", X.device) == "bf16" else X.float()
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)  # (N, r, k): no singular value is above 1
    for _ in range(rounds):
        gram = torch.bmm(X, X.mT)  # (N, r, r)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # (N, r, r)
        X = torch.baddbmm(X, poly, X, beta=a)  # (N, r, k)
    return (X.mT if tall else X).type_as(matrices)  # (N, rows, columns)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for matrices only. lr is AdamW's: the step is scaled to the same typical size.

    `found_inf`, as in torch's fused optimizers: a tensor (); while it is 1, parameters are left as they are.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self):
        """One update of all matrices that have a gradient, those of one shape together."""
        for group in self.param_groups:
            lr, momentum, by_shape = group["lr"], group["momentum"], {}
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, same in by_shape.items():
                grads = [p.grad for p in same]
                averages = [self.state[p]["momentum"] for p in same]
                torch._foreach_lerp_(averages, grads, 1 - momentum)
                ahead = torch._foreach_lerp(grads, averages, momentum)  # Nesterov: one step further
                directions = orthogonalise(torch.stack(ahead))  # (N, rows, columns)
                directions = torch.where(self.found_inf > 0, 0, directions)  # (N, rows, columns)
                if group["weight_decay"]:
                    torch._foreach_mul_(same, 1 - lr * group["weight_decay"] * (self.found_inf == 0))
                # The numbers of U V^T have a root mean square of 1 / sqrt(longer side); AdamW's steps are about 0.2.
                torch._foreach_add_(same, list(directions.unbind()), alpha=-0.2 * lr * max(shape) ** 0.5)


def make_optimizers(model, name, lr, weight_decay=0.0, beta2=0.999):
    """A list of optimizers that share out the parameters of `model`, for name "adamw" or "muon".

    With "muon", Muon takes the matrices of the transformer and field blocks, where nearly all weights are, and AdamW
    the rest: embeddings, the first and last layers, biases and norms, of which a direction means little.
    """
    matrices = [p for key, p in model.named_parameters() if name == "muon" and "blocks." in key and p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in matrices)]
    adamw = torch.optim.AdamW(rest, lr, (0.9, beta2), weight_decay=weight_decay, fused=True)
    return [adamw, Muon(matrices, lr, weight_decay=weight_decay)] if matrices else [adamw]
