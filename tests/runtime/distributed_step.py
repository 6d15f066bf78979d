"""One training step on this process' half of a batch; `test_training.py` starts it on two processes.

Arguments: a checkpoint folder, a file with the batch, an output folder.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from repvgg_hf import RepVGGForImageClassification

checkpoint, batch_file, output = sys.argv[1:]
rank = int(os.environ["RANK"])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
model = RepVGGForImageClassification.from_pretrained(checkpoint).train()
if rank == 1:  # DistributedDataParallel must bring these back to rank 0's
    for tensor in model.state_dict().values():
        tensor.zero_()
model = DistributedDataParallel(model)
pixel_values, labels = (tensor.chunk(2)[rank] for tensor in torch.load(batch_file))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(pixel_values=pixel_values, labels=labels).loss.backward()
optimizer.step()
after_step = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
with torch.no_grad():
    model.eval()(pixel_values=pixel_values)  # sends rank 0's buffers
torch.save((after_step, model.module.state_dict()), Path(output) / f"rank{rank}.pt")
torch.distributed.destroy_process_group()
