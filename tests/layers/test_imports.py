import subprocess
import sys

PROGRAM = """
import sys

class Fence:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError("fenced off: " + name)

sys.meta_path.insert(0, Fence())
import torch
from cl_moe.layers import MoE, PEER, DenseFFN, Switch
import cl_moe.losses
x = torch.randn(2, 3, 8)
for layer in (MoE(8, 4, 8, Switch), PEER(8, 16), DenseFFN(8, 16)):
    out, routing = layer(x)
    assert out.shape == x.shape
print("alone with torch")
"""


def test_the_layers_need_torch_alone():
    blocked = {"lightning", "hydra", "omegaconf", "mlflow", "datasets", "torchmetrics", "pandas", "sklearn"}
    program = PROGRAM.replace("{blocked}", repr(blocked))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "alone with torch", result.stderr
