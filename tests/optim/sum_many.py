"""Sum gradients over ranks and write what this rank has afterwards. usage: sum_many.py OUT"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ptune_dist.distributed.world import init_distributed
from ptune_dist.optim.gradients import sum_gradients
from ptune_dist.optim.prompt_state import PromptState
from tests.optim.states import build_member, give_gradients


def main() -> None:
    world = init_distributed()
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (3,), (1,))]
    parameters[0].grad = torch.full((2, 2), float(world.rank + 1))
    if world.rank == world.size - 1:
        parameters[1].grad = torch.full((3,), float(world.rank + 1))
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, **options: (calls.append(tensor.numel()), all_reduce(tensor, **options))
    sum_gradients(parameters, world)
    dist.all_reduce = all_reduce
    precise = nn.Parameter(torch.zeros(4))
    precise.grad = torch.full((4,), 1.0 if world.rank == 0 else 2.0**-20)
    sum_gradients([precise], world)
    member = build_member()
    give_gradients(PromptState({"one": member}, world), one=1.0)
    measured = PromptState({"one": member}, world).measure(["one"], torch.tensor([world.rank + 1.0, 0.5]))
    found = {
        "sums": [parameter.grad.tolist() for parameter in parameters],
        "precise": precise.grad.tolist(),
        "num_calls": len(calls),
        "losses": measured.losses,
        "norm": measured.norms["one"],
    }
    Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main()
