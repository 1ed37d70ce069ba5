"""Numbers of all ranks of a step; in a single process they are what they were.

On GPUs the process group needs gloo beside NCCL, as torch's default has it: small sums stay on the
CPU.

Shapes: n numbers, m rows of this rank, c columns.
"""

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks(group: dist.ProcessGroup | None = None) -> int:
    """How many processes share a step; 1 where none has joined others."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(group)
    return 1


def own_rank(group: dist.ProcessGroup | None = None) -> int:
    """Which of them this process is, from 0."""
    return dist.get_rank(group) if num_ranks(group) > 1 else 0


def over_ranks(
    values: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> Tensor:
    """The values (n,), reduced over the ranks; the same on each."""
    if num_ranks(group) > 1:
        values = values.clone()
        dist.all_reduce(values, op=operation, group=group)
    return values


def all_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows (m, c) of all ranks in order of rank; ranks may hold different numbers."""
    ranks = num_ranks(group)
    if ranks == 1:
        return rows
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(ranks)]
    mine = torch.tensor([len(rows)], device=rows.device)
    dist.all_gather(sizes, mine, group=group)
    most = max(int(size) for size in sizes)
    padded = rows.new_zeros(most, rows.shape[1])
    padded[: len(rows)] = rows
    found = [torch.zeros_like(padded) for _ in range(ranks)]
    dist.all_gather(found, padded, group=group)
    return torch.cat([each[: int(size)] for each, size in zip(found, sizes, strict=True)])


def from_first(value: Any) -> Any:
    """The first rank's JSON value, on each; what the others give does not matter."""
    if num_ranks() == 1:
        return value
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor([len(text)])
    dist.broadcast(size, 0)
    if own_rank():
        text = torch.zeros(int(size), dtype=torch.uint8)
    dist.broadcast(text, 0)
    return json.loads(bytes(text.tolist()))
