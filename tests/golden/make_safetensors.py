"""Write safetensors.safetensors with the real `safetensors` and PyTorch. Run in this folder, in an environment with the `peers` extra."""
import torch
from safetensors.torch import save_file

KINDS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
tensors = {f"counting.{name}": torch.arange(6).reshape(2, 3).to(kind) for name, kind in KINDS.items()}
tensors["scalar"] = torch.tensor(-1.5)
tensors["empty"] = torch.zeros(3, 0, 2)
save_file(tensors, "safetensors.safetensors", metadata={"format": "pt", "é": "😀"})
