"""A device that runs out of memory: one sentence that names keys to change, and a report.

CUDA's own part, the summary and the snapshot, has not been run on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from small_training import SMALL

from hpcm_scale.config.compose import compose
from hpcm_scale.errors import Fault
from hpcm_scale.training.diagnostics import LAST_RESORT, explain_out_of_memory
from hpcm_scale.training.start import memory_remedies


@pytest.mark.parametrize(
    ("keys", "processes", "expected"),
    [
        ((), 8, ["train.micro_batch_size=2", "engine.activation_checkpointing=blocks", "engine=zero3"]),
        (("train.micro_batch_size=1",), 8, ["engine.activation_checkpointing=blocks", "engine=zero3"]),
        (
            ("train.batch_size=120",),
            8,
            ["train.micro_batch_size=5", "engine.activation_checkpointing=blocks", "engine=zero3"],
        ),
        (
            ("train.batch_size=8", "engine.activation_checkpointing=blocks"),
            8,
            ["engine.activation_checkpointing=steps", "engine=zero3"],
        ),
        (("train.batch_size=8", "engine.activation_checkpointing=steps", "engine=accelerate"), 8, ["engine=zero2"]),
        (("train.batch_size=8", "engine.activation_checkpointing=steps", "engine=zero0"), 8, ["engine=zero2"]),
        (("train.batch_size=8", "engine.activation_checkpointing=steps", "engine=zero3"), 8, ["engine=zero3_offload"]),
        (("train.batch_size=1", "engine.activation_checkpointing=steps"), 1, ["engine=zero3_offload"]),
        # ZeRO-3 cannot be compiled
        (("train.batch_size=8", "engine.compile=true"), 8, ["engine.activation_checkpointing=blocks"]),
        (("train.batch_size=8", "engine.activation_checkpointing=steps", "engine=zero3_offload"), 8, []),
    ],
)
def test_the_keys_named_are_those_that_are_not_in_use(keys, processes, expected):
    assert memory_remedies(compose(["model=nano", *keys]), processes) == expected


def test_a_micro_batch_that_later_crops_cannot_take_is_not_named():
    crops = ["schedule.crops=[512]", "schedule.crop_boundaries=[0.5]", "train.steps=100"]
    assert memory_remedies(compose(["model=nano", *crops]), 8)[0] == "engine.activation_checkpointing=blocks"


def test_the_sentence_without_a_run_folder():
    config = compose(
        ["model=nano", "train.batch_size=8", "engine.activation_checkpointing=steps", "engine=zero3_offload"]
    )
    with pytest.raises(Fault) as fault, explain_out_of_memory(memory_remedies(config, 8), 3, None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    reported = "rank 3 ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); "
    assert str(fault.value) == reported + LAST_RESORT


@pytest.mark.launch
def test_one_process_of_a_training(launch, shards, project):
    """It says the sentence last, once, and the same command goes on with what it names."""
    keys = [*SMALL, f"data.shards={shards}", "engine=zero2"]
    keys += ["run.dir=exhausted", "train.steps=4", "train.checkpoint_every=1"]
    result = launch(*keys, module="exhausted_train", PYTHONPATH=str(project / "tests" / "training"))
    said = result.stdout + result.stderr
    assert result.returncode == 1 and "Traceback" not in said, said
    sentence = (
        "hpcm: rank 1 ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity "
        "of 79.15 GiB of which 1.20 GiB is free); set train.micro_batch_size=1 or engine.activation_checkpointing="
        "blocks or engine=zero3, and the same command resumes the run; contents of the memory: "
        "exhausted/out_of_memory/rank_00001.txt"
    )
    assert [line for line in said.splitlines() if "out of memory" in line] == [sentence], said
    folder = launch.folder / "exhausted/out_of_memory"
    assert [file.name for file in folder.iterdir()] == ["rank_00001.txt"]
    assert "this process has 77.95 GiB memory in use" in (folder / "rank_00001.txt").read_text(encoding="utf-8")
    again = launch(*keys, "train.micro_batch_size=1", "engine.activation_checkpointing=blocks")
    assert again.returncode == 0 and "finished at step 4" in again.stdout + again.stderr, again
