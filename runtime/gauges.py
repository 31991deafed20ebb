"""The numbers that a run watches between two lines of its log, kept on the device so that a GPU never waits for them.

They are read only when a line is written. Until then they also guard the weights: from the first loss or gradient that
is not finite, on any rank, the optimizers skip every update, so what is in memory and in the files stays sound.
"""

import torch
import torch.distributed as dist

from runtime.files import UserError

TIME_BINS = 10


class Gauges:
    """Means since the last `read`: the loss, the loss by tenths of t, the gradient's norm, the alignment."""

    def __init__(self, processes, device):
        self.processes, self.steps = processes, 0
        self.bins = torch.zeros(2, TIME_BINS, device=device)  # sum of the losses and their number, by time
        self.norms, self.alignment = torch.zeros(2, device=device)
        self.first_bad = torch.zeros(2, dtype=torch.long, device=device)  # step (0: none), and `blamed` as below

    def add(self, t, losses, alignment, weight):
        """Of a micro-batch: times (B), losses (B), alignment () or None; `weight`: its share of the step."""
        where = (t * TIME_BINS).long().clamp(max=TIME_BINS - 1)  # (B)
        self.bins.index_add_(1, where, torch.stack([losses.detach(), torch.ones_like(losses)]))
        if alignment is not None:
            self.alignment += alignment.detach() * weight

    def broken(self, step, norm):
        """1.0 if in this step or before it a number was not finite on any rank, else 0.0: (), on the device."""
        rank, world = self.processes.rank, self.processes.world
        # The rank whose loss it was, as world - rank, so that the maximum is the lowest rank; 0: none.
        blamed = torch.where(self.bins.isfinite().all(), 0, world - rank)
        if world > 1:
            dist.all_reduce(blamed, dist.ReduceOp.MAX)
        bad = (blamed > 0) | ~norm.isfinite()
        first = bad & (self.first_bad[0] == 0)
        self.first_bad = torch.where(first, torch.stack([bad * step, blamed]), self.first_bad)
        self.norms += norm
        self.steps += 1
        return (self.first_bad[0] > 0).float()

    def read(self):
        """{name: mean}, and everything begins anew. UserError, the same on all ranks, if a number was not finite."""
        step, blamed = self.first_bad.tolist()
        if step:
            loss = f"loss stopped being finite on rank {self.processes.world - blamed}"
            what = loss if blamed else "gradient was not finite"
            remedy = "Resume with a lower --lr, or with --clip 1"
            raise UserError(f"the {what} at step {step}; nothing after it was kept. {remedy}")
        self.processes.sum(self.bins, self.alignment)
        sums, counts = self.bins.tolist()
        numbers = {"loss": sum(sums) / sum(counts), "grad_norm": self.norms.item() / self.steps}
        numbers["loss_by_time"] = [round(s / n, 5) if n else None for s, n in zip(sums, counts)]
        if aligned := self.alignment.item():
            numbers["alignment"] = aligned / self.steps / self.processes.world
        self.steps = 0
        for total in (self.bins, self.norms, self.alignment):
            total.zero_()
        return numbers
