"""Quantization-aware training on several processes."""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch

from repvgg_hf import QATConfig
from repvgg_hf.compression.qat.distributed import gathered, sharded_modules

DISTRIBUTED = """
import sys
import torch
import torch.distributed as distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from repvgg_hf import QATConfig, RepVGGForImageClassification, update_codebooks
from repvgg_hf.compression.qat.callback import check_gradients

kind, folder, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
qat_config = QATConfig(codebook_update_every=2)
model = RepVGGForImageClassification.from_pretrained(f"{folder}/float").prepare_qat(bits=2, qat_config=qat_config)
model.train()
if kind == "ddp":
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
else:
    mesh = init_device_mesh("cpu", (2,))
    parallel = model
    for module in [*[block for stage in model.repvgg.encoder.stages for block in stage.layers], model]:
        fully_shard(module, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
batch = {name: tensor[rank::2] for name, tensor in torch.load(f"{folder}/batch.pt").items()}
for _ in range(4):
    parallel(**batch).loss.backward()
    check_gradients(model, 1)
    optimizer.step()
    optimizer.zero_grad()
    update_codebooks(model)
state = {name: getattr(tensor, "full_tensor", lambda: tensor)() for name, tensor in model.state_dict().items()}
torch.save(state, f"{folder}/{rank}.pt")
(parallel(**batch).loss * (float("nan") if rank == 1 else 1)).backward()
try:
    check_gradients(model, 5)
except RuntimeError as error:  # on both ranks, as they share the gradients
    print(error)
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one_with_twice_the_batch(kind, make_model, train, assert_same_state, batch, tmp_path):
    """Their codebooks are the same without any exchange, as the same kernels give the same ones."""
    make_model().save_pretrained(tmp_path / "float")
    torch.save(batch, tmp_path / "batch.pt")
    command = [sys.executable, "-c", DISTRIBUTED, kind, str(tmp_path)]
    processes = [
        subprocess.Popen(
            [*command, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        for rank in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        # the gradients of one rank are those of both
        assert re.match(r"The gradients of \S+ and \d+ other parameters are NaN .* in optimizer step 5", output), output
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same_state(first, second)

    model = make_model().prepare_qat(bits=2, qat_config=QATConfig(codebook_update_every=2))
    start = copy.deepcopy(model.state_dict())
    train(model, batch, 4)
    assert all(not torch.equal(first[name], start[name]) for name in first if name.endswith("fake_quant.codebook"))
    for name, tensor in model.state_dict().items():
        # rounding may decide whether a bounded batch norm weight gets its gradient
        atol = 5e-3 if name.endswith("norm.weight") else 1e-4
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=atol, msg=name)


def test_one_process_has_everything(make_model):
    model = make_model()
    assert sharded_modules(model) == []
    with gathered(model):
        pass
