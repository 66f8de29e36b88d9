"""Training steps of the same model in PyTorch: its fused attention and fused AdamW; on a GPU 16-bit autocast over fp32 weights too.

(On a CPU this is eager fp32, its fastest way there: torch.compile gained nothing at these sizes, the default AdamW took up to a third
longer. On a GPU it is timed both eager and compiled.)
"""
import torch
from torch import nn
from torch.nn import functional as F

FORMATS = dict(bf16=torch.bfloat16, fp16=torch.float16)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x, rotation):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            cos, sin = (table[:T].to(q.dtype) for table in rotation)
            q, k = turned(q, cos, sin), turned(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(y.transpose(1, 2).reshape(B, T, C))


def turned(x, cos, sin):
    """RoPE: the pairs (i, i + D/2) of each head, turned by the position's angles.     (B, H, T, D) -> the same"""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class GeluMLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_and_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        gate, up = self.gate_and_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, settings: dict):
        super().__init__()
        width, (norm, mlp) = settings["width"], KINDS[settings["arch"]]
        self.attention_norm, self.mlp_norm = norm(width), norm(width)
        self.attention = Attention(width, settings["heads"])
        self.mlp = mlp(width, settings["mlp_width"])

    def forward(self, x, rotation):
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.mlp(self.mlp_norm(x))


KINDS = dict(gpt2=(lambda width: nn.LayerNorm(width, bias=False), GeluMLP), llama=(lambda width: nn.RMSNorm(width, eps=1e-5), SwiGLU))


class Model(nn.Module):
    """(B, T) ids and targets -> the mean loss."""

    def __init__(self, settings: dict):
        super().__init__()
        width, context = settings["width"], settings["context"]
        self.tokens = nn.Embedding(settings["vocab"], width)
        self.positions = nn.Embedding(context, width) if settings["arch"] == "gpt2" else None
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings["layers"]))
        self.norm = KINDS[settings["arch"]][0](width)
        half = width // settings["heads"] // 2
        angles = torch.arange(context)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for matrix in self.parameters():
            if matrix.dim() == 2:
                nn.init.normal_(matrix, std=0.02)

    def forward(self, ids, targets):
        x, rotation = self.tokens(ids), None if self.positions else (self.cos, self.sin)
        if self.positions:
            x = x + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, rotation)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def run(settings, meter):
    """meter.units times settings["steps"] steps on one batch of random tokens."""
    device, gpu = settings["device"], settings["device"] == "cuda"
    meter.notes["version"] = torch.__version__.partition("+")[0]
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    with torch.device(device):
        model = Model(settings)
        ids, targets = torch.randint(settings["vocab"], (2, settings["batch"], settings["context"]))
    loss = torch.compile(model) if settings["compiled"] else model
    working = torch.autocast(device, FORMATS.get(settings["precision"]), enabled=settings["precision"] != "fp32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    meter.wait = torch.cuda.synchronize if gpu else meter.wait
    meter.start()
    for _ in range(meter.units):
        for _ in range(settings["steps"]):
            with working:
                y = loss(ids, targets)
            y.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        meter.tick()
    if gpu:
        meter.notes["peak_mb"] = torch.cuda.max_memory_reserved() / 1e6
