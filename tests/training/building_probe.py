"""Run under a launcher: models that ZeRO-3 shards while they are made, beside the same ones made whole.

The argument is a JSON list of lists of overrides; for each, one JSON line from rank 0. The second line of every pair is
of a model that starts from the weights of the first.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from hpcm_scale.config.schema import Config
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.distributed.processes import complete_environment, without_launcher_arguments, world_size
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.model.ladder import compose_sized
from hpcm_scale.model.weights import WeightsFile, read_weights_file
from hpcm_scale.training.engines import create_engine
from hpcm_scale.training.task import Receivers, Task, task_of


class Living:
    """The most bytes that the parameters made within held at a time, looked at whenever another one is made."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.most = 0

    def register(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            self.parameters.append(parameter)
            self.most = max(self.most, sum(each.untyped_storage().nbytes() for each in self.parameters))


def make(config: Config, origin: WeightsFile | None, receivers: Receivers) -> Task:
    torch.manual_seed(config.train.seed)
    return task_of(config, origin, receivers)


def compare(config: Config, origin: WeightsFile | None, path: Path) -> dict[str, object]:
    receivers = {name: receiver(name) for name in config.machine.receivers}
    whole = make(config, origin, receivers)
    layers = [sum(each.nbytes for each in layer.parameters(recurse=False)) for layer in whole.module.modules()]
    rates = [getattr(each, "learning_rate_factor", None) for each in whole.module.parameters()]
    engine, living = (
        create_engine(config.engine, config.train, config.optimizer, RunSpec.of(config, world_size())),
        Living(),
    )
    with engine.building():
        hook = register_module_parameter_registration_hook(living.register)
        task = make(config, origin, receivers)
        hook.remove()
    left = sum(each.untyped_storage().nbytes() for each in task.module.parameters())
    buffers = [torch.equal(*pair) for pair in zip(whole.module.buffers(), task.module.buffers(), strict=True)]
    same_rates = rates == [getattr(each, "learning_rate_factor", None) for each in task.module.parameters()]
    engine.prepare(task.module)
    state = engine.weights()
    found = {"most": living.most, "largest": max(layers), "all": sum(layers), "left": left}
    if engine.rank == 0:
        expected = whole.module.state_dict()
        found["equal"] = state.keys() == expected.keys() and all(
            torch.equal(state[key], expected[key]) for key in state
        )
        found["equal"] = found["equal"] and all(buffers) and same_rates
        task.save(path, state, {"step": 0, "images": 0, "pflops": 0.0}, None)
        os.write(1, (json.dumps(found) + "\n").encode())
    engine.barrier()
    engine.close()
    return found


def main() -> None:
    complete_environment()
    [configurations] = without_launcher_arguments(sys.argv[1:])
    for number, (first, second) in enumerate(json.loads(configurations)):
        path = Path(f"{number}.safetensors")
        compare(compose_sized(first), None, path)
        compare(compose_sized(second), read_weights_file(path), path.with_suffix(".again.safetensors"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
