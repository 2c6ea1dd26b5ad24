"""
Run a script under accelerate's DeepSpeed or FSDP2 on CPU processes, which accelerate itself does on devices
alone, and tell what each process holds of the model: `sharded_launch.py SCRIPT ARGUMENTS...`
"""

import os
import runpy
import sys

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
os.environ["DS_ACCELERATOR"] = "cpu"

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
    dtype = self.model.get_input_embeddings().weight.dtype
    print(f"process {self.args.process_index} holds {held / of:.2f} of the model in {dtype}", flush=True)
    return prepared


PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
Trainer._prepare_for_training = watched
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
