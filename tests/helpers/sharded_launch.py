"""
Run a script under accelerate's DeepSpeed or FSDP2, and tell what each process holds of the model:
`sharded_launch.py DEVICE SCRIPT ARGUMENTS...`. accelerate itself does not offer this for the device `cpu`.
"""

import os
import runpy
import sys

os.environ.update({"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"} if sys.argv[1] == "cpu" else {})

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer

prepare = Trainer._prepare_for_training


def local(parameter):
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel(), parameter.ds_numel
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel(), parameter.numel()


def watched(self, *args, **kwargs):
    prepared = prepare(self, *args, **kwargs)
    held, of = map(sum, zip(*map(local, self.model.parameters()), strict=True))
    weight = self.model.get_input_embeddings().weight
    kind = "DTensor" if hasattr(weight, "to_local") else type(weight).__name__
    share = f"{held / of:.2f} of the model in {weight.dtype}, as {kind} on {weight.device.type}"
    print(f"process {self.args.process_index} holds {share}", flush=True)
    return prepared


if sys.argv[1] == "cpu":
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
Trainer._prepare_for_training = watched
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
